"""Formulas of the synthetic and engineering problems against those of other people."""

import numpy as np
import pytest
import torch

from paretomerge.problems.engineering import ENGINEERING
from paretomerge.problems.synthetic import dtlz2, dtlz7, zdt

needs_pymoo = (
    "needs pymoo, which only the benchmarks use: pip install 'paretomerge[bench]'"
)


def cube(d, n=64, seed=0):
    return np.random.default_rng(seed).random((n, d))


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("re32", "WeldedBeam"),
        ("re33", "DiscBrake"),
        ("re34", "VehicleSafety"),
        ("re41", "CarSideImpact"),
    ],
)
def test_engineering_formulas_are_those_of_botorch(name, theirs):
    from botorch.test_functions import multi_objective

    design, other = ENGINEERING[name], getattr(multi_objective, theirs)()
    x = cube(len(design.low))
    low, high = np.array(design.low), np.array(design.high)
    expected = other._evaluate_true(torch.from_numpy(low + x * (high - low))).numpy()
    values = 10 ** design(x) - 1 if design.logarithmic else design(x)
    np.testing.assert_allclose(values[:, : expected.shape[1]], expected, rtol=1e-9)
    if name == "re41":  # BoTorch has the tenth beyond the nadir from the same fronts
        reference = design.nadir + 0.1 * (design.nadir - design.ideal)
        np.testing.assert_allclose(reference, other._ref_point, rtol=1e-4)


def test_engineering_ideal_points_are_lower_bounds():
    for name, design in ENGINEERING.items():
        f = design(cube(len(design.low), 20_000))
        assert np.isfinite(f).all(), name
        assert (f >= design.ideal - 1e-3 * np.abs(design.nadir - design.ideal)).all(), (
            name
        )
        assert (design.nadir > design.ideal).all()


def test_four_bar_truss_by_hand():
    """At the thinnest bars the volume is least: 200 (2 + 2 + 2^(1/4) + 1), the published ideal."""
    f = ENGINEERING["re21"](np.zeros((1, 4)))[0]
    assert f[0] == pytest.approx(200 * (5 + 2**0.25)) and f[0] == pytest.approx(
        1237.8414230005742
    )


def test_synthetic_functions_are_those_of_pymoo():
    pymoo = pytest.importorskip("pymoo.problems", reason=needs_pymoo)
    x = cube(10)
    for kind in (1, 2, 3):
        theirs = pymoo.get_problem(f"zdt{kind}", n_var=10)
        np.testing.assert_allclose(zdt(kind, x), theirs.evaluate(x))
    for m in (2, 3, 4):
        theirs = pymoo.get_problem("dtlz2", n_var=10, n_obj=m)
        np.testing.assert_allclose(dtlz2(m, x), theirs.evaluate(x))
        theirs = pymoo.get_problem("dtlz7", n_var=10, n_obj=m)
        np.testing.assert_allclose(dtlz7(m, x), theirs.evaluate(x))
