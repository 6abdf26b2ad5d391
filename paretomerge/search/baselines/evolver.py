"""Differential evolution of the merge's coefficients: Evolver (Du et al. 2024, arXiv 2406.12208), for several objectives.

Du et al. evolve the weights of whole models: mutant = a + F (b - c), crossed with the parent, which it replaces if it
scores better. Their population begins with the models to be merged. Here it lives in the space of parameters: where the
merge is linear in its weights (task arithmetic), a difference of two points is the difference of the two merged models,
so the mutants are theirs; and nothing has to be kept but the trials.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from paretomerge.errors import ConfigError
from paretomerge.search.options import check_options
from paretomerge.search.point_sampler import Archive, crowding_order

Array = NDArray[np.float64]
_CHILDREN = 8  # the first that is new is taken


@dataclass(frozen=True)
class Evolver:
    """DE/rand/1/bin with the one-to-one selection of GDE3 (Kukkonen & Lampinen 2005).

    A child that dominates its parent takes its place, a dominated one is dropped, and where neither dominates both stay
    until the generation ends and the population is cut to size: front after front, then by crowding. A weighted sum would
    find one point; dominance keeps a front, and with one objective it is the greedy selection of the paper.

    population: how many; the first so many trials that did not fail. differential: F. crossover: CR.
    Trial number t challenges member t modulo `population`, so that the population follows from the trials alone.
    """

    population: int = 12
    differential: float = 0.6
    crossover: float = 0.7

    def __post_init__(self) -> None:
        check_options("evolver", self)
        if self.population < 4:
            raise ConfigError(f"evolver: expected a population of 4 or more, got {self.population}")
        if not (0 < self.differential <= 2 and 0 <= self.crossover <= 1):
            got = f"{self.differential} and {self.crossover}"
            raise ConfigError(
                f"evolver: expected 0 < differential <= 2 and 0 <= crossover <= 1, got {got}"
            )

    def propose(self, archive: Archive, rng: np.random.Generator) -> Array:
        """Children `(k, d)` of the parent whose turn it is."""
        members = self.members(archive)
        if len(members) < self.population:
            return np.zeros((0, archive.encoding.d))
        parent = archive.number % self.population
        others = [i for i in range(len(members)) if i != parent]
        return np.stack(
            [
                self._child(archive, archive.x[members], parent, others, rng)
                for _ in range(_CHILDREN)
            ]
        )

    def members(self, archive: Archive) -> list[int]:
        """The population as indices of trials, grown from the first one to the last."""
        members: list[int] = []
        challenges = 0
        for index in archive.usable:
            if len(members) < self.population:
                members.append(int(index))
                continue
            slot = archive.observations.trials[index].number % self.population
            child, parent = archive.y[index], archive.y[members[slot]]
            if (child >= parent).all():
                members[slot] = int(index)
            elif not (parent >= child).all():
                members.append(int(index))
            challenges += 1
            if challenges % self.population == 0:
                members = self._cut(members, archive.y)
        return members

    def _cut(self, members: Sequence[int], y: Array) -> list[int]:
        return [members[i] for i in sorted(crowding_order(y[list(members)])[: self.population])]

    def _child(
        self,
        archive: Archive,
        x: Array,
        parent: int,
        others: Sequence[int],
        rng: np.random.Generator,
    ) -> Array:
        """Storn & Price 1997, eq. 2-4: per parameter the mutant's value with probability CR, and at least one of them."""
        a, b, c = x[rng.choice(others, 3, replace=False)]
        mutant = a + self.differential * (b - c)
        taken = rng.random(len(archive.widths)) < self.crossover
        taken[rng.integers(len(taken))] = True
        return np.where(np.repeat(taken, archive.widths), _reflected(mutant), x[parent])


def _reflected(x: Array) -> Array:
    """Folded back at the bounds: clipping would pile mutants up there."""
    return np.asarray(1 - np.abs(1 - np.abs(x) % 2))
