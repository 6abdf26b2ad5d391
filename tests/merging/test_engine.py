"""From a recipe to a checkpoint: on disk and in place, the same bytes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from paretomerge.errors import CheckpointError, RecipeError
from paretomerge.merging.engine import merge, merged_tensors
from paretomerge.merging.live.in_place import ResidentModel
from paretomerge.merging.plan.make import make_plan
from paretomerge.recipe import Recipe

SPARSE = """
merge_method: {method}
base_model: {pico}/base
models:
  - model: {pico}/ada
    parameters: {{weight: [0.2, 0.8], density: 0.5}}
  - model: {pico}/bob
    parameters: {{weight: [{{filter: .mlp., value: 0.9}}, {{value: 0.3}}], density: 0.3}}
"""


def sparse(pico: Path, method: str = "dare_ties") -> Recipe:
    return Recipe.from_yaml(SPARSE.format(pico=pico, method=method))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


@pytest.mark.parametrize("method", ["ties", "dare_ties", "dare_linear"])
def test_disk_and_resident_agree_bit_for_bit(pico, tmp_path, method):
    recipe = sparse(pico, method)
    merge(recipe, tmp_path / "out")
    resident = ResidentModel(str(pico / "base"), [str(pico / "ada"), str(pico / "bob")])
    resident.load(
        Recipe.from_yaml(
            SPARSE.format(pico=pico, method="task_arithmetic")
            .replace(", density: 0.5", "")
            .replace(", density: 0.3", "")
        )
    )
    resident.load(recipe)  # nothing of the merge before may be left
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert written.dtype == torch.bfloat16
    live = resident.model.state_dict()
    assert all(
        torch.equal(live[name], tensor) for name, tensor in written.state_dict().items()
    )


def test_output_is_a_whole_checkpoint(pico, tmp_path):
    merge(sparse(pico), tmp_path / "out", shard_bytes=20_000)
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {
        "config.json",
        "mergekit_config.yml",
        "README.md",
        "tokenizer.json",
        "model.safetensors.index.json",
    } <= names
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model(
        **tokenizer("ab", return_tensors="pt", return_token_type_ids=False)
    ).logits.shape == (1, 2, 32)
    assert Recipe.load(tmp_path / "out" / "mergekit_config.yml") == sparse(pico)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_written_recipe_rebuilds_the_same_bytes(pico, tmp_path):
    merge(sparse(pico), tmp_path / "a")
    merge(Recipe.load(tmp_path / "a" / "mergekit_config.yml"), tmp_path / "b")
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (
        tmp_path / "b" / "model.safetensors"
    ).read_bytes()


def test_bytes_do_not_depend_on_hash_seed_or_threads(pico, tmp_path):
    (tmp_path / "r.yml").write_text(sparse(pico).to_yaml())
    for hash_seed, threads in (("1", "1"), ("2", "2")):
        environment = os.environ | {
            "PYTHONHASHSEED": hash_seed,
            "OMP_NUM_THREADS": threads,
        }
        command = [
            sys.executable,
            "-m",
            "paretomerge.cli.main",
            "merge",
            str(tmp_path / "r.yml"),
            str(tmp_path / f"out{hash_seed}"),
        ]
        subprocess.run(command, env=environment, check=True, capture_output=True)
    assert (tmp_path / "out1" / "model.safetensors").read_bytes() == (
        tmp_path / "out2" / "model.safetensors"
    ).read_bytes()


def test_merge_takes_a_recipe_a_mapping_a_path_or_yaml(pico, tmp_path):
    recipe = sparse(pico, "ties")
    (tmp_path / "recipe.yml").write_text(recipe.to_yaml())
    forms = [
        recipe,
        recipe.to_dict(),
        tmp_path / "recipe.yml",
        str(tmp_path / "recipe.yml"),
        recipe.to_yaml(),
    ]
    written = [merge(form, tmp_path / f"out{i}") for i, form in enumerate(forms)]
    files = [(folder / "model.safetensors").read_bytes() for folder in written]
    assert all(file == files[0] for file in files)


def test_shards_hold_the_same_tensors(pico, tmp_path):
    merge(sparse(pico), tmp_path / "one")
    merge(sparse(pico), tmp_path / "many", shard_bytes=5_000)
    one, many = weights(tmp_path / "one"), weights(tmp_path / "many")
    assert one.keys() == many.keys() and all(torch.equal(one[n], many[n]) for n in one)


def test_gradients_filters_and_depth(pico):
    plan = make_plan(sparse(pico))
    parameters = {job.name: [k["weight"] for k in job.parameters] for job in plan.jobs}
    assert parameters["model.embed_tokens.weight"] == [
        0.2,
        0.3,
    ]  # embeddings and head are at depth 0
    assert parameters["lm_head.weight"] == [0.2, 0.3]
    assert parameters["model.layers.0.mlp.up_proj.weight"] == [0.2, 0.9]
    assert parameters["model.layers.3.self_attn.q_proj.weight"] == [
        pytest.approx(0.8),
        0.3,
    ]
    assert parameters["model.layers.1.self_attn.q_proj.weight"] == [
        pytest.approx(0.4),
        0.3,
    ]


def test_passthrough_stacks_layers_that_load(pico, tmp_path):
    text = f"""
merge_method: passthrough
slices:
  - sources: [{{model: {pico}/ada, layer_range: [0, 3]}}]
  - sources:
    - model: {pico}/cyd
      layer_range: [1, 4]
      parameters: {{scale: [{{filter: o_proj, value: 0.5}}, {{value: 1.0}}]}}
"""
    merge(Recipe.from_yaml(text), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.num_hidden_layers == 6
    merged, ada, cyd = (
        weights(tmp_path / "out"),
        weights(pico / "ada"),
        weights(pico / "cyd"),
    )
    up, down = (
        "model.layers.{}.mlp.up_proj.weight",
        "model.layers.{}.self_attn.o_proj.weight",
    )
    assert torch.equal(merged[up.format(2)], ada[up.format(2)])
    assert torch.equal(merged[up.format(3)], cyd[up.format(1)])
    assert torch.equal(
        merged[down.format(5)].float(), cyd[down.format(3)].float() * 0.5
    )
    assert torch.equal(
        merged["model.embed_tokens.weight"], ada["model.embed_tokens.weight"]
    )
    assert torch.equal(merged["lm_head.weight"], cyd["lm_head.weight"])


def test_slerp_takes_the_base_as_one_of_two(pico):
    text = (
        f"merge_method: slerp\nbase_model: {pico}/base\nmodels: [{{model: {pico}/ada}}, "
        f"{{model: {pico}/base}}]\nparameters: {{t: 0}}"
    )
    tensors = dict(merged_tensors(make_plan(Recipe.from_yaml(text))))
    base = weights(pico / "base")
    assert all(
        torch.allclose(tensors[n].float(), base[n].float(), rtol=1e-2) for n in base
    )


def test_an_unlisted_base_and_a_listed_one_are_the_same(pico):
    listed = sparse(pico, "ties").to_dict()
    listed["models"].insert(0, {"model": f"{pico}/base"})
    a, b = (
        dict(merged_tensors(make_plan(r)))
        for r in (sparse(pico, "ties"), Recipe.from_dict(listed))
    )
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_an_unlisted_base_is_a_source_of_a_linear_merge(pico):
    listed = {
        "merge_method": "linear",
        "models": [{"model": f"{pico}/{m}"} for m in ("ada", "base")],
        "parameters": {"weight": 1},
    }
    unlisted = listed | {"models": listed["models"][:1], "base_model": f"{pico}/base"}
    a, b = (
        dict(merged_tensors(make_plan(Recipe.from_dict(r)))) for r in (listed, unlisted)
    )
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_sparsity_is_in_units_of_the_farthest_source(pico):
    resident = ResidentModel(
        str(pico / "base"),
        [str(pico / e) for e in ("ada", "bob", "cyd")],
        dtype="float32",
    )
    space = (
        "merge_method: task_arithmetic\nbase_model: {p}/base\nmodels: [{{model: {p}/{e}, "
        "parameters: {{weight: {w}}}}}]"
    )
    sparsity = {
        (e, w): resident.load(Recipe.from_yaml(space.format(p=pico, e=e, w=w))).facts[
            "sparsity"
        ]
        for e in ("ada", "bob", "cyd")
        for w in (0, 0.5, 1)
    }
    assert sparsity["ada", 0] == 0
    assert min(sparsity.values()) == pytest.approx(-1, rel=1e-4)
    assert sparsity["bob", 0.5] == pytest.approx(sparsity["bob", 1] / 2, rel=1e-3)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("dare_ties", "dare_tied", "did you mean 'dare_ties'"),
        ("density: 0.5", "densty: 0.5", "did you mean 'density'"),
        ("density: 0.5", "density: 1.5", "from 0.0 to 1.0, got 1.5"),
        ("weight: [0.2, 0.8], ", "", "a value for `weight`"),
        ("density: 0.5", "epsilonn: 0.5", "unknown parameter"),
        ("weight: [0.2, 0.8]", "weight: heavy", "expected a number"),
        ("base_model: {pico}/base", "", "expected `base_model`"),
        ("{pico}/bob", "{pico}/eve", "there is no such folder"),
    ],
)
def test_bad_recipes_are_refused_before_a_weight_is_read(
    pico, tmp_path, monkeypatch, old, new, told
):
    monkeypatch.setattr(
        "paretomerge.checkpoint.operand.StoredTensor.rows",
        lambda *_: pytest.fail("read a weight"),
    )
    text = (
        SPARSE.replace("{method}", "dare_ties").replace(old, new, 1).format(pico=pico)
    )
    with pytest.raises((RecipeError, CheckpointError), match=told):
        merge(Recipe.from_yaml(text), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_unequal_shapes_and_depths_name_both(pico, tmp_path):
    from tests.conftest import pico_states, save_pico

    save_pico(tmp_path / "wide", pico_states(width=32)["ada"], width=32)
    save_pico(tmp_path / "deep", pico_states(layers=5)["ada"], layers=5)
    text = (
        "merge_method: task_arithmetic\nbase_model: {p}/base\nmodels: [{{model: {q}}}, "
        "{{model: {p}/bob}}]\nparameters: {{weight: 1}}"
    )
    with pytest.raises(
        CheckpointError, match=r"expected one shape, got .*wide \[32, 32\].*base"
    ):
        make_plan(Recipe.from_yaml(text.format(p=pico, q=tmp_path / "wide")))
    with pytest.raises(RecipeError, match="equal depth"):
        make_plan(Recipe.from_yaml(text.format(p=pico, q=tmp_path / "deep")))


def test_linear_weights_that_sum_to_zero(pico):
    models = (
        f"[{{model: {pico}/ada, parameters: {{weight: 1}}}}, "
        f"{{model: {pico}/bob, parameters: {{weight: -1}}}}]"
    )
    text = f"merge_method: linear\nmodels: {models}"
    with pytest.raises(RecipeError, match="sum other than 0"):
        make_plan(Recipe.from_yaml(text))


def test_nan_weights_are_named_and_nothing_is_left(pico, tmp_path):
    shutil.copytree(pico / "ada", tmp_path / "nan")
    tensors = load_file(tmp_path / "nan" / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(
        tensors, tmp_path / "nan" / "model.safetensors", metadata={"format": "pt"}
    )
    text = f"merge_method: linear\nmodels: [{{model: {tmp_path}/nan, parameters: {{weight: 1}}}}]"
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: expected finite"):
        merge(Recipe.from_yaml(text), tmp_path / "out")
    assert not (tmp_path / "out").exists() and len(list(tmp_path.iterdir())) == 1
