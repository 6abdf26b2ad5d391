"""Dominance and hypervolume of points `(n, m)`, all m objectives maximised."""

from collections.abc import Iterator

import moocore
import numpy as np
from numpy.typing import ArrayLike, NDArray

from paretomerge.types import Array

BoolArray = NDArray[np.bool_]
IndexArray = NDArray[np.intp]


def nondominated(values: ArrayLike) -> BoolArray:
    """Find the points that no other point dominates.

    Args:
        values: Points, `(n, m)`.

    Returns:
        A mask, `(n,)`. It holds only the first of several equal points.

    Example:
        >>> nondominated([[1, 1], [1, 1], [0, 2]]).tolist()
        [True, False, True]
    """
    points = np.asarray(values, dtype=float)
    if not len(points):
        return np.zeros(0, dtype=bool)
    mask = moocore.is_nondominated(points, maximise=True)
    return np.asarray(mask, dtype=bool)


def nondominated_fronts(values: ArrayLike) -> Iterator[IndexArray]:
    """Sort points into fronts: the nondominated ones, the nondominated ones of the rest, and so on.

    Args:
        values: Points, `(n, m)`.

    Yields:
        The indices of each front, the best front first.
    """
    points = np.asarray(values, dtype=float)
    remaining = np.arange(len(points))
    while len(remaining):
        mask = nondominated(points[remaining])
        yield remaining[mask]
        remaining = remaining[~mask]


def hypervolume(values: ArrayLike, reference: ArrayLike) -> float:
    """Volume that is dominated by the points and dominates the reference point.

    Args:
        values: Points, `(n, m)`. A point that does not exceed the reference in every objective adds
            nothing.
        reference: The reference point, `(m,)`.

    Returns:
        The hypervolume, in the product of the units of the objectives.

    Example:
        >>> hypervolume([[2, 1], [1, 2]], [0, 0])
        3.0
    """
    points = np.asarray(values, dtype=float)
    ref = np.asarray(reference, dtype=float)
    if len(points):
        # A point level with the reference in one objective spans no volume.
        is_above = (points > ref).all(1)
        points = points[is_above]
    if not len(points):
        return 0.0
    volume = moocore.hypervolume(points, ref=ref, maximise=True)
    return float(volume)


class RunningHypervolume:
    """The hypervolume of points that come one after another.

    Each costs the dominance of one point; only one that joins the front costs a hypervolume.

    Args:
        reference: The reference point, `(m,)`, all objectives maximised.

    Attributes:
        volume: The hypervolume of the points so far.

    Example:
        >>> running = RunningHypervolume([0, 0])
        >>> [running.add(point) for point in ([2, 1], [1, 1], [1, 2])]
        [2.0, 2.0, 3.0]
    """

    def __init__(self, reference: ArrayLike) -> None:
        self.volume = 0.0
        self._reference = np.asarray(reference, dtype=float)
        self._front: Array = np.empty((0, len(self._reference)))

    def add(self, point: ArrayLike) -> float:
        """Add a point.

        Args:
            point: `(m,)`.

        Returns:
            The hypervolume with it.
        """
        new = np.asarray(point, dtype=float)
        # Equal points count as dominated: they add nothing.
        is_dominated = (self._front >= new).all(1).any()
        if is_dominated or not (new > self._reference).all():
            return self.volume
        dominates = (self._front <= new).all(1)
        self._front = np.vstack([self._front[~dominates], new])
        self.volume = hypervolume(self._front, self._reference)
        return self.volume


def hypervolume_contributions(values: ArrayLike, reference: ArrayLike) -> Array:
    """The hypervolume that each point alone adds.

    Args:
        values: Points, `(n, m)`.
        reference: The reference point, `(m,)`.

    Returns:
        Contributions, `(n,)`; 0 for dominated points.
    """
    points = np.asarray(values, dtype=float)
    ref = np.asarray(reference, dtype=float)
    contributions = np.zeros(len(points))
    inside = (points > ref).all(1)
    if not inside.any():
        return contributions
    # moocore needs two objectives. With one, only the best point adds to the hypervolume: its
    # distance to the second best.
    if points.shape[1] == 1:
        best = points.argmax()
        others = np.delete(points, best)
        # Two equal best points add nothing.
        second_best = others.max(initial=ref[0])
        contributions[best] = points.max() - second_best
        return contributions
    contributions[inside] = moocore.hv_contributions(
        points[inside],
        ref=ref,
        maximise=True,
    )
    return contributions


def reference_point(values: ArrayLike, margin: float = 0.1) -> Array:
    """A reference point for the hypervolume: the worst of each objective, less a margin.

    Args:
        values: Points, `(n, m)`.
        margin: The margin as a share of each objective's range; the margin itself where all values
            of an objective are equal.

    Returns:
        The reference point, `(m,)`.
    """
    points = np.asarray(values, dtype=float)
    ranges = np.ptp(points, axis=0)
    # Without a margin, no point would exceed the reference in an objective that is constant, and
    # every hypervolume would be 0.
    ranges = np.where(ranges > 0, ranges, 1.0)
    worst = points.min(0)
    return np.asarray(worst - margin * ranges)
