"""Corners of plans.

Layers of a base, depths that differ, names that differ, tensors that only one model has.
"""

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from paretomerge.checkpoint.reader import Checkpoint
from paretomerge.errors import RecipeError
from paretomerge.merging.engine import merge, merged_tensors
from paretomerge.merging.plan.make import make_plan
from paretomerge.recipe import Recipe
from tests.conftest import pico_states, save_pico


def plan(pico: Path, text: str, **options):
    return make_plan(Recipe.from_yaml(text.replace("PICO", str(pico))), **options)


def changed(pico: Path, folder: Path, change) -> Path:
    """A copy of ada with other tensors."""
    shutil.copytree(pico / "ada", folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_slices_own_base_gives_the_layers_that_are_listed_for_it(pico):
    text = (
        "merge_method: task_arithmetic\nbase_model: PICO/base\nslices:\n- base_model: PICO/cyd\n "
        " sources:\n"
        "  - {model: PICO/ada, layer_range: [0, 2]}\n  - {model: PICO/cyd, layer_range: [2, "
        "4]}\nparameters: {weight: 0.5}\ndtype: float32"
    )
    made = plan(pico, text)
    ada, cyd = (load_file(pico / name / "model.safetensors") for name in ("ada", "cyd"))
    for name, merged in merged_tensors(
        made, only=["model.layers.1.mlp.up_proj.weight"]
    ):
        theirs = cyd[name.replace("layers.1", "layers.3")].float()
        torch.testing.assert_close(merged, theirs + 0.5 * (ada[name].float() - theirs))


def test_layers_of_a_model_that_is_deeper_than_the_first(pico, tmp_path):
    from transformers import AutoModelForCausalLM

    save_pico(tmp_path / "deep", pico_states(layers=6)["ada"], layers=6)
    text = (
        "merge_method: passthrough\nslices:\n- sources: "
        f"[{{model: {pico}/ada, layer_range: [0, 3]}}]\n"
        f"- sources: [{{model: {tmp_path}/deep, layer_range: [3, 6]}}]"
    )
    merge(Recipe.from_yaml(text), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    deep = load_file(tmp_path / "deep" / "model.safetensors")
    assert model.config.num_hidden_layers == 6
    assert torch.equal(
        model.state_dict()["model.layers.5.mlp.up_proj.weight"],
        deep["model.layers.5.mlp.up_proj.weight"],
    )


def test_a_model_saved_without_its_prefix_adds_no_tensors(pico, tmp_path):
    bare = changed(
        pico,
        tmp_path / "bare",
        lambda t: {name.removeprefix("model."): tensor for name, tensor in t.items()},
    )
    text = (
        f"merge_method: linear\nmodels: [{{model: PICO/ada}}, "
        f"{{model: {bare}}}]\nparameters: {{weight: 1}}"
    )
    made = plan(pico, text)
    assert [job.name for job in made.jobs] == sorted(
        Checkpoint(str(pico / "ada")).headers
    ) and not made.untied
    assert all(
        torch.equal(t, load_file(pico / "ada" / "model.safetensors")[n])
        for n, t in merged_tensors(made)
    )


def test_tensors_that_the_base_lacks_are_told(pico, tmp_path):
    def biased(tensors):
        more = {
            f"model.layers.{i}.self_attn.q_proj.bias": torch.zeros(
                16, dtype=torch.bfloat16
            )
            for i in range(4)
        }
        return (
            tensors | more | {"score.weight": torch.zeros(2, 16, dtype=torch.bfloat16)}
        )

    folder = changed(pico, tmp_path / "biased", biased)
    made = plan(
        pico,
        "merge_method: task_arithmetic\nbase_model: PICO/base\nmodels: "
        f"[{{model: {folder}}}]\nparameters: {{weight: 1}}",
    )
    assert (
        len(made.notes) == 1
        and "2 kinds of tensors" in made.notes[0]
        and "q_proj.bias" in made.notes[0]
    )


def test_licences_of_steps_count(pico, tmp_path):
    for name, licence in (("ada", "cc-by-nc-4.0"), ("bob", "mit"), ("cyd", "mit")):
        shutil.copytree(pico / name, tmp_path / name)
        (tmp_path / name / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
    text = (
        "name: step\nmerge_method: linear\nmodels: [{model: T/ada}, {model: T/bob}]\nparameters: "
        "{weight: 1}\n---\n"
        "merge_method: slerp\nbase_model: step\nmodels: [{model: T/cyd}]\nparameters: {t: 0.5}"
    )
    merge(Recipe.from_yaml(text.replace("T/", f"{tmp_path}/")), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        "| cc-by-nc-4.0 |" in card
        and "not stated" not in card
        and "\nlicense:" not in card
    )


def test_the_written_recipe_rebuilds_the_bytes_however_paths_were_spelt(
    pico, tmp_path, monkeypatch
):
    shutil.copytree(pico / "ada", tmp_path / "zed")
    monkeypatch.chdir(tmp_path)
    text = (
        "merge_method: dare_ties\nbase_model: PICO/base\nmodels: [{model: zed}, {model: "
        "PICO/bob}]\nparameters: {weight: 1, density: 0.5}"
    )
    merge(Recipe.from_yaml(text.replace("PICO", os.path.relpath(pico))), tmp_path / "a")
    monkeypatch.chdir("/")
    merge(Recipe.load(tmp_path / "a" / "mergekit_config.yml"), tmp_path / "b")
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (
        tmp_path / "b" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    "method", ["ties", "breadcrumbs", "dare_ties", "sce", "linear"]
)
def test_nan_where_it_is_allowed_stays_in_its_place(pico, tmp_path, method):
    def broken(tensors):
        tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = float("nan")
        return tensors

    folder = changed(pico, tmp_path / "nan", broken)
    text = (
        f"merge_method: {method}\nbase_model: PICO/base\nmodels: [{{model: {folder}}}, "
        f"{{model: PICO/bob}}]\n"
        "parameters: {weight: 1, density: 0.5, select_topk: 0.5}"
    )
    merged = dict(merged_tensors(plan(pico, text, allow_nan=True)))[
        "model.layers.0.mlp.up_proj.weight"
    ]
    assert (
        torch.isnan(merged).any()
        and torch.isfinite(merged).sum() > 0.9 * merged.numel()
    ) or method == "sce"


def test_whole_numbers_are_whole(pico):
    with pytest.raises(RecipeError, match="expected a whole number"):
        plan(
            pico,
            "merge_method: karcher\nmodels: [{model: PICO/ada}, {model: PICO/bob}]\nparameters: "
            "{max_iter: 10.5}",
        )
