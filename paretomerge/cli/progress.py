"""What a running study shows: a live table on a terminal, one line per trial elsewhere."""

import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from paretomerge.record.record import Scores, Trial
from paretomerge.study.budget import evaluated
from paretomerge.study.loop import Event
from paretomerge.study.study import Study


class Progress:
    """Watch a study: `with Progress(study, console) as progress: study.run(60, progress.trial)`."""

    _ROWS = 10

    def __init__(self, study: Study, console: Console, quiet: bool = False) -> None:
        self._goals = study.goals
        self._names = [o.name for o in study.objectives]
        self._console = console
        self._quiet = quiet
        self._events: list[Event] = []
        self._start = time.perf_counter()
        self._live = (
            Live(console=console, refresh_per_second=4)
            if console.is_terminal and not quiet
            else None
        )

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
        """A trial of the search has ended."""
        self._events.append(event)
        if self._live:
            self._live.update(self._table())
        elif not self._quiet:
            self._console.print(Text(_line(event, self._names)), soft_wrap=True)

    def held_out(self, trial: Trial) -> None:
        """A trial has been scored on its held-out items."""
        told = f"held-out  {_name(trial)}  " + "  ".join(
            f"{n} {score_text(trial.held_out or {}, n)}" for n in self._names
        )
        if self._live:
            self._live.update(
                Group(self._table(), Text(f"scoring the front on held-out items: {_name(trial)}"))
            )
        elif not self._quiet:
            self._console.print(Text(told), soft_wrap=True)

    def _table(self) -> Group:
        table = Table(box=None, pad_edge=False)
        averaged = self._goals.averaged
        for heading in ("trial", *self._names, *(["mean"] if averaged else []), "hypervolume", "s"):
            table.add_column(Text(heading), justify="right")
        table.add_column("", style="dim")
        for event in self._events[-self._ROWS :]:
            values = [score_text(event.trial.scores, n) for n in self._names]
            mean = self._goals.mean(event.trial.scores)
            values += [f"{mean:.3f}" if mean is not None else "-"] if averaged else []
            total = f"{sum(event.seconds.values()):.1f}"
            broken = f"infeasible: {event.trial.broken}" if event.trial.broken else ""
            note = event.trial.label or event.trial.failure[:40] or broken or _kind(event.trial)
            table.add_row(
                str(event.trial.number), *values, volume_text(event.hypervolume), total, Text(note)
            )
        if not self._events:
            return Group(table)
        last = self._events[-1]
        each = (time.perf_counter() - self._start) / max(
            1, evaluated([e.trial for e in self._events])
        )
        parts = "  ".join(
            f"{k} {sum(e.seconds.get(k, 0) for e in self._events):.0f}s"
            for k in ("ask", "merge", "evaluate", "record")
        )
        told = (
            f"{last.done}/{last.total} trials  {tally([e.trial for e in self._events])}  {parts}  "
        )
        told += f"about {each * (last.total - last.done):.0f}s left"
        below = Table.grid()
        below.add_row(ProgressBar(total=last.total, completed=last.done, width=60))
        below.add_row(Text(told, style="dim"))
        return Group(table, below)


def tally(trials: Sequence[Trial]) -> str:
    """How many trials failed, and where there are any, how many were infeasible, reused or taken over."""
    counts = {
        "infeasible": sum(bool(t.broken) for t in trials),
        "left early": sum(not t.final for t in trials),
        "reused": sum(t.same_as is not None for t in trials),
        "taken over": sum(bool(t.warm) for t in trials),
    }
    return ", ".join(
        [
            f"{sum(bool(t.failure) for t in trials)} failed",
            *(f"{n} {what}" for what, n in counts.items() if n),
        ]
    )


def volume_text(volume: float) -> str:
    """A hypervolume; that of many objectives with small ranges is far below 1, that of perplexities can be anything."""
    return f"{volume:.4f}" if 0.001 <= volume < 1e6 or not volume else f"{volume:.2e}"


def score_text(scores: Scores, name: str) -> str:
    """A score as text; `-` where there is none."""
    return scores[name].text if name in scores else "-"


def _name(trial: Trial) -> str:
    return trial.label or f"trial {trial.number}"


def _kind(trial: Trial) -> str:
    return "route" if trial.level else str(trial.params.get("method", ""))


def _line(event: Event, names: list[str]) -> str:
    scores = "  ".join(f"{n} {score_text(event.trial.scores, n)}" for n in names)
    told = (
        f"FAILED {event.trial.failure}"
        if event.trial.failure
        else f"hypervolume {volume_text(event.hypervolume)}"
    )
    if event.trial.broken:
        told += f"  infeasible: {event.trial.broken}"
    note = event.trial.label or _kind(event.trial)
    if not event.trial.final:
        note += " (left early: estimates)"
    if event.trial.same_as is not None:
        note += f" (the recipe of trial {event.trial.same_as})"
    return f"{event.done:4d}/{event.total}  {scores}  {told}  {sum(event.seconds.values()):.1f}s  {note}"
