"""The surrogate's own front, by NSGA-II (Deb et al. 2002) with whole populations at once."""

from collections.abc import Callable

import moocore
import numpy as np
from numpy.typing import NDArray

from paretomerge.pareto.front import hypervolume, nondominated

from .merges import Array, Merges

Predict = Callable[[NDArray[np.uint8], Array], Array]
Front = tuple[NDArray[np.uint8], Array, Array]
"""method `(n,)`, numbers `(n, d)` and scores `(n, m)` of points that do not dominate each other."""

_SPREAD = (
    15.0  # of crossover and mutation: the distribution index eta of SBX and of polynomial mutation
)


def front(
    merges: Merges,
    predict: Predict,
    reference: Array,
    *,
    seed: int,
    generations: int = 250,
    size: int = 400,
) -> Front:
    """All nondominated points above `reference` that a search of `generations` times `size` evaluations finds, begun at the merges."""
    rng = np.random.default_rng(seed)
    low, high = merges.space.bounds
    resting = np.where(np.isnan(merges.numbers), high, merges.numbers)
    scores = predict(merges.method, merges.numbers)
    population = _best((merges.method, (resting - low) / (high - low), scores), size)
    archive = population
    for _ in range(generations):
        method, unit = _children(population[0], population[1], rng, len(merges.space.methods))
        numbers = low + unit * (high - low)
        numbers[np.ix_(~merges.space.reads_density(method), merges.space.conditional)] = np.nan
        children = (method, unit, predict(method, numbers))
        population = _best(_joined(population, children), size)
        archive = _nondominated(_joined(archive, children))
    inside = (archive[2] > reference).all(1)
    method, unit, scores = (part[inside] for part in archive)
    numbers = np.clip(low + unit * (high - low), low, high)
    numbers[np.ix_(~merges.space.reads_density(method), merges.space.conditional)] = np.nan
    return method, numbers, scores


def united(fronts: list[Front]) -> Front:
    """The front of several."""
    whole = fronts[0]
    for other in fronts[1:]:
        whole = _joined(whole, other)
    return _nondominated(whole)


def thinned(points: Array, count: int) -> NDArray[np.intp]:
    """Indices of at most `count` points that lie far apart: the best of each column, then always the farthest from all chosen."""
    chosen = list(dict.fromkeys(points.argmax(0).tolist()))[:count]
    distance = np.min([np.linalg.norm(points - points[i], axis=1) for i in chosen], axis=0)
    while len(chosen) < min(count, len(points)):
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, np.linalg.norm(points - points[chosen[-1]], axis=1))
    return np.array(chosen)


def volume(found: Front, reference: Array) -> float:
    return hypervolume(found[2], reference)


def _joined(a: Front, b: Front) -> Front:
    method, unit, scores = (np.concatenate(pair) for pair in zip(a, b, strict=True))
    return method, unit, scores


def _nondominated(points: Front) -> Front:
    mask = nondominated(points[2])
    return points[0][mask], points[1][mask], points[2][mask]


def _best(points: Front, size: int) -> Front:
    """The `size` of lowest rank, of equal rank those with most room around them."""
    rank = np.asarray(moocore.pareto_rank(points[2], maximise=True))
    order = np.lexsort((-_crowding(points[2], rank), rank))[:size]
    return points[0][order], points[1][order], points[2][order]


def _crowding(scores: Array, rank: NDArray[np.int64]) -> Array:
    """Per point the distance between its neighbours of the same rank, summed over objectives; endless at the ends."""
    out = np.zeros(len(scores))
    for r in np.unique(rank):
        members = np.flatnonzero(rank == r)
        for column in scores[members].T:
            order = members[np.argsort(column, kind="stable")]
            values = np.sort(column)
            out[order[[0, -1]]] = np.inf
            out[order[1:-1]] += (values[2:] - values[:-2]) / max(values[-1] - values[0], 1e-12)
    return out


def _children(
    method: NDArray[np.uint8], unit: Array, rng: np.random.Generator, methods: int
) -> tuple[NDArray[np.uint8], Array]:
    """One child a parent: simulated binary crossover with another, polynomial mutation; now and then another method."""
    n, d = unit.shape
    # the population is sorted: of two drawn the better one is the one with the lower index
    a, b = rng.integers(n, size=(2, n, 2)).min(2)
    u = rng.random((n, d))
    beta = np.where(u < 0.5, (2 * u) ** (1 / (_SPREAD + 1)), (2 * (1 - u)) ** (-1 / (_SPREAD + 1)))
    first, second = unit[a], unit[b]
    crossed = (first + second + rng.choice([-1, 1], size=(n, d)) * beta * (first - second)) / 2
    child = np.where(rng.random((n, d)) < 0.5, crossed, first)
    u = rng.random((n, d))
    step = np.where(
        u < 0.5, (2 * u) ** (1 / (_SPREAD + 1)) - 1, 1 - (2 * (1 - u)) ** (1 / (_SPREAD + 1))
    )
    child = np.clip(child + np.where(rng.random((n, d)) < 1 / d, step, 0), 0, 1)
    picked = np.where(rng.random(n) < 0.5, method[a], method[b])
    return np.where(rng.random(n) < 0.02, rng.integers(methods, size=n), picked).astype(
        np.uint8
    ), child
