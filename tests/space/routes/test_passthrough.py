from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from paretomerge.checkpoint.fold import FOLDS, fold_of
from paretomerge.checkpoint.reader import Checkpoint
from paretomerge.errors import CheckpointError, RecipeError
from paretomerge.merging.engine import merge
from paretomerge.recipe import Recipe
from paretomerge.space.routes.passthrough import RouteLayer, route_to_recipe
from tests.architectures import ARCHITECTURES, run
from tests.conftest import pico_config, pico_states, save_pico

FAMILIES = sorted(
    name for name, build in ARCHITECTURES.items() if build().config.model_type in FOLDS
)
ROUTE = (
    ("a", 0, 1.0),
    ("b", 1, 0.6),
    ("b", 2, 1.0),
    ("a", 1, 1.7),
    ("b", 1, 1.0),
    ("b", 1, 0.8),
    ("a", 2, 1.2),
)


def sources(family: str, folder: Path) -> dict[str, str]:
    """Two models of the family whose layers matter.

    At their initial weights the stream is nearly the embedding.
    """
    for seed, name in enumerate("ab"):
        model = ARCHITECTURES[family]()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(folder / name)
    return {name: str(folder / name) for name in "ab"}


def written(recipe: Recipe, folder: Path) -> PreTrainedModel:
    merge(recipe, folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def with_scales(
    model: PreTrainedModel, prefix: str, scales: list[float]
) -> PreTrainedModel:
    """The stream multiplied on its way into each layer, in the forward pass."""
    for layer, scale in zip(
        model.get_submodule(prefix.rstrip(".")), scales, strict=True
    ):

        def before(module, args, kwargs, scale=scale):
            if args:
                return (args[0] * scale, *args[1:]), kwargs
            return args, kwargs | {"hidden_states": kwargs["hidden_states"] * scale}

        layer.register_forward_pre_hook(before, with_kwargs=True)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folded_checkpoint_is_the_route_with_explicit_scales(family, tmp_path):
    models = sources(family, tmp_path)
    first = Checkpoint(models["a"])
    steps = [RouteLayer(models[model], layer, scale) for model, layer, scale in ROUTE]
    plain = [RouteLayer(step.model, step.layer) for step in steps]
    explicit = with_scales(
        written(route_to_recipe(plain, None), tmp_path / "plain"),
        first.architecture.prefix,
        [s for *_, s in ROUTE],
    )
    folded = written(route_to_recipe(steps, fold_of(first.config)), tmp_path / "folded")
    assert folded.config.num_hidden_layers == len(ROUTE)
    expected, got, unscaled = (
        run(explicit),
        run(folded),
        run(written(route_to_recipe(plain, None), tmp_path / "again")),
    )
    assert (got - expected).abs().max() <= 1e-3 * expected.abs().max()
    assert (
        unscaled - expected
    ).abs().max() > 0.02 * expected.abs().max()  # the scales do something


def test_a_route_through_one_model_in_order_is_that_model(pico, tmp_path):
    recipe = route_to_recipe(
        [RouteLayer(str(pico / "ada"), layer) for layer in range(4)], None
    )
    assert len(recipe.slices) == 1
    merge(recipe, tmp_path / "out")
    ours, theirs = Checkpoint(str(tmp_path / "out")), Checkpoint(str(pico / "ada"))
    assert (
        all(
            torch.equal(ours.tensor(name), theirs.tensor(name))
            for name in theirs.headers
        )
        and ours.config == theirs.config
    )


@pytest.mark.parametrize(
    ("width", "told"),
    [
        (32, r"layers\.1.*expected \[16\], as in .*, got \[32\] of .*other"),
        (16, "lm_head"),
    ],
)
def test_layers_of_another_width_and_heads_of_other_tokens_are_refused(
    width, told, pico, tmp_path
):
    model = LlamaForCausalLM(
        LlamaConfig(**{**pico_config(width=width).to_dict(), "vocab_size": 40})
    )
    model.save_pretrained(tmp_path / "other")
    steps = [RouteLayer(str(pico / "ada"), 0), RouteLayer(str(tmp_path / "other"), 1)]
    with pytest.raises(CheckpointError, match=told):
        merge(route_to_recipe(steps, None), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_models_of_one_width_and_other_depths_give_layers(pico, tmp_path):
    save_pico(tmp_path / "deep", pico_states(seed=1, layers=6)["bob"], layers=6)
    steps = [
        RouteLayer(str(pico / "ada"), 0),
        RouteLayer(str(tmp_path / "deep"), 5),
        RouteLayer(str(tmp_path / "deep"), 2),
        RouteLayer(str(pico / "ada"), 3),
    ]
    model = written(route_to_recipe(steps, None), tmp_path / "out")
    assert model.config.num_hidden_layers == 4
    deep = Checkpoint(str(tmp_path / "deep")).tensor(
        "model.layers.5.mlp.up_proj.weight"
    )
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, deep.float())


def test_layers_that_go_on_share_a_slice_and_its_scale():
    fold = FOLDS["llama"]
    recipe = route_to_recipe(
        [
            RouteLayer("a", 0),
            RouteLayer("a", 1, 2.0),
            RouteLayer("a", 2),
            RouteLayer("b", 3),
            RouteLayer("b", 3),
        ],
        fold,
    )
    assert [piece.sources[0].layer_range for piece in recipe.slices] == [
        (0, 1),
        (1, 3),
        (3, 4),
        (3, 4),
    ]
    halves = [
        {"filter": "o_proj", "value": 0.5},
        {"filter": "down_proj", "value": 0.5},
        {"value": 1.0},
    ]
    assert [piece.sources[0].parameters for piece in recipe.slices] == [
        {},
        *[{"scale": halves}] * 3,
    ]
    assert Recipe.from_yaml(recipe.to_yaml()).key == recipe.key


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_scales_that_cannot_be(scale):
    with pytest.raises(RecipeError, match="expected scales above 0, got"):
        route_to_recipe([RouteLayer("a", 0), RouteLayer("a", 1, scale)], FOLDS["llama"])


def test_the_first_layer_has_no_scale():
    with pytest.raises(
        RecipeError, match=r"expected a scale of 1 into the first layer, got 2\.0"
    ):
        route_to_recipe([RouteLayer("a", 0, 2.0), RouteLayer("a", 1)], FOLDS["llama"])


def test_nothing_and_scales_without_a_fold_are_refused():
    with pytest.raises(RecipeError, match="expected one layer or more"):
        route_to_recipe([], None)
    with pytest.raises(RecipeError, match="expected scales of 1"):
        route_to_recipe([RouteLayer("a", 0), RouteLayer("a", 1, 2.0)], None)


@pytest.mark.parametrize("kind", ["mamba", "bloom", "gemma3n_text", None])
def test_families_that_are_not_exact_are_refused_by_name(kind):
    with pytest.raises(
        CheckpointError, match=f"{kind}: the residual stream can be scaled only in"
    ):
        fold_of({"model_type": kind})
