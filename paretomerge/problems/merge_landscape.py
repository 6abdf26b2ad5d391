"""The merge landscape: parameters of a merge in, accuracies on three tasks out."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
from optuna.distributions import BaseDistribution

from paretomerge.errors import ConfigError
from paretomerge.problems.scored_merges import (
    MERGES_FILE,
    MethodIndices,
    ScoredMerges,
    standard_error,
)
from paretomerge.problems.surrogate import LogitProcess, affine, features, sigmoid
from paretomerge.types import Array, Conditions, Params, ParamValue

SURROGATE_FILE = Path(__file__).parent / "data" / "surrogate.npz"


@dataclass(frozen=True)
class MergeLandscape:
    """A surrogate of real merges: m tasks over a choice of method and d numbers.

    The space: the method (task arithmetic, TIES, DARE-TIES), a weight in [-0.5, 1.5] per model and
    half of the layers, and a density in [0.1, 1] per model, which task arithmetic does not read.
    All scores are accuracies, so they are maximised.

    Attributes:
        merges: the n merges that the surrogate is fitted to.
        processes: one Gaussian process per task.
        coefficients: `(m, n)`, of the processes' posterior means.
        error: `(m,)`, root mean square of the surrogate's leave-one-out error.
        reference_point: `(m,)`, the worst measured source per task less a tenth of their range.
        front_rows: methods and numbers of a sample of the surrogate's own Pareto front.
        front_hypervolume: hypervolume of the whole front above the reference point.

    Example:
        >>> from paretomerge.problems import MergeLandscape
        >>> landscape = MergeLandscape.load()
        >>> scores, stderr = landscape.evaluate(landscape.baselines["uniform soup"])
        >>> dict(zip(landscape.tasks, scores.round(2).tolist()))
        {'sort': 0.95, 'reverse': 0.63, 'translate': 0.82}
    """

    merges: ScoredMerges
    processes: tuple[LogitProcess, ...]
    coefficients: Array
    error: Array
    reference_point: Array
    front_rows: tuple[MethodIndices, Array]
    front_hypervolume: float

    @classmethod
    def load(cls, merges: Path = MERGES_FILE, surrogate: Path = SURROGATE_FILE) -> Self:
        """Read the shipped landscape, in some hundredths of a second.

        Args:
            merges: file of the merges.
            surrogate: file of the processes that were fitted to them.

        Returns:
            The landscape.

        Raises:
            ConfigError: the surrogate was fitted to other merges.
        """
        scored = ScoredMerges.load(merges)
        with np.load(surrogate) as data:
            arrays = {name: data[name] for name in data.files}
        # One coefficient per task and merge: another shape belongs to another file of merges.
        fitted_shape = arrays["coefficients"].shape
        if fitted_shape != (len(scored.tasks), len(scored)):
            raise ConfigError(
                f"{surrogate} was not fitted to the {len(scored)} merges of {merges}; "
                "run `fit` of benchmarks.landscape"
            )
        processes = []
        # Plain floats, in the order of the fields of `LogitProcess` after the projection.
        settings = arrays["settings"].tolist()
        for projection, numbers in zip(arrays["projection"], settings, strict=True):
            processes.append(LogitProcess(projection, *numbers))
        return cls(
            merges=scored,
            processes=tuple(processes),
            coefficients=arrays["coefficients"],
            error=arrays["error"],
            reference_point=arrays["reference"],
            front_rows=(arrays["front_method"], arrays["front_numbers"]),
            front_hypervolume=float(arrays["hypervolume"]),
        )

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the m tasks."""
        return self.merges.tasks

    @property
    def space(self) -> dict[str, BaseDistribution]:
        """Parameter name -> Optuna distribution, inactive parameters included."""
        return self.merges.space.distributions

    @property
    def conditions(self) -> Conditions:
        """Density -> (`method`, methods that read it)."""
        return self.merges.space.conditions

    @property
    def baselines(self) -> dict[str, dict[str, ParamValue]]:
        """Baseline recipes by name: each model alone, uniform average, published defaults."""
        return self.merges.baselines

    @property
    def front(self) -> list[dict[str, ParamValue]]:
        """Parameters of a sample of the surrogate's Pareto front."""
        space = self.merges.space
        methods, rows = self.front_rows
        points = []
        for method, row in zip(methods, rows, strict=True):
            points.append(space.point(method, row))
        return points

    def evaluate(
        self,
        params: Params,
        n_examples: int | None = None,
        rng: np.random.Generator | None = None,
    ) -> tuple[Array, Array]:
        """Scores of one merge and their standard errors, as an evaluation on a test set has them.

        Args:
            params: one value per active parameter.
            n_examples: None: the surrogate's own scores, with standard errors of 0. A number: the
                share of correct answers among so many examples per task, drawn from `rng`.
            rng: source of randomness, where `n_examples` is given.

        Returns:
            Scores `(m,)` and standard errors `(m,)`.

        Raises:
            ConfigError: a parameter is unknown, missing or out of bounds; fewer than 2 examples;
                no generator.
        """
        true_scores = self.scores([params])[0]
        if n_examples is None:
            return true_scores, np.zeros(len(true_scores))
        # The standard error divides by n - 1, so one example is too few.
        if n_examples < 2 or rng is None:
            raise ConfigError(
                "evaluate: noisy scores need n_examples of at least 2 and a random generator, "
                f"got n_examples={n_examples}, rng={rng}"
            )
        n_correct = rng.binomial(n_examples, true_scores)
        drawn = n_correct / n_examples
        return drawn, standard_error(drawn, n_examples)

    def scores(self, points: Sequence[Params]) -> Array:
        """Noise-free scores of several merges.

        Args:
            points: n parameter sets.

        Returns:
            `(n, m)`.

        Raises:
            ConfigError: a parameter is unknown, missing or out of bounds.
        """
        method, numbers = self.merges.space.rows(points)
        return self.predict(method, numbers)

    def predict(self, method: MethodIndices, numbers: Array) -> Array:
        """Noise-free scores of merges that are given as arrays.

        Args:
            method: `(n,)`, index of the method.
            numbers: `(n, d)`; NaN where one is inactive.

        Returns:
            `(n, m)`.
        """
        x = features(self.merges.space, method, numbers)
        columns = []
        for posterior in self._posteriors:
            columns.append(sigmoid(posterior.mean(x)))
        return np.stack(columns, axis=1)

    @cached_property
    def _posteriors(self) -> list["_Posterior"]:
        """One per task."""
        # Cached: all that does not depend on the queried points is computed once.
        merges = self.merges
        x = features(merges.space, merges.method, merges.numbers)
        design_matrix = affine(x)
        posteriors = []
        for process, coefficients in zip(
            self.processes, self.coefficients, strict=True
        ):
            projected = x @ process.projection
            line = process.slope_variance * coefficients @ design_matrix
            posterior = _Posterior(process, coefficients, projected, line)
            posteriors.append(posterior)
        return posteriors


@dataclass(frozen=True)
class _Posterior:
    """One task's process, given all merges.

    projected: the merges' features times A, `(n, k)`. line: constant and slopes of the linear
    part, `(1 + p,)`.
    """

    process: LogitProcess
    coefficients: Array
    projected: Array
    line: Array

    def mean(self, x: Array) -> Array:
        """The posterior mean `(q,)` of the logit at features `(q, p)`."""
        projected = x @ self.process.projection
        covariance = self.process.smooth_covariance(projected, self.projected)
        # The linear part needs no covariance with each merge: it is a line.
        constant = self.line[0]
        slopes = self.line[1:]
        smooth = covariance @ self.coefficients
        # Scaled as in `affine`, whose coefficients these are.
        centred = 2 * x - 1
        logit: Array = smooth + constant + centred @ slopes
        return logit
