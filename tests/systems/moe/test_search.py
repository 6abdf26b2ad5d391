"""The rows of a router as adapters: an ordinary study searches their lengths."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import paretomerge as pm
from paretomerge.merging.live.in_place import ResidentModel
from paretomerge.recipe import Recipe
from paretomerge.space.build import Pool, build_space
from paretomerge.space.measurements import Measurements
from paretomerge.space.sources import named_sources
from paretomerge.systems.moe import write_moe
from paretomerge.testing import check_space
from tests.systems.moe.pico import load, logits, save_dense

LENGTHS = {"0-a": [2.0, 0.5], "1-b": [0.25, 3.0]}
"""Source -> the length of its rows in the first and in the second layer."""


@pytest.fixture(params=["llama", "qwen2", "qwen3"])
def made(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """The same mixture twice: with its router, and for a search."""
    for seed, name in enumerate(("base", "a", "b")):
        save_dense(tmp_path / name, request.param, seed)
    experts = [
        {"source_model": str(tmp_path / "a"), "positive_prompts": ["abc"]},
        {"source_model": str(tmp_path / "b"), "positive_prompts": ["xyz"]},
    ]
    config = {
        "base_model": str(tmp_path / "base"),
        "experts": experts,
        "experts_per_token": 1,
    }
    if request.param == "qwen2":
        config["shared_experts"] = [{**experts[0], "residual_scale": 0.5}]
    write_moe(config, tmp_path / "moe")
    write_moe(config, tmp_path / "search", for_search=True)
    return tmp_path / "moe", tmp_path / "search"


def sources(folder: Path) -> list[str]:
    return [f"{folder}+{adapter}" for adapter in sorted((folder / "router").iterdir())]


def recipe(folder: Path, lengths: dict[str, list[float]]) -> Recipe:
    models = []
    for source in sources(folder):
        weight = lengths[Path(source).name]
        models.append({"model": source, "parameters": {"weight": weight}})
    return Recipe.from_dict(
        {
            "merge_method": "task_arithmetic",
            "base_model": str(folder),
            "models": models,
        }
    )


def routers(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensors[name] for name in tensors if name.endswith(".gate.weight")}


def test_weights_of_1_give_the_plain_mixture_bit_for_bit(
    made: tuple[Path, Path], tmp_path: Path
):
    plain, search = made
    zeros = routers(load_file(search / "model.safetensors"))
    assert len(zeros) == 2 and not any(gate.any() for gate in zeros.values())
    pm.merge(recipe(search, {"0-a": [1.0], "1-b": [1.0]}), tmp_path / "merged")
    expected = load_file(plain / "model.safetensors")
    merged = load_file(tmp_path / "merged/model.safetensors")
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], expected[name]) for name in expected)
    load(tmp_path / "merged")


def test_a_live_model_takes_the_lengths_that_a_written_one_has(
    made: tuple[Path, Path], tmp_path: Path
):
    plain, search = made
    wanted = recipe(search, LENGTHS)
    live = ResidentModel(str(search), sources(search)).load(wanted).model
    pm.merge(wanted, tmp_path / "merged")
    merged = load(tmp_path / "merged")
    assert torch.equal(logits(live), logits(merged))
    # Row by row: the length of a row is the weight of its expert in that layer.
    rows = load(plain)
    for layer in range(2):
        gate = live.model.layers[layer].mlp.gate.weight
        row = rows.model.layers[layer].mlp.gate.weight
        for number, name in enumerate(LENGTHS):
            expected = LENGTHS[name][layer] * row[number]
            torch.testing.assert_close(gate[number], expected)
    assert not torch.equal(logits(live), logits(rows))


def test_the_space_of_lengths_keeps_the_contract_of_spaces(
    made: tuple[Path, Path], tmp_path: Path
):
    _, search = made
    spec = pm.WeightSpace(
        methods=["task_arithmetic"], weight={"bounds": [0, 4], "groups": 2}
    )
    pool = Pool(str(search), named_sources(sources(search)))
    space = build_space(spec, pool, 0, Measurements(tmp_path / "measured"))
    assert sorted(space.distributions) == [
        "weight/0-a/0",
        "weight/0-a/1",
        "weight/1-b/0",
        "weight/1-b/1",
    ]
    check_space(space, points=4)
