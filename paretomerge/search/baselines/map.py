"""MAP (Li et al. 2024, "MAP: low-compute model merging with amortized Pareto fronts", arXiv 2406.07529).

Near good coefficients each task's score is nearly a quadratic function of them (Taylor's second order, sec. 3), so one
fits a quadratic per task to a few tens of evaluations, and runs NSGA-III on the quadratics to get the front for nothing.
The paper stops there. Here the fit is repeated after every trial, and the point of the predicted front that should add
most is evaluated next: where the fit is wrong, that is where it is put right.

The full quadratic in d coefficients has (d + 1)(d + 2) / 2 terms, more than trials from about 10 on. A ridge penalty makes it
solvable; its strength, and whether mixed terms are used at all, is what predicts left-out trials best.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import CategoricalDistribution

from paretomerge.errors import ConfigError
from paretomerge.pareto.front import hypervolume, nondominated, reference_point
from paretomerge.search.baselines.nsga3 import front_of
from paretomerge.search.encoding import Encoding
from paretomerge.search.options import check_options
from paretomerge.search.point_sampler import Archive

Array = NDArray[np.float64]
_PENALTIES = 10.0 ** np.arange(-6, 3)  # in units of the terms' mean eigenvalue
_FEWEST = 4  # trials


@dataclass(frozen=True)
class Quadratic:
    """A quadratic surrogate per objective, NSGA-III on them, and the point of their front that promises most.

    generations: of NSGA-III. Choices enter by one term each, and their products with everything else where these help.
    """

    generations: int = 40

    def __post_init__(self) -> None:
        check_options("map", self)
        if self.generations < 1:
            raise ConfigError(f"map: expected generations >= 1, got {self.generations}")

    def propose(self, archive: Archive, rng: np.random.Generator) -> Array:
        """Points `(k, d)` of the predicted front."""
        x, y = archive.x[archive.usable], archive.y[archive.usable]
        if len(x) < _FEWEST:
            return np.zeros((0, archive.encoding.d))
        fit = QuadraticFit(archive.encoding, x, y)
        points = front_of(fit.predict, archive.encoding, x, rng, self.generations)
        points = points[archive.is_new(points)]
        return (
            points[promise(fit.predict(points), y, fit.predict(archive.pending))]
            if len(points)
            else points
        )


class QuadraticFit:
    """m quadratics on x `(n, d)`, y `(n, m)`: of linear terms and squares, or of mixed terms too; ridge regression.

    Both choices are made per objective by the mean squared error of leaving one trial out, in closed form (PRESS, Allen 1974).
    """

    def __init__(self, encoding: Encoding, x: Array, y: Array) -> None:
        widths = [columns.stop - columns.start for columns in encoding.columns.values()]
        self._numbers = ~np.repeat(
            [isinstance(d, CategoricalDistribution) for d in encoding.space.values()], widths
        )
        self._pairs = np.triu_indices(encoding.d, 1)
        plain = _ridge(self._terms(x, mixed=False), y)
        mixed = _ridge(self._terms(x, mixed=True), y)
        self._mixed = mixed.error < plain.error
        self._plain_fit, self._mixed_fit = plain, mixed

    def predict(self, x: Array) -> Array:
        """`(k, m)`"""
        plain = self._plain_fit.at(self._terms(x, mixed=False))
        return (
            np.where(self._mixed, self._mixed_fit.at(self._terms(x, mixed=True)), plain)
            if self._mixed.any()
            else plain
        )

    def _terms(self, x: Array, mixed: bool) -> Array:
        z = np.where(self._numbers, 2 * x - 1, x)
        terms = [z, z[:, self._numbers] ** 2]
        if mixed:
            terms.append(z[:, self._pairs[0]] * z[:, self._pairs[1]])
        return np.concatenate(terms, axis=1)


@dataclass(frozen=True)
class _Ridge:
    centre: Array
    """`(terms,)`"""
    intercept: Array
    """`(m,)`"""
    coefficients: Array
    """`(terms, m)`"""
    error: Array
    """`(m,)`: mean squared error of left-out trials."""

    def at(self, terms: Array) -> Array:
        return np.asarray(self.intercept + (terms - self.centre) @ self.coefficients)


def _ridge(terms: Array, y: Array) -> _Ridge:
    """Ridge regression through the `(n, n)` kernel, so that any number of terms will do; a penalty per objective."""
    n = len(y)
    centre, intercept = terms.mean(0), y.mean(0)
    z, target = terms - centre, y - intercept
    values, vectors = np.linalg.eigh(z @ z.T)
    values = np.maximum(values, 0)
    penalties = _PENALTIES * max(float(values.mean()), 1e-12)
    turned = vectors.T @ target
    errors, solutions = [], []
    for penalty in penalties:
        leverage = (vectors**2) @ (values / (values + penalty)) + 1 / n
        residual = target - vectors @ ((values / (values + penalty))[:, None] * turned)
        errors.append(((residual / np.maximum(1 - leverage, 1e-9)[:, None]) ** 2).mean(0))
        solutions.append(vectors @ (turned / (values + penalty)[:, None]))
    best = np.argmin(errors, axis=0)
    dual = np.stack([solutions[b][:, k] for k, b in enumerate(best)], axis=1)
    return _Ridge(centre, intercept, z.T @ dual, np.min(errors, axis=0))


def promise(predicted: Array, y: Array, pending: Array) -> NDArray[np.intp]:
    """Order of the candidates `(k, m)`: by the hypervolume that each should add to the front of `y` and `pending`; where
    none adds any, by the distance to the nearest point known, the largest gap first."""
    known = np.concatenate([y, pending])
    front = known[nondominated(known)]
    reference = reference_point(y)
    before = hypervolume(front, reference)
    gain = np.array(
        [
            hypervolume(np.concatenate([front, point[None]]), reference) - before
            for point in predicted
        ]
    )
    spread = np.ptp(y, axis=0)
    scale = np.where(spread > 0, spread, 1.0)
    gap = np.linalg.norm((predicted[:, None] - front[None]) / scale, axis=2).min(1)
    return np.lexsort((-gap, -np.round(gain / max(before, 1e-12), 9)))
