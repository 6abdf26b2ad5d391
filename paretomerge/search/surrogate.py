"""Gaussian processes over the unit cube, one per objective, fitted as one batch (BoTorch does the work)."""

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from botorch.exceptions.warnings import InputDataWarning, OptimizationWarning
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from gpytorch.mlls import ExactMarginalLogLikelihood
from linear_operator.utils.warnings import NumericalWarning
from numpy.typing import NDArray

Array = NDArray[np.float64]
_FIT_ITERATIONS = 40  # a capped fit costs a third to a sixth, for the same hypervolume
_LEAST_NOISE = 1e-4  # of the standardised variance: scores of few items can repeat exactly


@dataclass(frozen=True)
class Surrogate:
    """m Gaussian processes on standardised outcomes. `centre` and `scale` `(m,)` lead back to the user's units."""

    model: SingleTaskGP
    centre: Array
    scale: Array

    @classmethod
    def fit(cls, x: Array, y: Array, stderr: Array | None) -> "Surrogate":
        """x `(n, d)` in the unit cube, y `(n, m)` maximised, stderr `(n, m)` known or None (then inferred)."""
        centre, scale = y.mean(0), y.std(0, ddof=1)
        scale = np.where(scale > 1e-12, scale, 1.0)
        standard = torch.from_numpy((y - centre) / scale)
        noise = None
        if stderr is not None:
            noise = torch.from_numpy(np.clip((stderr / scale) ** 2, _LEAST_NOISE, None))
        with warnings.catch_warnings():
            # a capped fit says that it stopped early; near-equal points and constant scores are part of the work
            for category in (OptimizationWarning, NumericalWarning, InputDataWarning):
                warnings.simplefilter("ignore", category)
            model = SingleTaskGP(torch.from_numpy(x), standard, train_Yvar=noise, outcome_transform=None)
            fit_gpytorch_mll(
                ExactMarginalLogLikelihood(model.likelihood, model),
                optimizer_kwargs={"options": {"maxiter": _FIT_ITERATIONS}},
            )
        return cls(model, centre, scale)

    def believing(self, x: Array, y: Array, stderr: Array | None, pending: Array) -> "Surrogate":
        """Fitted again with `pending` `(p, d)` as if each had come out as predicted (Ginsbourger et al. 2010)."""
        noise = None if stderr is None else np.concatenate([stderr, np.zeros((len(pending), y.shape[1]))])
        return Surrogate.fit(np.concatenate([x, pending]), np.concatenate([y, self.predict(pending)[0]]), noise)

    def standardise(self, y: Array) -> Array:
        return np.asarray((y - self.centre) / self.scale)

    def predict(self, x: Array) -> tuple[Array, Array]:
        """Posterior mean and standard deviation `(n, m)` in the user's units, without observation noise."""
        with torch.no_grad():
            posterior = self.model.posterior(torch.from_numpy(x))
        mean, deviation = posterior.mean.numpy(), posterior.variance.clamp_min(0).sqrt().numpy()
        return mean * self.scale + self.centre, deviation * self.scale
