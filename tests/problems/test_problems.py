"""Problems as Optuna objectives: noise, shares of the hypervolume, names, and the docs that run."""

import doctest
import importlib
import json

import numpy as np
import optuna
import pytest
from optuna.distributions import (
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from paretomerge import problems
from paretomerge.errors import ConfigError
from paretomerge.problems.catalogue import REFERENCES, unit_cube_functions
from paretomerge.problems.problem import Problem, binomial


def cube(d, n=64, seed=0):
    return np.random.default_rng(seed).random((n, d))


def study_of(problem, n_trials=12, seed=0):
    sampler = optuna.samplers.RandomSampler(seed=seed)
    study = optuna.create_study(directions=problem.directions, sampler=sampler)
    study.optimize(problem, n_trials=n_trials)
    return study


@pytest.mark.parametrize("module", ["", ".catalogue", ".merge_landscape"])
def test_the_examples_in_docstrings_run(module):
    result = doctest.testmod(importlib.import_module(f"paretomerge.problems{module}"))
    assert result.attempted and not result.failed


def test_every_public_name_is_documented():
    for name in problems.__all__:
        assert getattr(problems, name).__doc__ and name in problems.__doc__


# ----- the catalogue


def test_every_problem_has_a_reference_within_reach():
    references = json.loads(REFERENCES.read_text())
    assert set(references) == set(unit_cube_functions())
    for name in references:
        problem = problems.get(name)
        assert problem.n_objectives == len(problem.reference_point)
        assert (problem.ideal_point > problem.reference_point).all()
        box = np.prod(problem.ideal_point - problem.reference_point)
        assert 0 < problem.front_hypervolume <= box * (1 + 1e-6), name


def test_every_name_gives_its_problem():
    names = problems.names()
    assert len(set(names)) == len(names)
    for name in names:
        problem = problems.get(name)
        assert problem.name == name
        assert (problem.noise is not None) == name.endswith("-noisy")


@pytest.mark.parametrize("name", ["zdt1-d31", "zdt1-d30-noisy-noisy", "landscape-", ""])
def test_other_names_are_refused(name):
    with pytest.raises(ConfigError, match="problem"):
        problems.get(name)


def test_the_published_volume_of_the_car():
    """BoTorch's maximum, of the published front above the same reference point.

    NSGA-II comes within 4 % in four objectives.
    """
    from botorch.test_functions.multi_objective import CarSideImpact

    volume = problems.get("re41").front_hypervolume
    assert volume == pytest.approx(CarSideImpact._max_hv, rel=0.05)


# ----- values and noise


def test_share_is_of_true_values_of_what_looks_best():
    problem = problems.get("zdt1-d5")
    corners = [dict.fromkeys(problem.space, 0.0), dict.fromkeys(problem.space, 1.0)]
    good, bad = problem.evaluate(corners)
    lucky = np.stack([good, good + 1])  # the bad point is seen above the good one
    both = np.stack([good, bad])
    assert problem.hypervolume_share(both, both) > 0
    assert (
        problem.hypervolume_share(both, lucky)
        == problem.hypervolume_share(bad[None])
        == 0
    )


def test_accuracies():
    exact, noisy = problems.get("zdt1-d5"), problems.get("zdt1-d5-noisy")
    params = [dict(zip(exact.space, row, strict=True)) for row in cube(5, 200) ** 3]
    p, f = noisy.evaluate(params), exact.evaluate(params)
    assert ((p >= 0) & (p <= 1)).all()
    assert noisy.hypervolume_share(p) == pytest.approx(exact.hypervolume_share(f))
    observed, stderr = binomial(np.full(1000, 0.3), np.random.default_rng(0))
    assert observed.std() == pytest.approx(stderr.mean(), rel=0.1)
    assert observed.mean() == pytest.approx(0.3, abs=0.01)
    again = binomial(np.full(1000, 0.3), np.random.default_rng(0))[0]
    assert (observed == again).all()
    assert np.allclose(observed * 200, np.round(observed * 200))


def test_noise_depends_on_the_seed_and_the_number_of_the_evaluation():
    problem = problems.get("landscape-noisy", n_examples=50, seed=3)
    start = problem.starts[0]
    values, stderr = problem.observe(start, 7)
    again = problems.landscape(noise=True, n_examples=50, seed=3)
    np.testing.assert_array_equal(again.observe(start, 7)[0], values)
    assert not np.array_equal(problem.observe(start, 8)[0], values)
    assert not np.array_equal(problems.get(problem.name).observe(start, 7)[0], values)
    np.testing.assert_allclose(values * 50, np.round(values * 50))
    np.testing.assert_allclose(stderr, np.sqrt(values * (1 - values) / 50))


# ----- as an objective of Optuna


def test_a_study_is_repeatable_and_its_share_is_of_its_front():
    problem = problems.get("dtlz2-m3-d5-noisy", seed=1)
    first, second = study_of(problem), study_of(problem)
    assert [t.values for t in first.trials] == [t.values for t in second.trials]
    true_values = problem.evaluate([t.params for t in first.trials])
    observed = np.array([t.values for t in first.trials])
    expected = problem.hypervolume_share(true_values, observed)
    assert problem.hypervolume(first) == expected > 0
    assert all(len(t.user_attrs["stderr"]) == 3 for t in first.trials)


def test_a_study_without_complete_trials_has_no_share():
    problem = problems.get("zdt2-d5")
    study = optuna.create_study(directions=problem.directions)
    study.ask()
    assert problem.hypervolume(study) == 0.0
    study.optimize(problem, n_trials=3)
    assert "stderr" not in study.trials[-1].user_attrs
    assert problem.hypervolume(study) >= 0


def test_all_kinds_of_parameters_are_suggested():
    space = {
        "kind": CategoricalDistribution(["a", "b"]),
        "count": IntDistribution(1, 9, step=2),
        "rate": FloatDistribution(1e-3, 1.0, log=True),
        "only b": FloatDistribution(0.0, 1.0),
        "only active only b": FloatDistribution(0.0, 1.0),
    }
    problem = Problem(
        name="mixed",
        space=space,
        evaluate=lambda points: np.array(
            [[p["count"], p["rate"]] for p in points], dtype=float
        ),
        reference_point=np.zeros(2),
        ideal_point=np.array([9.0, 1.0]),
        front_hypervolume=9.0,
        conditions={
            "only b": [("kind", ["b"])],
            "only active only b": [("only b", [0.5])],
        },
    )
    study = study_of(problem, 20)
    for trial in study.trials:
        assert ("only b" in trial.params) == (trial.params["kind"] == "b")
        assert "only active only b" not in trial.params
        assert {k: v for k, v in trial.distributions.items() if k in trial.params} == {
            k: space[k] for k in trial.params
        }
    assert 0 < problem.hypervolume(study) <= 1
