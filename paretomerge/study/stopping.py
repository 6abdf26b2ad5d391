"""When a search ends: after some evaluations, after some time, or when little is to be gained."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optuna.samplers import BaseSampler

from paretomerge.errors import ConfigError
from paretomerge.record.trial import Trial, count_evaluated

# A space of finitely many merges may be used up. Repeats cost no evaluation, so the limit is high.
_REPEATS_IN_A_ROW = 100


@dataclass(frozen=True)
class End:
    """How a run ended.

    Attributes:
        reason: The reason, as a message for the user.
        total: Trials in the record at that time.
        stopped: Whether the run ended before its budget was spent, because little was to be gained
            or no new merges were proposed.
        budget: The rule's `trials`, `until` and `patience`.
    """

    reason: str
    total: int
    stopped: bool
    budget: Mapping[str, Any]

    @classmethod
    def from_note(cls, note: Mapping[str, Any] | None) -> "End | None":
        """Read the end of a run from the record; None where no run has ended yet."""
        return cls(**note) if note else None


@dataclass(frozen=True)
class StoppingRule:
    """When to stop.

    Attributes:
        trials: The most evaluations in the record. Trials from a warm start and repeated recipes
            do not count.
        until: Stop earlier, once the sampler expects each of `patience` proposals in a row to add
            less than this share of the hypervolume. The last of them is not evaluated.
        patience: See `until`.
        deadline: Stop at this `time.monotonic()`.
        requested: Whether a callback asked to stop.
        overrules_stop: Whether to go on although an earlier run stopped because little was to be
            gained.
    """

    trials: int
    until: float | None = None
    patience: int = 5
    deadline: float | None = None
    requested: Callable[[], bool] = lambda: False
    overrules_stop: bool = False

    def check_sampler(self, sampler: BaseSampler) -> None:
        """Check that the sampler can say what it expects to gain, where `until` needs it.

        Args:
            sampler: The sampler.

        Raises:
            ConfigError: It cannot.
        """
        if self.until is not None and not hasattr(sampler, "expected_gain"):
            raise ConfigError(
                f"budget.until: {type(sampler).__name__} does not estimate the gain of its "
                "proposals. "
                "Use MMMOSampler, or leave `until` out."
            )

    def before_asking(
        self,
        finished: Sequence[Trial],
        last_end: End | None,
        begun: int = 0,
        running: int = 0,
    ) -> End | None:
        """Decide whether anything more is evaluated.

        A study that stopped before its budget was spent stays stopped until the budget grows.

        Args:
            finished: The trials in the record.
            last_end: How the latest run ended.
            begun: How many trials there were when this run, or this level of it, began.
            running: How many trials run, which count towards the budget.

        Returns:
            How the run ends; None where it goes on.
        """
        # The order decides which reason the user reads: the budget before the others.
        evaluated = count_evaluated(finished)
        if evaluated + running >= self.trials:
            return self._end(f"finished {evaluated} trials", finished)
        if self.deadline is not None and time.monotonic() >= self.deadline:
            return self._end(f"timeout after {evaluated} trials", finished)
        if self.requested():
            return self._end(
                f"stopped by a callback after {evaluated} trials", finished
            )
        if last_end and self._still_stopped(last_end, finished):
            return last_end
        # Only this run's trials count: repeats of the first level say nothing about the second.
        latest = finished[begun:][-_REPEATS_IN_A_ROW:]
        all_repeats = all(trial.same_as is not None for trial in latest)
        if all_repeats and len(latest) == _REPEATS_IN_A_ROW:
            reason = (
                f"finished {evaluated} trials: the last {_REPEATS_IN_A_ROW} proposals "
                "were merges that had been scored"
            )
            return self._end(reason, finished, stopped=True)
        return None

    def after_asking(
        self,
        gain: float | None,
        finished: Sequence[Trial],
        last_end: End | None,
        level: int = 0,
    ) -> End | None:
        """Decide whether the study stops instead of evaluating a proposal.

        The count of proposals starts again with each level, and when a study goes on after a stop.

        Args:
            gain: The share of the hypervolume that the sampler expects the proposal to add; None
                where the sampler gives no estimate.
            finished: The trials in the record.
            last_end: How the latest run ended.
            level: The level that is searched.

        Returns:
            How the run ends; None where it goes on.
        """
        if self.until is None:
            return None
        # By raising the budget after a stop, the user has overruled the gains before it.
        since = last_end.total if last_end and last_end.stopped else 0
        # Read from the record and not counted in memory: an interrupted study must stop where the
        # whole one does.
        earlier = []
        for trial in reversed(finished[since:]):
            if trial.level == level:
                earlier.append(trial.gain)
        in_a_row = 0
        for expected in (gain, *earlier):
            if expected is None or expected >= self.until:
                break
            in_a_row += 1
        if in_a_row < self.patience:
            return None
        evaluated = count_evaluated(finished)
        percentage = 100 * self.until
        reason = (
            f"stopped after {evaluated} trials: expected gain below {percentage:g} % "
            f"for {self.patience} asks"
        )
        return self._end(reason, finished, stopped=True)

    def _end(
        self, reason: str, finished: Sequence[Trial], stopped: bool = False
    ) -> End:
        budget = {"trials": self.trials, "until": self.until, "patience": self.patience}
        return End(reason, len(finished), stopped, budget)

    def _still_stopped(self, last_end: End, finished: Sequence[Trial]) -> bool:
        # A start that was added since the stop makes the record longer: the search then goes on.
        unchanged = last_end.stopped and last_end.total == len(finished)
        if self.overrules_stop or not unchanged:
            return False
        last_rule = StoppingRule(**last_end.budget)
        return not self._exceeds(last_rule)

    def _exceeds(self, other: "StoppingRule") -> bool:
        stricter = False
        if other.until is not None:
            stricter = self.until is None or self.until < other.until
        if stricter or self.trials > other.trials:
            return True
        return self.patience > other.patience
