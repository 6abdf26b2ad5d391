"""The config of a model made of other models' layers."""

import pytest
import torch

from paretomerge.checkpoint.architecture import Architecture
from paretomerge.checkpoint.model_config import routed_config
from paretomerge.errors import CheckpointError
from tests.architectures import ARCHITECTURES

DOUBLED = (0, 1, 1, 2)
ROUTES = {"jamba": (1, 2, 1, 2)}
ONE_STACK = sorted(set(ARCHITECTURES) - {"t5", "bart", "albert"})


def routed(config, layers, dtype="float32"):
    return routed_config(config, [(config, layer) for layer in layers], dtype)


def layers_of(model):
    """Per layer the tensors in it, by their name inside the layer, with shapes."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    architecture = Architecture.infer(shapes, model.config.to_dict())
    inside = {
        layer: names
        for layer, names in architecture.by_layer.items()
        if layer is not None
    }
    return [
        {architecture.at_layer(name, 0): shapes[name] for name in inside[layer]}
        for layer in range(architecture.depth)
    ]


@pytest.mark.parametrize("name", ONE_STACK)
def test_transformers_builds_the_layers_of_the_route(name):
    model = ARCHITECTURES[name]()
    config, route = model.config.to_dict(), ROUTES.get(name, DOUBLED)
    result = routed(config, route)
    with torch.device("meta"):
        stacked = type(model)(type(model.config).from_dict(result))
    layers = layers_of(model)
    assert layers_of(stacked) == [layers[layer] for layer in route]
    text, new = model.config.get_text_config(), stacked.config.get_text_config()
    for key in ("layer_types", "mlp_layer_types", "no_rope_layers"):
        if isinstance(text.to_dict().get(key), list):
            assert getattr(new, key) == [getattr(text, key)[layer] for layer in route]


def test_patterns_that_a_class_derives_are_written_out():
    slide, full = "sliding_attention", "full_attention"
    gemma2 = {"model_type": "gemma2", "num_hidden_layers": 4}
    result = routed(gemma2, (0, 1, 1, 2))
    assert (
        result["layer_types"] == [slide, full, full, slide]
        and "layer_types" not in gemma2
    )
    gemma3 = {
        "model_type": "gemma3_text",
        "num_hidden_layers": 6,
        "sliding_window_pattern": 3,
    }
    assert routed(gemma3, (0, 2, 2, 3))["layer_types"] == [slide, full, full, slide]
    qwen2 = {
        "model_type": "qwen2",
        "num_hidden_layers": 3,
        "max_window_layers": 2,
        "use_sliding_window": True,
        "sliding_window": 8,
    }
    assert routed(qwen2, (2, 0))["layer_types"] == [slide, full]


def test_depth_and_dtype_at_every_level():
    text = {
        "num_hidden_layers": 2,
        "dtype": "bfloat16",
        "layer_types": ["a", "b"],
        "rope_parameters": {"long_factor": [1, 2]},
    }
    config = {
        "torch_dtype": "bfloat16",
        "num_hidden_layers": 2,
        "text_config": text,
        "vision_config": {"dtype": "bfloat16", "depth": 2},
    }
    got = routed(config, (0, 1, 1), "float16")
    assert (
        got["torch_dtype"],
        got["text_config"]["dtype"],
        got["vision_config"]["dtype"],
    ) == ("float16",) * 3
    assert (
        got["num_hidden_layers"],
        got["text_config"]["num_hidden_layers"],
        got["vision_config"]["depth"],
    ) == (3, 3, 2)
    assert got["text_config"]["layer_types"] == ["a", "b", "b"] and got["text_config"][
        "rope_parameters"
    ] == {"long_factor": [1, 2]}
    assert config["text_config"] is text and text["layer_types"] == ["a", "b"]
    assert routed_config(config, [], "float32")["text_config"]["num_hidden_layers"] == 2


def test_lists_follow_the_model_that_a_layer_comes_from():
    base, other = (
        {"num_hidden_layers": 2, "layer_types": [x, x], "heads": {"per_layer": [n, n]}}
        for x, n in (("a", 1), ("b", 2))
    )
    got = routed_config(base, [(base, 0), (other, 1)], "float32")
    assert (
        got["layer_types"] == ["a", "b"]
        and got["heads"] == {"per_layer": [1, 2]}
        and base["layer_types"] == ["a", "a"]
    )
    numbered = {"num_hidden_layers": 2, "per_layer_config": {"1": {"head_dim": 4}}}
    assert routed(numbered, (1, 0, 1))["per_layer_config"] == {
        "0": {"head_dim": 4},
        "2": {"head_dim": 4},
    }


@pytest.mark.parametrize(
    ("said", "layers", "expected"),
    [
        (
            {"decoder_sparse_step": 2, "mlp_only_layers": []},
            (1, 1, 0),
            {"decoder_sparse_step": 1, "mlp_only_layers": [2]},
        ),
        (
            {"decoder_sparse_step": 1, "mlp_only_layers": [0]},
            (0, 0, 3),
            {"decoder_sparse_step": 1, "mlp_only_layers": [0, 1]},
        ),
        ({"first_k_dense_replace": 1}, (0, 0, 2), {"first_k_dense_replace": 2}),
        ({"first_k_dense_replace": 1}, (1, 2), {"first_k_dense_replace": 0}),
        ({"first_k_dense_replace": 1}, (0, 1, 1), {"first_k_dense_replace": 1}),
        (
            {"attn_layer_period": 2, "attn_layer_offset": 1},
            (1, 2, 3),
            {"attn_layer_period": 2, "attn_layer_offset": 0},
        ),
        ({"block_types": ["r", "a"]}, (0, 2, 1), {"block_types": ["r", "r", "a"]}),
        ({"sliding_window_pattern": 2}, (1, 3), {"sliding_window_pattern": 1}),
        ({"num_kv_shared_layers": 2}, (0, 1, 3), {"num_kv_shared_layers": 1}),
        (
            {"cross_attention_layers": [1]},
            (0, 1, 1),
            {"cross_attention_layers": [1, 2]},
        ),
        (
            {
                "moe_layer_interval": 2,
                "moe_layer_start_index": 1,
                "moe_layer_end_index": 3,
            },
            (1, 3),
            {"moe_layer_interval": 1},
        ),
        ({"moe_layer_freq": [0, 1, 1, 1]}, (1, 0), {"moe_layer_freq": [1, 0]}),
    ],
)
def test_patterns_without_a_list(said, layers, expected):
    got = routed({"num_hidden_layers": 4, **said}, layers)
    assert got["num_hidden_layers"] == len(layers)
    assert {key: got[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("said", "layers", "told"),
    [
        (
            {"first_k_dense_replace": 1},
            (1, 0),
            r"pattern that config.json can express, got \.x",
        ),
        (
            {"attn_layer_period": 4, "attn_layer_offset": 0},
            (0, 0, 1),
            "attn_layer_period and attn_layer_offset",
        ),
        (
            {"hidden_size_per_layer_input": 8},
            (0, 1),
            "one table of embeddings for all layers",
        ),
        (
            {"ple_layer_ids": [1, 2]},
            (0, 1),
            "ple_layer_ids: expected a list with one entry per layer",
        ),
        (
            {"model_type": "gpt_neo", "num_hidden_layers": 4, "num_layers": 4},
            (0, 1),
            "transformers rejects these values",
        ),
    ],
)
def test_what_no_config_can_say_is_refused(said, layers, told):
    with pytest.raises(CheckpointError, match=told):
        routed({"num_hidden_layers": 4, **said}, layers)
    assert routed({"num_hidden_layers": 4, **said}, range(4))


def test_a_layer_that_no_list_reaches_is_named():
    base = {"num_hidden_layers": 2, "layer_types": ["a", "b"]}
    with pytest.raises(CheckpointError, match="expected entries for layer 3, got 2"):
        routed_config(base, [(base, 0), ({"num_hidden_layers": 4}, 3)], "float32")


def test_a_whole_route_changes_nothing_but_the_dtype():
    for name in ("qwen3_moe", "jamba", "gemma3_vl"):
        config = ARCHITECTURES[name]().config.to_dict()
        layers = range(config.get("text_config", config)["num_hidden_layers"])
        assert routed(config, layers, "float32") == config
    uneven = {
        "is_encoder_decoder": True,
        "encoder_layers": 4,
        "decoder_layers": 2,
        "num_hidden_layers": 4,
    }
    assert (
        routed(uneven, range(2))
        == routed(uneven, range(4))
        == routed(uneven, ())
        == uneven
    )
