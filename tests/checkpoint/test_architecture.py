"""Any architecture: what names and config tell of it, and a merge of it that reloads and runs."""

import copy
from pathlib import Path

import pytest
import torch

from paretomerge.checkpoint.architecture import Architecture
from paretomerge.checkpoint.reader import Checkpoint
from paretomerge.errors import CheckpointError
from paretomerge.merging.engine import merge
from paretomerge.recipe import Recipe
from tests.architectures import ARCHITECTURES, VOCABULARY, run

# Where only one list of three layers `model.layers.` is found, as in Llama, nothing is said here.
MAIN = {
    "gpt2": ["transformer.h."],
    "falcon": ["transformer.h."],
    "bloom": ["transformer.h."],
    "gpt_neox": ["gpt_neox.layers."],
    "opt": ["model.decoder.layers."],
    "mamba": ["backbone.layers."],
    "bert": ["bert.encoder.layer."],
    "roberta": ["roberta.encoder.layer."],
    "distilbert": ["distilbert.transformer.layer."],
    "albert": [],
    "t5": ["encoder.block.", "decoder.block."],
    "bart": ["model.encoder.layers.", "model.decoder.layers."],
    "llava": ["language_model.model.layers."],
    "gemma3_vl": ["language_model.model.layers."],
}
DEPTH = {"albert": 0, "bart": 2}
MODULES = {
    "qwen2_vl": {"text_decoder", "visual"},
    "llava": {"text_decoder", "vision_tower", "multi_modal_projector"},
    "gemma3_vl": {"text_decoder", "vision_tower", "multi_modal_projector"},
}
NO_ROLES = {"albert": {"attention", "mlp"}, "mamba": {"attention", "mlp"}}
VOCABULARY_TENSORS = {
    "llama": {"model.embed_tokens.weight": 0, "lm_head.weight": 0},
    "gpt2": {"transformer.wte.weight": 0},
    "gpt_neox": {"gpt_neox.embed_in.weight": 0, "embed_out.weight": 0},
    "opt": {"model.decoder.embed_tokens.weight": 0},
    "bert": {"bert.embeddings.word_embeddings.weight": 0, "cls.predictions.bias": 0},
    "roberta": {"roberta.embeddings.word_embeddings.weight": 0, "lm_head.bias": 0},
    "distilbert": {
        "distilbert.embeddings.word_embeddings.weight": 0,
        "vocab_projector.bias": 0,
    },
    "t5": {"shared.weight": 0},
    "bart": {"model.shared.weight": 0, "final_logits_bias": 1},
    "llava": {
        "language_model.model.embed_tokens.weight": 0,
        "language_model.lm_head.weight": 0,
    },
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """name -> folder of the saved pico model, built when first asked for."""
    folder = tmp_path_factory.mktemp("architectures")

    def save(name: str) -> Path:
        if not (folder / name).exists():
            ARCHITECTURES[name]().save_pretrained(folder / name)
        return folder / name

    return save


@pytest.fixture(params=ARCHITECTURES)
def checkpoint(request, saved):
    return request.param, Checkpoint(str(saved(request.param)))


def test_layers_are_found(checkpoint):
    name, opened = checkpoint
    architecture = opened.architecture
    depth = DEPTH.get(name, 3)
    assert [stack.prefix for stack in architecture.main_stacks] == MAIN.get(
        name, ["model.layers."]
    )
    assert architecture.depth == depth
    assert set(architecture.by_layer) == {None, *range(depth)}
    for tensor in architecture.names:
        layer = architecture.layer(tensor)
        assert layer is None or architecture.at_layer(tensor, layer) == tensor
    outside = architecture.by_layer[None]
    assert any(architecture.is_embedding(tensor) for tensor in outside)
    assert not any(
        "head" in tensor or "embed_out" in tensor
        for tensor in outside
        if architecture.is_embedding(tensor)
    )


def test_roles_and_their_filters(checkpoint):
    name, opened = checkpoint
    architecture = opened.architecture
    for role in ("attention", "mlp"):
        ours = {
            tensor for tensor in architecture.names if architecture.role(tensor) == role
        }
        assert {
            tensor
            for tensor in architecture.names
            if any(f in tensor for f in architecture.role_filters(role))
        } == ours
        layers = (
            set() if role in NO_ROLES.get(name, ()) else set(range(architecture.depth))
        )
        if name == "jamba" and role == "attention":
            layers = {1}  # the others are Mamba's
        assert {
            layer
            for layer, tensors in architecture.by_layer.items()
            if ours & set(tensors)
        } - {None} == layers
    assert all(
        architecture.role(tensor) == "other"
        for tensor in architecture.names
        if architecture.is_embedding(tensor)
    )


def test_vocabulary_and_modules(checkpoint):
    name, opened = checkpoint
    architecture = opened.architecture
    axes = {
        t: architecture.vocabulary_axis(t, header.shape)
        for t, header in opened.headers.items()
    }
    found = {tensor: axis for tensor, axis in axes.items() if axis is not None}
    assert found and all(
        opened.headers[tensor].shape[axis] == VOCABULARY
        for tensor, axis in found.items()
    )
    assert found == VOCABULARY_TENSORS.get(name, found)
    assert set(architecture.modules) == MODULES.get(name, {"default"})
    assert sorted(
        t for tensors in architecture.modules.values() for t in tensors
    ) == sorted(architecture.names)
    home = architecture.find_module("default")
    assert {
        architecture.module(t)
        for layer, tensors in architecture.by_layer.items()
        if layer is not None
        for t in tensors
    } <= {home}
    assert all(architecture.module(tensor) == home for tensor in found)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_merges_reloads_and_runs(name, saved, tmp_path):
    base = type(ARCHITECTURES[name]()).from_pretrained(saved(name)).eval()
    torch.manual_seed(1)
    experts, weights = [copy.deepcopy(base) for _ in range(2)], (0.75, 0.5)
    for i, expert in enumerate(experts):
        with torch.no_grad():
            for parameter in expert.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
        expert.save_pretrained(tmp_path / f"expert{i}")
    sources = [
        {"model": str(tmp_path / f"expert{i}"), "parameters": {"weight": w}}
        for i, w in enumerate(weights)
    ]
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(saved(name)),
        "models": sources,
        "parameters": {"normalize": False},
    }
    merged = (
        type(base)
        .from_pretrained(
            merge(Recipe.from_dict({**recipe, "dtype": "float32"}), tmp_path / "out")
        )
        .eval()
    )
    with torch.no_grad():
        for parameter, *others in zip(
            base.parameters(), *(e.parameters() for e in experts), strict=True
        ):
            parameter += sum(
                w * (other - parameter)
                for w, other in zip(weights, others, strict=True)
            )
    logits = run(merged)
    assert logits.shape[-1] == VOCABULARY and torch.isfinite(logits).all()
    torch.testing.assert_close(logits, run(base), rtol=0, atol=1e-5)


def test_a_tied_or_unprefixed_tensor_has_an_equivalent(saved):
    def architecture(name):
        return Checkpoint(str(saved(name))).architecture

    assert architecture("llama").find_equivalent("lm_head.weight") == "lm_head.weight"
    assert (
        architecture("qwen2").find_equivalent("lm_head.weight")
        == "model.embed_tokens.weight"
    )
    assert (
        architecture("t5").find_equivalent("encoder.embed_tokens.weight")
        == "shared.weight"
    )
    assert architecture("t5").find_equivalent("lm_head.weight") == "shared.weight"
    assert (
        architecture("bert").find_equivalent("cls.predictions.decoder.weight")
        == "bert.embeddings.word_embeddings.weight"
    )
    assert (
        architecture("bert").find_equivalent("cls.predictions.decoder.bias")
        == "cls.predictions.bias"
    )
    assert (
        architecture("gpt2").find_equivalent("h.1.ln_1.weight")
        == "transformer.h.1.ln_1.weight"
    )
    assert (
        architecture("gemma3_vl").find_equivalent("language_model.lm_head.weight")
        == "language_model.model.embed_tokens.weight"
    )
    assert architecture("llama").find_equivalent("score.weight") is None
    assert (
        architecture("llama").find_equivalent("model.layers.0.self_attn.q_proj.bias")
        is None
    )


def names(*lists, outside=("model.embed_tokens.weight",)):
    return [
        f"{prefix}{i}.self_attn.q_proj.weight"
        for prefix, depth in lists
        for i in range(depth)
    ] + list(outside)


def test_config_tells_the_language_from_the_rest():
    towers = names(
        ("model.visual.blocks.", 4),
        ("model.language_model.layers.", 4),
        outside=["lm_head.weight"],
    )
    architecture = Architecture.infer(
        towers, {"text_config": {"num_hidden_layers": 4}, "vision_config": {"depth": 4}}
    )
    assert (architecture.prefix, architecture.module("lm_head.weight")) == (
        "model.language_model.layers.",
        "text_decoder",
    )
    assert (
        architecture.module("model.visual.blocks.0.self_attn.q_proj.weight") == "visual"
    )
    assert (
        architecture.find_module("language_model")
        == architecture.find_module("default")
        == "text_decoder"
    )
    with pytest.raises(CheckpointError, match=r"did you mean 'visual'"):
        architecture.find_module("visuel")
    nested = {
        "thinker_config": {
            "text_config": {"num_hidden_layers": 2},
            "vision_config": {"depth": 2},
        },
        "talker_config": {},
    }
    omni = names(
        ("thinker.visual.blocks.", 2),
        ("thinker.model.layers.", 2),
        ("talker.model.layers.", 3),
    )
    assert Architecture.infer(omni, nested).prefix == "thinker.model.layers."
    assert (
        Architecture.infer(omni, nested).module(
            "talker.model.layers.0.self_attn.q_proj.weight"
        )
        == "talker"
    )
    clip = names(("vision_model.encoder.layers.", 2), ("text_model.encoder.layers.", 2))
    assert (
        Architecture.infer(clip, {"text_config": {"num_hidden_layers": 2}}).prefix
        == "text_model.encoder.layers."
    )
    remote = {
        "brain": {"num_hidden_layers": 2, "vocab_size": 9},
        "eye": {"num_hidden_layers": 3},
    }
    assert (
        Architecture.infer(
            names(("eye.layers.", 3), ("brain.layers.", 2)), remote
        ).prefix
        == "brain.layers."
    )


def test_stacks_of_unequal_or_unexpected_depth():
    uneven = names(("model.encoder.layers.", 4), ("model.decoder.layers.", 2))
    architecture = Architecture.infer(
        uneven, {"encoder_layers": 4, "decoder_layers": 2, "num_hidden_layers": 4}
    )
    assert [(s.prefix, s.depth) for s in architecture.main_stacks] == [
        ("model.decoder.layers.", 2)
    ]
    assert architecture.layer("model.encoder.layers.3.self_attn.q_proj.weight") is None
    assert (
        architecture.role("model.encoder.layers.3.self_attn.q_proj.weight")
        == "attention"
    )
    predictor = Architecture.infer(
        names(("model.layers.", 4)),
        {"num_hidden_layers": 3, "num_nextn_predict_layers": 1},
    )
    assert (
        predictor.depth,
        predictor.layer("model.layers.3.self_attn.q_proj.weight"),
    ) == (3, None)
    assert Architecture.infer(names(("model.layers.", 3)), {}).depth == 3
    assert Architecture.infer(["linear.weight"], {}).depth == 0
    split = [
        f"transformer.{part}.{i}.q_lin.weight"
        for part in ("attentions", "ffns", "layer_norm1")
        for i in range(2)
    ]
    xlm = Architecture.infer([*split, "transformer.embeddings.weight"], {"n_layers": 2})
    assert len(xlm.main_stacks) == 3 and xlm.role_filters("attention") == tuple(
        n for n in split if "attentions" in n
    )
    with pytest.raises(CheckpointError, match="expected 5 numbered layers"):
        Architecture.infer(names(("model.layers.", 3)), {"n_layer": 5})
