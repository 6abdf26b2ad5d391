"""Mixtures of experts: their laws against transformers, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from paretomerge.errors import CheckpointError, ParetoMergeError, RecipeError
from paretomerge.systems.moe import MoeConfig, MoeExpert, write_moe
from tests.conftest import save_tokenizer
from tests.systems.moe.pico import IDS, dense, load, logits, save_dense

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
PROMPTS = (["abc", "abd"], ["xyz", "xzy"], ["mno"])


def expert(source: str, index: int | None = None, **keys: Any) -> dict[str, Any]:
    """An entry of `experts`, with the prompts of a number."""
    entry: dict[str, Any] = {"source_model": source, **keys}
    if index is not None:
        entry["positive_prompts"] = PROMPTS[index]
    return entry


def written(
    config: dict[str, Any], out: Path, **options: Any
) -> dict[str, torch.Tensor]:
    write_moe(config, out, **options)
    return load_file(out / "model.safetensors")


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A base and two experts, in float32."""
    folder = tmp_path_factory.mktemp("llamas")
    return [save_dense(folder / str(seed), "llama", seed) for seed in range(3)]


def mixtral(llamas: list[str], **keys: Any) -> dict[str, Any]:
    base, one, two = llamas
    return {
        "base_model": base,
        "experts": [expert(one, 0), expert(two, 1)],
        **keys,
    }


# Equality with the dense model


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"head_dim": 12, "num_key_value_heads": 2}),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 500.0,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 16,
                }
            },
        ),
        ("mistral", {"sliding_window": 4}),
        ("mistral", {"sliding_window": None, "rms_norm_eps": 0.1}),
        ("qwen3", {}),
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0},
        ),
    ],
)
@pytest.mark.parametrize("per_token", [1, 2])
def test_identical_experts_are_the_dense_model(
    kind: str, settings: dict[str, Any], per_token: int, tmp_path: Path
):
    """Weights of the chosen experts sum to 1, so the same expert twice is that expert."""
    source = save_dense(tmp_path / "dense", kind, **settings)
    config = {
        "base_model": source,
        "gate_mode": "random",
        "experts_per_token": per_token,
        "experts": [expert(source)] * 3,
    }
    write_moe(config, tmp_path / "moe")
    moe = load(tmp_path / "moe")
    assert moe.config.model_type == {"qwen3": "qwen3_moe"}.get(kind, "mixtral")
    torch.testing.assert_close(logits(moe), logits(load(source)), **CLOSE)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("qwen2", {}),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
        ),
        ("llama", {}),
        ("mistral", {"sliding_window": 4}),
    ],
)
@pytest.mark.parametrize(("routed", "shared"), [(1.0, 0.0), (0.5, 1.0), (0.25, 1.5)])
def test_a_qwen2_moe_is_the_dense_model_where_its_factors_sum_to_1(
    kind: str,
    settings: dict[str, Any],
    routed: float,
    shared: float,
    tmp_path: Path,
):
    """out = r MLP(x) + s sigmoid(0) MLP(x), which is MLP(x) for r + s / 2 = 1."""
    source = save_dense(tmp_path / "dense", kind, **settings)
    config = {
        "base_model": source,
        "gate_mode": "random",
        "experts": [expert(source, residual_scale=routed)] * 2,
        "shared_experts": [expert(source, residual_scale=shared)],
    }
    write_moe(config, tmp_path / "moe")
    moe = load(tmp_path / "moe")
    assert moe.config.model_type == "qwen2_moe"
    torch.testing.assert_close(logits(moe), logits(load(source)), **CLOSE)


def test_a_shared_expert_of_full_size_adds_half_a_dense_mlp(tmp_path: Path):
    """The dense model with its down projections times 1.5 computes the same."""
    source = save_dense(tmp_path / "dense", "qwen2")
    config = {
        "base_model": source,
        "gate_mode": "random",
        "experts": [expert(source)] * 2,
        "shared_experts": [expert(source)],
    }
    plan = write_moe(config, tmp_path / "moe")
    assert any("residual_scale" in note for note in plan.notes)
    model = load(source)
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data *= 1.5
    torch.testing.assert_close(logits(load(tmp_path / "moe")), logits(model), **CLOSE)


def test_biases_of_qwen2_are_carried_and_llama_gets_zeros(tmp_path: Path):
    qwen = save_dense(tmp_path / "qwen", "qwen2")
    llama = save_dense(tmp_path / "llama", "llama")
    name = "model.layers.1.self_attn.k_proj.bias"
    for source in (qwen, llama):
        config = {
            "base_model": source,
            "gate_mode": "random",
            "experts": [expert(llama), expert(qwen)],
            "shared_experts": [expert(qwen)],
        }
        tensors = written(config, tmp_path / "moe", overwrite=True)
        expected = torch.zeros(8)
        if source == qwen:
            expected = load_file(Path(qwen) / "model.safetensors")[name]
            assert expected.abs().min() > 0
        assert torch.equal(tensors[name], expected)
        assert load(tmp_path / "moe").config.qkv_bias is True


# The tensors that are written


def test_names_are_classic_and_every_tensor_is_that_of_its_source(
    llamas: list[str], tmp_path: Path
):
    tensors = written(mixtral(llamas), tmp_path / "moe")
    base, one, two = (load_file(Path(path) / "model.safetensors") for path in llamas)
    expected = {name: tensor for name, tensor in base.items() if ".mlp." not in name}
    for layer in range(2):
        block = f"model.layers.{layer}.block_sparse_moe"
        for number, source in enumerate((one, two)):
            mlp = f"model.layers.{layer}.mlp"
            weights = f"{block}.experts.{number}"
            expected[f"{weights}.w1.weight"] = source[f"{mlp}.gate_proj.weight"]
            expected[f"{weights}.w2.weight"] = source[f"{mlp}.down_proj.weight"]
            expected[f"{weights}.w3.weight"] = source[f"{mlp}.up_proj.weight"]
        expected[f"{block}.gate.weight"] = tensors[f"{block}.gate.weight"]
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor), name


def test_names_of_qwen_are_classic(tmp_path: Path):
    qwen2 = save_dense(tmp_path / "qwen2", "qwen2")
    qwen3 = save_dense(tmp_path / "qwen3", "qwen3")
    shared = {"shared_experts": [expert(qwen2)]}
    for source, more in ((qwen2, shared), (qwen3, {})):
        config = {
            "base_model": source,
            "gate_mode": "random",
            "experts": [expert(source)] * 2,
            **more,
        }
        tensors = written(config, tmp_path / "moe", overwrite=True)
        block = "model.layers.1.mlp"
        names = {name for name in tensors if name.startswith(block)}
        expected = {f"{block}.gate.weight"}
        for part in ("gate_proj", "up_proj", "down_proj"):
            expected |= {f"{block}.experts.{n}.{part}.weight" for n in range(2)}
            if more:
                expected.add(f"{block}.shared_expert.{part}.weight")
        if more:
            expected.add(f"{block}.shared_expert_gate.weight")
        assert names == expected


def test_shards_and_dtype(llamas: list[str], tmp_path: Path):
    whole = written(mixtral(llamas, dtype="bfloat16"), tmp_path / "whole")
    write_moe(mixtral(llamas, dtype="bfloat16"), tmp_path / "shards", shard_bytes=4_000)
    index = json.loads((tmp_path / "shards/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == whole.keys()
    assert len(set(index["weight_map"].values())) > 2
    assert {tensor.dtype for tensor in whole.values()} == {torch.bfloat16}
    assert load(tmp_path / "shards").dtype == torch.bfloat16


def test_a_value_that_the_dtype_cannot_hold_is_refused(tmp_path: Path):
    model = dense("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 2] = 1e6
    model.save_pretrained(tmp_path / "dense")
    save_tokenizer(tmp_path / "dense")
    source = str(tmp_path / "dense")
    config = {
        "base_model": source,
        "gate_mode": "random",
        "dtype": "float16",
        "experts": [expert(source)] * 2,
    }
    with pytest.raises(
        CheckpointError, match=r"w3\.weight: has values that float16 cannot hold"
    ):
        write_moe(config, tmp_path / "moe")
    assert not (tmp_path / "moe").exists()


def test_models_without_the_prefix_of_their_head_are_read(tmp_path: Path):
    """`LlamaModel.save_pretrained` writes `layers.0...` for `model.layers.0...`."""
    model = dense("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "whole")
    model.model.save_pretrained(tmp_path / "part")
    made = []
    for name in ("whole", "part"):
        save_tokenizer(tmp_path / name)
        source = str(tmp_path / name)
        config = {
            "base_model": source,
            "gate_mode": "random",
            "experts": [expert(source)] * 2,
        }
        made.append(written(config, tmp_path / f"moe-{name}"))
    assert made[0].keys() == made[1].keys()
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


def test_a_head_that_is_stored_and_tied_is_read_as_in_the_dense_model(tmp_path: Path):
    """Whatever transformers makes of such a file, the result must not differ."""
    source = save_dense(tmp_path / "dense", "llama", tie_word_embeddings=True)
    path = tmp_path / "dense/model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = torch.randn(32, 16)
    save_file(tensors, path, metadata={"format": "pt"})
    config = {
        "base_model": source,
        "gate_mode": "random",
        "experts": [expert(source)] * 2,
    }
    write_moe(config, tmp_path / "moe")
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    model = AutoModelForCausalLM.from_pretrained(source)
    torch.testing.assert_close(logits(made), logits(model), **CLOSE)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_a_source_may_be_a_model_with_an_adapter(llamas: list[str], tmp_path: Path):
    """An expert is what peft's merge gives, and prompts are read by the base with its adapter."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    lora = LoraConfig(
        r=2, target_modules=["up_proj", "v_proj"], init_lora_weights=False
    )
    adapted = get_peft_model(load(llamas[0]), lora)
    adapted.save_pretrained(tmp_path / "lora")
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    save_tokenizer(tmp_path / "merged")
    with_adapter = f"{llamas[0]}+{tmp_path / 'lora'}"
    made = []
    for source in (with_adapter, str(tmp_path / "merged")):
        config = mixtral([source, source, llamas[1]])
        made.append(written(config, tmp_path / f"moe-{len(made)}"))
    assert made[0].keys() == made[1].keys()
    for name, tensor in made[0].items():
        torch.testing.assert_close(tensor, made[1][name], rtol=1e-4, atol=1e-6)


# The whole checkpoint


def test_the_checkpoint_generates_and_brings_what_belongs_to_the_base(
    llamas: list[str], tmp_path: Path
):
    base = tmp_path / "base"
    dense("llama").save_pretrained(base)
    save_tokenizer(base)
    (base / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    write_moe(mixtral([str(base), *llamas[1:]]), tmp_path / "moe")
    model = load(tmp_path / "moe")
    generated = model.generate(IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert generated.shape == (1, IDS.shape[1] + 4)
    # With a cache or without, the next token is the same.
    best = logits(model, generated[:, :-1])[0, -1].argmax()
    assert best == generated[0, -1]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "moe")
    message = [{"role": "user", "content": "abc"}]
    assert tokenizer.apply_chat_template(message, tokenize=False) == "abc"
    assert (tmp_path / "moe/generation_config.json").exists()
    card = (tmp_path / "moe/README.md").read_text()
    assert "| base | mit |" in card and "| 1 | not stated |" in card
    assert str(tmp_path) not in card
    again = written_again(tmp_path / "moe", tmp_path / "again")
    first = load_file(tmp_path / "moe/model.safetensors")
    assert all(torch.equal(first[name], again[name]) for name in first)


def written_again(folder: Path, out: Path) -> dict[str, torch.Tensor]:
    """Build the checkpoint that a folder's own configuration describes."""
    write_moe(folder / "mergekit_moe_config.yml", out)
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_the_config_is_what_its_class_writes(kind: str, tmp_path: Path):
    """Nothing is left to a default: theta of Mixtral's class is another one than Llama's."""
    source = save_dense(tmp_path / "dense", kind)
    # As older versions write it: without what their class has as a default.
    path = tmp_path / "dense/config.json"
    content = json.loads(path.read_text())
    del content["rope_parameters"]
    content["rope_theta"] = 123.0
    path.write_text(json.dumps(content))
    config: dict[str, Any] = {
        "base_model": source,
        "gate_mode": "random",
        "experts": [expert(source)] * 2,
    }
    if kind == "qwen2":
        config["shared_experts"] = [expert(source)]
    write_moe(config, tmp_path / "moe")
    stated = json.loads((tmp_path / "moe/config.json").read_text())
    loaded = AutoConfig.from_pretrained(tmp_path / "moe")
    assert loaded.rope_parameters == {"rope_type": "default", "rope_theta": 123.0}
    assert loaded.num_experts_per_tok == 2 and loaded.num_experts == 2
    assert loaded.tie_word_embeddings is False
    if kind in ("qwen2", "qwen3"):
        assert loaded.norm_topk_prob is True and loaded.decoder_sparse_step == 1
    # Each key is one of the class, or one that transformers 4 has in place of `rope_parameters`.
    known = {*loaded.to_dict(), "rope_theta", "num_experts", "head_dim"}
    assert set(stated) <= known
    fresh = type(loaded)(**stated).to_dict()
    for key, value in loaded.to_dict().items():
        if key not in ("transformers_version", "_name_or_path"):
            assert fresh[key] == value, key


def test_llama_and_mistral_are_experts_of_one_model(tmp_path: Path):
    llama = save_dense(tmp_path / "llama", "llama", 1)
    mistral = save_dense(tmp_path / "mistral", "mistral", 2)
    config = {
        "base_model": mistral,
        "gate_mode": "random",
        "experts": [expert(llama), expert(mistral)],
    }
    write_moe(config, tmp_path / "moe")
    assert load(tmp_path / "moe").config.sliding_window == 4096


# What is refused


@pytest.mark.parametrize(
    ("settings", "keys", "message"),
    [
        ({"attention_bias": True}, {}, r"a Mixtral has no place for .*bias"),
        ({"mlp_bias": True}, {}, r"a Mixtral has no place for .*mlp\.\w+\.bias"),
        ({"hidden_act": "gelu"}, {}, "hidden_act is gelu, silu in"),
        ({"num_hidden_layers": 3}, {}, "num_hidden_layers is 3, 2 in"),
        ({"hidden_size": 32}, {}, "hidden_size is 32, 16 in"),
        ({"intermediate_size": 20}, {}, r"has the shape \[20, 16\]"),
        ({"num_attention_heads": 4, "head_dim": 4}, {}, "num_attention_heads is 4"),
        ({"vocab_size": 40}, {}, "vocab_size is 40, 32 in"),
        ({}, {"architecture": "qwen3"}, "is of type llama, and a Qwen3-MoE is made of"),
        ({}, {"architecture": "mixtal"}, "did you mean 'mixtral'"),
        ({}, {"architecture": "qwen"}, "a Qwen2-MoE has 1, not 0"),
    ],
)
def test_experts_that_do_not_fit_are_refused(
    settings: dict[str, Any],
    keys: dict[str, Any],
    message: str,
    llamas: list[str],
    tmp_path: Path,
):
    other = save_dense(tmp_path / "other", "llama", **settings)
    config = mixtral([llamas[0], llamas[1], other], **keys)
    with pytest.raises(ParetoMergeError, match=message) as raised:
        write_moe(config, tmp_path / "moe")
    assert len(raised.value.parts) == 1 and "\n" not in str(raised.value)
    assert not (tmp_path / "moe").exists()


@pytest.mark.parametrize(
    ("kind", "settings", "shared", "message"),
    [
        ("llama", {"attention_bias": True}, False, "has no place for .*q_proj.bias"),
        ("llama", {"attention_bias": True}, True, "has no place for .*o_proj.bias"),
        ("qwen3", {}, True, "a Qwen3-MoE has none, not 1; move it"),
        ("qwen2", {}, False, "a Qwen2-MoE has 1, not 0; name one"),
        ("llama", {"head_dim": 12}, True, "head_dim is 12, and a Qwen2-MoE has"),
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
            False,
            "windows in some layers, and a Qwen3-MoE in all or none",
        ),
    ],
)
def test_bases_that_the_architecture_cannot_express_are_refused(
    kind: str, settings: dict[str, Any], shared: bool, message: str, tmp_path: Path
):
    source = save_dense(tmp_path / "dense", kind, **settings)
    config: dict[str, Any] = {
        "base_model": source,
        "gate_mode": "random",
        "experts": [expert(source)] * 2,
    }
    if shared:
        config["shared_experts"] = [expert(source)]
    with pytest.raises(ParetoMergeError, match=message):
        write_moe(config, tmp_path / "moe")
    assert not (tmp_path / "moe").exists()


def test_other_architectures_and_lost_heads_are_refused(
    llamas: list[str], pico: Path, tmp_path: Path
):
    from tests.architectures import ARCHITECTURES

    ARCHITECTURES["gpt2"]().save_pretrained(tmp_path / "gpt2")
    for config in (
        mixtral([str(tmp_path / "gpt2"), *llamas[1:]]),
        mixtral([llamas[0], llamas[1], str(tmp_path / "gpt2")]),
    ):
        with pytest.raises(ParetoMergeError, match="is of type gpt2"):
            write_moe(config, tmp_path / "moe")
    dense("llama").model.save_pretrained(tmp_path / "headless")
    config = mixtral([str(tmp_path / "headless"), *llamas[1:]], gate_mode="random")
    with pytest.raises(CheckpointError, match=r"has no lm_head\.weight"):
        write_moe(config, tmp_path / "moe")


def test_other_token_ids_are_refused_and_taken_on_request(
    llamas: list[str], tmp_path: Path
):
    other = save_dense(tmp_path / "other", "llama", 5)
    path = tmp_path / "other/tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(content))
    config = mixtral([llamas[0], llamas[1], other])
    with pytest.raises(CheckpointError, match="2 tokens have other ids") as raised:
        write_moe(config, tmp_path / "moe")
    assert "tokenizer_source" not in str(raised.value)
    plan = write_moe(config, tmp_path / "moe", allow_mismatch=True)
    assert any("2 tokens have other ids" in note for note in plan.notes)


def test_a_folder_is_replaced_on_request_alone_and_never_that_of_a_source(
    llamas: list[str], tmp_path: Path
):
    source = save_dense(tmp_path / "dense", "llama")
    config = mixtral([source, *llamas[1:]])
    write_moe(config, tmp_path / "moe")
    with pytest.raises(CheckpointError, match="--overwrite"):
        write_moe(config, tmp_path / "moe")
    write_moe(config, tmp_path / "moe", overwrite=True)
    with pytest.raises(CheckpointError, match="would replace the source"):
        write_moe(config, tmp_path / "dense", overwrite=True)
    assert load(source)


# The configuration


def test_fields_of_the_python_class_are_checked_like_those_of_a_file(llamas: list[str]):
    config = MoeConfig(llamas[0], (MoeExpert(llamas[1]),), experts_per_token=2)
    with pytest.raises(RecipeError, match="2 of 1 experts"):
        write_moe(config, "nowhere")
