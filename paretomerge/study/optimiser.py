"""The sampler, working on a copy of the record in memory.

Asking does not touch the disk. Telling writes the finished trial in one transaction.
"""

import math
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from paretomerge.record.record import Record
from paretomerge.record.trial import Trial
from paretomerge.study.level import Level
from paretomerge.types import Params


@dataclass(frozen=True)
class Asked:
    """A point that the sampler proposes, or that was given to it.

    Attributes:
        trial: The trial without scores. Its number is the one that it gets if nothing else is
            recorded first.
        handle: The running trial in Optuna's study.
    """

    trial: Trial
    handle: optuna.Trial


class Optimiser:
    """Ask and tell for one level.

    The sampler sees in memory what the record holds of that level, and the running trials.
    """

    def __init__(self, level: Level, record: Record) -> None:
        self._level = level
        self._record = record
        self._distributions = dict(level.space.distributions)
        directions = [StudyDirection.MAXIMIZE] * len(record.objectives)
        self._study = optuna.create_study(directions=directions, sampler=level.sampler)
        names = [objective.name for objective in record.objectives]
        with warnings.catch_warnings():
            # `set_metric_names` is experimental in Optuna; some samplers read the names.
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._study.set_metric_names(names)
        # Samplers read their history from the study: it must hold this level's trials and no
        # others, in their order.
        for trial in level.shown_first:
            # Marked, so that it does not count as a trial of this level.
            taken = replace(trial, warm_start=trial.warm_start or "the first level")
            self._study.add_trial(record.freeze(taken, self._distributions))
        recorded = record.frozen_trials()
        for frozen in _sources_first(recorded, record.sources):
            # Another level has other parameters, which this level's sampler cannot read.
            if frozen.user_attrs.get("level", 0) == level.number:
                self._study.add_trial(frozen)
        # The number of trials in the record.
        self._recorded = len(recorded)
        self._running = 0

    def ask(self, start: Trial | None = None) -> Asked:
        """Ask for the next point.

        Args:
            start: A point to evaluate in place of a proposal.

        Returns:
            A trial without scores.
        """
        if start is not None:
            # An enqueued trial passes through the sampler, so its bookkeeping includes the point.
            self._study.enqueue_trial(dict(start.params))
        handle = self._study.ask(self._distributions)
        number = self._recorded + self._running
        self._running += 1
        level = self._level.number
        if start is not None:
            trial = Trial(number, handle.params, label=start.label, level=level)
        else:
            gain = self._expected_gain()
            trial = Trial(number, handle.params, gain=gain, level=level)
        return Asked(trial, handle)

    def tell(self, asked: Asked, trial: Trial) -> Trial:
        """Report the outcome of a point to the sampler, then to the record.

        Args:
            asked: What `ask` returned.
            trial: The trial, with scores or a failure.

        Returns:
            The trial, with its number in the record.

        Raises:
            StudyError: It cannot be written.
        """
        frozen = self._record.freeze(trial, self._distributions)
        in_memory = self._tell_sampler(asked.handle, frozen)
        # Samplers may store their state on the trial, as NSGA-II stores its generation. Without it
        # in the record, a resumed sampler would lose that state.
        whole = self._record.freeze(trial, self._distributions, in_memory.system_attrs)
        self._running -= 1
        return self._write(whole, trial)

    def take_over(self, trial: Trial) -> Trial:
        """Add a trial that another study has scored.

        Args:
            trial: The trial, with scores.

        Returns:
            The trial, with its number in the record.

        Raises:
            StudyError: It cannot be written.
        """
        frozen = self._record.freeze(trial, self._distributions)
        self._study.add_trial(frozen)
        return self._write(frozen, trial)

    def withdraw(self) -> None:
        """Take back the last `ask`: its trial is not going to be told."""
        self._running -= 1

    def show_running(self, params: Params) -> optuna.Trial:
        """Show a merge that another process scores to the sampler, as a running trial.

        Args:
            params: Its parameters.

        Returns:
            The running trial in Optuna's study, for `add_other`.
        """
        self._study.enqueue_trial(dict(params))
        return self._study.ask(self._distributions)

    def add_other(self, trial: Trial, shown: optuna.Trial | None) -> None:
        """Show a finished trial of another process to the sampler.

        Args:
            trial: The trial, as it is in the record.
            shown: The running trial that stood for it; None if none did.
        """
        self._recorded = max(self._recorded, trial.number + 1)
        if trial.level != self._level.number:
            return
        frozen = self._record.freeze(trial, self._distributions)
        if shown is None:
            self._study.add_trial(frozen)
            return
        self._tell_sampler(shown, frozen)

    def _tell_sampler(self, handle: optuna.Trial, frozen: FrozenTrial) -> FrozenTrial:
        # Attributes first: `study.tell` calls the sampler's `after_trial`, which reads standard
        # errors and constraints.
        for name, value in frozen.user_attrs.items():
            handle.set_user_attr(name, value)
        for name, violation in frozen.constraints.items():
            handle.set_constraint(name, violation)
        values = None if frozen.state == TrialState.FAIL else frozen.values
        return self._study.tell(handle, values, frozen.state)

    def _write(self, frozen: FrozenTrial, trial: Trial) -> Trial:
        number = self._record.add(frozen)
        self._recorded = number + 1
        return replace(trial, number=number)

    def _expected_gain(self) -> float | None:
        expected_gain = getattr(self._level.sampler, "expected_gain", None)
        if expected_gain is None:
            return None
        gain = expected_gain(self._study)
        # NaN compares false with every number, so a stopping rule would take it for a low gain.
        if gain is None or not math.isfinite(gain):
            return None
        return float(gain)


def _sources_first(
    trials: Sequence[FrozenTrial], sources: Collection[str]
) -> list[FrozenTrial]:
    """Order trials as they were asked for: sources that are scored at a time finish in any order.

    Samplers take their reference point from the first trials.
    """

    def place(trial: FrozenTrial) -> int:
        label = trial.user_attrs.get("label")
        return 0 if label in sources else 1

    # A stable sort: all others stay in the order of their numbers.
    return sorted(trials, key=place)
