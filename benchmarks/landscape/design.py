"""Where to merge next: Sobol points over the whole space, then points near the front of all merges so far.

A proposal near the front crosses two good merges and moves the child a little, or goes some way from a good merge
towards any other. It depends on the seed and on the scores before it alone.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.stats import qmc

from .merges import Array, Space

SPREAD = 900  # Sobol points
_RESTING = (
    1.0  # where a density that does not count lies in the unit cube: all of the delta is kept
)


class Design:
    """Points `(n, C + d)` of the unit cube: the choice of method one-hot in C columns, then the numbers."""

    def __init__(self, space: Space, spread: int = SPREAD) -> None:
        self.space = space
        self.choices = len(space.methods)
        self.spread = spread
        width = self.choices + len(space.numbers)
        points = (
            1 << max(spread - 1, 1).bit_length()
        )  # SciPy warns of a number that is no power of 2
        self._sobol = self._settled(
            qmc.Sobol(width, rng=np.random.default_rng(0)).random(points)[:spread]
        )
        self._rng = np.random.default_rng(1)

    def propose(self, x: Array, scores: Array) -> Array:
        """The point after `x` `(n, C + d)`, which came out as `scores` `(n, m)`. Call it once for each n, in order."""
        if len(x) < self.spread:
            return self._sobol[len(x)]
        first = self._elite(x, scores)
        crossed = self._rng.random() < 0.7
        child = self._crossed(first, self._elite(x, scores)) if crossed else self._between(first, x)
        return self._settled(np.clip(child, 0, 1)[None])[0]

    def replay(self, scores: Array) -> Array:
        """The points `(n, C + d)` that the design proposes when they come out as `scores` `(n, m)`."""
        x = np.zeros((len(scores), self._sobol.shape[1]))
        for i in range(len(scores)):
            x[i] = self.propose(x[:i], scores[:i])
        return x

    def rows(self, x: Array) -> tuple[NDArray[np.uint8], Array]:
        """Unit cube -> index of the method `(n,)`, numbers in the user's units `(n, d)` with NaN where one does not count."""
        low, high = self.space.bounds
        method = x[:, : self.choices].argmax(1).astype(np.uint8)
        numbers = np.clip(low + x[:, self.choices :] * (high - low), low, high)
        numbers[np.ix_(~self.space.reads_density(method), self.space.conditional)] = np.nan
        return method, numbers

    def _elite(self, x: Array, scores: Array) -> Array:
        """A merge that is among the best by a random weighting of the tasks (augmented Tchebycheff)."""
        weights = self._rng.dirichlet(np.ones(scores.shape[1]))
        scaled = (scores - scores.min(0)) / np.ptp(scores, axis=0)
        shortfall = np.max(weights * (1 - scaled), axis=1) + 0.05 * ((1 - scaled) * weights).sum(1)
        order = np.argsort(shortfall, kind="stable")
        return x[order[min(int(self._rng.exponential(8)), len(x) - 1)]]

    def _crossed(self, first: Array, second: Array) -> Array:
        """Uniform crossover of two good merges, then a normal step of random size on a random part of the numbers."""
        rng, c = self._rng, self.choices
        child = np.where(rng.random(first.size) < 0.5, second, first)
        child[:c] = first[:c]
        if rng.random() < 0.1:
            child[:c] = np.eye(c)[rng.integers(c)]
        sigma = np.exp(rng.uniform(np.log(0.01), np.log(0.3)))
        step = (
            sigma
            * rng.standard_normal(first.size)
            * (rng.random(first.size) < rng.choice([0.2, 0.5, 1.0]))
        )
        step[:c] = 0
        return child + step

    def _between(self, first: Array, x: Array) -> Array:
        """Some way from a good merge towards any other."""
        other = x[self._rng.integers(len(x))]
        child = first + self._rng.random() * (other - first)
        child[: self.choices] = (first if self._rng.random() < 0.7 else other)[: self.choices]
        return child

    def _settled(self, x: Array) -> Array:
        x[:, : self.choices] = np.eye(self.choices)[x[:, : self.choices].argmax(1)]
        method = x[:, : self.choices].argmax(1)
        resting = np.ix_(
            ~self.space.reads_density(method), np.flatnonzero(self.space.conditional) + self.choices
        )
        x[resting] = _RESTING
        return x
