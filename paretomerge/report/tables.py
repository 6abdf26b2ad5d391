"""Tables of a study's trials: rows of plain data, and their look on a terminal."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from paretomerge.evaluate.evaluator import Score
from paretomerge.study.record import Trial
from paretomerge.study.study import Study


def title(trial: Trial) -> str:
    """What a trial is called, and that it is infeasible where it is."""
    name = trial.label or f"trial {trial.number}"
    return name if not trial.broken else f"{name}, infeasible: {trial.broken}"


def rows(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """One plain dict per trial, fit for JSON: scores and standard errors, search and held-out, and the parameters."""
    return [
        {
            "trial": trial.number,
            "label": trial.label,
            "failure": trial.failure,
            "constraints": dict(trial.constraints),
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
    table = Table(title=heading, title_justify="left", box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for name in (*(o.name for o in study.objectives), "mean"):
        table.add_column(f"{name}\n[dim]search[/] held", justify="right", min_width=11)
    for trial in trials:
        held_out = trial.held_out or {}
        cells = [_pair(_value(trial.scores.get(o.name)), _value(held_out.get(o.name))) for o in study.objectives]
        cells.append(_pair(mean(study, trial.scores), mean(study, held_out)))
        name = ("→ " if trial.number == marked else "  ") + title(trial)
        table.add_row(name, *cells, style="bold green" if trial.number == marked else None)
    errors = [t.held_out[o.name].stderr for t in trials if t.held_out for o in study.objectives if o.name in t.held_out]
    if errors:
        table.caption = f"standard errors of the held-out scores: at most {max(errors):.3f}"
        table.caption_justify = "left"
    return table


def _value(score: Score | None) -> float | None:
    return None if score is None else score.value


def _pair(search: float | None, held_out: float | None) -> str:
    """Search score, dimmed, and held-out score, five places each."""
    left, right = (f"{'-':>5}" if value is None else f"{value:5.3f}" for value in (search, held_out))
    return f"[dim]{left}[/] {right}"


def _numbers(scores: Any) -> dict[str, dict[str, float]]:
    return {name: {"value": s.value, "stderr": s.stderr, "n": s.n} for name, s in scores.items()}
