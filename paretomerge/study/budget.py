"""How long a study goes on: a number of evaluations, and optionally until little gain is to be expected."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from optuna.samplers import BaseSampler

from paretomerge.errors import ConfigError
from paretomerge.record.record import Trial

_KNOWN_IN_A_ROW = 100  # then a space of finitely many merges may be used up


@dataclass(frozen=True)
class End:
    """How a run ended. total: trials in the record then. stopped: for want of gain, before its budget was spent."""

    reason: str
    total: int
    stopped: bool
    budget: Mapping[str, Any]

    @classmethod
    def read(cls, noted: Any) -> "End | None":
        """From the record, as `asdict` wrote it; None where no run has ended yet."""
        return cls(**noted) if noted else None


@dataclass(frozen=True)
class Budget:
    """trials: at most so many; what was taken over from other studies, or is the same merge as an earlier trial, is not counted.

    until: stop earlier, when the sampler has expected less than this share of the hypervolume for `patience` proposals in a
    row. The last of them is not evaluated.
    """

    trials: int
    until: float | None = None
    patience: int = 5

    @classmethod
    def of(cls, given: "int | Budget") -> "Budget":
        return given if isinstance(given, Budget) else cls(given)

    def check(self, sampler: BaseSampler) -> None:
        """Raise ConfigError where the rule needs what the sampler does not tell."""
        if self.until is not None and not hasattr(sampler, "expected_gain"):
            got = type(sampler).__name__
            raise ConfigError(
                f"budget.until: expected a sampler that tells its expected gain, got {got}; choose MMMOSampler or leave `until` out"
            )

    def spent(self, finished: Sequence[Trial], last: End | None, begun: int = 0) -> End | None:
        """Whether nothing more is to be evaluated, before the sampler is asked.

        last: how the latest run ended. A study that stopped for want of gain, or of merges that are new, stays so until its budget
        grows. begun: how many trials there were when this run, or this level of it, began.
        """
        own = evaluated(finished)
        if own >= self.trials:
            return self._end(f"finished {own} trials", finished)
        if (
            last
            and last.stopped
            and last.total == len(finished)
            and not self._exceeds(Budget(**last.budget))
        ):
            return last
        row = finished[begun:][-_KNOWN_IN_A_ROW:]
        if len(row) == _KNOWN_IN_A_ROW and all(t.same_as is not None for t in row):
            told = f"finished {own} trials: the last {_KNOWN_IN_A_ROW} proposals were merges that had been scored"
            return self._end(told, finished, stopped=True)
        return None

    def gainless(
        self, gain: float | None, finished: Sequence[Trial], last: End | None, level: int = 0
    ) -> End | None:
        """Whether the study stops at a proposal of that expected gain. One that went on after a stop counts anew, and so does each
        level.
        """
        if self.until is None:
            return None
        since = last.total if last and last.stopped else 0
        row = 0
        for expected in (gain, *(t.gain for t in reversed(finished[since:]) if t.level == level)):
            if expected is None or expected >= self.until:
                break
            row += 1
        if row < self.patience:
            return None
        rule = f"expected gain below {100 * self.until:g} % for {self.patience} asks"
        return self._end(
            f"stopped after {evaluated(finished)} trials: {rule}", finished, stopped=True
        )

    def _end(self, reason: str, finished: Sequence[Trial], stopped: bool = False) -> End:
        return End(reason, len(finished), stopped, asdict(self))

    def _exceeds(self, other: "Budget") -> bool:
        lower = other.until is not None and (self.until is None or self.until < other.until)
        return lower or self.trials > other.trials or self.patience > other.patience


def evaluated(trials: Sequence[Trial]) -> int:
    """How many trials count: merges that a study made itself, each once."""
    return sum(not t.warm and t.same_as is None for t in trials)
