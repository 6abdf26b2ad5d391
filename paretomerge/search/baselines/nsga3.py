"""NSGA-III (Deb & Jain 2014, IEEE TEVC 18(4)) on a function that is cheap, such as a surrogate.

Optuna's `NSGAIIISampler` does this on merges. Inside one proposal it is far too slow, because it
makes a trial of every point.
"""

from collections.abc import Callable
from itertools import combinations
from math import comb

import moocore
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from paretomerge.pareto.preference import divisors
from paretomerge.search.baselines.columns import numeric_columns, parameter_widths
from paretomerge.search.encoding import Encoding, Indices
from paretomerge.types import Array

Objectives = Callable[[Array], Array]
"""Points `(k, d)` -> values `(k, m)`, all maximised."""

_MAX_DIRECTIONS = 60
_MIN_POPULATION = 40
# Distribution index of crossover and mutation: the larger, the nearer children are to parents.
_DISTRIBUTION_INDEX = 20.0
_EXPONENT = 1 / (_DISTRIBUTION_INDEX + 1)


def pareto_front(
    objectives: Objectives,
    encoding: Encoding,
    start: Array,
    rng: Generator,
    generations: int = 40,
) -> Array:
    """Approximate the Pareto front of a cheap function.

    Args:
        objectives: The function, all m objectives maximised.
        encoding: The space.
        start: Points `(n, d)` that the first population contains, n >= 1.
        rng: The source of randomness.
        generations: How many generations to run.

    Returns:
        The nondominated points `(p, d)` of the last population, all valid in the space.
    """
    first_values = objectives(start[:1])
    m = first_values.shape[1]
    directions = reference_directions(m, _MAX_DIRECTIONS)
    size = max(len(directions), _MIN_POPULATION)
    random_points = rng.random((size, encoding.d))
    others = encoding.project(random_points)
    x = np.concatenate([start, others])
    y = objectives(x)
    for _ in range(generations):
        selected = select(y, size, directions, rng)
        x = x[selected]
        y = y[selected]
        moved = _children(encoding, x, rng)
        children = encoding.project(moved)
        x = np.concatenate([x, children])
        y = np.concatenate([y, objectives(children)])
    is_nondominated = moocore.is_nondominated(y, maximise=True, keep_weakly=True)
    mask = np.asarray(is_nondominated, dtype=bool)
    front = x[mask]
    return np.unique(front, axis=0)


def reference_directions(m: int, max_directions: int) -> Array:
    """Spread directions evenly over the unit simplex (Das & Dennis 1998).

    With p divisions there are C(p + m - 1, m - 1) directions, one for each way of placing m - 1
    bars among p + m - 1 positions; the gaps between the bars are the coordinates. For six
    objectives two layers of directions would be denser.

    Args:
        m: The number of objectives.
        max_directions: An upper limit, m or more.

    Returns:
        `(h, m)` with rows that sum to 1, h <= `max_directions`.
    """
    divisions = largest_divisions(m, max_directions)
    n_positions = divisions + m - 1
    n_bars = m - 1
    placements = list(combinations(range(n_positions), n_bars))
    n_directions = len(placements)
    bars = np.array(placements, dtype=float)
    # For one objective there is one placement of no bars, and the shape must be (1, 0).
    bars = bars.reshape(n_directions, n_bars)
    left_edge = np.full((n_directions, 1), -1.0)
    last = float(n_positions)
    right_edge = np.full((n_directions, 1), last)
    edges = np.concatenate([left_edge, bars, right_edge], axis=1)
    gaps = np.diff(edges, axis=1) - 1
    return gaps / divisions


def largest_divisions(m: int, max_directions: int) -> int:
    """Compute how finely the simplex can be divided (Das & Dennis 1998).

    Args:
        m: The number of objectives.
        max_directions: An upper limit of the number of reference directions.

    Returns:
        The largest p with C(p + m - 1, m - 1) <= `max_directions`, but at least 1; 1 for one
        objective.
    """
    divisions = 1
    if m == 1:
        return divisions
    # The count for one division more.
    while comb(divisions + m, m - 1) <= max_directions:
        divisions += 1
    return divisions


def select(
    y: Array,
    size: int,
    directions: Array,
    rng: Generator,
) -> Indices:
    """Select the next population: whole fronts, then the last one by niches (alg. 1, 3 and 4).

    Args:
        y: Values `(n, m)`, all maximised.
        size: The number of members to select.
        directions: The reference directions `(h, m)`.
        rng: The source of randomness.

    Returns:
        The indices of the selected members.
    """
    ranks = np.asarray(moocore.pareto_rank(y, maximise=True))
    n_selected = min(size, len(y))
    last_rank = np.sort(ranks)[n_selected - 1]
    is_accepted = ranks < last_rank
    is_last = ranks == last_rank
    accepted = np.flatnonzero(is_accepted)
    last_front = np.flatnonzero(is_last)
    if len(accepted) + len(last_front) <= size:
        return np.concatenate([accepted, last_front])
    niche, distance = _associate(y, ranks, directions)
    accepted_niches = niche[accepted]
    counts = np.bincount(accepted_niches, minlength=len(directions))
    selected = accepted.tolist()
    candidates = last_front.tolist()
    while len(selected) < size:
        open_niches = np.unique(niche[candidates])
        open_counts = counts[open_niches]
        is_emptiest = open_counts == open_counts.min()
        emptiest = open_niches[is_emptiest]
        chosen_niche = rng.choice(emptiest)
        members = [i for i in candidates if niche[i] == chosen_niche]
        # Alg. 4: the first member of a niche is nearest to its direction, the others are random.
        if counts[chosen_niche] == 0:
            member_distance = distance[members]
            position = member_distance.argmin()
        else:
            position = rng.integers(len(members))
        chosen = members[int(position)]
        selected.append(chosen)
        candidates.remove(chosen)
        counts[chosen_niche] += 1
    return np.array(selected, dtype=np.intp)


def _associate(
    y: Array, ranks: NDArray[np.int_], directions: Array
) -> tuple[Indices, Array]:
    """The nearest direction of each point and the distance to its line, both `(n,)` (alg. 3).

    Objectives are scaled by the extent of the first front.
    """
    ideal = y.max(0)
    is_first = ranks == ranks.min()
    first_front = y[is_first]
    extent = ideal - first_front.min(0)
    scale = divisors(extent)
    cost = (ideal - y) / scale
    lengths = np.linalg.norm(directions, axis=1, keepdims=True)
    unit = directions / lengths
    along = cost @ unit.T
    squared_cost = cost**2
    squared_norm = squared_cost.sum(1)
    squared_along = along**2
    squared_distance = squared_norm[:, None] - squared_along
    # Rounding may make a distance of 0 negative.
    clipped = np.maximum(squared_distance, 0)
    distance = np.sqrt(clipped)
    niche = distance.argmin(1)
    return niche, distance.min(1)


def _children(
    encoding: Encoding,
    x: Array,
    rng: Generator,
) -> Array:
    """As many children as parents x `(n, d)`, by crossover and mutation of whole parameters."""
    widths = parameter_widths(encoding)
    is_choice = ~numeric_columns(encoding)
    n = len(x)
    per_parameter = (n, len(widths))
    first = rng.permutation(n)
    second = rng.permutation(n)
    a = x[first]
    b = x[second]
    u_crossover = rng.random(x.shape)
    blended = _sbx(a, b, u_crossover)
    from_b = np.where(is_choice, b, blended)
    is_from_a = rng.random(per_parameter) < 0.5
    is_from_a = np.repeat(is_from_a, widths, axis=1)
    crossed = np.where(is_from_a, a, from_b)
    u_mutation = rng.random(x.shape)
    moved = crossed + _polynomial_step(u_mutation)
    # A mutated choice is drawn anew: the projection takes the largest of its uniform columns.
    mutant = np.where(is_choice, u_mutation, moved)
    # One parameter per child on average.
    rate = 1 / len(widths)
    is_mutated = rng.random(per_parameter) < rate
    is_mutated = np.repeat(is_mutated, widths, axis=1)
    return np.where(is_mutated, mutant, crossed)


def _sbx(
    a: Array,
    b: Array,
    u: Array,
) -> Array:
    """Simulated binary crossover with uniform numbers u (Deb & Agrawal 1995)."""
    doubled = 2 * u
    doubled_rest = 2 * (1 - u)
    contracting = doubled**_EXPONENT
    expanding = doubled_rest**-_EXPONENT
    beta = np.where(u < 0.5, contracting, expanding)
    from_a = (1 + beta) * a
    from_b = (1 - beta) * b
    total = from_a + from_b
    return total / 2


def _polynomial_step(u: Array) -> Array:
    """The step of polynomial mutation with uniform numbers u (Deb & Goyal 1996)."""
    doubled = 2 * u
    doubled_rest = 2 * (1 - u)
    down = doubled**_EXPONENT - 1
    up = 1 - doubled_rest**_EXPONENT
    return np.where(u < 0.5, down, up)
