"""Gaussian processes over the unit cube, one or two per outcome.

BoTorch fits them. A `Surrogate` standardises the outcomes, fits one `GPBatch` per kernel and kind
of noise, and mixes the posteriors. Standard errors that trials report enter in `_BatchPlan.build`,
as the observation noise of the `SingleTaskGP`.

Shapes: n trials, d coordinates, m outcomes.
"""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

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
from torch import Tensor

from paretomerge.search.encoding import Mask
from paretomerge.types import Array

Hyperparameters = Mapping[str, Tensor]

# A capped fit takes a third to a sixth of the time and reaches the same hypervolume.
_FIT_ITERATIONS = 40
_MIN_LENGTHSCALE = 0.025
# Relative to the best kernel of an outcome; a kernel of less weight does not repay its time.
_MIN_WEIGHT = 0.02
_MIN_VARIANCE = 1e-12
# In units of the standardised variance: scores of few examples can repeat exactly.
_MIN_NOISE = 1e-6
# Outcomes with a smaller standard deviation count as constant.
_MIN_STD = 1e-12


@dataclass(frozen=True)
class KernelSpec:
    """The prior of a Gaussian process.

    Attributes:
        importance: `(d,)`, relative importance of the coordinates: the prior length-scale of a
            coordinate is divided by it. None: all coordinates are alike.
        quadratic_trend: Whether the process is a quadratic trend in each coordinate plus a Matern
            5/2 process, or one smooth (RBF) process.
        deterministic: Whether a trial without a standard error would give the same values again.
    """

    importance: Array | None = None
    quadratic_trend: bool = True
    deterministic: bool = True


DEFAULT_KERNEL = KernelSpec()


@dataclass(frozen=True)
class GPBatch:
    """Independent Gaussian processes with one kind of kernel, fitted as one BoTorch batch.

    Attributes:
        model: The fitted model, of k outcomes.
        kernel: The prior.
        outcomes: Column numbers of y, k of them.
        weight: `(k,)`, the share of this batch in the mixture for each of its outcomes.
        known_noise: Whether the observation noise is known, not inferred.
    """

    model: SingleTaskGP
    kernel: KernelSpec
    outcomes: tuple[int, ...]
    weight: Array
    known_noise: bool

    @cached_property
    def predictive_model(self) -> SingleTaskGP:
        """The model whose posterior variance is what another trial at a point can reduce.

        This is `model` if a repeated trial can give other values. Otherwise the inferred noise is
        roughness of the objective, and `model` would expect an improvement next to each trial. Then
        it is a second process with the same kernel through the posterior means of `model` at the
        trials: it has the same mean, and no variance at a trial ("re-interpolation", Forrester et
        al. 2006).
        """
        if self.known_noise or not self.kernel.deterministic:
            return self.model
        inputs = self.model.train_inputs[0]
        # BoTorch repeats the inputs per outcome: `k x n x d`.
        x = inputs
        if inputs.dim() == 3:
            x = inputs[0]
        with _ignored_fit_warnings(), torch.no_grad():
            means = self.model.eval().posterior(x).mean
            model = SingleTaskGP(
                x,
                means,
                torch.full_like(means, _MIN_NOISE),
                covar_module=self.model.covar_module,
                mean_module=self.model.mean_module,
                outcome_transform=None,
            )
            return model.eval()

    @property
    def hyperparameters(self) -> Hyperparameters:
        """Parameter name of the model -> its value."""
        parameters = self.model.named_parameters()
        return {name: value.detach() for name, value in parameters}

    def hyperparameters_of(self, outcomes: Sequence[int]) -> Hyperparameters:
        """The hyperparameters of a model with some of the outcomes only."""
        hyperparameters = self.hyperparameters
        if len(self.outcomes) == 1:
            return hyperparameters
        positions = [self.outcomes.index(k) for k in outcomes]
        # A model of one outcome has no batch dimension.
        index = positions if len(positions) > 1 else positions[0]
        return {name: value[index] for name, value in hyperparameters.items()}

    def loo_log_density(self) -> Array:
        """Leave-one-out log predictive density, summed over trials.

        Source: Rasmussen & Williams 2006, sec. 5.4.2, eq. 5.10 to 5.12.

        Returns:
            `(k,)`, one number per outcome of the batch.
        """
        with torch.no_grad():
            model = self.model
            x = model.train_inputs[0]
            y = model.train_targets
            noise = model.likelihood.noise.expand(y.shape)
            prior_covariance = model.covar_module(x).to_dense()
            noise_covariance = torch.diag_embed(noise)
            covariance = prior_covariance + noise_covariance
            precision = torch.linalg.inv(covariance)
            residual = y - model.mean_module(x)
            # Eq. 5.12: variance_i = 1 / [K^-1]_ii and error_i = [K^-1 y]_i / [K^-1]_ii.
            diagonal = precision.diagonal(dim1=-2, dim2=-1)
            variance = 1 / diagonal
            column = residual[..., None]
            solved = (precision @ column)[..., 0]
            error = variance * solved
            scaled_variance = 2 * math.pi * variance
            log_normaliser = scaled_variance.log()
            squared_error = error**2 / variance
            density = -(squared_error + log_normaliser) / 2
            total = density.sum(-1).numpy()
            # A batch of one outcome has a scalar here.
            return np.atleast_1d(total)


@dataclass(frozen=True)
class Surrogate:
    """Gaussian processes on m standardised outcomes, mixed per outcome over kernels.

    Attributes:
        batches: The processes.
        y_mean: `(m,)`, mean of the outcomes.
        y_std: `(m,)`, their standard deviation; 1 for an outcome that does not vary.
    """

    batches: tuple[GPBatch, ...]
    y_mean: Array
    y_std: Array

    @classmethod
    def fit(
        cls,
        x: Array,
        y: Array,
        stderr: Array | None,
        kernel: KernelSpec = DEFAULT_KERNEL,
    ) -> "Surrogate":
        """Fit processes with one kernel.

        Args:
            x: `(n, d)`, points of the unit cube.
            y: `(n, m)`, outcomes.
            stderr: `(n, m)`, their standard errors. The noise of an outcome is inferred where it is
                None or its column has a NaN.
            kernel: The prior.
        """
        m = y.shape[1]
        has_stderr: Mask = np.zeros(m, dtype=bool)
        if stderr is not None:
            is_missing = np.isnan(stderr)
            has_stderr = np.asarray(~is_missing.any(0))
        plans = []
        # Outcomes with known and with inferred noise need separate BoTorch models.
        for mask in (has_stderr, ~has_stderr):
            outcomes = tuple(np.flatnonzero(mask).tolist())
            if outcomes:
                weight = np.ones(len(outcomes))
                plan = _BatchPlan(kernel, outcomes, weight)
                plans.append(plan)
        return cls._build(x, y, stderr, plans)

    @classmethod
    def fit_mixture(
        cls,
        x: Array,
        y: Array,
        stderr: Array | None,
        kernels: Sequence[KernelSpec],
    ) -> "Surrogate":
        """Fit processes with several kernels and weight them per outcome.

        The weights are proportional to the leave-one-out predictive density (pseudo-BMA, Yao et al.
        2018, sec. 3.3). With few trials the density cannot decide which kernel is right, so each
        keeps a weight.

        Args:
            x: `(n, d)`, points of the unit cube.
            y: `(n, m)`, outcomes.
            stderr: `(n, m)`, their standard errors, as for `fit`.
            kernels: The priors.
        """
        fits = [cls.fit(x, y, stderr, kernel) for kernel in kernels]
        shape = (len(kernels), y.shape[1])
        log_density = np.zeros(shape)
        for row, fit in zip(log_density, fits, strict=True):
            for batch in fit.batches:
                columns = list(batch.outcomes)
                row[columns] = batch.loo_log_density()
        # Relative to the best kernel, since the densities themselves overflow.
        log_ratio = log_density - log_density.max(0)
        weights = np.exp(log_ratio)
        weights[weights < _MIN_WEIGHT] = 0.0
        weights /= weights.sum(0)
        plans = []
        for fit, weight in zip(fits, weights, strict=True):
            for batch in fit.batches:
                outcomes = tuple(k for k in batch.outcomes if weight[k] > 0)
                if outcomes:
                    plan = _BatchPlan(
                        batch.kernel,
                        outcomes,
                        weight[list(outcomes)],
                        batch.hyperparameters_of(outcomes),
                    )
                    plans.append(plan)
        return cls._build(x, y, stderr, plans)

    def with_trials(self, x: Array, y: Array, stderr: Array | None) -> "Surrogate":
        """The surrogate of other trials, with the same kernels, weights and hyperparameters."""
        plans = []
        for batch in self.batches:
            plan = _BatchPlan(
                batch.kernel, batch.outcomes, batch.weight, batch.hyperparameters
            )
            plans.append(plan)
        return self._build(x, y, stderr, plans)

    @classmethod
    def _build(
        cls,
        x: Array,
        y: Array,
        stderr: Array | None,
        plans: Sequence["_BatchPlan"],
    ) -> "Surrogate":
        # Standardised here, not by BoTorch's outcome transform: the acquisition needs the front and
        # the reference point in the same units.
        y_mean = y.mean(0)
        y_std = y.std(0, ddof=1)
        y_std = np.where(y_std > _MIN_STD, y_std, 1.0)
        standardised = (y - y_mean) / y_std
        noise = None
        if stderr is not None:
            variance = (stderr / y_std) ** 2
            noise = np.clip(variance, _MIN_NOISE, None)
        batches = [plan.build(x, standardised, noise) for plan in plans]
        return cls(tuple(batches), y_mean, y_std)

    def standardise(self, y: Array) -> Array:
        """Outcomes `(..., m)` in units of the standard deviation, from the mean."""
        standardised: Array = (y - self.y_mean) / self.y_std
        return standardised

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Standardised posterior at points, without observation noise; differentiable.

        Args:
            x: `n x d`.

        Returns:
            Mean and standard deviation of the mixture, each `n x m`.
        """
        mean = torch.zeros((), dtype=x.dtype)
        second_moment = mean
        m = len(self.y_mean)
        for batch in self.batches:
            posterior = batch.predictive_model.posterior(x)
            k = len(batch.outcomes)
            # `k x m`: takes the outcomes of the batch to their columns, times their weights.
            weights = torch.zeros(k, m, dtype=x.dtype)
            columns = list(batch.outcomes)
            rows = range(k)
            weights[rows, columns] = torch.from_numpy(batch.weight)
            # A mixture's variance is E[y^2] - E[y]^2 over its components.
            component_mean = posterior.mean
            squared = posterior.variance + component_mean**2
            mean = mean + component_mean @ weights
            second_moment = second_moment + squared @ weights
        variance = second_moment - mean**2
        # The difference may round to 0 or below at a trial, where the root has no gradient.
        variance = variance.clamp_min(_MIN_VARIANCE)
        return mean, variance.sqrt()

    def prior(self, x: Array) -> tuple[Array, Array]:
        """The prior of the outcomes at points, with the fitted hyperparameters, in units of y.

        The mixture of several kernels is replaced by the normal distribution with its moments.

        Args:
            x: `(n, d)`.

        Returns:
            Mean `(n, m)` and covariance `(m, n, n)`.
        """
        n, m = len(x), len(self.y_mean)
        mean = np.zeros((m, n))
        second_moment = np.zeros((m, n, n))
        points = torch.from_numpy(x)
        for batch in self.batches:
            k = len(batch.outcomes)
            # A model of several outcomes is a batch over them.
            inputs = points.expand(k, *points.shape) if k > 1 else points
            constants = batch.model.mean_module(inputs).detach()
            means = constants.reshape(k, n).numpy()
            kernel = batch.model.covar_module(inputs).to_dense().detach()
            covariances = kernel.reshape(k, n, n).numpy()
            for i, outcome in enumerate(batch.outcomes):
                mean[outcome] += batch.weight[i] * means[i]
                squares = covariances[i] + np.outer(means[i], means[i])
                second_moment[outcome] += batch.weight[i] * squares
        # A mixture's covariance is E[y y^T] - E[y] E[y]^T over its components.
        covariance = second_moment - mean[:, :, None] * mean[:, None, :]
        variance = self.y_std**2
        scaled_mean: Array = mean.T * self.y_std + self.y_mean
        return scaled_mean, covariance * variance[:, None, None]

    def predict(self, x: Array) -> tuple[Array, Array]:
        """Posterior mean and standard deviation, each `(n, m)`, at `x` `(n, d)`, in units of y."""
        with torch.no_grad():
            points = torch.from_numpy(x)
            mean, std = self.moments(points)
        scaled_mean = mean.numpy() * self.y_std
        scaled_std = std.numpy() * self.y_std
        return scaled_mean + self.y_mean, scaled_std


@dataclass(frozen=True)
class _BatchPlan:
    """The plan of a `GPBatch`: all but the trials.

    Attributes:
        kernel: The prior.
        outcomes: Column numbers of y.
        weight: `(k,)`, as of `GPBatch`.
        hyperparameters: Those of an earlier fit to the same outcomes; None to fit them.
    """

    kernel: KernelSpec
    outcomes: tuple[int, ...]
    weight: Array
    hyperparameters: Hyperparameters | None = None

    def build(self, x: Array, y: Array, noise: Array | None) -> GPBatch:
        """Fit the processes, or set their hyperparameters.

        Args:
            x: `(n, d)`, points of the unit cube.
            y: `(n, m)`, standardised outcomes.
            noise: `(n, m)`, their squared standard errors in the same units.
        """
        columns = list(self.outcomes)
        # The standard errors of the trials; without them BoTorch infers the noise.
        known_variance = None
        if noise is not None:
            outcome_noise = noise[:, columns]
            if not np.isnan(outcome_noise).any():
                known_variance = torch.from_numpy(outcome_noise)
        outcomes = torch.from_numpy(y[:, columns])
        with _ignored_fit_warnings():
            d = x.shape[1]
            covariance = _covariance(d, len(columns), self.kernel)
            model = SingleTaskGP(
                torch.from_numpy(x),
                outcomes,
                train_Yvar=known_variance,
                covar_module=covariance,
                outcome_transform=None,
            )
            if self.hyperparameters is None:
                likelihood = ExactMarginalLogLikelihood(model.likelihood, model)
                options = {"maxiter": _FIT_ITERATIONS}
                fit_gpytorch_mll(likelihood, optimizer_kwargs={"options": options})
        if self.hyperparameters is not None:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(self.hyperparameters[name])
            model.eval()
        return GPBatch(
            model=model,
            kernel=self.kernel,
            outcomes=self.outcomes,
            weight=self.weight,
            known_noise=known_variance is not None,
        )


@contextmanager
def _ignored_fit_warnings() -> Iterator[None]:
    """Ignore what is expected here: capped fits, near-equal points, constant outcomes."""
    with warnings.catch_warnings():
        for category in (OptimizationWarning, NumericalWarning, InputDataWarning):
            warnings.simplefilter("ignore", category)
        yield


class QuadraticKernel(Kernel):  # type: ignore[misc]
    """The covariance of a quadratic polynomial without cross terms.

    The polynomial is sum_j (a_j z_j + b_j z_j^2) / sqrt(d) with z = 2 x - 1 and independent
    standard normal a_j, b_j.
    """

    has_lengthscale = False

    def forward(
        self,
        x1: Tensor,
        x2: Tensor,
        diag: bool = False,
        **params: object,
    ) -> Tensor:
        """Covariance `... x n1 x n2` of points `... x n1 x d` and `... x n2 x d`.

        Args:
            x1: The first points.
            x2: The second points.
            diag: Whether only the diagonal `... x n` is wanted.
            **params: Ignored, as in GPyTorch's kernels.
        """
        features1 = self._features(x1)
        features2 = self._features(x2)
        if diag:
            products = features1 * features2
            return products.sum(-1)
        transposed = features2.transpose(-1, -2)
        return features1 @ transposed

    def _features(self, x: Tensor) -> Tensor:
        """Linear and quadratic features, `... x 2d`."""
        z = 2 * x - 1
        squared = z**2
        features = torch.cat([z, squared], -1)
        d = x.shape[-1]
        scaled: Tensor = features / d**0.5
        return scaled


def _covariance(d: int, m: int, spec: KernelSpec) -> Kernel:
    """A quadratic trend plus a Matern 5/2 process, or an RBF process, for m outcomes.

    A score as a function of merge weights is nearly quadratic around its maximum (the premise of
    MAP, Li et al. 2024, arXiv 2406.07529), and thirty trials determine such a trend in thirty
    dimensions. The RBF process is BoTorch's default.
    """
    # BoTorch gives a model of one outcome no batch dimension.
    batch_shape = torch.Size([m] if m > 1 else [])
    # Hvarfner et al. 2024: the prior length-scale grows with the square root of d.
    half_log_d = math.log(d) / 2
    log_mean = 2**0.5 + half_log_d
    log_importance = torch.zeros(d, dtype=torch.float64)
    if spec.importance is not None:
        log_importance = torch.from_numpy(spec.importance).log()
    location = log_mean - log_importance
    prior = LogNormalPrior(loc=location, scale=3**0.5)
    initial_lengthscale = prior.mode.clamp_min(2 * _MIN_LENGTHSCALE)
    constraint = GreaterThan(
        _MIN_LENGTHSCALE, transform=None, initial_value=initial_lengthscale
    )
    arguments = {
        "ard_num_dims": d,
        "batch_shape": batch_shape,
        "lengthscale_prior": prior,
        "lengthscale_constraint": constraint,
    }
    if not spec.quadratic_trend:
        return RBFKernel(**arguments)
    matern = MaternKernel(nu=2.5, **arguments)
    residual = ScaleKernel(
        matern,
        batch_shape=batch_shape,
        outputscale_prior=GammaPrior(1.5, 1.5),
    )
    quadratic = QuadraticKernel(batch_shape=batch_shape)
    trend = ScaleKernel(
        quadratic,
        batch_shape=batch_shape,
        outputscale_prior=GammaPrior(1.0, 0.2),
    )
    return residual + trend
