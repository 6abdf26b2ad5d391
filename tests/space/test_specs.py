"""Wrong arguments of `WeightSpace` and `RouteSpace`."""

import numpy as np
import pytest

import paretomerge as pm
from paretomerge.space.weights.layers import Grouping


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"methods": "ties"}, r"^space\.methods: list at least one method"),
        ({"methods": []}, r"^space\.methods: list at least one method"),
        ({"methods": 3}, r"^space\.methods: expected a list"),
        ({"methods": [3]}, r"^space\.methods: expected text"),
        ({"groups": "4"}, r"^space\.weight\.groups: expected a number"),
        ({"weight": 3}, r"^space\.weight: a mapping with bounds"),
        ({"density": None}, r"^space\.density: a mapping with bounds"),
        ({"weight": {"bounds": (0,)}}, r"^space\.weight\.bounds: expected two numbers"),
        ({"weight": {"bounds": None}}, r"^space\.weight\.bounds: expected two numbers"),
        ({"weight": {"bounds": "01"}}, r"^space\.weight\.bounds: expected two numbers"),
        (
            {"density": {"bounds": ("a", "b")}},
            r"^space\.density\.bounds: expected two numbers",
        ),
        ({"weight": {"smooth": "no"}}, r"^space\.weight\.smooth: expected True or F"),
        ({"weight": {"roles": "mlp"}}, r"^space\.weight\.roles: expected False, True"),
        (
            {"weight": {"roles": {"mlp": "mlp"}}},
            r"^space\.weight\.roles\.mlp: expected a list",
        ),
        ({"method_parameters": [1]}, r"^space\.method_parameters: expected \{'gamma'"),
        (
            {"method_parameters": {"gamma": "x"}},
            r"^space\.method_parameters\.gamma: expected a number or \[low, high\]",
        ),
        (
            {"method_parameters": {"gamma": (0, 1, 2)}},
            r"^space\.method_parameters\.gamma: expected two numbers",
        ),
        ({"subset": "no"}, r"^space\.subset: expected True or False, got 'no'"),
        ({"importance": 1}, r"^space\.importance: expected True or False, got 1"),
        ({"near_duplicates": True}, r"^space\.near_duplicates: expected a finite num"),
        ({"near_duplicates": "0.9"}, r"^space\.near_duplicates: expected a finite nu"),
        ({"order": None}, r"^space\.order: use given or kinship, not None"),
    ],
)
def test_a_weight_space(arguments, message):
    with pytest.raises(pm.ConfigError, match=message):
        pm.WeightSpace(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": None}, r"^space\.routes\.scale: .*or False for no scales, got None"),
        ({"scale": True}, r"^space\.routes\.scale: .*or False for no scales, got True"),
        ({"scale": "01"}, r"^space\.routes\.scale: expected two numbers"),
        ({"scale": (1, None)}, r"^space\.routes\.scale: expected two numbers"),
        ({"blocks": "2"}, r"^space\.routes\.blocks: expected a whole number, got '2'"),
        ({"blocks": 2.5}, r"^space\.routes\.blocks: expected a whole number, got 2.5"),
        ({"blocks": 0}, r"^space\.routes\.blocks: must be 1 or more, not 0"),
        ({"most": True}, r"^space\.routes\.most: expected a whole number"),
        ({"match": 3}, r"^space\.routes\.match: expected a path"),
    ],
)
def test_a_route_space(arguments, message):
    with pytest.raises(pm.ConfigError, match=message):
        pm.RouteSpace(**arguments)


def test_numbers_of_numpy_are_numbers(tmp_path):
    spec = pm.WeightSpace(
        groups={"by": "profile", "count": np.int64(2)},
        method_groups=np.int64(3),
        density={"groups": [[np.int64(0), 8], (8, 24)], "bounds": np.array([0, 1])},
        near_duplicates=np.float32(0.5),
        subset=np.bool_(True),
    )
    assert spec.weight.groups == Grouping(2, "profile")
    assert spec.density.groups == Grouping(2, ranges=((0, 8), (8, 24)))
    assert spec.density.bounds == (0.0, 1.0) and spec.method_groups == Grouping(3)
    assert spec.subset is True and type(spec.near_duplicates) is float

    routes = pm.RouteSpace(
        blocks=np.int64(2), scale=[np.float32(0.5), 2], match=tmp_path
    )
    assert routes.scale == (0.5, 2.0) and routes.match == str(tmp_path)
    assert type(routes.blocks) is int
