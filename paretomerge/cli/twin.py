"""The command `twin`: a shared model, exclusive parts and a router, by Twin-Merging."""

from pathlib import Path
from typing import Annotated

import typer

from paretomerge.cli import session
from paretomerge.cli.options import AllowMismatch, Overwrite
from paretomerge.errors import ConfigError


def twin(  # noqa: PLR0913 - the options of the command
    base: Annotated[str, typer.Argument(help="The base model.", show_default=False)],
    models: Annotated[
        list[str],
        typer.Argument(
            help="Two or more fine-tunes of it; a task is named after the last part of its path.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", help="The folder to make.", show_default=False)
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            help="NAME=FILE: prompts of a fine-tune, a text with one in each line or JSONL with "
            "the key `prompt`; may be given again.",
        ),
    ] = None,
    study: Annotated[
        Path | None,
        typer.Option("--study", help="A study.yaml to take prompts of tasks from."),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            help="NAME=TASK: a task of the study whose search examples are prompts of a "
            "fine-tune; may be given again.",
        ),
    ] = None,
    weight: Annotated[
        float, typer.Option(help="Of each fine-tune in the shared model.")
    ] = 0.3,
    rank_share: Annotated[
        float,
        typer.Option(help="How much of a matrix's rank is stored for each fine-tune."),
    ] = 0.1,
    seed: Annotated[int, typer.Option(help="Of the router.", min=0)] = 0,
    dtype: Annotated[
        str | None, typer.Option(help="Of the weights. Default: the base's.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N")] = "cpu",
    overwrite: Overwrite = False,
    allow_mismatch: AllowMismatch = False,
) -> None:
    """Merge fine-tunes into a shared model with parts that a router weighs by the prompt.

    The folder is a `TwinModel` for Python, `paretomerge evaluate` scores it, and docs/twin.md says
    when to use it.
    """
    files = session.named_values("--data", "NAME=FILE", data or ())
    tasks = session.named_values("--task", "NAME=TASK", task or ())
    if tasks and study is None:
        raise ConfigError("--task: needs --study, the study.yaml of the tasks")
    if study is not None and not tasks:
        raise ConfigError("--study: needs --task NAME=TASK for each fine-tune")
    from paretomerge.systems.twin.prompts import read_prompts, study_prompts

    prompts: dict[str, list[str]] = {}
    for name, paths in files.items():
        prompts[name] = []
        for path in paths:
            prompts[name] += read_prompts(Path(path))
    if study is not None:
        opened = session.open_study(study)
        session.set_up_process(opened)
        for name, of_tasks in study_prompts(opened, tasks).items():
            prompts[name] = prompts.get(name, []) + of_tasks
    session.hide_progress_bars()
    from paretomerge.systems.twin.build import build_twin
    from paretomerge.systems.twin.manifest import Manifest

    folder = build_twin(
        base,
        models,
        prompts,
        out,
        weight=weight,
        rank_share=rank_share,
        seed=seed,
        dtype=dtype,
        device=device,
        overwrite=overwrite,
        allow_mismatch=allow_mismatch,
    )
    manifest = Manifest.read(folder)
    session.console().print(
        f"wrote {session.short(folder)}: {manifest.bytes / 1e6:,.1f} MB; the router is right about "
        f"{manifest.router_accuracy:.1%} of {manifest.validation_prompts} prompts that it was not "
        "trained on",
        highlight=False,
        soft_wrap=True,
    )
    session.print_notes(manifest.notes)
