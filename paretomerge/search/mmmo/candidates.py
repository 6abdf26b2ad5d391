"""Candidates for the maximum of an acquisition function.

Starting points (`scatter`) are moved by gradients along continuous coordinates (`climb`) and by
changes of discrete parameters (`switch`), and may be crossed with elites (`cross`).
"""

import math
import warnings

import numpy as np
import torch
from botorch.generation.gen import gen_candidates_scipy
from numpy.random import Generator
from torch import Tensor

from paretomerge.search.encoding import INACTIVE, Encoding
from paretomerge.search.mmmo.acquisition import Acquisition, evaluate
from paretomerge.types import Array

# Coordinates that are moved at a time near an elite, on average: larger moves fail in wide spaces.
_MOVED_COORDINATES = 20
# Standard deviations of such moves, drawn log-uniformly between these.
_MIN_MOVE, _MAX_MOVE = 0.01, 0.3
# Elites are recombined and redrawn where the share of discrete coordinates is larger. Where it is
# smaller, that did not help.
_MOSTLY_DISCRETE = 0.5
_SWITCH_ROUNDS = 4


def scatter(encoding: Encoding, elites: Array, n: int, rng: Generator) -> Array:
    """Starting points: half of them uniform, half near elites.

    Args:
        encoding: Between parameters and points.
        elites: `(e, d)`, the best trials.
        n: Number of points.
        rng: Random generator.

    Returns:
        `(n, d)`, projected.
    """
    d = encoding.d
    n_uniform = n // 2
    n_near = n - n_uniform
    uniform = rng.random((n_uniform, d))
    chosen = rng.integers(len(elites), size=n_near)
    near = elites[chosen]
    probability = min(0.5, _MOVED_COORDINATES / d)
    lowest = math.log(_MIN_MOVE)
    highest = math.log(_MAX_MOVE)
    log_std = rng.uniform(lowest, highest, (n_near, 1))
    std = np.exp(log_std)
    shape = near.shape
    move = std * rng.standard_normal(shape)
    is_moved = rng.random(shape) < probability
    is_discrete = encoding.discrete
    # Rounding would undo small moves of discrete coordinates.
    step = move * is_moved * ~is_discrete
    near = near + step
    if is_discrete.mean() > _MOSTLY_DISCRETE:
        recombined = recombine(encoding, near, elites, rng)
        near = redraw(encoding, recombined, rng)
    points = np.concatenate([uniform, near])
    return encoding.project(points)


def recombine(
    encoding: Encoding,
    points: Array,
    elites: Array,
    rng: Generator,
) -> Array:
    """Copy discrete parameters from an elite to every second point, each with probability 1/2.

    Args:
        encoding: Between parameters and points.
        points: `(n, d)`.
        elites: `(e, d)`.
        rng: Random generator.

    Returns:
        `(n, d)`.
    """
    points = points.copy()
    # A view: writing into a child changes `points`.
    children = points[::2]
    chosen = rng.integers(len(elites), size=len(children))
    partners = elites[chosen]
    discrete = encoding.discrete_columns
    for child, partner in zip(children, partners, strict=True):
        for columns in discrete:
            if rng.random() < 0.5:
                child[columns] = partner[columns]
    return points


def redraw(encoding: Encoding, points: Array, rng: Generator) -> Array:
    """Draw some discrete parameters of each point again.

    Their number is k with probability 2^-(k+1). Inactive categorical parameters are always drawn,
    in case they become active.

    Args:
        encoding: Between parameters and points.
        points: `(n, d)`.
        rng: Random generator.

    Returns:
        `(n, d)`, not projected.
    """
    points = points.copy()
    discrete = encoding.discrete_columns
    n_discrete = len(discrete)
    # NumPy's geometric distribution starts at 1.
    draws = rng.geometric(0.5, len(points))
    counts = draws - 1
    for point, count in zip(points, counts, strict=True):
        size = min(int(count), n_discrete)
        chosen = rng.choice(n_discrete, size, replace=False)
        for i, columns in enumerate(discrete):
            width = columns.stop - columns.start
            is_fixed = point[columns] == INACTIVE
            # A number may have this value where it is active, but a choice may not.
            is_inactive = width > 1 and is_fixed.all()
            if i in chosen or is_inactive:
                point[columns] = rng.random(width)
    return points


def climb(
    encoding: Encoding, acquisition: Acquisition, start: Array, steps: int
) -> Array:
    """Maximise the acquisition from each point by L-BFGS-B along active continuous coordinates.

    Args:
        encoding: Between parameters and points.
        acquisition: The function to maximise.
        start: `(n, d)`, projected.
        steps: Greatest number of iterations.

    Returns:
        `(n, d)`; discrete coordinates are unchanged.
    """
    if encoding.discrete.all() or not len(start):
        return start
    fixed = {}
    for column in np.flatnonzero(encoding.discrete):
        values = start[:, None, column]
        fixed[int(column)] = torch.from_numpy(values)

    def on_active_coordinates(points: Tensor) -> Tensor:
        # Inactive coordinates return to their place afterwards, so they must not have a gradient.
        x = points.detach()[:, 0].numpy()
        mask = encoding.active_mask(x)
        active = torch.from_numpy(mask)
        active = active[:, None]
        projected = torch.where(active, points, INACTIVE)
        return acquisition(projected)

    # A line search that fails warns, although the earlier steps are used.
    with warnings.catch_warnings(record=True):
        points, _ = gen_candidates_scipy(
            torch.from_numpy(start[:, None]),
            on_active_coordinates,
            lower_bounds=0.0,
            upper_bounds=1.0,
            fixed_features=fixed,
            options={"maxiter": steps},
        )
    climbed = points.detach().numpy()
    return np.asarray(climbed[:, 0])


def switch(
    encoding: Encoding,
    acquisition: Acquisition,
    points: Array,
    rng: Generator,
) -> Array:
    """Improve each point by changes of one discrete parameter at a time, the best change first.

    Args:
        encoding: Between parameters and points.
        acquisition: The function to increase.
        points: `(n, d)`, projected.
        rng: Chooses among the changes where there are many.

    Returns:
        `(k, d)`, without the points that no change improves.
    """
    improved = []
    for start in points:
        point = start
        for _ in range(_SWITCH_ROUNDS):
            neighbours = encoding.neighbours(point, rng)
            if not len(neighbours):
                break
            # The point itself comes first, so that it stays where no neighbour is better.
            alternatives = np.concatenate([point[None], neighbours])
            values = evaluate(acquisition, alternatives)
            best = int(values.argmax())
            if best == 0:
                break
            point = neighbours[best - 1]
        if point is not start:
            improved.append(point)
    stacked = np.asarray(improved)
    # Where no point was improved, the array would have the shape (0,).
    return stacked.reshape(-1, encoding.d)


def cross(
    candidates: Array,
    elites: Array,
    crossover: float,
    differential: float,
    rng: Generator,
) -> Array:
    """Weak-to-strong crossing of MM-MO: differential evolution with elites.

    Source: Li et al. 2024 (arXiv 2407.00487), sec. 3.2, eq. 5 and 6.

    Args:
        candidates: `(n, d)`, the weak points.
        elites: `(e, d)`, the strong points.
        crossover: CR, the probability that a coordinate comes from the mutant.
        differential: F, the weight of the difference of two elites.
        rng: Random generator.

    Returns:
        `(n, d)`, not projected; none if there are fewer than three elites.
    """
    if len(elites) < 3:
        return candidates[:0]
    children = []
    for candidate in candidates:
        chosen = rng.choice(len(elites), 3, replace=False)
        a, b, c = elites[chosen]
        # Eq. 5: v = a + F (b - c).
        mutant = a + differential * (b - c)
        # Eq. 6: a coordinate is taken from v with probability CR, and at least one is.
        from_mutant = rng.random(candidate.size) < crossover
        always = rng.integers(candidate.size)
        from_mutant[always] = True
        child = np.where(from_mutant, mutant, candidate)
        children.append(child)
    return np.asarray(children)
