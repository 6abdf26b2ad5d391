from dataclasses import replace

import numpy as np
import optuna
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState

from paretomerge.pareto.front import hypervolume
from paretomerge.search.baselines.evolver import EvolverProposer, _reflect
from paretomerge.search.encoding import Encoding
from paretomerge.search.observations import Observations
from paretomerge.search.point_sampler import Archive, PointSampler

SPACE = {f"x{i}": FloatDistribution(0, 1) for i in range(4)}


def archive_of(values, fails=()):
    study = optuna.create_study(directions=["maximize"] * len(values[0]))
    rng = np.random.default_rng(0)
    for number, value in enumerate(values):
        settled = (
            {"state": TrialState.FAIL} if number in fails else {"values": list(value)}
        )
        study.add_trial(
            optuna.trial.create_trial(
                **settled,
                params=dict(zip(SPACE, rng.random(4), strict=True)),
                distributions=SPACE,
            )
        )
    return Archive.of(Observations.of(study), Encoding(SPACE), len(study.trials))


def test_the_first_trials_are_the_population():
    assert EvolverProposer(4).members(archive_of([[float(i)] for i in range(4)])) == [
        0,
        1,
        2,
        3,
    ]
    assert EvolverProposer(4).propose(
        archive_of([[1.0]] * 3), np.random.default_rng(0)
    ).shape == (
        0,
        4,
    )


def test_a_better_child_takes_its_parents_place_and_a_worse_one_none():
    assert EvolverProposer(4).members(
        archive_of([[0.0], [0.0], [0.0], [0.0], [1.0], [-1.0]])
    ) == [
        4,
        1,
        2,
        3,
    ]


def test_where_neither_dominates_both_stay_until_the_generation_ends():
    start = [[1.0, 0.0], [0.8, 0.2], [0.1, 0.1], [0.0, 1.0]]
    other = [[0.0, 0.9], [0.2, 0.8], [0.0, 0.0], [0.5, 0.5]]
    assert EvolverProposer(4).members(archive_of(start + other[:1])) == [0, 1, 2, 3, 4]
    kept = EvolverProposer(4).members(archive_of(start + other))
    assert len(kept) == 4 and {0, 3} <= set(kept) and 2 not in kept and 6 not in kept


def test_a_failed_child_changes_nothing():
    values = [[0.0], [0.0], [0.0], [0.0], [9.0], [1.0]]
    assert EvolverProposer(4).members(archive_of(values, fails=(4,))) == [0, 5, 2, 3]


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=5, max_size=40),
    st.integers(4, 7),
)
@settings(max_examples=60, deadline=None)
def test_the_population_never_loses_ground_and_keeps_its_size(values, size):
    y = [[float(a), float(b)] for a, b in values]
    members = EvolverProposer(size).members(archive_of(y))
    assert (
        len(members) == len(set(members))
        and min(size, len(y)) <= len(members) < 2 * size
    )
    for i in range(
        min(size, len(y))
    ):  # whoever was there at first is there still, or somebody as good on some objective
        assert any(m == i or (np.array(y[m]) >= y[i]).any() for m in members)


def test_children_take_choices_whole():
    space = {
        "c": CategoricalDistribution(("a", "b", "c")),
        "x": FloatDistribution(0, 1),
    }
    study = optuna.create_study(
        directions=["maximize"],
        sampler=PointSampler(EvolverProposer(4), space=space, n_startup=4),
    )
    for _ in range(30):
        trial = study.ask(space)
        study.tell(trial, (trial.params["c"] == "b") - abs(trial.params["x"] - 0.7))
    assert study.best_trial.params["c"] == "b"
    assert sum(t.params["c"] == "b" for t in study.trials[-10:]) >= 6


def test_a_choice_is_the_parents_or_the_mutants_and_something_always_changes():
    space = {
        "c": CategoricalDistribution(("a", "b", "z")),
        "x": FloatDistribution(0, 1),
        "y": FloatDistribution(0, 1),
    }
    study = optuna.create_study(directions=["maximize"])
    rng = np.random.default_rng(0)
    for number in range(6):
        params = {
            "c": "z" if number == 2 else "a",
            "x": rng.random(),
            "y": rng.random(),
        }
        study.add_trial(
            optuna.trial.create_trial(value=1.0, params=params, distributions=space)
        )
    encoding = Encoding(space)
    known = Archive.of(Observations.of(study), encoding, len(study.trials))
    archive = replace(known, number=8)  # the turn of trial 2
    children = EvolverProposer(6, crossover=0.5).propose(archive, rng)
    assert {tuple(child[:3]) for child in children} == {(1, 0, 0), (0, 0, 1)}
    for child in EvolverProposer(6, crossover=0.0).propose(archive, rng):
        changed = [
            not np.allclose(child[columns], archive.x[2][columns])
            for columns in encoding.columns.values()
        ]
        assert sum(changed) == 1


def test_folding_at_the_bounds():
    assert np.allclose(
        _reflect(np.array([-0.2, 0.0, 0.4, 1.0, 1.3, 2.0, 2.4])),
        [0.2, 0.0, 0.4, 1.0, 0.7, 0.0, 0.4],
    )


def test_it_goes_beyond_random_search():
    def volume(sampler):
        study = optuna.create_study(
            directions=["maximize", "minimize"], sampler=sampler
        )
        for _ in range(80):
            trial = study.ask(SPACE)
            x = np.array(list(trial.params.values()))
            cost = ((x[1:] - 0.5) ** 2).sum() * 2
            study.tell(trial, [x[0] - cost, x[0] ** 2 - 1 + cost])
        return hypervolume([[t.values[0], -t.values[1]] for t in study.trials], [0, 0])

    ours = np.mean(
        [
            volume(PointSampler(EvolverProposer(10), seed=s, space=SPACE))
            for s in range(3)
        ]
    )
    assert (
        ours
        > np.mean([volume(optuna.samplers.RandomSampler(seed=s)) for s in range(3)])
        + 0.03
    )
