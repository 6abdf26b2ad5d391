"""Order points `(n, m)`, or pick one of a front. All m objectives are maximised."""

import numpy as np
from numpy.typing import ArrayLike

from paretomerge.pareto.front import (
    IndexArray,
    hypervolume_contributions,
    nondominated_fronts,
)
from paretomerge.types import Array


def ranked(values: ArrayLike, reference: ArrayLike) -> IndexArray:
    """Order points front after front, inside a front by hypervolume contribution.

    Args:
        values: Points, `(n, m)`.
        reference: The reference point of the hypervolume, `(m,)`.

    Returns:
        Indices, `(n,)`, the best first.
    """
    points = np.asarray(values, dtype=float)
    order = [np.zeros(0, dtype=np.intp)]
    for front in nondominated_fronts(points):
        contributions = hypervolume_contributions(points[front], reference)
        # Stable: of equal contributions the earlier point comes first.
        best_first = np.argsort(-contributions, kind="stable")
        order.append(front[best_first])
    return np.concatenate(order)


def best_points(values: ArrayLike, most: int) -> IndexArray:
    """The best points: front after front, and of the last one those with the best scaled means.

    Args:
        values: Points, `(n, m)`.
        most: How many, unless there are fewer.

    Returns:
        Their indices, the best front first.
    """
    points = np.asarray(values, dtype=float)
    chosen = [np.zeros(0, dtype=np.intp)]
    n_left = most
    for front in nondominated_fronts(points):
        if len(front) > n_left:
            # Those that are good in all objectives: a knee, and most preferences, are there.
            means = normalised(points[front]).mean(1)
            front = front[np.argsort(-means, kind="stable")[:n_left]]
        chosen.append(front)
        n_left -= len(front)
        if not n_left:
            break
    return np.concatenate(chosen)


def representative(values: ArrayLike, most: int) -> IndexArray:
    """Points that stand for all in a fit: half the best ones, half spread over the others.

    Of good points alone, a fit would learn no slope.

    Args:
        values: Points, `(n, m)`.
        most: How many, unless there are fewer.

    Returns:
        Their indices, ascending.
    """
    points = np.asarray(values, dtype=float)
    n = len(points)
    if n <= most:
        return np.arange(n)
    best = best_points(points, most // 2)
    others = np.setdiff1d(np.arange(n), best)
    places = np.linspace(0, len(others) - 1, most - len(best))
    spread = others[places.round().astype(np.intp)]
    return np.sort(np.concatenate([best, spread]))


def normalised(values: ArrayLike) -> Array:
    """Scale each objective to [0, 1] over the points.

    Args:
        values: Points, `(n, m)`.

    Returns:
        Scaled points, `(n, m)`; 1 for an objective whose values are all equal.
    """
    points = np.asarray(values, dtype=float)
    lowest = points.min(0)
    ranges = np.ptp(points, axis=0)
    divisors = np.where(ranges > 0, ranges, 1.0)
    scaled = (points - lowest) / divisors
    # 1 is the ideal: a constant objective adds no shortfall and does not affect a choice.
    return np.where(ranges > 0, scaled, 1.0)


def knee(values: ArrayLike) -> int:
    """Pick the point nearest to the ideal point.

    Args:
        values: Points of a front, `(n, m)`.

    Returns:
        The index of the point with the least Euclidean distance, objectives scaled over the front.

    Example:
        >>> knee([[1.0, 0.0], [0.8, 0.8], [0.0, 1.0]])
        1
    """
    # The ideal point is 1 in every objective.
    shortfall = 1 - normalised(values)
    distances = np.linalg.norm(shortfall, axis=1)
    return int(distances.argmin())
