"""Where a live model's sources are, and what a merge of them holds on the device at most."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from paretomerge.checkpoint.operand import InMemoryTensor
from paretomerge.errors import CheckpointError
from paretomerge.merging.engine import merged_tensors
from paretomerge.merging.live.in_place import ResidentModel
from paretomerge.merging.plan.cost import working_bytes
from paretomerge.merging.plan.make import make_plan, open_weights
from paretomerge.recipe import Recipe
from tests.checkpoint.test_adapter import adapter, factors
from tests.conftest import save_tokenizer
from tests.live_bytes import ABSENT_DEVICE, LiveBytes
from tests.merging.live.test_in_place import moved

BLOCK = 4096


@pytest.fixture
def models(tmp_path: Path) -> list[str]:
    """A base of a million parameters, a fine-tune, and an adapter on it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    moved(model).save_pretrained(tmp_path / "tuned")
    for name in ("base", "tuned"):
        save_tokenizer(tmp_path / name)
    tensors = {}
    for layer in range(8):
        for module, rows in (("self_attn.q_proj", 64), ("mlp.up_proj", 256)):
            name = f"model.layers.{layer}.{module}"
            tensors |= factors(name, (rows, 64), seed=layer)
    adapter(tmp_path / "adapter", tensors)
    base = str(tmp_path / "base")
    return [base, str(tmp_path / "tuned"), f"{base}+{tmp_path / 'adapter'}"]


def recipe_of(models: list[str], method: str) -> Recipe:
    sources = []
    for model in models[1:]:
        parameters = {"weight": 0.6}
        if method != "task_arithmetic":
            parameters["density"] = 0.4
        sources.append({"model": model, "parameters": parameters})
    return Recipe.from_dict(
        {"merge_method": method, "base_model": models[0], "models": sources}
    )


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_ties"])
def test_mapped_sources_leave_the_device_to_the_live_model(models, method, monkeypatch):
    # The device is played by the CPU: this bounds what would be on a GPU.
    for name in ("block.CPU_BLOCK", "block.GPU_BLOCK", "live.in_place._PART"):
        monkeypatch.setattr(f"paretomerge.merging.{name}", BLOCK)
    monkeypatch.setattr("paretomerge.merging.live.in_place.CPU_BLOCK", BLOCK)
    monkeypatch.setattr(
        "paretomerge.merging.engine.usable_device", lambda device: device
    )
    recipe = recipe_of(models, method)
    base, *sources = models
    allowed = working_bytes(make_plan(recipe), BLOCK)
    sparsities = []
    for on_device in (False, True):
        with LiveBytes(device=ABSENT_DEVICE) as device:
            resident = ResidentModel(
                base,
                sources,
                device=ABSENT_DEVICE,
                sources_on_device=on_device,
            )
            live_bytes = device.now
            device.peak = 0
            loaded = resident.load(recipe)
        parameters = loaded.model.state_dict().values()
        assert live_bytes >= sum(tensor.nbytes for tensor in parameters) / 2
        beyond = device.peak - live_bytes
        if on_device:
            # The base and the two sources, each as large as the live model.
            assert beyond > 2.5 * live_bytes
        else:
            assert beyond <= allowed < live_bytes / 4
        sparsities.append(loaded.facts["sparsity"])
        state = loaded.model.state_dict()
        for name, expected in merged_tensors(make_plan(recipe)):
            assert torch.equal(state[name], expected), name
    assert sparsities[0] == pytest.approx(sparsities[1], rel=1e-12)


def test_tensors_of_the_cpu_are_views_of_the_mapped_files(models):
    base, *sources = models
    resident = ResidentModel(base, sources)
    name = "model.layers.0.self_attn.q_proj.weight"
    plain = resident.checkpoints[sources[0]].operand(name)
    assert isinstance(plain, InMemoryTensor)
    file = Path(sources[0]) / "model.safetensors"
    # The storage is the whole mapping from the tensor's first byte, and no copy of the tensor.
    mappings = Path("/proc/self/maps").read_text()
    assert str(file) in mappings
    # What an adapter changes is computed once and stays in memory, or at each read.
    adapted = resident.checkpoints[sources[1]].operand(name)
    assert isinstance(adapted, InMemoryTensor)
    streamed = ResidentModel(base, sources, sources_on_device=False)
    assert not isinstance(
        streamed.checkpoints[sources[1]].operand(name), InMemoryTensor
    )


def test_a_source_that_was_written_again_is_refused(models):
    base, *sources = models
    resident = ResidentModel(base, sources)
    recipe = recipe_of(models, "task_arithmetic")
    resident.load(recipe)
    shutil.copytree(sources[0], Path(sources[0]).with_name("copy"))
    weights = Path(sources[0]) / "model.safetensors"
    weights.unlink()
    shutil.copy(Path(sources[0]).with_name("copy") / "model.safetensors", weights)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        resident.load(recipe)


def test_a_mapped_tensor_with_nan_is_named(models):
    opened = open_weights(models[:1], mapped=True)[models[0]]
    opened.operand("model.norm.weight")
    file = Path(models[0]) / "model.safetensors"
    header = opened.headers["model.norm.weight"]
    content = bytearray(file.read_bytes())
    content[header.offset : header.offset + 2] = b"\xc0\x7f"  # NaN in bfloat16
    file.write_bytes(content)
    fresh = open_weights(models[:1], mapped=True)[models[0]]
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight.*NaN"):
        fresh.operand("model.norm.weight")
