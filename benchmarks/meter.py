"""What stands between a problem and whoever searches it: the meter, and the problem as a function on the unit cube."""

import time
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from problems import Params, Problem
from scipy.stats import qmc

from paretomerge.search.encoding import Encoding

Array = NDArray[np.float64]


class BudgetSpentError(Exception):
    """Raised by a meter that was asked for more than its budget."""


@dataclass
class Meter:
    """Evaluates parameter sets one at a time, and keeps what came out and how long each was waited for."""

    problem: Problem
    seed: int
    evaluations: int
    params: list[Params] = field(default_factory=list)
    true: list[Array] = field(default_factory=list)
    seen: list[Array] = field(default_factory=list)
    stderr: list[Array] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._since = time.perf_counter()

    def __call__(self, params: Params) -> tuple[Array, Array | None]:
        """What is seen `(m,)`, and its standard error `(m,)`, or None where it is exact. Raises BudgetSpentError."""
        waited = time.perf_counter() - self._since
        if len(self.seen) == self.evaluations:
            raise BudgetSpentError
        true = self.problem.evaluate([params])[0]
        seen, stderr = true, None
        if self.problem.noise is not None:
            seen, stderr = self.problem.noise(
                true, np.random.default_rng([self.seed, len(self.seen)])
            )
            self.stderr.append(stderr)
        self.params.append(dict(params))
        self.true.append(true)
        self.seen.append(seen)
        self.seconds.append(waited)
        self._since = time.perf_counter()
        return seen, stderr

    @property
    def y(self) -> Array:
        return np.asarray(self.seen)


def starts(problem: Problem, encoding: Encoding, sobol: int, seed: int) -> Array:
    """The known starts, then Sobol points up to `sobol` in all, `(n, d)` in the unit cube."""
    known = encoding.encode(list(problem.starts)) if problem.starts else np.empty((0, encoding.d))
    drawn = qmc.Sobol(encoding.d, rng=np.random.default_rng(seed)).random(
        max(sobol - len(known), 0)
    )
    return np.concatenate([known, encoding.project(drawn)]) if len(drawn) else known


@dataclass
class Cube:
    """The problem as a function on the unit cube, with everything seen so far as tensors."""

    problem: Problem
    meter: Meter

    def __post_init__(self) -> None:
        self.encoding = Encoding(self.problem.distributions, self.problem.conditions)
        self.x = np.empty((0, self.encoding.d))
        self.bounds = torch.stack(
            [torch.zeros(self.encoding.d), torch.ones(self.encoding.d)]
        ).double()

    def __call__(self, x: Array) -> None:
        """Evaluate each row, rounded to what the parameters can be."""
        for row in self.encoding.project(np.atleast_2d(x)):
            self.meter(self.encoding.decode(row))
            self.x = np.concatenate([self.x, row[None]])
