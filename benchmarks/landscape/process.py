"""A Gaussian process on the logits of the scores: the surrogate of one task (Rasmussen & Williams 2006, chapters 2 and 5).

f(x) = b + w . x + g(x A), where w and b are normal and g has a Matern 5/2 (or squared exponential) covariance. A is
diagonal: one length scale per coordinate. It may be a full matrix, learned, which lets the process see that sums and
differences of weights matter, a merge being a sum; with few merges that is better, with these not (docs/landscape.md). The
logit of a score has a known noise, that of a binomial count; how much of it there is is learned, because all merges answer
the same items.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize

from .merges import Array, Space

Shape = Literal["matern", "rbf"]
_JITTER = 1e-6
_PRIOR = np.array(
    [1.0, 0.0, 0.0, -5.0]
)  # logs of: variance of g, variance of w and b, share of the noise, roughness


def features(space: Space, method: np.ndarray, numbers: Array) -> Array:
    """What the process sees `(n, p)`: method one-hot, weights scaled to [0, 1], densities likewise in their logarithm.

    A density that does not count is 1: all of the delta is kept.
    """
    low, high = space.bounds
    dense = space.conditional
    values = np.where(np.isnan(numbers), high, numbers)
    scaled = np.where(
        dense, np.log(values / low, where=dense, out=np.zeros_like(values)), values - low
    )
    span = np.where(dense, np.log(high / low, where=dense, out=np.ones_like(high)), high - low)
    return np.concatenate([np.eye(len(space.methods))[method], scaled / span], axis=1)


def logits(right: Array, items: int) -> tuple[Array, Array]:
    """Empirical logit of `right` of `items`, and its variance (Cox & Snell 1989: half an item is added to both sides)."""
    return np.log((right + 0.5) / (items - right + 0.5)), 1 / (right + 0.5) + 1 / (
        items - right + 0.5
    )


def sigmoid(z: Array) -> Array:
    return 1 / (1 + np.exp(-z))


@dataclass(frozen=True)
class Process:
    """Settings of one process. projection: A `(p, k)`. variance: of g; slope: of w and b; noise: share of the binomial
    variance that is there; roughness: variance that no neighbour explains."""

    projection: Array
    variance: float
    slope: float
    noise: float
    roughness: float
    shape: Shape = "matern"

    def covariance(self, a: Array, b: Array) -> Array:
        """Prior covariance `(n, k)` of f at `a` `(n, p)` and `b` `(k, p)`."""
        return (
            self.smooth(a @ self.projection, b @ self.projection)
            + self.slope * _affine(a) @ _affine(b).T
        )

    def smooth(self, a: Array, b: Array) -> Array:
        """Covariance of g between projected points."""
        squared = np.maximum((a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * a @ b.T, 0)
        if self.shape == "rbf":
            return self.variance * np.exp(-squared / 2)
        r = np.sqrt(5 * squared)
        return self.variance * (1 + r + r * r / 3) * np.exp(-r)

    def solve(self, x: Array, z: Array, v: Array, *, left_out: bool = False) -> tuple[Array, Array]:
        """Coefficients `(n,)` of the posterior mean given logits `z` of variance `v` at `x`, and, if `left_out`, what
        each point is predicted to be by all the others (sec. 5.4.2), else nothing."""
        noisy = self.covariance(x, x)
        noisy[np.diag_indices_from(noisy)] += self.noise * v + self.roughness + _JITTER
        factor = cho_factor(noisy, lower=True, overwrite_a=True, check_finite=False)
        coefficients = cho_solve(factor, z)
        if not left_out:
            return coefficients, np.zeros(0)
        precision = np.diag(cho_solve(factor, np.eye(len(z)), overwrite_b=True, check_finite=False))
        return coefficients, z - coefficients / precision


def _affine(x: Array) -> Array:
    return np.concatenate([np.ones((len(x), 1)), 2 * x - 1], axis=1)


def fit(
    x: Array,
    z: Array,
    v: Array,
    *,
    shape: Shape = "matern",
    learn_map: bool = False,
    points: int = 800,
    steps: int = 80,
) -> Process:
    """The settings of highest posterior density on at most `points` of the data, chosen at random with a fixed seed.

    learn_map: a full matrix A, entries N(0, 1) a priori; else a diagonal one, log-normal.
    """
    import torch  # only fitting needs gradients

    kept = np.random.default_rng(0).permutation(len(x))[:points]
    xs, zs, vs = (torch.from_numpy(np.ascontiguousarray(a[kept])) for a in (x, z, v))
    p = x.shape[1]
    affine = torch.cat([torch.ones(len(xs), 1, dtype=torch.float64), 2 * xs - 1], 1)
    outer = affine @ affine.T

    def projection(t: torch.Tensor) -> torch.Tensor:
        return t[4:].reshape(p, p) if learn_map else torch.diag(torch.exp(t[4:]))

    def loss(t: np.ndarray) -> tuple[float, np.ndarray]:
        free = torch.tensor(t, requires_grad=True)
        variance, slope, noise, roughness = torch.exp(free[:4])
        h = xs @ projection(free)
        squared = ((h * h).sum(1)[:, None] + (h * h).sum(1) - 2 * h @ h.T).clamp_min(1e-12)
        r = torch.sqrt(5 * squared)
        smooth = torch.exp(-squared / 2) if shape == "rbf" else (1 + r + r * r / 3) * torch.exp(-r)
        factor = torch.linalg.cholesky(
            variance * smooth + slope * outer + torch.diag(noise * vs + roughness + _JITTER)
        )
        fitted = torch.cholesky_solve(zs[:, None], factor)[:, 0]
        evidence = 0.5 * zs @ fitted + torch.log(torch.diag(factor)).sum()
        total = evidence + 0.5 * free[2] ** 2 + 0.5 * (free[4:] ** 2).sum()
        total.backward()
        return float(total.detach()), free.grad.numpy().copy()  # type: ignore[union-attr]

    start = np.concatenate([_PRIOR, (np.eye(p) / 2).ravel() if learn_map else np.zeros(p)])
    bounds = [(-4, 5), (-6, 4), (-5, 3), (-12, 2)] + [(-9, 9) if learn_map else (-4, 3)] * (
        len(start) - 4
    )
    best = torch.tensor(
        minimize(
            loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": steps}
        ).x
    )
    return Process(projection(best).numpy(), *np.exp(best[:4].numpy()).tolist(), shape)
