"""A weight per source in methods that are published without: it multiplies the delta first.

The right results are computed here, by numpy and in float64.
"""

import numpy as np
import pytest
import torch

from paretomerge.merging.methods import METHODS
from paretomerge.testing import merge_tensors
from paretomerge.testing.methods import example_statistics
from tests.merging.methods.cases import deltas, merged
from tests.merging.methods.test_papers import arrays, near, polar

SPECTRAL = ("tsv", "iso_c", "iso_cts", "wudi")
METHODS_WITH_IT = (*SPECTRAL, "sce")
# Adam's steps do not grow with the deltas, so wudi is only tested for the law where it takes none.
HOMOGENEOUS = {
    "tsv": {},
    "iso_c": {},
    "iso_cts": {},
    "wudi": {"steps": 0},
    "sce": {"select_topk": 0.4},
}
QUICK = {"wudi": {"steps": 5, "lr": 1e-3}, "sce": {"select_topk": 0.5}}
WEIGHTS = [0.4, 1.0, -0.7]


def names_of(method):
    return {parameter.name for parameter in METHODS[method].parameters}


WITH_LAMBDA = [name for name in METHODS if {"weight", "lambda"} <= names_of(name)]


def scaled(taus, weights):
    return [w * tau for w, tau in zip(weights, taus, strict=True)]


def tsv(taus):
    rank = max(1, min(taus[0].shape) // len(taus))
    left, values, right = [], [], []
    for tau in taus:
        u, s, v = np.linalg.svd(tau, full_matrices=False)
        left.append(u[:, :rank])
        values.append(s[:rank])
        right.append(v[:rank].T)
    left = polar(np.concatenate(left, 1))
    right = polar(np.concatenate(right, 1))
    return left @ np.diag(np.concatenate(values)) @ right.T


def iso_c(taus):
    u, s, v = np.linalg.svd(sum(taus), full_matrices=False)
    return s.mean() * u @ v


def iso_cts(taus, common_fraction=0.8):
    k = len(taus)
    u, s, v = np.linalg.svd(sum(taus), full_matrices=False)
    rank = len(s)
    own = min(round((rank - int(common_fraction * rank)) / k), rank // k)
    n_common = rank - own * k
    common = u[:, :n_common]
    left, values, right = [common], [s[:n_common]], [v[:n_common].T]
    for tau in taus:
        outside = tau - common @ common.T @ tau
        u, s, v = np.linalg.svd(outside, full_matrices=False)
        left.append(u[:, :own])
        values.append(s[:own])
        right.append(v[:own].T)
    flat = np.concatenate(values).mean()
    left = polar(np.concatenate(left, 1))
    right = polar(np.concatenate(right, 1))
    return flat * left @ right.T


def wudi(taus, steps, lr):
    """Adam (Kingma & Ba 2015, alg. 1) on eq. 9 of Cheng et al. 2025."""
    tau = sum(taus)
    mean, square = np.zeros_like(tau), np.zeros_like(tau)
    for step in range(1, steps + 1):
        gradient = np.zeros_like(tau)
        for own in taus:
            gradient += 2 * (tau - own) @ own.T @ own / np.square(own).sum()
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        corrected = mean / (1 - 0.9**step)
        scale = np.sqrt(square / (1 - 0.999**step)) + 1e-8
        tau = tau - lr * corrected / scale
    return tau


def sce(taus, select_topk=1.0):
    """FuseChat, sec. 3.3, on arrays without equal entries."""
    stack = np.stack(taus)
    count = int(np.float32(select_topk) * np.float32(stack[0].size))
    variance = stack.var(0)
    least = np.sort(variance, axis=None)[-count]
    stack = np.where(variance >= least, stack, 0)
    squares = np.square(stack).mean(axis=(1, 2))
    shares = squares / squares.sum()
    sign = np.where(stack.sum(0) >= 0, 1, -1)
    agrees = (stack * sign) > 0
    total = np.einsum("k,kij->ij", shares, stack * agrees)
    divisor = np.einsum("k,kij->ij", shares, agrees)
    return total / np.maximum(divisor, 1e-6)


REFERENCES = [
    (tsv, {}),
    (iso_c, {}),
    (iso_cts, {}),
    (iso_cts, {"common_fraction": 0.5}),
    (wudi, {"steps": 20, "lr": 1e-3}),
    (sce, {}),
    (sce, {"select_topk": 0.4}),
]


@pytest.mark.parametrize(("reference", "settings"), REFERENCES)
@pytest.mark.parametrize("weights", [WEIGHTS, [2.0, 0.25, 1.3], [0.6, 0.6, 0.6]])
@pytest.mark.parametrize("shape", [(12, 20), (21, 12)])
def test_the_method_is_that_of_the_scaled_deltas(reference, settings, weights, shape):
    base, sources = deltas(3, *shape, size=0.5)
    start, taus = arrays(base, sources)
    expected = start + reference(scaled(taus, weights), **settings)
    near(merged(reference.__name__, base, sources, weights, **settings), expected)


@pytest.mark.parametrize("method", SPECTRAL)
def test_what_is_no_matrix_takes_the_mean_of_the_scaled_deltas(method):
    base, sources = deltas(8, 30)
    start, taus = arrays(base, sources)
    expected = start + 0.5 * sum(scaled(taus, WEIGHTS)) / 3
    near(merged(method, base, sources, WEIGHTS, **{"lambda": 0.5}), expected)


@pytest.mark.parametrize("method", METHODS_WITH_IT)
@pytest.mark.parametrize("shape", [(40,), (9, 14), (2, 8, 10)])
def test_weight_1_is_no_weight(method, shape):
    base, sources = deltas(5, *shape)
    settings = QUICK.get(method, {})
    plain = merged(method, base, sources, **settings)
    assert torch.equal(merged(method, base, sources, [1.0] * 3, **settings), plain)


@pytest.mark.parametrize("method", METHODS_WITH_IT)
@pytest.mark.parametrize("shape", [(40,), (9, 14), (2, 8, 10)])
@pytest.mark.parametrize("weights", [(0.6, -0.8), (1.0, 1.0)])
def test_weight_0_leaves_the_source_out(method, shape, weights):
    base, sources = deltas(6, *shape)
    settings = QUICK.get(method, {})
    with_it = merged(method, base, sources, [*weights, 0.0], **settings)
    without = merged(method, base, sources[:2], weights, **settings)
    assert torch.equal(with_it, without)


@pytest.mark.parametrize("method", HOMOGENEOUS)
@pytest.mark.parametrize("factor", [2.5, 0.2])
@pytest.mark.parametrize("shape", [(40,), (9, 14)])
def test_weights_times_c_give_c_times_the_delta(method, factor, shape):
    base, sources = deltas(7, *shape, size=0.5)
    settings = HOMOGENEOUS[method]
    one = merged(method, base, sources, WEIGHTS, **settings)
    times = [factor * weight for weight in WEIGHTS]
    other = merged(method, base, sources, times, **settings)
    expected = factor * (one - base)
    torch.testing.assert_close(other - base, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", WITH_LAMBDA)
def test_lambda_stands_for_weights_where_the_table_says_so(method):
    row = METHODS[method]
    base, sources = deltas(7, 9, 14, size=0.5)
    settings = {}
    if "normalize" in names_of(method):
        settings = {"normalize": False}
    if method == "wudi":
        settings = {"steps": 30, "lr": 1e-3}
    scaled_merge = merged(method, base, sources, WEIGHTS, **settings, **{"lambda": 0.5})
    halves = [weight / 2 for weight in WEIGHTS]
    scaled_weights = merged(method, base, sources, halves, **settings)
    same = torch.allclose(scaled_merge, scaled_weights, rtol=1e-4, atol=1e-5)
    assert same is row.scales_with_lambda


@pytest.mark.parametrize("method", METHODS_WITH_IT)
def test_blocks_and_the_order_of_the_sources_do_not_matter(method):
    base, sources = deltas(9, 30, 17, size=0.5)
    parameters = [{"weight": weight} for weight in WEIGHTS]
    row, options = METHODS[method], QUICK.get(method, {})
    whole = merge_tensors(row, base, sources, parameters, options)
    for block in (1, 50, 200):
        blocks = merge_tensors(row, base, sources, parameters, options, block=block)
        assert torch.equal(blocks, whole)
    turned = merge_tensors(row, base, sources[::-1], parameters[::-1], options)
    torch.testing.assert_close(turned, whole, rtol=1e-4, atol=1e-4)


WEIGHTED = [
    name
    for name, method in METHODS.items()
    if "weight" in names_of(name) and method.base == "required"
]


@pytest.mark.parametrize("method", WEIGHTED)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("weights", [[1e-44, 0.0, 0.0], [1e-44, 1.0, -0.5]])
def test_a_weight_that_is_almost_nothing_gives_numbers(method, normalize, weights):
    """float32 has few digits for it, and none for its product with a small number."""
    row = METHODS[method]
    base, sources = deltas(9, 8, 6)
    parameters = [{"weight": weight} for weight in weights]
    if "epsilon" in names_of(method):
        parameters = [{**one, "density": 0.5, "epsilon": 0.1} for one in parameters]
    options = dict(QUICK.get(method, {}))
    if "normalize" in names_of(method):
        options["normalize"] = normalize
    settings = {p.name: p.default for p in row.parameters} | options
    if row.check is not None and row.check(parameters, settings):
        pytest.skip("the recipe is refused")
    merged_tensor = merge_tensors(
        row,
        base,
        sources,
        parameters,
        options,
        statistics=example_statistics(row, sources),
    )
    assert torch.isfinite(merged_tensor).all()
