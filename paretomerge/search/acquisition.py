"""How much a point is expected to add, as a logarithm: its slopes do not vanish where little is to be gained.

All of these are closed forms or quadratures of independent normal outcomes: the same number each time, without samples.
Each acts on `(b, 1, d)` tensors and returns `(b,)`, as BoTorch's acquisition functions do.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from botorch.acquisition.analytic import LogExpectedImprovement
from botorch.acquisition.multi_objective.analytic import ExpectedHypervolumeImprovement
from botorch.utils.multi_objective.box_decompositions.non_dominated import FastNondominatedPartitioning
from numpy.typing import NDArray
from scipy.stats import qmc

from paretomerge.search.surrogate import Surrogate

Array = NDArray[np.float64]
Acquisition = Callable[[torch.Tensor], torch.Tensor]
_EXACT = 4
"""Objectives up to which the hypervolume above the front is cut into boxes: their number grows as n^(m/2)."""
_DIRECTIONS = 128
_NODES = 12
_BORDER = 0.1
"""How far from even odds, in expected successes, a chance counts as settled."""
_TINY = 1e-250


def expected_gain(surrogate: Surrogate, front: Array, reference: Array) -> Acquisition:
    """The logarithm of the expected hypervolume improvement over `front` `(n, m)` above `reference` `(m,)`.

    front: believed values, in the units of y. One objective: expected improvement. Up to four: the closed form (Yang et
    al. 2019). More: `_ByDirections`.
    """
    worst, points = surrogate.standardise(reference), surrogate.standardise(front)
    if len(worst) == 1:
        return LogExpectedImprovement(surrogate.model, best_f=float(points.max(initial=worst[0])))  # type: ignore[no-any-return]
    if len(worst) > _EXACT:
        return _ByDirections(surrogate, points, worst)
    return _ByBoxes(surrogate, points, worst)


class _ByBoxes(ExpectedHypervolumeImprovement):  # type: ignore[misc]
    """Expected hypervolume improvement in closed form."""

    def __init__(self, surrogate: Surrogate, front: Array, worst: Array) -> None:
        at = torch.from_numpy(worst)
        boxes = FastNondominatedPartitioning(at, torch.from_numpy(front))
        super().__init__(surrogate.model, at.tolist(), boxes)

    def forward(self, X: torch.Tensor) -> torch.Tensor:  # noqa: N803
        improvement: torch.Tensor = super().forward(X)
        return improvement.clamp_min(_TINY).log()


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
        self._nodes, self._weights = torch.from_numpy((nodes + 1) / 2), torch.from_numpy(weights / 2)
        # the volume of the unit ball's positive part, by which the mean over directions is the hypervolume
        self._volume = math.pi ** (m / 2) / (2**m * math.gamma(m / 2 + 1))
        self._model, self._worst, self._m = surrogate.model, torch.from_numpy(worst), m

    def __call__(self, X: torch.Tensor) -> torch.Tensor:  # noqa: N803
        posterior = self._model.posterior(X)
        mean, deviation = posterior.mean[:, 0] - self._worst, posterior.variance[:, 0].clamp_min(1e-12).sqrt()
        # beyond mean + 5 deviations in its tightest objective no length is likely
        farthest = ((mean + 5 * deviation)[:, None] / self._directions).amin(2).detach()
        span = (farthest - self._reached).clamp_min(1e-9)
        t = self._reached[:, None] + span[..., None] * self._nodes  # (b, directions, nodes)
        z = (mean[:, None, None] - t[..., None] * self._directions[:, None]) / deviation[:, None, None]
        exceeds = torch.special.log_ndtr(z).sum(-1).exp()
        gain = (self._weights * self._m * t ** (self._m - 1) * exceeds).sum(-1) * span
        expected: torch.Tensor = (self._volume * gain.mean(1)).clamp_min(_TINY).log()
        return expected


class Feasible:
    """`inner` plus the logarithm of the chance that every constraint holds and that the trial does not fail.

    constraints: on outcomes that must be <= 0 (Optuna's sense). success: on outcomes of 1 where a trial succeeded and 0
    where it failed. Only its mean counts: where little is known it is near the share of successes, and a spread would
    draw the search to where it has seen nothing but failures.
    """

    def __init__(self, inner: Acquisition, constraints: Surrogate | None, success: Surrogate | None) -> None:
        self._inner, self._constraints, self._success = inner, constraints, success

    def __call__(self, X: torch.Tensor) -> torch.Tensor:  # noqa: N803
        value = self._inner(X)
        if self._constraints is not None:
            mean, deviation = _posterior(self._constraints, X)
            value = value + torch.special.log_ndtr(-mean / deviation).sum(-1)
        if self._success is not None:
            mean, _ = _posterior(self._success, X)
            value = value + torch.special.log_ndtr((mean[..., 0] - 0.5) / _BORDER)
        return value


def _posterior(surrogate: Surrogate, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation `(b, m)` in the units of y."""
    posterior = surrogate.model.posterior(x)
    scale, centre = torch.from_numpy(surrogate.scale), torch.from_numpy(surrogate.centre)
    return posterior.mean[:, 0] * scale + centre, posterior.variance[:, 0].clamp_min(1e-12).sqrt() * scale


def values(acquisition: Acquisition, x: Array) -> Array:
    """The acquisition of the points `(n, d)`."""
    with torch.no_grad():
        return np.asarray(acquisition(torch.from_numpy(x)[:, None]).numpy())


__all__: list[Any] = ["Acquisition", "Feasible", "expected_gain", "values"]
