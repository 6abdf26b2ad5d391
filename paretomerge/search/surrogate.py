"""Gaussian processes over the unit cube, one per outcome, fitted as one batch (BoTorch does the work)."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from botorch.exceptions.warnings import InputDataWarning, OptimizationWarning
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from gpytorch.constraints import GreaterThan
from gpytorch.kernels import Kernel, MaternKernel, ScaleKernel
from gpytorch.mlls import ExactMarginalLogLikelihood
from gpytorch.priors import GammaPrior, LogNormalPrior
from linear_operator.utils.warnings import NumericalWarning
from numpy.typing import NDArray

Array = NDArray[np.float64]
Hyperparameters = Mapping[str, torch.Tensor]
_FIT_ITERATIONS = 40  # a capped fit costs a third to a sixth, for the same hypervolume
_SHORTEST = 0.025  # length-scale
_LEAST_VARIANCE = 1e-12
_LEAST_NOISE = 1e-6  # of the standardised variance: scores of few items can repeat exactly


@dataclass(frozen=True)
class Shape:
    """What is expected of the outcomes as functions.

    importance: `(d,)`, by which the length-scale that is expected of a coordinate is divided; None where all are alike.
    parabola: whether they are one in each coordinate, and something else besides.
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

    @classmethod
    def fit(
        cls, x: Array, y: Array, stderr: Array | None, shape: "Shape | None" = None, known: Hyperparameters | None = None
    ) -> "Surrogate":
        """x `(n, d)` in the unit cube, y `(n, m)` maximised, stderr `(n, m)` known or None (then inferred).

        known: hyperparameters of an earlier fit to the same outcomes, to be used instead of a new fit.
        """
        centre, scale = y.mean(0), y.std(0, ddof=1)
        scale = np.where(scale > 1e-12, scale, 1.0)
        noise = None if stderr is None else torch.from_numpy(np.clip((stderr / scale) ** 2, _LEAST_NOISE, None))
        kernel = _kernel(x.shape[1], y.shape[1], shape or PLAIN)
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
        return cls(model, centre, scale)

    @property
    def hyperparameters(self) -> Hyperparameters:
        return {name: value.detach().clone() for name, value in self.model.named_parameters()}

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


def _kernel(d: int, m: int, shape: Shape) -> Kernel:
    """A parabola plus what is left of it.

    A score as a function of merge weights is close to a parabola near its top (the premise of MAP, Li et al. 2024b), which
    thirty trials can tell in thirty dimensions; the Matern 5/2 process takes up the rest. The priors of its
    length-scales grow with the square root of d (Hvarfner et al. 2024).
    """
    batch = torch.Size([m] if m > 1 else [])
    scaled = torch.zeros(d, dtype=torch.float64) if shape.importance is None else torch.from_numpy(shape.importance).log()
    prior = LogNormalPrior(loc=2**0.5 + math.log(d) / 2 - scaled, scale=3**0.5)
    shortest = GreaterThan(_SHORTEST, transform=None, initial_value=prior.mode.clamp_min(2 * _SHORTEST))
    rest = MaternKernel(nu=2.5, ard_num_dims=d, batch_shape=batch, lengthscale_prior=prior, lengthscale_constraint=shortest)
    rest = ScaleKernel(rest, batch_shape=batch, outputscale_prior=GammaPrior(1.5, 1.5))
    if not shape.parabola:
        return rest
    return rest + ScaleKernel(Quadratic(batch_shape=batch), batch_shape=batch, outputscale_prior=GammaPrior(1.0, 0.2))
