"""The surrogate's own front, by NSGA-II (Deb et al. 2002) with whole populations at once."""

from collections.abc import Callable

import moocore
import numpy as np
from numpy.typing import NDArray

from benchmarks.landscape.design import inactive_densities
from paretomerge.pareto.front import nondominated
from paretomerge.problems import ScoredMerges
from paretomerge.problems.scored_merges import MethodIndices
from paretomerge.types import Array

Predict = Callable[[MethodIndices, Array], Array]

Points = tuple[MethodIndices, Array, Array]
"""Method `(n,)`, numbers `(n, d)` and scores `(n, m)` of n points."""

# The distribution index eta of simulated binary crossover and of polynomial mutation.
_ETA = 15.0


def front(
    merges: ScoredMerges,
    predict: Predict,
    reference: Array,
    *,
    seed: int,
    generations: int = 250,
    size: int = 400,
) -> Points:
    """All nondominated points above `reference` that one search meets.

    It begins at the merges, and evaluates `generations` times `size` points.
    """
    rng = np.random.default_rng(seed)
    space = merges.space
    low, high = space.bounds
    filled = np.where(np.isnan(merges.numbers), high, merges.numbers)
    scores = predict(merges.method, merges.numbers)
    population = _best((merges.method, (filled - low) / (high - low), scores), size)
    archive = population
    for _ in range(generations):
        method, unit = _children(population[0], population[1], rng, len(space.methods))
        numbers = low + unit * (high - low)
        numbers[inactive_densities(space, method)] = np.nan
        children = (method, unit, predict(method, numbers))
        population = _best(_joined(population, children), size)
        archive = _nondominated(_joined(archive, children))
    method, unit, scores = _selected(archive, (archive[2] > reference).all(1))
    numbers = np.clip(low + unit * (high - low), low, high)
    numbers[inactive_densities(space, method)] = np.nan
    return method, numbers, scores


def united(fronts: list[Points]) -> Points:
    """The front of several."""
    whole = fronts[0]
    for other in fronts[1:]:
        whole = _joined(whole, other)
    return _nondominated(whole)


def thinned(points: Array, count: int) -> NDArray[np.intp]:
    """Indices of at most `count` points that lie far apart.

    The best of each column come first, then always the farthest from all that are chosen.
    """
    chosen = list(dict.fromkeys(points.argmax(0).tolist()))[:count]
    distance = np.min([np.linalg.norm(points - points[i], axis=1) for i in chosen], axis=0)
    while len(chosen) < min(count, len(points)):
        farthest = int(distance.argmax())
        chosen.append(farthest)
        distance = np.minimum(distance, np.linalg.norm(points - points[farthest], axis=1))
    return np.array(chosen)


def _joined(a: Points, b: Points) -> Points:
    method, numbers, scores = (np.concatenate(pair) for pair in zip(a, b, strict=True))
    return method, numbers, scores


def _selected(points: Points, index: NDArray[np.bool_] | NDArray[np.intp]) -> Points:
    method, numbers, scores = points
    return method[index], numbers[index], scores[index]


def _nondominated(points: Points) -> Points:
    return _selected(points, nondominated(points[2]))


def _best(points: Points, size: int) -> Points:
    """The `size` points of lowest rank, within a rank those of largest crowding distance."""
    scores = points[2]
    rank = np.asarray(moocore.pareto_rank(scores, maximise=True))
    order = np.lexsort((-_crowding(scores, rank), rank))
    return _selected(points, order[:size])


def _crowding(scores: Array, rank: NDArray[np.int64]) -> Array:
    """Crowding distance `(n,)` within each rank; infinite at the ends."""
    distance = np.zeros(len(scores))
    for r in np.unique(rank):
        members = np.flatnonzero(rank == r)
        for column in scores[members].T:
            order = members[np.argsort(column, kind="stable")]
            values = np.sort(column)
            span = max(values[-1] - values[0], 1e-12)
            distance[order[[0, -1]]] = np.inf
            distance[order[1:-1]] += (values[2:] - values[:-2]) / span
    return distance


def _children(
    method: MethodIndices, unit: Array, rng: np.random.Generator, n_methods: int
) -> tuple[MethodIndices, Array]:
    """One child per parent: crossover with another, mutation, now and then another method."""
    n = len(unit)
    # The population is sorted, so the better of two that are drawn has the lower index.
    a, b = rng.integers(n, size=(2, n, 2)).min(2)
    child = _mutated(_crossed(unit[a], unit[b], rng), rng)
    inherited = np.where(rng.random(n) < 0.5, method[a], method[b])
    changed = rng.random(n) < 0.02
    child_method = np.where(changed, rng.integers(n_methods, size=n), inherited)
    return child_method.astype(np.uint8), child


def _crossed(first: Array, second: Array, rng: np.random.Generator) -> Array:
    """Simulated binary crossover (Deb & Agrawal 1995) of half of the coordinates."""
    shape = first.shape
    u = rng.random(shape)
    exponent = 1 / (_ETA + 1)
    beta = np.where(u < 0.5, (2 * u) ** exponent, (2 * (1 - u)) ** -exponent)
    sign = rng.choice([-1, 1], size=shape)
    crossed = (first + second + sign * beta * (first - second)) / 2
    return np.where(rng.random(shape) < 0.5, crossed, first)


def _mutated(child: Array, rng: np.random.Generator) -> Array:
    """Polynomial mutation (Deb & Goyal 1996) of one coordinate on average."""
    shape = child.shape
    u = rng.random(shape)
    exponent = 1 / (_ETA + 1)
    step = np.where(u < 0.5, (2 * u) ** exponent - 1, 1 - (2 * (1 - u)) ** exponent)
    mutates = rng.random(shape) < 1 / shape[1]
    return np.clip(child + np.where(mutates, step, 0), 0, 1)
