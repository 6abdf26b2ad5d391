"""`suggest`: which merges to try first."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paretomerge.cli import session
from paretomerge.cli.options import AsJson
from paretomerge.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from paretomerge.config.settings import StudySettings
    from paretomerge.suggest import SuggestedRecipe, Suggestion

_STUDY_SUFFIXES = (".yaml", ".yml")
_SHOWN = 8  # recipes in the table
_WRITTEN = 3  # recipes that --out writes, and methods of its study
_EVALUATED = 4  # recipes that are scored where tasks are named

_UNKNOWN = (
    "It cannot know what the models are good at, which skills depend on each other, or what a "
    "method does to a whole model: it looks at matrices one by one."
)
_WITH_TEXT = (
    "With text of each model's task (`paretomerge calibrate`), the method regmean was better than "
    "all of these where both were measured: docs/data-informed.md."
)


def suggest(
    models: Annotated[
        list[str],
        typer.Argument(
            help="BASE MODEL MODEL..., or a study.yaml.", show_default=False
        ),
    ],
    task: Annotated[
        list[str] | None,
        typer.Option("--task", help="A task to score on; may be given again."),
    ] = None,
    evaluate: Annotated[
        int | None,
        typer.Option(
            "--evaluate",
            help="Recipes to score, beside the models alone. Default: 4 with --task, else none.",
            min=0,
        ),
    ] = None,
    examples: Annotated[
        int, typer.Option(help="Examples of each task to score on.", min=1)
    ] = 50,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="A new folder for the first recipes and, unless you gave one, a study.yaml.",
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(help="Where to score: cpu, cuda or cuda:N")
    ] = "cpu",
    as_json: AsJson = False,
) -> None:
    """Suggest merges for a family of models, the most promising first.

    It reads a sample of the models' layers, tries every merge method on them, and ranks the methods
    by how little each breaks of what the models do. With --task, or a study.yaml and --evaluate,
    the models and the first recipes are scored on a few search examples.
    """
    from paretomerge.suggest import suggest as rank

    if out is not None and out.exists():
        raise ConfigError(f"--out: {out} exists; name a new folder")
    base, sources, settings = _family(models, task or (), device)
    count = evaluate
    if count is None:
        count = _EVALUATED if task else 0
    if count and settings is None:
        raise ConfigError("--evaluate: name a --task to score on, or give a study.yaml")
    if not as_json:
        session.console().print(
            "Trying every method on a sample of the layers; this takes a minute or more ...",
            style="dim",
            highlight=False,
        )
    suggestion = rank(base, sources)
    if count and settings is not None:
        suggestion = _scored(suggestion, settings, count, examples, quiet=as_json)
    if as_json:
        print(json.dumps(_rows(suggestion), indent=2))
    else:
        _show(suggestion, "--evaluate 4" if settings is not None else "--task")
    if out is not None:
        advice = _write(suggestion, out, task or (), device, models[0])
        if not as_json:
            session.console().print(f"\n{advice}", highlight=False, soft_wrap=True)


def _family(
    models: Sequence[str], tasks: Sequence[str], device: str
) -> tuple[str, dict[str, str], "StudySettings | None"]:
    """The base, the sources by name, and the study that scores them, if there is one."""
    from paretomerge.space.sources import named_sources

    first = Path(models[0])
    if first.suffix in _STUDY_SUFFIXES:
        from paretomerge.study.parts import study_pool

        if len(models) > 1 or tasks:
            raise ConfigError(
                "suggest: a study.yaml has models and tasks of its own; name no others"
            )
        settings = session.open_study(first).settings
        pool = study_pool(settings)
        return pool.base, dict(pool.sources), settings
    base, *others = models
    sources = named_sources(others)
    if len(sources) < 2:
        raise ConfigError("suggest: name the base and two or more fine-tunes of it")
    if not tasks:
        return base, sources, None
    import paretomerge as pm

    study = pm.Study(
        base=base,
        models=others,
        objectives=[pm.Task(name) for name in tasks],
        device=device,
    )
    return base, sources, study.settings


def _scored(
    suggestion: "Suggestion",
    settings: "StudySettings",
    count: int,
    examples: int,
    quiet: bool,
) -> "Suggestion":
    """Score the first recipes on a study's search examples."""
    from dataclasses import replace

    from paretomerge.suggest.scores import score_first

    def watch(name: str) -> None:
        if not quiet:
            session.console().print(f"scoring {name}", style="dim", highlight=False)

    session.hide_progress_bars()
    evaluation = replace(settings.evaluation, search_items=examples)
    scoring = replace(settings, evaluation=evaluation)
    return score_first(suggestion, scoring, count, watch)


def _write(
    suggestion: "Suggestion",
    out: Path,
    tasks: Sequence[str],
    device: str,
    first_argument: str,
) -> str:
    """Write the first recipes, and a study.yaml that starts from them.

    Returns:
        What to do with them.
    """
    from paretomerge.checkpoint.writer import new_folder
    from paretomerge.cli.init import next_step, write_study_file

    first = suggestion.recipes[:_WRITTEN]
    methods = _searchable_methods(suggestion)
    has_study = Path(first_argument).suffix in _STUDY_SUFFIXES
    with new_folder(out) as folder:
        starts = []
        for place, suggested in enumerate(first, 1):
            name = f"{place}-{suggested.method}.yml"
            recipe = suggested.recipe.resolve_paths(Path.cwd())
            (folder / name).write_text(recipe.to_yaml(), encoding="utf-8")
            starts.append(name)
        if not has_study:
            models = _absolute([suggestion.base, *suggestion.sources.values()])
            file = folder / "study.yaml"
            write_study_file(
                file, models[0], models[1:], tasks, device, methods, starts
            )
    if not has_study:
        study_file = session.short(out / "study.yaml")
        return f"wrote {session.short(out)}; {next_step(study_file, tasks)}"
    paths = [str(session.short(out / name)) for name in starts]
    return (
        f"wrote {session.short(out)}; to begin a search with these recipes, put into "
        f"{first_argument}, with a new `out` if the study has trials:\n"
        f"space: {{ methods: [{', '.join(methods)}] }}\nstarts: [{', '.join(paths)}]"
    )


def _searchable_methods(suggestion: "Suggestion") -> list[str]:
    """The first methods that a space can have."""
    from paretomerge.space.weights.method_parameters import SEARCHABLE_METHODS

    methods = []
    for suggested in suggestion.recipes:
        if suggested.method in SEARCHABLE_METHODS:
            methods.append(suggested.method)
    return methods[:_WRITTEN]


def _absolute(models: Sequence[str]) -> list[str]:
    from paretomerge.space.sources import model_path

    return [model_path(Path.cwd(), model) for model in models]


def _rows(suggestion: "Suggestion") -> dict[str, Any]:
    """The suggestion as plain data, fit for JSON."""
    recipes = []
    for suggested in suggestion.recipes:
        row = {
            "method": suggested.method,
            "interference": suggested.interference,
            "by_source": dict(suggested.by_source),
            "lambda": suggested.scale,
            "reasons": list(suggested.reasons),
            "scores": {name: s.value for name, s in suggested.scores.items()},
            "recipe": suggested.recipe.to_dict(),
        }
        recipes.append(row)
    alone = {}
    for source, scores in suggestion.alone.items():
        alone[source] = {name: score.value for name, score in scores.items()}
    return {
        "base": suggestion.base,
        "sources": dict(suggestion.sources),
        "findings": list(suggestion.findings),
        "recipes": recipes,
        "alone": alone,
    }


def _show(suggestion: "Suggestion", option: str) -> None:
    """Print a suggestion; `option` is the one that scores its recipes."""
    console = session.console()
    layers = ", ".join(str(layer) for layer in suggestion.layers)
    lines = [f"What the models changed (layers {layers}):"]
    lines += [f"- {finding}" for finding in suggestion.findings]
    console.print("\n".join(lines), highlight=False)
    console.print()
    console.print(_table(suggestion), highlight=False)
    console.print()
    first = suggestion.recipes[0]
    lines = [f"Why {first.method} comes first:"]
    lines += [f"- {reason}" for reason in _why_first(suggestion)]
    lines += ["", _UNKNOWN, _WITH_TEXT]
    if not suggestion.alone:
        lines.append(f"Add {option} to score the models and the first recipes.")
    console.print("\n".join(lines), highlight=False)


def _why_first(suggestion: "Suggestion") -> list[str]:
    first = suggestion.recipes[0]
    worst = max(first.by_source, key=first.by_source.__getitem__)
    kept = 1 - first.interference
    least = 1 - first.by_source[worst]
    reasons = [
        f"It keeps {kept:.0%} of what the models do to their own inputs, least of {worst} "
        f"({least:.0%})."
    ]
    if first.mean_score is not None:
        reasons.insert(0, f"It has the best mean score, {first.mean_score:.3f}.")
    if first.scale is not None:
        reasons.append(f"lambda {first.scale:g} is the scale that keeps most.")
    return [*reasons, *first.reasons]


def _table(suggestion: "Suggestion") -> "Table":
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("recipe", no_wrap=True)
    table.add_column("kept", justify="right")
    tasks = list(next(iter(suggestion.alone.values()), {}))
    for name in tasks:
        table.add_column(name, justify="right")
    if tasks:
        table.add_column("mean", justify="right")
    for source, scores in suggestion.alone.items():
        values = [score.value for score in scores.values()]
        cells = [f"{value:.3f}" for value in (*values, sum(values) / len(values))]
        table.add_row(f"{source} alone", "", *cells, style="dim")
    for suggested in suggestion.recipes[:_SHOWN]:
        table.add_row(*_cells(suggested, len(tasks)))
    return table


def _cells(suggested: "SuggestedRecipe", n_tasks: int) -> list[str]:
    name = suggested.method
    if suggested.scale is not None:
        name += f", lambda {suggested.scale:g}"
    cells = [name, f"{1 - suggested.interference:.0%}"]
    mean = suggested.mean_score
    if n_tasks and mean is not None:
        cells += [f"{score.value:.3f}" for score in suggested.scores.values()]
        cells.append(f"{mean:.3f}")
    return cells
