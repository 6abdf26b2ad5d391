import pickle
import warnings

import numpy as np
import optuna
import pytest
from optuna.distributions import (
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from paretomerge.errors import ConfigError
from paretomerge.search.baselines.scalarised import ScalarisedSampler, _inside, cma

SPACE = {
    "a": FloatDistribution(0.0, 1.5),
    "b": FloatDistribution(0.0, 1.5),
    "c": CategoricalDistribution(("x", "y")),
}


def run(sampler, n, directions=("maximize", "maximize"), f=None):
    study = optuna.create_study(directions=list(directions), sampler=sampler)
    f = f or (lambda p: (-((p["a"] - 0.2) ** 2), -((p["b"] - 1.2) ** 2)))
    for _ in range(n):
        trial = study.ask(SPACE)
        study.tell(
            trial,
            [
                v if d == "maximize" else -v
                for v, d in zip(f(trial.params), directions, strict=True)
            ],
        )
    return study


def test_the_scalars():
    y = np.array([[0.0, 10.0], [1.0, 0.0], [0.5, 6.0]])
    inner = optuna.samplers.RandomSampler
    assert ScalarisedSampler(inner).scalars(y).tolist() == [5.0, 0.5, 3.25]
    assert ScalarisedSampler(inner, [3, 1]).scalars(y).tolist() == pytest.approx(
        [2.5, 0.75, 1.875]
    )
    told = ScalarisedSampler(inner, kind="tchebycheff").scalars(y)
    assert (
        told.argmax() == 2
    )  # the balanced one, though the sum prefers the first: each objective in units of its range
    assert told == pytest.approx([-0.5 - 1e-3, -0.5 - 1e-3, -0.25 - 1e-3 * (0.5 + 0.4)])
    ideal = ScalarisedSampler(inner, kind="tchebycheff", ideal=[1.0, -20.0]).scalars(
        y, np.array([1.0, -1.0])
    )
    assert ideal[0] == pytest.approx(-0.5 * 1 - 1e-3 * (1 + 10 / 20))


def test_tchebycheff_of_values_that_do_not_vary_is_finite():
    assert np.isfinite(
        ScalarisedSampler(optuna.samplers.RandomSampler, kind="tchebycheff").scalars(
            np.ones((3, 2))
        )
    ).all()


def test_wrong_lengths_are_refused_when_the_objectives_are_known():
    with pytest.raises(ConfigError, match="weights: expected 2 numbers"):
        run(ScalarisedSampler(optuna.samplers.TPESampler, [1, 1, 1]), 1)
    with pytest.raises(ConfigError, match="ideal: expected 2 numbers"):
        run(
            ScalarisedSampler(
                optuna.samplers.TPESampler, kind="tchebycheff", ideal=[1]
            ),
            2,
        )
    for weights in ([], [0, 0], [float("nan"), 1], [[1, 2]]):
        with pytest.raises(ConfigError, match="weights: expected a list"):
            ScalarisedSampler(optuna.samplers.TPESampler, weights)


def test_a_value_from_outside_its_range_is_a_failure_to_the_inner_sampler():
    """Optuna evaluates what was enqueued, with a warning, and does not take it again."""
    study = optuna.create_study(
        directions=["maximize"] * 2, sampler=cma(0, space=SPACE)
    )
    study.enqueue_trial({"a": 7.0, "b": 0.5, "c": "x"})
    with pytest.warns(UserWarning, match="out of range"):
        study.tell(study.ask(SPACE), [0.0, 0.0])
    for _ in range(5):
        trial = study.ask(SPACE)
        study.tell(trial, [trial.params["a"], -trial.params["b"]])
    assert study.trials[0].params["a"] == 7.0 and all(
        0 <= t.params["a"] <= 1.5 for t in study.trials[1:]
    )


def test_cma_can_be_pickled_and_goes_on():
    alone, moved = (
        run(cma(0, space=SPACE), 6),
        run(pickle.loads(pickle.dumps(cma(0, space=SPACE))), 6),
    )
    assert [t.params for t in moved.trials] == [t.params for t in alone.trials]


@pytest.mark.parametrize("kind", ["sum", "tchebycheff"])
def test_cma_finds_the_compromise_of_two_objectives(kind):
    study = run(cma(0, space=SPACE, kind=kind), 80)
    late = [(t.params["a"], t.params["b"]) for t in study.trials[-15:]]
    assert np.abs(np.mean(late, axis=0) - [0.2, 1.2]).max() < 0.1
    assert {t.params["c"] for t in study.trials} == {"x", "y"}


def test_weights_say_which_compromise():
    def along(p):
        return (p["a"], -p["a"])

    up, down = (
        run(cma(0, space=SPACE, weights=w), 60, f=along).trials[-1].params["a"]
        for w in ([0.9, 0.1], [0.1, 0.9])
    )
    assert up > 1.2 and down < 0.3


def test_minimised_objectives_are_turned():
    study = run(cma(0, space=SPACE), 60, ("minimize", "maximize"))
    assert abs(study.trials[-1].params["a"] - 0.2) < 0.2


def test_it_begins_at_the_start_off_the_bounds():
    space = SPACE | {
        "rank": IntDistribution(1, 64, log=True),
        "fixed": IntDistribution(3, 3),
    }
    point = _inside(space, {"a": 0.5, "b": 1.5, "rank": 1, "c": "x", "fixed": 3}, 1 / 6)
    assert (
        point["a"] == 0.5
        and point["b"] == pytest.approx(1.25)
        and point["rank"] == 2
        and set(point) == {"a", "b", "rank"}
    )
    assert _inside(space, {}, 1 / 6)["a"] == 0.75
    first = [
        t.params["a"]
        for t in run(
            cma(0, space=SPACE, start={"a": 0.5, "b": 0.5}, sigma=0.02), 7
        ).trials[1:]
    ]
    assert np.abs(np.array(first) - 0.5).max() < 0.15


def test_trials_that_fail_are_infinite_or_wait_do_not_stop_it():
    study = optuna.create_study(
        directions=["maximize"] * 2, sampler=cma(0, space=SPACE, kind="tchebycheff")
    )
    for _ in range(3):
        study.enqueue_trial({"a": 0.1, "b": 0.1, "c": "x"})
    for number in range(24):
        trial = study.ask(SPACE)
        if number % 5 == 0:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            study.tell(
                trial, [float("-inf") if number % 7 == 0 else -trial.params["a"], 0.0]
            )
    assert sum("cma:generation" in t.system_attrs for t in study.trials) > 10


def test_any_sampler_of_one_objective_will_do():
    def inner(seed):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.samplers.TPESampler(
                seed=seed, multivariate=True, n_startup_trials=5
            )

    one, two = (run(ScalarisedSampler(inner, seed=3), 15) for _ in range(2))
    assert [t.params for t in one.trials] == [t.params for t in two.trials]


def test_optuna_is_not_made_to_talk(caplog):
    study = optuna.create_study(
        directions=["maximize"] * 2, sampler=cma(0, space=SPACE)
    )
    caplog.clear()
    with caplog.at_level("INFO", logger="optuna"):
        study.tell(study.ask(SPACE), [0.0, 0.0])
        study.ask(SPACE)
    assert not caplog.records


def test_each_trial_and_each_seed_have_their_own_random_numbers():
    study, other = (
        run(cma(seed, space=SPACE), 8, f=lambda p: (0.0, 0.0)) for seed in (0, 1)
    )
    values = [t.params["a"] for t in study.trials + other.trials]
    assert len(set(values)) == len(values)


def test_known_trials_of_the_study_are_left_alone():
    study = run(cma(0, space=SPACE), 20)
    assert all(len(t.values) == 2 for t in study.trials)
    assert (
        sum(
            any(k.startswith("cma:optimizer") for k in t.system_attrs)
            for t in study.trials
        )
        >= 2
    )
