"""Models as they are found: odd configs, names and files. The right values are transformers' own."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, PreTrainedModel

from paretomerge.errors import CheckpointError
from paretomerge.merging.engine import merge
from paretomerge.merging.plan.make import make_plan
from paretomerge.recipe import Recipe
from tests.architectures import ARCHITECTURES

Tensors = Mapping[str, torch.Tensor]


def moved(model: PreTrainedModel, seed: int = 1) -> PreTrainedModel:
    """The model after a small random step."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def save(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def changed(source: Path, folder: Path, tensors: Tensors, **config: Any) -> Path:
    """A copy of a folder with other tensors and some keys of the config replaced."""
    shutil.copytree(source, folder)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    weights = folder / "model.safetensors"
    save_file(contiguous, weights, metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, **config}))
    return folder


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def halfway(base: Path, tuned: Path) -> Recipe:
    return Recipe.from_dict(
        {
            "merge_method": "task_arithmetic",
            "base_model": str(base),
            "models": [{"model": str(tuned), "parameters": {"weight": 0.5}}],
            "dtype": "float32",
        }
    )


def alone(model: Path) -> Recipe:
    models = [{"model": str(model)}]
    return Recipe.from_dict({"merge_method": "passthrough", "models": models})


def expect_mean(out: Path, first: PreTrainedModel, second: PreTrainedModel) -> None:
    """The loaded result is the mean of two models."""
    got = type(first).from_pretrained(out).state_dict()
    one, other = first.state_dict(), second.state_dict()
    for name in one:
        mean = (one[name] + other[name]) / 2
        torch.testing.assert_close(got[name], mean, rtol=1e-5, atol=1e-6)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save(ARCHITECTURES["llama"](), tmp_path / "base")


@pytest.fixture
def tuned(base: Path, tmp_path: Path) -> Path:
    model = LlamaForCausalLM.from_pretrained(base)
    return save(moved(model), tmp_path / "tuned")


def test_infinity_in_a_config_survives_slicing(tmp_path: Path) -> None:
    """transformers 5 writes it as an object, for JSON has no such number."""
    torch.manual_seed(0)
    config = transformers.Mamba2Config(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=3,
        num_heads=4,
        head_dim=8,
        state_size=4,
        n_groups=1,
    )
    folder = save(transformers.Mamba2ForCausalLM(config), tmp_path / "mamba")
    slices = []
    for layers in ([0, 2], [1, 3]):
        source = {"model": str(folder), "layer_range": layers}
        slices.append({"sources": [source]})
    recipe = {"merge_method": "passthrough", "slices": slices}
    out = merge(recipe, tmp_path / "out")
    before = json.loads((folder / "config.json").read_text())
    after = json.loads((out / "config.json").read_text())
    assert after["time_step_limit"] == before["time_step_limit"]
    assert after["time_step_limit"] == [0.0, {"__float__": "Infinity"}]
    loaded = transformers.Mamba2ForCausalLM.from_pretrained(out)
    assert loaded.config.time_step_limit[1] == float("inf")
    assert loaded.config.num_hidden_layers == 4
