"""`paretomerge plan` of a study."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from paretomerge.cli import session
from paretomerge.report.recipes import readable_duration, readable_size

if TYPE_CHECKING:
    from rich.table import Table

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


def print_study_plan(study: "Study", as_json: bool, measure: bool) -> None:
    """Check a study and print what it will do.

    Args:
        study: The study.
        as_json: Whether to print JSON.
        measure: Whether one merge may be made in memory, to measure the time.
    """
    session.set_up_process(study)
    preview = study.preview(measure=measure)
    session.print_notes(preview.notes)
    if as_json:
        print(json.dumps(asdict(preview), indent=2))
        return
    session.console().print(_table(preview))


def _table(preview: "StudyPreview") -> "Table":
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for i, model in enumerate(preview.models):
        heading = ("base", "models", *[""] * i)[i]
        size = f"{_count(model.parameters)} parameters, {readable_size(model.bytes)}"
        table.add_row(heading, f"{model.path} ({size})")
    for i, score in enumerate(preview.scores):
        table.add_row("scores" if i == 0 else "", _score_text(score))
    if preview.watch:
        table.add_row("watch", ", ".join(preview.watch))
    table.add_row("space", f"{preview.parameters} parameters")
    trials = f"{preview.trials}, of which {preview.baselines} are baselines"
    if preview.done:
        trials += f"; {preview.done} are done"
    table.add_row("trials", trials)
    size = readable_size(preview.checkpoint_bytes)
    table.add_row("disk", f"{size} for each merge of the front that is written")
    table.add_row("out", preview.out)
    for i, line in enumerate(_time_lines(preview.times)):
        table.add_row("time" if i == 0 else "", line)
    return table


def _score_text(score: "ScorePreview") -> str:
    direction = score.direction or "constraint only"
    text = f"{score.name} ({direction})"
    if score.search_examples is None:
        return text
    held_out = score.held_out_examples
    return f"{text}: {score.search_examples} search and {held_out} held-out examples"


def _time_lines(times: "Times") -> list[str]:
    lines = []
    if times.trial is not None and times.search is not None:
        one = f"{_duration(times.trial)} for one trial"
        parts = []
        if times.merge is not None:
            parts.append(f"merge {_duration(times.merge)}")
        for name, seconds in times.scores.items():
            parts.append(f"{name} {_duration(seconds)}")
        if parts:
            one += f" ({', '.join(parts)})"
        lines.append(one)
        lines.append(f"{_duration(times.search)} for the trials that are left")
    if times.held_out is not None:
        lines.append(
            f"{_duration(times.held_out)} for each baseline and each merge of the front on "
            "held-out examples, at the end"
        )
    lines.append(f"The estimate rests on {times.basis}.")
    return lines


def _duration(seconds: float) -> str:
    # `readable_duration` has no fractions, which one trial of a small model needs.
    if seconds < 10:
        return f"{seconds:.2g} s"
    return readable_duration(seconds)


def _count(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)
