"""Random masks of dare and della.

What they keep, with which probability, and that they have an address.
"""

import math

import numpy as np
import pytest
import torch

from paretomerge.merging.block import RandomStream
from paretomerge.merging.methods import METHODS
from paretomerge.testing import make_inputs, merge_tensors
from tests.merging.methods.cases import merged

SEEDS = 20


def delta_of(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(99)) + 0.5


@pytest.mark.parametrize(
    "method", ["dare_linear", "dare_ties", "della", "della_linear"]
)
def test_share_norm_and_mean(method):
    density, delta = 0.3, delta_of(40, 500)
    n, base = delta.numel(), torch.zeros(40, 500)
    shares, means = [], []
    for seed in range(SEEDS):
        settings = {"density": density, "seed": seed} | (
            {"epsilon": 0.2} if "della" in method else {}
        )
        norm = merged(method, base, [delta], [1], **settings, rescale=True)
        assert norm.abs().sum().item() == pytest.approx(
            delta.abs().sum().item(), rel=1e-5
        )
        plain = merged(method, base, [delta], [1], **settings, rescale=False)
        kept = plain != 0
        assert torch.equal(plain[kept], delta[kept])
        assert torch.equal(norm != 0, kept)
        shares.append(kept.float().mean().item())
        means.append(
            merged(method, base, [delta], [1], **settings, rescale="inverse_density")
            .double()
            .mean()
            .item()
        )
    assert abs(np.mean(shares) - density) < 3 * math.sqrt(
        density * (1 - density) / n / SEEDS
    )
    expected = delta.double()
    if "della" in method:  # the larger are kept more often
        rank = delta.argsort(1).argsort(1).double() / (delta.shape[1] - 1)
        expected = expected * (density - 0.2 + 0.4 * rank) / density
    assert abs(np.mean(means) - expected.mean().item()) < 3 * np.std(
        means, ddof=1
    ) / math.sqrt(SEEDS)


def keep_probabilities(
    row: list[float],
    density: float,
    epsilon: float,
    monkeypatch: pytest.MonkeyPatch,
    columns: int = 0,
) -> torch.Tensor:
    """Share of all random numbers for which each entry of the row is kept; exact to 1 / 4096."""
    rows, columns = 4096, columns or len(row)
    drawn = np.repeat(np.arange(rows, dtype=np.uint16) * (65536 // rows), columns)
    monkeypatch.setattr(
        RandomStream, "uint16", lambda self, start, end: drawn[start:end]
    )
    delta = torch.tensor(row).repeat(rows, 1)
    settings = {"density": density, "epsilon": epsilon, "rescale": False}
    return (
        (merged("della_linear", torch.zeros_like(delta), [delta], [1], **settings) != 0)
        .float()
        .mean(0)
    )


PROBABILITIES = [
    ([1.0, -2, 3, -0.5, 0.25, 1e-6], 0.5, 0.2, [0.54, 0.62, 0.70, 0.46, 0.38, 0.30]),
    ([-3.0, -1, 0.5, 2, 0.75, 1e-6], 0.5, 0.2, [0.70, 0.54, 0.38, 0.62, 0.46, 0.30]),
    ([1.0, -3, 2], 0.5, 0.2, [0.3, 0.7, 0.5]),
    ([0.5, 0.25, -4], 0.5, 0.2, [0.5, 0.3, 0.7]),
    (
        [0.5, 0.25, -4],
        0.3,
        -0.2,
        [0.3, 0.5, 0.1],
    ),  # a negative epsilon prefers the small
    ([0.5, 0.25, -4], 0.4, 0.0, [0.4, 0.4, 0.4]),
    ([2.0], 0.4, 0.15, [0.4]),  # mergekit fails on rows of one entry
]


@pytest.mark.parametrize(("row", "density", "epsilon", "expected"), PROBABILITIES)
def test_della_keeps_by_rank(row, density, epsilon, expected, monkeypatch):
    torch.testing.assert_close(
        keep_probabilities(row, density, epsilon, monkeypatch),
        torch.tensor(expected),
        atol=1e-3,
        rtol=0,
    )


def test_della_ranks_equal_magnitudes_apart(monkeypatch):
    found = keep_probabilities([1.0, 1, 1, -1, 1, 1], 0.5, 0.2, monkeypatch)
    expected = torch.tensor([0.3, 0.38, 0.46, 0.54, 0.62, 0.70])
    torch.testing.assert_close(found.sort().values, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("kinds", ["normal", "of five magnitudes", "of one magnitude"])
def test_della_probabilities_are_linear_in_the_rank(kinds):
    """Rows of 1000 entries, 8 bins by rank.

    Entries of equal magnitude share the mean of their ranks.
    """
    rows, columns, density, epsilon = 40, 1000, 0.5, 0.4
    generator = torch.Generator().manual_seed(7)
    delta = torch.randn(rows, columns, generator=generator)
    if kinds != "normal":
        size = torch.randint(
            1, 6 if "five" in kinds else 2, (rows, columns), generator=generator
        )
        delta = size.float() * delta.sign()
    kept = torch.zeros(rows, columns)
    for seed in range(SEEDS):
        kept += (
            merged(
                "della_linear",
                torch.zeros_like(delta),
                [delta],
                [1],
                density=density,
                epsilon=epsilon,
                seed=seed,
            )
            != 0
        )
    magnitude = delta.abs()
    below = (magnitude[:, None, :] < magnitude[:, :, None]).sum(2)
    equal = (magnitude[:, None, :] == magnitude[:, :, None]).sum(2)
    rank = below + (equal - 1) / 2
    expected = density - epsilon + 2 * epsilon * rank / (columns - 1)
    bins = (rank * 8 / columns).long()
    for i in bins.unique():
        inside = bins == i
        error = math.sqrt(0.25 / (int(inside.sum()) * SEEDS))
        assert (
            abs((kept[inside] / SEEDS).mean() - expected[inside].mean())
            < 4 * error + epsilon / 256
        ), f"bin {i}"
    assert (
        abs(kept.mean() / SEEDS - density)
        < 4 * math.sqrt(0.25 / (rows * columns * SEEDS)) + epsilon / 256
    )


def test_della_ranks_inside_rows_of_a_stack(monkeypatch):
    """The last axis, for every number of axes; mergekit ranks along the second axis of a stack."""
    drawn = np.full(
        6, int(0.5 * 65536) - 1, np.uint16
    )  # keeps what is kept with a probability of a half or more
    monkeypatch.setattr(
        RandomStream, "uint16", lambda self, start, end: drawn[start:end]
    )
    delta = torch.tensor([[[1.0, 2, 3], [4, 5, 6]]])
    result = merged(
        "della_linear",
        torch.zeros_like(delta),
        [delta],
        [1],
        density=0.5,
        epsilon=0.2,
        rescale=False,
    )
    assert result.tolist() == [[[0, 2, 3], [0, 5, 6]]]


def test_noise_has_an_address():
    whole = RandomStream(3, "a.weight", 1).uint16(0, 200_000)
    assert whole.dtype == np.uint16
    assert np.array_equal(
        whole[65_000:140_001], RandomStream(3, "a.weight", 1).uint16(65_000, 140_001)
    )
    for other in (
        RandomStream(4, "a.weight", 1),
        RandomStream(3, "b.weight", 1),
        RandomStream(3, "a.weight", 2),
        RandomStream(31, "a.weight", 1),
    ):
        assert np.mean(other.uint16(0, 200_000) == whole) < 1e-3
    assert abs(whole.mean() - 32767.5) < 3 * 65536 / math.sqrt(12 * len(whole))
    assert (
        np.mean(whole[: 1 << 16] == whole[1 << 17 : 3 << 16]) < 1e-3
    )  # chunks differ from each other


def test_noise_is_the_same_on_every_machine():
    """A change of these numbers changes every published merge with random masks."""
    assert RandomStream(0, "model.norm.weight", 0).uint16(0, 4).tolist() == [
        16583,
        62147,
        50414,
        22043,
    ]
    assert RandomStream(0, "model.norm.weight", 0).uint16(
        1 << 17, (1 << 17) + 2
    ).tolist() == [
        53690,
        61511,
    ]


@pytest.mark.parametrize("method", ["dare_linear", "della_linear"])
def test_masks_do_not_depend_on_blocks_and_differ_by_seed_and_model(method):
    delta = delta_of(150, 517)
    base = torch.zeros_like(delta)
    parameters = [{"weight": 1.0, "density": 0.5}] * 2
    one = [parameters[0], {"weight": 0.0, "density": 0.5}]
    other = [one[1], one[0]]
    row = METHODS[method]
    first = merge_tensors(row, base, [delta, delta], one, seed=5)
    assert torch.equal(
        first, merge_tensors(row, base, [delta, delta], one, block=3 * 517, seed=5)
    )
    kept = first != 0
    for parameters, seed in (
        (one, 6),
        (other, 5),
    ):  # another seed; another place among the models
        turned = merge_tensors(row, base, [delta, delta], parameters, seed=seed) != 0
        assert 0.45 < (kept == turned).float().mean() < 0.6
    inputs = make_inputs(row, base, [delta], one[:1], seed=5)
    whole = inputs.block(0, inputs.rows)
    expected = RandomStream(5, "tensor", 0).uint16(0, delta.numel())
    assert np.array_equal(whole.random_uint16(0), expected)
