"""What stands between a problem and an optimiser: the meter, and the problem on the unit cube."""

import time
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.stats import qmc

from paretomerge.problems import Problem
from paretomerge.search.encoding import Encoding
from paretomerge.types import Array, Params


class BudgetSpentError(Exception):
    """Raised by a meter that was asked for more evaluations than its budget."""


@dataclass
class Meter:
    """Evaluates parameter sets one at a time.

    Attributes:
        problem: what is evaluated.
        seed: of the noise, which depends on it and on the number of the evaluation alone.
        evaluations: the budget.
        params: every parameter set that was evaluated.
        true_values: their values `(m,)` without noise.
        observed: their values `(m,)` as the optimiser sees them.
        stderr: their standard errors `(m,)`; empty where values are exact.
        seconds: how long the optimiser took before each evaluation.
    """

    problem: Problem
    seed: int
    evaluations: int
    params: list[Params] = field(default_factory=list)
    true_values: list[Array] = field(default_factory=list)
    observed: list[Array] = field(default_factory=list)
    stderr: list[Array] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._since = time.perf_counter()

    def __call__(self, params: Params) -> tuple[Array, Array | None]:
        """Evaluate one parameter set: observed values `(m,)`, and standard errors or None.

        Raises BudgetSpentError once the budget is spent.
        """
        waited = time.perf_counter() - self._since
        number = len(self.observed)
        if number == self.evaluations:
            raise BudgetSpentError
        true_values = self.problem.evaluate([params])[0]
        observed, stderr = true_values, None
        if self.problem.noise is not None:
            rng = np.random.default_rng([self.seed, number])
            observed, stderr = self.problem.noise(true_values, rng)
            self.stderr.append(stderr)
        self.params.append(dict(params))
        self.true_values.append(true_values)
        self.observed.append(observed)
        self.seconds.append(waited)
        self._since = time.perf_counter()
        return observed, stderr

    @property
    def y(self) -> Array:
        """Observed values so far, `(n, m)`."""
        return np.asarray(self.observed)


class UnitCube:
    """The problem as a function on the unit cube, evaluated through a meter.

    Attributes:
        problem: what is evaluated.
        meter: through which.
        encoding: between parameters and the cube.
        x: points that were evaluated, `(n, d)`.
        bounds: of the cube, `(2, d)`.
    """

    def __init__(self, problem: Problem, meter: Meter) -> None:
        self.problem = problem
        self.meter = meter
        self.encoding = Encoding(problem.space, problem.conditions)
        self.x: Array = np.empty((0, self.encoding.d))
        low = torch.zeros(self.encoding.d)
        high = torch.ones(self.encoding.d)
        self.bounds = torch.stack([low, high]).double()

    def evaluate(self, x: Array) -> None:
        """Evaluate each row of `x`, rounded to what the parameters can be."""
        for row in self.encoding.project(np.atleast_2d(x)):
            self.meter(self.encoding.decode(row))
            self.x = np.concatenate([self.x, row[None]])

    def initial_design(self, size: int, seed: int) -> Array:
        """The problem's baseline points, then Sobol points up to `size` in all, `(n, d)`."""
        starts = np.empty((0, self.encoding.d))
        if self.problem.starts:
            starts = self.encoding.encode(list(self.problem.starts))
        sobol = qmc.Sobol(self.encoding.d, rng=np.random.default_rng(seed))
        drawn = sobol.random(max(size - len(starts), 0))
        if not len(drawn):
            return starts
        return np.concatenate([starts, self.encoding.project(drawn)])
