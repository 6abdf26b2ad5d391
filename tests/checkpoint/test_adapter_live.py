"""Adapters that peft itself has saved: the merged model gives the logits of the live one."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from paretomerge.errors import CheckpointError, RecipeError
from paretomerge.merging.engine import merge
from paretomerge.merging.live.in_place import ResidentModel
from paretomerge.merging.plan.make import make_plan
from paretomerge.recipe import Recipe
from tests.architectures import ARCHITECTURES, run
from tests.pico import build_pico

# peft warns of tied embeddings, of options that it corrects, and of what it saves.
pytestmark = pytest.mark.filterwarnings("ignore")


def build(name: str) -> PreTrainedModel:
    if name != "tied_llama":
        return ARCHITECTURES[name]()
    config = ARCHITECTURES["llama"]().config
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def train(base: Path, folder: Path, kind: type, **options: Any) -> torch.Tensor:
    """Save an adapter with random values; returns the logits of the live model."""
    return train_live(kind.from_pretrained(base), folder, **options)


def train_live(model: PreTrainedModel, folder: Path, **options: Any) -> torch.Tensor:
    """`train` for a model that is loaded."""
    live = get_peft_model(model, LoraConfig(**{"r": 2, "lora_alpha": 6, **options}))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in live.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    live.save_pretrained(folder)
    return run(live.eval())


def passthrough(model: str) -> Recipe:
    models = [{"model": model}]
    return Recipe.from_dict(
        {"merge_method": "passthrough", "models": models, "dtype": "float32"}
    )


def on_base(base: Path, model: str) -> Recipe:
    """A merge of several sources whose result is `model`."""
    return Recipe.from_dict(
        {
            "merge_method": "task_arithmetic",
            "base_model": str(base),
            "models": [
                {"model": model, "parameters": {"weight": 1}},
                {"model": str(base), "parameters": {"weight": 1}},
            ],
            "dtype": "float32",
        }
    )


TIED = [
    ("tied_llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    ("tied_llama", {"target_modules": ["q_proj", "lm_head"]}),
    ("tied_llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    ("tied_llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    (
        "tied_llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    ),
    ("tied_llama", {"target_modules": ["lm_head", "embed_tokens"]}),
    ("gpt2", {"target_modules": ["c_attn", "wte"]}),
    ("gpt2", {"target_modules": ["c_attn", "c_proj", "lm_head"]}),
    ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["wte"]}),
    ("t5", {"target_modules": ["q", "shared"]}),
    ("t5", {"target_modules": ["q", "lm_head"]}),
    ("t5", {"target_modules": ["q"], "modules_to_save": ["shared"]}),
    ("t5", {"target_modules": ["q"], "modules_to_save": ["lm_head"]}),
    ("bart", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    ("gemma3_vl", {"target_modules": ["q_proj", "embed_tokens"]}),
    ("gemma3_vl", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
]


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize(("name", "options"), TIED)
def test_one_side_of_tied_embeddings(
    name: str, options: dict[str, Any], several: bool, tmp_path: Path
) -> None:
    model = build(name)
    base, lora = tmp_path / "base", tmp_path / "lora"
    model.save_pretrained(base)
    wanted = train(base, lora, type(model), **options)
    adapted = f"{base}+{lora}"
    recipe = on_base(base, adapted) if several else passthrough(adapted)
    out = merge(recipe, tmp_path / "out")
    got = run(type(model).from_pretrained(out).eval())
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    if name != "t5":
        config = json.loads((out / "config.json").read_text())
        assert config["tie_word_embeddings"] is False


MASKED = [
    ("bert", {"target_modules": ["query"], "modules_to_save": ["cls"]}),
    ("bert", {"target_modules": ["query"], "modules_to_save": ["decoder"]}),
    ("bert", {"target_modules": ["query", "word_embeddings"]}),
    ("bert", {"target_modules": ["query"], "bias": "all"}),
    ("roberta", {"target_modules": ["query"], "modules_to_save": ["lm_head"]}),
    ("roberta", {"target_modules": ["query", "word_embeddings"]}),
    ("albert", {"target_modules": ["query"], "modules_to_save": ["predictions"]}),
    ("t5", {"target_modules": ["q"], "modules_to_save": ["decoder"]}),
]


@pytest.mark.parametrize(("name", "options"), MASKED)
def test_heads_with_a_bias_that_is_stored_twice(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """Masked language models tie the bias of the head, too."""
    model = build(name)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    base, lora = tmp_path / "base", tmp_path / "lora"
    model.save_pretrained(base)
    wanted = train(base, lora, type(model), **options)
    out = merge(passthrough(f"{base}+{lora}"), tmp_path / "out")
    got = run(type(model).from_pretrained(out).eval())
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
        {
            "target_modules": ["q_proj"],
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
    ],
)
def test_tied_embeddings_that_change_alike_stay_tied(
    options: dict[str, Any], tmp_path: Path
) -> None:
    model = build("tied_llama")
    base, lora = tmp_path / "base", tmp_path / "lora"
    model.save_pretrained(base)
    wanted = train(base, lora, type(model), **options)
    plan = make_plan(passthrough(f"{base}+{lora}"))
    out = merge(passthrough(f"{base}+{lora}"), tmp_path / "out")
    assert "lm_head.weight" not in {job.name for job in plan.jobs}
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True
    got = run(type(model).from_pretrained(out).eval())
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_an_untied_base_is_not_loaded_into_one_that_ties(
    pico: Path, tmp_path: Path
) -> None:
    model = build("tied_llama")
    base, lora = tmp_path / "base", tmp_path / "lora"
    shutil.copytree(pico / "base", base)
    model.save_pretrained(base)
    train(base, lora, type(model), target_modules=["embed_tokens"])
    adapted = f"{base}+{lora}"
    with pytest.raises(RecipeError, match="differs from"):
        ResidentModel(adapted, [str(base)])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"target_modules": ["q_proj"], "use_rslora": True}),
        (
            "llama",
            {
                "target_modules": ["q_proj", "up_proj"],
                "rank_pattern": {"up_proj": 3},
                "alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 9},
            },
        ),
        ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
        ("llama", {"target_modules": "all-linear", "exclude_modules": ["v_proj"]}),
        ("llama", {"target_modules": ["q_proj"], "fan_in_fan_out": True}),
        ("gpt2", {"target_modules": ["c_proj"], "fan_in_fan_out": False}),
        ("gpt2", {"target_modules": ["c_attn"], "bias": "all"}),
        ("qwen2", {"target_modules": ["q_proj"], "bias": "lora_only"}),
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
        ("llama", {"target_modules": ["lm_head", "embed_tokens"]}),
        ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"}),
    ],
)
def test_plain_options(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = build(name)
    base, lora = tmp_path / "base", tmp_path / "lora"
    model.save_pretrained(base)
    wanted = train(base, lora, type(model), **options)
    out = merge(passthrough(f"{base}+{lora}"), tmp_path / "out")
    got = run(type(model).from_pretrained(out).eval())
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("llama", {"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens"),
        ("llama", {"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ("llama", {"use_dora": True}, "DoRA"),
        ("qwen2", {"lora_bias": True}, "lora_bias"),
    ],
)
def test_options_that_are_refused_by_name(
    name: str, options: dict[str, Any], told: str, tmp_path: Path
) -> None:
    model = build(name)
    base, lora = tmp_path / "base", tmp_path / "lora"
    model.save_pretrained(base)
    train(base, lora, type(model), target_modules=["q_proj"], **options)
    with pytest.raises(CheckpointError, match=told):
        make_plan(passthrough(f"{base}+{lora}"))


@pytest.mark.parametrize("key", ["tokenizer_source", "chat_template"])
def test_a_tokenizer_in_the_folder_of_the_adapter(
    key: str, pico: Path, tmp_path: Path
) -> None:
    base, lora = pico / "base", tmp_path / "lora"
    train_pico(base, lora)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(lora)
    adapted = f"{base}+{lora}"
    value = adapted if key == "tokenizer_source" else "auto"
    recipe = {
        "merge_method": "passthrough",
        "models": [{"model": adapted}],
        key: value,
    }
    out = merge(recipe, tmp_path / "out")
    written = (out / "chat_template.jinja").read_text()
    assert written == tokenizer.chat_template


def train_pico(base: Path, lora: Path) -> None:
    model = transformers.LlamaForCausalLM.from_pretrained(base)
    options = LoraConfig(r=2, target_modules=["q_proj"])
    get_peft_model(model, options).save_pretrained(lora)


def test_an_unknown_option_is_refused_by_name(tmp_path: Path) -> None:
    model = build("llama")
    base, lora = tmp_path / "base", tmp_path / "lora"
    model.save_pretrained(base)
    train(base, lora, type(model), target_modules=["q_proj"])
    path = lora / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "new_option": None}))
    make_plan(passthrough(f"{base}+{lora}"))
    path.write_text(json.dumps({**config, "new_option": {"scale": 2}}))
    with pytest.raises(CheckpointError, match="new_option"):
        make_plan(passthrough(f"{base}+{lora}"))


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ON_PARAMETERS = [
    ("mixtral", {"target_parameters": EXPERTS}),
    ("mixtral", {"target_parameters": ["mlp.experts.down_proj"], "use_rslora": True}),
    (
        "qwen3_moe",
        {
            "target_modules": ["q_proj", "down_proj"],
            "target_parameters": [*EXPERTS, "mlp.gate.weight"],
            "rank_pattern": {"experts.gate_up_proj": 3},
            "alpha_pattern": {"experts.down_proj": 5},
        },
    ),
    ("qwen3_moe", {"target_parameters": EXPERTS, "modules_to_save": ["lm_head"]}),
    ("qwen3_moe", {"target_modules": ["q_proj"], "modules_to_save": ["experts"]}),
    ("deepseek_v3", {"target_modules": ["q_b_proj"], "target_parameters": EXPERTS}),
    # These experts are (experts, input, output).
    ("gpt_oss", {"target_parameters": EXPERTS}),
]


@pytest.mark.parametrize("in_memory_names", [False, True])
@pytest.mark.parametrize(("name", "options"), ON_PARAMETERS)
def test_experts_that_are_stacked_in_memory(
    name: str, options: dict[str, Any], in_memory_names: bool, tmp_path: Path
) -> None:
    model = build(name)
    kind = type(model)
    base, lora, stored = tmp_path / "base", tmp_path / "lora", tmp_path / "stored"
    model.save_pretrained(base)
    kind.from_pretrained(base).save_pretrained(
        stored, save_original_format=not in_memory_names
    )
    wanted = train(stored, lora, kind, **{"target_modules": [], **options})
    out = merge(passthrough(f"{stored}+{lora}"), tmp_path / "alone")
    got = run(kind.from_pretrained(out).eval())
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    # A model with the other names as base.
    out = merge(on_base(base, f"{stored}+{lora}"), tmp_path / "out")
    got = run(kind.from_pretrained(out).eval())
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gemma3_vl", "llava", "qwen2_vl"])
def test_the_language_part_of_a_model_that_sees(name: str, tmp_path: Path) -> None:
    """peft has the names in memory, which differ from those on disk."""
    model = build(name)
    base, lora = tmp_path / "base", tmp_path / "lora"
    model.save_pretrained(base)
    options = {"target_modules": ["q_proj", "down_proj"]}
    wanted = train(base, lora, type(model), **options)
    out = merge(passthrough(f"{base}+{lora}"), tmp_path / "out")
    got = run(type(model).from_pretrained(out).eval())
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


FAMILIES = [
    "deepseek_v4",
    "ernie4_5_vl_moe",
    "granitemoe",
    "internvl",
    "jamba",
    "kimi_k25",
    "lfm2_moe",
    "longcat_flash",
    "minimax_m3_vl",
    "molmo2",
    "nomic_bert",
    "olmo_hybrid",
    "phimoe",
    "qwen2_5_vl",
    "qwen3_omni_moe_thinker",
    "qwen3_vl_moe",
    "step3p7",
]


@pytest.mark.parametrize("is_disk", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_and_expert_of_a_family(
    family: str, is_disk: bool, tmp_path: Path
) -> None:
    """On disk, some are packed together, or stored one by one, in another order or transposed."""
    model = build_pico(family)
    base, lora = tmp_path / "base", tmp_path / "lora"
    model.save_pretrained(base, save_original_format=is_disk)
    live = type(model).from_pretrained(base)
    modules = []
    for name, module in live.named_modules():
        if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head"):
            modules.append(name)
    experts = []
    for name, parameter in live.named_parameters():
        if "experts" in name and parameter.ndim == 3:
            experts.append(name)
    options = LoraConfig(
        r=2, lora_alpha=6, target_modules=modules, target_parameters=experts or None
    )
    trained = get_peft_model(live, options)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    trained.save_pretrained(lora)
    wanted = trained.merge_and_unload().state_dict()
    out = merge(passthrough(f"{base}+{lora}"), tmp_path / "out")
    got = type(model).from_pretrained(out).state_dict()
    for name, tensor in wanted.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-4, atol=1e-5)


def test_parameters_that_the_model_lacks_are_named(tmp_path: Path) -> None:
    model = build("mixtral")
    base, lora = tmp_path / "base", tmp_path / "lora"
    model.save_pretrained(base)
    train(base, lora, type(model), target_modules=[], target_parameters=EXPERTS)
    config = json.loads((lora / "adapter_config.json").read_text())
    config["target_parameters"] = EXPERTS[:1]
    (lora / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"mlp.experts: .*`target_parameters`"):
        make_plan(passthrough(f"{base}+{lora}"))


RESIZED: list[dict[str, Any]] = [
    {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    {"target_modules": ["q_proj"]},
    {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
]


@pytest.mark.parametrize("n_tokens", [40, 53])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(("llama", options) for options in RESIZED),
        *(("tied_llama", options) for options in RESIZED),
        # peft does not see that the vocabulary of such a model was resized.
        ("gemma3_vl", RESIZED[0]),
        ("gemma3_vl", RESIZED[-1]),
    ],
)
def test_an_adapter_with_another_number_of_tokens(
    name: str, options: dict[str, Any], n_tokens: int, tmp_path: Path
) -> None:
    model = build(name)
    base, lora = tmp_path / "base", tmp_path / "lora"
    model.save_pretrained(base)
    kind = type(model)
    live = kind.from_pretrained(base)
    live.resize_token_embeddings(n_tokens)
    wanted = train_live(live, lora, **options)
    plan = make_plan(passthrough(f"{base}+{lora}"))
    assert any(f"number of tokens to {n_tokens}" in note for note in plan.notes)
    out = merge(passthrough(f"{base}+{lora}"), tmp_path / "out")
    merged = kind.from_pretrained(out).eval()
    assert merged.config.get_text_config().vocab_size == n_tokens
    torch.testing.assert_close(run(merged), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
        ("gemma3_vl", RESIZED[1]),
    ],
)
def test_a_head_that_peft_does_not_store_is_named(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model = build(name)
    base, lora = tmp_path / "base", tmp_path / "lora"
    model.save_pretrained(base)
    live = type(model).from_pretrained(base)
    live.resize_token_embeddings(53)
    train_live(live, lora, **options)
    with pytest.raises(
        CheckpointError, match=r"53 tokens.*lm_head.weight has 48.*peft"
    ):
        make_plan(passthrough(f"{base}+{lora}"))


def test_an_adapter_of_a_model_without_its_head(tmp_path: Path) -> None:
    model = build("mixtral")
    base, lora = tmp_path / "base", tmp_path / "lora"
    model.save_pretrained(base)
    body = transformers.AutoModel.from_pretrained(base)
    names = ["experts.gate_up_proj", "experts.down_proj"]
    options = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=names)
    trained = get_peft_model(body, options)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.ones(parameter.shape))
    trained.save_pretrained(lora)
    wanted = trained.merge_and_unload().state_dict()
    out = merge(passthrough(f"{base}+{lora}"), tmp_path / "out")
    got = transformers.AutoModel.from_pretrained(out).state_dict()
    for name, tensor in wanted.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-4, atol=1e-5)


def test_an_adapter_of_single_experts_on_stacked_ones(tmp_path: Path) -> None:
    """Adapters of transformers 4 name each expert."""
    model = build("qwen3_moe")
    base, lora = tmp_path / "base", tmp_path / "lora"
    model.save_pretrained(base, save_original_format=False)
    train(base, lora, type(model), target_modules=["q_proj"])
    file = lora / "adapter_model.safetensors"
    module = "base_model.model.model.layers.1.mlp.experts.0.gate_proj"
    tensors = {
        f"{module}.lora_A.weight": torch.ones(2, 16),
        f"{module}.lora_B.weight": torch.ones(8, 2),
    }
    save_file({**load_file(file), **tensors}, file)
    with pytest.raises(CheckpointError, match=r"0.gate_proj.*save_pretrained"):
        make_plan(passthrough(f"{base}+{lora}"))
