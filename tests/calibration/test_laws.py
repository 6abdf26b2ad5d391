"""Laws of means with matrices as weights, and small cases worked out by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from paretomerge.checkpoint.operand import InMemoryTensor
from paretomerge.merging.methods import METHODS
from paretomerge.merging.statistics import Statistic
from paretomerge.testing import merge_tensors
from tests.merging.methods.cases import deltas

SEEDS = st.integers(0, 2**31)


def gram(seed: int, size: int, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, size, generator=generator)
    # Features of language models differ in size by factors of thousands.
    x *= 10 ** torch.linspace(-2, 2, size)
    return x.T @ x / tokens


def regmean(base, sources, grams, weights=None, of_rows=False, **options) -> Tensor:
    statistics = [Statistic(InMemoryTensor(one), of_rows) for one in grams]
    parameters = [{"weight": weight} for weight in weights or [1.0] * len(sources)]
    return merge_tensors(
        METHODS["regmean"], base, sources, parameters, options, statistics=statistics
    )


def test_a_case_by_hand():
    """One row, two inputs: the first source has seen the first input alone, mostly."""
    base = torch.zeros(1, 2)
    sources = [torch.tensor([[3.0, 3.0]]), torch.tensor([[6.0, 9.0]])]
    grams = [torch.diag(torch.tensor([2.0, 1.0])), torch.diag(torch.tensor([1.0, 2.0]))]
    expected = torch.tensor([[(2 * 3 + 6) / 3, (3 + 2 * 9) / 3]])
    torch.testing.assert_close(regmean(base, sources, grams), expected)
    # Off the diagonal: W^T = (G_1 + G_2)^-1 (G_1 W_1^T + G_2 W_2^T), worked out.
    grams = [
        torch.tensor([[2.0, 1.0], [1.0, 1.0]]),
        torch.tensor([[1.0, 0.0], [0.0, 2.0]]),
    ]
    # G_1 + G_2 = [[3, 1], [1, 3]]; G_1 W_1 = [9, 6], G_2 W_2 = [6, 18]
    expected = torch.tensor([[(3 * 15 - 24) / 8, (3 * 24 - 15) / 8]])
    torch.testing.assert_close(regmean(base, sources, grams, alpha=1.0), expected)
    # alpha = 0.5: [[3, 0.5], [0.5, 3]]; [6 + 1.5, 1.5 + 3] and [6, 18]
    left = torch.tensor([[3.0, 0.5], [0.5, 3.0]])
    right = torch.tensor([13.5, 22.5])
    expected = torch.linalg.solve(left, right)[None]
    torch.testing.assert_close(regmean(base, sources, grams, alpha=0.5), expected)


@given(SEEDS, st.sampled_from([0.0, 0.4, 1.0]))
@settings(max_examples=20, deadline=None)
def test_equal_matrices_give_the_weighted_mean(seed, alpha):
    base, sources = deltas(seed % 1000, 5, 8)
    same = [gram(seed, 8, 40)] * 3
    for matrices in ([torch.eye(8)] * 3, same):
        merged = regmean(base, sources, matrices, alpha=alpha)
        mean = torch.stack(sources).mean(0)
        torch.testing.assert_close(merged, mean, rtol=1e-4, atol=1e-5)
        weights = [0.5, 1.0, -0.25]
        merged = regmean(base, sources, matrices, weights, alpha=alpha, normalize=False)
        expected = base + sum(
            w * (source - base) for w, source in zip(weights, sources, strict=True)
        )
        torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5)


@given(SEEDS, st.integers(1, 12))
@settings(max_examples=25, deadline=None)
def test_it_is_the_least_squares_solution(seed, tokens):
    """No other matrix has outputs nearer to those of the sources, also with few tokens."""
    base, sources = deltas(seed % 1000, 4, 8, size=1.0)
    grams = [gram(seed + i, 8, tokens) for i in range(3)]
    weights = [1.0, 0.5, 2.0]
    merged = regmean(base, sources, grams, weights, alpha=1.0).double()
    assert torch.isfinite(merged).all()

    def error(matrix):
        total = 0.0
        for weight, source, one in zip(weights, sources, grams, strict=True):
            difference = matrix - source.double()
            total += weight * torch.trace(difference @ one.double() @ difference.T)
        return float(total)

    least = error(merged)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(5):
        step = torch.randn(4, 8, generator=generator, dtype=torch.float64)
        assert error(merged + 0.01 * step) >= least * (1 - 1e-4)


@given(SEEDS, st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_where_the_text_says_nothing_the_mean_is_taken(seed, tokens):
    """Directions that no text has reached; the papers' form would make them zero."""
    base, sources = deltas(seed % 1000, 4, 8)
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q
    seen, unseen = basis[:, :4], basis[:, 4:]
    grams = []
    for _ in sources:
        x = torch.randn(tokens, 4, generator=generator) @ seen.T
        grams.append(x.T @ x)
    merged = regmean(base, sources, grams, alpha=1.0)
    mean = torch.stack(sources).mean(0)
    torch.testing.assert_close(merged @ unseen, mean @ unseen, rtol=1e-2, atol=1e-2)
    dead = [torch.zeros(8, 8)] * 3
    torch.testing.assert_close(regmean(base, sources, dead), mean)


def test_transposed_layers():
    base, sources = deltas(3, 6, 9)
    grams = [gram(i, 9, 40) for i in range(3)]
    expected = regmean(base, sources, grams)
    turned = [source.T.contiguous() for source in sources]
    merged = regmean(base.T.contiguous(), turned, grams, of_rows=True)
    torch.testing.assert_close(merged, expected.T, rtol=1e-5, atol=1e-6)


def test_a_head_of_many_rows_goes_piece_by_piece(monkeypatch):
    """The result does not depend on the rows of a piece, but for rounding."""
    base, sources = deltas(4, 50, 8)
    grams = [gram(i, 8, 40) for i in range(3)]
    whole = regmean(base, sources, grams)
    monkeypatch.setattr("paretomerge.merging.methods.calibrated.ROWS_OF_PIECE", 7)
    torch.testing.assert_close(regmean(base, sources, grams), whole)


@pytest.mark.parametrize("negative", [-0.5, -2.0])
def test_a_negative_weight_moves_the_merge_away(negative):
    base, (source,) = deltas(5, 4, 6, k=1)
    one = gram(1, 6, 30)
    merged = regmean(base, [source], [one], [negative], normalize=False)
    expected = base + negative * (source - base)
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5)


def test_fisher_by_hand():
    base = torch.zeros(3)
    sources = [torch.tensor([1.0, 2.0, 8.0]), torch.tensor([4.0, 6.0, 2.0])]
    squares = [torch.tensor([3.0, 0.0, 0.0]), torch.tensor([1.0, 2.0, 0.0])]
    statistics = [
        Statistic(InMemoryTensor(squares[0]), norm=3.0),
        Statistic(InMemoryTensor(squares[1]), norm=0.5),
    ]

    def fisher(**options):
        return merge_tensors(
            METHODS["fisher"], base, sources, None, options, statistics=statistics
        )

    # eps = 1: precisions (4, 1, 1) and (2, 3, 1)
    plain = fisher(eps=1.0, normalize_fisher=False)
    expected = [(4 * 1 + 2 * 4) / 6, (1 * 2 + 3 * 6) / 4, (8 + 2) / 2]
    torch.testing.assert_close(plain, torch.tensor(expected))
    # Divided by the norms 3 and 0.5: (4/3, 1/3, 1/3) and (4, 6, 2)
    scaled = fisher(eps=1.0)
    expected = [
        (4 / 3 * 1 + 4 * 4) / (4 / 3 + 4),
        (1 / 3 * 2 + 6 * 6) / (1 / 3 + 6),
        (1 / 3 * 8 + 2 * 2) / (1 / 3 + 2),
    ]
    torch.testing.assert_close(scaled, torch.tensor(expected))


@given(SEEDS, st.integers(2, 40))
@settings(max_examples=20, deadline=None)
def test_few_rows_are_merged_as_many(seed, tokens):
    """Matrices with fewer outputs than inputs go another way, to the same result."""
    base, sources = deltas(seed % 1000, 20, 8, size=1.0)
    grams = [gram(seed + i, 8, tokens) for i in range(3)]
    weights = [1.0, 0.5, -0.3]
    options = {"alpha": 0.9, "normalize": False}
    many = regmean(base, sources, grams, weights, **options)
    few = regmean(base[:5], [one[:5] for one in sources], grams, weights, **options)
    torch.testing.assert_close(few, many[:5], rtol=1e-4, atol=1e-4)
    wide = [one[:5].T.contiguous() for one in sources]
    turned = base[:5].T.contiguous()
    few = regmean(turned, wide, grams, weights, of_rows=True, **options)
    torch.testing.assert_close(few.T, many[:5], rtol=1e-4, atol=1e-4)
