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
from paretomerge.study.loop import Event

_ROWS = 10
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
            self._console.print(Text(_line(event, self._names)), soft_wrap=True)

    def held_out(self, trial: Trial) -> None:
        """Show that a trial was scored on held-out examples.

        Args:
            trial: The trial.
        """
        if self._live:
            message = Text(f"scoring the front on held-out examples: {trial.name}")
            self._live.update(Group(self._table(), message))
        elif not self._quiet:
            scores = _scores_text(trial.held_out or {}, self._names)
            self._console.print(
                Text(f"held-out  {trial.name}  {scores}"), soft_wrap=True
            )

    def _table(self) -> Group:
        table = Table(box=None, pad_edge=False)
        mean = ["mean"] if self._results.has_mean else []
        for heading in ("trial", *self._names, *mean, "hypervolume", "s"):
            table.add_column(Text(heading), justify="right")
        table.add_column("", style="dim")
        for event in self._events[-_ROWS:]:
            table.add_row(*self._cells(event), Text(_note(event.trial)))
        if not self._events:
            return Group(table)
        last = self._events[-1]
        below = Table.grid()
        below.add_row(ProgressBar(total=last.total, completed=last.done, width=60))
        below.add_row(Text(self._summary(last), style="dim"))
        return Group(table, below)

    def _cells(self, event: Event) -> list[str]:
        trial = event.trial
        cells = [str(trial.number)]
        cells += [score_text(trial.scores, name) for name in self._names]
        if self._results.has_mean:
            mean = self._results.mean(trial.scores)
            cells.append("-" if mean is None else f"{mean:.3f}")
        cells += [volume_text(event.hypervolume), f"{sum(event.seconds.values()):.1f}"]
        return cells

    def _summary(self, last: Event) -> str:
        trials = [event.trial for event in self._events]
        seconds_each = (time.perf_counter() - self._start) / max(
            1, count_evaluated(trials)
        )
        stages = []
        for stage in _STAGES:
            total = sum(event.seconds.get(stage, 0) for event in self._events)
            stages.append(f"{stage} {total:.0f}s")
        # The estimate includes trials that failed or were reused, as the remaining ones will.
        left = seconds_each * (last.total - last.done)
        parts = [
            f"{last.done}/{last.total} trials",
            tally(trials),
            *stages,
            f"about {left:.0f}s left",
        ]
        return "  ".join(parts)


def tally(trials: Sequence[Trial]) -> str:
    """Count the trials that failed, and of other kinds if there are any.

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
    parts = [f"{count} {what}" for what, count in counts.items() if count]
    return ", ".join([f"{failed} failed", *parts])


def volume_text(volume: float) -> str:
    """Write a hypervolume: far below 1 with many objectives, of any size with perplexities."""
    if not volume or 0.001 <= volume < 1e6:
        return f"{volume:.4f}"
    return f"{volume:.2e}"


def score_text(scores: Scores, name: str) -> str:
    """Write a score; `-` where there is none."""
    return scores[name].text if name in scores else "-"


def _scores_text(scores: Scores, names: Sequence[str]) -> str:
    return "  ".join(f"{name} {score_text(scores, name)}" for name in names)


def _note(trial: Trial) -> str:
    """The last column: the baseline's name, what went wrong, or the method."""
    if trial.label:
        return trial.label
    if trial.failure:
        return trial.failure[:40]
    if trial.violations:
        return f"infeasible: {trial.violations}"
    return _kind(trial)


def _kind(trial: Trial) -> str:
    return "route" if trial.level else str(trial.params.get("method", ""))


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
    scores = _scores_text(trial.scores, names)
    seconds = sum(event.seconds.values())
    return f"{event.done:4d}/{event.total}  {scores}  {outcome}  {seconds:.1f}s  {note}"
