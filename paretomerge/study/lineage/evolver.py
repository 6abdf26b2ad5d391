"""Evolver: a population of models that have children by mutation and crossover.

Du et al. 2024, arXiv 2406.12208. The population begins with the sources. In generation t of T each
member x_i has a child: x_j is a random other member with probability p = 0.5 / (T - t) + 0.5, else
the best other one; the mutant (1 - F) x_i + F x_j gives the child its entries with probability CR,
x_i the others. A child that scores better than its parent on the search examples replaces it.
"""

from dataclasses import dataclass

from numpy.random import Generator

from paretomerge.errors import ConfigError
from paretomerge.record.trial import Trial
from paretomerge.search.options import check_options
from paretomerge.space.lineage import CROSSOVER
from paretomerge.study.lineage.compare import Compare, check_compare
from paretomerge.study.lineage.population import Population
from paretomerge.study.lineage.sampler import Lineage, Proposal

_SEEDS = 2**31


@dataclass(frozen=True)
class EvolverBreeder:
    """Children of a population; see the module.

    Attributes:
        population_size: The number of members. Where there are fewer sources, children of random
            sources fill it up.
        generations: T, the number of generations that the chance of the best mate is spread over.
        t: F, the mutant's share of the second parent, in (0, 1].
        crossover_rate: CR, the share of the entries that come from the mutant, in (0, 1].
        compare: How a child is compared with its parent, `dominance` or `mean`; see `Population`.

    Raises:
        ConfigError: An option is out of its range.
    """

    population_size: int = 4
    generations: int = 15
    t: float = 0.5
    crossover_rate: float = 0.5
    compare: Compare = "dominance"

    def __post_init__(self) -> None:
        check_options("sampler: evolver", self)
        check_compare(self.compare)
        if self.population_size < 2 or self.generations < 1:
            raise ConfigError(
                "sampler: evolver: a population_size of 2 or more and 1 or more generations, not "
                f"{self.population_size} and {self.generations}"
            )
        if not (0 < self.t <= 1 and 0 < self.crossover_rate <= 1):
            raise ConfigError(
                "sampler: evolver: t and crossover_rate above 0 and at most 1, not "
                f"{self.t} and {self.crossover_rate}"
            )

    def propose(self, lineage: Lineage, rng: Generator) -> Proposal:
        """A child of the member whose turn it is; see `Breeder.propose`."""
        nobody = Population(self.population_size, lineage.objectives, self.compare)
        population = nobody.after(lineage.trials)
        if population.is_complete:
            parent = population.next_parent(len(lineage.running))
            mate = self._mate(population, parent, rng)
        else:
            one, other = rng.permutation(len(population.members))[:2].tolist()
            parent = population.members[one]
            mate = population.members[other]
        params = lineage.space.point(
            CROSSOVER,
            first=parent.number,
            second=mate.number,
            t=self.t,
            crossover_rate=self.crossover_rate,
            seed=int(rng.integers(_SEEDS)),
        )
        return Proposal(params)

    def _mate(self, population: Population, parent: Trial, rng: Generator) -> Trial:
        """x_j: a random other member, or the best one."""
        others = [one for one in population.members if one.number != parent.number]
        left = self.generations - population.generation
        # In the last generation, and after it, p is 1.
        p = 0.5 / max(left, 1) + 0.5
        if rng.random() < p:
            return others[int(rng.integers(len(others)))]
        return population.best_of(others, rng)
