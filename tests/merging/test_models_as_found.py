"""Models as they are found: odd configs, names and files. transformers gives the right values."""

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, PreTrainedModel

from paretomerge.errors import CheckpointError, RecipeError
from paretomerge.merging.delta_profile import profile
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


def vision_pair(tmp_path: Path) -> tuple[Path, Path]:
    """A vision-language model and a fine-tune of it."""
    model = ARCHITECTURES["gemma3_vl"]()
    base = save(model, tmp_path / "base")
    tuned = moved(type(model).from_pretrained(base))
    return base, save(tuned, tmp_path / "tuned")


HUB_NAMES = ("vision_tower.", "vision_tower.vision_model.")


@pytest.mark.parametrize("is_base", [False, True])
def test_names_that_transformers_renames_are_matched(
    is_base: bool, tmp_path: Path
) -> None:
    """The Hub's names of the vision tower differ from those of transformers 5."""
    base, tuned = vision_pair(tmp_path)
    kind = transformers.Gemma3ForConditionalGeneration
    old = base if is_base else tuned
    tensors = {name.replace(*HUB_NAMES): t for name, t in stored(old).items()}
    renamed = changed(old, tmp_path / "renamed", tensors)
    pair = (renamed, tuned) if is_base else (base, renamed)
    plan = make_plan(halfway(*pair))
    assert not any("lack" in note for note in plan.notes)
    out = merge(halfway(*pair), tmp_path / "out")
    expect_mean(out, kind.from_pretrained(base), kind.from_pretrained(tuned))


@pytest.mark.parametrize("is_base", [False, True])
@pytest.mark.parametrize("name", ["gemma3_vl", "qwen2_vl", "llava", "gpt_neox"])
def test_names_in_memory_are_matched(name: str, is_base: bool, tmp_path: Path) -> None:
    model = ARCHITECTURES[name]()
    kind = type(model)
    base = save(model, tmp_path / "base")
    tuned = save(moved(kind.from_pretrained(base)), tmp_path / "tuned")
    in_memory = tmp_path / "memory"
    loaded = kind.from_pretrained(base if is_base else tuned)
    loaded.save_pretrained(in_memory, save_original_format=False)
    pair = (in_memory, tuned) if is_base else (base, in_memory)
    out = merge(halfway(*pair), tmp_path / "out")
    expect_mean(out, kind.from_pretrained(base), kind.from_pretrained(tuned))


@pytest.mark.parametrize("is_base", [False, True])
def test_a_module_that_cannot_be_matched_is_named(
    is_base: bool, tmp_path: Path
) -> None:
    base, tuned = vision_pair(tmp_path)
    old = base if is_base else tuned
    tensors = {
        name.replace("vision_tower.", "vision_eyes."): t
        for name, t in stored(old).items()
    }
    renamed = changed(old, tmp_path / "renamed", tensors)
    pair = (renamed, tuned) if is_base else (base, renamed)
    with pytest.raises(CheckpointError, match=r"vision_.*--allow-mismatch"):
        make_plan(halfway(*pair))
    plan = make_plan(halfway(*pair), allow_mismatch=True)
    assert any("taken from" in note or "left out" in note for note in plan.notes)


def test_biases_that_the_base_has_no_place_for_are_named(
    base: Path, tuned: Path, tmp_path: Path
) -> None:
    bias = {"model.layers.1.self_attn.q_proj.bias": torch.zeros(16)}
    tensors = {**stored(tuned), **bias}
    biased = changed(tuned, tmp_path / "biased", tensors, attention_bias=True)
    with pytest.raises(CheckpointError, match=r"q_proj\.bias.*--allow-mismatch"):
        make_plan(halfway(base, biased))


AUXILIARY = {
    "mtp.fc.weight": torch.ones(16, 32),
    "mtp.layers.0.self_attn.q_proj.weight": torch.ones(16, 16),
    "model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4),
    "model.layers.3.mlp.up_proj.weight": torch.ones(24, 16),
    "model.extra_state.buffer": torch.ones(2),
}


@pytest.mark.parametrize("is_base", [False, True])
@pytest.mark.parametrize("name", AUXILIARY)
def test_what_one_model_has_lost(
    name: str, is_base: bool, base: Path, tuned: Path, tmp_path: Path
) -> None:
    full = base if is_base else tuned
    extra = {name: AUXILIARY[name]}
    counts = {"num_nextn_predict_layers": 1} if "layers.3" in name else {}
    longer = changed(full, tmp_path / "full", {**stored(full), **extra}, **counts)
    pair = (longer, tuned) if is_base else (base, longer)
    plan = make_plan(halfway(*pair))
    out = merge(halfway(*pair), tmp_path / "out")
    models = [LlamaForCausalLM.from_pretrained(folder) for folder in (base, tuned)]
    expect_mean(out, *models)
    assert (name in stored(out)) is is_base
    if is_base:
        assert torch.equal(stored(out)[name], extra[name])
        assert any("taken from" in note for note in plan.notes)
    config = json.loads((out / "config.json").read_text())
    assert bool(config.get("num_nextn_predict_layers")) == bool(is_base and counts)


def test_a_predictor_is_not_declared_behind_moved_layers(
    base: Path, tmp_path: Path
) -> None:
    extra = {"model.layers.3.mlp.up_proj.weight": torch.ones(24, 16)}
    tensors = {**stored(base), **extra}
    counts = {"num_nextn_predict_layers": 1}
    longer = changed(base, tmp_path / "longer", tensors, **counts)
    source = {"model": str(longer), "layer_range": [0, 2]}
    slices = [{"sources": [source]}]
    out = merge({"merge_method": "passthrough", "slices": slices}, tmp_path / "out")
    assert not any("layers.3." in name for name in stored(out))
    config = json.loads((out / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 0


@pytest.mark.parametrize("is_base", [False, True])
@pytest.mark.parametrize(
    "left_over", [{"quant_method": "bitsandbytes", "load_in_4bit": True}, None]
)
def test_a_left_over_quantization_config(
    left_over: object, is_base: bool, base: Path, tuned: Path, tmp_path: Path
) -> None:
    full = base if is_base else tuned
    folder = tmp_path / "full"
    odd = changed(full, folder, stored(full), quantization_config=left_over)
    out = merge(halfway(odd, tuned) if is_base else halfway(base, odd), tmp_path / "o")
    models = [LlamaForCausalLM.from_pretrained(folder) for folder in (base, tuned)]
    expect_mean(out, *models)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("qweight", torch.int32),
        ("weight", torch.int8),
        ("weight_scale", torch.float32),
        ("weight_scale_inv", torch.float32),
        ("weight.absmax", torch.float32),
        ("SCB", torch.float32),
    ],
)
def test_quantised_weights_show_by_their_tensors(
    name: str, dtype: torch.dtype, base: Path, tmp_path: Path
) -> None:
    extra = {f"model.layers.1.mlp.up_proj.{name}": torch.ones(24, 16, dtype=dtype)}
    folder = changed(base, tmp_path / "quantised", {**stored(base), **extra})
    with pytest.raises(CheckpointError, match=r"up_proj.*quantised"):
        make_plan(alone(folder))


def test_the_command_that_dequantises_a_source(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FP8 blocks of 128 x 128 with one scale each, as DeepSeek and Qwen publish them."""
    tensors = stored(base)
    expected = dict(tensors)
    for name, weight in tensors.items():
        if "proj" in name:
            scale = weight.abs().max() / 448
            codes = (weight / scale).to(torch.float8_e4m3fn)
            expected[name] = codes.float() * scale
            tensors = {**tensors, name: codes, f"{name}_scale_inv": scale.reshape(1, 1)}
    settings = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    folder = changed(
        base, tmp_path / "quantised", tensors, quantization_config=settings
    )
    with pytest.raises(CheckpointError, match=r"python -c '.*'$") as refused:
        make_plan(alone(folder))
    _, code = shlex.split(str(refused.value).partition("python ")[2])
    monkeypatch.chdir(tmp_path)
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    merged = stored(merge(alone(tmp_path / "quantised-full"), tmp_path / "out"))
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name].float(), tensor, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("named", [None, "model.safetensors.index.json"])
def test_of_two_sets_of_weights_transformers_chooses(
    named: str | None, base: Path, tuned: Path, tmp_path: Path
) -> None:
    two = tmp_path / "two"
    LlamaForCausalLM.from_pretrained(base).save_pretrained(two, max_shard_size="8KB")
    shutil.copy(tuned / "model.safetensors", two)
    if named:
        config = json.loads((two / "config.json").read_text())
        config["transformers_weights"] = named
        (two / "config.json").write_text(json.dumps(config))
    out = merge(alone(two), tmp_path / "out")
    chosen = LlamaForCausalLM.from_pretrained(two)
    expect_mean(out, chosen, chosen)


def test_an_index_only_names_the_files(base: Path, tuned: Path, tmp_path: Path) -> None:
    """As transformers does, take a tensor that is in a shard and not in the index."""
    shards = tmp_path / "shards"
    LlamaForCausalLM.from_pretrained(tuned).save_pretrained(
        shards, max_shard_size="8KB"
    )
    index_file = shards / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    del index["weight_map"]["model.norm.weight"]
    index_file.write_text(json.dumps(index))
    out = merge(halfway(base, shards), tmp_path / "out")
    models = [LlamaForCausalLM.from_pretrained(folder) for folder in (base, shards)]
    expect_mean(out, *models)


def test_a_folder_with_a_model_and_an_adapter_is_refused(
    base: Path, tuned: Path, tmp_path: Path
) -> None:
    settings = {"peft_type": "LORA", "base_model_name_or_path": "owner/base"}
    (tuned / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=r"a model and an adapter.*owner/base"):
        make_plan(halfway(base, tuned))
    (tuned / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"an adapter and no model.*owner/base"):
        make_plan(halfway(base, tuned))


@pytest.mark.parametrize(
    ("manifest", "command"),
    [("pareto_family.json", "paretomerge pick"), ("twin.json", "paretomerge expand")],
)
def test_a_folder_of_several_models_names_the_command_that_writes_one(
    base: Path, tmp_path: Path, manifest: str, command: str
) -> None:
    folder = tmp_path / "several"
    folder.mkdir()
    (folder / manifest).write_text("{}")
    with pytest.raises(CheckpointError, match=f"`{command} .*several"):
        make_plan(halfway(base, folder))


@pytest.mark.parametrize("file", ["consolidated.safetensors", "model.fp16.safetensors"])
def test_weights_under_another_name_are_named(
    file: str, base: Path, tuned: Path
) -> None:
    (tuned / "model.safetensors").rename(tuned / file)
    with pytest.raises(CheckpointError, match=f"only {file}; rename"):
        make_plan(halfway(base, tuned))


LOST_HEAD = (["LlamaForCausalLM"], ["LlamaModel"], ["LlamaForSequenceClassification"])


@pytest.mark.parametrize("architectures", LOST_HEAD)
def test_a_head_that_a_fine_tune_lost_is_the_bases(
    architectures: list[str], base: Path, tuned: Path, tmp_path: Path
) -> None:
    """The config says that the head is no embedding, so the embedding does not replace it."""
    tensors = stored(tuned)
    del tensors["lm_head.weight"]
    lost = changed(tuned, tmp_path / "lost", tensors, architectures=architectures)
    plan = make_plan(halfway(base, lost))
    assert any("taken from" in note and "lm_head" in note for note in plan.notes)
    out = merge(halfway(base, lost), tmp_path / "out")
    wanted = LlamaForCausalLM.from_pretrained(tuned)
    wanted.lm_head = LlamaForCausalLM.from_pretrained(base).lm_head
    expect_mean(out, LlamaForCausalLM.from_pretrained(base), wanted)


def test_a_head_that_the_base_lost_is_named(
    base: Path, tuned: Path, tmp_path: Path
) -> None:
    tensors = stored(base)
    del tensors["lm_head.weight"]
    lost = changed(base, tmp_path / "lost", tensors)
    with pytest.raises(CheckpointError, match=r"lost has no tensor 'lm_head\.weight'"):
        make_plan(halfway(lost, tuned))
    # The config of a model without a head may say the same.
    body = changed(base, tmp_path / "body", tensors, architectures=["LlamaModel"])
    notes = make_plan(halfway(body, tuned)).notes
    assert any("left out: lm_head.weight" in note for note in notes)


def test_all_that_a_model_lacks_is_one_sentence(
    base: Path, tuned: Path, tmp_path: Path
) -> None:
    names = {
        f"base_model.model.{name}": tensor for name, tensor in stored(tuned).items()
    }
    renamed = changed(tuned, tmp_path / "renamed", names)
    with pytest.raises(
        CheckpointError, match=r"has no tensor .* and \d+ others"
    ) as told:
        make_plan(halfway(base, renamed))
    assert len(told.value.parts) == 1


def test_models_of_another_width_are_one_sentence(base: Path, tmp_path: Path) -> None:
    config = ARCHITECTURES["llama"]().config
    config.hidden_size *= 2
    wide = save(LlamaForCausalLM(config), tmp_path / "wide")
    with pytest.raises(CheckpointError) as told:
        make_plan(halfway(base, wide), allow_mismatch=True)
    assert len(told.value.parts) == 1
    assert "others differ; do the models come from one base?" in str(told.value)


@pytest.mark.parametrize("method", ["task_arithmetic", "linear", "slerp"])
def test_a_fine_tune_with_fewer_layers_is_refused(
    method: str, base: Path, tuned: Path, tmp_path: Path
) -> None:
    tensors = stored(tuned)
    kept = {name: t for name, t in tensors.items() if ".layers.2." not in name}
    short = changed(tuned, tmp_path / "short", kept, num_hidden_layers=2)
    recipe = {**halfway(base, short).to_dict(), "merge_method": method}
    if method == "slerp":
        recipe |= {"parameters": {"t": 0.5}}
        recipe["models"] = [{"model": str(short)}]
    with pytest.raises(RecipeError, match=r"equal depth.*base.*3.*short.*2"):
        make_plan(Recipe.from_dict(recipe))


BESIDE = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
    "generation_config.json",
    "spiece.model",
    "qwen.tiktoken",
    "tekken.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
    "2_Dense/config.json",
    "2_Dense/model.safetensors",
)
NOT_COPIED = (
    "trainer_state.json",
    "training_args.bin",
    "optimizer.pt",
    "hf_quant_config.json",
    "onnx/model.onnx",
    "run.py",
)


def with_files(folder: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    modules = [
        {"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    return folder


def files_in(folder: Path) -> set[str]:
    paths = folder.rglob("*")
    return {str(path.relative_to(folder)) for path in paths if path.is_file()}


def test_files_beside_the_weights_are_copied(base: Path, tmp_path: Path) -> None:
    with_files(base, BESIDE + NOT_COPIED)
    plan = make_plan(alone(base))
    copied = files_in(merge(alone(base), tmp_path / "out"))
    assert copied >= {*BESIDE, "modules.json"}
    assert not copied & set(NOT_COPIED)
    assert any("2_Dense/model.safetensors" in note for note in plan.notes)


def test_code_of_the_model_is_copied_and_not_run(base: Path, tmp_path: Path) -> None:
    mapped = {"AutoConfig": "configuration_foo.FooConfig"}
    own = changed(base, tmp_path / "own", stored(base), auto_map=mapped)
    (own / "configuration_foo.py").write_text("raise SystemExit('this was run')")
    out = merge(alone(own), tmp_path / "out")
    assert (out / "configuration_foo.py").is_file()
    assert json.loads((out / "config.json").read_text())["auto_map"] == mapped


@pytest.mark.parametrize("name", ["1_Pooling", "1_Pooling/config.json"])
def test_modules_that_link_out_of_the_model_are_refused(
    name: str, base: Path, tmp_path: Path
) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "config.json").write_text("key")
    with_files(base, BESIDE)
    shutil.rmtree(base / "1_Pooling")
    if "/" in name:
        (base / "1_Pooling").mkdir()
    (base / name).symlink_to(tmp_path / "secret" / name.partition("/")[2])
    with pytest.raises(CheckpointError, match="a link that leaves"):
        merge(alone(base), tmp_path / "out")


@pytest.mark.parametrize("path", ["../secret", "/etc"])
def test_modules_outside_of_the_model_are_refused(
    path: str, base: Path, tmp_path: Path
) -> None:
    (base / "modules.json").write_text(json.dumps([{"path": path}]))
    with pytest.raises(CheckpointError, match="must be folders inside"):
        merge(alone(base), tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral', 'llama' in"),
        (
            {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 16},
            "num_attention_heads is 1, 2 in",
        ),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', 'silu' in"),
    ],
)
def test_models_of_other_kinds_are_refused(
    settings: dict[str, Any], told: str, base: Path, tuned: Path, tmp_path: Path
) -> None:
    other = changed(tuned, tmp_path / "other", stored(tuned), **settings)
    with pytest.raises(CheckpointError, match=rf"{told}.*--allow-mismatch"):
        make_plan(halfway(base, other))
    with pytest.raises(CheckpointError, match=told):
        profile(str(base), {"other": str(other)})
    plan = make_plan(halfway(base, other), allow_mismatch=True)
    assert any(told in note for note in plan.notes)
    assert profile(str(base), {"other": str(other)}, allow_mismatch=True).size


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
            "rope_parameters",
        ),
        ({"rms_norm_eps": 1e-3}, "rms_norm_eps"),
    ],
)
def test_what_the_result_follows_is_noted(
    settings: dict[str, Any], key: str, base: Path, tuned: Path, tmp_path: Path
) -> None:
    other = changed(tuned, tmp_path / "other", stored(tuned), **settings)
    (note,) = make_plan(halfway(base, other)).notes
    assert key in note and "the result follows" in note


def test_defaults_left_out_of_a_config_are_no_mismatch(
    base: Path, tuned: Path, tmp_path: Path
) -> None:
    """transformers 4 wrote `rope_theta` at the top."""
    config = json.loads((tuned / "config.json").read_text())
    del config["hidden_act"], config["rope_parameters"], config["head_dim"]
    older = tmp_path / "older"
    shutil.copytree(tuned, older)
    older_config = {**config, "rope_theta": 10000.0, "rope_scaling": None}
    (older / "config.json").write_text(json.dumps(older_config))
    assert make_plan(halfway(base, older)).notes == ()


def write_vocabulary(folder: Path, tokens: list[str]) -> None:
    from tokenizers import Tokenizer, models

    ids = {token: number for number, token in enumerate(tokens)}
    model = models.WordLevel(ids, unk_token=tokens[0])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(model), unk_token=tokens[0]
    ).save_pretrained(folder)


def test_swapped_ids_of_tokens_are_refused(base: Path, tuned: Path) -> None:
    write_vocabulary(base, ["<unk>", "a", "b", "c"])
    write_vocabulary(tuned, ["<unk>", "b", "a", "c"])
    with pytest.raises(CheckpointError, match=r"2 tokens have other ids.*mismatch"):
        make_plan(halfway(base, tuned))
    assert make_plan(halfway(base, tuned), allow_mismatch=True).jobs
    write_vocabulary(tuned, ["<unk>", "a", "b", "c", "more"])
    assert make_plan(halfway(base, tuned)).notes == ()


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
