import pickle
import time

import numpy as np
import optuna
import pytest
from optuna.distributions import (
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import TrialState, create_trial

from paretomerge.search.encoding import Encoding
from paretomerge.search.observations import Observations
from paretomerge.search.point_sampler import Archive, PointSampler, crowding_order
from paretomerge.search.registry import SearchProblem, make

SPACE = {"x": FloatDistribution(0, 1), "y": FloatDistribution(0, 1)}


class Always:
    """Proposes the same points again and again."""

    def __init__(self, *points):
        self.points = np.array(points, dtype=float)

    def propose(self, archive, rng):
        return self.points


def study(sampler, space=SPACE, n=0):
    made = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
    for _ in range(n):
        made.tell(made.ask(space), [0.0, 0.0])
    return made


def test_the_best_proposal_that_is_new_is_taken():
    sampler = PointSampler(Always([0.2, 0.2], [0.4, 0.4]), n_startup=1, space=SPACE)
    points = [(t.params["x"], t.params["y"]) for t in study(sampler, n=4).trials]
    assert points[1:3] == [(0.2, 0.2), (0.4, 0.4)]
    assert len(set(points)) == 4  # then the Sobol sequence goes on


def test_proposals_are_settled_and_inside():
    sampler = PointSampler(Always([7.0, -3.0]), n_startup=1, space=SPACE)
    assert study(sampler, n=2).trials[-1].params == {"x": 1.0, "y": 0.0}


def test_a_running_trial_counts_as_known():
    sampler = PointSampler(Always([0.2, 0.2], [0.4, 0.4]), n_startup=1, space=SPACE)
    made = study(sampler, n=1)
    assert [made.ask(SPACE).params["x"] for _ in range(2)] == [0.2, 0.4]


def test_a_finite_space_is_used_up_before_anything_comes_twice():
    space = {"c": CategoricalDistribution(("a", "b", "c")), "i": IntDistribution(1, 2)}
    trials = study(PointSampler(None, space=space), space, n=8).trials
    assert len({tuple(t.params.values()) for t in trials[:6]}) == 6


def test_points_that_mean_the_same_are_not_proposed_again():
    space = {"c": CategoricalDistribution(("a", "b")), "i": IntDistribution(1, 3)}
    conditions = {"i": [("c", ("b",))]}
    trials = study(
        PointSampler(None, space=space, conditions=conditions), space, n=4
    ).trials
    assert sum(t.params["c"] == "a" for t in trials) == 1


def test_nothing_is_asked_of_a_proposer_while_every_trial_has_failed():
    sampler = PointSampler(Always([0.2, 0.2]), n_startup=1, space=SPACE)
    made = study(sampler)
    for _ in range(3):
        made.tell(made.ask(SPACE), state=TrialState.FAIL)
    assert 0.2 not in made.ask(SPACE).params.values()


def test_a_proposer_that_needs_a_usable_trial_waits_for_one():
    for usable, expected in ((True, False), (False, True)):
        made = study(
            PointSampler(
                Always([0.2, 0.2]), n_startup=1, space=SPACE, require_feasible=usable
            )
        )
        trial = made.ask(SPACE)
        trial.set_constraint("c", 1.0)
        made.tell(trial, [0.0, 0.0])
        assert (made.ask(SPACE).params == {"x": 0.2, "y": 0.2}) is expected


def test_usable_leaves_out_failures_infinities_and_broken_constraints():
    made = study(PointSampler(None, space=SPACE))
    for value, constraint in ((1.0, 0.0), (float("inf"), 0.0), (2.0, 1.0), (3.0, -1.0)):
        trial = made.ask(SPACE)
        trial.set_constraint("size", constraint)
        made.tell(trial, [value, 0.0])
    made.tell(made.ask(SPACE), state=TrialState.FAIL)
    archive = Archive.of(Observations.of(made), Encoding(SPACE), 5)
    assert archive.usable.tolist() == [0, 3]
    assert archive.x.shape == (5, 2) and archive.pending.shape == (0, 2)


@pytest.mark.parametrize(
    "preset", ["mmmo", "qmc", "map", "kinship", "evolver", "m2n2", "policy"]
)
def test_trials_of_another_space_are_left_out(preset):
    """They can be added to a study by hand; what is not in the space can say nothing about it."""
    space = {
        "x": FloatDistribution(0, 1),
        "y": FloatDistribution(1e-3, 1, log=True),
        "c": CategoricalDistribution(("a", "b")),
    }
    others = {
        "c": CategoricalDistribution(("zz", "a")),
        "y": FloatDistribution(-1, 1),
        "x": CategoricalDistribution(("no", "yes")),
    }
    added = {5: {"c": "zz"}, 6: {"y": -0.5}, 7: {"x": "no"}}
    made = study(make(preset, SearchProblem(space, 2), {"n_startup": 3}))
    for number in range(9):
        if number in added:
            params = {"x": 0.5, "y": 0.1, "c": "a"} | added[number]
            distributions = space | {name: others[name] for name in added[number]}
            made.add_trial(
                create_trial(
                    values=[9.0, -9.0], params=params, distributions=distributions
                )
            )
        else:
            trial = made.ask(space)
            made.tell(trial, [trial.params["x"], trial.params["y"]])
    seen = Observations.of(made)
    archive = Archive.of(seen, Encoding(space), 9)
    assert (
        len(seen) == 9
        and len(archive.x) == len(archive.y) == len(archive.observations) == 6
    )
    assert made.trials[8].params.keys() == space.keys()


def test_a_parameter_keeps_its_random_value_whatever_was_drawn_before():
    values = []
    for extra in (False, True):
        trial = study(PointSampler(None, seed=3)).ask()
        if extra:
            trial.suggest_float("other", 0, 1)
        values.append(trial.suggest_float("mine", 0, 1))
    assert values[0] == values[1]


def test_parameters_of_one_trial_are_drawn_apart():
    trial = study(PointSampler(None)).ask()
    assert trial.suggest_float("one", 0, 1) != trial.suggest_float("other", 0, 1)


def test_the_sobol_sequence_goes_on_with_the_numbers():
    points = [
        (t.params["x"], t.params["y"])
        for t in study(PointSampler(None, space=SPACE), n=8).trials
    ]
    assert (
        sorted(int(8 * x) for x, _ in points)
        == sorted(int(8 * y) for _, y in points)
        == list(range(8))
    )


def test_best_first():
    y = np.array([[0.5, 0.5], [1.0, 0.0], [0.0, 1.0], [0.2, 0.2], [0.52, 0.48]])
    order = crowding_order(y).tolist()
    assert (
        set(order[:2]) == {1, 2} and order[-1] == 3
    )  # the ends, then the inner ones, then the dominated
    assert crowding_order(np.array([[3.0], [1.0], [2.0]])).tolist() == [0, 2, 1]
    assert (
        crowding_order(np.ones((4, 2))).tolist() != []
        and len(set(crowding_order(np.ones((4, 2))))) == 4
    )
    assert crowding_order(np.zeros((0, 2))).tolist() == []


class Slow(Always):
    def propose(self, archive, rng):
        time.sleep(0.02)
        return np.random.default_rng(0).random((200, archive.encoding.d))


@pytest.mark.parametrize("threads", [2, 4])
def test_threads_of_one_process_are_given_different_points(threads):
    def objective(trial):
        a, b = trial.suggest_int("a", 1, 6), trial.suggest_int("b", 1, 6)
        time.sleep(0.001)
        return a, b

    space = {"a": IntDistribution(1, 6), "b": IntDistribution(1, 6)}
    made = study(PointSampler(Slow(), n_startup=1, space=space))
    made.optimize(objective, n_trials=24, n_jobs=threads)
    assert len({tuple(t.params.values()) for t in made.trials}) == 24


def test_what_a_running_trial_was_given_counts_before_it_is_used():
    made = study(
        PointSampler(Always([0.2, 0.2], [0.4, 0.4]), n_startup=1, space=SPACE), n=1
    )
    first, second = made.ask(), made.ask()
    assert (
        first.suggest_float("x", 0, 1) == 0.2 and second.suggest_float("x", 0, 1) == 0.4
    )


def test_a_sampler_can_be_pickled_and_goes_on():
    sampler = PointSampler(Always([0.2, 0.2], [0.4, 0.4]), n_startup=1, space=SPACE)
    made = study(sampler, n=2)
    made.sampler = pickle.loads(pickle.dumps(sampler))
    assert made.ask(SPACE).params == {"x": 0.4, "y": 0.4}


def test_the_middle_comes_first_where_the_space_shows_itself_too():
    def first(centre):
        trial = study(PointSampler(None, centre=centre)).ask()
        return (
            trial.suggest_float("x", 0, 4),
            trial.suggest_int("i", 1, 3),
            trial.suggest_categorical("c", ["a", "b"]),
        )

    assert first(True) == (2.0, 2, "a") and first(False) != (2.0, 2, "a")


def test_a_seed_may_be_left_to_chance():
    drawn = {
        study(PointSampler(None, seed=None, space=SPACE), n=1).trials[0].params["x"]
        for _ in range(3)
    }
    assert len(drawn) == 3


def test_conditions_are_read_from_trials_that_came_to_their_end():
    """A trial that failed before it suggested what exists under its choice does not say that
    it would not have.
    """

    def objective(trial):
        kind = trial.suggest_categorical("a", ["p", "q"])
        if trial.number == 1:
            raise RuntimeError
        value = (
            trial.suggest_int("c", 1, 12)
            if kind == "p"
            else trial.suggest_int("d", 1, 4) + 0.5
        )
        return value, value

    made = study(PointSampler(None))
    made.optimize(objective, n_trials=15, catch=(RuntimeError,))
    points = [tuple(t.params.items()) for t in made.trials]
    assert len(set(points)) == 15
