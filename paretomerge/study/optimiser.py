"""The sampler, working on a copy of the record in memory.

Asking does not touch the disk. Telling writes the finished trial in one transaction.
"""

import math
import warnings
from dataclasses import replace

import optuna
from optuna.study import StudyDirection
from optuna.trial import TrialState

from paretomerge.record.record import Record
from paretomerge.record.trial import Trial
from paretomerge.study.level import Level


class Optimiser:
    """Ask and tell for one level.

    The sampler sees in memory exactly what the record holds of that level.
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
        recorded = record.frozen_trials()
        for trial in level.shown_first:
            # Marked, so that it does not count as a trial of this level.
            taken = replace(trial, warm_start=trial.warm_start or "the first level")
            self._study.add_trial(record.freeze(taken, self._distributions))
        for frozen in recorded:
            # Another level has other parameters, which this level's sampler cannot read.
            if frozen.user_attrs.get("level", 0) == level.number:
                self._study.add_trial(frozen)
        # The difference between a trial's number in the record and its number in memory.
        in_memory = self._study.get_trials(deepcopy=False)
        self._offset = len(recorded) - len(in_memory)
        self._asked: optuna.Trial | None = None

    def ask(self, start: Trial | None = None) -> Trial:
        """Ask for the next point.

        Args:
            start: A point to evaluate in place of a proposal.

        Returns:
            A trial without scores.
        """
        if start is not None:
            # An enqueued trial passes through the sampler, so its bookkeeping includes the point.
            self._study.enqueue_trial(dict(start.params))
        self._asked = self._study.ask(self._distributions)
        number = self._asked.number + self._offset
        params = self._asked.params
        level = self._level.number
        if start is not None:
            return Trial(number, params, label=start.label, level=level)
        return Trial(number, params, gain=self._expected_gain(), level=level)

    def tell(self, trial: Trial) -> None:
        """Report the outcome of the trial that was asked for to the sampler, then to the record.

        Args:
            trial: The trial, with scores or a failure.

        Raises:
            StudyError: It cannot be written.
        """
        assert self._asked is not None, "ask first"
        frozen = self._record.freeze(trial, self._distributions)
        # Attributes first: `study.tell` calls the sampler's `after_trial`, which reads standard
        # errors and constraints.
        for name, value in frozen.user_attrs.items():
            self._asked.set_user_attr(name, value)
        for name, violation in frozen.constraints.items():
            self._asked.set_constraint(name, violation)
        values = None if frozen.state == TrialState.FAIL else frozen.values
        in_memory = self._study.tell(self._asked, values, frozen.state)
        # Samplers may store their state on the trial, as NSGA-II stores its generation. Without it
        # in the record, a resumed sampler would lose that state.
        whole = self._record.freeze(trial, self._distributions, in_memory.system_attrs)
        self._record.add(whole, trial.number)

    def take_over(self, trial: Trial) -> None:
        """Add a trial that another study has scored.

        Args:
            trial: The trial, with scores.

        Raises:
            StudyError: It cannot be written.
        """
        frozen = self._record.freeze(trial, self._distributions)
        self._study.add_trial(frozen)
        self._record.add(frozen, trial.number)

    def _expected_gain(self) -> float | None:
        expected_gain = getattr(self._level.sampler, "expected_gain", None)
        if expected_gain is None:
            return None
        gain = expected_gain(self._study)
        # NaN compares false with every number, so a stopping rule would take it for a low gain.
        if gain is None or not math.isfinite(gain):
            return None
        return float(gain)
