"""Where to merge next: Sobol points over the whole space, then points near the front so far.

A proposal near the front crosses two good merges and moves the child a little, or goes some way
from a good merge towards any other. It depends on the seed and on the scores before it alone.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.stats import qmc

from paretomerge.problems import MergeSpace
from paretomerge.problems.scored_merges import MethodIndices
from paretomerge.types import Array

N_SOBOL = 900
# Where an inactive density lies in the unit cube: all of the delta is used.
_INACTIVE = 1.0


def reads_densities(
    space: MergeSpace, method: NDArray[np.integer]
) -> NDArray[np.bool_]:
    """Mask `(n,)` of the points whose method, by index, reads densities."""
    indices = [space.methods.index(name) for name in space.density_methods]
    return np.isin(method, indices)


def inactive_densities(
    space: MergeSpace, method: NDArray[np.integer]
) -> tuple[NDArray[np.intp], ...]:
    """Index of the rows and columns of numbers `(n, d)` that are inactive."""
    rows = np.flatnonzero(~reads_densities(space, method))
    columns = np.flatnonzero(space.is_density)
    return np.ix_(rows, columns)


class Design:
    """Proposes points `(n, C + d)` of the unit cube: the method one-hot in C columns, numbers."""

    def __init__(self, space: MergeSpace, n_sobol: int = N_SOBOL) -> None:
        self.space = space
        self.n_methods = len(space.methods)
        self.n_sobol = n_sobol
        width = self.n_methods + len(space.numbers)
        # SciPy warns of a number of points that is no power of 2.
        power = 1 << max(n_sobol - 1, 1).bit_length()
        sobol = qmc.Sobol(width, rng=np.random.default_rng(0))
        self._sobol = self._settled(sobol.random(power)[:n_sobol])
        self._rng = np.random.default_rng(1)

    def propose(self, x: Array, scores: Array) -> Array:
        """The point after `x` `(n, C + d)`, whose scores are `(n, m)`.

        Call it once for each n, in order: it draws from the design's generator.
        """
        if len(x) < self.n_sobol:
            return self._sobol[len(x)]
        first = self._elite(x, scores)
        if self._rng.random() < 0.7:
            child = self._crossed(first, self._elite(x, scores))
        else:
            child = self._between(first, x)
        return self._settled(np.clip(child, 0, 1)[None])[0]

    def replay(self, scores: Array) -> Array:
        """The points `(n, C + d)` that the design proposes when they get `scores` `(n, m)`."""
        x = np.zeros((len(scores), self._sobol.shape[1]))
        for i in range(len(scores)):
            before, scores_before = x[:i], scores[:i]
            x[i] = self.propose(before, scores_before)
        return x

    def rows(self, x: Array) -> tuple[MethodIndices, Array]:
        """Method `(n,)` and numbers `(n, d)` in the user's units, NaN where one is inactive."""
        low, high = self.space.bounds
        c = self.n_methods
        method = x[:, :c].argmax(1).astype(np.uint8)
        numbers = low + x[:, c:] * (high - low)
        numbers = np.clip(numbers, low, high)
        numbers[inactive_densities(self.space, method)] = np.nan
        return method, numbers

    def _elite(self, x: Array, scores: Array) -> Array:
        """A merge among the best by a random weighting of the tasks (augmented Tchebycheff)."""
        weights = self._rng.dirichlet(np.ones(scores.shape[1]))
        scaled = (scores - scores.min(0)) / np.ptp(scores, axis=0)
        losses = weights * (1 - scaled)
        shortfall = losses.max(1) + 0.05 * losses.sum(1)
        order = np.argsort(shortfall, kind="stable")
        # Not always the best: some merges of the first dozens.
        place = int(self._rng.exponential(8))
        last = len(x) - 1
        return x[order[min(place, last)]]

    def _crossed(self, first: Array, second: Array) -> Array:
        """Uniform crossover, then a normal step of random size on some of the numbers."""
        rng, c = self._rng, self.n_methods
        child = np.where(rng.random(first.size) < 0.5, second, first)
        child[:c] = first[:c]
        if rng.random() < 0.1:
            child[:c] = np.eye(c)[rng.integers(c)]
        # From small steps to large ones, evenly in their logarithm.
        log_sigma = rng.uniform(np.log(0.01), np.log(0.3))
        step = np.exp(log_sigma) * rng.standard_normal(first.size)
        u = rng.random(first.size)
        moved = u < rng.choice([0.2, 0.5, 1.0])
        step = step * moved
        step[:c] = 0
        return child + step

    def _between(self, first: Array, x: Array) -> Array:
        """Some way from a good merge towards any other."""
        other = x[self._rng.integers(len(x))]
        child = first + self._rng.random() * (other - first)
        method_of = first if self._rng.random() < 0.7 else other
        child[: self.n_methods] = method_of[: self.n_methods]
        return child

    def _settled(self, x: Array) -> Array:
        """Points with the method one-hot and inactive densities in their place; changes `x`."""
        c = self.n_methods
        method = x[:, :c].argmax(1)
        x[:, :c] = np.eye(c)[method]
        numbers = x[:, c:]
        numbers[inactive_densities(self.space, method)] = _INACTIVE
        return x
