"""Gaussian processes over the unit cube, one per outcome, fitted as one batch (BoTorch does the work)."""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
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
_LEAST_SHARE = 0.02  # against that of the best shape; below, it is not worth its time
_LEAST_VARIANCE = 1e-12
_LEAST_NOISE = 1e-6  # of the standardised variance: scores of few items can repeat exactly


@dataclass(frozen=True)
class Shape:
    """What is expected of the outcomes as functions.

    importance: `(d,)`, by which the length-scale that is expected of a coordinate is divided; None where all are alike.
    parabola: whether they are one in each coordinate and something rougher besides (Matern 5/2), or just smooth (RBF).
    repeatable: whether a trial would come out the same again, where its noise is not told.
    """

    importance: Array | None = None
    parabola: bool = True
    repeatable: bool = True


PLAIN = Shape()


@dataclass(frozen=True)
class Processes:
    """Gaussian processes of one shape, for `outcomes` (column numbers of y), as one batch; `share` `(k,)` is what each has of what is
    believed of its outcome. told: whether the noise of these outcomes was, and is not inferred.
    """

    model: SingleTaskGP
    shape: Shape
    outcomes: tuple[int, ...]
    share: Array
    told: bool

    @cached_property
    def foreseeing(self) -> SingleTaskGP:
        """The process that says what is still to be learnt at a point.

        Where a trial would come out otherwise again, `model` itself, for going back can tell. Else the noise
        that was inferred is roughness, and a point next to a trial would seem to add what is not known of that trial. So it is a
        process through what `model` believes of the trials: the same means, no doubt where a trial was (reinterpolation,
        Forrester et al. 2006).
        """
        if self.told or not self.shape.repeatable:
            return self.model
        inputs = self.model.train_inputs[0]
        x = inputs[0] if inputs.dim() == 3 else inputs  # one copy per outcome
        with _quietly(), torch.no_grad():
            believed = self.model.eval().posterior(x).mean
            modules = {
                "covar_module": self.model.covar_module,
                "mean_module": self.model.mean_module,
            }
            return SingleTaskGP(
                x,
                believed,
                torch.full_like(believed, _LEAST_NOISE),
                outcome_transform=None,
                **modules,
            ).eval()

    @property
    def hyperparameters(self) -> Hyperparameters:
        return {name: value.detach() for name, value in self.model.named_parameters()}

    def hyperparameters_of(self, outcomes: Sequence[int]) -> Hyperparameters:
        """Of some of them; a batch of one has no dimension for it."""
        places = [self.outcomes.index(k) for k in outcomes]
        if len(self.outcomes) == 1:
            return self.hyperparameters
        return {
            name: value[places if len(places) > 1 else places[0]]
            for name, value in self.hyperparameters.items()
        }

    def foresight(self) -> Array:
        """Log density that the other trials give to each trial, added up, per outcome: leave-one-out in closed form
        (Rasmussen & Williams 2006, eq. 5.10 to 5.12).
        """
        with torch.no_grad():
            x, y = self.model.train_inputs[0], self.model.train_targets
            noise = self.model.likelihood.noise.expand(y.shape)
            precision = torch.linalg.inv(
                self.model.covar_module(x).to_dense() + torch.diag_embed(noise)
            )
            variance = 1 / precision.diagonal(dim1=-2, dim2=-1)
            error = variance * (precision @ (y - self.model.mean_module(x))[..., None])[..., 0]
            density = -(error**2 / variance + (2 * math.pi * variance).log()) / 2
            return np.atleast_1d(density.sum(-1).numpy())


@dataclass(frozen=True)
class Surrogate:
    """Gaussian processes on m standardised outcomes, of one shape or of several whose beliefs are mixed. `centre` and `scale`
    `(m,)` lead back to the units of y.
    """

    processes: tuple[Processes, ...]
    centre: Array
    scale: Array

    @classmethod
    def fit(cls, x: Array, y: Array, stderr: Array | None, shape: Shape = PLAIN) -> "Surrogate":
        """x `(n, d)` in the unit cube, y `(n, m)` maximised, stderr `(n, m)`; inferred where it is None or a column of it is NaN."""
        told = np.zeros(y.shape[1], dtype=bool) if stderr is None else ~np.isnan(stderr).any(0)
        groups = [
            tuple(int(k) for k in np.flatnonzero(same)) for same in (told, ~told) if same.any()
        ]
        return cls._of(x, y, stderr, [_Kind(shape, group, np.ones(len(group))) for group in groups])

    def again(self, x: Array, y: Array, stderr: Array | None) -> "Surrogate":
        """With other trials, the same shapes, shares and hyperparameters."""
        return self._of(
            x,
            y,
            stderr,
            [_Kind(p.shape, p.outcomes, p.share, p.hyperparameters) for p in self.processes],
        )

    @classmethod
    def average(
        cls, x: Array, y: Array, stderr: Array | None, shapes: Sequence[Shape]
    ) -> "Surrogate":
        """Each outcome by all shapes, in proportion to the density with which each foresees its trials (pseudo-BMA, Yao et al.
        2018, sec. 3.3): with few trials that density cannot tell which one is right.
        """
        fits = [cls.fit(x, y, stderr, shape) for shape in shapes]
        density = np.zeros((len(shapes), y.shape[1]))
        for row, fit in zip(density, fits, strict=True):
            for p in fit.processes:
                row[list(p.outcomes)] = p.foresight()
        share = np.exp(density - density.max(0))
        share[share < _LEAST_SHARE] = 0.0
        share /= share.sum(0)
        kinds = []
        for p, of_each in (
            (p, of_each) for fit, of_each in zip(fits, share, strict=True) for p in fit.processes
        ):
            if mine := tuple(k for k in p.outcomes if of_each[k]):
                kinds.append(_Kind(p.shape, mine, of_each[list(mine)], p.hyperparameters_of(mine)))
        return cls._of(x, y, stderr, kinds)

    @classmethod
    def _of(cls, x: Array, y: Array, stderr: Array | None, kinds: Sequence["_Kind"]) -> "Surrogate":
        centre, scale = y.mean(0), y.std(0, ddof=1)
        scale = np.where(scale > 1e-12, scale, 1.0)
        noise = None if stderr is None else np.clip((stderr / scale) ** 2, _LEAST_NOISE, None)
        return cls(
            tuple(kind.processes(x, (y - centre) / scale, noise) for kind in kinds), centre, scale
        )

    def standardise(self, y: Array) -> Array:
        return np.asarray((y - self.centre) / self.scale)

    def moments(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Posterior mean and standard deviation `(n, m)` at `x` `(n, d)`, standardised, without observation noise."""
        mean = second = torch.zeros((), dtype=x.dtype)
        for p in self.processes:
            posterior = p.foreseeing.posterior(x)
            place = torch.zeros(len(p.outcomes), len(self.centre), dtype=x.dtype)
            place[range(len(p.outcomes)), list(p.outcomes)] = torch.from_numpy(p.share)
            mean = mean + posterior.mean @ place
            second = second + (posterior.variance + posterior.mean**2) @ place
        return mean, (second - mean**2).clamp_min(_LEAST_VARIANCE).sqrt()

    def predict(self, x: Array) -> tuple[Array, Array]:
        """Posterior mean and standard deviation `(n, m)` in the units of y."""
        with torch.no_grad():
            mean, deviation = self.moments(torch.from_numpy(x))
        return mean.numpy() * self.scale + self.centre, deviation.numpy() * self.scale


@dataclass(frozen=True)
class _Kind:
    """Which processes to make. known: hyperparameters of an earlier fit to the same outcomes; None for a new fit."""

    shape: Shape
    outcomes: tuple[int, ...]
    share: Array
    known: Hyperparameters | None = None

    def processes(self, x: Array, y: Array, noise: Array | None) -> Processes:
        """y, noise `(n, m)`: standardised, of which `outcomes` are taken."""
        kernel = _kernel(x.shape[1], len(self.outcomes), self.shape)
        own = torch.from_numpy(y[:, self.outcomes])
        told = (
            None
            if noise is None or np.isnan(noise[:, self.outcomes]).any()
            else torch.from_numpy(noise[:, self.outcomes])
        )
        with _quietly():
            model = SingleTaskGP(
                torch.from_numpy(x),
                own,
                train_Yvar=told,
                covar_module=kernel,
                outcome_transform=None,
            )
            if self.known is None:
                likelihood = ExactMarginalLogLikelihood(model.likelihood, model)
                fit_gpytorch_mll(
                    likelihood, optimizer_kwargs={"options": {"maxiter": _FIT_ITERATIONS}}
                )
        if self.known is not None:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(self.known[name])
            model.eval()
        return Processes(model, self.shape, self.outcomes, self.share, told is not None)


@contextmanager
def _quietly() -> Iterator[None]:
    """A capped fit says that it stopped early; near-equal points and constant scores are part of the work."""
    with warnings.catch_warnings():
        for category in (OptimizationWarning, NumericalWarning, InputDataWarning):
            warnings.simplefilter("ignore", category)
        yield


class Quadratic(Kernel):  # type: ignore[misc]
    """The covariance of sum_j a_j z_j + b_j z_j^2, z = 2 x - 1, with normal a and b: a parabola in each coordinate."""

    has_lengthscale = False

    def forward(
        self, x1: torch.Tensor, x2: torch.Tensor, diag: bool = False, **params: Any
    ) -> torch.Tensor:
        first, second = self._features(x1), self._features(x2)
        covariance: torch.Tensor = (
            (first * second).sum(-1) if diag else first @ second.transpose(-1, -2)
        )
        return covariance

    def _features(self, x: torch.Tensor) -> torch.Tensor:
        z = 2 * x - 1
        features: torch.Tensor = torch.cat([z, z**2], -1) / x.shape[-1] ** 0.5
        return features


def _kernel(d: int, m: int, shape: Shape) -> Kernel:
    """A parabola plus what is left of it, or a smooth process.

    A score as a function of merge weights is close to a parabola near its top (the premise of MAP, Li et al. 2024b), which
    thirty trials can tell in thirty dimensions; the Matern 5/2 process takes up the rest. The smooth one is BoTorch's
    default. The priors of the length-scales grow with the square root of d (Hvarfner et al. 2024).
    """
    batch = torch.Size([m] if m > 1 else [])
    scaled = (
        torch.zeros(d, dtype=torch.float64)
        if shape.importance is None
        else torch.from_numpy(shape.importance).log()
    )
    prior = LogNormalPrior(loc=2**0.5 + math.log(d) / 2 - scaled, scale=3**0.5)
    shortest = GreaterThan(
        _SHORTEST, transform=None, initial_value=prior.mode.clamp_min(2 * _SHORTEST)
    )
    common = {
        "ard_num_dims": d,
        "batch_shape": batch,
        "lengthscale_prior": prior,
        "lengthscale_constraint": shortest,
    }
    if not shape.parabola:
        return RBFKernel(**common)
    rest = ScaleKernel(
        MaternKernel(nu=2.5, **common), batch_shape=batch, outputscale_prior=GammaPrior(1.5, 1.5)
    )
    return rest + ScaleKernel(
        Quadratic(batch_shape=batch), batch_shape=batch, outputscale_prior=GammaPrior(1.0, 0.2)
    )
