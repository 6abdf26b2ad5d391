import itertools
import os
import subprocess
import sys

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from paretomerge.errors import ConfigError
from paretomerge.pareto.front import hypervolume
from paretomerge.search.encoding import Encoding
from paretomerge.search.mmmo import MMMOSampler, _ranked
from paretomerge.search.surrogate import Surrogate

SPACE = {
    "method": CategoricalDistribution(("plain", "sparse")),
    "w": FloatDistribution(0.0, 1.5),
    "density": FloatDistribution(0.1, 1.0),
    "rank": IntDistribution(1, 64, log=True),
    "step": FloatDistribution(0.0, 1.0, step=0.25),
}
CONDITIONS = {"density": ("method", ("sparse",))}


def test_encoding_goes_both_ways():
    encoding = Encoding(SPACE, CONDITIONS)
    points = [
        {"method": "sparse", "w": 0.3, "density": 0.4, "rank": 8, "step": 0.75},
        {"method": "plain", "w": 1.5, "density": 0.2, "rank": 64, "step": 0.0},
    ]
    x = encoding.encode(points)
    assert x.shape == (2, 6) and x.min() >= 0 and x.max() <= 1
    back = encoding.decode(x[0])
    assert back["method"] == "sparse" and back["rank"] == 8 and back["step"] == 0.75
    assert back["w"] == pytest.approx(0.3) and back["density"] == pytest.approx(0.4)
    assert encoding.discrete.tolist() == [True, True, False, False, True, True]


def test_points_that_mean_the_same_are_the_same():
    encoding = Encoding(SPACE, CONDITIONS)
    a = {"method": "plain", "w": 0.3, "density": 0.4, "rank": 8, "step": 0.5}
    x = encoding.encode([a, a | {"density": 0.9}, a | {"method": "sparse"}])
    assert np.array_equal(x[0], x[1]) and not np.array_equal(x[0], x[2])


def two_objectives(x: float, y: float) -> tuple[float, float]:
    """Maximise; the front is y = 0.5, x in [0, 1]."""
    cost = (y - 0.5) ** 2 * 4
    return x - cost, 1 - x**2 - cost


def run(sampler, n: int, directions=("maximize", "maximize"), seed_points=()) -> optuna.Study:
    study = optuna.create_study(directions=list(directions), sampler=sampler)
    signs = [1 if d == "maximize" else -1 for d in directions]
    for point in seed_points:
        study.enqueue_trial(point)
    for _ in range(n):
        trial = study.ask()
        values = two_objectives(trial.suggest_float("x", 0, 1), trial.suggest_float("y", 0, 1))
        trial.set_user_attr("stderr", [0.01, 0.01])
        study.tell(trial, [s * v for s, v in zip(signs, values, strict=True)])
    return study


def volume(study: optuna.Study) -> float:
    return hypervolume([t.values for t in study.trials], [0, 0])


def test_finds_a_front_that_random_search_does_not():
    random = np.median([volume(run(optuna.samplers.RandomSampler(seed=s), 25)) for s in range(9)])
    for seed in (0, 1):
        ours = volume(run(MMMOSampler(seed=seed, n_startup=6, reference=[0, 0]), 25))
        assert ours > random
        assert ours > 0.62  # the whole front has 2/3


def test_minimising_is_maximising_with_the_sign_turned():
    up = run(MMMOSampler(seed=1, n_startup=5, reference=[0, 0]), 9)
    down = run(MMMOSampler(seed=1, n_startup=5, reference=[0, 0]), 9, ("minimize", "minimize"))
    assert [t.params for t in up.trials] == [t.params for t in down.trials]


def test_a_resumed_study_goes_on_as_if_never_stopped():
    whole = run(MMMOSampler(seed=3, n_startup=5), 10)
    study = optuna.create_study(directions=["maximize"] * 2, sampler=MMMOSampler(seed=3, n_startup=5))
    study.add_trials(whole.trials[:7])
    for expected in whole.trials[7:]:
        trial = study.ask()
        params = {"x": trial.suggest_float("x", 0, 1), "y": trial.suggest_float("y", 0, 1)}
        assert params == expected.params
        trial.set_user_attr("stderr", [0.01, 0.01])
        study.tell(trial, expected.values)


def test_proposals_do_not_depend_on_the_hash_seed():
    code = (
        "import sys; sys.path.insert(0, '.'); from tests.search.test_mmmo import *; "
        "print([t.params for t in run(MMMOSampler(seed=3, n_startup=5), 8).trials])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": s}, capture_output=True, check=True, text=True
        ).stdout
        for s in ("1", "2")
    }
    assert len(outputs) == 1 and outputs != {""}


def test_running_trials_are_not_proposed_again():
    study = run(MMMOSampler(seed=0, n_startup=5), 8)
    asked = [study.ask(fixed_distributions={"x": FloatDistribution(0, 1), "y": FloatDistribution(0, 1)}).params for _ in range(3)]
    points = np.array([[p["x"], p["y"]] for p in asked])
    assert np.linalg.norm(points[:, None] - points[None], axis=-1)[np.triu_indices(3, 1)].min() > 1e-3


def test_failed_trials_count_as_bad():
    space = {"x": FloatDistribution(0, 1), "y": FloatDistribution(0, 1)}
    study = run(MMMOSampler(seed=0, n_startup=5, space=space), 6)
    for _ in range(3):
        study.tell(study.ask(space), state=TrialState.FAIL)
    sampler = study.sampler
    done, _ = sampler._trials(study, study.trials[-1], space)
    y, noise = sampler._outcomes(study, done)
    assert len(done) == 8 and y[-1].tolist() == y.min(0).tolist() and noise.shape == y.shape


def test_the_fisher_filter_is_a_switch():
    with_it = run(MMMOSampler(seed=0, n_startup=5), 9)
    without = run(MMMOSampler(seed=0, n_startup=5, fisher_filter=False), 9)
    assert [t.params for t in with_it.trials[:5]] == [t.params for t in without.trials[:5]]
    assert [t.params for t in with_it.trials[5:]] != [t.params for t in without.trials[5:]]


@pytest.mark.parametrize("on", [True, False])
def test_weak_to_strong_is_a_switch(monkeypatch, on):
    calls = []
    cross = MMMOSampler._cross
    monkeypatch.setattr(MMMOSampler, "_cross", lambda *arguments: calls.append(1) or cross(*arguments))
    run(MMMOSampler(seed=0, n_startup=5, weak_to_strong=on), 7)
    assert len(calls) == (2 if on else 0)


def test_weak_to_strong_takes_coordinates_from_elites():
    """v = a + F (b - d) in at least one coordinate, the candidate in the others."""
    encoding = Encoding({n: FloatDistribution(0, 1) for n in "abcd"})
    elites = np.array([[0.1] * 4, [0.4] * 4, [0.9] * 4])
    candidates = np.full((200, 4), 0.77)
    children = MMMOSampler()._cross(encoding, candidates, elites, np.random.default_rng(0))
    possible = {a + 0.5 * (b - d) for a, b, d in itertools.permutations((0.1, 0.4, 0.9), 3)}
    taken = ~np.isclose(children, 0.77)
    assert taken.any(1).all() and not taken.all(1).all()
    assert 0.5 < taken.mean() < 0.7  # CR = 0.5, at least one: (4 * 0.5 + 0.5) / 4 of them
    assert all(min(abs(v - p) for p in possible) < 1e-9 for v in children[taken])
    assert len(MMMOSampler()._cross(encoding, candidates, elites[:2], np.random.default_rng(0))) == 0


def test_mixed_and_conditional_spaces():
    study = optuna.create_study(
        directions=["maximize", "minimize"], sampler=MMMOSampler(seed=0, space=SPACE, conditions=CONDITIONS, n_startup=6)
    )
    for _ in range(12):
        trial = study.ask(SPACE)
        p = trial.params
        bonus = p["density"] if p["method"] == "sparse" else 0.2
        study.tell(trial, [p["w"] * bonus + p["step"], p["rank"] / 64 + p["w"]])
    assert {t.params["method"] for t in study.trials} == {"plain", "sparse"}
    assert all(t.params["density"] == 1.0 for t in study.trials[6:] if t.params["method"] == "plain")


def test_a_wrong_reference_is_told():
    with pytest.raises(ConfigError, match="expected 2 numbers"):
        run(MMMOSampler(seed=0, n_startup=3, reference=[0]), 4)


def test_elites_are_front_after_front():
    y = np.array([[0.1, 0.1], [1.0, 0.0], [0.6, 0.6], [0.0, 1.0], [0.5, 0.5]])
    assert _ranked(y, np.array([-0.1, -0.1]))[0] == 2
    assert set(_ranked(y, np.array([-0.1, -0.1]))[:3]) == {1, 2, 3}
    assert _ranked(y, np.array([-0.1, -0.1])).tolist()[3:] == [4, 0]


def test_the_surrogate_knows_what_it_was_told_and_that_it_knows_less_elsewhere():
    rng = np.random.default_rng(0)
    x = rng.random((15, 2)) * 0.5
    y = np.stack([100 * x[:, 0], -x[:, 1]], 1)
    surrogate = Surrogate.fit(x, y, np.full(y.shape, 1e-3))
    mean, near = surrogate.predict(x)
    np.testing.assert_allclose(mean[:, 0], y[:, 0], atol=3)
    far = surrogate.predict(np.array([[1.0, 1.0]]))[1]
    assert (far > near.max(0)).all()
    np.testing.assert_allclose(surrogate.standardise(y).mean(0), 0, atol=1e-9)


def test_a_constant_objective_does_not_break_the_fit():
    x = np.random.default_rng(0).random((8, 2))
    mean, _ = Surrogate.fit(x, np.stack([x[:, 0], np.ones(8)], 1), None).predict(x)
    np.testing.assert_allclose(mean[:, 1], 1, atol=1e-3)
