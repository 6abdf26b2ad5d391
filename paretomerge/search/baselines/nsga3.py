"""NSGA-III (Deb & Jain 2014, IEEE TEVC 18(4)) on a function that costs nothing, such as a surrogate.

On merges Optuna's `NSGAIIISampler` does this; as a search inside one ask it is far too slow, a trial per point.
"""

from collections.abc import Callable
from itertools import combinations
from math import comb

import moocore
import numpy as np
from numpy.typing import NDArray
from optuna.distributions import CategoricalDistribution

from paretomerge.search.encoding import Encoding

Array = NDArray[np.float64]
Objectives = Callable[[Array], Array]
_DIRECTIONS = 60  # reference directions at most; the population has as many members, or as many as there are starts
_SPREAD = 20.0  # distribution index of crossover and mutation: the larger the nearer to the parents


def front_of(
    objectives: Objectives,
    encoding: Encoding,
    start: Array,
    rng: np.random.Generator,
    generations: int = 40,
) -> Array:
    """The nondominated points `(p, d)`, settled, after `generations` from `start` `(n, d)`, n >= 1.

    objectives: `(k, d)` -> `(k, m)`, all maximised.
    """
    m = objectives(start[:1]).shape[1]
    directions = reference_directions(m, _DIRECTIONS)
    size = max(len(directions), 40)
    x = np.concatenate([start, encoding.project(rng.random((size, encoding.d)))])
    y = objectives(x)
    for _ in range(generations):
        kept = select(y, size, directions, rng)
        x, y = x[kept], y[kept]
        children = encoding.project(_children(encoding, x, rng))
        x, y = np.concatenate([x, children]), np.concatenate([y, objectives(children)])
    return np.unique(
        x[np.asarray(moocore.is_nondominated(y, maximise=True, keep_weakly=True), dtype=bool)],
        axis=0,
    )


def reference_directions(m: int, most: int) -> Array:
    """`(h, m)`, h <= most, evenly on the simplex: Das & Dennis 1998. With six objectives two layers would be denser."""
    parts = 1
    while m > 1 and comb(parts + m, m - 1) <= most:
        parts += 1
    bars = np.array(list(combinations(range(parts + m - 1), m - 1)), dtype=float).reshape(
        comb(parts + m - 1, m - 1), m - 1
    )
    edges = np.concatenate(
        [np.full((len(bars), 1), -1.0), bars, np.full((len(bars), 1), parts + m - 1.0)], axis=1
    )
    return (np.diff(edges, axis=1) - 1) / parts


def select(y: Array, size: int, directions: Array, rng: np.random.Generator) -> NDArray[np.intp]:
    """The `size` members that go on: whole fronts, then the last one by niches (Deb & Jain 2014, sec. IV, alg. 3 and 4)."""
    ranks = np.asarray(moocore.pareto_rank(y, maximise=True))
    last = np.sort(ranks)[min(size, len(y)) - 1]
    sure, rest = np.flatnonzero(ranks < last), np.flatnonzero(ranks == last)
    if len(sure) + len(rest) <= size:
        return np.concatenate([sure, rest])
    niche, distance = _associate(y, ranks, directions)
    counts = np.bincount(niche[sure], minlength=len(directions)).astype(float)
    chosen = list(sure)
    left = [int(i) for i in rest]
    while len(chosen) < size:
        open_niches = np.unique(niche[left])
        emptiest = open_niches[counts[open_niches] == counts[open_niches].min()]
        here = rng.choice(emptiest)
        members = [i for i in left if niche[i] == here]
        taken = (
            min(members, key=lambda i: distance[i])
            if counts[here] == 0
            else members[int(rng.integers(len(members)))]
        )
        chosen.append(np.intp(taken))
        left.remove(taken)
        counts[here] += 1
    return np.array(chosen, dtype=np.intp)


def _associate(
    y: Array, ranks: NDArray[np.int_], directions: Array
) -> tuple[NDArray[np.intp], Array]:
    """(nearest direction, distance to its line) of every point, objectives scaled by the first front's extent."""
    ideal = y.max(0)
    extent = ideal - y[ranks == ranks.min()].min(0)
    cost = (ideal - y) / np.where(extent > 1e-12, extent, 1.0)
    unit = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    along = cost @ unit.T
    distance = np.sqrt(np.maximum((cost**2).sum(1)[:, None] - along**2, 0))
    return distance.argmin(1), distance.min(1)


def _children(encoding: Encoding, x: Array, rng: np.random.Generator) -> Array:
    """Simulated binary crossover (Deb & Agrawal 1995) and polynomial mutation; choices are inherited whole, or drawn anew."""
    widths = [columns.stop - columns.start for columns in encoding.columns.values()]
    choice = np.repeat(
        [isinstance(d, CategoricalDistribution) for d in encoding.space.values()], widths
    )
    n, parameters = len(x), len(widths)
    a, b = x[rng.permutation(n)], x[rng.permutation(n)]
    u = rng.random((n, encoding.d))
    beta = np.where(u < 0.5, (2 * u) ** (1 / (_SPREAD + 1)), (2 * (1 - u)) ** (-1 / (_SPREAD + 1)))
    from_a = np.repeat(rng.random((n, parameters)) < 0.5, widths, axis=1)
    crossed = np.where(from_a, a, np.where(choice, b, ((1 + beta) * a + (1 - beta) * b) / 2))
    u = rng.random((n, encoding.d))
    step = np.where(
        u < 0.5, (2 * u) ** (1 / (_SPREAD + 1)) - 1, 1 - (2 * (1 - u)) ** (1 / (_SPREAD + 1))
    )
    mutated = np.repeat(rng.random((n, parameters)) < 1 / parameters, widths, axis=1)
    return np.where(mutated, np.where(choice, u, crossed + step), crossed)
