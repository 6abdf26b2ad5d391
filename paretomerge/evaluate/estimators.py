"""What a merge would score on all items, told from some of them and from what other merges did on all.

`known` `(k, N)` are the outcomes of k merges on N items; a new merge is seen on the items `seen` `(n,)`, with `outcomes` `(n,)`. Every
estimator returns an Estimate of the new merge's mean over all N. Outcomes are 0 and 1, or anything between.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

Array = NDArray[np.float64]
Places = NDArray[np.intp]
_ABILITIES = 3  # dimensions of the item-response model
_ROUNDS = 30  # of alternating Newton steps
_STIFF = 1.0  # precision of the normal priors of abilities and discriminations


@dataclass(frozen=True)
class Estimate:
    """A mean over N items, with the standard error of taking it from some of them."""

    value: float
    stderr: float


Estimator = Callable[[Places, Array], Estimate]


def plain(known: Array) -> Estimator:
    """The mean of what was seen."""
    return corrected(np.zeros(known.shape[1]))


def stratified(known: Array) -> Estimator:
    """The mean of the means over items that equally many of the known merges get right, each stratum by its size."""
    stratum = np.rint(known.sum(0)).astype(int)
    sizes = np.bincount(stratum)

    def estimate(seen: Places, outcomes: Array) -> Estimate:
        met = stratum[seen]
        levels = np.unique(met)
        # a stratum that was not met goes to the nearest one that was
        owner = levels[np.abs(np.arange(len(sizes))[:, None] - levels).argmin(1)]
        weight = np.array([sizes[owner == level].sum() for level in levels]) / len(stratum)
        means = np.array([outcomes[met == level].mean() for level in levels])
        value = float(weight @ means)
        return Estimate(value, _error(outcomes - means[np.searchsorted(levels, met)], len(stratum)))

    return estimate


def corrected(expected: Array) -> Estimator:
    """The mean of what was expected of all items `(N,)`, plus the mean error of it on those that were seen: without bias, whatever
    was expected, and the more exact the better it was (the difference estimator of survey sampling; Cochran 1977, sec. 7.3).
    """

    def estimate(seen: Places, outcomes: Array) -> Estimate:
        error = outcomes - expected[seen]
        return Estimate(float(expected.mean() + error.mean()), _error(error, len(expected)))

    return estimate


def by_difficulty(known: Array) -> Estimator:
    """Corrected, expecting of each item what the known merges did on it."""
    return corrected(known.mean(0))


class Responses:
    """An item-response model: logit of the chance that merge j gets item i right = a_i . theta_j + d_i (2PL with several abilities).

    Fitted to `known` by the highest posterior, with normal priors; a new merge's abilities have the known ones' spread as a prior,
    so that a few items say where among them, or beyond, it lies (MERGE3, Mencattini et al. 2025, has it between its sources').
    """

    def __init__(self, known: Array) -> None:
        k = len(known)
        y = np.clip(known, 0.02, 0.98)
        logits = np.log(y / (1 - y))
        self._d = logits.mean(0)
        u, s, vt = np.linalg.svd(logits - self._d, full_matrices=False)
        m = min(_ABILITIES, k)
        self._theta = u[:, :m] * math.sqrt(k)
        self._a = (s[:m, None] * vt[:m]).T / math.sqrt(k) / 4
        for _ in range(_ROUNDS):
            self._step(known)
        self._centre = self._theta.mean(0)
        spread = np.atleast_2d(np.cov(self._theta.T)) if k > 1 else np.eye(m)
        self._precision = np.asarray(np.linalg.inv(spread + 0.05 * np.eye(m)), dtype=np.float64)

    def _step(self, known: Array) -> None:
        """A Newton step of all items' (a, d), then of all merges' theta."""
        one: Array = np.column_stack([self._theta, np.ones(len(self._theta))])
        both: Array = np.column_stack([self._a, self._d])
        prior: Array = np.diag([_STIFF] * self._a.shape[1] + [0.1])
        both = _newton(both, one, known.T, np.zeros_like(both), prior)
        self._a, self._d = both[:, :-1], both[:, -1]
        stiff: Array = _STIFF * np.eye(self._a.shape[1])
        self._theta = _newton(
            self._theta, self._a, known, np.zeros_like(self._theta), stiff, self._d
        )

    def expected(self, seen: Places, outcomes: Array) -> Array:
        """Chances of all items `(N,)`, for a merge of which some were seen."""
        theta = self._centre[None]
        for _ in range(_ROUNDS):
            theta = _newton(
                theta,
                self._a[seen],
                outcomes[None],
                self._centre[None],
                self._precision,
                self._d[seen],
            )
        return np.asarray(expit(self._a @ theta[0] + self._d))

    def predicted(self, seen: Places, outcomes: Array) -> Estimate:
        """What was seen, and the model's word for the rest (p-IRT, Polo et al. 2024): little spread, and the model's bias."""
        expected = self.expected(seen, outcomes)
        whole = expected.copy()
        whole[seen] = outcomes
        return Estimate(float(whole.mean()), _error(outcomes - expected[seen], len(expected)))

    def corrected(self, seen: Places, outcomes: Array) -> Estimate:
        """The model's word, corrected on what was seen."""
        return corrected(self.expected(seen, outcomes))(seen, outcomes)

    def combined(self, seen: Places, outcomes: Array) -> Estimate:
        """Between the two, nearer to the model the fewer were seen (gp-IRT, Polo et al. 2024, with n / (n + 50) for its weight)."""
        one, other = self.predicted(seen, outcomes), self.corrected(seen, outcomes)
        share = len(seen) / (len(seen) + 50)
        return Estimate(share * other.value + (1 - share) * one.value, other.stderr)


def _newton(
    x: Array,
    features: Array,
    y: Array,
    centre: Array,
    precision: Array,
    offset: Array | float = 0.0,
) -> Array:
    """One damped Newton step for each row of x `(r, p)`: logistic regression of y `(r, q)` on features `(q, p)`, normal prior."""
    chance = expit(x @ features.T + offset)
    slope = (y - chance) @ features - (x - centre) @ precision
    curvature = (
        np.einsum("rq,qi,qj->rij", np.maximum(chance * (1 - chance), 0.01), features, features)
        + precision
    )
    step = np.linalg.solve(curvature, slope[..., None])[..., 0]
    size = np.linalg.norm(step, axis=1, keepdims=True)
    return np.asarray(x + step / np.maximum(size / 2, 1))


def _error(deviations: Array, total: int) -> float:
    """Standard error of a mean over `total` items from some, drawn without putting back; few or equal ones never make it 0."""
    n = len(deviations)
    variance = (float(((deviations - deviations.mean()) ** 2).sum()) + 0.25) / (n + 1)
    return math.sqrt(variance / n * (1 - n / total))
