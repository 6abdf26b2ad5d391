from dataclasses import replace

import pytest
from optuna.distributions import FloatDistribution, IntDistribution

from paretomerge.checkpoint.fold import FOLDS
from paretomerge.errors import ConfigError
from paretomerge.space.routes.indicators import IndicatorSearchSpace
from paretomerge.space.routes.passthrough import RouteLayer, route_to_recipe
from paretomerge.testing import check_space
from tests.space.routes.spaces import route_space


def space_of(pico, names=("ada", "bob"), **more) -> IndicatorSearchSpace:
    return route_space(IndicatorSearchSpace, pico, names, **more)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"fold": None},
        {"blocks": 2},
        {"repeats": 2, "blocks": 2},
        {"names": ("bob",), "repeats": 2},
    ],
)
def test_the_contract(pico, more):
    check_space(space_of(pico, **more), points=40)


def test_every_parameter_is_a_number_that_cma_moves(pico):
    kinds = {type(d) for d in space_of(pico).distributions.values()}
    assert kinds == {IntDistribution, FloatDistribution}


def test_places_are_gone_through_in_order(pico):
    space = space_of(pico, repeats=2, blocks=2)
    names = {path: name for name, path in space.sources.items()}
    point = space.baselines()["ada"] | {
        "use/1/ada/1": 0,
        "use/1/bob/1": 1,
        "use/2/ada/0": 1,
        "scale/2/ada/0": 0.8,
    }
    route = [(names[step.model], step.layer, step.scale) for step in space.route(point)]
    assert route == [
        ("ada", 0, 1.0),
        ("ada", 1, 1.0),
        ("bob", 2, 1.0),
        ("bob", 3, 1.0),
        ("ada", 0, 0.8),
        ("ada", 1, 1.0),
    ]


def test_what_uses_nothing_goes_through_the_first_block(pico):
    space = space_of(pico, blocks=2)
    nothing = {
        name: 0 if name.startswith("use/") else 1.0 for name in space.distributions
    }
    assert [step.layer for step in space.route(nothing)] == [0, 1]


def test_hand_overs_that_the_order_allows_are_starts(pico):
    assert list(space_of(pico).baselines()) == ["ada", "bob", "ada, then bob"]
    assert list(space_of(pico, repeats=2).baselines()) == [
        "ada",
        "bob",
        "ada, then bob",
        "bob, then ada",
    ]


@pytest.mark.parametrize(
    ("steps", "told"),
    [
        ([("ada", 1, 1.0), ("ada", 0, 1.0)], "in their order, got layer 0 of ada at 1"),
        (
            [("ada", 0, 1.0), ("ada", 1, 3.0)],
            "scale/1/ada/1: expected 0.7 to 1.4, got 3",
        ),
    ],
)
def test_routes_outside_are_told(pico, steps, told):
    route = [RouteLayer(str(pico / name), layer, scale) for name, layer, scale in steps]
    with pytest.raises(ConfigError, match=told):
        space_of(pico).params_of(route_to_recipe(route, FOLDS["llama"]))


def test_scales_are_not_for_spaces_without_a_fold(pico):
    route = [RouteLayer(str(pico / "ada"), 0), RouteLayer(str(pico / "ada"), 1, 1.2)]
    recipe = route_to_recipe(route, FOLDS["llama"])
    with pytest.raises(ConfigError, match="expected scales that a route folds"):
        replace(space_of(pico), fold=None).params_of(recipe)


def test_repeats_are_checked(pico):
    with pytest.raises(ConfigError, match="repeats: expected 1 or more, got 0"):
        space_of(pico, repeats=0)
