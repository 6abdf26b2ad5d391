from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from paretomerge.checkpoint.fold import fold_of
from paretomerge.checkpoint.reader import Checkpoint
from paretomerge.errors import CheckpointError, ParetoMergeError, RecipeError
from paretomerge.merging.engine import merge
from paretomerge.merging.live.routed import RoutedModel
from paretomerge.recipe import Recipe
from paretomerge.space.routes.passthrough import RouteLayer, route_to_recipe
from tests.architectures import ARCHITECTURES, run
from tests.conftest import pico_states, save_pico
from tests.space.routes.test_passthrough import FAMILIES, ROUTE, sources

SHORT = ROUTE[:3]
ORDERED = ("qwen2",)
"""Families whose config.json knows kinds of layers in one order alone.

With these settings not all routes can be written.
"""


def recipe_of(models: dict[str, str], steps) -> Recipe:
    scales = [1.0, *(scale for *_, scale in steps[1:])]
    route = [
        RouteLayer(models[model], layer, scale)
        for (model, layer, _), scale in zip(steps, scales, strict=True)
    ]
    return route_to_recipe(route, fold_of(Checkpoint(models["a"]).config))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_live_route_is_the_written_checkpoint(family, tmp_path):
    models = sources(family, tmp_path)
    live = RoutedModel(list(models.values()))
    for name, steps in {
        "long": ROUTE,
        "short": SHORT,
        "reversed": ROUTE[::-1],
        "again": ROUTE,
    }.items():
        recipe = recipe_of(models, steps)
        try:
            merge(recipe, tmp_path / name)
        except CheckpointError as error:
            assert (
                family in ORDERED
                and "expected layers in a pattern that config.json can express"
                in str(error)
            )
            with pytest.raises(
                CheckpointError, match=r"pattern that config\.json can express"
            ):
                live.load(recipe)
            continue
        written = AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
        merged = live.load(recipe)
        assert torch.equal(run(merged.model), run(written))
        assert merged.facts == {
            "layers": len(steps),
            "parameters": sum(p.numel() for p in written.parameters()),
        }


@pytest.fixture(scope="module")
def llamas(tmp_path_factory) -> dict[str, str]:
    return sources("llama", tmp_path_factory.mktemp("llamas"))


def test_layers_are_referred_to_and_not_copied(llamas):
    live = RoutedModel(list(llamas.values()))
    layers = live.load(recipe_of(llamas, ROUTE)).model.model.layers
    scaled, plain = (
        ("self_attn.o_proj.weight", "mlp.down_proj.weight"),
        ("self_attn.q_proj.weight", "mlp.up_proj.weight"),
    )
    for name in plain:  # b's layer 1 comes three times
        assert len({layers[i].get_parameter(name).data_ptr() for i in (1, 4, 5)}) == 1
    for name in scaled:
        assert len({layers[i].get_parameter(name).data_ptr() for i in (1, 4, 5)}) == 3
    unscaled = [
        (model, layer, 1.0) for model, layer, _ in ROUTE
    ]  # nothing is computed for it
    candidates = (SHORT, ROUTE[::-1], ROUTE, unscaled, SHORT[::-1])
    for steps in candidates:
        live.load(recipe_of(llamas, steps))
    kept = {parameter.data_ptr() for parameter in live._resident.values()}
    computed = {parameter.data_ptr() for parameter in live._computed}
    for steps in candidates:
        merged = live.load(recipe_of(llamas, steps))
        assert merged.facts["layers"] == len(steps)
        reached = {p.data_ptr() for p in merged.model.parameters()}
        assert len(reached - kept) <= 2 * len(steps)
    assert {
        parameter.data_ptr() for parameter in live._resident.values()
    } == kept  # nothing was added for a candidate
    assert {parameter.data_ptr() for parameter in live._computed} == computed
    others = [
        skeleton
        for skeleton in live._skeletons.values()
        if skeleton is not live._loaded
    ]
    assert others
    assert all(p.is_meta for other in others for p in other.model.parameters())


def test_generation_with_a_cache_is_generation_without(llamas):
    live = RoutedModel(list(llamas.values()))
    tokens = torch.tensor([[5, 9, 11], [7, 3, 4]])
    for steps in (SHORT, ROUTE, (*ROUTE, *ROUTE)):
        model = live.load(recipe_of(llamas, steps)).model
        settings = {
            "max_new_tokens": 8,
            "do_sample": False,
            "eos_token_id": None,
            "attention_mask": torch.ones_like(tokens),
        }
        assert torch.equal(
            model.generate(tokens, use_cache=True, **settings),
            model.generate(tokens, use_cache=False, **settings),
        )


def test_only_routes_are_followed(llamas):
    recipe = Recipe.from_dict(
        {
            "merge_method": "linear",
            "models": [{"model": llamas["a"], "parameters": {"weight": 1}}],
        }
    )
    with pytest.raises(RecipeError, match="expected a route through layers"):
        RoutedModel(list(llamas.values())).load(recipe)


def test_models_of_other_widths_are_refused(llamas, tmp_path):
    save_pico(tmp_path / "wide", pico_states(width=32)["ada"], width=32)
    mixed = route_to_recipe(
        [RouteLayer(llamas["a"], 0), RouteLayer(str(tmp_path / "wide"), 1)], None
    )
    with pytest.raises(ParetoMergeError, match="expected"):
        RoutedModel([llamas["a"], str(tmp_path / "wide")]).load(mixed)


POOL = {
    "one": {"merge_method": "dare_ties", "seed": 3},
    "two": {"merge_method": "linear"},
}


def pool(models, dtype) -> dict[str, Recipe]:
    """Two merges of the models, one of which has a step of its own."""
    listed = [
        {"model": path, "parameters": {"weight": 0.6, "density": 0.5}}
        for path in models.values()
    ]
    one = Recipe.from_dict(
        {**POOL["one"], "base_model": models["a"], "models": listed, "dtype": dtype}
    )
    plain = [
        {"model": name, "parameters": {"weight": 0.5}}
        for name in ("inner", models["b"])
    ]
    two = Recipe.from_dict({**POOL["two"], "models": plain, "dtype": dtype})
    return {"one": one, "two": replace(two, steps=(replace(one, name="inner"),))}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merges_are_models_among_others(llamas, tmp_path, dtype):
    recipes = pool(llamas, dtype)
    live = RoutedModel(list(llamas.values()), dtype, recipes=recipes)
    steps = [
        RouteLayer("one", 0),
        RouteLayer("two", 1),
        RouteLayer(llamas["b"], 1, 0.8),
        RouteLayer("one", 2, 1.2),
    ]
    recipe = replace(
        route_to_recipe(
            steps, fold_of(Checkpoint(llamas["a"]).config), recipes=recipes
        ),
        dtype=dtype,
    )
    assert [step.name for step in recipe.steps] == ["one", "two-inner", "two"]
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    written = AutoModelForCausalLM.from_pretrained(
        merge(recipe, tmp_path / "out")
    ).eval()
    assert torch.equal(run(live.load(recipe).model), run(written))
    alone = merge(recipes["two"], tmp_path / "two")
    depth = Checkpoint(alone).architecture.depth
    whole = replace(
        route_to_recipe(
            [RouteLayer("two", n) for n in range(depth)], None, recipes=recipes
        ),
        dtype=dtype,
    )
    assert torch.equal(
        run(live.load(whole).model),
        run(AutoModelForCausalLM.from_pretrained(alone).eval()),
    )


def test_a_step_that_is_not_resident_is_told(llamas):
    recipes = pool(llamas, "float32")
    live = RoutedModel(list(llamas.values()), recipes={"one": recipes["one"]})
    other = route_to_recipe(
        [RouteLayer("one", 0)], None, recipes={"one": replace(recipes["one"], seed=4)}
    )
    with pytest.raises(
        RecipeError,
        match="The step 'one' is not one that this model has in memory: one",
    ):
        live.load(other)


@pytest.mark.parametrize("family", ["llava", "gemma3_vl", "qwen2_vl"])
def test_routes_through_the_language_part_of_a_multimodal_model(family, tmp_path):
    models = sources(family, tmp_path)
    route = [RouteLayer(models[model], layer) for model, layer, _ in SHORT]
    recipe = route_to_recipe(route, None)
    live = RoutedModel(list(models.values()))
    merged = live.load(recipe).model
    kind = type(ARCHITECTURES[family]())
    assert type(live.model) is type(merged) is kind
    written = kind.from_pretrained(merge(recipe, tmp_path / "out")).eval()
    assert torch.equal(run(merged), run(written))


def test_packed_experts_are_an_error_before_the_first_route(tmp_path):
    models = sources("mixtral", tmp_path)
    with pytest.raises(
        CheckpointError, match=r"experts.*leave `space\.routes` or `then` out"
    ):
        RoutedModel(list(models.values()))
