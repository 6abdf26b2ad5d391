"""The population of Evolver, on trials without models."""

import numpy as np
import pytest

from paretomerge.evaluate.evaluator import Objective, Score
from paretomerge.record.trial import Trial
from paretomerge.space.lineage import CROSSOVER, SOURCE, LineageSearchSpace
from paretomerge.study.lineage.compare import best_first, values_of
from paretomerge.study.lineage.evolver import EvolverBreeder
from paretomerge.study.lineage.population import Population
from paretomerge.study.lineage.sampler import Lineage

OBJECTIVES = (Objective("up"), Objective("down", maximise=False))


def trial(number, up, down, first=None, **more):
    params = {"method": SOURCE, "source": "s"}
    if first is not None:
        params = {"method": CROSSOVER, "first": first, "second": 0}
    scores = {"up": Score(up), "down": Score(down)}
    return Trial(number, params, scores, **more)


def numbers(population):
    return [member.number for member in population.members]


def test_dominance_by_hand():
    population = Population(2, OBJECTIVES, "dominance")
    founders = [trial(0, 1.0, 1.0), trial(1, 2.0, 2.0)]
    population = population.after(founders)
    assert population.is_complete and population.next_parent().number == 0
    # Better in both: it takes the place of its parent.
    better = population.after([trial(2, 1.5, 0.5, first=0)])
    assert numbers(better) == [2, 1] and better.next_parent().number == 1
    # Equal: the child replaces its parent, so that a plateau is crossed.
    assert numbers(population.after([trial(2, 1.0, 1.0, first=0)])) == [2, 1]
    # Worse in one and better in none: it is dropped.
    assert numbers(population.after([trial(2, 1.0, 1.1, first=0)])) == [0, 1]
    # Neither dominates: both stay until the generation ends.
    both = population.after([trial(2, 0.5, 0.5, first=0)])
    assert numbers(both) == [0, 1, 2] and both.generation == 0
    # Then two are left: the ends of the front have infinite crowding distances.
    cut = both.after([trial(3, 0.0, 3.0, first=1)])
    assert cut.generation == 1 and numbers(cut) == [1, 2]


def test_the_mean_by_hand():
    objectives = (Objective("up"),)
    population = Population(2, objectives, "mean")
    population = population.after([trial(0, 1.0, 0), trial(1, 2.0, 0)])
    assert numbers(population.after([trial(2, 1.1, 0, first=0)])) == [2, 1]
    # As in the program of the paper, an equal child is not better.
    assert numbers(population.after([trial(2, 1.0, 0, first=0)])) == [0, 1]
    # The parent has been replaced while the child was scored: another worker was faster.
    late = population.after([trial(2, 1.5, 0, first=0), trial(3, 9.0, 0, first=0)])
    assert numbers(late) == [2, 1]
    best = population.best_of(population.members, np.random.default_rng(0))
    assert best.number == 1


def test_what_is_no_member():
    population = Population(2, OBJECTIVES, "dominance")
    failed = Trial(0, {"method": SOURCE, "source": "s"}, failure="no memory")
    raced = trial(1, 9.0, 0.0, final=False)
    repeated = trial(2, 9.0, 0.0, same_as=1)
    assert numbers(population.after([failed, raced, repeated])) == []
    population = population.after([trial(3, 1.0, 1.0), trial(4, 2.0, 2.0)])
    turns = population.after(
        [
            Trial(5, {"method": CROSSOVER, "first": 3, "second": 4}, failure="no"),
            trial(6, 9.0, 0.0, first=4, same_as=3),
            trial(7, 9.0, 0.0, first=4, final=False),
        ]
    )
    # A failed and a raced child have had their turns; a repeat was no child.
    assert numbers(turns) == [3, 4] and turns.challenges == 2


def test_infeasible_trials_come_last():
    small = trial(0, 9.0, 0.0, constraints={"up >= 10": 1.0})
    large = trial(1, 9.0, 0.0, constraints={"up >= 10": 2.0})
    fine = trial(2, -5.0, 8.0, constraints={"up >= 10": -1.0})
    for compare in ("dominance", "mean"):
        order = best_first([large, small, fine], OBJECTIVES, compare)
        assert [one.number for one in order] == [2, 0, 1]
    assert values_of(fine, OBJECTIVES).tolist() == [-5.0, -8.0]
    population = Population(2, OBJECTIVES, "dominance").after([large, small])
    assert numbers(population.after([trial(3, 0.0, 9.0, first=1)])) == [3, 0]


@pytest.mark.parametrize(("generations", "p"), [(1, 1.0), (2, 0.75), (10, 0.55)])
def test_the_mate_is_random_with_the_probability_of_the_paper(generations, p):
    objectives = (Objective("up"),)
    trials = [trial(number, float(number), 0) for number in range(4)]
    space = LineageSearchSpace("base", {"s": "path"}, individuals=None)
    breeder = EvolverBreeder(4, generations, compare="mean")
    lineage = Lineage(space, objectives, trials, [], products=None)
    n = 4000
    mates = np.zeros(4)
    for seed in range(n):
        params = breeder.propose(lineage, np.random.default_rng(seed)).params
        assert params["first"] == 0
        mates[params["second"]] += 1
    # The best other one is trial 3: with probability 1 - p, and as one of three at random.
    expected = np.array([0, p / 3, p / 3, 1 - p + p / 3])
    deviation = np.sqrt(expected * (1 - expected) / n)
    assert (np.abs(mates / n - expected) <= 4 * deviation).all()


def test_children_that_are_being_scored_have_their_turns():
    trials = [trial(number, float(number), -float(number)) for number in range(3)]
    space = LineageSearchSpace("base", {"s": "path"}, individuals=None)
    breeder = EvolverBreeder(population_size=3)
    for n_running in range(4):
        lineage = Lineage(space, OBJECTIVES, trials, [{}] * n_running, products=None)
        params = breeder.propose(lineage, np.random.default_rng(1)).params
        assert params["first"] == n_running % 3
