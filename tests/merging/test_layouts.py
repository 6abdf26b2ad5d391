"""Models that transformers stores under two sets of names or in two layouts.

transformers itself gives the right values: it changes live models to either layout.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.conversion_mapping import _build_checkpoint_conversion_mapping

from paretomerge.errors import CheckpointError
from paretomerge.merging.delta_profile import profile
from paretomerge.merging.engine import merge
from paretomerge.merging.plan.make import make_plan
from paretomerge.recipe import Recipe
from tests.pico import build_pico, model_class, moved

# Models that transformers ties, or whose embeddings it pads, are warned of.
pytestmark = pytest.mark.filterwarnings("ignore")

_LIST = """
afmoe aria aria_text audioflamingo3 axk1 axk2 aya_vision bailing_hybrid beam cohere2_moe cohere_asr
cosmos3_edge cosmos3_omni deepseek_ocr2 deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 dots1
emu3 ernie4_5_moe ernie4_5_vl_moe exaone_moe flex_olmo flint fuyu gemma3 gemma3n_text
gemma4_unified glm4_moe glm4_moe_lite glm4v_moe glm5_next glm_moe_dsa glmasr got_ocr2 gpt_neox
granitemoe
granitemoehybrid granitemoeshared gte hunyuan_v1_moe hunyuan_vl hy_v3 hy_v4 hyperclovax_vision_v2
inkling2 inkling2_text internvl jamba jina_embeddings_v3 kimi_k25 kimi_linear kolibri1 laguna
lfm2_moe lfm3 llava llava_next llava_next_video llava_onevision longcat_flash mellum mimo_v2_flash
minimax minimax_m2 minimax_m3_vl mistral3 mistral_large4 mixtral mllama molmo2 musicflamingo
nemotron_h nomic_bert olmo_hybrid olmoe paddleocr_vl paligemma phimoe pi0 qianfan_ocr qwen2_5_vl
qwen2_audio qwen2_moe qwen2_vl qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next
qwen2_5_omni_thinker qwen3_omni_moe_thinker qwen3_vl_moe qwen4_exp_text sapiens2 solar_open step3p7
tipsv2 unlimited_ocr video_llava vipllava voxtral voxtral_realtime
"""
FAMILIES = _LIST.split()
NOT_TESTED = {
    "hrm_text": "is refused: its config counts how often layers run, and not how many there are",
    "inkling_mm_model": "the layers of its vision tower have a width of 6144 in any config",
    "pp_chart2table": "is built as got_ocr2",
    "shieldgemma2": "is built as gemma3",
}


def values(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, in one file or several."""
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def save_both(model: PreTrainedModel, folder: Path) -> dict[str, Path]:
    """A model under the names on disk and under those in memory."""
    folders = {}
    for layout in ("disk", "memory"):
        folders[layout] = folder.with_name(f"{folder.name}-{layout}")
        is_disk = layout == "disk"
        model.save_pretrained(folders[layout], save_original_format=is_disk)
    return folders


def halfway(base: Path, tuned: Path, **keys: Any) -> Recipe:
    models = [{"model": str(tuned), "parameters": {"weight": 0.5}}]
    recipe = {"merge_method": "task_arithmetic", "base_model": str(base)}
    return Recipe.from_dict({**recipe, "models": models, "dtype": "float32", **keys})


def expect_close(out: Path, wanted: Mapping[str, torch.Tensor]) -> None:
    got = values(out)
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-5, atol=1e-6)


def middle(first: PreTrainedModel, second: PreTrainedModel) -> None:
    """Move a model to the middle between itself and another one."""
    with torch.no_grad():
        pairs = zip(first.parameters(), second.parameters(), strict=True)
        for parameter, other in pairs:
            parameter.add_(other).div_(2)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    """The models are too small for several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_no_family_that_generates_text_is_forgotten() -> None:
    forgotten = []
    for family in _build_checkpoint_conversion_mapping():
        if family not in transformers.CONFIG_MAPPING:
            continue
        try:
            name = model_class(family).__name__
        except KeyError:
            continue
        generates = name.endswith(("ForCausalLM", "ForConditionalGeneration"))
        if generates and family not in {*FAMILIES, *NOT_TESTED}:
            forgotten.append(family)
    assert not forgotten


@pytest.mark.parametrize("family", FAMILIES)
def test_both_layouts_of_a_family(family: str, tmp_path: Path) -> None:
    model = build_pico(family)
    base = save_both(model, tmp_path / "base")
    tuned_model = build_pico(family)
    tuned = save_both(moved(tuned_model), tmp_path / "tuned")
    middle(model, tuned_model)
    wanted = save_both(model, tmp_path / "wanted")
    for layout, other in (("disk", "memory"), ("memory", "disk")):
        recipe = halfway(base[layout], tuned[other])
        plan = make_plan(recipe)
        assert not any("lack" in note for note in plan.notes)
        out = merge(recipe, tmp_path / f"out-{layout}")
        expect_close(out, values(wanted[layout]))


def save(model: PreTrainedModel, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A mixture of experts and a fine-tune of it, each in both layouts."""
    folder = tmp_path_factory.mktemp("experts")
    folders = {}
    for name, seed in (("base", 0), ("tuned", 1), ("other", 2)):
        model = build_pico("qwen3_moe")
        if seed:
            moved(model, seed)
        for layout, path in save_both(model, folder / name).items():
            folders[f"{name}-{layout}"] = path
    return folders


SEVERAL = [
    {"merge_method": "ties", "parameters": {"density": 0.5}},
    {"merge_method": "dare_ties", "parameters": {"density": 0.5}},
    {"merge_method": "della_linear", "parameters": {"density": 0.5, "epsilon": 0.1}},
    {"merge_method": "slerp", "parameters": {"t": 0.3}},
    {"merge_method": "breadcrumbs", "parameters": {"density": 0.5, "gamma": 0.1}},
    {"merge_method": "model_stock"},
]


def recipe_of(
    experts: Mapping[str, Path], layouts: str, keys: Mapping[str, Any]
) -> Recipe:
    """A recipe on the base and its two fine-tunes, each in one of two layouts (`dm...`)."""
    names = {"d": "disk", "m": "memory"}
    base, *models = [
        str(experts[f"{model}-{names[letter]}"])
        for model, letter in zip(("base", "tuned", "other"), layouts, strict=True)
    ]
    if keys["merge_method"] == "slerp":
        models = [base, models[0]]
    listed = [{"model": model, "parameters": {"weight": 0.5}} for model in models]
    return Recipe.from_dict(
        {"base_model": base, "models": listed, "dtype": "float32", **keys}
    )


@pytest.mark.parametrize("keys", SEVERAL, ids=lambda keys: keys["merge_method"])
def test_the_layout_of_a_source_changes_no_bit(
    keys: dict[str, Any], experts: dict[str, Path], tmp_path: Path
) -> None:
    """Random masks are drawn for the tensors of the base, whatever the sources are like."""
    for base, others in (("d", ("dd", "mm", "md")), ("m", ("mm", "dd"))):
        results = []
        for other in others:
            # In one folder, for the order of the sources follows their paths.
            recipe = recipe_of(experts, base + other, keys)
            out = merge(recipe, tmp_path / f"{base}{other}")
            results.append(values(out))
        for result in results[1:]:
            assert result.keys() == results[0].keys()
            for name, tensor in results[0].items():
                assert torch.equal(result[name], tensor), name


@pytest.mark.parametrize("layout", ["disk", "memory"])
def test_slices_of_layers_with_stacked_experts(
    layout: str, experts: dict[str, Path], tmp_path: Path
) -> None:
    other = {"disk": "memory", "memory": "disk"}[layout]
    parts = [
        (experts[f"base-{layout}"], [0, 2]),
        (experts[f"tuned-{other}"], [1, 3]),
    ]
    slices = []
    for model, layers in parts:
        sources = [{"model": str(model), "layer_range": layers}]
        slices.append({"sources": sources})
    recipe = {"merge_method": "passthrough", "slices": slices, "dtype": "float32"}
    out = merge(Recipe.from_dict(recipe), tmp_path / "out")
    got = values(out)
    prefix = "model.layers."
    for name, tensor in values(experts[f"base-{layout}"]).items():
        if name.startswith((f"{prefix}0.", f"{prefix}1.")):
            assert torch.equal(got[name], tensor)
    for name, tensor in values(experts[f"tuned-{layout}"]).items():
        for layer, result in ((1, 2), (2, 3)):
            if name.startswith(f"{prefix}{layer}."):
                result_name = name.replace(f"{prefix}{layer}.", f"{prefix}{result}.")
                assert torch.equal(got[result_name], tensor)


def test_a_source_that_is_deeper_than_the_base(tmp_path: Path) -> None:
    base = save(build_pico("qwen3_moe"), tmp_path / "base")
    deep = build_pico("qwen3_moe", {"num_hidden_layers": 5})
    folder = save(deep, tmp_path / "deep", save_original_format=False)
    wanted = values(save(deep, tmp_path / "wanted"))
    sources = [
        {"sources": [{"model": str(base), "layer_range": [0, 3]}]},
        {"sources": [{"model": str(folder), "layer_range": [3, 5]}]},
    ]
    recipe = {"merge_method": "passthrough", "slices": sources}
    got = values(merge(Recipe.from_dict(recipe), tmp_path / "out"))
    for name, tensor in wanted.items():
        if name.startswith(("model.layers.3.", "model.layers.4.")):
            assert torch.equal(got[name], tensor)


def test_shards_and_half_precision(experts: dict[str, Path], tmp_path: Path) -> None:
    kind = model_class("qwen3_moe")
    models = {}
    for name in ("base", "tuned"):
        models[name] = kind.from_pretrained(
            experts[f"{name}-disk"], dtype=torch.bfloat16
        )
    base = save(models["base"], tmp_path / "base", max_shard_size="8KB")
    tuned = save(
        models["tuned"],
        tmp_path / "tuned",
        max_shard_size="8KB",
        save_original_format=False,
    )
    middle(models["base"].float(), models["tuned"].float())
    wanted = save(models["base"], tmp_path / "wanted")
    out = merge(halfway(base, tuned), tmp_path / "out")
    expect_close(out, values(wanted))


def test_other_numbers_of_experts_are_refused(tmp_path: Path) -> None:
    base = save(build_pico("qwen3_moe"), tmp_path / "base")
    more = build_pico("qwen3_moe", {"num_experts": 8, "num_local_experts": 8})
    other = save(more, tmp_path / "other", save_original_format=False)
    with pytest.raises(CheckpointError, match=r"experts.*expected \[4, 16, 8\].*got"):
        make_plan(halfway(base, other))


def test_kinship_of_models_in_both_layouts(experts: dict[str, Path]) -> None:
    """The measured differences are those of models in one layout."""
    results = []
    for layout in ("disk", "memory"):
        sources = {
            "tuned": str(experts[f"tuned-{layout}"]),
            "other": str(experts["other-disk"]),
        }
        results.append(profile(str(experts["base-disk"]), sources))
    one, other = results
    assert one.mass == other.mass
    assert one.products == other.products


def test_a_step_in_the_other_layout(experts: dict[str, Path], tmp_path: Path) -> None:
    """A later step merges the result of an earlier one, which has the names in memory."""
    step = {
        "name": "first",
        "merge_method": "linear",
        "models": [
            {"model": str(experts[f"{name}-{layout}"]), "parameters": {"weight": 0.5}}
            for name, layout in (("tuned", "memory"), ("other", "disk"))
        ],
    }
    last = {
        "merge_method": "task_arithmetic",
        "base_model": str(experts["base-disk"]),
        "models": [{"model": "first", "parameters": {"weight": 1}}],
        "dtype": "float32",
    }
    text = yaml.safe_dump_all([step, last])
    got = values(merge(Recipe.from_yaml(text), tmp_path / "out"))
    first, second = (values(experts[f"{name}-disk"]) for name in ("tuned", "other"))
    assert got.keys() == first.keys()
    for name, tensor in got.items():
        wanted = (first[name] + second[name]) / 2
        torch.testing.assert_close(tensor, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("is_base", [False, True])
def test_experts_that_are_transposed_on_disk(is_base: bool, tmp_path: Path) -> None:
    """The Hub's experts of Qwen3-VL have their names in memory, but are transposed."""
    settings = {"text_config": {"moe_intermediate_size": 12}}
    first = build_pico("qwen3_vl_moe", settings)
    second = moved(build_pico("qwen3_vl_moe", settings))
    models = {"first": first, "second": second}
    folders = {name: save(model, tmp_path / name) for name, model in models.items()}
    changed = folders["first" if is_base else "second"]
    file = changed / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if ".experts." in name:
            tensors[name] = tensor.transpose(1, 2).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    out = merge(halfway(folders["first"], folders["second"]), tmp_path / "out")
    middle(first, second)
    merged = type(first).from_pretrained(out).state_dict()
    for name, tensor in first.state_dict().items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-5, atol=1e-6)


PARTS = [
    ("aria", "aria_text"),
    ("gemma3", "gemma3_text"),
    ("fuyu", "persimmon"),
    ("internvl", "qwen2"),
    ("kimi_k25", "deepseek_v3"),
    ("llava", "llama"),
    ("llava_next", "llama"),
    ("mistral3", "mistral"),
    ("paligemma", "gemma"),
    ("qwen2_5_vl", "qwen2"),
    ("qwen2_vl", "qwen2"),
    ("qwen3_omni_moe_thinker", "qwen3_moe"),
    ("qwen3_vl", "qwen3"),
    ("qwen3_vl_moe", "qwen3_moe"),
    ("smolvlm", "llama"),
]


def language_model_like(model: PreTrainedModel, family: str) -> PreTrainedModel:
    """A language model with the sizes of the language part of another model."""
    text = model.config.get_text_config().to_dict()
    for key in ("model_type", "architectures", "dtype", "transformers_version"):
        text.pop(key, None)
    text["tie_word_embeddings"] = model.config.tie_word_embeddings
    config = transformers.CONFIG_MAPPING[family](**text)
    torch.manual_seed(1)
    built = transformers.AutoModelForCausalLM.from_config(config)
    return moved(built.float().eval(), seed=9)


@pytest.mark.parametrize("layout", ["disk", "memory"])
@pytest.mark.parametrize(("whole", "part"), PARTS)
def test_a_language_model_and_one_that_contains_it(
    whole: str, part: str, layout: str, tmp_path: Path
) -> None:
    model = build_pico(whole)
    language = language_model_like(model, part)
    folder = save_both(model, tmp_path / "whole")[layout]
    other = save(language, tmp_path / "part")
    decoder = model.get_decoder()
    named = {module: name for name, module in model.named_modules()}
    prefix = named[decoder]
    state, own = model.state_dict(), language.state_dict()
    means = {}
    for name, tensor in own.items():
        place = name
        if name.startswith("model."):
            place = f"{prefix}.{name.removeprefix('model.')}"
        means[name] = (state[place] + tensor) / 2
        state[place].copy_(means[name])
        own[name].copy_(means[name])
    wanted = save_both(model, tmp_path / "wanted")[layout]
    wanted_part = save(language, tmp_path / "wanted-part")
    plan = make_plan(halfway(folder, other))
    assert any("lacks are taken from" in note for note in plan.notes)
    out = merge(halfway(folder, other), tmp_path / "out")
    expect_close(out, values(wanted))
    out = merge(halfway(other, folder), tmp_path / "out-part")
    expect_close(out, values(wanted_part))


def test_a_language_model_of_another_family_is_refused(tmp_path: Path) -> None:
    model = build_pico("llava")
    base = save(model, tmp_path / "base")
    other = save(language_model_like(model, "mistral"), tmp_path / "other")
    with pytest.raises(CheckpointError, match="model_type is 'mistral', 'llama' in"):
        make_plan(halfway(base, other))


def test_a_step_of_language_models_inside_another_model(tmp_path: Path) -> None:
    """Akiba et al. 2024: task vectors to a language model, written into one that sees."""
    whole = build_pico("gemma3")
    parts = [language_model_like(whole, "gemma3_text") for _ in range(2)]
    moved(parts[1], seed=4)
    seeing = save(whole, tmp_path / "seeing")
    base = save(parts[0], tmp_path / "base")
    tuned = save(parts[1], tmp_path / "tuned")
    listed = [
        {"model": str(model), "parameters": {"weight": 0.5}}
        for model in (tuned, seeing)
    ]
    step = {
        "name": "text",
        "merge_method": "task_arithmetic",
        "base_model": str(base),
        "models": listed,
    }
    last = {
        "merge_method": "passthrough",
        "base_model": str(seeing),
        "modules": {"text_decoder": {"models": [{"model": "text"}]}},
        "dtype": "float32",
    }
    recipe = Recipe.from_yaml(yaml.safe_dump_all([step, last]))
    got = values(merge(recipe, tmp_path / "out"))
    before, first, second = (values(folder) for folder in (seeing, base, tuned))
    for name, tensor in got.items():
        wanted = before[name]
        own = name.removeprefix("language_model.")
        if own != name:
            deltas = wanted + second[own] - 2 * first[own]
            wanted = first[own] + 0.5 * deltas
        torch.testing.assert_close(tensor, wanted, rtol=1e-5, atol=1e-6)
