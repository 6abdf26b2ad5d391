"""`modules:`: one part of a vision-language model merged, the rest as it is in the base."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from paretomerge.checkpoint.reader import Checkpoint
from paretomerge.errors import CheckpointError, ParetoMergeError
from paretomerge.merging.engine import merge, merged_tensors
from paretomerge.merging.plan.make import make_plan
from paretomerge.recipe import Recipe
from tests.architectures import ARCHITECTURES

KINDS = ("llava", "qwen2_vl", "gemma3_vl")


@pytest.fixture(scope="module", params=KINDS)
def models(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """base, ada, bob: everything differs, the vision part too."""
    folder = tmp_path_factory.mktemp(request.param)
    for seed, name in enumerate(("base", "ada", "bob")):
        model = ARCHITECTURES[request.param]()
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
        model.save_pretrained(folder / name)
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def text(models: Path, alias: str, content: str = "") -> str:
    content = (
        content
        or f"models: [{{model: {models}/ada, parameters: {{weight: 1}}}}, "
        f"{{model: {models}/bob, parameters: {{weight: 3}}}}]"
    )
    return (
        f"merge_method: task_arithmetic\nbase_model: {models}/base\ndtype: float32\n"
        f"modules:\n  {alias}: {{{content}}}\n"
    )


def expected(models: Path, merged: set[str]) -> dict[str, torch.Tensor]:
    base, ada, bob = (tensors(models / m) for m in ("base", "ada", "bob"))
    return {
        n: base[n] + (ada[n] - base[n]) + 3 * (bob[n] - base[n])
        if n in merged
        else base[n]
        for n in base
    }


@pytest.mark.parametrize("alias", ["text_decoder", "language_model", "default"])
def test_the_language_part_is_merged_and_the_rest_is_the_bases(
    models: Path, tmp_path: Path, alias: str
) -> None:
    merge(Recipe.from_yaml(text(models, alias)), tmp_path / "out")
    got = tensors(tmp_path / "out")
    language = set(
        Checkpoint(str(models / "base")).architecture.modules["text_decoder"]
    )
    wanted = expected(models, language)
    assert got.keys() == wanted.keys() and 0 < len(language) < len(got)
    for name in got:
        if name in language:
            torch.testing.assert_close(got[name], wanted[name], rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(got[name], wanted[name]), name
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert set(model.state_dict()) >= set(
        AutoModelForImageTextToText.from_pretrained(models / "base").state_dict()
    )


def test_another_part_is_merged_and_the_language_stays(models: Path) -> None:
    architecture = Checkpoint(str(models / "base")).architecture
    alias = next(
        m
        for m in architecture.modules
        if m != "text_decoder" and len(architecture.modules[m]) > 5
    )
    plan = make_plan(Recipe.from_yaml(text(models, alias)))
    got = dict(merged_tensors(plan))
    wanted = expected(models, set(architecture.modules[alias]))
    assert got.keys() == wanted.keys()
    for name in got:
        if name in architecture.modules[alias]:
            torch.testing.assert_close(got[name], wanted[name], rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(got[name], wanted[name]), name


def test_all_modules_are_the_whole_model(models: Path) -> None:
    architecture = Checkpoint(str(models / "base")).architecture
    content = (
        f"models: [{{model: {models}/ada, parameters: {{weight: 1}}}}, "
        f"{{model: {models}/bob, parameters: {{weight: 3}}}}]"
    )
    each = "".join(f"  {module}: {{{content}}}\n" for module in architecture.modules)
    head = f"merge_method: task_arithmetic\nbase_model: {models}/base\ndtype: float32\n"
    a = dict(merged_tensors(make_plan(Recipe.from_yaml(head + "modules:\n" + each))))
    b = dict(merged_tensors(make_plan(Recipe.from_yaml(head + content))))
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_layers_of_the_language_part_are_stacked(models: Path, tmp_path: Path) -> None:
    slices = (
        f"slices: [{{sources: [{{model: {models}/ada, layer_range: [0, 2]}}]}}, "
        f"{{sources: [{{model: {models}/bob, layer_range: [1, 3]}}]}}]"
    )
    recipe = text(models, "text_decoder", slices).replace(
        "task_arithmetic", "passthrough"
    )
    merge(Recipe.from_yaml(recipe), tmp_path / "out")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert model.config.text_config.num_hidden_layers == 4
    got, bob = tensors(tmp_path / "out"), tensors(models / "bob")
    architecture = Checkpoint(str(tmp_path / "out")).architecture
    for name in architecture.by_layer[2]:
        assert torch.equal(got[name], bob[architecture.at_layer(name, 1)])


def test_a_step_may_have_modules(models: Path, tmp_path: Path) -> None:
    """What a module's step copies is rounded as it would be on disk."""
    inner = text(models, "text_decoder").replace("float32", "bfloat16")
    outer = "merge_method: passthrough\nmodels: [{model: {}}]\ndtype: float32\n"
    merge(Recipe.from_yaml(inner), tmp_path / "inner")
    wanted = dict(
        merged_tensors(
            make_plan(Recipe.from_yaml(outer.replace("{}", str(tmp_path / "inner"))))
        )
    )
    got = dict(
        merged_tensors(
            make_plan(
                Recipe.from_yaml(f"name: x\n{inner}---\n{outer.replace('{}', 'x')}")
            )
        )
    )
    assert got.keys() == wanted.keys() and all(
        torch.equal(got[n], wanted[n]) for n in got
    )


def test_what_is_copied_is_looked_at_too(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models, tmp_path / "models")
    held = tensors(tmp_path / "models" / "base")
    name = next(n for n in held if "vis" in n)
    held[name].view(-1)[0] = float("inf")
    save_file(
        held,
        tmp_path / "models" / "base" / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(CheckpointError, match="expected finite"):
        merge(
            Recipe.from_yaml(text(tmp_path / "models", "text_decoder")),
            tmp_path / "out",
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("alias", "told"),
    [
        ("vison", "unknown module 'vison'"),
        ("text_decoder: {models: []}\n  default", "at least one"),
    ],
)
def test_modules_that_are_none(models: Path, alias: str, told: str) -> None:
    with pytest.raises(ParetoMergeError, match=told):
        make_plan(Recipe.from_yaml(text(models, alias)))


def test_two_names_of_one_module(models: Path) -> None:
    content = f"{{models: [{{model: {models}/ada, parameters: {{weight: 1}}}}]}}"
    twice = text(models, "text_decoder") + f"  language_model: {content}\n"
    with pytest.raises(ParetoMergeError, match="language_model"):
        make_plan(Recipe.from_yaml(twice))
