"""Evolver: differential evolution of merge coefficients (Du et al. 2024, arXiv 2406.12208).

Du et al. evolve the weights of whole models: mutant = a + F (b - c), crossed with its parent, which
it replaces if it scores better. Their first population is the models to be merged. Here the
population is points of the search space. Where the merge is linear in its coefficients (task
arithmetic), a difference of two points is the difference of the two merged models, so the mutants
are those of the paper, and nothing has to be stored but the trials.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from paretomerge.errors import ConfigError
from paretomerge.search.baselines.columns import parameter_widths
from paretomerge.search.encoding import Indices
from paretomerge.search.options import check_options
from paretomerge.search.point_sampler import Archive, crowding_order
from paretomerge.types import Array

_CHILDREN = 8  # of one parent; the sampler takes the first that is new
_MIN_POPULATION = 4  # a parent and three others


@dataclass(frozen=True)
class EvolverProposer:
    """DE/rand/1/bin with the one-to-one selection of GDE3 (Kukkonen & Lampinen 2005).

    A child that dominates its parent replaces it, and a dominated child is dropped. Where neither
    dominates, both stay until the generation ends; then the population is cut to size by
    nondominated sorting and crowding distance. With one objective this is the greedy selection of
    the paper. With several it keeps a front, where a weighted sum would find one point.

    Trial number t challenges member t modulo `population_size`, so the population is a function of
    the trials alone and survives a restart.

    Attributes:
        population_size: The number of members. The first ones are the first trials that succeed.
        differential: The scale F of a difference, in (0, 2].
        crossover: The probability CR, in [0, 1], that a parameter comes from the mutant.

    Raises:
        ConfigError: An option is out of its range.
    """

    population_size: int = 12
    differential: float = 0.6
    crossover: float = 0.7

    def __post_init__(self) -> None:
        check_options("evolver", self)
        if self.population_size < _MIN_POPULATION:
            raise ConfigError(
                f"evolver: expected a population_size of {_MIN_POPULATION} or more, "
                f"got {self.population_size}"
            )
        if not (0 < self.differential <= 2 and 0 <= self.crossover <= 1):
            raise ConfigError(
                f"evolver: expected 0 < differential <= 2 and 0 <= crossover <= 1, "
                f"got {self.differential} and {self.crossover}"
            )

    def propose(self, archive: Archive, rng: Generator) -> Array:
        """Create children of the parent whose turn it is.

        Args:
            archive: The trials so far.
            rng: The source of randomness.

        Returns:
            Points `(k, d)`; none while the population is incomplete.
        """
        members = self.members(archive)
        if len(members) < self.population_size:
            return np.zeros((0, archive.encoding.d))
        x = archive.x[members]
        parent = archive.number % self.population_size
        widths = parameter_widths(archive.encoding)
        children = []
        for _ in range(_CHILDREN):
            child = self._child(x, parent, widths, rng)
            children.append(child)
        return np.stack(children)

    def members(self, archive: Archive) -> list[int]:
        """Replay the trials and return the current population.

        Args:
            archive: The trials so far.

        Returns:
            Indices into the archive. Between two generations there may be more of them than
            `population_size`.
        """
        members: list[int] = []
        challenges = 0
        for index in archive.usable.tolist():
            if len(members) < self.population_size:
                members.append(index)
                continue
            trial = archive.observations.trials[index]
            # The member that the trial challenged, by the rule of `propose`.
            slot = trial.number % self.population_size
            child = archive.y[index]
            parent = archive.y[members[slot]]
            if (child >= parent).all():
                members[slot] = index
            elif not (parent >= child).all():
                members.append(index)
            challenges += 1
            is_generation_over = challenges % self.population_size == 0
            if is_generation_over:
                members = self._truncated(members, archive.y)
        return members

    def _truncated(self, members: Sequence[int], y: Array) -> list[int]:
        """The best `population_size` members, in their order."""
        member_values = y[list(members)]
        order = crowding_order(member_values)
        # Sorted, because a member's place decides which trials challenge it.
        best = sorted(order[: self.population_size])
        return [members[i] for i in best]

    def _child(self, x: Array, parent: int, widths: Indices, rng: Generator) -> Array:
        """Mutation and binomial crossover of whole parameters (Storn & Price 1997, eq. 2-4)."""
        n_parameters = len(widths)
        others = [i for i in range(len(x)) if i != parent]
        # Three different members, or b - c would be 0.
        chosen = rng.choice(others, 3, replace=False)
        a, b, c = x[chosen]
        difference = b - c
        mutant = a + self.differential * difference
        from_mutant = rng.random(n_parameters) < self.crossover
        # Eq. 4: at least one parameter comes from the mutant, or the child could equal its parent.
        always = rng.integers(n_parameters)
        from_mutant[always] = True
        # A choice has several columns, which are inherited together.
        column_mask = np.repeat(from_mutant, widths)
        inside = _reflect(mutant)
        return np.where(column_mask, inside, x[parent])


def _reflect(x: Array) -> Array:
    """Reflect coordinates into [0, 1]. Clipping would pile the mutants up at the bounds."""
    # Reflection at 0 and at 1 repeats with period 2: a triangle wave.
    position = np.abs(x) % 2
    distance_to_one = np.abs(1 - position)
    reflected: Array = 1 - distance_to_one
    return reflected
