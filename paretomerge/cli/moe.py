"""The command `moe`: a mixture of experts from dense models."""

from pathlib import Path
from typing import Annotated

import typer

from paretomerge.cli import session
from paretomerge.cli.options import AllowMismatch, Overwrite


def moe(
    config: Annotated[
        Path,
        typer.Argument(
            help="A configuration in mergekit-moe's YAML.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Argument(help="A new folder.", show_default=False)],
    overwrite: Overwrite = False,
    device: Annotated[
        str, typer.Option(help="Where the base reads the prompts: cpu, cuda or cuda:N")
    ] = "cpu",
    shard_size: Annotated[
        str, typer.Option(help="Largest file: 5GB, 500MB, ...")
    ] = "5GB",
    seed: Annotated[int, typer.Option(help="Of gate_mode random.", min=0)] = 0,
    for_search: Annotated[
        bool,
        typer.Option(
            "--for-search",
            help="Write a router of zeros, and each expert's rows as an adapter in OUT/router, so "
            "that a study searches their lengths.",
        ),
    ] = False,
    allow_mismatch: AllowMismatch = False,
) -> None:
    """Build a mixture of experts from dense models.

    It gets the attention of the base, the MLPs of the experts, and a router made of prompts. The
    result is a Mixtral, a Qwen2-MoE or a Qwen3-MoE (docs/moe.md).
    """
    shard_bytes = session.size_in_bytes(shard_size)
    from paretomerge.systems.moe import write_moe

    session.hide_progress_bars()
    plan = write_moe(
        config,
        out,
        overwrite=overwrite,
        shard_bytes=shard_bytes,
        device=device,
        allow_mismatch=allow_mismatch,
        seed=seed,
        for_search=for_search,
    )
    session.print_notes(plan.notes)
    count = len(plan.config.experts)
    experts = "1 expert" if count == 1 else f"{count} experts"
    session.console().print(
        f"wrote {session.short(out)}, a {plan.target.title} of {experts}",
        highlight=False,
        soft_wrap=True,
    )
