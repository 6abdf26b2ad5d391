"""Recipes of several documents.

A named step is a model like any other, the same bits as if it had been written to disk.
"""

import itertools
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from paretomerge.errors import CheckpointError, ParetoMergeError, RecipeError
from paretomerge.merging.engine import merge, merged_tensors
from paretomerge.merging.methods import METHODS
from paretomerge.merging.plan.make import make_plan
from paretomerge.recipe import Recipe
from tests.conftest import EXPERTS

KNOBS: dict[str, dict[str, Any]] = {
    "slerp": {"t": 0.4},
    "nearswap": {"t": 0.4},
    "della": {"density": 0.5, "epsilon": 0.2},
    "della_linear": {"density": 0.5, "epsilon": 0.2},
    "linear": {"weight": 0.3},
    "wudi": {"steps": 3},
    "breadcrumbs": {"density": 0.6, "gamma": 0.1},
    "breadcrumbs_ties": {"density": 0.6, "gamma": 0.1},
    "passthrough": {"scale": 0.9},
}


DATA_FREE = [name for name, method in METHODS.items() if method.statistics is None]
"""Steps have no statistics, so methods that need some do not merge them."""


def document(method: str, base: str, *models: str, **more: Any) -> dict[str, Any]:
    """A recipe of that method with settings of its own for each model."""
    row = METHODS[method]
    names = {parameter.name for parameter in row.parameters}
    parameters = dict(KNOBS.get(method, {}))
    if "density" in names:
        parameters.setdefault("density", 0.5)
    models = models[
        : 1
        if method == "passthrough"
        else 2
        if row.base in ("reference", "optional", "required")
        else 1
    ]
    listed = [
        {"model": m, **({"parameters": {"weight": w}} if "weight" in names else {})}
        for m, w in zip(models, (0.7, 0.4), strict=False)
    ]
    data = {"merge_method": method, "models": listed, "parameters": parameters, **more}
    return data if row.base == "none" else {**data, "base_model": base}


def text(*documents: dict[str, Any]) -> str:
    return "---\n".join(yaml.safe_dump(d) for d in documents)


def tensors(recipe: Recipe, block: int | None = None) -> dict[str, torch.Tensor]:
    return dict(merged_tensors(make_plan(recipe), block=block))


def on_disk(documents: list[dict[str, Any]], folder: Path) -> dict[str, torch.Tensor]:
    """Each document merged into a folder of its name, which the later ones read."""
    for i, data in enumerate(documents):
        recipe = Recipe.from_dict(data).rename_models(
            lambda m: str(folder / m) if (folder / m).is_dir() else m
        )
        merge(replace(recipe, name=None), folder / data.get("name", f"last{i}"))
    return load_file(
        folder
        / documents[-1].get("name", f"last{len(documents) - 1}")
        / "model.safetensors"
    )


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [
        n for n in a if a[n].dtype != b[n].dtype or not torch.equal(a[n], b[n])
    ]
    assert not different, different


@pytest.mark.parametrize("method", METHODS)
def test_a_step_is_what_it_would_be_on_disk(
    pico: Path, pico_calibration: Path, tmp_path: Path, method: str
) -> None:
    ada, bob, cyd = (f"{pico}/{e}" for e in EXPERTS)
    inner = document(method, f"{pico}/base", ada, bob, name="inner")
    if METHODS[method].statistics:
        inner["calibration"] = str(pico_calibration)
    outer = document("ties", f"{pico}/base", "inner", cyd)
    several = Recipe.from_yaml(text(inner, outer))
    here = tensors(several)
    assert_same(here, on_disk([inner, outer], tmp_path))
    for block in (16, 100):
        assert_same(here, tensors(several, block))


@pytest.mark.parametrize("method", DATA_FREE)
def test_every_method_takes_steps(pico: Path, tmp_path: Path, method: str) -> None:
    ada, bob, cyd = (f"{pico}/{e}" for e in EXPERTS)
    first = document("linear", f"{pico}/base", ada, bob, name="first", dtype="float16")
    second = document(
        "dare_linear", f"{pico}/base", "first", cyd, name="second", seed=3
    )
    third = document(method, "first", "second", cyd, dtype="float32", seed=9)
    several = Recipe.from_yaml(text(first, second, third))
    assert several.source_models == (f"{pico}/base", ada, bob, cyd)
    assert_same(tensors(several), on_disk([first, second, third], tmp_path))


def test_layers_of_a_step(pico: Path, tmp_path: Path) -> None:
    ada, bob = f"{pico}/ada", f"{pico}/bob"
    stack = {
        "name": "deep",
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": ada, "layer_range": [0, 3]}]},
            {"sources": [{"model": bob, "layer_range": [1, 4]}]},
        ],
    }
    cut = {
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": "deep", "layer_range": [2, 6]}]}],
    }
    several = Recipe.from_yaml(text(stack, cut))
    assert make_plan(several).config["num_hidden_layers"] == 4
    assert_same(tensors(several), on_disk([stack, cut], tmp_path))
    with pytest.raises(RecipeError, match="expected layers below 6"):
        make_plan(Recipe.from_yaml(text(stack, cut).replace("- 6", "- 7")))


def test_written_out_and_written_again(pico: Path, tmp_path: Path) -> None:
    inner = document("linear", f"{pico}/base", f"{pico}/ada", name="inner")
    several = Recipe.from_yaml(
        text(inner, document("ties", f"{pico}/base", "inner", f"{pico}/cyd"))
    )
    merge(several, tmp_path / "a", workers=1)
    again = Recipe.load(tmp_path / "a" / "mergekit_config.yml")
    assert again == several
    merge(again, tmp_path / "b", workers=3)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (
        tmp_path / "b" / "model.safetensors"
    ).read_bytes()
    card = (tmp_path / "a" / "README.md").read_text()
    assert "| inner |" not in card and "| ada |" in card


def test_steps_and_files_of_one_name(pico: Path, tmp_path: Path) -> None:
    """The step wins, wherever the file lies."""
    (tmp_path / "inner").mkdir()
    inner = document("linear", f"{pico}/base", f"{pico}/ada", name="inner")
    (tmp_path / "r.yml").write_text(
        text(inner, {"merge_method": "passthrough", "models": [{"model": "inner"}]})
    )
    recipe = Recipe.load(tmp_path / "r.yml")
    assert recipe.models == ("inner",) and make_plan(recipe).jobs


def test_documents_may_stand_in_any_order(pico: Path) -> None:
    first = document("linear", f"{pico}/base", f"{pico}/ada", name="first")
    second = document("dare_linear", f"{pico}/base", "first", name="second")
    last = document("ties", f"{pico}/base", "second", f"{pico}/cyd")
    recipes = [
        Recipe.from_yaml(text(*order))
        for order in itertools.permutations([first, second, last])
    ]
    assert all(recipe == recipes[0] for recipe in recipes)
    assert [step.name for step in recipes[0].steps] == ["first", "second"]


LINEAR = "merge_method: linear\nparameters: {{weight: 1}}\nmodels: [{{model: {}}}]\n"


@pytest.mark.parametrize(
    ("documents", "told"),
    [
        (
            [LINEAR.format("a"), LINEAR.format("b")],
            "only one of several documents may be without a name, 2 are; add `name: ...`",
        ),
        (
            ["name: x\n" + LINEAR.format("a"), "name: x\n" + LINEAR.format("x")],
            "each document needs a different name",
        ),
        (["name: x\n" + LINEAR.format("x"), LINEAR.format("x")], r"a circle: \['x'\]"),
        (
            [
                "name: x\n" + LINEAR.format("y"),
                "name: y\n" + LINEAR.format("x"),
                LINEAR.format("x"),
            ],
            r"a circle: \['x', 'y'\]",
        ),
        (
            ["name: x\n" + LINEAR.format("a"), "name: 3\n" + LINEAR.format("x")],
            "document 2: name: expected a non-empty string",
        ),
    ],
)
def test_documents_that_cannot_follow_each_other(
    documents: list[str], told: str
) -> None:
    with pytest.raises(RecipeError, match=told):
        Recipe.from_yaml("---\n".join(documents))


@pytest.mark.parametrize(
    "key",
    ["tokenizer_source: base", "tokenizer: {source: base}", "chat_template: chatml"],
)
def test_tokenizers_belong_into_the_last_document(pico: Path, key: str) -> None:
    recipe = Recipe.from_yaml(
        f"name: x\n{key}\nbase_model: {pico}/base\n"
        + LINEAR.format(f"{pico}/ada")
        + "---\n"
        + LINEAR.format("x")
    )
    with pytest.raises(
        RecipeError,
        match="x: expected tokenizer and chat template in the last document",
    ):
        make_plan(recipe)


def test_what_is_wrong_in_a_step_is_told(pico: Path, tmp_path: Path) -> None:
    recipe = Recipe.from_yaml(
        f"name: x\nmerge_method: lineal\nmodels: [{{model: {pico}/ada}}]\n---\n"
        + LINEAR.format("x")
    )
    with pytest.raises(ParetoMergeError, match="did you mean 'linear'"):
        merge(recipe, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_step_that_float16_cannot_hold(pico: Path, tmp_path: Path) -> None:
    steps = (
        "name: x\nmerge_method: linear\ndtype: float16\nparameters: "
        f"{{weight: 9.0e6, normalize: false}}\nmodels: [{{model: {pico}/ada}}]\n"
    )
    with pytest.raises(CheckpointError, match="that float16 can hold"):
        merge(Recipe.from_yaml(steps + "---\n" + LINEAR.format("x")), tmp_path / "out")
    steps = (
        steps.replace("9.0e6", "9.0e37")
        .replace("float16", "float32")
        .replace("normalize", "normalize")
    )
    wild = Recipe.from_yaml(
        steps.replace("9.0e37", "[9.0e38, 9.0e38]") + "---\n" + LINEAR.format("x")
    )
    with pytest.raises(
        ParetoMergeError, match=r"that float32 can hold|expected a number"
    ):
        merge(wild, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_nan_in_a_source_of_a_step_is_named(pico: Path, tmp_path: Path) -> None:
    shutil.copytree(pico / "ada", tmp_path / "nan")
    held = load_file(tmp_path / "nan" / "model.safetensors")
    held["lm_head.weight"][0, 0] = float("nan")
    save_file(held, tmp_path / "nan" / "model.safetensors", metadata={"format": "pt"})
    recipe = Recipe.from_yaml(
        "name: x\n" + LINEAR.format(tmp_path / "nan") + "---\n" + LINEAR.format("x")
    )
    with pytest.raises(CheckpointError, match=r"nan: lm_head\.weight: expected finite"):
        merge(recipe, tmp_path / "out")
    merge(recipe, tmp_path / "out", allow_nan=True)
    assert load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"][
        0, 0
    ].isnan()


SYMMETRIC = [
    name
    for name, method in METHODS.items()
    if method.symmetric and name != "passthrough"
]


@pytest.mark.parametrize("method", SYMMETRIC)
def test_the_order_of_models_does_not_matter(
    pico: Path, pico_calibration: Path, method: str
) -> None:
    names = {parameter.name for parameter in METHODS[method].parameters}
    parameters = {
        **KNOBS.get(method, {}),
        **({"density": 0.5} if "density" in names and method not in KNOBS else {}),
    }
    weights = (0.7, 0.4, -0.2)
    listed = [
        {
            "model": f"{pico}/{e}",
            **({"parameters": {"weight": w}} if "weight" in names else {}),
        }
        for e, w in zip(EXPERTS, weights, strict=True)
    ]
    results = []
    for order in itertools.permutations(listed):
        data = {
            "merge_method": method,
            "base_model": f"{pico}/base",
            "models": list(order),
            "parameters": parameters,
        }
        if METHODS[method].statistics:
            data["calibration"] = str(pico_calibration)
        results.append(
            tensors(Recipe.from_dict(data), block=(None, 16, 50)[len(results) % 3])
        )
    for other in results[1:]:
        assert_same(results[0], other)


@pytest.mark.parametrize("method", ["dare_ties", "ties", "karcher", "della"])
def test_bytes_do_not_depend_on_shards(
    pico: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe.from_dict(
        document(
            method,
            f"{pico}/base",
            f"{pico}/ada",
            f"{pico}/bob",
            tokenizer_source="union",
        )
    )
    merge(recipe, tmp_path / "one")
    whole = load_file(tmp_path / "one" / "model.safetensors")
    for shard_bytes in (5_000, 1):
        out = merge(
            recipe,
            tmp_path / str(shard_bytes),
            shard_bytes=shard_bytes,
        )
        assert_same(
            whole,
            {
                n: t
                for file in sorted(out.glob("*.safetensors"))
                for n, t in load_file(file).items()
            },
        )


def test_bytes_do_not_depend_on_the_hash_seed(pico: Path, tmp_path: Path) -> None:
    inner = document(
        "linear", f"{pico}/base", f"{pico}/ada", f"{pico}/cyd", name="inner"
    )
    (tmp_path / "r.yml").write_text(
        text(
            inner,
            document(
                "dare_ties",
                f"{pico}/base",
                f"{pico}/bob",
                "inner",
                tokenizer_source="union",
            ),
        )
    )
    for seed in ("1", "7"):
        command = [
            sys.executable,
            "-c",
            "import sys; from paretomerge.cli.main import main; main()",
            "merge",
            str(tmp_path / "r.yml"),
            str(tmp_path / seed),
        ]
        subprocess.run(
            command,
            env=os.environ | {"PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
        )
    for name in (
        "model.safetensors",
        "config.json",
        "mergekit_config.yml",
        "tokenizer.json",
    ):
        assert (tmp_path / "1" / name).read_bytes() == (
            tmp_path / "7" / name
        ).read_bytes()


def test_mistakes_of_a_plan_are_told_together(
    pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "paretomerge.checkpoint.operand.StoredTensor.rows",
        lambda *_: pytest.fail("read a weight"),
    )
    recipe = f"""
merge_method: dare_tise
base_model: {pico}/base
models:
  - {{model: {pico}/eve, parameters: {{weight: 1, density: 0.5}}}}
  - {{model: ./nowhere, parameters: {{weight: 1, densty: 0.5}}}}
"""
    with pytest.raises(ParetoMergeError, match="3 problems") as caught:
        merge(Recipe.from_yaml(recipe), tmp_path / "out")
    assert all(
        any(t in p for p in caught.value.parts)
        for t in ("did you mean 'dare_ties'", "eve", "nowhere")
    )
    wild = (
        recipe.replace("tise", "ties")
        .replace(f"{pico}/eve", f"{pico}/ada")
        .replace("./nowhere", f"{pico}/bob")
    )
    wild = wild.replace(
        "weight: 1, density: 0.5", "weight: heavy, density: 1.5"
    ).replace("weight: 1, densty: 0.5", "weight: [1, .5], densty: 1")
    with pytest.raises(RecipeError, match="4 problems") as caught:
        merge(
            Recipe.from_yaml(
                wild + "parameters: {lambda: [{filter: mlp, value: true}, {value: 1}]}"
            ),
            tmp_path / "out",
        )
    wanted = (
        "weight: expected a number, got 'heavy'",
        "density: expected a number from 0.0 to 1.0, got 1.5",
    )
    told = (
        "unknown parameter of dare_ties 'densty'; did you mean 'density'",
        "lambda: expected a number, got True",
    )
    assert all(any(t in p for p in caught.value.parts) for t in (*wanted, *told)), (
        caught.value.parts
    )
    assert list(tmp_path.iterdir()) == []


def test_layers_weights_and_depths_are_told_together(pico: Path) -> None:
    text = f"""
merge_method: linear
slices:
  - sources:
    - {{model: {pico}/ada, layer_range: [0, 9]}}
    - {{model: {pico}/bob, layer_range: [0, 9]}}
  - sources: [{{model: {pico}/ada, layer_range: [3, 5]}}]
"""
    with pytest.raises(RecipeError, match="2 problems") as caught:
        make_plan(Recipe.from_yaml(text))
    assert "slices[0]" in caught.value.parts[0] and "slices[1]" in caught.value.parts[1]


def test_a_value_that_is_missing_is_told_once_for_all_tensors(pico: Path) -> None:
    models = [{"model": f"{pico}/{e}"} for e in ("ada", "bob")]
    with pytest.raises(RecipeError) as caught:
        make_plan(Recipe.from_dict({"merge_method": "linear", "models": models}))
    assert len(caught.value.parts) <= 2, caught.value.parts
    assert all("expected a value for `weight`" in part for part in caught.value.parts)


@pytest.mark.parametrize("method", DATA_FREE)
def test_tensors_without_entries_stay_so(
    pico: Path, tmp_path: Path, method: str
) -> None:
    empty = {
        f"model.layers.0.e{i}.weight": torch.zeros(shape, dtype=torch.bfloat16)
        for i, shape in enumerate([(0, 4), (4, 0), (0,)])
    }
    for name in ("base", *EXPERTS[:2]):
        shutil.copytree(pico / name, tmp_path / name)
        held = {
            n: t
            for file in (tmp_path / name).glob("*.safetensors")
            for n, t in load_file(file).items()
        }
        for file in (tmp_path / name).glob("*.safetensors*"):
            file.unlink()
        save_file(
            {**held, **empty},
            tmp_path / name / "model.safetensors",
            metadata={"format": "pt"},
        )
    data = document(method, f"{tmp_path}/base", f"{tmp_path}/ada", f"{tmp_path}/bob")
    plain = dict(merged_tensors(make_plan(Recipe.from_dict(data)), only=empty))
    step = Recipe.from_yaml(
        text(
            {**data, "name": "x"},
            {"merge_method": "passthrough", "models": [{"model": "x"}]},
        )
    )
    for got in (plain, dict(merged_tensors(make_plan(step), only=empty))):
        assert_same(got, empty)
