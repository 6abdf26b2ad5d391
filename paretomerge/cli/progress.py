"""What a running search shows: a live table on a terminal, one line for each trial elsewhere."""

import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from paretomerge.record.results import Results
from paretomerge.record.trial import Scores, Trial, count_evaluated
from paretomerge.study.event import Event, HeldOutEvent

_ROWS = 10  # the live table must fit a small terminal, or rich cuts it off
_STAGES = ("ask", "merge", "evaluate", "record")


class Progress:
    """Shows a search: `with Progress(results, console) as progress: study.run(progress.trial)`.

    Args:
        results: The study's results when the run begins; its objectives name the columns.
        console: Where to print.
        quiet: Whether to print nothing.
    """

    def __init__(self, results: Results, console: Console, quiet: bool = False) -> None:
        self._results = results
        self._names = [objective.name for objective in results.objectives]
        self._console = console
        self._quiet = quiet
        self._events: list[Event] = []
        self._start = time.perf_counter()
        self._held_out_start = self._start
        # In files and pipes a table that redraws itself would be a heap of control characters.
        live = console.is_terminal and not quiet
        self._live = Live(console=console, refresh_per_second=4) if live else None

    def __enter__(self) -> "Progress":
        if self._live:
            self._live.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            self._live.__exit__(kind, error, trace)

    def trial(self, event: Event) -> None:
        """Show a finished trial of the search.

        Args:
            event: What the loop reports of it.
        """
        self._events.append(event)
        if self._live:
            self._live.update(self._table())
        elif not self._quiet:
            # As `Text`: a failure may hold square brackets, which rich would take for markup.
            line = Text(_line(event, self._names))
            self._console.print(line, soft_wrap=True)

    def held_out(self, event: HeldOutEvent) -> None:
        """Show that a trial was scored on held-out examples.

        Args:
            event: Which trial, and how many are left.
        """
        trial = event.trial
        if self._live:
            if event.done == 1:
                self._held_out_start = time.perf_counter()
            message = Text(self._held_out_summary(event), style="dim")
            self._live.update(Group(self._table(), message))
        elif not self._quiet:
            scores = _scores_text(trial.held_out or {}, self._names)
            line = Text(f"held-out {event.done}/{event.total}  {trial.name}  {scores}")
            self._console.print(line, soft_wrap=True)

    def _held_out_summary(self, event: HeldOutEvent) -> str:
        text = f"held-out examples: {event.done} of {event.total} models"
        # The first model's time is unknown: it began before the first event.
        if event.done > 1:
            elapsed = time.perf_counter() - self._held_out_start
            each = elapsed / (event.done - 1)
            left = each * (event.total - event.done)
            text += f"  about {left:.0f}s left"
        return f"{text}  {event.trial.name}"

    def _table(self) -> Group:
        table = Table(box=None, pad_edge=False)
        shown = self._events[-_ROWS:]
        has_mean = any(self._mean(event.trial) is not None for event in self._events)
        headings = ["trial", *self._names, *(["mean"] if has_mean else [])]
        headings += ["hypervolume", "s"]
        rows = [self._cells(event, has_mean) for event in shown]
        for column, heading in enumerate(headings):
            # Headings and notes may wrap or be cut off; numbers must not.
            widest = max((len(cells[column]) for cells in rows), default=5)
            head = Text(heading, overflow="fold")
            table.add_column(head, justify="right", min_width=widest)
        table.add_column("", style="dim", no_wrap=True, overflow="ellipsis")
        for event, cells in zip(shown, rows, strict=True):
            note = Text(trial_note(event.trial))
            table.add_row(*cells, note)
        if not self._events:
            return Group(table)
        last = self._events[-1]
        below = Table.grid()
        bar = ProgressBar(total=last.total, completed=last.done, width=60)
        summary = Text(self._summary(last), style="dim")
        below.add_row(bar)
        below.add_row(summary)
        return Group(table, below)

    def _mean(self, trial: Trial) -> float | None:
        return self._results.mean(trial.scores)

    def _cells(self, event: Event, has_mean: bool) -> list[str]:
        trial = event.trial
        cells = [str(trial.number)]
        cells += [score_text(trial.scores, name) for name in self._names]
        if has_mean:
            mean = self._mean(trial)
            mean_text = "-" if mean is None else f"{mean:.3f}"
            cells.append(mean_text)
        seconds = sum(event.seconds.values())
        cells.append(volume_text(event.hypervolume))
        cells.append(f"{seconds:.1f}")
        return cells

    def _summary(self, last: Event) -> str:
        trials = [event.trial for event in self._events]
        elapsed = time.perf_counter() - self._start
        evaluated = max(1, count_evaluated(trials))
        seconds_each = elapsed / evaluated
        stages = []
        for stage in _STAGES:
            times = [event.seconds.get(stage, 0) for event in self._events]
            total = sum(times)
            stages.append(f"{stage} {total:.0f}s")
        # The elapsed time includes failed and reused trials, and so does the time that is left.
        left = seconds_each * (last.total - last.done)
        parts = [
            f"{last.done}/{last.total} trials",
            tally(trials),
            *stages,
            f"about {left:.0f}s left, then the held-out examples",
        ]
        return "  ".join(parts)


def tally(trials: Sequence[Trial]) -> str:
    """Count the failed trials, and trials of other kinds if there are any.

    Args:
        trials: Finished trials.

    Returns:
        Text such as `2 failed, 1 infeasible`.
    """
    failed = sum(bool(trial.failure) for trial in trials)
    counts = {
        "infeasible": sum(bool(trial.violations) for trial in trials),
        "left early": sum(not trial.final for trial in trials),
        "reused": sum(trial.same_as is not None for trial in trials),
        "taken over": sum(bool(trial.warm_start) for trial in trials),
    }
    # Failures are always shown: "0 failed" is what a user looks for.
    parts = [f"{failed} failed"]
    for what, count in counts.items():
        if count:
            parts.append(f"{count} {what}")
    return ", ".join(parts)


def volume_text(volume: float) -> str:
    """Write a hypervolume, which is tiny with many objectives and may be huge with perplexities."""
    if not volume or 0.001 <= volume < 1e6:
        return f"{volume:.4f}"
    return f"{volume:.2e}"


def score_text(scores: Scores, name: str) -> str:
    """Write a score; `-` where there is none."""
    return scores[name].text if name in scores else "-"


def _scores_text(scores: Scores, names: Sequence[str]) -> str:
    parts = []
    for name in names:
        score = score_text(scores, name)
        parts.append(f"{name} {score}")
    return "  ".join(parts)


def trial_note(trial: Trial) -> str:
    """Say in few words what a trial is: a baseline's name, what went wrong, or the method."""
    if trial.label:
        return trial.label
    if trial.failure:
        # A longer text would take the width from the scores; `status` shows all of it.
        return trial.failure[:40]
    if trial.violations:
        return f"infeasible: {trial.violations}"
    return _kind(trial)


def _kind(trial: Trial) -> str:
    if trial.level:
        return "route"
    method = trial.params.get("method", "")
    return str(method)


def _line(event: Event, names: Sequence[str]) -> str:
    trial = event.trial
    outcome = f"hypervolume {volume_text(event.hypervolume)}"
    if trial.failure:
        outcome = f"FAILED {trial.failure}"
    if trial.violations:
        outcome += f"  infeasible: {trial.violations}"
    note = trial.label or _kind(trial)
    if not trial.final:
        note += " (left early: estimates)"
    if trial.same_as is not None:
        note += f" (the recipe of trial {trial.same_as})"
    progress = f"{event.done:4d}/{event.total}  trial {trial.number}"
    scores = _scores_text(trial.scores, names)
    seconds = sum(event.seconds.values())
    return f"{progress}  {scores}  {outcome}  {seconds:.1f}s  {note}"
