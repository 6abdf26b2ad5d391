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
    n_methods = len(space.methods)
    low, high = space.bounds
    filled = np.where(np.isnan(merges.numbers), high, merges.numbers)
    scores = predict(merges.method, merges.numbers)
    unit = (filled - low) / (high - low)
    population = _best((merges.method, unit, scores), size)
    archive = population
    for _ in range(generations):
        parents, parent_units, _ = population
        method, unit = _children(parents, parent_units, rng, n_methods)
        numbers = low + unit * (high - low)
        numbers[inactive_densities(space, method)] = np.nan
        children = (method, unit, predict(method, numbers))
        population = _best(_joined(population, children), size)
        archive = _nondominated(_joined(archive, children))
    is_above = np.asarray((archive[2] > reference).all(1))
    method, unit, scores = _selected(archive, is_above)
    numbers = low + unit * (high - low)
    numbers = np.clip(numbers, low, high)
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
    best = points.argmax(0).tolist()
    chosen = list(dict.fromkeys(best))[:count]
    distance = np.full(len(points), np.inf)
    for i in chosen:
        distance = np.minimum(distance, _distances(points, i))
    while len(chosen) < min(count, len(points)):
        farthest = int(distance.argmax())
        chosen.append(farthest)
        distance = np.minimum(distance, _distances(points, farthest))
    return np.array(chosen)


def _distances(points: Array, i: int) -> Array:
    """Euclidean distance `(n,)` of all points to one."""
    return np.asarray(np.linalg.norm(points - points[i], axis=1))


def _joined(a: Points, b: Points) -> Points:
    method = np.concatenate([a[0], b[0]])
    numbers = np.concatenate([a[1], b[1]])
    scores = np.concatenate([a[2], b[2]])
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
            gaps = values[2:] - values[:-2]
            distance[order[1:-1]] += gaps / span
    return distance


def _children(
    method: MethodIndices, unit: Array, rng: np.random.Generator, n_methods: int
) -> tuple[MethodIndices, Array]:
    """One child per parent: crossover with another, mutation, now and then another method."""
    n = len(unit)
    # The population is sorted, so the better of two that are drawn has the lower index.
    drawn = rng.integers(n, size=(2, n, 2))
    a, b = drawn.min(2)
    crossed = _crossed(unit[a], unit[b], rng)
    child = _mutated(crossed, rng)
    from_first = rng.random(n) < 0.5
    inherited = np.where(from_first, method[a], method[b])
    is_changed = rng.random(n) < 0.02
    random_method = rng.integers(n_methods, size=n)
    child_method = np.where(is_changed, random_method, inherited)
    return child_method.astype(np.uint8), child


def _crossed(first: Array, second: Array, rng: np.random.Generator) -> Array:
    """Simulated binary crossover (Deb & Agrawal 1995) of half of the coordinates."""
    shape = first.shape
    u = rng.random(shape)
    exponent = 1 / (_ETA + 1)
    contracting = (2 * u) ** exponent
    expanding = (2 * (1 - u)) ** -exponent
    beta = np.where(u < 0.5, contracting, expanding)
    sign = rng.choice([-1, 1], size=shape)
    spread = sign * beta * (first - second)
    crossed = (first + second + spread) / 2
    is_crossed = rng.random(shape) < 0.5
    return np.where(is_crossed, crossed, first)


def _mutated(child: Array, rng: np.random.Generator) -> Array:
    """Polynomial mutation (Deb & Goyal 1996) of one coordinate on average."""
    shape = child.shape
    u = rng.random(shape)
    exponent = 1 / (_ETA + 1)
    down = (2 * u) ** exponent - 1
    up = 1 - (2 * (1 - u)) ** exponent
    step = np.where(u < 0.5, down, up)
    is_mutated = rng.random(shape) < 1 / shape[1]
    mutated = child + np.where(is_mutated, step, 0)
    return np.clip(mutated, 0, 1)
