"""A merge as an adapter: peft and our own reading both give base + B A."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from typer.testing import CliRunner

from paretomerge.cli.main import app
from paretomerge.errors import CheckpointError, ConfigError
from paretomerge.merging.engine import merge
from paretomerge.systems.factors import Cut
from paretomerge.systems.lora import ExtractedAdapter, extract_lora
from tests.architectures import ARCHITECTURES, run
from tests.conftest import pico_states, save_pico
from tests.pico import build_pico, moved

# peft warns of tied embeddings, of options that it corrects, and of patterns on parameters.
pytestmark = pytest.mark.filterwarnings("ignore")


def save_pair(name: str, folder: Path) -> PreTrainedModel:
    """A base and a merge of it, in float32; returns the merge."""
    model = ARCHITECTURES[name]().float()
    model.save_pretrained(folder / "base")
    moved(model).save_pretrained(folder / "merged")
    return model


def with_peft(model: PreTrainedModel, folder: Path) -> torch.Tensor:
    """Logits of the base with the adapter, as peft loads it."""
    base = type(model).from_pretrained(folder / "base")
    return run(PeftModel.from_pretrained(base, folder / "lora").eval())


def written(folder: Path) -> Path:
    """The base with the adapter, as this package reads it, as a checkpoint."""
    adapted = f"{folder / 'base'}+{folder / 'lora'}"
    recipe = {"merge_method": "passthrough", "models": [{"model": adapted}]}
    return merge(recipe, folder / "whole", overwrite=True)


def extract(folder: Path, **options: Any) -> ExtractedAdapter:
    return extract_lora(
        folder / "merged", folder / "base", folder / "lora", overwrite=True, **options
    )


def adapter_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(
        (folder / "lora" / "adapter_config.json").read_text()
    )
    return config


EXACT = [
    "llama",
    "qwen2",  # tied, biases
    "gemma3",  # tied, an embedding with a scale
    "gpt2",  # tied, Conv1D
    "gpt_neox",  # names that change while the model is loaded
    "opt",  # position embeddings that compute something else from their ids
    "falcon",  # a class of its own for linear layers
    "mixtral",  # stacked experts
    "qwen3_moe",  # and dense layers that peft takes for single experts
    "bert",  # a bias that is stored twice
    "t5",  # four names for one embedding
    "qwen2_vl",
]


@pytest.mark.parametrize("name", EXACT)
def test_all_of_the_energy_is_the_merge(name: str, tmp_path: Path) -> None:
    model = save_pair(name, tmp_path)
    wanted = run(model)
    adapter = extract(tmp_path, energy=1.0)
    assert not adapter.lost and adapter.kept_energy == pytest.approx(1)
    torch.testing.assert_close(with_peft(model, tmp_path), wanted, rtol=0, atol=2e-5)
    ours = type(model).from_pretrained(written(tmp_path)).eval()
    torch.testing.assert_close(run(ours), wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_a_cut_is_the_best_of_its_rank(name: str, tmp_path: Path) -> None:
    model = save_pair(name, tmp_path)
    adapter = extract(tmp_path, rank=3)
    assert set(adapter.ranks.values()) == {3}
    base = type(model).from_pretrained(tmp_path / "base").state_dict()
    got = type(model).from_pretrained(written(tmp_path)).state_dict()
    for parameter in adapter.ranks:
        delta = (model.state_dict()[parameter] - base[parameter]).double().numpy()
        u, s, v = np.linalg.svd(delta, full_matrices=False)
        wanted = (u[..., :3] * s[..., None, :3]) @ v[..., :3, :]
        change = (got[parameter] - base[parameter]).numpy()
        np.testing.assert_allclose(change, wanted, atol=1e-5)
        energy = (s[..., :3] ** 2).sum() / (s**2).sum()
        assert adapter.energy[parameter] == pytest.approx(energy, rel=1e-4)
    # What peft computes is what is written.
    live = type(model).from_pretrained(tmp_path / "whole").eval()
    torch.testing.assert_close(with_peft(model, tmp_path), run(live), rtol=0, atol=2e-5)


@given(
    values=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8),
    energy=st.floats(0.01, 1),
)
@settings(max_examples=100, deadline=None)
def test_the_rank_is_the_smallest_that_keeps_the_energy(
    values: list[float], energy: float
) -> None:
    sorted_values = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    rank = Cut(energy=energy).rank_of(sorted_values)
    squares = sorted_values.square().numpy()
    total = squares.sum()
    assert squares[:rank].sum() >= energy * total * (1 - 1e-12)
    assert squares[: rank - 1].sum() < energy * total * (1 + 1e-12)


def test_the_rank_by_hand() -> None:
    # Energies 9, 4, 1, 0: shares 9/14, 13/14, 1.
    values = torch.tensor([3.0, 2.0, 1.0, 0.0], dtype=torch.float64)
    asked = {0.5: 1, 9 / 14: 1, 0.65: 2, 0.92: 2, 0.94: 3, 1.0: 3}
    for energy, rank in asked.items():
        assert Cut(energy=energy).rank_of(values) == rank
    assert Cut(rank=2).rank_of(values) == 2 and Cut(rank=9).rank_of(values) == 3
    assert Cut(energy=0.9).rank_of(torch.zeros(4, dtype=torch.float64)) == 0


def test_ranks_of_layers_whose_names_end_alike(tmp_path: Path) -> None:
    """`layers.1.` is no end of `layers.11.`, and neither is a pattern of the other."""
    states = pico_states(layers=12)
    base, merged = states["base"], dict(states["base"])
    generator = torch.Generator().manual_seed(1)
    ranks = {1: 1, 2: 5, 10: 2, 11: 3}
    for layer, rank in ranks.items():
        name = f"model.layers.{layer}.self_attn.q_proj.weight"
        left = torch.randn(16, rank, generator=generator)
        right = torch.randn(rank, 16, generator=generator)
        merged[name] = base[name] + 0.1 * left @ right
    for folder, state in (("base", base), ("merged", merged)):
        save_pico(tmp_path / folder, state, layers=12)
        kind = transformers.LlamaForCausalLM
        model = kind.from_pretrained(tmp_path / folder, dtype=torch.float32)
        model.load_state_dict(state)
        model.save_pretrained(tmp_path / folder)
    adapter = extract(tmp_path, energy=1 - 1e-9)
    got = {name.split(".")[2]: rank for name, rank in adapter.ranks.items()}
    assert got == {str(layer): rank for layer, rank in ranks.items()}
    assert len(adapter_config(tmp_path)["rank_pattern"]) == 3
    torch.testing.assert_close(
        with_peft(model, tmp_path), run(model.eval()), rtol=0, atol=2e-5
    )


def test_an_adapter_is_found_again(pico: Path, tmp_path: Path) -> None:
    """A merge that is base+adapter has that adapter's rank, and no other change."""
    module = "base_model.model.model.layers.1.self_attn.q_proj"
    lora = tmp_path / "given"
    lora.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 6}
    (lora / "adapter_config.json").write_text(json.dumps(settings))
    a, b = torch.randn(2, 16), torch.randn(16, 2)
    tensors = {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    save_file(tensors, lora / "adapter_model.safetensors")
    base = pico / "base"
    adapter = extract_lora(
        f"{base}+{lora}", base, tmp_path / "lora", energy=1 - 1e-9, dtype="float32"
    )
    assert adapter.ranks == {"model.layers.1.self_attn.q_proj.weight": 2}
    assert not adapter.whole
    found = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    product = found[f"{module}.lora_B.weight"] @ found[f"{module}.lora_A.weight"]
    torch.testing.assert_close(product, 3 * b @ a, rtol=1e-3, atol=1e-3)


def test_factors_have_the_dtype_of_the_base(pico: Path, tmp_path: Path) -> None:
    sizes = {}
    for dtype in (None, "float32"):
        adapter = extract_lora(
            pico / "ada", pico / "base", tmp_path / str(dtype), rank=2, dtype=dtype
        )
        file = tmp_path / str(dtype) / "adapter_model.safetensors"
        factors = {n: t for n, t in load_file(file).items() if "lora" in n}
        assert {t.dtype for t in factors.values()} == {
            getattr(torch, dtype or "bfloat16")
        }
        sizes[dtype] = sum(t.nbytes for t in factors.values())
        assert adapter.bytes == sum(t.nbytes for t in load_file(file).values())
    assert sizes["float32"] == 2 * sizes[None]


def test_tied_embeddings_stay_tied_or_are_parted(tmp_path: Path) -> None:
    model = save_pair("qwen2", tmp_path)
    adapter = extract(tmp_path, energy=1.0)
    assert any("merge_and_unload" in note for note in adapter.notes)
    config = json.loads((written(tmp_path) / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    # A merge with a head of its own.
    model.config.tie_word_embeddings = False
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["lm_head.weight"] += 0.05
    parted = type(model)(model.config).eval()
    parted.load_state_dict(state)
    parted.save_pretrained(tmp_path / "merged")
    extract(tmp_path, energy=1.0)
    wanted = run(parted)
    torch.testing.assert_close(with_peft(model, tmp_path), wanted, rtol=0, atol=2e-5)
    ours = type(model).from_pretrained(written(tmp_path)).eval()
    torch.testing.assert_close(run(ours), wanted, rtol=0, atol=2e-5)


def test_what_an_adapter_cannot_hold_is_refused_or_dropped(tmp_path: Path) -> None:
    model = save_pair("gpt_oss", tmp_path)
    with pytest.raises(CheckpointError, match=r"self_attn\.sinks.*--drop-others"):
        extract(tmp_path, energy=1.0)
    assert not (tmp_path / "lora").exists()
    adapter = extract(tmp_path, energy=1.0, drop_others=True)
    sinks = {f"model.layers.{layer}.self_attn.sinks" for layer in range(3)}
    assert set(adapter.lost) == sinks
    # All else is the merge.
    wanted = type(model).from_pretrained(tmp_path / "merged").eval()
    base = type(model).from_pretrained(tmp_path / "base").state_dict()
    wanted.load_state_dict({name: base[name] for name in sinks}, strict=False)
    torch.testing.assert_close(
        with_peft(model, tmp_path), run(wanted), rtol=0, atol=2e-5
    )


ASTRAY = [
    "jamba",  # code that reads weights, and experts
    "mamba",
    "gemma3",  # a stack of one matrix with modules inside
    "unlimited_ocr",  # names in memory that peft renames, and a table of positions
    "beam",  # dense layers that peft takes for experts, in a model without experts
]


@pytest.mark.parametrize("name", ASTRAY)
def test_where_peft_would_compute_something_else(name: str, tmp_path: Path) -> None:
    """Such parameters are stored whole, or named as lost."""
    is_small = name in ("jamba", "mamba")
    model = ARCHITECTURES[name]().float() if is_small else build_pico(name)
    model.save_pretrained(tmp_path / "base")
    moved(model).save_pretrained(tmp_path / "merged")
    adapter = extract(tmp_path, energy=1.0, drop_others=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = with_peft(model, tmp_path)
    assert not any("missing adapter keys" in str(entry.message) for entry in caught)
    ours = type(model).from_pretrained(written(tmp_path)).eval()
    torch.testing.assert_close(got, run(ours), rtol=0, atol=2e-5)
    merged = type(model).from_pretrained(tmp_path / "merged").state_dict()
    for parameter, tensor in ours.state_dict().items():
        if parameter not in adapter.lost:
            torch.testing.assert_close(tensor, merged[parameter], rtol=0, atol=1e-5)


def test_refusals(pico: Path, tmp_path: Path) -> None:
    base, merged, out = pico / "base", pico / "ada", tmp_path / "lora"
    for options in ({}, {"rank": 2, "energy": 0.9}, {"energy": 1.5}, {"rank": 0}):
        with pytest.raises(ConfigError):
            extract_lora(merged, base, out, **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="dtype"):
        extract_lora(merged, base, out, rank=2, dtype="int8")
    with pytest.raises(CheckpointError, match="no matrix differs"):
        extract_lora(base, base, out, rank=2)
    with pytest.raises(CheckpointError, match="plain checkpoint"):
        extract_lora(merged, f"{base}+{out}", out, rank=2)
    state = pico_states()["ada"]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = torch.cat([state[name], state[name][:4]])
    wide = tmp_path / "wide"
    save_pico(wide, pico_states()["ada"])
    save_file(state, wide / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="resize the base first"):
        extract_lora(wide, base, out, rank=2)
    with pytest.raises(CheckpointError, match="would replace the source"):
        extract_lora(wide, base, wide, rank=2, overwrite=True)
    assert not out.exists() and not list(tmp_path.glob(".*"))


def test_the_command_says_what_is_kept(pico: Path, tmp_path: Path) -> None:
    arguments = ["extract-lora", str(pico / "ada"), "--base", str(pico / "base")]
    result = CliRunner().invoke(
        app, [*arguments, "--energy", "0.9", str(tmp_path / "lora")]
    )
    assert result.exit_code == 0, result.output
    assert "kept   30 matrices" in result.output
    assert "whole  9 tensors: model.layers.0.input_layernorm.weight" in result.output
    assert "MB" in result.output
