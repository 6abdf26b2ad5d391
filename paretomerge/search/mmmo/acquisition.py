"""Log expected improvement: of the hypervolume, and of what a user prefers; and feasibility.

The values are logarithms, so gradients do not vanish where the improvement is small (Ament et al.
2023). They are closed forms or quadratures over independent normal outcomes, without Monte Carlo
samples. An acquisition takes points `batch_shape x 1 x d`, as in BoTorch, with one batch dimension,
and returns `batch_shape`.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from botorch.utils.multi_objective.box_decompositions.non_dominated import (
    FastNondominatedPartitioning,
)
from botorch.utils.safe_math import log1mexp
from scipy.stats import qmc
from torch import Tensor

from paretomerge.pareto.preference import Preference, Scale
from paretomerge.search.mmmo._botorch import log_standard_normal_ei
from paretomerge.search.mmmo.surrogate import Surrogate
from paretomerge.types import Array

Acquisition = Callable[[Tensor], Tensor]

# The number of boxes above the front grows as n^(m/2), so they are used for few objectives only.
_MAX_BOX_OBJECTIVES = 4
_DIRECTIONS = 128
_QUADRATURE_NODES = 12
# Stands for infinity as the upper bound of a box.
_UNBOUNDED = 1e10
# The predicted success rate changes from likely to unlikely within about this distance of 0.5.
_SUCCESS_WIDTH = 0.1


def log_ehvi(surrogate: Surrogate, front: Array, reference: Array) -> Acquisition:
    """Log expected hypervolume improvement, in standardised units.

    It is exact for up to four objectives. For more it is a quadrature over directions. For one
    objective it is log expected improvement.

    Args:
        surrogate: Predicts the m objectives.
        front: `(k, m)`, the nondominated posterior means, in units of y; k may be 0.
        reference: `(m,)`, the reference point, in units of y.
    """
    standardised_front = surrogate.standardise(front)
    standardised_reference = surrogate.standardise(reference)
    if len(reference) > _MAX_BOX_OBJECTIVES:
        return DirectionalLogEHVI(surrogate, standardised_front, standardised_reference)
    return BoxLogEHVI(surrogate, standardised_front, standardised_reference)


class BoxLogEHVI:
    """Log expected hypervolume improvement in closed form.

    The region above the reference point that the front does not dominate is cut into boxes [l, u].
    An outcome y adds prod_k [(y_k - l_k)_+ - (y_k - u_k)_+] of a box, so for independent outcomes
    the expectation is the sum over boxes of prod_k {E[(y_k - l_k)_+] - E[(y_k - u_k)_+]} (Yang et
    al. 2019; for q points at a time, Daulton et al. 2020). The front consists of posterior means,
    for observations are noisy (compare qNEHVI, Daulton et al. 2021, which samples the front).

    Args:
        surrogate: Predicts the m objectives.
        front: `(k, m)`, standardised.
        reference: `(m,)`, standardised.
    """

    def __init__(self, surrogate: Surrogate, front: Array, reference: Array) -> None:
        self._surrogate = surrogate
        if len(reference) == 1:
            # BoTorch's partitioning needs two objectives; with one the only box begins at the best.
            best = float(front.max(initial=reference[0]))
            self._lower = torch.tensor([[best]], dtype=torch.float64)
            self._upper = torch.tensor([[_UNBOUNDED]], dtype=torch.float64)
            return
        reference_tensor = torch.from_numpy(reference)
        front_tensor = torch.from_numpy(front)
        partitioning = FastNondominatedPartitioning(reference_tensor, front_tensor)
        lower, upper = partitioning.get_hypercell_bounds()
        self._lower = lower
        self._upper = upper.clamp_max(_UNBOUNDED)

    def __call__(self, X: Tensor) -> Tensor:  # noqa: N803
        """Log EHVI `b` of points `b x 1 x d`."""
        x = X[:, 0]
        mean, std = self._surrogate.moments(x)
        # `b x 1 x m` against the boxes, `boxes x m`.
        mean = mean.unsqueeze(1)
        std = std.unsqueeze(1)
        # Ament et al. 2023, sec. 4.1: log E[(y - l)_+] = log_h((mean - l) / std) + log std.
        z_lower = (mean - self._lower) / std
        z_upper = (mean - self._upper) / std
        above_lower = log_standard_normal_ei(z_lower)
        above_upper = log_standard_normal_ei(z_upper)
        # log(a - b) = log a + log(1 - exp(log b - log a)); a - b > 0, but may round to 0.
        log_ratio = above_upper - above_lower
        log_ratio = log_ratio.clamp_max(-1e-12)
        log_overlap = above_lower + log1mexp(log_ratio) + std.log()
        log_volume = log_overlap.sum(-1)
        log_improvement: Tensor = log_volume.logsumexp(-1)
        return log_improvement


class DirectionalLogEHVI:
    """Log expected hypervolume improvement by quadrature, for many objectives.

    The hypervolume is the mean, over directions u on the positive part of the unit sphere, of
    c max_y min_k ((y_k - r_k) / u_k)^m (Deng & Zhang 2019, eq. 9). For independent normal outcomes
    the length min_k (y_k - r_k) / u_k exceeds t with probability
    prod_k Phi((mu_k - r_k - t u_k) / sigma_k). The improvement is the integral of this probability
    over t^m from the length of the front on, with Gauss-Legendre nodes. The cost is linear in m and
    independent of n.

    Args:
        surrogate: Predicts the m objectives.
        front: `(k, m)`, standardised.
        reference: `(m,)`, standardised.
    """

    def __init__(self, surrogate: Surrogate, front: Array, reference: Array) -> None:
        m = len(reference)
        self._surrogate = surrogate
        self._reference = torch.from_numpy(reference)
        self._m = m
        self._directions = _positive_directions(m)
        # The length of the front in each direction.
        # The reference point is added, so that an empty front has length 0.
        points = np.vstack([front, reference])
        difference = torch.from_numpy(points - reference)
        above_reference = difference.clamp_min(0.0)
        above_reference = above_reference.unsqueeze(1)
        ratio = above_reference / self._directions
        lengths = ratio.amin(2)
        self._front_length = lengths.amax(0)
        self._nodes, self._weights = _unit_quadrature()
        # c: the volume of the positive part of the unit ball.
        orthants = 2**m
        half_m = m / 2
        scaled_gamma = orthants * math.gamma(half_m + 1)
        self._ball_volume = math.pi**half_m / scaled_gamma

    def __call__(self, X: Tensor) -> Tensor:  # noqa: N803
        """Log EHVI `b` of points `b x 1 x d`."""
        x = X[:, 0]
        mean, std = self._surrogate.moments(x)
        mean = mean - self._reference
        # Integration ends where the tightest objective is 5 standard deviations above its mean.
        optimistic = mean + 5 * std
        optimistic = optimistic.unsqueeze(1)
        lengths = optimistic / self._directions
        # Detached: the end of the integration is a choice, not a part of the function.
        longest = lengths.amin(2).detach()
        span = longest - self._front_length
        span = span.clamp_min(1e-3)
        span = span.unsqueeze(-1)
        # t: `b x directions x nodes`; the thresholds of the objectives at t, `... x nodes x m`.
        first = self._front_length.unsqueeze(-1)
        t = first + span * self._nodes
        directions = self._directions.unsqueeze(1)
        threshold = t.unsqueeze(-1) * directions
        mean = mean[:, None, None]
        std = std[:, None, None]
        excess = mean - threshold
        z = excess / std
        # The outcomes are independent, so the logarithms of their probabilities add up.
        log_probabilities = torch.special.log_ndtr(z)
        log_probability = log_probabilities.sum(-1)
        # The derivative of t^m is m t^(m-1).
        power = self._m - 1
        log_power = power * t.log()
        weights = self._weights * self._m
        log_weight = weights.log()
        log_integrand = log_probability + log_power + log_weight + span.log()
        mean_factor = self._ball_volume / len(self._directions)
        log_mean_factor = math.log(mean_factor)
        log_improvement: Tensor = (
            log_integrand.flatten(1).logsumexp(1) + log_mean_factor
        )
        return log_improvement


def log_preference_ei(
    surrogate: Surrogate, preference: Preference, scale: Scale, best: float
) -> Acquisition:
    """Log expected improvement of a preference's value.

    Args:
        surrogate: Predicts the m objectives.
        preference: What is improved: `sum` or `tchebycheff`.
        scale: The ranges of the objectives, in units of y.
        best: The greatest value so far.
    """
    if preference.kind == "sum":
        return WeightedSumLogEI(surrogate, preference, best)
    return TchebycheffLogEI(surrogate, preference, scale, best)


class WeightedSumLogEI:
    """Log expected improvement of a weighted sum of independent normal outcomes, in closed form.

    Args:
        surrogate: Predicts the m objectives.
        preference: The weights.
        best: The greatest value so far, in units of y.
    """

    def __init__(
        self, surrogate: Surrogate, preference: Preference, best: float
    ) -> None:
        self._surrogate = surrogate
        weights = np.asarray(preference.weights)
        # In standardised units: sum w_k (y_mean_k + y_std_k z_k).
        self._weights = torch.from_numpy(weights * surrogate.y_std)
        self._best = best - float(weights @ surrogate.y_mean)

    def __call__(self, X: Tensor) -> Tensor:  # noqa: N803
        """Log expected improvement `b` of points `b x 1 x d`."""
        mean, std = self._surrogate.moments(X[:, 0])
        total = mean @ self._weights
        deviation = (std * self._weights).norm(dim=-1)
        deviation = deviation.clamp_min(1e-9)
        z = (total - self._best) / deviation
        log_improvement: Tensor = log_standard_normal_ei(z) + deviation.log()
        return log_improvement


class TchebycheffLogEI:
    """Log expected improvement of the Tchebycheff value, by quadrature.

    The value is min_k w_k (y_k - ideal_k) / extent_k. For independent normal outcomes it exceeds t
    with probability prod_k Phi((mu_k - ideal_k - t extent_k / w_k) / sigma_k). The improvement is
    the integral of this probability over t from the best value on. The small weighted sum of the
    augmented value is left out: it only breaks ties.

    Args:
        surrogate: Predicts the m objectives.
        preference: The weights; objectives of weight 0 do not count.
        scale: The ranges of the objectives, in units of y.
        best: The greatest value so far.
    """

    def __init__(
        self, surrogate: Surrogate, preference: Preference, scale: Scale, best: float
    ) -> None:
        self._surrogate = surrogate
        weights = np.asarray(preference.weights)
        self._counts = np.flatnonzero(weights)
        # In standardised units: w_k (y_k - ideal_k) / extent_k = (z_k - offset_k) / unit_k.
        units = scale.extent[self._counts] / weights[self._counts]
        self._unit = torch.from_numpy(units / surrogate.y_std[self._counts])
        ideal = surrogate.standardise(scale.ideal)
        self._offset = torch.from_numpy(ideal[self._counts])
        self._best = best
        self._nodes, node_weights = _unit_quadrature()
        self._log_node_weights = node_weights.log()

    def __call__(self, X: Tensor) -> Tensor:  # noqa: N803
        """Log expected improvement `b` of points `b x 1 x d`."""
        mean, std = self._surrogate.moments(X[:, 0])
        mean = mean[:, self._counts] - self._offset
        std = std[:, self._counts]
        # Integration ends where the tightest objective is 5 standard deviations above its mean.
        optimistic = (mean + 5 * std) / self._unit
        # Detached: the end of the integration is a choice, not a part of the function.
        highest = optimistic.amin(1).detach()
        span = (highest - self._best).clamp_min(1e-6)
        # t: `b x nodes`; the thresholds of the objectives at t: `b x nodes x m`.
        t = self._best + span.unsqueeze(1) * self._nodes
        threshold = t.unsqueeze(2) * self._unit
        z = (mean.unsqueeze(1) - threshold) / std.unsqueeze(1)
        # The outcomes are independent, so the logarithms of their probabilities add up.
        log_probability = torch.special.log_ndtr(z).sum(2)
        log_integrand = log_probability + self._log_node_weights
        log_improvement: Tensor = log_integrand.logsumexp(1) + span.log()
        return log_improvement


def _unit_quadrature() -> tuple[Tensor, Tensor]:
    """Nodes and weights of the Gauss-Legendre quadrature over [0, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(_QUADRATURE_NODES)
    # From [-1, 1] to [0, 1].
    unit_nodes = (nodes + 1) / 2
    return torch.from_numpy(unit_nodes), torch.from_numpy(weights / 2)


def _positive_directions(m: int) -> Tensor:
    """Directions `directions x m`, spread evenly over the positive part of the unit sphere."""
    sequence = qmc.Sobol(m, rng=0)
    sobol = torch.from_numpy(sequence.random(_DIRECTIONS))
    # Normalised normal vectors are uniform on the sphere; the quantiles above 1/2 are positive.
    inside = sobol.clamp(1e-6, 1 - 1e-6)
    upper_half = inside / 2 + 0.5
    half_normal: Tensor = torch.special.ndtri(upper_half)
    length = half_normal.norm(dim=1, keepdim=True)
    unit = half_normal / length
    # Lengths are divided by directions, so no coordinate may be 0.
    directions: Tensor = unit.clamp_min(1e-3)
    return directions


def zero(X: Tensor) -> Tensor:  # noqa: N803
    """The acquisition that is 0, `b`, at all points `b x 1 x d`; it has a gradient."""
    return 0.0 * X.sum((1, 2))


class FeasibilityWeighted:
    """An acquisition plus the log probability that a point is feasible and does not fail.

    Args:
        acquisition: The log acquisition without constraints.
        constraints: Predicts the constraints; feasible where all are at most 0. None: there are
            none.
        success: Predicts 1 where a trial completes and 0 where it fails. None: no trial failed.
    """

    def __init__(
        self,
        acquisition: Acquisition,
        constraints: Surrogate | None,
        success: Surrogate | None,
    ) -> None:
        self._acquisition = acquisition
        self._constraints = constraints
        self._success = success

    def __call__(self, X: Tensor) -> Tensor:  # noqa: N803
        """The weighted acquisition `b` of points `b x 1 x d`."""
        value = self._acquisition(X)
        x = X[:, 0]
        if self._constraints is not None:
            value = value + self._log_feasibility(self._constraints, x)
        if self._success is not None:
            value = value + self._log_success(self._success, x)
        return value

    def _log_feasibility(self, constraints: Surrogate, x: Tensor) -> Tensor:
        """Log probability `n` that all constraints hold at `n x d` (Gardner et al. 2014)."""
        mean, std = constraints.moments(x)
        zeros = np.zeros(mean.shape[-1])
        standardised_zeros = constraints.standardise(zeros)
        bound = torch.from_numpy(standardised_zeros)
        z = (bound - mean) / std
        log_probability: Tensor = torch.special.log_ndtr(z)
        return log_probability.sum(-1)

    def _log_success(self, success: Surrogate, x: Tensor) -> Tensor:
        """Log probability `n` that trials at `n x d` complete, from the posterior mean alone.

        Far from all trials the mean is near the share of completed trials. A term with the
        posterior deviation would draw the search to regions where only failures are known.
        """
        mean, _ = success.moments(x)
        scale = float(success.y_std[0])
        offset = float(success.y_mean[0])
        rate = mean[:, 0] * scale + offset
        margin = (rate - 0.5) / _SUCCESS_WIDTH
        log_probability: Tensor = torch.special.log_ndtr(margin)
        return log_probability


def evaluate(acquisition: Acquisition, x: Array) -> Array:
    """The acquisition `(n,)` of points `(n, d)`, without gradients."""
    points = torch.from_numpy(x)[:, None]
    with torch.no_grad():
        values = acquisition(points)
    return np.asarray(values.numpy())
