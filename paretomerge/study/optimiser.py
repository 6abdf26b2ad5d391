"""The sampler, asked on a copy of the record in memory: asking costs no disk, telling writes the trial in one piece."""

import math
import warnings
from collections.abc import Mapping, Sequence

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import TrialState

from paretomerge.record.record import Record, Trial


class Optimiser:
    """ask, then tell: the sampler sees in memory exactly what the record will hold of its level.

    beforehand: trials that are shown to it first, and belong to another level.
    """

    def __init__(
        self,
        sampler: BaseSampler,
        record: Record,
        distributions: Mapping[str, BaseDistribution],
        level: int = 0,
        beforehand: Sequence[Trial] = (),
    ) -> None:
        self._sampler = sampler
        self._record = record
        self._level = level
        self._distributions = dict(distributions)
        self._study = optuna.create_study(
            directions=["maximize"] * len(record.objectives), sampler=sampler
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._study.set_metric_names([o.name for o in record.objectives])
        known = record.frozen()
        self._study.add_trials([record.freeze(trial, self._distributions) for trial in beforehand])
        self._study.add_trials(
            [trial for trial in known if trial.user_attrs.get("level", 0) == level]
        )
        self._ahead = len(known) - len(
            self._study.get_trials(deepcopy=False)
        )  # numbers in the record, less those in memory
        self._asked: optuna.Trial | None = None

    def ask(self, start: Trial | None = None) -> Trial:
        """The next point: that of `start`, or what the sampler proposes, with the gain that it expects where it tells."""
        if start is not None:
            self._study.enqueue_trial(dict(start.params))
        self._asked = self._study.ask(self._distributions)
        number = self._asked.number + self._ahead
        if start is not None:
            return Trial(number, self._asked.params, label=start.label, level=self._level)
        return Trial(number, self._asked.params, gain=self._gain(), level=self._level)

    def tell(self, trial: Trial) -> None:
        """The outcome of what was asked: to the sampler, then to the record."""
        assert self._asked is not None
        frozen = self._record.freeze(trial, self._distributions)
        for name, value in frozen.user_attrs.items():
            self._asked.set_user_attr(name, value)
        for name, value in frozen.constraints.items():
            self._asked.set_constraint(name, value)
        values = None if frozen.state == TrialState.FAIL else frozen.values
        told = self._study.tell(self._asked, values, frozen.state)
        self._record.add(
            self._record.freeze(trial, self._distributions, told.system_attrs), trial.number
        )

    def take(self, trial: Trial) -> None:
        """A trial that another study has scored."""
        frozen = self._record.freeze(trial, self._distributions)
        self._study.add_trial(frozen)
        self._record.add(frozen, trial.number)

    def _gain(self) -> float | None:
        told = getattr(self._sampler, "expected_gain", None)
        gain = None if told is None else told(self._study)
        return None if gain is None or not math.isfinite(gain) else float(gain)
