"""Tables of a study's trials: rows of plain data, and their look on a terminal."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from paretomerge.decide.compare import Comparison
from paretomerge.evaluate.evaluator import Score
from paretomerge.pareto.ranking import normalised
from paretomerge.record.record import Trial
from paretomerge.study.study import Study

_ANY_WIDTH = 10_000


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


def best_first(study: Study, trials: Sequence[Trial]) -> list[Trial]:
    """By the mean of the search scores, each objective turned to be maximised and scaled to [0, 1] over `trials`."""
    if not trials:
        return []
    means = normalised([t.values(study.objectives) for t in trials]).mean(1)
    return [trials[i] for i in np.argsort(-means, kind="stable")]


@dataclass(frozen=True)
class Fitting:
    """The wide table where the terminal has room for it, else the narrow one."""

    wide: Table
    narrow: Table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        needed = Measurement.get(console, options.update(max_width=_ANY_WIDTH), self.wide).maximum
        yield self.wide if needed <= options.max_width else self.narrow


def terminal_table(
    study: Study, trials: Sequence[Trial], heading: str, marked: int | None = None
) -> Fitting:
    """Held-out scores where they are known, search scores beside them; on a narrow terminal in their place alone. `marked` is the
    picked trial's number.
    """
    return Fitting(*(_scores_table(study, trials, heading, marked, both) for both in (True, False)))


def _scores_table(
    study: Study, trials: Sequence[Trial], heading: str, marked: int | None, both: bool
) -> Table:
    table = Table(
        title=heading,
        title_justify="left",
        box=None,
        header_style="bold",
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("", no_wrap=True)
    goals = study.goals
    for name in (*(o.name for o in study.objectives), *(["mean"] if goals.averaged else [])):
        head = (
            Text.assemble(f"{name}\n", ("search", "dim"), " held")
            if both
            else Text(name, overflow="fold")
        )
        table.add_column(head, justify="right", min_width=11 if both else 6)
    for trial in trials:
        held_out = trial.held_out or {}
        cells = [
            _pair(_text(trial.scores.get(o.name)), _text(held_out.get(o.name)), both)
            for o in study.objectives
        ]
        cells += (
            [_pair(_mean_text(goals.mean(trial.scores)), _mean_text(goals.mean(held_out)), both)]
            if goals.averaged
            else []
        )
        name = ("→ " if trial.number == marked else "  ") + title(trial)
        table.add_row(Text(name), *cells, style="bold green" if trial.number == marked else None)
    errors = [
        t.held_out[o.name].stderr
        for t in trials
        if t.held_out
        for o in study.objectives
        if o.name in t.held_out
    ]
    told = [f"standard errors of the held-out scores: at most {max(errors):.3f}"] if errors else []
    told += [] if both else ["held-out scores; in brackets those of the search items"]
    table.caption, table.caption_justify = "\n".join(told) or None, "left"
    return table


def comparison_table(found: Sequence[Comparison], one: str, other: str) -> Table:
    """A line per task; what chance would not explain (p < 0.05) is bold."""
    table = Table(
        title=f"{one} − {other}",
        title_justify="left",
        box=None,
        header_style="bold",
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
    heads = ("", one, other, "difference, 95 %", "right alone", "p", "n")
    for name in heads:
        table.add_column(Text(name, overflow="fold"), justify="left" if not name else "right")
    for c in found:
        wins = "" if c.only_one is None else f"{c.only_one} : {c.only_other}"
        apart = f"{c.difference:+.3f} ± {c.high - c.difference:.3f}"
        cells = (f"{c.one:.3f}", f"{c.other:.3f}", apart, wins, _chance(c.p), str(c.n))
        table.add_row(Text(c.task), *cells, style="bold" if c.p < 0.05 else None)
    return table


def _chance(p: float) -> str:
    return "< 0.0001" if p < 1e-4 else f"{p:.4f}"


def _text(score: Score | None) -> str:
    return "-" if score is None else score.text


def _mean_text(mean: float | None) -> str:
    return "-" if mean is None else f"{mean:.3f}"


def _pair(search: str, held_out: str, both: bool) -> Text:
    """Search score, dimmed, and held-out score, five places each; or one of them."""
    if both:
        return Text.assemble((f"{search:>5}", "dim"), f" {held_out:>5}")
    return Text(f"({search})", "dim") if held_out == "-" else Text(held_out)


def _numbers(scores: Any) -> dict[str, dict[str, float]]:
    return {name: {"value": s.value, "stderr": s.stderr, "n": s.n} for name, s in scores.items()}
