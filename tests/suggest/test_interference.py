"""The interference against its formula in float64, and the laws it must keep."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paretomerge.suggest.interference import Interference
from paretomerge.suggest.sample import leading_directions


def family(seed, k=3, shape=(12, 10)):
    generator = torch.Generator().manual_seed(seed)
    return {
        str(i): torch.randn(shape, generator=generator, dtype=torch.float32)
        for i in range(k)
    }


def measured(merged, deltas):
    found = Interference()
    directions = {name: leading_directions(delta) for name, delta in deltas.items()}
    found.add(merged, deltas, directions)
    return found


def formula(merged, delta):
    """|(tau - tau_i) tau_i^T|^2 / |tau_i tau_i^T|^2."""
    tau, own = merged.double().numpy(), delta.double().numpy()
    lost = np.linalg.norm((tau - own) @ own.T) ** 2
    return lost / np.linalg.norm(own @ own.T) ** 2


@given(st.integers(0, 1000), st.floats(0.1, 2))
def test_it_is_the_formula_at_every_scale(seed, scale):
    deltas = family(seed)
    merged = sum(deltas.values())
    at_scale = measured(merged, deltas).at(scale)
    for name, delta in deltas.items():
        expected = formula(scale * merged, delta)
        assert at_scale[name] == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_it_adds_up_over_matrices():
    one, other = family(1), family(2, shape=(6, 8))
    found = Interference()
    for deltas in (one, other):
        directions = {n: leading_directions(delta) for n, delta in deltas.items()}
        found.add(sum(deltas.values()), deltas, directions)
    lost = total = 0.0
    for deltas in (one, other):
        own = deltas["0"].double().numpy()
        tau = sum(deltas.values()).double().numpy()
        lost += np.linalg.norm((tau - own) @ own.T) ** 2
        total += np.linalg.norm(own @ own.T) ** 2
    assert found.at()["0"] == pytest.approx(lost / total, rel=1e-3)


def test_a_source_keeps_all_of_itself_and_the_base_nothing():
    deltas = family(0)
    found = measured(deltas["1"], deltas)
    assert found.at()["1"] == pytest.approx(0, abs=1e-6)
    nothing = measured(torch.zeros(12, 10), deltas)
    assert nothing.mean() == pytest.approx(1)
    assert nothing.best_scale() == 1.0


def test_sources_that_read_other_inputs_do_not_disturb_each_other():
    one, other = torch.zeros(4, 6), torch.zeros(4, 6)
    one[:, :3] = torch.ones(4, 3)
    other[:, 3:] = torch.ones(4, 3)
    found = measured(one + other, {"one": one, "other": other})
    assert found.mean() == pytest.approx(0, abs=1e-6)
    assert found.best_scale() == pytest.approx(1)


@given(st.integers(0, 1000))
def test_no_scale_is_better_than_the_best(seed):
    deltas = family(seed)
    found = measured(sum(deltas.values()), deltas)
    best = found.best_scale()
    for scale in (0.5 * best, 0.9 * best, 1.1 * best, 2 * best):
        assert found.mean(scale) >= found.mean(best)


def test_a_source_that_is_the_base_counts_nothing():
    deltas = family(0, k=2) | {"base": torch.zeros(12, 10)}
    found = measured(deltas["0"], deltas)
    assert set(found.at()) == {"0", "1"}
