"""Gaussian processes over the unit cube, one per outcome, fitted as one batch (BoTorch does the work)."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from botorch.exceptions.warnings import InputDataWarning, OptimizationWarning
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from gpytorch.constraints import GreaterThan
from gpytorch.kernels import Kernel, MaternKernel, RBFKernel, ScaleKernel
from gpytorch.mlls import ExactMarginalLogLikelihood
from gpytorch.priors import GammaPrior, LogNormalPrior
from linear_operator.utils.warnings import NumericalWarning
from numpy.typing import NDArray

Array = NDArray[np.float64]
Hyperparameters = Mapping[str, torch.Tensor]
_FIT_ITERATIONS = 40  # a capped fit costs a third to a sixth, for the same hypervolume
_SHORTEST = 0.025  # length-scale
_DOUBT = 5.0  # nats: with few trials leave-one-out likes what is smooth, and smooth processes lead on less well
_LEAST_VARIANCE = 1e-12
_LEAST_NOISE = 1e-6  # of the standardised variance: scores of few items can repeat exactly


@dataclass(frozen=True)
class Shape:
    """What is expected of the outcomes as functions.

    importance: `(d,)`, by which the length-scale that is expected of a coordinate is divided; None where all are alike.
    parabola: whether they are one in each coordinate and something rougher besides (Matern 5/2), or just smooth (RBF).
    """

    importance: Array | None = None
    parabola: bool = True


PLAIN = Shape()


@dataclass(frozen=True)
class Surrogate:
    """m Gaussian processes on standardised outcomes. `centre` and `scale` `(m,)` lead back to the units of y."""

    model: SingleTaskGP
    centre: Array
    scale: Array
    shape: Shape

    @classmethod
    def fit(cls, x: Array, y: Array, stderr: Array | None, shape: Shape = PLAIN, known: Hyperparameters | None = None) -> "Surrogate":
        """x `(n, d)` in the unit cube, y `(n, m)` maximised, stderr `(n, m)` known or None (then inferred).

        known: hyperparameters of an earlier fit to the same outcomes, to be used instead of a new fit.
        """
        centre, scale = y.mean(0), y.std(0, ddof=1)
        scale = np.where(scale > 1e-12, scale, 1.0)
        noise = None if stderr is None else torch.from_numpy(np.clip((stderr / scale) ** 2, _LEAST_NOISE, None))
        kernel = _kernel(x.shape[1], y.shape[1], shape)
        with warnings.catch_warnings():
            # a capped fit says that it stopped early; near-equal points and constant scores are part of the work
            for category in (OptimizationWarning, NumericalWarning, InputDataWarning):
                warnings.simplefilter("ignore", category)
            standard = torch.from_numpy((y - centre) / scale)
            model = SingleTaskGP(torch.from_numpy(x), standard, train_Yvar=noise, covar_module=kernel, outcome_transform=None)
            if known is None:
                likelihood = ExactMarginalLogLikelihood(model.likelihood, model)
                fit_gpytorch_mll(likelihood, optimizer_kwargs={"options": {"maxiter": _FIT_ITERATIONS}})
        if known is not None:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(known[name])
            model.eval()
        return cls(model, centre, scale, shape)

    @property
    def hyperparameters(self) -> Hyperparameters:
        return {name: value.detach().clone() for name, value in self.model.named_parameters()}

    def foresight(self) -> float:
        """Log density that the other trials give to each trial, added up, the mean over the outcomes: leave-one-out in closed
        form (Rasmussen & Williams 2006, eq. 5.10 to 5.12).
        """
        with torch.no_grad():
            x, y = self.model.train_inputs[0], self.model.train_targets
            noise = self.model.likelihood.noise.expand(y.shape)
            precision = torch.linalg.inv(self.model.covar_module(x).to_dense() + torch.diag_embed(noise))
            variance = 1 / precision.diagonal(dim1=-2, dim2=-1)
            error = variance * (precision @ (y - self.model.mean_module(x))[..., None])[..., 0]
            density = -(error**2 / variance + (2 * math.pi * variance).log()) / 2
            return float(density.sum(-1).mean())

    def standardise(self, y: Array) -> Array:
        return np.asarray((y - self.centre) / self.scale)

    def moments(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Posterior mean and standard deviation `(n, m)` at `x` `(n, d)`, standardised, without observation noise."""
        posterior = self.model.posterior(x)
        return posterior.mean, posterior.variance.clamp_min(_LEAST_VARIANCE).sqrt()

    def predict(self, x: Array) -> tuple[Array, Array]:
        """Posterior mean and standard deviation `(n, m)` in the units of y."""
        with torch.no_grad():
            mean, deviation = self.moments(torch.from_numpy(x))
        return mean.numpy() * self.scale + self.centre, deviation.numpy() * self.scale


class Quadratic(Kernel):  # type: ignore[misc]
    """The covariance of sum_j a_j z_j + b_j z_j^2, z = 2 x - 1, with normal a and b: a parabola in each coordinate."""

    has_lengthscale = False

    def forward(self, x1: torch.Tensor, x2: torch.Tensor, diag: bool = False, **params: Any) -> torch.Tensor:
        first, second = self._features(x1), self._features(x2)
        covariance: torch.Tensor = (first * second).sum(-1) if diag else first @ second.transpose(-1, -2)
        return covariance

    def _features(self, x: torch.Tensor) -> torch.Tensor:
        z = 2 * x - 1
        features: torch.Tensor = torch.cat([z, z**2], -1) / x.shape[-1] ** 0.5
        return features


def best_fit(x: Array, y: Array, stderr: Array | None, shapes: Sequence[Shape]) -> Surrogate:
    """A fit of the first shape, or of another that foresees the trials better beyond doubt; arguments as of `fit`."""
    first, *others = (Surrogate.fit(x, y, stderr, shape) for shape in shapes)
    best = max(others, key=Surrogate.foresight, default=first)
    return best if others and best.foresight() > first.foresight() + _DOUBT else first


def _kernel(d: int, m: int, shape: Shape) -> Kernel:
    """A parabola plus what is left of it, or a smooth process.

    A score as a function of merge weights is close to a parabola near its top (the premise of MAP, Li et al. 2024b), which
    thirty trials can tell in thirty dimensions; the Matern 5/2 process takes up the rest. The smooth one is BoTorch's
    default. The priors of the length-scales grow with the square root of d (Hvarfner et al. 2024).
    """
    batch = torch.Size([m] if m > 1 else [])
    scaled = torch.zeros(d, dtype=torch.float64) if shape.importance is None else torch.from_numpy(shape.importance).log()
    prior = LogNormalPrior(loc=2**0.5 + math.log(d) / 2 - scaled, scale=3**0.5)
    shortest = GreaterThan(_SHORTEST, transform=None, initial_value=prior.mode.clamp_min(2 * _SHORTEST))
    common = {"ard_num_dims": d, "batch_shape": batch, "lengthscale_prior": prior, "lengthscale_constraint": shortest}
    if not shape.parabola:
        return RBFKernel(**common)
    rest = ScaleKernel(MaternKernel(nu=2.5, **common), batch_shape=batch, outputscale_prior=GammaPrior(1.5, 1.5))
    return rest + ScaleKernel(Quadratic(batch_shape=batch), batch_shape=batch, outputscale_prior=GammaPrior(1.0, 0.2))
