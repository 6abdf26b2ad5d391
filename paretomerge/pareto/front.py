"""Dominance, hypervolume and picks; arrays `(n, m)`, all m objectives maximised. moocore does the hard parts."""

from collections.abc import Iterator

import moocore
import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def nondominated(values: ArrayLike) -> NDArray[np.bool_]:
    """Mask `(n,)` of the points that no other dominates; of equal points the first counts."""
    points = np.asarray(values, dtype=float)
    if not len(points):
        return np.zeros(0, dtype=bool)
    return np.asarray(moocore.is_nondominated(points, maximise=True), dtype=bool)


def hypervolume(values: ArrayLike, reference: ArrayLike) -> float:
    """Volume between the points and `reference` `(m,)`; points that do not exceed it everywhere add nothing."""
    points = np.asarray(values, dtype=float)
    ref = np.asarray(reference, dtype=float)
    points = points[(points > ref).all(1)] if len(points) else points
    return float(moocore.hypervolume(points, ref=ref, maximise=True)) if len(points) else 0.0


def contributions(values: ArrayLike, reference: ArrayLike) -> Array:
    """What each point `(n,)` alone adds to the hypervolume; 0 for dominated ones."""
    points = np.asarray(values, dtype=float)
    ref = np.asarray(reference, dtype=float)
    out = np.zeros(len(points))
    inside = (points > ref).all(1)
    if points.shape[1] == 1:  # moocore asks for two
        rest = np.sort(points[inside, 0])[-2:-1]
        out[points[:, 0].argmax()] = points.max() - max([ref[0], *rest]) if inside.any() else 0.0
    elif inside.any():
        out[inside] = moocore.hv_contributions(points[inside], ref=ref, maximise=True)
    return out


def fronts(values: ArrayLike) -> Iterator[NDArray[np.intp]]:
    """Indices of the nondominated points, then of those that are so among the rest, and so on."""
    points = np.asarray(values, dtype=float)
    left = np.arange(len(points))
    while len(left):
        mask = nondominated(points[left])
        yield left[mask]
        left = left[~mask]


def ranked(values: ArrayLike, reference: ArrayLike) -> NDArray[np.intp]:
    """Indices `(n,)`, the best first: front after front, inside a front by hypervolume contribution."""
    points = np.asarray(values, dtype=float)
    order = [
        front[np.argsort(-contributions(points[front], reference), kind="stable")]
        for front in fronts(points)
    ]
    return np.concatenate([np.zeros(0, dtype=np.intp), *order])


def reference_point(values: ArrayLike, margin: float = 0.1) -> Array:
    """The worst of each objective over known points, less `margin` of its range (`margin` where all are equal)."""
    points = np.asarray(values, dtype=float)
    spread = np.ptp(points, axis=0)
    return np.asarray(points.min(0) - margin * np.where(spread > 0, spread, 1.0))


def normalised(values: ArrayLike) -> Array:
    """Each objective scaled to [0, 1] over the points; one that does not vary becomes 1."""
    points = np.asarray(values, dtype=float)
    low, spread = points.min(0), np.ptp(points, axis=0)
    return np.where(spread > 0, (points - low) / np.where(spread > 0, spread, 1.0), 1.0)


def knee(values: ArrayLike) -> int:
    """The index of the point nearest to the ideal one (Euclidean, objectives scaled over the front)."""
    return int(np.linalg.norm(1 - normalised(values), axis=1).argmin())


def preferred(values: ArrayLike, weights: ArrayLike) -> int:
    """The index that a preference picks: least max_k lambda_k (1 - f_k), ties broken by the weighted sum.

    weights: lambda `(m,)`, non-negative; scaled to a sum of 1 (augmented Tchebycheff, Steuer & Choo 1983).
    """
    shortfall = (1 - normalised(values)) * (np.asarray(weights, dtype=float) / np.sum(weights))
    return int((shortfall.max(1) + 1e-3 * shortfall.sum(1)).argmin())
