"""The commands `calibrate` and `learn-weights`: models on text, for merges that need data."""

from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from paretomerge.cli import session
from paretomerge.cli.options import Overwrite, Quiet
from paretomerge.errors import ConfigError, unknown_name

if TYPE_CHECKING:
    from paretomerge.calibration import Example


Base = Annotated[
    str, typer.Argument(help="The model that MODELS come from.", show_default=False)
]
Models = Annotated[
    list[str], typer.Argument(help="The fine-tunes.", show_default=False)
]
Data = Annotated[
    list[str] | None,
    typer.Option(
        help="MODEL=FILE: what MODEL reads, a text or JSONL file; give one for each model.",
        show_default=False,
    ),
]
StudyOfTasks = Annotated[
    Path | None,
    typer.Option("--study", help="A study.yaml, for --task.", show_default=False),
]
Tasks = Annotated[
    list[str] | None,
    typer.Option(
        help="MODEL=TASK: MODEL reads the search examples of a task of --study.",
        show_default=False,
    ),
]
MaxTokens = Annotated[int, typer.Option(help="The longest example, in tokens.", min=2)]
BatchSize = Annotated[int, typer.Option(help="Examples in one forward pass.", min=1)]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N")]


class Kind(StrEnum):
    """What is measured."""

    regmean = "regmean"
    regmean_pp = "regmean_pp"
    fisher = "fisher"


def calibrate(  # noqa: PLR0913 - the options of a command
    base: Base,
    models: Models,
    out: Annotated[Path, typer.Option(help="Folder to create.", show_default=False)],
    data: Data = None,
    study: StudyOfTasks = None,
    task: Tasks = None,
    kind: Annotated[
        list[Kind] | None,
        typer.Option(help="What to measure; may be given again. Default: regmean."),
    ] = None,
    through_merge: Annotated[
        bool,
        typer.Option(
            "--through-merge",
            help="Measure regmean_pp: on inputs that came through the merged lower layers.",
        ),
    ] = False,
    alpha: Annotated[
        float,
        typer.Option(
            help="Of regmean_pp: factor of what is off the diagonal.", min=0, max=1
        ),
    ] = 0.9,
    examples: Annotated[
        int, typer.Option(help="Most examples that a model reads.", min=1)
    ] = 256,
    max_tokens: MaxTokens = 512,
    batch_size: BatchSize = 8,
    device: Device = "cpu",
    quiet: Quiet = False,
    overwrite: Overwrite = False,
) -> None:
    """Measure models on text, for the methods regmean, regmean_pp and fisher.

    A recipe names the folder as `calibration: OUT`. docs/data-informed.md has an example.
    """
    from paretomerge.calibration import calibrate as measure

    kinds = [entry.value for entry in kind or []]
    if through_merge:
        kinds.append("regmean_pp")
    texts = _texts(data, study, task, models)
    folder = measure(
        base,
        models,
        texts,
        out,
        kinds=kinds or ["regmean"],  # type: ignore[arg-type]  # typer has checked them
        examples=examples,
        max_tokens=max_tokens,
        batch_size=batch_size,
        alpha=alpha,
        device=device,
        overwrite=overwrite,
        on_progress=_teller(quiet),
    )
    session.console().print(
        f"{folder} is written; a recipe uses it as `calibration: {folder}`",
        highlight=False,
        soft_wrap=True,
    )


def learn_weights(  # noqa: PLR0913 - the options of a command
    base: Base,
    models: Models,
    out: Annotated[
        Path, typer.Option(help="Recipe file to write.", show_default=False)
    ],
    data: Data = None,
    study: StudyOfTasks = None,
    task: Tasks = None,
    groups: Annotated[
        int | None,
        typer.Option(
            help="Groups of layers with weights of their own. Default: 4.", min=1
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="The most steps.", min=0)] = 300,
    lr: Annotated[
        float, typer.Option("--lr", help="Adam's learning rate.", min=0)
    ] = 0.01,
    examples: Annotated[
        int,
        typer.Option(help="Most examples of a model; a quarter is split off.", min=2),
    ] = 128,
    max_tokens: MaxTokens = 512,
    batch_size: BatchSize = 8,
    device: Device = "cpu",
    quiet: Quiet = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT if it exists.")
    ] = False,
) -> None:
    """Learn the weights of a task arithmetic from text, without labels (AdaMerging).

    OUT is a recipe for `paretomerge merge`.
    """
    from paretomerge.calibration.learn import check_recipe_file, write_recipe
    from paretomerge.calibration.learn import learn_weights as learn

    check_recipe_file(out, overwrite)
    texts = _texts(data, study, task, models)

    learned = learn(
        base,
        models,
        texts,
        groups=groups,
        lr=lr,
        steps=steps,
        examples=examples,
        max_tokens=max_tokens,
        batch_size=batch_size,
        device=device,
        on_progress=_teller(quiet),
    )
    write_recipe(learned, out)
    session.console().print(
        f"{out} is written; merge it with `paretomerge merge {out} FOLDER`",
        highlight=False,
        soft_wrap=True,
    )


def _texts(
    data: Sequence[str] | None,
    study: Path | None,
    task: Sequence[str] | None,
    models: Sequence[str],
) -> "dict[str, Path | Sequence[Example]]":
    """Model -> its text, from --data and --task."""
    texts: dict[str, Path | Sequence[Example]] = {}
    for model, file in _pairs("--data", data, models).items():
        texts[model] = Path(file)
    tasks = _pairs("--task", task, models)
    if tasks:
        for model, of_task in _task_texts(study, tasks).items():
            if model in texts:
                raise ConfigError(
                    f"--task: {model} has a text of --data already; give one of them"
                )
            texts[model] = of_task
    return texts


def _teller(quiet: bool) -> Callable[[str], None]:
    def tell(message: str) -> None:
        if not quiet:
            session.console().print(message, highlight=False, soft_wrap=True)

    return tell


def _pairs(
    option: str, entries: Sequence[str] | None, models: Sequence[str]
) -> dict[str, str]:
    """MODEL=VALUE of an option, where MODEL may be the last part of a path."""
    by_last_part: dict[str, list[str]] = {}
    for model in dict.fromkeys(models):
        by_last_part.setdefault(Path(model).name, []).append(model)
    pairs: dict[str, str] = {}
    for entry in entries or []:
        name, value = _split(option, entry, (*models, *by_last_part))
        meant = [name] if name in models else by_last_part.get(name, [])
        if not meant:
            raise ConfigError(f"{option}: {unknown_name('model', name, models)}")
        if len(meant) > 1:
            raise ConfigError(
                f"{option}: {name} may be {' or '.join(meant)}; write the whole name"
            )
        if meant[0] in pairs:
            raise ConfigError(
                f"{option}: {meant[0]} is named twice; name each model once"
            )
        pairs[meant[0]] = value
    return pairs


def _split(option: str, entry: str, names: Sequence[str]) -> tuple[str, str]:
    """Name and value of an entry. Both may hold an equals sign; a known name decides."""
    parts = entry.split("=")
    for n in range(1, len(parts)):
        name, value = "=".join(parts[:n]), "=".join(parts[n:])
        if name in names and value:
            return name, value
    name, _, value = entry.partition("=")
    if not name or not value:
        raise ConfigError(f"{option}: write MODEL=VALUE, not {entry!r}")
    return name, value


def _task_texts(
    study_file: Path | None, tasks: Mapping[str, str]
) -> "dict[str, Sequence[Example]]":
    """Model -> the search examples of its task."""
    if study_file is None:
        raise ConfigError("--task: name the study.yaml that has the task with --study")
    from paretomerge.study.calibration import task_examples

    study = session.open_study(study_file)
    texts: dict[str, Sequence[Example]] = {}
    for model, name in tasks.items():
        texts[model] = task_examples(study.settings, name)
    return texts
