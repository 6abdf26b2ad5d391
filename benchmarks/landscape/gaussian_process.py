"""Fitting and solving the processes of `paretomerge.problems.surrogate`.

Sources: Rasmussen & Williams, Gaussian Processes for Machine Learning, 2006, chapters 2 and 5. The
logit of an accuracy has a known noise, that of a binomial count; how much of it is present is
learned, because all merges answer the same examples.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize

from paretomerge.problems.surrogate import Kernel, LogitProcess, affine, matern_52
from paretomerge.types import Array

KernelName = Literal["matern", "rbf"]

_JITTER = 1e-6
# Logarithms of: variance of g, variance of w and b, share of the noise, residual variance.
_START = np.array([1.0, 0.0, 0.0, -5.0])
_BOUNDS = [(-4, 5), (-6, 4), (-5, 3), (-12, 2)]
_N_HYPERPARAMETERS = 4


def squared_exponential(squared_distance: Array, variance: float) -> Array:
    """Squared exponential covariance (equation 4.9) with length scale 1."""
    return variance * np.exp(-squared_distance / 2)


KERNELS: dict[KernelName, Kernel] = {"matern": matern_52, "rbf": squared_exponential}


def logits(n_correct: Array, n_examples: int) -> tuple[Array, Array]:
    """Empirical logits and their variances.

    Half an example is added to both sides (Cox & Snell, Analysis of Binary Data, 1989).
    """
    right = n_correct + 0.5
    wrong = n_examples - n_correct + 0.5
    variance = 1 / right + 1 / wrong
    return np.log(right / wrong), variance


def covariance(process: LogitProcess, a: Array, b: Array) -> Array:
    """Prior covariance `(n, q)` of f at `a` `(n, p)` and `b` `(q, p)`."""
    smooth = process.smooth_covariance(a @ process.projection, b @ process.projection)
    linear = process.slope_variance * affine(a) @ affine(b).T
    return smooth + linear


def solve(process: LogitProcess, x: Array, z: Array, v: Array) -> Array:
    """Coefficients `(n,)` of the posterior mean, given logits `z` of variance `v` at `x`."""
    return np.asarray(cho_solve(noisy_factor(process, x, v), z))


def leave_one_out(
    process: LogitProcess, x: Array, z: Array, v: Array
) -> tuple[Array, Array]:
    """Coefficients `(n,)`, and each point's logit as all others predict it (section 5.4.2)."""
    factor = noisy_factor(process, x, v)
    coefficients = cho_solve(factor, z)
    inverse = cho_solve(factor, np.eye(len(z)), overwrite_b=True, check_finite=False)
    return coefficients, z - coefficients / np.diag(inverse)


def noisy_factor(process: LogitProcess, x: Array, v: Array) -> tuple[Array, bool]:
    """The Cholesky factor of the covariance of the noisy logits."""
    noisy = covariance(process, x, x)
    diagonal = np.diag_indices_from(noisy)
    noise = process.noise_share * v
    noisy[diagonal] += noise + process.residual_variance + _JITTER
    factor: tuple[Array, bool] = cho_factor(
        noisy, lower=True, overwrite_a=True, check_finite=False
    )
    return factor


def fit(
    x: Array,
    z: Array,
    v: Array,
    *,
    kernel: KernelName = "matern",
    full_map: bool = False,
    points: int = 800,
    steps: int = 80,
) -> LogitProcess:
    """Hyperparameters of highest posterior density on at most `points` of the data.

    The points are chosen at random with a fixed seed.

    x: features `(n, p)`. z: logits `(n,)`. v: their variances `(n,)`. full_map: A is a full matrix,
    entries N(0, 1) a priori; else diagonal, log-normal. steps: of L-BFGS-B at most.
    """
    p = x.shape[1]
    chosen = np.random.default_rng(0).permutation(len(x))[:points]
    x, z, v = x[chosen], z[chosen], v[chosen]
    loss = negative_log_posterior(x, z, v, kernel, full_map)
    map_start = np.zeros(p)
    map_bounds = (-4, 3)
    if full_map:
        map_start = (np.eye(p) / 2).ravel()
        map_bounds = (-9, 9)
    result = minimize(
        loss,
        np.concatenate([_START, map_start]),
        jac=True,
        method="L-BFGS-B",
        bounds=_BOUNDS + [map_bounds] * len(map_start),
        options={"maxiter": steps},
    )
    best = torch.tensor(result.x)
    hyperparameters = np.exp(best[:_N_HYPERPARAMETERS].numpy()).tolist()
    projection = projection_matrix(best, p, full_map).numpy()
    variance, slope_variance, noise_share, residual_variance = hyperparameters
    return LogitProcess(
        projection,
        variance,
        slope_variance,
        noise_share,
        residual_variance,
        KERNELS[kernel],
    )


def negative_log_posterior(
    x: Array, z: Array, v: Array, kernel: KernelName, full_map: bool
) -> Callable[[Array], tuple[float, Array]]:
    """Hyperparameters, then A -> negative log marginal likelihood and prior, and its gradient."""
    xs = torch.from_numpy(np.ascontiguousarray(x))
    zs = torch.from_numpy(np.ascontiguousarray(z))
    vs = torch.from_numpy(np.ascontiguousarray(v))
    p = x.shape[1]
    ones = torch.ones(len(xs), 1, dtype=torch.float64)
    design_matrix = torch.cat([ones, 2 * xs - 1], 1)
    linear = design_matrix @ design_matrix.T

    def loss(values: Array) -> tuple[float, Array]:
        free = torch.tensor(values, requires_grad=True)
        variance, slope, noise, residual = torch.exp(free[:_N_HYPERPARAMETERS])
        projected = xs @ projection_matrix(free, p, full_map)
        # Summed twice: gradients are added in this order in the published fit.
        row_norms = (projected * projected).sum(1)[:, None]
        column_norms = (projected * projected).sum(1)
        products = 2 * projected @ projected.T
        # A distance of 0 has no gradient of its square root.
        squared = row_norms + column_norms - products
        squared = squared.clamp_min(1e-12)
        r = torch.sqrt(5 * squared)
        if kernel == "rbf":
            correlation = torch.exp(-squared / 2)
        else:
            polynomial = 1 + r + r * r / 3
            correlation = polynomial * torch.exp(-r)
        diagonal = torch.diag(noise * vs + residual + _JITTER)
        covariances = variance * correlation + slope * linear + diagonal
        factor = torch.linalg.cholesky(covariances)
        coefficients = torch.cholesky_solve(zs[:, None], factor)[:, 0]
        # Equation 5.8, without its constant.
        log_determinant = torch.log(torch.diag(factor)).sum()
        evidence = 0.5 * zs @ coefficients + log_determinant
        # Normal priors of the logarithm of the noise's share, and of A.
        noise_prior = free[2] ** 2
        map_prior = (free[_N_HYPERPARAMETERS:] ** 2).sum()
        total = evidence + 0.5 * noise_prior + 0.5 * map_prior
        total.backward()
        assert free.grad is not None
        return float(total.detach()), free.grad.numpy().copy()

    return loss


def projection_matrix(free: torch.Tensor, p: int, full_map: bool) -> torch.Tensor:
    """The matrix A `(p, p)` of the optimised values."""
    values = free[_N_HYPERPARAMETERS:]
    if full_map:
        return values.reshape(p, p)
    return torch.diag(torch.exp(values))
