"""RegMean from end to end: text, statistics, merge, against the formula written down again."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from paretomerge.calibration import Example, calibrate
from paretomerge.calibration.inputs import (
    find_shared_inputs,
    linear_layers,
    measure_inputs,
)
from paretomerge.calibration.text import Tokens, make_batches
from paretomerge.errors import RecipeError
from paretomerge.merging.engine import merged_tensors
from paretomerge.merging.live.in_place import ResidentModel
from paretomerge.merging.plan.make import make_plan
from paretomerge.recipe import Recipe
from tests.calibration.models import (
    SOURCES,
    gram_by_hand,
    regmean_by_hand,
    save_gpt2,
)
from tests.checkpoint.test_adapter import Q, adapter, factors
from tests.conftest import EXPERTS, pico_examples

ALPHA = 0.8


def recipe(folder: Path, calibration: Path, method: str, sources, **more) -> Recipe:
    data = {
        "merge_method": method,
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / source)} for source in sources],
        "dtype": "float32",
        "calibration": str(calibration),
        **more,
    }
    return Recipe.from_dict(data)


def sequences(folder: Path, examples: list[Example]) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer.encode(example.prompt + example.text) for example in examples]


def check_against_the_formula(folder: Path, merged, sources, texts, modules) -> None:
    """Compare every tensor with the formula, or with the plain average."""
    models = {}
    for source in sources:
        loaded = AutoModelForCausalLM.from_pretrained(folder / source)
        models[source] = loaded.float().eval()
    states = {source: model.state_dict() for source, model in models.items()}
    for name, tensor in merged.items():
        weights = [states[source][name] for source in sources]
        module = name.removesuffix(".weight")
        if module not in modules:
            expected = torch.stack(weights).double().mean(0)
        else:
            transposed = modules[module]
            grams = []
            for source in sources:
                ids = sequences(folder / source, texts[source])
                grams.append(gram_by_hand(models[source], module, ids))
            turned = [weight.T for weight in weights] if transposed else weights
            expected = regmean_by_hand(turned, grams, ALPHA)
            expected = expected.T if transposed else expected
        torch.testing.assert_close(
            tensor.double(), expected, rtol=1e-4, atol=2e-6, msg=name
        )


def test_llama(pico: Path, pico_calibration: Path):
    options = {"parameters": {"alpha": ALPHA}}
    plan = make_plan(recipe(pico, pico_calibration, "regmean", EXPERTS, **options))
    merged = dict(merged_tensors(plan))
    projections = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj")}
    projections["mlp"] = ("gate_proj", "up_proj", "down_proj")
    modules = {"lm_head": False}
    for layer in range(4):
        for part, names in projections.items():
            for name in names:
                modules[f"model.layers.{layer}.{part}.{name}"] = False
    texts = {expert: pico_examples(expert) for expert in EXPERTS}
    check_against_the_formula(pico, merged, EXPERTS, texts, modules)
    assert not plan.notes


def test_gpt2(tmp_path: Path):
    """Its linear layers are transposed, and the head is tied to the embedding."""
    save_gpt2(tmp_path)
    texts = {"one": pico_examples("ada"), "two": pico_examples("bob", 9)}
    paths = {str(tmp_path / source): texts[source] for source in SOURCES}
    statistics = calibrate(
        str(tmp_path / "base"), list(paths), paths, tmp_path / "s", batch_size=4
    )
    options = {"parameters": {"alpha": ALPHA}}
    plan = make_plan(recipe(tmp_path, statistics, "regmean", SOURCES, **options))
    modules = {}
    for layer in range(2):
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
            modules[f"transformer.h.{layer}.{name}"] = True
    merged = {}
    for name, tensor in merged_tensors(plan):
        known = name if name.startswith("transformer.") else f"transformer.{name}"
        merged[known] = tensor
    check_against_the_formula(tmp_path, merged, SOURCES, texts, modules)


def test_layers_with_one_input_share_a_matrix(pico_calibration: Path):
    manifest = json.loads((pico_calibration / "calibration.json").read_text())
    first = manifest["sources"][0]
    regmean = first["statistics"]["regmean"]
    keys = {}
    for name, entry in regmean["tensors"].items():
        keys.setdefault(entry["key"], []).append(name.rpartition("layers.0.")[2])
    of_layer = [names for key, names in keys.items() if "layers.0." in key]
    assert sorted(map(sorted, of_layer)) == [
        ["mlp.down_proj.weight"],
        ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
        [
            "self_attn.k_proj.weight",
            "self_attn.q_proj.weight",
            "self_attn.v_proj.weight",
        ],
        ["self_attn.o_proj.weight"],
    ]
    assert set(load_file(pico_calibration / regmean["file"])) == set(keys)


@pytest.mark.parametrize("memory", [1, 5000, 1 << 30])
def test_padding_and_the_number_of_passes_change_nothing(pico: Path, memory: int):
    model = AutoModelForCausalLM.from_pretrained(pico / "ada").float().eval()
    names = list(model.state_dict())
    tokens = []
    for length in (3, 9, 5, 12, 4):
        tokens.append(Tokens(tuple(range(2, 2 + length)), 1))

    def measure(batch_size: int, pad: int, bytes_at_a_time: int):
        batches = make_batches(tokens, batch_size, pad)
        layers = linear_layers(model, names)

        def forward(batch):
            return model(**batch.model_inputs())

        inputs = find_shared_inputs(layers, batches[-1], forward)
        measured = measure_inputs(inputs, batches, forward, bytes_at_a_time)
        return {shared.first.tensor: gram for shared, gram in measured}

    alone = measure(1, 0, 1 << 30)
    padded = measure(5, 7, memory)
    assert list(alone) == list(padded) and len(alone) == 17
    for name, gram in alone.items():
        torch.testing.assert_close(padded[name], gram, rtol=1e-5, atol=1e-6)


def test_a_live_model_has_the_tensors_that_a_merge_writes(
    pico: Path, pico_calibration: Path
):
    live = ResidentModel(
        str(pico / "base"), [str(pico / expert) for expert in EXPERTS], dtype="float32"
    )
    for method in ("regmean", "regmean_pp", "fisher"):
        wanted = recipe(pico, pico_calibration, method, EXPERTS)
        loaded = live.load(wanted).model.state_dict()
        for name, tensor in merged_tensors(make_plan(wanted)):
            assert torch.equal(loaded[name], tensor), (method, name)


def test_identical_sources_give_that_source(pico: Path, tmp_path: Path):
    """Whatever the statistics are, also those of a text of three tokens."""
    ada = str(pico / "ada")
    (tmp_path / "copy").symlink_to(pico / "ada", target_is_directory=True)
    copy = str(tmp_path / "copy")
    texts = {ada: [Example("ab", "c")], copy: [Example("xyz", "w")]}
    statistics = calibrate(
        str(pico / "base"),
        [ada, copy],
        texts,
        tmp_path / "s",
        kinds=("regmean", "fisher"),
    )
    expected = load_file(pico / "ada" / "model.safetensors")
    for method, alpha in (("regmean", 1.0), ("regmean", 0.3), ("fisher", None)):
        wanted = recipe(pico, statistics, method, ["ada"])
        models = [{"model": ada}, {"model": copy}]
        data = wanted.to_dict() | {"models": models}
        if alpha is not None:
            data["parameters"] = {"alpha": alpha}
        for name, tensor in merged_tensors(make_plan(data)):
            torch.testing.assert_close(
                tensor, expected[name].float(), rtol=1e-4, atol=1e-6, msg=name
            )


def test_weights_without_a_sum_of_one_scale_the_merge(
    pico: Path, pico_calibration: Path
):
    """As in task arithmetic: with one source, theta_0 + w tau."""
    name = "model.layers.1.mlp.up_proj.weight"
    data = recipe(pico, pico_calibration, "regmean", ["ada"]).to_dict()
    data["parameters"] = {"weight": 0.4, "normalize": False}
    plain = {**data, "merge_method": "task_arithmetic"}
    ((_, merged),) = merged_tensors(make_plan(data), only=[name])
    ((_, expected),) = merged_tensors(make_plan(plain), only=[name])
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-6)


def test_steps_can_be_merges_that_need_data(pico: Path, pico_calibration: Path):
    inner = recipe(pico, pico_calibration, "regmean", EXPERTS)
    outer = {"merge_method": "passthrough", "models": [{"model": "inner"}]}
    several = Recipe.from_yaml(
        f"{replace(inner, name='inner').to_yaml()}---\n{Recipe.from_dict(outer).to_yaml()}"
    )
    assert several.steps[0].calibration == str(pico_calibration)
    direct = dict(merged_tensors(make_plan(inner)))
    for name, tensor in merged_tensors(make_plan(several)):
        assert torch.equal(tensor, direct[name])


def test_regmean_pp_layer_by_layer(pico: Path, pico_calibration: Path):
    """The published loop, written down with whole models and without batches."""
    alpha = 0.9
    models, ids = {}, {}
    for expert in EXPERTS:
        loaded = AutoModelForCausalLM.from_pretrained(pico / expert)
        models[expert] = loaded.float().eval()
        ids[expert] = sequences(pico / expert, pico_examples(expert))
    states = {expert: model.state_dict() for expert, model in models.items()}
    expected = {}
    for name in states["ada"]:
        expected[name] = sum(states[expert][name] for expert in EXPERTS) / 3
    walking = AutoModelForCausalLM.from_pretrained(pico / "base").float().eval()
    linear = [
        name.removesuffix(".weight")
        for name, tensor in expected.items()
        if "proj" in name or name == "lm_head.weight"
    ]
    for layer in (*range(4), None):
        prefix = "lm_head" if layer is None else f"model.layers.{layer}."
        modules = [module for module in linear if module.startswith(prefix)]
        grams = {}
        for expert in EXPERTS:
            # Merged below the layer, and the expert's own layer
            own = {n: t for n, t in states[expert].items() if n.startswith(prefix)}
            walking.load_state_dict(expected | own)
            for module in modules:
                grams[expert, module] = gram_by_hand(walking, module, ids[expert])
        for module in modules:
            name = f"{module}.weight"
            weights = [states[expert][name] for expert in EXPERTS]
            of_module = [grams[expert, module] for expert in EXPERTS]
            merged = regmean_by_hand(weights, of_module, alpha)
            expected[name] = merged.float()
    plan = make_plan(recipe(pico, pico_calibration, "regmean_pp", EXPERTS))
    plain = make_plan(recipe(pico, pico_calibration, "regmean", EXPERTS))
    others = dict(merged_tensors(plain))
    differences = []
    for name, tensor in merged_tensors(plan):
        torch.testing.assert_close(
            tensor, expected[name], rtol=1e-4, atol=5e-6, msg=name
        )
        differences.append(float((tensor - others[name]).abs().max()))
    # It is not RegMean, whose inputs come through the sources' own layers.
    assert max(differences) > 1e-3


def test_adapters_and_other_names(pico: Path, tmp_path: Path):
    """A source may have an adapter, or be saved without the prefix of its base model."""
    lora = adapter(tmp_path / "lora", factors(Q, (16, 16)))
    adapted = f"{pico}/ada+{lora}"
    renamed = tmp_path / "bob"
    shutil.copytree(pico / "cyd", renamed)
    tensors = load_file(renamed / "model.safetensors")
    short = {name.removeprefix("model."): t for name, t in tensors.items()}
    save_file(short, renamed / "model.safetensors", metadata={"format": "pt"})
    texts = {adapted: pico_examples("ada", 4), str(renamed): pico_examples("cyd", 4)}
    kinds = ("regmean", "regmean_pp", "fisher")
    statistics = calibrate(
        str(pico / "base"), list(texts), texts, tmp_path / "s", kinds=kinds
    )
    for kind in kinds:
        data = {
            "merge_method": kind,
            "base_model": str(pico / "base"),
            "models": [{"model": model} for model in texts],
            "calibration": str(statistics),
            "dtype": "float32",
        }
        plan = make_plan(data)
        assert not plan.notes
        job = next(job for job in plan.jobs if job.name == f"{Q}.weight")
        assert all(plan.statistic(ref) is not None for ref in job.sources)
    plain = {"models": [{"model": str(pico / "ada")}, {"model": str(renamed)}]}
    with pytest.raises(RecipeError, match=r"no statistics of .*/ada as it is now"):
        make_plan(data | plain)
