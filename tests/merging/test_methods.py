"""Laws of the merge methods, on tensors. Worked numbers are in tests/merging/methods."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paretomerge.merging.methods import METHODS
from paretomerge.testing import check_copies, check_method, check_one_hot, merge_tensors
from tests.merging.methods.cases import deltas, merged

COSTLY = {"wudi": {"steps": 5}}
WEIGHTED = sorted(
    name
    for name, method in METHODS.items()
    if any(parameter.name == "weight" for parameter in method.parameters)
)
DENSE = sorted(
    name for name, method in METHODS.items() if method.has_density and name != "pcb"
)
EXACT = ["ties", "breadcrumbs", "breadcrumbs_ties"]
SEEDS = st.integers(0, 2**31)

# Copies of one model, with weights that sum to 1: the spectral methods and wudi do not add them up,
# sce takes the average of the weighted deltas, pcb drops nine tenths by default.
NOT_COPIES = {"pcb", "tsv", "iso_c", "iso_cts", "wudi", "sce"}
# One weight of 1: pcb's scores and consensus_ta's votes still count the models of weight 0, and
# iso_c and iso_cts flatten the spectrum of that model.
NOT_ONE_HOT = {"pcb", "consensus_ta", "iso_c", "iso_cts"}


@pytest.mark.parametrize("name", METHODS)
def test_contract(name):
    check_method(METHODS[name], **COSTLY.get(name, {}))


@pytest.mark.parametrize("name", sorted(set(METHODS) - NOT_COPIES))
def test_copies_of_a_model_give_the_model(name):
    check_copies(METHODS[name])


@pytest.mark.parametrize("name", sorted(set(WEIGHTED) - NOT_ONE_HOT))
def test_one_hot_weights_give_that_model(name):
    check_one_hot(METHODS[name])


@pytest.mark.parametrize("name", sorted(NOT_COPIES | NOT_ONE_HOT))
def test_where_those_laws_do_not_hold(name):
    """Held here too, so that the sets above do not outlive their reasons."""
    checks = [check_copies] * (name in NOT_COPIES) + [check_one_hot] * (
        name in NOT_ONE_HOT
    )
    for check in checks:
        with pytest.raises(AssertionError):
            check(METHODS[name], **COSTLY.get(name, {}))


def test_pcb_of_copies_with_all_entries_is_the_model():
    base, (model,) = deltas(6, 9, 11, k=1)
    torch.testing.assert_close(merged("pcb", base, [model] * 3, density=1.0), model)


def test_sce_of_copies_is_the_model():
    base, (model,) = deltas(6, 9, 11, k=1)
    torch.testing.assert_close(merged("sce", base, [model] * 3), model)


def test_iso_c_of_copies_times_one_kth_is_the_model():
    """Of a flat spectrum, which stays what it is."""
    base, _ = deltas(0, 6, 6)
    turn = torch.linalg.qr(base).Q
    torch.testing.assert_close(
        merged("iso_c", base, [base + turn] * 3, **{"lambda": 1 / 3}),
        base + turn,
        atol=1e-5,
        rtol=1e-5,
    )


ZERO_WEIGHTS = sorted(name for name in WEIGHTED if METHODS[name].base == "required")


@pytest.mark.parametrize("name", ZERO_WEIGHTS)
@pytest.mark.parametrize("normalize", [True, False])
def test_zero_weights_give_the_base(name, normalize):
    base, sources = deltas(1, 5, 8)
    options = (
        {"normalize": normalize}
        if any(parameter.name == "normalize" for parameter in METHODS[name].parameters)
        else {}
    )
    result = merged(name, base, sources, [0.0] * 3, **options)
    assert torch.equal(result, base) or torch.allclose(result, base, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in METHODS
        if any(parameter.name == "lambda" for parameter in METHODS[name].parameters)
    ],
)
def test_lambda_scales_the_merged_delta(name):
    base, sources = deltas(2, 6, 9)
    weights = [0.5] * 3 if name in WEIGHTED else []
    one, other = (
        merged(
            name, base, sources, weights, **{"lambda": scale}, **COSTLY.get(name, {})
        )
        for scale in (1.0, -1.5)
    )
    torch.testing.assert_close(other - base, -1.5 * (one - base), rtol=1e-4, atol=1e-5)


PLAIN = {
    "dare_linear": "task_arithmetic",
    "della_linear": "task_arithmetic",
    "breadcrumbs": "task_arithmetic",
}
VOTES = {"dare_ties": "ties", "della": "ties", "breadcrumbs_ties": "ties"}


@pytest.mark.parametrize("name", PLAIN | VOTES)
@given(
    seed=SEEDS,
    weights=st.lists(st.floats(-2, 2), min_size=3, max_size=3),
    normalize=st.booleans(),
)
@settings(max_examples=15, deadline=None)
def test_density_1_is_no_sparsification(name, seed, weights, normalize):
    base, sources = deltas(seed, 40)
    whole = merged((PLAIN | VOTES)[name], base, sources, weights, normalize=normalize)
    if normalize and 0 < abs(sum(weights)) < 0.01:
        return  # the sum magnifies rounding
    torch.testing.assert_close(
        merged(name, base, sources, weights, density=1.0, normalize=normalize),
        whole,
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("name", EXACT)
@given(seed=SEEDS, density=st.floats(0, 1), gamma=st.floats(0, 1), ties=st.booleans())
@settings(max_examples=40, deadline=None)
def test_density_d_keeps_exactly_the_floor_even_among_equals(
    name, seed, density, gamma, ties
):
    n = 53
    generator = torch.Generator().manual_seed(seed)
    delta = (
        torch.randint(1, 4, (n,), generator=generator).float()
        if ties
        else torch.rand(n, generator=generator) + 0.1
    )
    delta *= torch.randint(0, 2, (n,), generator=generator) * 2 - 1
    settings = {} if name == "ties" else {"gamma": gamma}
    result = merged(
        name, torch.zeros(n), [delta], [1], density=density, normalize=False, **settings
    )
    kept = result != 0
    count = int(density * n)
    if name == "ties" and density > 0:
        count = max(1, count)
    assert int(kept.sum()) == count
    assert torch.equal(result[kept], delta[kept])
    # in the order of magnitudes, the first of equals being the larger, a run of entries is kept
    order = delta.abs().argsort(descending=True, stable=True)
    top = 0 if name == "ties" else min(int(gamma * n), n - count)
    assert kept[order].nonzero().flatten().tolist() == list(range(top, top + count))


@pytest.mark.parametrize("name", EXACT)
def test_zeros_in_a_delta_are_kept_last(name):
    delta = torch.zeros(100)
    delta[60:70] = torch.arange(1.0, 11)
    result = merged(name, torch.zeros(100), [delta], [1], density=0.5, normalize=False)
    assert torch.equal(result, delta) or name != "ties"
    assert int((result != 0).sum()) == (
        10 if name == "ties" else 9
    )  # gamma 0.01 of 100 drops the largest


@given(seed=SEEDS, weights=st.lists(st.floats(0.01, 2), min_size=3, max_size=3))
@settings(max_examples=25, deadline=None)
def test_ties_stays_between_the_smallest_and_the_largest_delta(seed, weights):
    base, sources = deltas(seed, 40)
    result = merged("ties", base, sources, weights) - base
    each = torch.stack([source - base for source in sources])
    assert (result <= each.max(0).values + 1e-6).all()
    assert (result >= each.min(0).values - 1e-6).all()


def test_soup_is_task_arithmetic_at_one_kth():
    base, sources = deltas(2, 40)
    soup = merged("linear", None, sources, [2.0, 2.0, 2.0])
    torch.testing.assert_close(
        merged("task_arithmetic", base, sources, [1 / 3] * 3), soup
    )


@given(seed=SEEDS, t=st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_arcs_end_at_their_ends_and_are_symmetric(seed, t):
    _, (one, other) = deltas(seed, 40, k=2, size=1.0)
    for name in ("slerp", "nuslerp"):

        def at(start, end, t, name=name):
            return (
                merged(name, start, [end], t=t)
                if name == "slerp"
                else merged(name, None, [start, end], [1 - t, t])
            )

        torch.testing.assert_close(at(one, other, 0.0), one)
        torch.testing.assert_close(at(one, other, 1.0), other)
        torch.testing.assert_close(
            at(one, other, t), at(other, one, 1 - t), rtol=1e-4, atol=1e-5
        )


@given(seed=SEEDS, t=st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_arcs_keep_the_norm_of_unit_vectors(seed, t):
    generator = torch.Generator().manual_seed(seed)
    one, other = (x / x.norm() for x in torch.randn(2, 30, generator=generator))
    for result in (
        merged("slerp", one, [other], t=t),
        merged("nuslerp", None, [one, other], [1 - t, t]),
        merged("multislerp", None, [one, other], [1 - t, t]),
        merged("karcher", None, [one, other]),
    ):
        assert result.norm().item() == pytest.approx(1, abs=1e-4)


def test_karcher_of_two_is_the_middle_of_the_arc():
    generator = torch.Generator().manual_seed(0)
    one, other = (x / x.norm() for x in torch.randn(2, 30, generator=generator))
    torch.testing.assert_close(
        merged("karcher", None, [one, other]), merged("slerp", one, [other], t=0.5)
    )


def test_model_stock_between_base_and_mean():
    base = torch.zeros(2)
    right_angle = [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])]
    assert torch.equal(merged("model_stock", base, right_angle), base)
    # cos 60 degrees = 1/2, K = 2: t = 2 (1/2) / (1 + 1/2) = 2/3
    sixty = [torch.tensor([1.0, 0.0]), torch.tensor([0.5, math.sqrt(3) / 2])]
    torch.testing.assert_close(
        merged("model_stock", base, sixty), 2 / 3 * torch.stack(sixty).mean(0)
    )


@given(seed=SEEDS, t=st.floats(0, 1))
@settings(max_examples=25, deadline=None)
def test_nearswap_moves_every_entry_by_at_most_t(seed, t):
    base, (other,) = deltas(seed, 40, k=1, size=1.0)
    result = merged("nearswap", base, [other], t=t)
    assert ((result - base).abs() <= t + 1e-5).all()
    near = (other - base).abs() <= t
    torch.testing.assert_close(result[near], other[near])


def test_arcee_fusion_takes_each_entry_from_one_of_the_two():
    base, (other,) = deltas(3, 30, 40, k=1)
    result = merged("arcee_fusion", base, [other])
    taken = (result - base).abs() > 1e-6
    torch.testing.assert_close(result[taken], other[taken])
    assert 0 < taken.float().mean() < 0.5


@given(seed=SEEDS, share=st.floats(0, 1))
@settings(max_examples=25, deadline=None)
def test_sce_changes_only_its_share(seed, share):
    base, sources = deltas(seed, 60)
    result = merged(
        "sce", torch.zeros(60), [source - base for source in sources], select_topk=share
    )
    assert int((result != 0).sum()) <= round(share * 60)


@pytest.mark.parametrize("name", DENSE)
def test_weight_0_is_no_model(name):
    """The others' masks do not depend on it, nor does the result."""
    base, sources = deltas(4, 6, 30)
    parameters = [{"weight": weight, "density": 0.5} for weight in (1.0, 0.5, 0.0)]
    method = METHODS[name]
    assert torch.equal(
        merge_tensors(method, base, sources, parameters),
        merge_tensors(method, base, sources[:2], parameters[:2]),
    )


@pytest.mark.parametrize("name", METHODS)
def test_scalars_and_small_vectors(name):
    """Norms, biases, gates and scales of one or a few entries."""
    method = METHODS[name]
    k = (method.models[1] or 3) - (method.base == "source")
    for shape in ((), (1,), (2,), (1, 1), (3, 1), (1, 3)):
        base, sources = deltas(5, *shape, k=k)
        options = (
            {"t": 0.3}
            if any(parameter.name == "t" for parameter in method.parameters)
            else {}
        )
        density = {"density": 0.5} if method.has_density else {}
        result = merged(
            name,
            None if method.base == "none" else base,
            sources,
            [0.5] * 9 if name in WEIGHTED else (),
            **options,
            **density,
        )
        assert result.shape == base.shape
        assert torch.isfinite(result).all()
