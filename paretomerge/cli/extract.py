"""The command that writes a merge as an adapter: `extract-lora`."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from paretomerge.cli import session
from paretomerge.cli.options import AllowMismatch, Overwrite

if TYPE_CHECKING:
    from paretomerge.systems.lora import ExtractedAdapter

_NAMES_SHOWN = 5


def extract_lora(  # noqa: PLR0913 - a command's options
    merged: Annotated[
        str,
        typer.Argument(help="A checkpoint, also model+adapter.", show_default=False),
    ],
    out: Annotated[Path, typer.Argument(help="A new folder.", show_default=False)],
    base: Annotated[
        str,
        typer.Option("--base", help="The model that the adapter is for."),
    ],
    rank: Annotated[
        int | None, typer.Option(help="The largest rank of each matrix.", min=1)
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(
            help="Or the share of each matrix's energy (squared Frobenius norm) to keep, such as "
            "0.9."
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of the factors. Default: the base's.")
    ] = None,
    drop_others: Annotated[
        bool,
        typer.Option("--drop-others", help="Leave out what an adapter cannot hold."),
    ] = False,
    overwrite: Overwrite = False,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N")] = "cpu",
    allow_mismatch: AllowMismatch = False,
) -> None:
    """Write what a merge adds to its base as a LoRA adapter in peft's format.

    Each matrix's change is cut to a rank, or to the smallest rank that keeps a share of its energy.
    Norms and biases that changed are stored whole. What an adapter cannot hold is named, and
    nothing is written without --drop-others.
    """
    from paretomerge.systems.lora import extract_lora

    adapter = extract_lora(
        merged,
        base,
        out,
        rank=rank,
        energy=energy,
        dtype=dtype,
        drop_others=drop_others,
        overwrite=overwrite,
        device=device,
        allow_mismatch=allow_mismatch,
    )
    for line in _summary(adapter):
        session.console().print(line, highlight=False, soft_wrap=True)
    session.print_notes(adapter.notes)


def _summary(adapter: "ExtractedAdapter") -> list[str]:
    """What was kept and lost, a line each."""
    from paretomerge.systems.peft_places import describe_ranks

    lines = [
        f"kept   {len(adapter.ranks)} matrices at {describe_ranks(adapter.ranks)}: "
        f"{adapter.kept_energy:.2%} of the energy of their change"
    ]
    if adapter.whole:
        lines.append(f"whole  {_listed(adapter.whole)}")
    if adapter.lost:
        lines.append(f"lost   {_listed(adapter.lost)}")
    share = adapter.bytes / adapter.merged_bytes
    lines.append(
        f"wrote {session.short(adapter.folder)}: {adapter.bytes / 1e6:.3g} MB, {share:.1%} of the "
        "checkpoint"
    )
    return lines


def _listed(names: Iterable[str]) -> str:
    listed = list(names)
    text = f"{len(listed)} tensors: {', '.join(listed[:_NAMES_SHOWN])}"
    n_hidden = len(listed) - _NAMES_SHOWN
    return f"{text} and {n_hidden} more" if n_hidden > 0 else text
