"""An Optuna study's trials as arrays: what a sampler may know."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna import Study
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

Array = NDArray[np.float64]
STDERR = "stderr"
"""Trial user attribute: the standard error of each value, in the order of the objectives."""
SCORES = "scores"
"""Trial user attribute of our own studies: objective -> [value, standard error, examples, outcome of each example]."""


@dataclass(frozen=True)
class Observations:
    """n finished or failed trials, in the order of their numbers, and the parameters of those that still run."""

    trials: tuple[FrozenTrial, ...]
    running: tuple[FrozenTrial, ...]
    signs: Array
    """`(m,)`: 1 where the study maximises, -1 where it minimises."""

    @classmethod
    def of(cls, study: Study, asking: FrozenTrial | None = None) -> "Observations":
        """Everything that the study knows besides `asking`, the trial that parameters are wanted for.

        A failed trial counts where its parameters are known: one that failed before it had any teaches nothing.
        """
        trials = [t for t in study.get_trials(deepcopy=False) if asking is None or t.number != asking.number]
        trials.sort(key=lambda t: t.number)
        done = [t for t in trials if t.state == TrialState.COMPLETE or (t.state == TrialState.FAIL and t.params)]
        running = [t for t in trials if t.state == TrialState.RUNNING and t.params]
        signs = np.array([1.0 if d == StudyDirection.MAXIMIZE else -1.0 for d in study.directions])
        return cls(tuple(done), tuple(running), signs)

    def __len__(self) -> int:
        return len(self.trials)

    @property
    def params(self) -> list[dict[str, Any]]:
        return [t.params for t in self.trials]

    @cached_property
    def complete(self) -> NDArray[np.bool_]:
        """Mask `(n,)` of the trials that have values, all of them finite."""
        return np.array([t.state == TrialState.COMPLETE and np.isfinite(t.values).all() for t in self.trials], dtype=bool)

    @cached_property
    def y(self) -> Array:
        """`(n, m)`, all maximised; NaN where a trial failed."""
        m = len(self.signs)
        rows = [t.values if good else [np.nan] * m for t, good in zip(self.trials, self.complete, strict=True)]
        return np.asarray(self.signs * np.array(rows, dtype=float).reshape(-1, m))

    @cached_property
    def stderr(self) -> Array | None:
        """`(n, m)`, or None where no trial tells; one that does not tell gets the median of those that do."""
        m = len(self.signs)
        told = [np.atleast_1d(t.user_attrs.get(STDERR, np.nan)).astype(float) for t in self.trials]
        known = np.array([s if s.shape == (m,) else np.full(m, np.nan) for s in told]).reshape(-1, m)
        known[~self.complete | ~np.isfinite(known).all(1)] = np.nan
        if np.isnan(known).all(0).any():
            return None
        return np.where(np.isnan(known), np.nanmedian(known, axis=0), known)

    @cached_property
    def constraints(self) -> Array:
        """`(n, c)` in Optuna's sense, feasible where all are <= 0; NaN where a trial does not tell. c may be 0."""
        names = list(dict.fromkeys(name for t in self.trials for name in t.constraints))
        rows = [[t.constraints.get(name, np.nan) for name in names] for t in self.trials]
        return np.array(rows, dtype=float).reshape(len(self.trials), len(names))

    @cached_property
    def feasible(self) -> NDArray[np.bool_]:
        """Mask `(n,)`: complete, and no constraint known to be violated."""
        return np.asarray(self.complete & ~(self.constraints > 0).any(1))

    @property
    def items(self) -> list[list[Array | None]]:
        """Per trial and objective the outcome of each example (the greater the better), or None where nobody kept them."""
        return [_items(t.user_attrs.get(SCORES), self.signs) for t in self.trials]


def _items(scores: Mapping[str, Sequence[Any]] | None, signs: Array) -> list[Array | None]:
    kept = [score[3] for score in (scores or {}).values()][: len(signs)]
    kept += [None] * (len(signs) - len(kept))
    return [None if items is None else np.array([float(item) for item in items]) for items in kept]
