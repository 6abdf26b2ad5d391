"""`paretomerge plan` of a recipe or a study."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from paretomerge.cli import session
from paretomerge.errors import ConfigError, ErrorCollector, RecipeError
from paretomerge.report.recipes import readable_size

if TYPE_CHECKING:
    from rich.table import Table

    from paretomerge.merging.plan.plan import Plan
    from paretomerge.recipe import Recipe
    from paretomerge.study.calibration import StatisticsPreview
    from paretomerge.study.memory import MemoryPlan
    from paretomerge.study.preview import ScorePreview, StudyPreview, Times
    from paretomerge.study.study import Study

_RECIPE_KEYS = {"merge_method", "slices", "modules"}
_STUDY_KEYS = {"objectives", "space", "sampler", "trials", "evaluate", "base"}


def is_study_file(path: Path) -> bool:
    """Whether a file describes a study, and not a recipe.

    Args:
        path: The file, or a folder with a study.yaml.

    Returns:
        True for a study. False for all else, of which the reader of recipes says what is wrong.
    """
    if path.is_dir():
        return True
    try:
        # The first of several documents: a study has one.
        with path.open(encoding="utf-8") as stream:
            content = next(yaml.safe_load_all(stream), None)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return path.name in ("study.yaml", "study.yml")
    if not isinstance(content, dict):
        return path.name in ("study.yaml", "study.yml")
    keys = {str(key) for key in content}
    return bool(keys & _STUDY_KEYS) and not keys & _RECIPE_KEYS


def plan_recipe(path: Path, allow_mismatch: bool) -> "Plan":
    """Check a recipe from headers alone.

    Args:
        path: The recipe.
        allow_mismatch: Whether models are merged that do not seem to belong together.

    Returns:
        The plan.

    Raises:
        ParetoMergeError: All that is wrong. With a wrong dtype, all else is checked, too.
    """
    from paretomerge.merging.plan.make import make_plan
    from paretomerge.recipe import Recipe

    problems = ErrorCollector()
    recipe: Recipe | None = None
    with problems.collect():
        recipe = Recipe.load(path)
    if recipe is None:
        recipe = _without_dtypes(path)
    with problems.collect():
        if recipe is not None:
            # A check must not download gigabytes from the Hub.
            plan = make_plan(recipe, download=False, allow_mismatch=allow_mismatch)
    problems.raise_if_any()
    return plan


def _without_dtypes(path: Path) -> "Recipe | None":
    """A recipe whose only fault is a dtype, without it; None for all others."""
    from paretomerge.recipe import Recipe
    from paretomerge.recipe.text import dump, parse

    try:
        documents = parse(path.read_text(encoding="utf-8"), str(path))
        texts = []
        for document in documents:
            content = dict(document) if isinstance(document, dict) else {}
            for key in ("dtype", "out_dtype"):
                content.pop(key, None)
            texts.append(dump(content))
        recipe = Recipe.from_yaml("---\n".join(texts), str(path))
    except (OSError, UnicodeDecodeError, RecipeError):
        return None
    return recipe.resolve_paths(path.parent)


def print_study_plan(
    path: Path,
    overrides: Sequence[str],
    allow_mismatch: bool,
    as_json: bool,
    measure: bool,
    workers: int | None = None,
) -> None:
    """Check a study and print what it will do.

    Args:
        path: The study.yaml.
        overrides: Keys to set in place of the file's.
        allow_mismatch: True to set the key of that name.
        as_json: Whether to print JSON.
        measure: Whether one merge may be made in memory, to measure the time.
        workers: Number of workers that memory and time are planned for; by default the study's.
    """
    study = _open(path, overrides, allow_mismatch)
    session.set_up_process(study)
    preview = study.preview(measure=measure, workers=workers)
    session.print_notes(preview.notes)
    if as_json:
        print(json.dumps(asdict(preview), indent=2))
        return
    session.console().print(_table(preview))


def _open(path: Path, overrides: Sequence[str], allow_mismatch: bool) -> "Study":
    """Open a study. If its file has wrong keys, what the others say is checked, too."""
    problems = ErrorCollector()
    with problems.collect():
        return session.open_study(path, overrides, allow_mismatch)
    with problems.collect():
        rest = _rest_of_study(path, overrides)
        if rest is not None:
            session.set_up_process(rest)
            rest.preview(measure=False)
    problems.raise_if_any()
    raise AssertionError("a study that cannot be opened has a problem")


def _rest_of_study(path: Path, overrides: Sequence[str]) -> "Study | None":
    """The study without its wrong keys; None where they leave no study."""
    from paretomerge.config.schema import config_file
    from paretomerge.config.tolerant import load_right_keys
    from paretomerge.study.study import Study

    file = config_file(path)
    try:
        config = load_right_keys(file, overrides)
        if config is None:
            return None
        return Study.from_config(config, file.resolve().parent)
    except ConfigError:
        # Reported by the first attempt.
        return None


def _table(preview: "StudyPreview") -> "Table":
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for i, model in enumerate(preview.models):
        heading = ("base", "models", *[""] * i)[i]
        size = f"{_count(model.parameters)} parameters, {readable_size(model.bytes)}"
        table.add_row(heading, f"{model.path} ({size})")
    _add_rows(table, "scores", map(_score_text, preview.scores))
    if preview.watch:
        table.add_row("watch", ", ".join(preview.watch))
    table.add_row("space", f"{preview.parameters} parameters")
    trials = f"{preview.trials}, of which {preview.baselines} are baselines"
    if preview.baselines >= preview.trials:
        trials = (
            f"{preview.trials}, all of them among the {preview.baselines} baselines"
        )
    if preview.done:
        trials += f"; {preview.done} are done"
    table.add_row("trials", trials)
    _add_rows(table, "memory", _memory_lines(preview.memory))
    _add_rows(table, "disk", _disk_lines(preview))
    table.add_row("out", preview.out)
    times = [*_time_lines(preview.times), *_forecast_lines(preview)]
    if preview.statistics is not None:
        times.insert(0, _statistics_line(preview.statistics))
    _add_rows(table, "time", times)
    _add_rows(table, "does not fit", preview.memory.problems)
    return table


def _add_rows(table: "Table", heading: str, lines: Iterable[str]) -> None:
    """Add lines, the first one beside their heading."""
    for line in lines:
        table.add_row(heading, line)
        heading = ""


def _disk_lines(preview: "StudyPreview") -> list[str]:
    size = readable_size(preview.checkpoint_bytes)
    free = readable_size(preview.memory.machine.disk)
    lines = [f"{size} for each merge that is written; {free} are free"]
    if preview.statistics is not None:
        size = readable_size(preview.statistics.bytes)
        lines.append(f"{size} for statistics in {preview.statistics.folder}")
    return lines


def _statistics_line(statistics: "StatisticsPreview") -> str:
    work = (
        f"{statistics.models} models read up to {statistics.examples} examples in all"
    )
    if statistics.seconds is None:
        return f"before the first trial {work}, which is not estimated"
    seconds = session.duration(statistics.seconds)
    return f"{seconds} before the first trial, in which {work}"


def _memory_lines(memory: "MemoryPlan") -> list[str]:
    """What is needed of the host and of the GPU, and what is free."""
    machine = memory.machine
    lines = [
        f"{readable_size(memory.host)} with {_workers(memory.workers)}, beside "
        f"{readable_size(memory.mapped)} of mapped files; {readable_size(machine.host)} are free"
    ]
    if memory.gpu is not None:
        free = "its free memory is not known"
        if machine.gpu is not None:
            free = f"{readable_size(machine.gpu)} are free"
        lines.append(f"{readable_size(memory.gpu)} of each GPU; {free}")
    parts = {
        "live model": memory.live,
        "kept beside it": memory.kept,
        "a merge": memory.merge,
        "a batch": memory.score,
    }
    sizes = [f"{name} {readable_size(size)}" for name, size in parts.items() if size]
    lines.append(f"for each worker: {', '.join(sizes)}; `sources: {memory.sources}`")
    return lines


def _workers(number: int) -> str:
    return "1 worker" if number == 1 else f"{number} workers"


def _forecast_lines(preview: "StudyPreview") -> list[str]:
    """The trials that are left with one and with more workers."""
    lines = []
    for forecast in preview.forecasts:
        if forecast.workers == 1:
            continue
        lines.append(
            f"{session.duration(forecast.wall)} with {forecast.workers} workers, which wait "
            f"{forecast.idle:.0%} of the time"
        )
    costs = preview.times.costs
    if preview.forecasts and costs is not None:
        lines.append(
            f"the sampler takes {session.duration(costs.ask)} for a proposal, and can keep "
            f"{_workers(costs.most_workers)} busy"
        )
    return lines


def _score_text(score: "ScorePreview") -> str:
    direction = score.direction or "constraint only"
    text = f"{score.name} ({direction})"
    if score.search_examples is None:
        return text
    held_out = score.held_out_examples
    return f"{text}: {score.search_examples} search and {held_out} held-out examples"


def _time_lines(times: "Times") -> list[str]:
    if times.trial is None or times.search is None:
        return [f"not estimated: {times.basis}"]
    lines = []
    one = f"{session.duration(times.trial)} for one trial"
    parts = []
    if times.merge is not None:
        parts.append(f"merge {session.duration(times.merge)}")
    for name, seconds in times.scores.items():
        parts.append(f"{name} {session.duration(seconds)}")
    if parts:
        one += f" ({', '.join(parts)})"
    lines.append(one)
    if times.search:
        lines.append(f"{session.duration(times.search)} for the trials that are left")
    else:
        lines.append("no trial is left")
    if times.held_out is not None:
        lines.append(
            f"{session.duration(times.held_out)} for each baseline and each merge of the front on "
            "held-out examples, at the end"
        )
    lines.append(f"The estimate rests on {times.basis}.")
    return lines


def _count(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)
