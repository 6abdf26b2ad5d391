import itertools

import numpy as np
import pytest
import torch

from paretomerge.pareto.front import hypervolume
from paretomerge.pareto.preference import Preference, Scale
from paretomerge.search.mmmo.acquisition import (
    BoxLogEHVI,
    DirectionalLogEHVI,
    FeasibilityWeighted,
    evaluate,
    log_ehvi,
    log_preference_ei,
)
from paretomerge.search.mmmo.surrogate import KernelSpec, Surrogate


def fitted(m: int, n: int = 20, d: int = 2) -> tuple[Surrogate, np.ndarray]:
    rng = np.random.default_rng(m)
    x = rng.random((n, d))
    y = np.stack(
        [np.sin(3 * x[:, 0] + k) - (x[:, 1] - k / m) ** 2 for k in range(m)], 1
    )
    return Surrogate.fit(x, y, np.full(y.shape, 0.05)), y


def sampled_gain(
    surrogate: Surrogate,
    front: np.ndarray,
    reference: np.ndarray,
    x: np.ndarray,
    draws: int = 4000,
) -> float:
    """Expected hypervolume improvement by drawing outcomes, in standardised units."""
    mean, deviation = surrogate.predict(x[None])
    drawn = mean + deviation * np.random.default_rng(0).standard_normal(
        (draws, mean.shape[1])
    )
    front, worst, drawn = (surrogate.standardise(v) for v in (front, reference, drawn))
    before = hypervolume(front, worst)
    return float(
        np.mean(
            [
                hypervolume(np.concatenate([front, y[None]]), worst) - before
                for y in drawn
            ]
        )
    )


@pytest.mark.parametrize("m", [1, 2, 3])
def test_the_closed_form_is_what_sampling_says(m):
    surrogate, y = fitted(m)
    front, reference = y[:8], y.min(0) - 0.1
    acquisition = log_ehvi(surrogate, front, reference)
    for x in np.random.default_rng(1).random((4, 2)):
        expected = sampled_gain(surrogate, front, reference, x)
        assert np.exp(evaluate(acquisition, x[None]))[0] == pytest.approx(
            expected, rel=0.15, abs=3e-3
        )


def test_nothing_is_gained_at_a_trial_unless_it_may_come_out_otherwise():
    rng = np.random.default_rng(0)
    x = rng.random((15, 2))
    y = np.stack([np.sin(5 * x[:, 0]), -(x[:, 1] ** 2)], 1) + 0.2 * rng.standard_normal(
        (15, 2)
    )
    between, most = rng.random((200, 2)), {}
    for deterministic in (True, False):
        surrogate = Surrogate.fit(x, y, None, KernelSpec(deterministic=deterministic))
        acquisition = log_ehvi(surrogate, surrogate.predict(x)[0], y.min(0) - 0.1)
        most[deterministic] = np.exp(
            evaluate(acquisition, x).max() - evaluate(acquisition, between).max()
        )
    assert most[True] < 0.01 < 0.1 < most[False], most


@pytest.mark.parametrize("m", [2, 3, 4])
def test_directions_agree_with_boxes(m):
    """The quadrature for many objectives, where the closed form can be had."""
    surrogate, y = fitted(m)
    worst, front = surrogate.standardise(y.min(0) - 0.3), surrogate.standardise(y[:10])
    x = np.random.default_rng(2).random((40, 2))
    exact = np.exp(evaluate(BoxLogEHVI(surrogate, front, worst), x))
    quick = np.exp(evaluate(DirectionalLogEHVI(surrogate, front, worst), x))
    assert np.corrcoef(exact, quick)[0, 1] > 0.98
    assert quick.sum() == pytest.approx(exact.sum(), rel=0.15)


@pytest.mark.parametrize("m", [1, 2, 4, 5, 6])
def test_slopes_exist_everywhere_and_point_uphill(m):
    surrogate, y = fitted(m)
    acquisition = log_ehvi(surrogate, y, y.min(0) - 0.1)
    x = torch.from_numpy(np.random.default_rng(0).random((5, 1, 2))).requires_grad_()
    value = acquisition(x)
    value.sum().backward()
    assert (
        torch.isfinite(value).all()
        and torch.isfinite(x.grad).all()
        and (x.grad.abs().sum(-1) > 0).any()
    )
    moved = evaluate(
        acquisition,
        (x + 1e-6 * x.grad / x.grad.norm(dim=-1, keepdim=True)).detach()[:, 0].numpy(),
    )
    assert (moved >= value.detach().numpy() - 1e-6).all()


@pytest.mark.parametrize("m", [1, 2, 5])
def test_an_empty_front_leaves_everything_to_gain(m):
    surrogate, y = fitted(m)
    x = np.random.default_rng(0).random((6, 2))
    nothing = evaluate(log_ehvi(surrogate, y[:0], y.min(0) - 0.1), x)
    something = evaluate(log_ehvi(surrogate, y, y.min(0) - 0.1), x)
    assert np.isfinite(nothing).all() and (nothing >= something - 1e-9).all()


def test_a_constraint_and_failures_lower_what_is_expected():
    x = np.array(list(itertools.product(np.linspace(0, 1, 5), repeat=2)))
    surrogate = Surrogate.fit(x, np.stack([x[:, 0], 1 - x[:, 0]], 1), None)
    inner = log_ehvi(surrogate, np.array([[0.5, 0.5]]), np.array([-0.1, -0.1]))
    narrow = Surrogate.fit(
        x, x[:, 1:] - 0.5, None
    )  # feasible where the second coordinate is at most 0.5
    works = Surrogate.fit(x, (x[:, :1] < 0.6).astype(float), np.full((25, 1), 0.1))
    both = FeasibilityWeighted(inner, narrow, works)
    good, high, failing = np.array([[0.3, 0.2], [0.3, 0.9], [0.95, 0.2]])
    change = evaluate(both, np.array([good, high, failing])) - evaluate(
        inner, np.array([good, high, failing])
    )
    assert change[0] > -0.3 and change[1] < -3 and change[2] < -1


@pytest.mark.parametrize(
    "preference",
    [
        Preference((0.5, 0.3, 0.2), "sum"),
        Preference((0.5, 0.3, 0.2)),
        Preference((1, 0, 1)),
    ],
)
def test_the_expected_improvement_of_a_preference_is_what_sampling_says(preference):
    surrogate, y = fitted(3)
    scale = Scale.of(y)
    best = float(np.quantile(preference.values(y, scale), 0.7))
    acquisition = log_preference_ei(surrogate, preference, scale, best)
    standard = np.random.default_rng(0).standard_normal((100_000, 3))
    for x in np.random.default_rng(1).random((6, 2)):
        mean, deviation = surrogate.predict(x[None])
        values = preference.values(mean + deviation * standard, scale)
        expected = np.maximum(values - best, 0).mean()
        found = np.exp(evaluate(acquisition, x[None]))[0]
        # The augmentation, a thousandth of the sum, is left out of the quadrature.
        assert found == pytest.approx(expected, rel=0.03, abs=2e-3)
