"""How much a point is expected to add, as a logarithm: its slopes do not vanish where little is to be gained.

All of these are closed forms or quadratures of independent normal outcomes: the same number each time, without samples.
Each acts on `(b, 1, d)` tensors and returns `(b,)`, as BoTorch's acquisition functions do.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from botorch.acquisition.analytic import _log_ei_helper
from botorch.utils.multi_objective.box_decompositions.non_dominated import (
    FastNondominatedPartitioning,
)
from botorch.utils.safe_math import log1mexp
from numpy.typing import NDArray
from scipy.stats import qmc

from paretomerge.search.mmmo.surrogate import Surrogate

Array = NDArray[np.float64]
Acquisition = Callable[[torch.Tensor], torch.Tensor]
_EXACT = 4
"""Objectives up to which the hypervolume above the front is cut into boxes: their number grows as n^(m/2)."""
_DIRECTIONS = 128
_NODES = 12
_BORDER = 0.1
"""How far from even odds, in expected successes, a chance counts as settled."""
_FAR = 1e10


def expected_gain(surrogate: Surrogate, front: Array, reference: Array) -> Acquisition:
    """The logarithm of the expected hypervolume improvement over `front` `(n, m)` above `reference` `(m,)`.

    front: believed values, in the units of y. Up to four objectives in closed form, above by directions; of one it is the
    expected improvement.
    """
    worst, points = surrogate.standardise(reference), surrogate.standardise(front)
    kind = _ByDirections if len(worst) > _EXACT else _ByBoxes
    return kind(surrogate, points, worst)


class _ByBoxes:
    """Expected hypervolume improvement in closed form.

    The region that the front leaves is cut into boxes. What an outcome y adds to the box [l, u] is prod_k of the overlap
    (min(y_k, u_k) - l_k)_+, so for independent outcomes the expectation is the sum over boxes of the products of E[(y_k -
    l_k)_+] - E[(y_k - u_k)_+] (Yang et al. 2019). Taken in logarithms throughout (Ament et al. 2023), it has a slope
    wherever the next point may be.
    """

    def __init__(self, surrogate: Surrogate, front: Array, worst: Array) -> None:
        self._surrogate = surrogate
        if len(worst) == 1:
            best = float(front.max(initial=worst[0]))
            self._lower, self._upper = (
                torch.tensor([[best]], dtype=torch.float64),
                torch.tensor([[_FAR]], dtype=torch.float64),
            )
        else:
            bounds = FastNondominatedPartitioning(
                torch.from_numpy(worst), torch.from_numpy(front)
            ).get_hypercell_bounds()
            self._lower, self._upper = bounds[0], bounds[1].clamp_max(_FAR)

    def __call__(self, X: torch.Tensor) -> torch.Tensor:  # noqa: N803
        mean, deviation = (
            v[:, None] for v in self._surrogate.moments(X[:, 0])
        )  # (b, 1, m) against (boxes, m)
        beyond, above = (
            _log_ei_helper((mean - side) / deviation) for side in (self._lower, self._upper)
        )
        overlap = beyond + log1mexp((above - beyond).clamp_max(-1e-12)) + deviation.log()
        gain: torch.Tensor = overlap.sum(-1).logsumexp(-1)
        return gain


class _ByDirections:
    """Expected hypervolume improvement for many objectives, by directions from the reference point.

    The hypervolume is the mean, over directions u on the positive sphere, of c max_y min_k ((y_k - r_k) / u_k)^m (Deng and
    Zhang 2019, eq. 9). For independent normal outcomes the length min_k (y_k - r_k) / u_k exceeds t with probability
    prod_k Phi((mu_k - r_k - t u_k) / sigma_k); its expected excess over the front's length is integrated by quadrature. The
    cost grows linearly with the objectives and does not depend on the number of points.
    """

    def __init__(self, surrogate: Surrogate, front: Array, worst: Array) -> None:
        m = len(worst)
        sobol = torch.from_numpy(qmc.Sobol(m, rng=0).random(_DIRECTIONS))
        normal = torch.special.ndtri(sobol.clamp(1e-6, 1 - 1e-6) / 2 + 0.5)
        self._directions = (normal / normal.norm(dim=1, keepdim=True)).clamp_min(1e-3)
        inside = torch.from_numpy(np.vstack([front, worst]) - worst).clamp_min(0.0)
        self._reached = (inside[:, None] / self._directions).amin(2).amax(0)
        nodes, weights = np.polynomial.legendre.leggauss(_NODES)
        self._nodes, self._weights = (
            torch.from_numpy((nodes + 1) / 2),
            torch.from_numpy(weights / 2),
        )
        # the volume of the unit ball's positive part, by which the mean over directions is the hypervolume
        self._volume = math.pi ** (m / 2) / (2**m * math.gamma(m / 2 + 1))
        self._surrogate, self._worst, self._m = surrogate, torch.from_numpy(worst), m

    def __call__(self, X: torch.Tensor) -> torch.Tensor:  # noqa: N803
        mean, deviation = self._surrogate.moments(X[:, 0])
        mean = mean - self._worst
        # beyond mean + 5 deviations in its tightest objective no length is likely
        farthest = ((mean + 5 * deviation)[:, None] / self._directions).amin(2).detach()
        span = (farthest - self._reached).clamp_min(1e-3)
        t = self._reached[:, None] + span[..., None] * self._nodes  # (b, directions, nodes)
        z = (mean[:, None, None] - t[..., None] * self._directions[:, None]) / deviation[
            :, None, None
        ]
        exceeds = torch.special.log_ndtr(z).sum(-1)
        log_gain = (
            exceeds
            + (self._m - 1) * t.log()
            + (self._weights * self._m).log()
            + span[..., None].log()
        )
        expected: torch.Tensor = log_gain.flatten(1).logsumexp(1) + math.log(
            self._volume / len(self._directions)
        )
        return expected


def nothing(X: torch.Tensor) -> torch.Tensor:  # noqa: N803
    """The acquisition that prefers no point."""
    return 0.0 * X.sum((1, 2))


class Feasible:
    """`inner` plus the logarithm of the chance that every constraint holds and that the trial does not fail.

    constraints: on outcomes that must be <= 0 (Optuna's sense). success: on outcomes of 1 where a trial succeeded and 0
    where it failed. Only its mean counts: where little is known it is near the share of successes, and a spread would
    draw the search to where it has seen nothing but failures.
    """

    def __init__(
        self, inner: Acquisition, constraints: Surrogate | None, success: Surrogate | None
    ) -> None:
        self._inner, self._constraints, self._success = inner, constraints, success

    def __call__(self, X: torch.Tensor) -> torch.Tensor:  # noqa: N803
        value = self._inner(X)
        if self._constraints is not None:
            mean, deviation = self._constraints.moments(X[:, 0])
            limit = torch.from_numpy(self._constraints.standardise(np.zeros(mean.shape[-1])))
            value = value + torch.special.log_ndtr((limit - mean) / deviation).sum(-1)
        if self._success is not None:
            chance = self._success.moments(X[:, 0])[0][:, 0] * float(
                self._success.scale[0]
            ) + float(self._success.centre[0])
            value = value + torch.special.log_ndtr((chance - 0.5) / _BORDER)
        return value


def values(acquisition: Acquisition, x: Array) -> Array:
    """The acquisition of the points `(n, d)`."""
    with torch.no_grad():
        return np.asarray(acquisition(torch.from_numpy(x)[:, None]).numpy())
