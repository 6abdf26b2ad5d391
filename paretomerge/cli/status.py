"""What `paretomerge status` shows: a few lines, or with `--watch` a view that follows the search.

Both read the record alone, so they start at once and work while another process searches.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from paretomerge.cli import session
from paretomerge.cli.progress import score_text, tally, trial_note, volume_text
from paretomerge.cli.reader import RecordReader
from paretomerge.record.folder import is_searched
from paretomerge.record.results import Results
from paretomerge.record.trial import Trial
from paretomerge.report.tables import best_first
from paretomerge.study.study import Study

_LATEST = 8  # trials; the view must fit a small terminal, or rich cuts it off
_BEST = 5
_RECENT = 20  # trials that the time of the next ones is estimated from
_CURVE_WIDTH = 40
_BLOCKS = "▁▂▃▄▅▆▇█"


def summary_lines(results: Results, total: int) -> list[str]:
    """Say how far a study is.

    Args:
        results: The study's results.
        total: Its budget.

    Returns:
        Lines of text.
    """
    trials = results.trials
    summary = (
        f"{results.evaluated} of {total} trials, {tally(trials)}, "
        f"{len(results.front)} on the front, {_volume(results)}"
    )
    lines = [summary, *_problems(trials)]
    if results.end_reason:
        lines.append(f"latest run: {results.end_reason}")
    return lines


def _volume(results: Results) -> str:
    volume = results.hypervolume()
    text = f"hypervolume {volume_text(volume)}"
    baselines = results.hypervolume(results.baselines)
    if baselines:
        # A ratio, for the hypervolume itself is in units that nobody has a feeling for.
        text += f" ({volume / baselines:.2f} times that of the baselines)"
    return text


def _problems(trials: Sequence[Trial]) -> list[str]:
    """The latest failure, and the latest trial that breaks a constraint."""
    lines = []
    failed = [trial for trial in trials if trial.failure]
    if failed:
        latest = failed[-1]
        lines.append(f"latest failure: trial {latest.number}: {latest.failure}")
    infeasible = [trial for trial in trials if trial.violations]
    if infeasible:
        latest = infeasible[-1]
        lines.append(f"latest infeasible: trial {latest.number}: {latest.violations}")
    return lines


@dataclass(frozen=True)
class View:
    """One picture of a study.

    Attributes:
        title: The study's folder.
        results: Its results; None before it has a record.
        total: Its budget.
        is_searched: Whether a process of this machine searches in the folder.
        seconds_since: Seconds since the latest trial was seen to end; None before one was.
    """

    title: str
    results: Results | None
    total: int
    is_searched: bool
    seconds_since: float | None = None

    @property
    def state(self) -> str:
        """What goes on, in words."""
        if self.is_searched and not self._has_trials:
            return "a search has begun; no trial has finished yet"
        if self.is_searched:
            return "searching"
        if self.results is not None and self.results.end_reason:
            return self.results.end_reason
        return "no search runs in this folder"

    @property
    def _has_trials(self) -> bool:
        return self.results is not None and bool(self.results.trials)

    def __rich__(self) -> RenderableType:
        # Long paths are folded, so that what goes on is never cut off.
        heading = Text(self.title, style="bold", overflow="fold")
        state = Text(self.state, style="dim")
        results = self.results
        if results is None or not results.trials:
            return Group(heading, state)
        parts: list[RenderableType] = [heading, state, Text(), self._progress(results)]
        latest = results.trials[-_LATEST:]
        parts += [Text(), Text("latest trials", style="bold")]
        # The latest one on top: there the eye finds what is new.
        parts.append(_trials_table(results, latest[::-1]))
        best = best_first(results, results.front)[:_BEST]
        if best:
            heading_of_best = f"front: the best {len(best)} of {len(results.front)}"
            if len(best) == len(results.front):
                heading_of_best = f"front: {len(best)}"
            parts += [Text(), Text(heading_of_best, style="bold")]
            parts.append(_trials_table(results, best))
        problems = _problems(results.trials)
        if problems:
            parts.append(Text())
        for line in problems:
            text = Text(line, style="yellow", no_wrap=True, overflow="ellipsis")
            parts.append(text)
        return Group(*parts)

    def _progress(self, results: Results) -> RenderableType:
        grid = Table.grid()
        bar = ProgressBar(
            total=max(self.total, 1), completed=results.evaluated, width=60
        )
        counts = f"{results.evaluated} of {self.total} trials, {tally(results.trials)}"
        grid.add_row(bar)
        grid.add_row(Text(counts))
        # From the baselines on, which come first: beside their volume the search's gain is small.
        volumes = results.hypervolumes()[len(results.baselines) :]
        curve = sparkline(volumes, _CURVE_WIDTH)
        volume = Text.assemble(f"{_volume(results)}  ", (curve, "cyan"))
        grid.add_row(volume)
        speed = self._speed(results)
        if speed:
            grid.add_row(Text(speed, style="dim"))
        return grid

    def _speed(self, results: Results) -> str:
        """The time of a trial, and what is left while a search runs."""
        times = []
        for trial in results.trials:
            # Trials that were taken over, or whose recipe was scored before, took no time.
            if not trial.warm_start and trial.same_as is None:
                times.append(_seconds(trial))
        recent = times[-_RECENT:]
        if not recent:
            return ""
        each = sum(recent) / len(recent)
        parts = [f"{session.duration(each)} a trial"]
        if self.is_searched:
            left = each * max(self.total - results.evaluated, 0)
            parts.append(
                f"about {session.duration(left)} left, then the held-out examples"
            )
            if self.seconds_since is not None:
                ago = session.duration(max(self.seconds_since, 1))
                parts.append(f"latest trial {ago} ago")
        return ", ".join(parts)


def watch(study: Study, console: Console, every: float) -> None:
    """Show a study until its search ends.

    It waits for a record where there is none yet, and for a search where none runs and none has
    ended. On a terminal the view is redrawn; elsewhere a summary is printed whenever it changes.

    Args:
        study: The study.
        console: Where to show it.
        every: Seconds between two looks at the record.
    """
    if not console.is_terminal:
        shown: list[str] = []
        for view in _views(study, every):
            lines = [view.state]
            if view.results is not None:
                lines = summary_lines(view.results, view.total)
            if lines != shown:
                console.print("\n".join(lines), highlight=False, soft_wrap=True)
                shown = lines
        return
    with Live(console=console, refresh_per_second=2) as live:
        for view in _views(study, every):
            live.update(view)


def _views(study: Study, every: float) -> Iterator[View]:
    """Look at a study again and again; the last view is that of a search that has ended."""
    title = session.short(study.folder)
    total = study.settings.total_trials
    reader = RecordReader(study)
    was_searched = False
    n_trials: int | None = None
    latest: float | None = None
    while True:
        # Before the record is read: what a search wrote before it ended is then in the record.
        searched = is_searched(study.folder)
        results = reader.results()
        n_now = len(results.trials) if results else 0
        if n_trials is not None and n_now > n_trials:
            latest = time.monotonic()
        n_trials = n_now
        since = None if latest is None else time.monotonic() - latest
        view = View(title, results, total, searched, since)
        yield view
        has_ended = results is not None and bool(results.end_reason)
        if not searched and (was_searched or has_ended):
            return
        was_searched = searched
        time.sleep(every)


def _trials_table(results: Results, trials: Sequence[Trial]) -> Table:
    """One line for each trial: scores on the search examples, seconds, and what it is."""
    names = [objective.name for objective in results.objectives]
    headings = ["trial", *names]
    if results.has_mean:
        headings.append("mean")
    headings.append("s")
    rows = []
    for trial in trials:
        cells = [str(trial.number)]
        cells += [score_text(trial.scores, name) for name in names]
        if results.has_mean:
            mean = results.mean(trial.scores)
            cells.append("-" if mean is None else f"{mean:.3f}")
        cells.append(f"{_seconds(trial):.1f}")
        rows.append(cells)
    table = Table(box=None, pad_edge=False)
    for column, heading in enumerate(headings):
        # Headings may wrap; a number that is cut off would be another number.
        widest = max(len(cells[column]) for cells in rows)
        head = Text(heading, overflow="fold")
        table.add_column(head, justify="right", min_width=widest)
    table.add_column("", style="dim", no_wrap=True, overflow="ellipsis")
    for trial, cells in zip(trials, rows, strict=True):
        # As `Text`: a failure may hold square brackets, which rich would take for markup.
        table.add_row(*cells, Text(trial_note(trial)))
    return table


def _seconds(trial: Trial) -> float:
    return sum(trial.seconds.values())


def sparkline(values: Sequence[float], width: int) -> str:
    """Draw numbers as a line of blocks, from the least to the greatest.

    Args:
        values: The numbers.
        width: The most characters; of more numbers, evenly spaced ones are drawn.

    Returns:
        The line; empty where all numbers are equal.
    """
    least, greatest = min(values, default=0), max(values, default=0)
    if least == greatest:
        return ""
    n = min(width, len(values))
    line = ""
    for i in range(n):
        # The last character is the last number.
        place = (i + 1) * len(values) // n - 1
        share = (values[place] - least) / (greatest - least)
        line += _BLOCKS[round(share * (len(_BLOCKS) - 1))]
    return line
