"""One number of several objectives."""

import math

import numpy as np
import pytest

from paretomerge.errors import ConfigError
from paretomerge.pareto.preference import Preference, Scale

SCALE = Scale(np.array([1.0, 10.0]), np.array([1.0, 5.0]))


def test_the_augmented_tchebycheff_value_by_hand() -> None:
    # Weighted shortfalls 0.25 x 0.5 and 0.75 x 0.4, and a thousandth of the sum without weights.
    value = Preference((1, 3)).values([0.5, 8.0], SCALE)
    assert float(value) == pytest.approx(-0.3 - 1e-3 * (0.5 + 0.4))


def test_objectives_without_weight_break_ties() -> None:
    points = [[0.5, 8.0], [0.5, 9.0], [0.5, 7.0]]
    assert Preference((1, 0)).values(points, SCALE).argmax() == 1


def test_what_exceeds_the_ideal_is_no_loss() -> None:
    points = [[1.0, 10.0], [1.2, 10.0], [0.8, 10.0]]
    for preference in (Preference.knee(2), Preference((1, 1))):
        values = preference.values(points, SCALE)
        assert values.argsort().tolist() == [2, 0, 1]


def test_the_mean_has_the_units_of_the_objectives() -> None:
    points = [[0.2, 0.4], [0.9, 0.1]]
    values = Preference.mean(2).values(points, SCALE)
    assert values.tolist() == pytest.approx([0.3, 0.5])


def test_the_knee_is_nearest_to_the_ideal() -> None:
    value = Preference.knee(2).values([0.7, 8.0], SCALE)
    nearly = -0.5 * math.hypot(0.3, 0.4)
    assert float(value) == pytest.approx(nearly - 1e-3 * (0.3 + 0.4))


def test_only_the_ratios_of_weights_matter() -> None:
    assert Preference((1e300, 3e300)).weights == pytest.approx((0.25, 0.75))


def test_values_keep_the_leading_shape() -> None:
    draws = np.random.default_rng(0).random((4, 3, 2))
    for kind in ("sum", "tchebycheff", "distance"):
        assert Preference((1, 2), kind).values(draws, SCALE).shape == (4, 3)


def test_preferences_as_users_write_them() -> None:
    names = ("a", "b")
    assert Preference.parse("mean", names) == Preference.mean(2)
    assert Preference.parse("knee", names) == Preference.knee(2)
    assert Preference.parse({"b": 2}, names).weights == (0.0, 1.0)


@pytest.mark.parametrize(
    ("prefer", "message"),
    [
        ({"c": 1.0}, "'c'"),
        ({"a": -1.0}, "0 or more"),
        ({"a": math.nan}, "0 or more"),
        ({"a": 0.0}, "above 0"),
        ("meen", "write mean, knee or"),
    ],
)
def test_what_is_no_preference_is_refused(prefer: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Preference.parse(prefer, ("a", "b"))  # type: ignore[arg-type]
