"""Where to look for the acquisition's best point: spread, near the elites, uphill, switched, crossed."""

import math
import warnings

import numpy as np
import torch
from botorch.generation.gen import gen_candidates_scipy
from numpy.typing import NDArray

from paretomerge.search.acquisition import Acquisition, values
from paretomerge.search.encoding import AT_REST, Encoding

Array = NDArray[np.float64]
_MOVED = 20  # coordinates moved at a time, on average, near an elite: more lead nowhere in wide spaces
_REACH = (0.01, 0.3)  # standard deviations of such moves


def scatter(encoding: Encoding, elites: Array, n: int, rng: np.random.Generator) -> Array:
    """Where to start climbing, `(n, d)`: half spread over the cube, half near the elites."""
    spread = rng.random((n // 2, encoding.d))
    near = elites[rng.integers(len(elites), size=n - n // 2)]
    share = min(0.5, _MOVED / encoding.d)
    reach = np.exp(rng.uniform(math.log(_REACH[0]), math.log(_REACH[1]), (len(near), 1)))
    moved = near + reach * rng.standard_normal(near.shape) * (rng.random(near.shape) < share) * ~encoding.discrete
    return encoding.settle(np.concatenate([spread, moved]))


def climb(encoding: Encoding, acquisition: Acquisition, start: Array, steps: int) -> Array:
    """`start` `(n, d)`, each moved uphill along the continuous coordinates that count; all others stay."""
    if encoding.discrete.all() or not len(start):
        return start
    fixed = {int(i): torch.from_numpy(start[:, None, i]) for i in np.flatnonzero(encoding.discrete)}

    def rested(points: torch.Tensor) -> torch.Tensor:
        """The acquisition without a slope along what does not count: such moves are taken back, and must not steer."""
        counting = torch.from_numpy(encoding.counting(points.detach()[:, 0].numpy()))[:, None]
        return acquisition(torch.where(counting, points, AT_REST))

    with warnings.catch_warnings(record=True):  # a line search that gives up says so, and has still climbed
        points, _ = gen_candidates_scipy(
            torch.from_numpy(start[:, None]),
            rested,
            lower_bounds=0.0,
            upper_bounds=1.0,
            fixed_features=fixed,
            options={"maxiter": steps},
        )
    return np.asarray(points.detach().numpy()[:, 0])


def switch(encoding: Encoding, acquisition: Acquisition, points: Array, rng: np.random.Generator) -> Array:
    """`points` `(n, d)`, each with the one discrete parameter changed that helps most; those that nothing helps are left out."""
    better = []
    for point in points:
        neighbours = encoding.neighbours(point, rng)
        if len(neighbours):
            ranked = values(acquisition, np.concatenate([point[None], neighbours]))
            if (best := int(ranked.argmax())) > 0:
                better.append(neighbours[best - 1])
    return np.asarray(better).reshape(-1, encoding.d)


def cross(candidates: Array, elites: Array, crossover: float, differential: float, rng: np.random.Generator) -> Array:
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
