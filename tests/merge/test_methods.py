"""Laws of the merge methods, on tensors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paretomerge.merge.methods import METHODS, Inputs
from paretomerge.merge.methods.task_vectors import drop_, trim_

DELTA_METHODS = [n for n, m in METHODS.items() if m.base == "required" and n != "model_stock"]
SEEDS = st.integers(0, 2**31)
OPTIONS = {"lambda": 1.0, "normalize": False, "rescale": True, "t": 0.5}


def make(seed: int, k: int = 3, n: int = 40) -> tuple[torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(n, generator=generator)
    return base, [base + 0.1 * torch.randn(n, generator=generator) for _ in range(k)]


def combine(method: str, base, sources, weights, density=1.0, **options) -> torch.Tensor:
    knobs = [{"weight": w, "density": density, "scale": w} for w in weights]
    uniform = [lambda i=i: torch.rand(sources[0].shape, generator=torch.Generator().manual_seed(i)) for i in range(len(sources))]
    return METHODS[method].combine(Inputs(base, sources, knobs, OPTIONS | options, uniform))


@pytest.mark.parametrize("method", DELTA_METHODS)
@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, which=st.integers(0, 2))
def test_one_hot_weights_give_that_model(method, seed, which):
    base, sources = make(seed)
    merged = combine(method, base, sources, [float(i == which) for i in range(3)])
    torch.testing.assert_close(merged, sources[which])


@pytest.mark.parametrize("method", DELTA_METHODS)
@given(seed=SEEDS)
@settings(max_examples=10, deadline=None)
def test_zero_weights_give_the_base(method, seed):
    base, sources = make(seed)
    assert torch.equal(combine(method, base, sources, [0.0] * 3), base)


@given(seed=SEEDS, density=st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_trim_keeps_exactly_the_floor_even_among_equals(seed, density):
    n = 50
    delta = torch.randint(-3, 4, (n,), generator=torch.Generator().manual_seed(seed)).float()
    delta[delta == 0] = 2.0
    trimmed = trim_(delta.clone(), density)
    kept = trimmed != 0
    assert int(kept.sum()) == int(density * n)
    if kept.any() and not kept.all():
        assert delta[kept].abs().min() >= delta[~kept].abs().max()
    assert torch.equal(trimmed[kept], delta[kept])


@pytest.mark.parametrize("pair", [("ties", "dare_ties"), ("task_arithmetic", "dare_linear")])
def test_density_one_is_no_sparsification(pair):
    base, sources = make(1)
    left, right = (combine(m, base, sources, [0.4, 0.7, 0.2]) for m in pair)
    assert torch.equal(left, right)


def test_soup_is_task_arithmetic_at_one_kth():
    base, sources = make(2)
    soup = combine("linear", None, sources, [2.0, 2.0, 2.0], normalize=True)
    torch.testing.assert_close(combine("task_arithmetic", base, sources, [1 / 3] * 3), soup)


def test_linear_unnormalised_is_a_plain_sum():
    _, sources = make(3)
    torch.testing.assert_close(combine("linear", None, sources, [1.0, -2.0, 0.5]), sources[0] - 2 * sources[1] + 0.5 * sources[2])


def test_ties_on_a_case_worked_by_hand():
    base = torch.zeros(4)
    sources = [torch.tensor([1.0, -3.0, 0.0, 2.0]), torch.tensor([2.0, 1.0, 0.0, -2.0])]
    # signs of the sum: +, -, + (zero counts as +), + (tie); only agreeing, non-zero entries are averaged
    merged = combine("ties", base, sources, [1.0, 1.0], normalize=True)
    assert merged.tolist() == [1.5, -3.0, 0.0, 2.0]
    # with weights 1 and 2 the last sign turns; the divisor is the agreeing weight
    merged = combine("ties", base, sources, [1.0, 2.0], normalize=True)
    torch.testing.assert_close(merged, torch.tensor([5 / 3, -3.0, 0.0, -2.0]))
    # a negative weight turns its delta before signs are elected: 1 and -2, -3 and -1, 2 and 2
    merged = combine("ties", base, sources, [1.0, -1.0], normalize=False)
    assert merged.tolist() == [-2.0, -4.0, 0.0, 4.0]
    # half of each delta is kept: the two largest magnitudes
    merged = combine("ties", base, sources, [1.0, 1.0], density=0.5, normalize=False)
    assert merged.tolist() == [2.0, -3.0, 0.0, 2.0]


def test_dare_keeps_its_share_and_its_norm():
    shares, means = [], []
    delta = torch.rand(20_000, generator=torch.Generator().manual_seed(99)) + 0.5
    for seed in range(20):
        uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(seed))
        dropped = drop_(delta.clone(), 0.3, uniform, True)
        torch.testing.assert_close(dropped.abs().sum(), delta.abs().sum())
        shares.append((dropped != 0).float().mean().item())
        means.append(drop_(delta.clone(), 0.3, uniform, "inverse_density").mean().item())
    error = math.sqrt(0.3 * 0.7 / 20_000 / 20)
    assert abs(sum(shares) / 20 - 0.3) < 3 * error
    assert abs(sum(means) / 20 - delta.mean().item()) < 3 * 1.1 * error / 0.3
    plain = drop_(delta.clone(), 0.3, uniform, False)
    assert torch.equal(plain[plain != 0], delta[plain != 0])


@given(seed=SEEDS, t=st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_slerp_ends_at_its_ends_and_is_symmetric(seed, t):
    base, (other,) = make(seed, k=1)
    other = other + torch.randn_like(other)
    torch.testing.assert_close(combine("slerp", None, [base, other], [1, 1], t=0.0), base)
    torch.testing.assert_close(combine("slerp", None, [base, other], [1, 1], t=1.0), other)
    there = combine("slerp", None, [base, other], [1, 1], t=t)
    back = combine("slerp", None, [other, base], [1, 1], t=1 - t)
    torch.testing.assert_close(there, back, rtol=1e-4, atol=1e-5)


def test_slerp_keeps_the_norm_of_unit_vectors_and_is_a_line_when_colinear():
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    assert combine("slerp", None, [a, b], [1, 1], t=0.5).norm().item() == pytest.approx(1)
    assert combine("slerp", None, [a, 3 * a], [1, 1], t=0.5).tolist() == [2.0, 0.0]


def test_model_stock_between_base_and_mean():
    base = torch.zeros(2)
    right_angle = [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])]
    assert torch.equal(combine("model_stock", base, right_angle, [1, 1]), base)
    alike = [torch.tensor([1.0, 1.0])] * 2
    torch.testing.assert_close(combine("model_stock", base, alike, [1, 1]), alike[0])
    # cos 60 degrees = 1/2, K = 2: t = 2 (1/2) / (1 + 1/2) = 2/3
    sixty = [torch.tensor([1.0, 0.0]), torch.tensor([0.5, math.sqrt(3) / 2])]
    torch.testing.assert_close(combine("model_stock", base, sixty, [1, 1]), 2 / 3 * torch.stack(sixty).mean(0))


@pytest.mark.parametrize("method", sorted(METHODS))
def test_no_method_writes_to_its_inputs(method):
    base, sources = make(4, k=2 if method == "slerp" else 1 if method == "passthrough" else 3)
    before = [base.clone(), *(s.clone() for s in sources)]
    combine(method, base, sources, [0.3] * len(sources), density=0.5)
    assert all(torch.equal(a, b) for a, b in zip(before, [base, *sources], strict=True))
