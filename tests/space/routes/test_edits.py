from dataclasses import replace

import pytest

from paretomerge.checkpoint.fold import FOLDS
from paretomerge.errors import ConfigError
from paretomerge.recipe import Recipe
from paretomerge.search.encoding import Encoding
from paretomerge.space.routes.edits import AS_ROUTED, EditSearchSpace
from paretomerge.space.routes.passthrough import RouteLayer, route_to_recipe
from paretomerge.testing import check_space
from tests.space.routes.spaces import route_space


def space_of(pico, names=("ada", "bob", "cyd"), **more) -> EditSearchSpace:
    return route_space(EditSearchSpace, pico, names, **more)


@pytest.mark.parametrize(
    "more",
    [{}, {"fold": None}, {"blocks": 2}, {"blocks": 3, "most": 3}, {"names": ("bob",)}],
)
def test_the_contract(pico, more):
    check_space(space_of(pico, **more), points=40)


def layers(space: EditSearchSpace, **edits) -> list[tuple[str, int, float]]:
    names = {path: name for name, path in space.sources.items()}
    point = space.baselines()["ada"] | {
        key.replace("_", "/") if key != "hand_over" else key: v
        for key, v in edits.items()
    }
    return [(names[step.model], step.layer, step.scale) for step in space.route(point)]


def test_edits(pico):
    space = space_of(pico)
    a, b = [("ada", n, 1.0) for n in range(4)], [("bob", n, 1.0) for n in range(4)]
    assert layers(space) == a
    assert layers(space, times_1=0) == [a[0], a[2], a[3]]
    assert layers(space, times_1=2) == [a[0], a[1], a[1], a[2], a[3]]
    assert layers(space, from_2="bob") == [a[0], a[1], b[2], a[3]]
    assert layers(space, follow="bob", hand_over=1) == [a[0], *b[1:]]
    assert layers(space, times_1=2, scale_1=0.8) == [
        a[0],
        ("ada", 1, 0.8),
        a[1],
        a[2],
        a[3],
    ]
    assert (
        layers(space, times_0=0, scale_1=0.8) == a[1:]
    )  # what comes first has no scale
    assert layers(space, times_0=0, times_1=0, times_2=0, times_3=0) == a[:1]


def test_models_of_other_depths_are_cut_alike(pico):
    space = replace(
        space_of(pico, ("ada", "bob")), depths={"ada": 4, "bob": 6}, blocks=2
    )
    assert layers(space, follow="bob", hand_over=1) == [
        ("ada", 0, 1.0),
        ("ada", 1, 1.0),
        *[("bob", n, 1.0) for n in (3, 4, 5)],
    ]


def test_known_starts_are_simple(pico):
    starts = space_of(pico, ("ada", "bob")).baselines()
    assert list(starts) == [
        "ada",
        "bob",
        "ada, then bob",
        "bob, then ada",
        "ada, middle twice",
        "bob, middle twice",
    ]
    assert (
        starts["ada, then bob"]["hand_over"] == 2
        and starts["ada, then bob"][f"from/{0}"] == AS_ROUTED
    )


@pytest.mark.parametrize(
    ("steps", "told"),
    [
        ([("ada", 1, 1.0), ("ada", 0, 1.0)], "in their order, got layer 0 of ada at 1"),
        ([("ada", 0, 1.0), ("ada", 1, 3.0)], "scale/1: expected 0.7 to 1.4, got 3"),
        (
            [("ada", 0, 1.0), ("ada", 0, 1.0), ("ada", 0, 1.0)],
            "got layer 0 of ada at 2",
        ),
        (
            [("ada", 0, 1.0), ("base", 1, 1.0)],
            "expected layers of the study's models, got .*base",
        ),
    ],
)
def test_routes_outside_are_told(pico, steps, told):
    route = [RouteLayer(str(pico / name), layer, scale) for name, layer, scale in steps]
    with pytest.raises(ConfigError, match=told):
        space_of(pico).params_of(route_to_recipe(route, FOLDS["llama"]))


def test_recipes_that_are_no_routes_are_told(pico):
    merged = Recipe.from_dict(
        {
            "merge_method": "linear",
            "models": [{"model": str(pico / "ada"), "parameters": {"weight": 1}}],
        }
    )
    with pytest.raises(
        ConfigError, match="expected layers of one model, passed through, got linear"
    ):
        space_of(pico).params_of(merged)
    slices = [{"sources": [{"model": str(pico / "ada"), "layer_range": [0, 4]}]}]
    apart = Recipe.from_dict(
        {"merge_method": "passthrough", "modules": {"default": {"slices": slices}}}
    )
    with pytest.raises(ConfigError, match="passed through, got `modules`"):
        space_of(pico).params_of(apart)
    odd = {
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": str(pico / "ada"), "layer_range": [0, 4]}]}],
    }
    odd["slices"][0]["sources"][0]["parameters"] = {"scale": 0.5}
    with pytest.raises(ConfigError, match="expected scales that a route folds"):
        space_of(pico).params_of(Recipe.from_dict(odd))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"blocks": 5}, "expected 1 to 4"),
        ({"scale": (1.1, 2)}, "low < 1"),
        ({"most": 0}, "1 or more"),
    ],
)
def test_settings_that_cannot_be(pico, wrong, told):
    with pytest.raises(ConfigError, match=told):
        space_of(pico, **wrong)


def test_hand_overs_begin_with_the_scale_that_matches(pico):
    space = space_of(
        pico, ("ada", "bob"), matched={"ada, then bob": 0.8, "bob, then ada": 9.0}
    )
    assert (
        space.baselines()["ada, then bob"]["scale/2"] == 0.8
        and space.baselines()["bob, then ada"]["scale/2"] == 1.4
    )
    check_space(space, points=40)


def test_who_follows_counts_where_there_is_a_hand_over(pico):
    space = space_of(pico)
    encoding = Encoding(space.distributions, space.conditions)
    name = next(iter(space.sources))
    alone = space.baselines()[name]
    others = [alone | {"follow": other} for other in space.sources]
    assert len({row.tobytes() for row in encoding.encode(others)}) == 1
    assert (
        len(
            {
                row.tobytes()
                for row in encoding.encode(
                    [point | {"hand_over": 1} for point in others]
                )
            }
        )
        == 3
    )
