import time

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution

from paretomerge.pareto.front import hypervolume
from paretomerge.search.baselines.map import (
    MAPProposer,
    QuadraticSurrogate,
    _fit_ridge,
    improvement_order,
)
from paretomerge.search.encoding import Encoding
from paretomerge.search.point_sampler import PointSampler

FOUR = {f"x{i}": FloatDistribution(0, 1) for i in range(4)}


def test_a_quadratic_is_found_exactly():
    rng = np.random.default_rng(0)
    x = rng.random((30, 4))
    curvature, slope = rng.standard_normal((4, 4)), rng.standard_normal(4)

    def y(x):
        return np.stack(
            [x @ slope + ((x @ curvature) * x).sum(1), 3 - ((x - 0.4) ** 2).sum(1)],
            axis=1,
        )

    fit = QuadraticSurrogate(Encoding(FOUR), x, y(x))
    new = rng.random((20, 4))
    assert np.abs(fit.predict(new) - y(new)).max() < 1e-2


def test_left_out_trials_decide_against_mixed_terms_and_for_a_penalty_where_there_is_only_noise():
    rng = np.random.default_rng(1)
    x = rng.random((25, 4))
    noise = rng.standard_normal((25, 1))
    fit = QuadraticSurrogate(Encoding(FOUR), x, noise)
    assert fit.predict(rng.random((50, 4))).std() < 0.6 * noise.std()


def test_leaving_one_out_in_closed_form_is_leaving_one_out():
    rng = np.random.default_rng(2)
    terms, y = rng.standard_normal((12, 5)), rng.standard_normal((12, 1))
    told = _fit_ridge(terms, y).loo_error[0]

    def by_hand(penalty):
        errors = []
        for i in range(12):
            # the closed form does not penalise the mean of all trials, and keeps the centre
            design = np.column_stack([np.ones(11), np.delete(terms, i, 0)])
            gram = design.T @ design + penalty * np.diag([0.0] + [1.0] * 5)
            beta = np.linalg.solve(gram, design.T @ np.delete(y, i, 0)[:, 0])
            errors.append((y[i, 0] - beta[0] - terms[i] @ beta[1:]) ** 2)
        return np.mean(errors)

    centred = terms - terms.mean(0)
    unit = np.linalg.eigvalsh(centred @ centred.T).clip(0).mean()
    assert told == pytest.approx(
        min(by_hand(10.0**k * unit) for k in range(-6, 3)), rel=1e-6
    )


def test_choices_have_their_own_level():
    space = {
        "c": CategoricalDistribution(("a", "b", "c")),
        "x": FloatDistribution(0, 1),
    }
    encoding = Encoding(space)
    points = [{"c": c, "x": x} for c in "abc" for x in np.linspace(0, 1, 6)]
    y = np.array(
        [
            [{"a": 0.0, "b": 2.0, "c": -1.0}[p["c"]] - (p["x"] - 0.5) ** 2]
            for p in points
        ]
    )
    fit = QuadraticSurrogate(encoding, encoding.encode(points), y)
    assert fit.predict(encoding.encode([{"c": "b", "x": 0.25}]))[0, 0] == pytest.approx(
        2 - 0.0625, abs=0.02
    )


def test_promise_puts_the_largest_gain_first_and_then_the_largest_gap():
    y = np.array([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5]])
    nothing = np.zeros((0, 2))
    predicted = np.array([[0.4, 0.4], [0.8, 0.8], [0.0, 0.0], [0.55, 0.55]])
    assert improvement_order(predicted, y, nothing).tolist() == [1, 3, 2, 0]
    assert (
        improvement_order(predicted, y, np.array([[0.8, 0.8]])).tolist()[0] == 2
    )  # somebody is on the way to the other gains


def volume(sampler, seed):
    study = optuna.create_study(directions=["maximize"] * 2, sampler=sampler)
    for _ in range(25):
        trial = study.ask(FOUR)
        x = np.array(list(trial.params.values()))
        cost = ((x[1:] - 0.5) ** 2).sum() * 2
        study.tell(trial, [x[0] - cost, 1 - x[0] ** 2 - cost])
    return hypervolume([t.values for t in study.trials], [0, 0])


def test_it_finds_a_front_that_a_sobol_sequence_does_not():
    for seed in (0, 1):
        assert (
            volume(PointSampler(MAPProposer(), seed=seed, space=FOUR), seed) > 0.6
        )  # the whole front has 2/3
        assert volume(PointSampler(None, seed=seed, space=FOUR), seed) < 0.5


def test_an_ask_stays_under_a_second_at_a_hundred_parameters():
    space = {f"x{i}": FloatDistribution(0, 1) for i in range(100)}
    rng = np.random.default_rng(0)
    study = optuna.create_study(
        directions=["maximize"] * 3, sampler=PointSampler(MAPProposer(), space=space)
    )
    for _ in range(60):
        params = dict(zip(space, rng.random(100).tolist(), strict=True))
        study.add_trial(
            optuna.trial.create_trial(
                values=list(rng.random(3)), params=params, distributions=space
            )
        )
    start = time.process_time()
    study.ask(space)
    assert time.process_time() - start < 2  # half of that on a quiet machine


def test_trials_that_run_at_the_same_time_seek_different_parts_of_the_front():
    def scores(x):
        cost = ((x[1:] - 0.5) ** 2).sum() * 2
        return np.array([x[0] - cost, 1 - x[0] ** 2 - cost])

    study = optuna.create_study(
        directions=["maximize"] * 2, sampler=PointSampler(MAPProposer(), space=FOUR)
    )
    rng = np.random.default_rng(0)
    for _ in range(30):
        x = rng.random(4)
        study.add_trial(
            optuna.trial.create_trial(
                values=list(scores(x)),
                params=dict(zip(FOUR, x, strict=True)),
                distributions=FOUR,
            )
        )
    running = np.array(
        [scores(np.array(list(study.ask(FOUR).params.values()))) for _ in range(4)]
    )
    apart = np.linalg.norm(running[:, None] - running[None], axis=2) + np.eye(4)
    assert apart.min() > 0.1
