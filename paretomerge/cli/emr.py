"""The commands of EMR-Merging: `emr` and `expand`."""

from pathlib import Path
from typing import Annotated

import typer

from paretomerge.cli import session
from paretomerge.cli.options import AllowMismatch, Overwrite
from paretomerge.errors import ConfigError


def emr(
    base: Annotated[str, typer.Argument(help="The base model.", show_default=False)],
    models: Annotated[
        list[str],
        typer.Argument(
            help="Fine-tunes of it, each task=MODEL or a model alone.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", help="The folder to make.", show_default=False)
    ],
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Of the unified checkpoint. Default: the widest of all models; float32 keeps "
            "adapters unrounded."
        ),
    ] = None,
    overwrite: Overwrite = False,
    allow_mismatch: AllowMismatch = False,
) -> None:
    """Write several fine-tunes as one checkpoint, with a mask for each task (EMR-Merging).

    The folder is a checkpoint that loads as it is. `expand` writes the model of one task from it.
    """
    from paretomerge.systems.emr import emr
    from paretomerge.systems.task_models import task_models

    summary = emr(
        base,
        task_models(models),
        out,
        dtype=dtype,
        overwrite=overwrite,
        allow_mismatch=allow_mismatch,
    )
    for name, task in summary.tasks.items():
        _print(
            f"{name:16s} lambda {task.scale:.3f}, its mask has {task.density:.0%} of the parameters"
        )
    size = summary.unified_bytes + summary.mask_bytes
    _print(
        f"wrote {session.short(out)}: {size / 1e6:.4g} MB, of which {summary.mask_bytes / 1e6:.3g} "
        f"MB are masks; {size / summary.model_bytes:.0%} of the {len(summary.tasks)} models"
    )
    session.print_notes(summary.notes)


def expand(
    model: Annotated[
        str, typer.Argument(help="What `emr` or `twin` wrote.", show_default=False)
    ],
    out: Annotated[Path, typer.Argument(help="A new folder.", show_default=False)],
    task: Annotated[str, typer.Option("--task", help="One of its tasks.")],
    base: Annotated[
        str | None,
        typer.Option("--base", help="The base model, if it is no longer where it was."),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write the plain checkpoint of one task of a folder that `emr` or `twin` wrote.

    For `emr`, the base is read and compared by checksum.
    """
    from paretomerge.systems.twin.manifest import is_twin_folder

    if is_twin_folder(model):
        if base is not None:
            raise ConfigError(
                f"--base: {model} holds its shared model and needs no base; leave --base out"
            )
        from paretomerge.systems.twin import export_corner

        export_corner(model, task, out, overwrite=overwrite)
    else:
        from paretomerge.systems.expand import expand

        expand(model, task, out, base=base, overwrite=overwrite)
    _print(f"wrote {session.short(out)}")


def _print(line: str) -> None:
    session.console().print(line, highlight=False, soft_wrap=True)
