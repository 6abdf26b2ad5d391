"""Tables of a study's trials: rows of plain data, and their look on a terminal."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from paretomerge.evaluate.evaluator import Score
from paretomerge.study.record import Trial
from paretomerge.study.study import Study


def title(trial: Trial) -> str:
    """What a trial is called."""
    return trial.label or f"trial {trial.number}"


def rows(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """One plain dict per trial, fit for JSON: scores and standard errors, search and held-out, and the parameters."""
    return [
        {
            "trial": trial.number,
            "label": trial.label,
            "failure": trial.failure,
            "search": _numbers(trial.scores),
            "held_out": None if trial.held_out is None else _numbers(trial.held_out),
            "params": dict(trial.params),
        }
        for trial in trials
    ]


def mean(study: Study, scores: Any) -> float | None:
    """The plain mean of the objectives' scores; None where one is missing."""
    values = [scores[o.name].value for o in study.objectives if scores and o.name in scores]
    return sum(values) / len(values) if len(values) == len(study.objectives) else None


def terminal_table(study: Study, trials: Sequence[Trial], heading: str, marked: int | None = None) -> Table:
    """Held-out scores where they are known, search scores beside them; `marked` is the picked trial's number."""
    table = Table(title=heading, title_justify="left", box=None, header_style="bold", pad_edge=False)
    table.add_column("", no_wrap=True)
    for objective in study.objectives:
        table.add_column(f"{objective.name}\nsearch", justify="right", style="dim")
        table.add_column("\nheld-out", justify="right")
    table.add_column("mean\nsearch", justify="right", style="dim")
    table.add_column("\nheld-out", justify="right")
    for trial in trials:
        held_out = trial.held_out or {}
        cells = []
        for objective in study.objectives:
            cells += [_cell(trial.scores.get(objective.name)), _cell(held_out.get(objective.name))]
        means = [mean(study, trial.scores), mean(study, held_out)]
        cells += ["-" if value is None else f"{value:.3f}" for value in means]
        name = ("→ " if trial.number == marked else "  ") + title(trial)
        table.add_row(name, *cells, style="bold green" if trial.number == marked else None)
    errors = [t.held_out[o.name].stderr for t in trials if t.held_out for o in study.objectives if o.name in t.held_out]
    if errors:
        table.caption = f"standard errors of the held-out scores: at most {max(errors):.3f}"
        table.caption_justify = "left"
    return table


def _cell(score: Score | None) -> str:
    return "-" if score is None else f"{score.value:.3f}"


def _numbers(scores: Any) -> dict[str, dict[str, float]]:
    return {name: {"value": s.value, "stderr": s.stderr, "n": s.n} for name, s in scores.items()}
