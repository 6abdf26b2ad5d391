"""Estimate a merge's mean score over all examples of a task from its scores on some of them.

Other merges that were scored on all N examples help: they show how difficult each example is, and
which examples the same merges solve. Every estimator here is a function of

    indices (n,): the examples that the merge was scored on;
    scores (n,): its scores there, 0 or 1 or between;

and returns an `Estimate` of its mean over all N. `reference` `(k, N)` holds the scores of k other
merges on all examples.

The item-response estimators follow tinyBenchmarks (Polo et al. 2024, arXiv 2402.14992), which
MERGE3 (Mencattini et al. 2025, arXiv 2502.10436) brought to evolutionary merging.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from paretomerge.types import Array

Indices = NDArray[np.intp]
"""Which examples, by their place in the data."""

_N_ABILITIES = 3  # dimensions of the item-response model
_NEWTON_STEPS = 30
_PRIOR_PRECISION = 1.0  # of abilities and discriminations
_EASINESS_PRECISION = 0.1  # weaker: an example may be far easier than the average one
_RIDGE = 0.05  # added to the variances of the reference merges' abilities
_GP_IRT_EXAMPLES = 50  # with so many, gp-IRT weighs both of its estimates equally


@dataclass(frozen=True)
class Estimate:
    """An estimated mean over all examples.

    Attributes:
        value: The mean.
        stderr: The standard error of having seen only some of the examples; 0 if all were seen.
    """

    value: float
    stderr: float


Estimator = Callable[[Indices, Array], Estimate]
"""`estimator(indices, scores)`, as the module describes."""


def sample_mean(reference: Array) -> Estimator:
    """The plain mean of the scores. Only the number of examples is taken from `reference`."""
    n_examples = reference.shape[1]
    return difference_estimator(np.zeros(n_examples))


def stratified_mean(reference: Array) -> Estimator:
    """The mean of each stratum's mean, weighted by the strata's sizes.

    A stratum holds the examples that equally many of the reference merges solve. The size of a
    stratum without a score goes to the nearest stratum that has one.

    Args:
        reference: Scores `(k, N)` of other merges.

    Returns:
        The estimator.
    """
    n_solved = reference.sum(0)
    strata = np.rint(n_solved).astype(int)
    sizes = np.bincount(strata)
    total = len(strata)

    def estimate(indices: Indices, scores: Array) -> Estimate:
        scored_strata = strata[indices]
        levels = np.unique(scored_strata)
        all_levels = np.arange(len(sizes))
        differences = all_levels[:, None] - levels
        distances = np.abs(differences)
        closest = distances.argmin(1)
        nearest = levels[closest]
        n_levels = len(levels)
        weights = np.empty(n_levels)
        means = np.empty(n_levels)
        for i, level in enumerate(levels):
            is_represented = nearest == level
            represented = sizes[is_represented]
            weights[i] = represented.sum() / total
            stratum_scores = scores[scored_strata == level]
            means[i] = stratum_scores.mean()
        level_of_score = np.searchsorted(levels, scored_strata)
        residuals = scores - means[level_of_score]
        stderr = _standard_error(residuals, total)
        value = float(weights @ means)
        return Estimate(value, stderr)

    return estimate


def difference_estimator(predicted: Array) -> Estimator:
    """The mean of predicted scores, corrected by their mean error on the scored examples.

    This is the difference estimator of survey sampling (Cochran 1977, sec. 7.3). It is unbiased for
    any prediction. The better the prediction, the more precise it is.

    Args:
        predicted: Predicted scores `(N,)` of all examples.

    Returns:
        The estimator.
    """

    def estimate(indices: Indices, scores: Array) -> Estimate:
        errors = scores - predicted[indices]
        value = float(predicted.mean() + errors.mean())
        stderr = _standard_error(errors, len(predicted))
        return Estimate(value, stderr)

    return estimate


def difficulty_corrected(reference: Array) -> Estimator:
    """The difference estimator that predicts the reference merges' mean score on each example."""
    return difference_estimator(reference.mean(0))


class ItemResponseModel:
    """A two-parameter logistic item-response model (2PL) with several abilities per merge.

    Merge j solves example i with probability `expit(a_i . theta_j + d_i)`: discriminations `a_i`
    and abilities `theta_j` are vectors, `d_i` is the example's easiness. The fit is the maximum of
    the posterior with normal priors, by alternating Newton steps.

    A new merge's abilities have a normal prior with the mean and covariance of the reference
    merges' abilities, so that a few examples locate it among them or beyond. (MERGE3 interpolates
    between the abilities of its source models instead.)

    The methods `p_irt`, `corrected` and `gp_irt` are estimators.

    Args:
        reference: Scores `(k, N)` of k merges, from 0 to 1, on all N examples.
    """

    def __init__(self, reference: Array) -> None:
        k = len(reference)
        self._initialise(reference)
        for _ in range(_NEWTON_STEPS):
            self._fit_step(reference)
        n_abilities = self._abilities.shape[1]
        identity = np.eye(n_abilities)
        covariance = identity
        if k > 1:
            # cov of a single ability is a scalar
            sample_covariance = np.cov(self._abilities.T)
            covariance = np.atleast_2d(sample_covariance)
        # the ridge keeps the inverse finite where all reference merges are equal
        ridged = covariance + _RIDGE * identity
        precision = np.linalg.inv(ridged)
        self._prior_mean: Array = self._abilities.mean(0)
        self._prior_precision: Array = np.asarray(precision, dtype=np.float64)

    def _initialise(self, reference: Array) -> None:
        """Start from the singular vectors of the clipped scores' logits."""
        k = len(reference)
        m = min(_N_ABILITIES, k)
        # scores of 0 and 1 have infinite logits
        clipped = np.clip(reference, 0.02, 0.98)
        odds = clipped / (1 - clipped)
        logits = np.log(odds)
        self._easiness: Array = logits.mean(0)
        centred = logits - self._easiness
        u, s, vt = np.linalg.svd(centred, full_matrices=False)
        # abilities of variance 1, as their prior has it
        scale = math.sqrt(k)
        self._abilities: Array = u[:, :m] * scale
        singular_values = s[:m, None]
        components = singular_values * vt[:m]
        loadings = components.T / scale
        # start from a quarter, since the logits of clipped scores are extreme
        self._discriminations: Array = loadings / 4

    def _fit_step(self, reference: Array) -> None:
        """One Newton step for all examples' parameters, then one for all merges' abilities."""
        k, m = self._abilities.shape
        # an example's easiness is the coefficient of a constant feature
        constant = np.ones(k)
        abilities_and_one: Array = np.column_stack([self._abilities, constant])
        examples: Array = np.column_stack([self._discriminations, self._easiness])
        precisions = [_PRIOR_PRECISION] * m + [_EASINESS_PRECISION]
        example_precision = np.diag(precisions)
        examples = _newton_step(
            examples,
            abilities_and_one,
            reference.T,
            np.zeros_like(examples),
            example_precision,
        )
        self._discriminations = examples[:, :-1]
        self._easiness = examples[:, -1]
        self._abilities = _newton_step(
            self._abilities,
            self._discriminations,
            reference,
            np.zeros_like(self._abilities),
            _PRIOR_PRECISION * np.eye(m),
            self._easiness,
        )

    def predict(self, indices: Indices, scores: Array) -> Array:
        """Probability of solving each of the N examples.

        Args:
            indices: The examples `(n,)` that the merge was scored on.
            scores: Its scores there.

        Returns:
            Probabilities `(N,)`.
        """
        prior_mean = self._prior_mean[None]
        discriminations = self._discriminations[indices]
        easiness = self._easiness[indices]
        abilities = prior_mean
        for _ in range(_NEWTON_STEPS):
            abilities = _newton_step(
                abilities,
                discriminations,
                scores[None],
                prior_mean,
                self._prior_precision,
                easiness,
            )
        products = self._discriminations @ abilities[0]
        logits = products + self._easiness
        return np.asarray(expit(logits))

    def p_irt(self, indices: Indices, scores: Array) -> Estimate:
        """p-IRT (Polo et al. 2024, sec. 3.2): the scores, and predictions for all other examples.

        It varies little, and it has the model's bias.
        """
        predicted = self.predict(indices, scores)
        completed = predicted.copy()
        completed[indices] = scores
        value = float(completed.mean())
        errors = scores - predicted[indices]
        stderr = _standard_error(errors, len(predicted))
        return Estimate(value, stderr)

    def corrected(self, indices: Indices, scores: Array) -> Estimate:
        """The difference estimator of the model's predictions."""
        predicted = self.predict(indices, scores)
        estimate = difference_estimator(predicted)
        return estimate(indices, scores)

    def gp_irt(self, indices: Indices, scores: Array) -> Estimate:
        """gp-IRT (Polo et al. 2024, sec. 3.2): between `p_irt` and `corrected`.

        The fewer examples were scored, the closer it is to p-IRT. The weight of the corrected
        estimate is n / (n + 50).
        """
        model_based = self.p_irt(indices, scores)
        corrected = self.corrected(indices, scores)
        n = len(indices)
        weight = n / (n + _GP_IRT_EXAMPLES)
        other_weight = 1 - weight
        value = weight * corrected.value + other_weight * model_based.value
        return Estimate(value, corrected.stderr)


def _newton_step(
    x: Array,
    features: Array,
    y: Array,
    prior_mean: Array,
    prior_precision: Array,
    offset: Array | float = 0.0,
) -> Array:
    """One damped Newton step of a logistic regression with a normal prior, for each row.

    Args:
        x: Coefficients `(r, p)`.
        features: `(q, p)`, the same for all rows.
        y: Targets `(r, q)` from 0 to 1.
        prior_mean: Broadcast to `(r, p)`.
        prior_precision: `(p, p)`.
        offset: Added to the logits, broadcast to `(r, q)`.

    Returns:
        The coefficients after the step.
    """
    logits = x @ features.T + offset
    probability = expit(logits)
    residual = y - probability
    likelihood_gradient = residual @ features
    deviation = x - prior_mean
    prior_gradient = deviation @ prior_precision
    gradient = likelihood_gradient - prior_gradient
    # the floor keeps the curvature from vanishing where the model is certain
    variance = probability * (1 - probability)
    weights = np.maximum(variance, 0.01)
    likelihood_curvature = np.einsum("rq,qi,qj->rij", weights, features, features)
    curvature = likelihood_curvature + prior_precision
    # solve takes a stack of matrices and a stack of columns
    gradient_columns = gradient[..., None]
    columns = np.linalg.solve(curvature, gradient_columns)
    step = columns[..., 0]
    # no step is longer than 2, since separable data would make Newton's method overshoot
    length = np.linalg.norm(step, axis=1, keepdims=True)
    damping = np.maximum(length / 2, 1)
    damped: Array = x + step / damping
    return damped


def _standard_error(residuals: Array, total: int) -> float:
    """Standard error of a mean over `total` examples, some of them drawn without replacement.

    The 0.25 and the + 1 are an imagined residual of one half: few or equal residuals must not
    make the error 0.
    """
    n = len(residuals)
    deviations = residuals - residuals.mean()
    squared_deviations = deviations**2
    squares = float(squared_deviations.sum())
    variance = (squares + 0.25) / (n + 1)
    finite_population = 1 - n / total  # Cochran 1977, sec. 2.6
    sampling_variance = variance / n * finite_population
    return math.sqrt(sampling_variance)
