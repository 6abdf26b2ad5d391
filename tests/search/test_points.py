import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from paretomerge.search.encoding import Encoding
from paretomerge.search.points import Archive, PointSampler, best_first

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
    trials = study(PointSampler(None, space=space, conditions=conditions), space, n=4).trials
    assert sum(t.params["c"] == "a" for t in trials) == 1


def test_nothing_is_asked_of_a_proposer_while_every_trial_has_failed():
    sampler = PointSampler(Always([0.2, 0.2]), n_startup=1, space=SPACE)
    made = study(sampler)
    for _ in range(3):
        made.tell(made.ask(SPACE), state=TrialState.FAIL)
    assert 0.2 not in made.ask(SPACE).params.values()


def test_usable_leaves_out_failures_infinities_and_broken_constraints():
    made = study(PointSampler(None, space=SPACE))
    for value, constraint in ((1.0, 0.0), (float("inf"), 0.0), (2.0, 1.0), (3.0, -1.0)):
        trial = made.ask(SPACE)
        trial.set_constraint("size", constraint)
        made.tell(trial, [value, 0.0])
    made.tell(made.ask(SPACE), state=TrialState.FAIL)
    asking = made.ask(SPACE)
    archive = Archive.of(made, asking._get_latest_trial(), Encoding(SPACE))
    assert archive.usable.tolist() == [0, 3]
    assert archive.x.shape == (5, 2) and archive.pending.shape == (0, 2)


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
    points = [(t.params["x"], t.params["y"]) for t in study(PointSampler(None, space=SPACE), n=8).trials]
    assert sorted(int(8 * x) for x, _ in points) == sorted(int(8 * y) for _, y in points) == list(range(8))


def test_best_first():
    y = np.array([[0.5, 0.5], [1.0, 0.0], [0.0, 1.0], [0.2, 0.2], [0.52, 0.48]])
    order = best_first(y).tolist()
    assert set(order[:2]) == {1, 2} and order[-1] == 3  # the ends, then the inner ones, then the dominated
    assert best_first(np.array([[3.0], [1.0], [2.0]])).tolist() == [0, 2, 1]
    assert best_first(np.ones((4, 2))).tolist() != [] and len(set(best_first(np.ones((4, 2))))) == 4
    assert best_first(np.zeros((0, 2))).tolist() == []
