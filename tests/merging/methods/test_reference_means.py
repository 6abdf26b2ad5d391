"""Worked numbers of mergekit in float32.

Linear, slerp, nuslerp, multislerp, karcher, model_stock, passthrough.
"""

import math

import pytest
import torch

from paretomerge.merging.methods import METHODS
from tests.merging.methods.cases import HALF, M1, M2, A, B, C, D, close, merged

EXAMPLES = {
    "linear": (
        ("linear", None, [A, C], [0.3, 0.5]),
        {},
        [0.5625, 1.9375, 2.46875, 4.6875],
    ),
    "linear, sum": (
        ("linear", None, [A, C], [0.3, 0.5]),
        {"normalize": False},
        [0.45, 1.55, 1.975, 3.75],
    ),
    "passthrough": (
        ("passthrough", None, [A]),
        {"scale": 0.5},
        [0.75, 0.5, 1.625, 2.5],
    ),
    "passthrough of nothing": (("passthrough", None, [A]), {"scale": 0.0}, [0.0] * 4),
    "slerp": (
        ("slerp", B, [C]),
        {"t": 0.25},
        [0.7545812, 2.1423604, 2.7703018, 4.1580811],
    ),
    "slerp beyond": (
        ("slerp", B, [C]),
        {"t": 1.5},
        [-0.5052425, 2.6745274, 1.4322826, 4.6120524],
    ),
    "slerp, colinear": (
        ("slerp", B, [[2 * b for b in B]]),
        {"t": 0.25},
        [1.25, 2.5, 3.75, 5],
    ),
    "slerp, opposite": (
        ("slerp", B, [[-2 * b for b in B]]),
        {"t": 0.25},
        [0.25, 0.5, 0.75, 1],
    ),
    "slerp from zero": (
        ("slerp", [0.0] * 4, [B]),
        {"t": 0.25},
        [b * 0.3826834 for b in B],
    ),
    "slerp of matrices": (
        ("slerp", M1, [M2]),
        {"t": 0.6},
        [[0.5460572, 0.7633638, 1.8554782], [1.5267277, 0.5460572, -0.2173067]],
    ),
    "nuslerp": (
        ("nuslerp", None, [A, C], [1, 3]),
        {},
        [0.3852398, 2.1556165, 2.3537180, 4.7019548],
    ),
    "nuslerp, negative": (
        ("nuslerp", None, [A, C], [2, -1]),
        {},
        [2.7466042, -0.6689305, 3.9509757, 4.6553473],
    ),
    "nuslerp, sum of 0": (
        ("nuslerp", None, [A, C], [1, -1]),
        {},
        [0.7663572, 1.7881668, 2.6822503, 4.8535953],
    ),
    "nuslerp with a base": (
        ("nuslerp", B, [A, C], [1, 3]),
        {},
        [0.1993439, 2.0414169, 2.0797067, 4.9985132],
    ),
    "nuslerp, flat": (
        ("nuslerp", None, [M1, M2], [1, 3]),
        {},
        [[0.3529560, 0.8865753, 1.5924875], [1.7731507, 0.3529560, -0.5336193]],
    ),
    "nuslerp, rows": (
        ("nuslerp", None, [M1, M2], [1, 3]),
        {"nuslerp_flatten": False},
        [[0.2836470, 0.7961707, 1.3634647], [2.0840738, 0.4803296, -0.5617073]],
    ),
    "nuslerp, columns": (
        ("nuslerp", None, [M1, M2], [1, 3]),
        {"nuslerp_flatten": False, "nuslerp_row_wise": True},
        [[0.3826835, 0.9238796, 1.4968961], [1.8477591, 0.3826835, -0.5254081]],
    ),
    "nuslerp, colinear": (
        ("nuslerp", None, [[1.0, 0, 0, 0], [2.0, 0, 0, 0]], [1, 3]),
        {},
        [1.75, 0, 0, 0],
    ),
    "nuslerp from zero": (
        ("nuslerp", None, [[0.0] * 4, A], [1, 3]),
        {},
        [a * 0.9238795 for a in A],
    ),
    "nuslerp of zeros": (("nuslerp", None, [[0.0] * 4] * 2, [1, 3]), {}, [0.0] * 4),
    "multislerp": (
        ("multislerp", None, [A, C, D], [1, 2, 1]),
        {},
        [1.7295541, 1.7436286, 2.7060673, 3.3109488],
    ),
    "multislerp, sum": (
        ("multislerp", None, [A, C, D], [1, 2, 1]),
        {"normalize_weights": False},
        [6.9182177, 6.9745145, 10.8242702, 13.2437954],
    ),
    "multislerp with a base": (
        ("multislerp", B, [A, C, D], [1, 2, 1]),
        {},
        [-0.1620905, 1.4404902, 0.8060989, 4.6574192],
    ),
    "multislerp of two": (
        ("multislerp", None, [A, C], [1, 3]),
        {},
        [0.3486356, 2.1988494, 2.3285179, 4.7016850],
    ),
    "multislerp, opposite": (
        ("multislerp", None, [[1.0, 0, 0, 0], [-2.0, 0, 0, 0]], [1, 1]),
        {},
        [-0.5, 0, 0, 0],
    ),
    "multislerp with zero": (
        ("multislerp", None, [A, [0.0] * 4], [1, 3]),
        {},
        [a * 0.25 for a in A],
    ),
    "multislerp of one": (("multislerp", B, [A], [3]), {}, A),
    "multislerp, eps": (
        ("multislerp", None, [[1.0, 2.0], [3.0, 4.0]], [1, 1]),
        {"eps": 0.1},
        [1.8959155, 3.0602627],
    ),
    "multislerp of the base": (("multislerp", B, [B, B], [1, 1]), {}, B),
    "karcher": (
        ("karcher", None, [A, C]),
        {},
        [0.7228550, 1.8409545, 2.6534269, 4.8558087],
    ),
    "karcher of three": (
        ("karcher", None, [A, C, D]),
        {},
        [2.5172021, 1.3248441, 2.8868022, 2.4466398],
    ),
    "karcher, one step": (
        ("karcher", None, [A, C, D]),
        {"max_iter": 1},
        [2.5163417, 1.3202946, 2.8872714, 2.4494286],
    ),
    "karcher, no step": (
        ("karcher", None, [A, C, D]),
        {"max_iter": 0},
        [2.3272793, 1.3497727, 2.8441145, 2.6615953],
    ),
    "karcher with zero": (
        ("karcher", None, [A, C, [0.0] * 4]),
        {},
        [0.4819033, 1.2273030, 1.7689512, 3.2372057],
    ),
    "karcher, tiny": (
        ("karcher", None, [[1e-6, 0, 0, 0], [0.0, 1, 0, 0]]),
        {},
        [0, 0.5000005, 0, 0],
    ),
    "karcher of matrices": (
        ("karcher", None, [M1, M2]),
        {},
        [[0.6614378, 0.6614378, 1.9843135], [1.3228756, 0.6614378, 0]],
    ),
    "karcher, opposite": (
        ("karcher", None, [[1.0, 0, 0, 0], [-2.0, 0, 0, 0]]),
        {},
        [1.5, 0, 0, 0],
    ),
    "karcher of zeros": (("karcher", None, [[0.0] * 4] * 2), {}, [0.0] * 4),
    "karcher of one": (("karcher", None, [A]), {}, A),
    "model_stock": (
        ("model_stock", B, [A, [2, 1.5, 3, 6]]),
        {},
        [1.6939796, 1.3060204, 3.1156631, 5.3879595],
    ),
    "model_stock of three": (
        ("model_stock", B, [A, C, D]),
        {},
        [0.6018631, 3.9906847, 5.1897535, 6.7869587],
    ),
    "model_stock of matrices": (
        ("model_stock", HALF, [M1, M2]),
        {},
        [[0.5, 0.5, -0.5389674], [-0.0194837, 0.5, 1.0194836]],
    ),
    "model_stock by rows": (
        ("model_stock", HALF, [M1, M2]),
        {"filter_wise": True},
        [[0.5, 0.5, 0.7965352], [-12.2310963, 0.5, 13.2310963]],
    ),
    "model_stock of the base": (("model_stock", B, [B, B]), {}, B),
    "model_stock, small deltas": (
        ("model_stock", B, [[1.0001, 2, 3, 4]] * 2),
        {},
        [1.0000020, 2, 3, 4],
    ),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_worked(name):
    arguments, settings, expected = EXAMPLES[name]
    close(merged(*arguments, **settings), expected)


def test_weights_without_a_sum_are_refused():
    for name, flag in (("linear", "normalize"), ("multislerp", "normalize_weights")):
        check = METHODS[name].check
        assert "sum other than 0" in check(
            [{"weight": 1.0}, {"weight": -1.0}], {flag: True}
        )
        assert check([{"weight": 1.0}, {"weight": -1.0}], {flag: False}) is None


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("base", [False, True])
def test_opposite_models_meet_on_the_line_between_them(seed, base):
    """mergekit divides by the rounding error of sin(pi) or of a sum that cancels, and gives
    noise as large as it likes.
    """
    x = torch.randn(1000, generator=torch.Generator().manual_seed(seed))
    start = (
        torch.randn(1000, generator=torch.Generator().manual_seed(99))
        if base
        else torch.zeros(1000)
    )
    for name in ("nuslerp", "multislerp"):
        between = merged(
            name, start if base else None, [start + x, start - 3 * x], [1, 1]
        )
        torch.testing.assert_close(between, start - x, rtol=1e-4, atol=1e-4)
    rows = [x.view(20, 50), -3 * x.view(20, 50)]
    torch.testing.assert_close(
        merged("nuslerp", None, rows, [1, 1], nuslerp_flatten=False),
        -rows[0],
        rtol=1e-4,
        atol=1e-4,
    )
    karcher = merged(
        "karcher", None, [x, -3 * x]
    )  # all directions are as good: that of the first, at the mean length
    torch.testing.assert_close(karcher, 2 * x, rtol=1e-4, atol=1e-4)


def test_multislerp_with_a_model_equal_to_the_base():
    base = torch.randn(50, generator=torch.Generator().manual_seed(0))
    other = base + 0.1
    torch.testing.assert_close(
        merged("multislerp", base, [other, base], [1, 1]), (base + other) / 2
    )
    torch.testing.assert_close(
        merged("multislerp", base, [base, base, base], [1, 1, 1]), base
    )


def test_model_stock_has_no_value_where_deltas_cancel_and_gives_the_base():
    close(merged("model_stock", B, [[2.0, 2, 3, 4], [0.0, 2, 3, 4]]), B)
    close(
        merged(
            "model_stock", [B], [[[2.0, 2, 3, 4]], [[0.0, 2, 3, 4]]], filter_wise=True
        ),
        [B],
    )


@pytest.mark.parametrize(
    ("tilt", "line"), [(0.0310, True), (0.0330, False)]
)  # cosines 0.99952 and 0.99946
def test_slerp_is_a_line_from_a_cosine_of_09995_on(tilt, line):
    angle = torch.atan(torch.tensor(tilt)).item()
    first, second = (
        (0.7, 0.3)
        if line
        else (
            math.sin(0.7 * angle) / math.sin(angle),
            math.sin(0.3 * angle) / math.sin(angle),
        )
    )
    close(
        merged("slerp", [1.0, 0.0], [[1.0, tilt]], t=0.3),
        [first + second, second * tilt],
    )
