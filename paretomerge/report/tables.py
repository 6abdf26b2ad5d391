"""Tables of a study's trials, as plain data and for a terminal."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from paretomerge.decide.compare import Comparison
from paretomerge.decide.decision import Decision
from paretomerge.decide.refinement import Refinement
from paretomerge.evaluate.evaluator import Score
from paretomerge.pareto.ranking import normalised
from paretomerge.record.results import Results
from paretomerge.record.trial import Scores, Trial
from paretomerge.report.plots import trial_title

_ANY_WIDTH = (
    10_000  # columns; wider than any table, so that rich measures without shrinking
)
_SIGNIFICANT = 0.05


def rows(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """Write trials as plain data, fit for JSON.

    Args:
        trials: The trials.

    Returns:
        One dict for each: scores with standard errors on both splits, parameters, failure.
    """
    return [_plain_row(trial) for trial in trials]


def best_first(results: Results, trials: Sequence[Trial]) -> list[Trial]:
    """Order trials by the mean of their search scores.

    Scores of different units are scaled to [0, 1] over the trials first.

    Args:
        results: The study's results.
        trials: Trials with scores.

    Returns:
        The trials, the best first.
    """
    if not trials:
        return []
    values = np.array([trial.values(results.objectives) for trial in trials])
    if not results.has_mean:
        # A mean of accuracies and perplexities would be a mean of perplexities.
        values = normalised(values)
    means = values.mean(1)
    # Stable: of equal trials the earlier one comes first.
    order = np.argsort(-means, kind="stable")
    return [trials[i] for i in order]


@dataclass(frozen=True)
class FittingTable:
    """The first of several tables for which the terminal has room.

    Attributes:
        tables: From the widest to the narrowest, which is shown where none fits.
    """

    tables: Sequence[Table]

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> RenderResult:
        # Rich shrinks columns silently; measuring first keeps every number whole.
        unlimited = options.update(max_width=_ANY_WIDTH)
        for table in self.tables[:-1]:
            needed = Measurement.get(console, unlimited, table).maximum
            if needed <= options.max_width:
                yield table
                return
        yield self.tables[-1]


def trials_table(
    results: Results, trials: Sequence[Trial], heading: str, marked: int | None = None
) -> FittingTable:
    """Make a table of trials for a terminal.

    Args:
        results: The study's results.
        trials: The trials to show.
        heading: The table's title.
        marked: The number of the picked trial.

    Returns:
        The table. It has search and held-out scores and those of watched tasks. On a narrow
        terminal it has no watched tasks, or only one of the two splits.
    """
    watched = _watched(results, trials)
    tables = []
    for both_splits in (True, False):
        # Without watched tasks the two are one table.
        for names in dict.fromkeys((watched, ())):
            layout = _Layout(both_splits, names, hidden=len(watched) - len(names))
            tables.append(_scores_table(results, trials, heading, marked, layout))
    return FittingTable(tables)


@dataclass(frozen=True)
class _Layout:
    """What a table of trials shows.

    Attributes:
        both_splits: Whether it has search and held-out scores, or one of the two.
        watched: Watched tasks that have a column.
        hidden: The number of watched tasks that have none.
    """

    both_splits: bool
    watched: tuple[str, ...]
    hidden: int


def _watched(results: Results, trials: Sequence[Trial]) -> tuple[str, ...]:
    """Watched tasks that one of the trials has a score of."""
    objectives = {objective.name for objective in results.objectives}
    names: dict[str, None] = {}
    for trial in trials:
        names |= dict.fromkeys(trial.held_out or {})
    return tuple(name for name in names if name not in objectives)


def decision_lines(decision: Decision) -> list[str]:
    """Say in words how sure a pick is.

    Args:
        decision: The pick.

    Returns:
        One or more lines of text.
    """
    lines = []
    expected = []
    for name, score in decision.expected.items():
        # An exact score has an interval without a width.
        if score.high > score.low:
            expected.append(f"{name} {score.low:.3f} to {score.high:.3f}")
    if expected:
        lines.append(f"expected on held-out examples (90 %): {', '.join(expected)}")
    other = decision.runner_up
    if other is None:
        return lines
    lines.append(
        f"the best of all trials with a probability of {decision.probability:.0%}"
    )
    changes = []
    for name, change in decision.change.items():
        changes.append(f"{name} {change:+.3f}")
    lines.append(f"runner-up {other.name}: {', '.join(changes)}")
    return lines


def refinement_table(found: Sequence[Refinement], results: Results) -> Table:
    """Make a table of new trials: what was believed of each score, and what was measured.

    Args:
        found: The new trials.
        results: The study's results.

    Returns:
        The table.
    """
    heading = "New trials: the score that was believed (90 %), and the one measured"
    table = _plain_table(heading, 2)
    table.add_column("")
    for objective in results.objectives:
        table.add_column(objective.name, justify="right")
        table.add_column("", justify="right", style="bold")
    for entry in found:
        cells = [entry.trial.name]
        for objective in results.objectives:
            score = entry.trial.scores.get(objective.name)
            believed = entry.believed.get(objective.name)
            cells.append(
                f"{believed.low:.3f} to {believed.high:.3f}" if believed else "-"
            )
            cells.append(score.text if score else "failed")
        table.add_row(*cells)
    return table


def comparison_table(comparisons: Sequence[Comparison], one: str, other: str) -> Table:
    """Make a table of comparisons for a terminal; significant differences (p < 0.05) are bold.

    Args:
        comparisons: One for each task.
        one: The first model's name.
        other: The second model's name.

    Returns:
        The table.
    """
    table = _plain_table(f"{one} − {other}", gap=2)
    for heading in ("", one, other, "difference, 95 %", "right alone", "p", "n"):
        justify = "right" if heading else "left"
        table.add_column(Text(heading, overflow="fold"), justify=justify)  # type: ignore[arg-type]
    for comparison in comparisons:
        reach = comparison.high - comparison.difference
        cells = (
            f"{comparison.one:.3f}",
            f"{comparison.other:.3f}",
            f"{comparison.difference:+.3f} ± {reach:.3f}",
            _right_alone(comparison),
            "< 0.0001" if comparison.p < 1e-4 else f"{comparison.p:.4f}",
            str(comparison.n),
        )
        style = "bold" if comparison.p < _SIGNIFICANT else None
        # As `Text`: in a plain string rich would take square brackets for markup.
        table.add_row(Text(comparison.task), *cells, style=style)
    return table


def _scores_table(
    results: Results,
    trials: Sequence[Trial],
    heading: str,
    marked: int | None,
    layout: _Layout,
) -> Table:
    both_splits = layout.both_splits
    table = _plain_table(heading, gap=1)
    names = [objective.name for objective in results.objectives]
    mean_heading = ["mean"] if results.has_mean else []
    counts = _counts(results, trials)
    rows: list[list[Text]] = []
    for trial in trials:
        cells = [_cell(trial, name, both_splits, name in counts) for name in names]
        if results.has_mean:
            search = _mean_text(results.mean(trial.scores))
            held_out = _mean_text(results.mean(trial.held_out))
            cells.append(_pair(search, held_out, both_splits))
        for name in layout.watched:
            held_out = _score_text((trial.held_out or {}).get(name), is_count=False)
            cells.append(Text(held_out))
        rows.append(cells)
    table.add_column("", overflow="fold")
    for column, name in enumerate((*names, *mean_heading)):
        # Headings and labels may wrap. A number that is cut off would be another number.
        widest = max((len(cells[column]) for cells in rows), default=6)
        head = Text(name, overflow="fold")
        if both_splits:
            head = Text.assemble(f"{name}\n", ("search", "dim"), " held")
        table.add_column(head, justify="right", min_width=widest)
    for column, name in enumerate(layout.watched, start=len(table.columns) - 1):
        widest = max((len(cells[column]) for cells in rows), default=6)
        head = Text.assemble(f"{name}\n", ("watched", "dim"))
        table.add_column(head, justify="right", min_width=widest)
    for trial, cells in zip(trials, rows, strict=True):
        is_marked = trial.number == marked
        # An arrow as well as a colour: the colour is lost in files and pipes.
        name = ("→ " if is_marked else "  ") + trial_title(trial)
        style = "bold green" if is_marked else None
        table.add_row(Text(name), *cells, style=style)
    table.caption = _caption(trials, names, layout)
    table.caption_justify = "left"
    return table


def _plain_table(heading: str, gap: int) -> Table:
    return Table(
        title=heading,
        title_justify="left",
        box=None,
        header_style="bold",
        pad_edge=False,
        padding=(0, gap, 0, 0),
    )


def _caption(
    trials: Sequence[Trial], names: Sequence[str], layout: _Layout
) -> str | None:
    # The largest error in the caption: one for each score would double the width of the table.
    errors = []
    for trial in trials:
        held_out = trial.held_out or {}
        for name in names:
            if name in held_out:
                errors.append(held_out[name].stderr)
    lines = []
    if errors:
        lines.append(
            f"standard errors of the held-out scores: at most {max(errors):.3f}"
        )
    if not layout.both_splits:
        lines.append("held-out scores; those of the search examples in brackets")
    if layout.hidden:
        noun = "task" if layout.hidden == 1 else "tasks"
        lines.append(
            f"{layout.hidden} watched {noun}: in a wider terminal, or by --json"
        )
    return "\n".join(lines) or None


def _counts(results: Results, trials: Sequence[Trial]) -> set[str]:
    """Objectives that are whole numbers in every trial, such as layers."""
    counts = set()
    for objective in results.objectives:
        scores = [trial.scores.get(objective.name) for trial in trials]
        if all(score is None or score.is_count for score in scores):
            counts.add(objective.name)
    return counts


def _cell(trial: Trial, name: str, both_splits: bool, is_count: bool) -> Text:
    search = _score_text(trial.scores.get(name), is_count)
    held_out = _score_text((trial.held_out or {}).get(name), is_count)
    return _pair(search, held_out, both_splits)


def _pair(search: str, held_out: str, both_splits: bool) -> Text:
    """A search score, dimmed, and a held-out score, five places each; or only one of them."""
    if both_splits:
        dimmed = (f"{search:>5}", "dim")
        return Text.assemble(dimmed, f" {held_out:>5}")
    # In brackets, so that nobody takes an optimistic search score for a held-out one.
    if held_out == "-":
        return Text(f"({search})", "dim")
    return Text(held_out)


def _right_alone(comparison: Comparison) -> str:
    if comparison.only_one is None:
        return ""
    return f"{comparison.only_one} : {comparison.only_other}"


def _score_text(score: Score | None, is_count: bool) -> str:
    if score is None:
        return "-"
    # -1 between -0.884 and -0.912 would look like another kind of number.
    return score.text if is_count else score.decimal_text


def _mean_text(mean: float | None) -> str:
    return "-" if mean is None else f"{mean:.3f}"


def _plain_row(trial: Trial) -> dict[str, Any]:
    # None and not an empty dict: a program can tell "not measured" from "no scores".
    held_out = None
    if trial.held_out is not None:
        held_out = plain_scores(trial.held_out)
    return {
        "trial": trial.number,
        "label": trial.label,
        "failure": trial.failure,
        "constraints": dict(trial.constraints),
        "search": plain_scores(trial.scores),
        "held_out": held_out,
        "params": dict(trial.params),
    }


def plain_scores(scores: Scores) -> dict[str, Mapping[str, float]]:
    """Write scores as plain data, without the scores of single examples."""
    plain: dict[str, Mapping[str, float]] = {}
    for name, score in scores.items():
        plain[name] = {"value": score.value, "stderr": score.stderr, "n": score.n}
    return plain
