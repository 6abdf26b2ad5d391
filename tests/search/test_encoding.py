import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import (
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from paretomerge.errors import ConfigError
from paretomerge.search.encoding import Encoding, infer_conditions

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
    point = {
        "method": "sparse",
        "w": 0.3,
        "density": 0.4,
        "rank": 8,
        "step": 0.5,
        "use": True,
    }
    x = encoding.encode(
        [
            point | change
            for change in (
                {},
                {"density": 0.9},
                {"use": False},
                {"use": False, "density": 0.9},
            )
        ]
    )
    assert not np.array_equal(x[0], x[1]) and np.array_equal(x[2], x[3])


def test_a_missing_parameter_is_one_that_does_not_count():
    encoding = Encoding(SPACE, CONDITIONS)
    whole = {"method": "plain", "w": 0.3, "density": 0.4, "rank": 8, "step": 0.5}
    x = encoding.encode([whole, {k: v for k, v in whole.items() if k != "density"}])
    assert np.array_equal(x[0], x[1])


def test_neighbours_differ_in_one_discrete_parameter():
    encoding = Encoding(SPACE, CONDITIONS)
    x = encoding.encode(
        [{"method": "sparse", "w": 0.3, "density": 0.4, "rank": 1, "step": 0.5}]
    )[0]
    found = [
        encoding.decode(n) for n in encoding.neighbours(x, np.random.default_rng(0))
    ]
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
    x = encoding.project(np.array([unit]))
    np.testing.assert_allclose(encoding.project(x), x, atol=1e-12)
    np.testing.assert_allclose(encoding.encode([encoding.decode(x[0])]), x, atol=1e-9)
    assert all(
        d._contains(d.to_internal_repr(encoding.decode(x[0])[name]))
        for name, d in SPACE.items()
    )


NESTED = {
    "a": CategoricalDistribution(("p", "q")),
    "b": CategoricalDistribution(("u", "v")),
    "c": IntDistribution(1, 4),
    "d": IntDistribution(1, 3),
}


def nested(a, b="u", c=1, d=1):
    """What a define-by-run objective has of it: b under a = p, c under b = u, d under a = q."""
    return {"a": a} | (
        {"d": d} if a == "q" else {"b": b} | ({"c": c} if b == "u" else {})
    )


def test_a_parameter_counts_only_where_its_parent_does():
    encoding = Encoding(
        NESTED, {"b": [("a", ("p",))], "c": [("b", ("u",))], "d": [("a", ("q",))]}
    )
    x = encoding.project(np.random.default_rng(0).random((400, encoding.d)))
    assert len({tuple(row) for row in x.round(9)}) == 4 + 1 + 3
    np.testing.assert_allclose(encoding.encode([encoding.decode(row) for row in x]), x)


def test_conditions_of_conditions_are_found_one_by_one():
    points = [
        nested("p", "u", 2),
        nested("p", "v"),
        nested("q", d=3),
        nested("p", "u", 4),
    ]
    assert infer_conditions(points, NESTED) == {
        "b": [("a", ["p"])],
        "c": [("b", ["u"])],
        "d": [("a", ["q"])],
    }


def test_what_only_failed_trials_had_is_under_no_condition():
    assert infer_conditions([{"a": "p"}, {"a": "q"}], NESTED) == {}


def test_a_number_may_say_how_many_others_there_are():
    space = {
        "n": IntDistribution(1, 4),
        "m": IntDistribution(0, 1000),
        **{f"u{i}": FloatDistribution(0, 1) for i in range(4)},
    }
    points = [
        {"n": n, "m": 7 * n} | {f"u{i}": 0.5 for i in range(n)} for n in (1, 2, 4)
    ]
    assert infer_conditions(points, space) == {
        "u1": [("n", [2, 3, 4])],
        "u2": [("n", [4])],
        "u3": [("n", [4])],
    }
    gap = [
        {"n": 1, "u1": 0.5},
        {"n": 2},
        {"n": 3, "u1": 0.5},
    ]  # no interval: something else decides
    assert infer_conditions(gap, space) == {}


@pytest.mark.filterwarnings(
    "ignore:Choices for a categorical distribution should be"
)  # Optuna takes them all the same
def test_a_choice_may_be_a_list():
    space = {
        "layers": CategoricalDistribution(([1, 2], [3, 4])),
        "y": FloatDistribution(0, 1),
    }
    assert infer_conditions(
        [{"layers": [1, 2], "y": 0.5}, {"layers": [3, 4]}], space
    ) == {"y": [("layers", [[1, 2]])]}


def test_a_point_of_another_space_has_no_place():
    space = {
        "x": FloatDistribution(0, 1),
        "y": FloatDistribution(1e-3, 1, log=True),
        "c": CategoricalDistribution(("a", None)),
    }
    here = {"x": 0.5, "y": 0.1, "c": None}
    x = Encoding(space).encode(
        [
            here | other
            for other in (
                {"c": "b"},
                {"y": 0.0},
                {"y": -0.5},
                {"x": "no"},
                {"x": None},
                {},
            )
        ]
    )
    assert np.isnan(x[:-1]).all() and np.isfinite(x[-1]).all()


def test_a_choice_may_be_no_number():
    encoding = Encoding({"a": CategoricalDistribution((1.0, float("nan")))})
    np.testing.assert_array_equal(
        encoding.encode([{"a": float("nan")}, {"a": 1.0}]), [[0, 1], [1, 0]]
    )
