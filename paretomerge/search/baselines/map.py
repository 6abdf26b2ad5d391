"""MAP: merging with amortized Pareto fronts (Li et al. 2024, arXiv 2406.07529).

Near good coefficients, the score of each task is nearly a quadratic function of them (second-order
Taylor expansion, sec. 3). So MAP fits one quadratic per task to a few tens of evaluations and runs
NSGA-III on the quadratics, which costs nothing. The paper stops there. Here the fit is repeated
after every trial, and the point of the predicted front with the largest expected gain is evaluated
next: a wrong prediction is corrected where it matters.

The full quadratic in d coefficients has (d + 1)(d + 2) / 2 terms, which from about d = 10 is more
than there are trials. A ridge penalty makes the fit unique. Cross-validation chooses the penalty,
and whether products of two coefficients are used at all.
"""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from paretomerge.errors import ConfigError
from paretomerge.pareto.front import hypervolume, nondominated, reference_point
from paretomerge.search.baselines.columns import numeric_columns
from paretomerge.search.baselines.nsga3 import pareto_front
from paretomerge.search.encoding import Encoding, Indices
from paretomerge.search.options import check_options
from paretomerge.search.point_sampler import Archive
from paretomerge.types import Array

_PENALTIES = 10.0 ** np.arange(-6, 3)  # in units of the kernel's mean eigenvalue
_MIN_TRIALS = 4
_MIN_EIGENVALUE = 1e-12
_MIN_FREEDOM = 1e-9  # lower limit of 1 - leverage, which divides the residuals
_MIN_VOLUME = 1e-12
_GAIN_DIGITS = 9  # gains that agree to so many digits differ by rounding only


@dataclass(frozen=True)
class MAPProposer:
    """A quadratic surrogate per objective and NSGA-III on the surrogates.

    Attributes:
        generations: The number of generations of NSGA-III.

    Raises:
        ConfigError: An option is out of its range.
    """

    generations: int = 40

    def __post_init__(self) -> None:
        check_options("map", self)
        if self.generations < 1:
            raise ConfigError(f"map: expected generations >= 1, got {self.generations}")

    def propose(self, archive: Archive, rng: Generator) -> Array:
        """Propose the points of the predicted front.

        Args:
            archive: The trials so far.
            rng: The source of randomness.

        Returns:
            New points `(k, d)`, the largest expected gain first; none while there are too few
            trials.
        """
        usable = archive.usable
        x = archive.x[usable]
        y = archive.y[usable]
        if len(x) < _MIN_TRIALS:
            return np.zeros((0, archive.encoding.d))
        surrogate = QuadraticSurrogate(archive.encoding, x, y)
        points = pareto_front(
            objectives=surrogate.predict,
            encoding=archive.encoding,
            start=x,
            rng=rng,
            generations=self.generations,
        )
        is_new = archive.is_new(points)
        points = points[is_new]
        if not len(points):
            return points
        predicted = surrogate.predict(points)
        pending = surrogate.predict(archive.pending)
        order = improvement_order(predicted, y, pending)
        return points[order]


class QuadraticSurrogate:
    """One quadratic per objective, fitted by ridge regression.

    A choice enters by one linear term per value. Leave-one-out cross-validation decides for each
    objective whether there are only linear and squared terms or also all products of two terms.

    Args:
        encoding: The space.
        x: Points `(n, d)`.
        y: Their values `(n, m)`.
    """

    def __init__(
        self,
        encoding: Encoding,
        x: Array,
        y: Array,
    ) -> None:
        self._numeric = numeric_columns(encoding)
        self._pairs = np.triu_indices(encoding.d, 1)
        separable_features = self._separable_features(x)
        full_features = self._full_features(x)
        self._separable = _fit_ridge(separable_features, y)
        self._full = _fit_ridge(full_features, y)
        self._uses_full = self._full.loo_error < self._separable.loo_error

    def predict(self, x: Array) -> Array:
        """Predict the values of points.

        Args:
            x: Points `(k, d)`.

        Returns:
            `(k, m)`.
        """
        separable_features = self._separable_features(x)
        separable = self._separable.predict(separable_features)
        # The full features are many, so they are not computed for nothing.
        if not self._uses_full.any():
            return separable
        full_features = self._full_features(x)
        full = self._full.predict(full_features)
        return np.where(self._uses_full, full, separable)

    def _linear_features(self, x: Array) -> Array:
        """Numbers in [-1, 1], choices one-hot."""
        scaled = 2 * x - 1
        return np.where(self._numeric, scaled, x)

    def _separable_features(self, x: Array) -> Array:
        """Linear and squared terms."""
        linear = self._linear_features(x)
        # The square of a one-hot column is the column itself.
        numbers = linear[:, self._numeric]
        squared = numbers**2
        return np.concatenate([linear, squared], axis=1)

    def _full_features(self, x: Array) -> Array:
        """Linear and squared terms, and the products of two columns."""
        linear = self._linear_features(x)
        first, second = self._pairs
        first_factor = linear[:, first]
        second_factor = linear[:, second]
        products = first_factor * second_factor
        separable = self._separable_features(x)
        return np.concatenate([separable, products], axis=1)


@dataclass(frozen=True)
class _RidgeFit:
    """A linear model of m values.

    Attributes:
        centre: The mean of the features, `(features,)`.
        intercept: The mean of the values, `(m,)`.
        coefficients: `(features, m)`.
        loo_error: The mean squared leave-one-out error, `(m,)`.
    """

    centre: Array
    intercept: Array
    coefficients: Array
    loo_error: Array

    def predict(self, features: Array) -> Array:
        centred = features - self.centre
        predicted: Array = self.intercept + centred @ self.coefficients
        return predicted


def _fit_ridge(features: Array, y: Array) -> _RidgeFit:
    """Ridge regression through the kernel `(n, n)`, which allows any number of features.

    Each value has the penalty with the least leave-one-out error, which has a closed form (PRESS,
    Allen 1974): residual_i / (1 - leverage_i).
    """
    n = len(y)
    centre = features.mean(0)
    intercept = y.mean(0)
    z = features - centre
    target = y - intercept
    kernel = z @ z.T
    eigenvalues, vectors = np.linalg.eigh(kernel)
    # Rounding may make an eigenvalue of 0 negative.
    eigenvalues = np.maximum(eigenvalues, 0)
    squared_vectors = vectors**2
    rotated_target = vectors.T @ target
    mean_eigenvalue = float(eigenvalues.mean())
    # Where all points are equal, the kernel is 0.
    unit = max(mean_eigenvalue, _MIN_EIGENVALUE)
    errors = []
    solutions = []
    for penalty in _PENALTIES * unit:
        damped = eigenvalues + penalty
        shrinkage = eigenvalues / damped
        # The intercept uses up one degree of freedom, hence 1 / n.
        leverage = squared_vectors @ shrinkage + 1 / n
        freedom = np.maximum(1 - leverage, _MIN_FREEDOM)
        shrunk_target = shrinkage[:, None] * rotated_target
        fitted = vectors @ shrunk_target
        residual = target - fitted
        loo_residual = residual / freedom[:, None]
        squared_residual = loo_residual**2
        loo_error = squared_residual.mean(0)
        errors.append(loo_error)
        damped_target = rotated_target / damped[:, None]
        solution = vectors @ damped_target
        solutions.append(solution)
    best = np.argmin(errors, axis=0)
    # Each value has the dual coefficients of its own best penalty.
    dual_columns = []
    for k, i in enumerate(best):
        solution = solutions[i]
        dual_columns.append(solution[:, k])
    dual = np.stack(dual_columns, axis=1)
    return _RidgeFit(
        centre=centre,
        intercept=intercept,
        coefficients=z.T @ dual,
        loo_error=np.min(errors, axis=0),
    )


def improvement_order(
    predicted: Array,
    y: Array,
    pending: Array,
) -> Indices:
    """Order candidates by the hypervolume that each is predicted to add.

    Args:
        predicted: The candidates' predicted values `(k, m)`.
        y: The values of evaluated points `(n, m)`.
        pending: The predicted values of points that are being evaluated, `(p, m)`.

    Returns:
        The indices of the candidates, the largest gain first. Where gains are equal, such as 0, the
        candidate farthest from the front comes first.
    """
    values = np.concatenate([y, pending])
    is_nondominated = nondominated(values)
    front = values[is_nondominated]
    reference = reference_point(y)
    volume = hypervolume(front, reference)
    gain = np.zeros(len(predicted))
    for i, point in enumerate(predicted):
        extended_front = np.concatenate([front, point[None]])
        gain[i] = hypervolume(extended_front, reference) - volume
    extent = np.ptp(y, axis=0)
    scale = np.where(extent > 0, extent, 1.0)
    differences = predicted[:, None] - front[None]
    differences = differences / scale
    distances = np.linalg.norm(differences, axis=2)
    distance = distances.min(1)
    relative_gain = gain / max(volume, _MIN_VOLUME)
    relative_gain = np.round(relative_gain, _GAIN_DIGITS)
    return np.lexsort((-distance, -relative_gain))
