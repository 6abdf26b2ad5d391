"""An Optuna study's trials as arrays: what a sampler may know."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import compress
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna import Study
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from paretomerge.errors import ConfigError, shorten
from paretomerge.search.options import number_vector

Array = NDArray[np.float64]
STDERR = "stderr"
"""Trial user attribute: the standard error of each value, in the order of the objectives."""
SCORES = "scores"
"""Trial user attribute of our own studies: objective -> [value, standard error, examples, outcome of each example]."""
_ABSURD = 1e100  # a value from here on is as good as infinite: what is made of it soon is
_UNFINISHED = (TrialState.FAIL, TrialState.PRUNED)


@dataclass(frozen=True)
class Observations:
    """n finished, failed or pruned trials, in the order of their numbers, and those that still run."""

    trials: tuple[FrozenTrial, ...]
    running: tuple[FrozenTrial, ...]
    signs: Array
    """`(m,)`: 1 where the study maximises, -1 where it minimises."""

    @classmethod
    def of(cls, study: Study, asking: FrozenTrial | None = None) -> "Observations":
        """Everything that the study knows besides `asking`, the trial that parameters are wanted for.

        A failed or pruned trial counts where its parameters are known: one that failed before it had any teaches nothing.
        """
        trials = [
            t
            for t in study.get_trials(deepcopy=False)
            if asking is None or t.number != asking.number
        ]
        trials.sort(key=lambda t: t.number)
        done = [
            t
            for t in trials
            if t.state == TrialState.COMPLETE or (t.state in _UNFINISHED and t.params)
        ]
        running = [t for t in trials if t.state == TrialState.RUNNING]
        signs = np.array([1.0 if d == StudyDirection.MAXIMIZE else -1.0 for d in study.directions])
        return cls(tuple(done), tuple(running), signs)

    def __len__(self) -> int:
        return len(self.trials)

    def only(self, mask: NDArray[np.bool_]) -> "Observations":
        """Those of the finished trials that are in the mask `(n,)`."""
        return self if mask.all() else replace(self, trials=tuple(compress(self.trials, mask)))

    @property
    def params(self) -> list[dict[str, Any]]:
        return [t.params for t in self.trials]

    @cached_property
    def complete(self) -> NDArray[np.bool_]:
        """Mask `(n,)` of the trials that have values, all of them finite, and not only just."""
        return np.array(
            [
                t.state == TrialState.COMPLETE and (np.abs(t.values) < _ABSURD).all()
                for t in self.trials
            ],
            dtype=bool,
        )

    @cached_property
    def y(self) -> Array:
        """`(n, m)`, all maximised; NaN where a trial failed."""
        m = len(self.signs)
        rows = [
            t.values if good else [np.nan] * m
            for t, good in zip(self.trials, self.complete, strict=True)
        ]
        return np.asarray(self.signs * np.array(rows, dtype=float).reshape(-1, m))

    @cached_property
    def stderr(self) -> Array | None:
        """`(n, m)`, or None where no trial tells; one that does not tell gets the median of those that do. NaN for an objective of which
        none tells.
        """
        m = len(self.signs)
        known = np.array([_stderr(t, m) for t in self.trials]).reshape(-1, m)
        known[~self.complete] = np.nan
        told = ~np.isnan(known).all(0)
        for k in np.flatnonzero(told):
            known[np.isnan(known[:, k]), k] = np.nanmedian(known[:, k])
        return known if told.any() else None

    @cached_property
    def constraints(self) -> Array:
        """`(n, c)` in Optuna's sense, feasible where all are <= 0; NaN where a trial does not tell. c may be 0. An infinite one is as far
        from 0 as the farthest that is not.
        """
        return np.asarray(np.clip(self._constraints, -self._farthest, self._farthest))

    @cached_property
    def _constraints(self) -> Array:
        """`(n, c)`, as they were told."""
        names = sorted(
            {name for t in self.trials for name in t.constraints}
        )  # a storage may forget their order
        rows = [[t.constraints.get(name, np.nan) for name in names] for t in self.trials]
        return np.array(rows, dtype=float).reshape(len(self.trials), len(names))

    @cached_property
    def _farthest(self) -> Array:
        """`(c,)`: of each constraint how far from 0 a trial was, infinitely far ones apart; 1 where none was."""
        distance = np.abs(self._constraints)
        farthest = np.where(distance < _ABSURD, distance, 0.0).max(0, initial=0.0)
        return np.asarray(np.where(farthest > 0, farthest, 1.0))

    @property
    def violation(self) -> Array:
        """`(n,)`: by how much constraints are broken, each in units of the farthest from 0; infinite where that is not told."""
        broken = self.constraints.clip(min=0) / self._farthest
        return np.where(self.complete, np.nan_to_num(broken.sum(1), nan=np.inf), np.inf)

    @cached_property
    def feasible(self) -> NDArray[np.bool_]:
        """Mask `(n,)`: complete, and no constraint known to be violated."""
        return np.asarray(self.complete & ~(self.constraints > 0).any(1))

    @property
    def example_scores(self) -> list[list[Array | None]]:
        """Per trial and objective the outcome of each example (the greater the better), or None where nobody kept them."""
        return [_items(t.user_attrs.get(SCORES), self.signs) for t in self.trials]


def reported_stderr(trial: FrozenTrial, m: int) -> Array | None:
    """The trial's standard errors `(m,)`, NaN where it is not known; None where it tells none. ConfigError where they mean nothing."""
    told = trial.user_attrs.get(STDERR)
    if told is None:
        return None
    errors = number_vector([told] if isinstance(told, float | int) else told)
    if errors.shape != (m,) or (errors < 0).any():
        raise ConfigError(
            f"trial {trial.number}: user attribute {STDERR!r}: expected {m} numbers of 0 or more, one per objective, "
            f"got {shorten(told)}; they count as not told"
        )
    return np.where(errors < _ABSURD, errors, np.nan)


def _stderr(trial: FrozenTrial, m: int) -> Array:
    """The same; what means nothing was told of when it came."""
    try:
        told = reported_stderr(trial, m)
    except ConfigError:
        told = None
    return np.full(m, np.nan) if told is None else told


def _items(scores: Mapping[str, Sequence[Any]] | None, signs: Array) -> list[Array | None]:
    kept = [score[3] for score in (scores or {}).values()][: len(signs)]
    kept += [None] * (len(signs) - len(kept))
    return [None if items is None else np.array([float(item) for item in items]) for items in kept]
