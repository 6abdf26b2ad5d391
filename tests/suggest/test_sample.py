"""Which matrices are looked at, and their leading directions."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from paretomerge.errors import CheckpointError
from paretomerge.suggest.sample import (
    DIRECTIONS,
    evenly_spaced,
    leading_directions,
    take_sample,
)
from tests.conftest import EXPERTS


@pytest.fixture(scope="module")
def sources(pico):
    return {name: str(pico / name) for name in EXPERTS}


def test_all_matrices_of_the_layers_are_sampled_and_no_embedding(pico, sources):
    sample = take_sample(str(pico / "base"), sources)
    assert sample.layers == (0, 1, 2, 3)
    assert len(sample.matrices) == 4 * 7  # q, k, v, o, gate, up, down
    assert not any("embed" in name or "norm" in name for name in sample.matrices)


def test_a_delta_is_the_difference_of_the_files(pico, sources):
    sample = take_sample(str(pico / "base"), sources)
    name = "model.layers.2.mlp.up_proj.weight"
    base = load_file(pico / "base" / "model.safetensors")[name].float()
    ada = load_file(pico / "ada" / "model.safetensors")[name].float()
    matrix = sample.read(name)
    torch.testing.assert_close(matrix.base, base, rtol=0, atol=0)
    torch.testing.assert_close(matrix.deltas["ada"], ada - base, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("layers", "count", "chosen"),
    [
        (4, 8, [0, 1, 2, 3]),
        (30, 1, [15]),
        (30, 3, [5, 15, 25]),
        (8, 4, [1, 3, 5, 7]),
    ],
)
def test_layers_are_spread_over_the_model(layers, count, chosen):
    assert evenly_spaced(range(layers), count) == chosen


def test_directions_of_a_small_delta_are_its_singular_vectors():
    torch.manual_seed(0)
    delta = torch.randn(40, 30)
    found = leading_directions(delta)
    assert found.energy == pytest.approx(float(delta.square().sum()))
    products = found.inputs * found.strengths
    # |delta|^2 as seen from the inputs: delta^T delta = V S^2 V^T
    torch.testing.assert_close(
        products @ products.T, delta.T @ delta, rtol=1e-4, atol=1e-4
    )


def test_directions_of_a_large_delta_of_low_rank_are_exact_and_leave_the_generator():
    torch.manual_seed(0)
    delta = torch.randn(300, 16) @ torch.randn(16, 200)
    state = torch.get_rng_state()
    found = leading_directions(delta)
    assert torch.equal(torch.get_rng_state(), state)
    assert found.inputs.shape == (200, DIRECTIONS)
    expected = torch.linalg.svdvals(delta)[:16]
    torch.testing.assert_close(found.strengths[:16], expected, rtol=1e-4, atol=1e-3)
    again = leading_directions(delta)
    assert torch.equal(found.inputs, again.inputs)


def test_matrices_of_gpt2_are_turned_to_outputs_by_inputs(tmp_path):
    config = GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    for seed, name in enumerate(("base", "one", "two")):
        torch.manual_seed(seed)
        GPT2LMHeadModel(config).save_pretrained(tmp_path / name)
    sources = {name: str(tmp_path / name) for name in ("one", "two")}
    sample = take_sample(str(tmp_path / "base"), sources)
    assert sample.transposed
    name = next(n for n in sample.matrices if n.endswith("mlp.c_fc.weight"))
    # Stored as (16 inputs, 64 outputs).
    assert sample.read(name).base.shape == (64, 16)


def test_a_model_without_layers_is_refused(tmp_path):
    save_file({"weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="has no layers with matrices"):
        take_sample(str(tmp_path), {"a": str(tmp_path)})
