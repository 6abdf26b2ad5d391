"""Worked numbers of mergekit in float32: methods on deltas, and those that choose entries."""

import numpy as np
import pytest
import torch

from paretomerge.merging.block import RandomStream
from paretomerge.merging.methods import METHODS
from tests.merging.methods.cases import (
    A6,
    C6,
    HALF,
    M1,
    M2,
    ZERO6,
    A,
    B,
    C,
    as_tensor,
    close,
    merged,
)

STEPS = [0.1 * i * (-1) ** i for i in range(1, 11)]
SIX = (ZERO6, [A6, C6], [1, 0.5])
EXAMPLES = {
    "task_arithmetic": (
        ("task_arithmetic", B, [A, C], [0.5, 0.25]),
        {},
        [1, 1.625, 2.875, 4.625],
    ),
    "task_arithmetic, mean, lambda": (
        ("task_arithmetic", B, [A, C], [0.5, 0.25]),
        {"normalize": True, "lambda": 2},
        [1, 1, 2.6666667, 5.6666667],
    ),
    "task_arithmetic, sum of 0": (
        ("task_arithmetic", B, [A, C], [0.5, -0.5]),
        {"normalize": True},
        [1.75, 1.25, 3.625, 4.25],
    ),
    "task_arithmetic of one": (
        ("task_arithmetic", B, [C], [0.25]),
        {},
        [0.75, 2.125, 2.75, 4.125],
    ),
    "ties": (("ties", *SIX), {"density": 0.5}, [-3, -1.6666666, 3, 2, 0, 0]),
    "ties, dense": (("ties", *SIX), {}, [-3, -1.6666666, 2.1666667, 2, 0.4166667, 0]),
    "ties, sum": (
        ("ties", *SIX),
        {"density": 0.5, "normalize": False},
        [-1.5, -2.5, 3, 1, 0, 0],
    ),
    "ties, rescaled": (
        ("ties", *SIX),
        {"density": 0.5, "rescale": True},
        [-3.625, -1.9027778, 3.375, 2.4166667, 0, 0],
    ),
    "ties, lambda": (
        ("ties", *SIX),
        {"density": 0.5, "lambda": 0.5},
        [-1.5, -0.8333333, 1.5, 1, 0, 0],
    ),
    "ties, negative": (
        ("ties", ZERO6, [A6, C6], [1, -1]),
        {},
        [4, -2, 3, -2.5, 0.75, 0],
    ),
    "ties of one": (("ties", ZERO6, [A6], [1]), {"density": 0.4}, [0, -2, 3, 0, 0, 0]),
    "ties, sum of 0 counts as +": (
        ("ties", [0.0, 0.0], [[1.0, -1.0], [-1.0, 1.0]], [1, 1]),
        {},
        [1, 1],
    ),
    "ties of equal magnitudes": (
        ("ties", ZERO6, [[1.0, -1, 1, 1, -1, 1]], [1]),
        {"density": 0.5},
        [1, -1, 1, 0, 0, 0],
    ),
    "ties of matrices": (
        ("ties", HALF, [M1, M2], [1, 0.5]),
        {"density": 0.5},
        [[1, 0, 2], [2, 0.5, -1]],
    ),
    "breadcrumbs": (
        ("breadcrumbs", [0.0] * 10, [STEPS], [1]),
        {"density": 0.6, "gamma": 0.2},
        [0, 0, *STEPS[2:8], 0, 0],
    ),
    "breadcrumbs, rescaled": (
        ("breadcrumbs", [0.0] * 10, [STEPS], [1]),
        {"density": 0.6, "gamma": 0.2, "rescale": True},
        [0, 0, *[step * 5 / 3 for step in STEPS[2:8]], 0, 0],
    ),
    "breadcrumbs, density first": (
        ("breadcrumbs", [0.0] * 10, [STEPS], [1]),
        {"density": 0.9, "gamma": 0.3},
        [*STEPS[:9], 0],
    ),
    "breadcrumbs_ties": (
        ("breadcrumbs_ties", [0.0] * 10, [STEPS, STEPS[::-1]], [1, 0.5]),
        {"density": 0.6, "gamma": 0.2},
        [0, 0, 0.4, 0.4, -0.5, 0.6, -0.7, 0.8, 0, 0],
    ),
    "sce": (("sce", ZERO6, [A6, C6]), {}, [-3, -1.4914162, 1.7285407, 2, 0.5042918, 0]),
    # the second largest variance is that of two entries: mergekit's sort takes the later one, we
    # the first
    "sce, selected": (
        ("sce", ZERO6, [A6, C6]),
        {"select_topk": 0.5},
        [-3, 0, 3 * 10 / 19.25 + 0.5 * 9.25 / 19.25, 0, 0, 0],
    ),
    "sce, selected, one is larger": (
        ("sce", ZERO6, [A6, [*C6[:3], 2.001, *C6[4:]]]),
        {"select_topk": 0.5},
        [-3, 0, 0, 2.001, 0, 0],
    ),
    "sce of one": (("sce", ZERO6, [A6]), {}, A6),
    "sce of matrices": (("sce", HALF, [M1, M2]), {}, [[1, 1, 1.3888888], [2, 1, -1]]),
    # four entries share the smallest variance, two of them are kept: the first; mergekit's sort
    # takes others
    "sce of matrices, selected": (
        ("sce", HALF, [M1, M2]),
        {"select_topk": 0.7},
        [[1, 1, 0.5], [2, 0.5, -1]],
    ),
    "nearswap": (("nearswap", B, [A]), {"t": 0.5}, [1.5, 1.5, 3.25, 4.5]),
    "nearswap, narrow": (
        ("nearswap", B, [A]),
        {"t": 0.1},
        [1.1, 1.9, 3.1000001, 4.0999999],
    ),
    "nearswap, 0": (("nearswap", B, [A]), {"t": 0.0}, B),
    "nearswap, negative": (("nearswap", B, [A]), {"t": -1.0}, B),
    "arcee_fusion": (
        ("arcee_fusion", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [A6]),
        {},
        [0.1, -2, 3, 0.4, 0.5, 0.6],
    ),
    "arcee_fusion of matrices": (
        (
            "arcee_fusion",
            [[0.1, 0.2, 0.3, 0.4], [0.5, -0.1, 0, 1]],
            [[[0.1, 0.25, 1.3, 0.4], [0.55, -0.1, -0.2, 1.05]]],
        ),
        {},
        [[0.1, 0.25, 1.3, 0.4], [0.5, -0.1, 0, 1]],
    ),
    "arcee_fusion of equals": (("arcee_fusion", B, [B]), {}, B),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_worked(name):
    arguments, settings, expected = EXAMPLES[name]
    close(merged(*arguments, **settings), expected)


FORCED = {
    "dare_linear": ("dare_linear", {}, [-0.4772727, 0, 4.8295455, 0.5681819, 0, 0]),
    "dare_linear, as it is": (
        "dare_linear",
        {"rescale": False},
        [-0.5, 0, 3.25, 0.5, 0, 0],
    ),
    "dare_linear, 1 / density": (
        "dare_linear",
        {"rescale": "inverse_density"},
        [-1, 0, 6.5, 1, 0, 0],
    ),
    "dare_ties": ("dare_ties", {}, [-1.9772727, 0, 4.8295455, 1.3181819, 0, 0]),
    "della": ("della", {}, [-3.9545455, 0, 3.2196970, 2.6363637, 0, 0]),
}


@pytest.fixture
def mask(monkeypatch):
    """Random masks that keep what the given one keeps."""

    def force(kept: list[int]) -> None:
        bits = np.where(np.array(kept), 0, 65535).astype(np.uint16)
        monkeypatch.setattr(
            RandomStream, "uint16", lambda self, start, end: bits[start:end]
        )

    return force


@pytest.mark.parametrize("name", FORCED)
def test_worked_with_a_forced_mask(name, mask):
    method, settings, expected = FORCED[name]
    mask([1, 0, 1, 1, 0, 1])
    close(merged(method, *SIX, density=0.5, **settings), expected)


def test_della_linear_with_a_forced_mask(mask):
    mask([1, 0, 1] * 2)
    result = merged(
        "della_linear",
        [[0.0] * 3] * 2,
        [[[1.0, -3, 2], [0.5, 0.25, -4]]],
        [1],
        density=0.5,
    )
    close(result, [[1.4333333, 0, 2.8666666], [0.7166666, 0, -5.7333331]])


def test_breadcrumbs_without_outliers_keeps_the_largest():
    """gamma n < 1: mergekit keeps nothing at all."""
    for gamma in (0.05, 0.01, 0.0):
        close(
            merged("breadcrumbs", [0.0] * 10, [STEPS], [1], density=0.6, gamma=gamma),
            [0, 0, 0, 0, *STEPS[4:]],
        )


@pytest.mark.parametrize(
    "method",
    [
        "ties",
        "dare_linear",
        "dare_ties",
        "breadcrumbs",
        "breadcrumbs_ties",
        "della",
        "della_linear",
    ],
)
@pytest.mark.parametrize("rescale", [True, False, "inverse_density"])
def test_density_0_gives_the_base(method, rescale):
    assert torch.equal(
        merged(method, C6, [A6], [1], density=0.0, rescale=rescale), as_tensor(C6)
    )


def test_sce_selecting_nothing_gives_the_base():
    for share in (0.0, 0.1, 0.5):
        assert torch.equal(
            merged("sce", C6, [A6], select_topk=share), as_tensor(C6)
        )  # one model: nothing varies
    assert torch.equal(
        merged("sce", ZERO6, [A6, C6], select_topk=0.1), as_tensor(ZERO6)
    )


def test_sce_weighs_small_deltas_alike():
    a, c = ([1e-4 * x for x in source] for source in (A6, C6))
    close(merged("sce", ZERO6, [a, c]), [-3, -1.5, 1.75, 2, 0.5, 0], scale=1e-4)


def test_sce_rounds_the_number_of_entries_as_mergekit():
    base = torch.zeros(90)
    sources = [torch.arange(1, 91.0), torch.arange(-90.0, 0.0)]
    sources[1][sources[1] == -sources[0]] -= 0.5
    kept = (
        merged("sce", base, sources, select_topk=0.7) != 0
    ).sum()  # 90 * 0.7 is 63 in float32
    assert kept == 63
    assert (
        merged("ties", base, sources[:1], [1], density=0.7) != 0
    ).sum() == 62  # and 62.99... in float64


def test_arcee_fusion_sees_importances_far_below_one():
    """Deltas of 1e-3 have importances of 1e-9: the threshold must be as fine."""
    generator = torch.Generator().manual_seed(0)
    base = 0.02 * torch.randn(64, 128, generator=generator)
    other = base + 1e-3 * torch.randn(64, 128, generator=generator)
    p, q = (torch.softmax(tensor, 1).add(1e-8) for tensor in (other, base))
    importance = (other - base).abs() * (p * (p / q).log()).sum(1, keepdim=True)
    low, middle, high = (
        importance.flatten().sort().values[int(share * 8191)]
        for share in (0.25, 0.5, 0.75)
    )
    expected = torch.where(importance >= middle + 1.5 * (high - low), other, base)
    result = merged("arcee_fusion", base, [other])
    assert ((result - expected).abs() > 1e-6).float().mean() < 1e-3


def test_della_refuses_probabilities_outside():
    check = METHODS["della"].check
    for density, epsilon in (
        (0.1, 0.15),
        (0.9, 0.15),
        (0.5, 0.5),
        (0.1, -0.15),
        (0.95, -0.15),
    ):
        assert "density" in check([{"density": density, "epsilon": epsilon}], {})
    for density, epsilon in ((0.5, 0.15), (1.0, 0.15), (0.0, 0.15), (0.3, -0.2)):
        assert check([{"density": density, "epsilon": epsilon}], {}) is None
