"""The trials of an Optuna study as arrays.

Standard errors enter here: `reported_stderr` reads those of one trial from its user attribute
`stderr`, and `Observations.stderr` collects them for the surrogate.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import compress
from operator import attrgetter

import numpy as np
from optuna import Study
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from paretomerge.errors import ConfigError, shorten
from paretomerge.search.encoding import Mask
from paretomerge.search.options import number_vector
from paretomerge.types import Array, ParamValue

StoredExamples = str | Sequence[float] | None
StoredScore = tuple[float, float | None, int, StoredExamples]

STDERR = "stderr"
"""Trial user attribute: the standard error of each value, in the order of the objectives."""

SCORES = "scores"
"""Trial user attribute: objective -> [value, standard error, examples, score of each example]."""

WARM = "warm"
"""Trial user attribute: where a trial was taken from, if it was not evaluated here."""

SAME_AS = "same_as"
"""Trial user attribute: the number of the trial with the same recipe, whose scores it has."""

# From here on a value counts as infinite: its square overflows soon.
_INFINITE = 1e100
_STOPPED = (TrialState.FAIL, TrialState.PRUNED)


@dataclass(frozen=True)
class Observations:
    """The n finished trials of a study, in the order of their numbers, and its running trials.

    A failed or pruned trial is one of them if it has parameters.

    Attributes:
        trials: Complete, failed and pruned trials.
        running: Trials that still run.
        signs: `(m,)`, 1 where the study maximises the objective, -1 where it minimises it.
    """

    trials: tuple[FrozenTrial, ...]
    running: tuple[FrozenTrial, ...]
    signs: Array

    @classmethod
    def of(cls, study: Study, asking: FrozenTrial | None = None) -> "Observations":
        """Read a study.

        Args:
            study: The study.
            asking: The trial that asks for parameters; it is left out.
        """
        # Sorted, because storages may return the trials in any order.
        stored = study.get_trials(deepcopy=False)
        trials = sorted(stored, key=attrgetter("number"))
        finished = []
        running = []
        for trial in trials:
            if asking is not None and trial.number == asking.number:
                continue
            if _is_informative(trial):
                finished.append(trial)
            elif trial.state == TrialState.RUNNING:
                running.append(trial)
        signs = np.full(len(study.directions), -1.0)
        for k, direction in enumerate(study.directions):
            if direction == StudyDirection.MAXIMIZE:
                signs[k] = 1.0
        return cls(tuple(finished), tuple(running), signs)

    def __len__(self) -> int:
        return len(self.trials)

    def only(self, mask: Mask) -> "Observations":
        """The same observations, with the finished trials of the mask `(n,)` only."""
        # Not a copy, so that what the cached properties hold is not computed again.
        if mask.all():
            return self
        trials = tuple(compress(self.trials, mask))
        return replace(self, trials=trials)

    @property
    def params(self) -> list[dict[str, ParamValue]]:
        """The parameters of each finished trial."""
        return [trial.params for trial in self.trials]

    @cached_property
    def complete(self) -> Mask:
        """Mask `(n,)` of the complete trials with finite values below 1e100 in size."""
        mask = np.zeros(len(self), dtype=bool)
        for i, trial in enumerate(self.trials):
            if trial.state == TrialState.COMPLETE:
                size = np.abs(trial.values)
                mask[i] = (size < _INFINITE).all()
        return mask

    @cached_property
    def y(self) -> Array:
        """The objectives `(n, m)`, all maximised; NaN where a trial is not complete."""
        shape = (len(self), len(self.signs))
        y = np.full(shape, np.nan)
        for i in np.flatnonzero(self.complete):
            y[i] = self.trials[i].values
        maximised: Array = self.signs * y
        return maximised

    @cached_property
    def stderr(self) -> Array | None:
        """The standard errors `(n, m)` of the objectives, or None where no trial reports any.

        A trial that reports none for an objective gets the median of the others. The column of an
        objective without any reported standard error is NaN.
        """
        m = len(self.signs)
        shape = (len(self), m)
        stderr = np.full(shape, np.nan)
        for i in np.flatnonzero(self.complete):
            trial = self.trials[i]
            stderr[i] = _valid_stderr(trial, m)
        missing = np.isnan(stderr)
        reported = ~missing.all(0)
        # The surrogate needs the noise of an objective in all trials or in none.
        for k in np.flatnonzero(reported):
            column = stderr[:, k]
            is_missing = missing[:, k]
            column[is_missing] = np.nanmedian(column)
        if reported.any():
            return stderr
        return None

    @cached_property
    def constraints(self) -> Array:
        """The constraints `(n, c)` in Optuna's sense: feasible where all are at most 0.

        NaN where a trial does not report one; c may be 0. An infinite value is replaced by the
        greatest finite distance from 0 of that constraint.
        """
        largest = self._largest_constraint
        clipped: Array = np.clip(self._reported_constraints, -largest, largest)
        return clipped

    @cached_property
    def _reported_constraints(self) -> Array:
        """The constraints `(n, c)` as the trials report them."""
        names: set[str] = set()
        for trial in self.trials:
            names.update(trial.constraints)
        # Sorted, because a storage does not keep their order, and the surrogate depends on it.
        columns = sorted(names)
        shape = (len(self), len(columns))
        constraints = np.full(shape, np.nan)
        for i, trial in enumerate(self.trials):
            reported = trial.constraints
            for k, name in enumerate(columns):
                constraints[i, k] = reported.get(name, np.nan)
        return constraints

    @cached_property
    def _largest_constraint(self) -> Array:
        """The greatest finite distance from 0 of each constraint `(c,)`; 1 where there is none."""
        distance = np.abs(self._reported_constraints)
        finite = np.where(distance < _INFINITE, distance, 0.0)
        largest = finite.max(0, initial=0.0)
        # `violation` divides by it.
        divisor: Array = np.where(largest > 0, largest, 1.0)
        return divisor

    @property
    def violation(self) -> Array:
        """How much each trial violates its constraints `(n,)`.

        The sum over the constraints, each in units of its greatest distance from 0; infinite for
        trials that are not complete or do not report all constraints.
        """
        excess = self.constraints.clip(min=0)
        relative = excess / self._largest_constraint
        total = relative.sum(1)
        # A constraint that is not reported is NaN.
        total = np.nan_to_num(total, nan=np.inf)
        return np.where(self.complete, total, np.inf)

    @cached_property
    def feasible(self) -> Mask:
        """Mask `(n,)` of the complete trials that report no violated constraint."""
        # A constraint that is not reported is NaN, which does not count as violated.
        is_positive = self.constraints > 0
        violated = is_positive.any(1)
        feasible: Mask = self.complete & ~violated
        return feasible

    @property
    def example_scores(self) -> list[list[Array | None]]:
        """The score of each example per trial and objective, higher is better; None if unknown."""
        m = len(self.signs)
        per_trial = []
        for trial in self.trials:
            stored = trial.user_attrs.get(SCORES)
            per_trial.append(_example_scores(stored, m))
        return per_trial


def count_own(trials: Iterable[FrozenTrial]) -> int:
    """Count the trials that were evaluated here, or are running.

    Args:
        trials: Trials of a study.

    Returns:
        Their number, without those that were taken over and without repeated recipes.
    """
    count = 0
    for trial in trials:
        is_waiting = trial.state == TrialState.WAITING
        was_taken = bool(trial.user_attrs.get(WARM))
        repeats = trial.user_attrs.get(SAME_AS) is not None
        if not (is_waiting or was_taken or repeats):
            count += 1
    return count


def reported_stderr(trial: FrozenTrial, m: int) -> Array | None:
    """Read the standard errors of one trial from its user attribute `stderr`.

    Args:
        trial: The trial.
        m: Number of objectives.

    Returns:
        `(m,)`, NaN where one is not known; None where the trial reports none.

    Raises:
        ConfigError: The attribute is not a list of m numbers of at least 0.
    """
    reported = trial.user_attrs.get(STDERR)
    if reported is None:
        return None
    # A study of one objective may report a plain number.
    is_number = isinstance(reported, float | int)
    stderr = number_vector([reported] if is_number else reported)
    is_negative = stderr < 0
    if stderr.shape != (m,) or is_negative.any():
        raise ConfigError(
            f"trial {trial.number}: user attribute {STDERR!r}: expected {m} numbers of 0 or more, "
            f"one per objective, got {shorten(reported)}; the trial counts as one without "
            "standard errors"
        )
    return np.where(stderr < _INFINITE, stderr, np.nan)


def _valid_stderr(trial: FrozenTrial, m: int) -> Array:
    """The standard errors `(m,)` of a trial; NaN where they are missing or invalid."""
    try:
        stderr = reported_stderr(trial, m)
    except ConfigError:
        # Reported to the user when the trial finished (`MMMOSampler.after_trial`).
        stderr = None
    if stderr is None:
        return np.full(m, np.nan)
    return stderr


def _is_informative(trial: FrozenTrial) -> bool:
    """Whether a trial is complete, or has failed or been pruned and has parameters."""
    if trial.state in _STOPPED:
        return bool(trial.params)
    return trial.state == TrialState.COMPLETE


def _example_scores(
    scores: Mapping[str, StoredScore] | None, m: int
) -> list[Array | None]:
    """The scores of each example, per objective; None for objectives that have none."""
    per_objective: list[Array | None] = [None] * m
    stored = list((scores or {}).values())
    for k, score in enumerate(stored[:m]):
        examples = score[3]
        if examples is not None:
            numbers = [float(value) for value in examples]
            per_objective[k] = np.array(numbers)
    return per_objective
