import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from paretomerge.errors import ConfigError
from paretomerge.search.encoding import Encoding

SPACE = {
    "method": CategoricalDistribution(("plain", "sparse")),
    "w": FloatDistribution(0.0, 1.5),
    "density": FloatDistribution(0.1, 1.0),
    "rank": IntDistribution(1, 64, log=True),
    "step": FloatDistribution(0.0, 1.0, step=0.25),
}
CONDITIONS = {"density": [("method", ("sparse",))]}


def test_encoding_goes_both_ways():
    encoding = Encoding(SPACE, CONDITIONS)
    points = [
        {"method": "sparse", "w": 0.3, "density": 0.4, "rank": 8, "step": 0.75},
        {"method": "plain", "w": 1.5, "density": 0.2, "rank": 64, "step": 0.0},
    ]
    x = encoding.encode(points)
    assert x.shape == (2, 6) and x.min() >= 0 and x.max() <= 1
    back = encoding.decode(x[0])
    assert back["method"] == "sparse" and back["rank"] == 8 and back["step"] == 0.75
    assert back["w"] == pytest.approx(0.3) and back["density"] == pytest.approx(0.4)
    assert encoding.discrete.tolist() == [True, True, False, False, True, True]


def test_points_that_mean_the_same_are_the_same():
    encoding = Encoding(SPACE, CONDITIONS)
    a = {"method": "plain", "w": 0.3, "density": 0.4, "rank": 8, "step": 0.5}
    x = encoding.encode([a, a | {"density": 0.9}, a | {"method": "sparse"}])
    assert np.array_equal(x[0], x[1]) and not np.array_equal(x[0], x[2])


def test_a_parameter_may_need_several_parents():
    space = SPACE | {"use": CategoricalDistribution((True, False))}
    encoding = Encoding(space, {"density": [("method", ("sparse",)), ("use", (True,))]})
    point = {"method": "sparse", "w": 0.3, "density": 0.4, "rank": 8, "step": 0.5, "use": True}
    x = encoding.encode([point | change for change in ({}, {"density": 0.9}, {"use": False}, {"use": False, "density": 0.9})])
    assert not np.array_equal(x[0], x[1]) and np.array_equal(x[2], x[3])


def test_a_missing_parameter_is_one_that_does_not_count():
    encoding = Encoding(SPACE, CONDITIONS)
    whole = {"method": "plain", "w": 0.3, "density": 0.4, "rank": 8, "step": 0.5}
    x = encoding.encode([whole, {k: v for k, v in whole.items() if k != "density"}])
    assert np.array_equal(x[0], x[1])


def test_neighbours_differ_in_one_discrete_parameter():
    encoding = Encoding(SPACE, CONDITIONS)
    x = encoding.encode([{"method": "sparse", "w": 0.3, "density": 0.4, "rank": 1, "step": 0.5}])[0]
    found = [encoding.decode(n) for n in encoding.neighbours(x, np.random.default_rng(0))]
    assert [(p["method"], p["rank"], p["step"]) for p in found] == [
        ("plain", 1, 0.5),
        ("sparse", 2, 0.5),
        ("sparse", 1, 0.25),
        ("sparse", 1, 0.75),
    ]
    few = encoding.neighbours(x, np.random.default_rng(0), most=2)
    assert len(few) == 2


def test_an_unknown_kind_of_parameter_is_refused():
    class Strange:
        pass

    with pytest.raises(ConfigError, match="expected a float, int or categorical"):
        Encoding({"a": Strange()})


@given(st.lists(st.floats(0, 1), min_size=6, max_size=6))
def test_settled_points_stay_and_decode_to_themselves(unit):
    encoding = Encoding(SPACE, CONDITIONS)
    x = encoding.settle(np.array([unit]))
    np.testing.assert_allclose(encoding.settle(x), x, atol=1e-12)
    np.testing.assert_allclose(encoding.encode([encoding.decode(x[0])]), x, atol=1e-9)
    assert all(d._contains(d.to_internal_repr(encoding.decode(x[0])[name])) for name, d in SPACE.items())
