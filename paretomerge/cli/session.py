"""What the commands share: open, search and show a study, and read options."""

import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from paretomerge.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from paretomerge.decide.decision import Decision
    from paretomerge.decide.pick import Choice
    from paretomerge.evaluate.evaluator import Split
    from paretomerge.record.trial import Trial
    from paretomerge.study.event import Event, HeldOutEvent
    from paretomerge.study.study import Study

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "B": 1, "": 1}
ERROR = 1
"""The exit status of an error with a message; 2 is that of a wrong command line."""

DEBUG = "--debug"
"""The option that asks for tracebacks. It is read from `sys.argv`: it stands before the command."""

INTERRUPTED = 130
"""The shell's exit status of Ctrl-C."""


def open_study(
    path: Path, overrides: Sequence[str] | None = None, allow_mismatch: bool = False
) -> "Study":
    """Read a study.yaml; nothing is loaded yet.

    Args:
        path: The file.
        overrides: Keys to set in place of the file's.
        allow_mismatch: True to set the key of that name.
    """
    from paretomerge.study.study import load_study

    keys = list(overrides or ())
    if allow_mismatch:
        keys.append("allow_mismatch=true")
    return load_study(path, keys)


def set_up_process(study: "Study") -> None:
    """Set options of the process, which a library must leave alone.

    These are the number of threads and the progress bars of other libraries.
    """
    # Tokenizers fork badly after their thread pool has started, and warn about it.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch

    hide_progress_bars()
    if study.settings.threads is not None:
        torch.set_num_threads(study.settings.threads)


def hide_progress_bars() -> None:
    """Turn off the progress bars of transformers."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def search(
    study: "Study", trials: int | None, quiet: bool, log_file: Path | None = None
) -> None:
    """Search until the budget is spent.

    Then the baselines and the front are scored on held-out examples and on watched tasks.

    Args:
        study: The study.
        trials: The number of evaluations in the record at which to stop, in place of the study's
            budget.
        quiet: Whether to print nothing while searching.
        log_file: Where a line of JSON is added for each trial; see `TrialLog`.
    """
    from paretomerge.cli.progress import Progress, tally
    from paretomerge.cli.trial_log import TrialLog
    from paretomerge.record.trial import count_evaluated

    # Before anything is loaded: a file that cannot be written must not cost minutes.
    log = TrialLog(log_file)
    try:
        set_up_process(study)
        if not quiet:
            console().print("Loading models and tasks ...", style="dim")
        print_notes(study.check())
        study.search().check_weights()
        results = study.search().results()
        if results.trials and not quiet:
            console().print(f"Resuming at trial {len(results.trials)}.", style="dim")
        # `--trials` is a total, as in the file. `Study.run` takes the number of further trials.
        more = None
        if trials is not None:
            more = max(0, trials - count_evaluated(results.trials))
        with (
            Progress(results, console(), quiet) as progress,
            study.search().executing(),
        ):

            def watch(event: "Event") -> None:
                log.trial(event)
                progress.trial(event)
                if DEBUG in sys.argv:
                    sys.stderr.write(event.trial.traceback)

            def watch_held_out(event: "HeldOutEvent") -> None:
                log.held_out(event)
                progress.held_out(event)

            reason = study.run(watch, more)
            log.end(reason)
            if not quiet:
                counts = tally(study.get_trials())
                outcome = f"{reason} ({counts})"
                console().print(outcome, highlight=False)
            study.score_held_out(watch_held_out)
        # Evaluators note what they met while scoring, so these notes come last.
        print_notes(study.evaluation_notes())
    except KeyboardInterrupt:
        sys.stderr.write(
            "\nStopped. Every finished trial is kept; the same command continues the search.\n"
        )
        raise typer.Exit(INTERRUPTED) from None
    finally:
        log.close()


def show(study: "Study", most: int | None = None) -> None:
    """Print the baselines and the front as tables.

    The trial that `pick` takes by default is marked where the record says which one it is: to
    decide anew takes seconds.

    Args:
        study: The study.
        most: The most trials of the front to print; None for all.

    Raises:
        ConfigError: No feasible trial has finished yet.
    """
    from paretomerge.decide.pick import check_has_front
    from paretomerge.report.tables import best_first, trials_table

    results = study.results()
    check_has_front(results)
    picked = study.noted_pick(results)
    number = None if picked is None else picked.number
    baselines = trials_table(results, results.baselines, "Baselines", number)
    console().print()
    console().print(baselines)
    console().print()
    ranked = best_first(results, results.front)
    shown = ranked[:most]
    # The knee need not have one of the best means.
    if picked is not None and picked not in shown:
        shown.append(picked)
    counts = f"{len(ranked)} trials"
    if len(shown) < len(ranked):
        counts = f"the best {len(shown)} of {len(ranked)} trials"
    order = "mean" if results.has_mean else "mean of the scaled scores"
    heading = f"Pareto front: {counts}, by {order}"
    if picked is not None:
        heading += f" (→ {study.default_choice.text})"
    console().print(trials_table(results, shown, heading, number))


def decide(study: "Study", choice: "Choice") -> "Decision":
    """Pick by a preference; trials that are scored for it are announced.

    Args:
        study: The study.
        choice: How to pick, without a number.
    """

    def announce(trial: "Trial") -> None:
        line = f"scored {trial.name} on selection examples"
        console().print(line, style="dim", highlight=False)

    set_up_process(study)
    return study.decide(choice.prefer, announce)


def refine(study: "Study", choice: "Choice", n_trials: int) -> None:
    """Evaluate new merges that a preference may prefer; print what they were believed to score.

    Args:
        study: The study.
        choice: How the user will pick.
        n_trials: The number of merges.
    """
    from paretomerge.report.tables import refinement_table

    set_up_process(study)
    console().print(f"New merges to evaluate: {n_trials} ...", style="dim")
    found = study.refine(choice.prefer, n_trials)
    console().print(refinement_table(found, study.results()))
    console().print()


def show_decision(decision: "Decision") -> None:
    """Print how sure a pick is."""
    from paretomerge.report.tables import decision_lines

    for line in decision_lines(decision):
        console().print(line, highlight=False, soft_wrap=True)


def split_named(name: str) -> "Split":
    """Read `--split`."""
    if name not in ("search", "held_out"):
        raise ConfigError(f"--split: use search or held_out, not {name!r}")
    # Spelt out, since a type checker does not narrow `str` to the two names.
    return "search" if name == "search" else "held_out"


def print_notes(notes: Iterable[str]) -> None:
    """Print notes to the standard error stream."""
    # Not to standard output, which `--json` leaves to programs.
    for note in notes:
        sys.stderr.write(f"note: {note}\n")


def duration(seconds: float) -> str:
    """Write a time for people."""
    from paretomerge.report.recipes import readable_duration

    # `readable_duration` has no fractions, which one trial of a small model needs.
    if seconds < 0.001:
        return "under 1 ms"
    if seconds < 10:
        return f"{seconds:.2g} s"
    return readable_duration(seconds)


def size_in_bytes(text: str) -> int:
    """Read a size such as 5GB, 500MB or 2000000, in decimal units as on the Hub."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?B)?", text.strip().upper())
    size = 0
    if match:
        unit = _UNITS[match[2] or ""]
        size = int(float(match[1]) * unit)
    if size < 1:
        raise ConfigError(f"--shard-size: a size such as 5GB or 500MB, not {text!r}")
    return size


def console() -> "Console":
    """The terminal, without rich's markup: labels and errors may hold brackets and colons."""
    from rich.console import Console

    return Console(markup=False, emoji=False)


def short(path: Path) -> str:
    """A path relative to the current folder, where it lies below it."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def named_values(
    option: str, form: str, entries: Iterable[str]
) -> dict[str, list[str]]:
    """Read an option that is given as NAME=VALUE, perhaps several times.

    Args:
        option: Its name.
        form: How it is written, for messages: `NAME=FILE`.
        entries: What was given.

    Returns:
        Name -> its values.

    Raises:
        ConfigError: An entry has no name or no value.
    """
    values: dict[str, list[str]] = {}
    for entry in entries:
        name, _, value = entry.partition("=")
        if not name or not value:
            raise ConfigError(f"{option}: write {form}, not {entry!r}")
        values.setdefault(name, []).append(value)
    return values
