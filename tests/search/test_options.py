import numpy as np
import pytest

from paretomerge.errors import ConfigError
from paretomerge.search.options import check_option, number_vector, resolve_seed


@pytest.mark.parametrize(
    ("default", "value"),
    [
        (True, False),
        (0, 7),
        (0, np.int64(7)),
        (0.0, 7),
        (0.0, np.float32(0.5)),
        ("any", 7),
        (None, []),
    ],
)
def test_what_is_of_the_kind_of_its_default(default, value):
    check_option("option", default, value)


@pytest.mark.parametrize(
    ("default", "value", "expected"),
    [
        (True, 1, "true or false"),
        (0, 0.5, "a whole number"),
        (0, True, "a whole number"),
        (0.0, float("nan"), "a number"),
        (0.0, "1", "a number"),
    ],
)
def test_what_is_not(default, value, expected):
    with pytest.raises(ConfigError, match=f"option: expected {expected}, got "):
        check_option("option", default, value)


@pytest.mark.parametrize("value", [[1, 0.5], (1, 0.5), np.array([1, 0.5])])
def test_lists_of_numbers(value):
    np.testing.assert_array_equal(number_vector(value), [1, 0.5])


@pytest.mark.parametrize(
    "value", [None, 1.0, "1", "one", ["one"], [[1.0]], [[1.0], [1.0, 2.0]], {"a": 1.0}]
)
def test_other_things_are_empty_lists(value):
    assert number_vector(value).shape == (0,)


def test_any_integer_is_a_seed_and_none_is_one_by_chance():
    assert [resolve_seed(seed) for seed in (7, -1, 2**40 + 3)] == [7, 2**32 - 1, 3]
    assert len({resolve_seed(None) for _ in range(4)}) > 1
    with pytest.raises(ConfigError, match="seed: expected a whole number, got 'seven'"):
        resolve_seed("seven")
