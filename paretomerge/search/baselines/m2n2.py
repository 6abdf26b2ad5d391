"""M2N2: competition and attraction (Abrantes, Lange & Tang 2025, arXiv 2508.16204).

Every example is a resource of limited capacity that the members of an archive share if they solve
it. A member that solves what few others solve has a high fitness, so the archive stays diverse
without a measure of distance. The second parent is chosen for its strength where the first is weak.
A child mixes its parents in one ratio before a split point and in the opposite ratio after it. In
the paper the split runs along the model's tensors; here it runs along the parameters in their
order. The mix is linear, not spherical: a sphere has a meaning for weights, not for coefficients.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from paretomerge.errors import ConfigError
from paretomerge.search.baselines.columns import parameter_widths
from paretomerge.search.encoding import Indices
from paretomerge.search.options import check_options
from paretomerge.search.point_sampler import Archive
from paretomerge.types import Array

_CHILDREN = 8  # per proposal; the sampler takes the first that is new
_EPSILON = 1e-9


@dataclass(frozen=True)
class M2N2Proposer:
    """Crossover of members that compete for examples.

    Per-example scores are read from the trials' user attribute `scores`. An objective without them
    (a function of your own, sparsity) counts as one example, its values scaled to [0, 1]. The
    sampler then still works, but has less to distinguish the members by.

    Attributes:
        archive_size: The number of members; the one of least fitness leaves when one more comes.
        mutation_scale: The standard deviation of a number's mutation, as a share of its range.
        mutation_rate: The probability that a parameter is mutated, in [0, 1].

    Raises:
        ConfigError: An option is out of its range.
    """

    archive_size: int = 15
    mutation_scale: float = 0.15
    mutation_rate: float = 0.3

    def __post_init__(self) -> None:
        check_options("m2n2", self)
        is_valid = self.archive_size >= 2 and self.mutation_scale >= 0
        if not is_valid or not 0 <= self.mutation_rate <= 1:
            raise ConfigError(
                f"m2n2: expected archive_size >= 2, mutation_scale >= 0 and mutation_rate in "
                f"[0, 1], got {self.archive_size}, {self.mutation_scale} and {self.mutation_rate}"
            )

    def propose(self, archive: Archive, rng: Generator) -> Array:
        """Cross pairs of members.

        Args:
            archive: The trials so far.
            rng: The source of randomness.

        Returns:
            Children `(k, d)`; none while there are fewer than two usable trials.
        """
        if len(archive.usable) < 2:
            return np.zeros((0, archive.encoding.d))
        scores, capacity = example_scores(archive)
        members = survivors(scores, capacity, self.archive_size)
        trials = archive.usable[members]
        x = archive.x[trials]
        scores = scores[members]
        member_fitness = fitness(scores, capacity)
        widths = parameter_widths(archive.encoding)
        children = []
        for _ in range(_CHILDREN):
            first = _roulette(member_fitness, rng)
            attractiveness = attraction(scores, capacity, first)
            second = _roulette(attractiveness, rng)
            a = x[first]
            b = x[second]
            child = self._crossover(a, b, widths, rng)
            children.append(child)
        return np.stack(children)

    def _crossover(
        self,
        a: Array,
        b: Array,
        widths: Indices,
        rng: Generator,
    ) -> Array:
        """Split-point crossover (sec. 3.1), then mutation of some of the parameters."""
        n_parameters = len(widths)
        ratio = rng.random()
        split = rng.integers(n_parameters + 1)
        is_before_split = np.arange(n_parameters) < split
        share_of_a = np.where(is_before_split, ratio, 1 - ratio)
        is_mutated = rng.random(n_parameters) < self.mutation_rate
        noise = rng.standard_normal(len(a))
        # From one number per parameter to one per column.
        share_of_a = np.repeat(share_of_a, widths)
        is_mutated = np.repeat(is_mutated, widths)
        mutation = is_mutated * self.mutation_scale * noise
        share_of_b = 1 - share_of_a
        mixed = share_of_a * a + share_of_b * b
        return mixed + mutation


def example_scores(archive: Archive) -> tuple[Array, Array]:
    """Collect the scores of the n usable trials on every example of every objective.

    Args:
        archive: The trials so far.

    Returns:
        The scores `(n, examples)` in [0, 1], more is better, and the capacity `(examples,)` of each
        example. The capacities of one objective sum to 1, so that objectives have the same weight
        however many examples they have.
    """
    # The property is computed at each access, so it is read once.
    every_trial = archive.observations.example_scores
    trials = [every_trial[i] for i in archive.usable]
    y = archive.y[archive.usable]
    scores = []
    capacity = []
    for k, values in enumerate(y.T):
        per_trial = [objectives[k] for objectives in trials]
        objective_scores = _objective_scores(per_trial, values)
        n_examples = objective_scores.shape[1]
        scores.append(objective_scores)
        share = np.full(n_examples, 1 / n_examples)
        capacity.append(share)
    every_score = np.concatenate(scores, axis=1)
    return every_score, np.concatenate(capacity)


def _objective_scores(per_trial: Sequence[Array | None], y: Array) -> Array:
    """One objective's scores `(n, examples)` in [0, 1], more is better.

    A trial that a race stopped early has no per-example scores. A linear fit of the mean score to
    the value predicts them, the same on each example. Where no trial has them, or where
    they differ in number or are not finite, the values y `(n,)` count as one example.
    """
    has_scores = np.zeros(len(per_trial), dtype=bool)
    rows = []
    for i, row in enumerate(per_trial):
        if row is not None and len(row):
            has_scores[i] = True
            rows.append(row)
    lengths = {len(row) for row in rows}
    if len(lengths) != 1 or not np.isfinite(rows).all():
        column = y[:, None]
        return _scale(column)
    table = np.stack(rows)
    mean_score = table.mean(1)
    scored_y = y[has_scores]
    mean_value = scored_y.mean()
    centred = scored_y - mean_value
    variance = float(centred @ centred)
    covariance = float(centred @ mean_score)
    slope = covariance / max(variance, _EPSILON)
    difference = y - mean_value
    expected = mean_score.mean() + slope * difference
    n_examples = table.shape[1]
    column = expected[:, None]
    scores = np.repeat(column, n_examples, axis=1)
    # The fit may expect what no example can score.
    scores = scores.clip(table.min(), table.max())
    scores[has_scores] = table
    # Scores that fall as the value rises are errors: fewer is better.
    if slope < 0:
        scores = -scores
    return _scale(scores)


def _scale(table: Array) -> Array:
    """`table` scaled to [0, 1]; all ones where it does not vary."""
    low = table.min()
    high = table.max()
    if high > low:
        scaled: Array = (table - low) / (high - low)
        return scaled
    return np.ones_like(table)


def fitness(scores: Array, capacity: Array) -> Array:
    """Share every example's capacity among the members (Abrantes et al. 2025, sec. 3.2).

    Args:
        scores: `(n, examples)` in [0, 1].
        capacity: `(examples,)`.

    Returns:
        `(n,)`: sum over examples j of capacity_j * scores_ij / sum_i scores_ij.
    """
    # An example that no member solves must not divide by 0.
    total = scores.sum(0) + _EPSILON
    shares = scores * capacity / total
    member_fitness: Array = shares.sum(1)
    return member_fitness


def attraction(
    scores: Array,
    capacity: Array,
    first: int,
) -> Array:
    """Measure by how much each member is better than the first parent (sec. 3.3).

    Args:
        scores: `(n, examples)` in [0, 1].
        capacity: `(examples,)`.
        first: The index of the first parent.

    Returns:
        `(n,)`: the sum of the gains, which count more on examples that few members solve. 0 for the
        first parent; 1 for all others where none is better on any example.
    """
    total = scores.sum(0) + _EPSILON
    difference = scores - scores[first]
    gain = np.maximum(difference, 0)
    weighted_gain = gain * capacity / total
    attractiveness: Array = weighted_gain.sum(1)
    # Where no member is better than the first, any of them may be its mate.
    if not attractiveness.sum() > 0:
        attractiveness = np.ones(len(scores))
    # The first parent is no mate of its own.
    attractiveness[first] = 0
    return attractiveness


def survivors(
    scores: Array,
    capacity: Array,
    archive_size: int,
) -> list[int]:
    """Replay the archive: trials enter in their order, and the one of least fitness leaves.

    Args:
        scores: `(n, examples)` in [0, 1].
        capacity: `(examples,)`.
        archive_size: The most members.

    Returns:
        The members, as indices of the n trials.
    """
    members: list[int] = []
    for index in range(len(scores)):
        members.append(index)
        if len(members) > archive_size:
            member_fitness = fitness(scores[members], capacity)
            weakest = int(member_fitness.argmin())
            del members[weakest]
    return members


def _roulette(weights: Array, rng: Generator) -> int:
    """An index drawn in proportion to the weights."""
    total = weights.sum()
    # Without any weight all members are equally likely.
    probabilities = None
    if total > 0:
        probabilities = weights / total
    index = rng.choice(len(weights), p=probabilities)
    return int(index)
