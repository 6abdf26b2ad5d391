"""Where to look for the acquisition's best point: spread, near the elites, between them, uphill, switched, crossed."""

import math
import warnings

import numpy as np
import torch
from botorch.generation.gen import gen_candidates_scipy
from numpy.typing import NDArray

from paretomerge.search.encoding import INACTIVE, Encoding
from paretomerge.search.mmmo.acquisition import Acquisition, values

Array = NDArray[np.float64]
_MOVED = (
    20  # coordinates moved at a time, on average, near an elite: more lead nowhere in wide spaces
)
_REACH = (0.01, 0.3)  # standard deviations of such moves
_CHOICES = (
    0.5  # of the coordinates: above, elites are mated and redrawn, too; below, that brought nothing
)
_ROUNDS = 4  # of switches, one choice or step at a time


def scatter(encoding: Encoding, elites: Array, n: int, rng: np.random.Generator) -> Array:
    """Where to start climbing, `(n, d)`: half spread over the cube, half near the elites."""
    spread = rng.random((n // 2, encoding.d))
    near = elites[rng.integers(len(elites), size=n - n // 2)]
    share = min(0.5, _MOVED / encoding.d)
    reach = np.exp(rng.uniform(math.log(_REACH[0]), math.log(_REACH[1]), (len(near), 1)))
    moved = (
        near
        + reach
        * rng.standard_normal(near.shape)
        * (rng.random(near.shape) < share)
        * ~encoding.discrete
    )
    if encoding.discrete.mean() > _CHOICES:
        moved = redrawn(encoding, mated(encoding, moved, elites, rng), rng)
    return encoding.project(np.concatenate([spread, moved]))


def mated(encoding: Encoding, points: Array, elites: Array, rng: np.random.Generator) -> Array:
    """Every other of `points` `(n, d)` with about half of its discrete parameters from an elite: choices have no way between them."""
    points = points.copy()
    for point, other in zip(
        points[::2], elites[rng.integers(len(elites), size=len(points[::2]))], strict=True
    ):
        for columns in encoding.discrete_columns:
            if rng.random() < 0.5:
                point[columns] = other[columns]
    return points


def redrawn(encoding: Encoding, points: Array, rng: np.random.Generator) -> Array:
    """`points` `(n, d)` with none, one, two, ... of their discrete parameters at random, half as often each time; and with all that are
    at rest, should they begin to count.
    """
    points, places = points.copy(), encoding.discrete_columns
    for point, changes in zip(points, rng.geometric(0.5, len(points)) - 1, strict=True):
        chosen = set(
            rng.choice(len(places), min(int(changes), len(places)), replace=False).tolist()
        )
        for i, columns in enumerate(places):
            if i in chosen or (
                columns.stop - columns.start > 1 and (point[columns] == INACTIVE).all()
            ):
                point[columns] = rng.random(columns.stop - columns.start)
    return points


def climb(encoding: Encoding, acquisition: Acquisition, start: Array, steps: int) -> Array:
    """`start` `(n, d)`, each moved uphill along the continuous coordinates that count; all others stay."""
    if encoding.discrete.all() or not len(start):
        return start
    fixed = {int(i): torch.from_numpy(start[:, None, i]) for i in np.flatnonzero(encoding.discrete)}

    def rested(points: torch.Tensor) -> torch.Tensor:
        """The acquisition without a slope along what does not count: such moves are taken back, and must not steer."""
        counting = torch.from_numpy(encoding.active_mask(points.detach()[:, 0].numpy()))[:, None]
        return acquisition(torch.where(counting, points, INACTIVE))

    with warnings.catch_warnings(
        record=True
    ):  # a line search that gives up says so, and has still climbed
        points, _ = gen_candidates_scipy(
            torch.from_numpy(start[:, None]),
            rested,
            lower_bounds=0.0,
            upper_bounds=1.0,
            fixed_features=fixed,
            options={"maxiter": steps},
        )
    return np.asarray(points.detach().numpy()[:, 0])


def switch(
    encoding: Encoding, acquisition: Acquisition, points: Array, rng: np.random.Generator
) -> Array:
    """`points` `(n, d)`, each with one discrete parameter after the other changed as it helps most; those that nothing helps are left
    out.
    """
    better = []
    for start in points:
        point = start
        for _ in range(_ROUNDS):
            neighbours = encoding.neighbours(point, rng)
            if not len(neighbours):
                break
            best = int(values(acquisition, np.concatenate([point[None], neighbours])).argmax())
            if best == 0:
                break
            point = neighbours[best - 1]
        if point is not start:
            better.append(point)
    return np.asarray(better).reshape(-1, encoding.d)


def cross(
    candidates: Array,
    elites: Array,
    crossover: float,
    differential: float,
    rng: np.random.Generator,
) -> Array:
    """Weak-to-strong (Li et al. 2024, sec. 3.2, eq. 5-6): v = a + F (b - d), taken per coordinate with CR.

    candidates `(n, d)`, elites `(e, d)` -> `(n, d)`, or none where there are not three elites to draw from.
    """
    if len(elites) < 3:
        return candidates[:0]
    children = []
    for candidate in candidates:
        a, b, d = elites[rng.choice(len(elites), 3, replace=False)]
        taken = rng.random(candidate.size) < crossover
        taken[rng.integers(candidate.size)] = True
        children.append(np.where(taken, a + differential * (b - d), candidate))
    return np.asarray(children)
