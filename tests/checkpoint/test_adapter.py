"""Adapters in peft's format: the model plus scale B A, in memory, the same for any block."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from paretomerge.checkpoint.adapter import AdaptedCheckpoint
from paretomerge.checkpoint.reader import Checkpoint
from paretomerge.errors import CheckpointError
from paretomerge.merging.engine import merge, merged_tensors
from paretomerge.merging.plan.make import make_plan
from paretomerge.recipe import Recipe

PREFIX = "base_model.model."
Q, UP, HEAD = "model.layers.1.self_attn.q_proj", "model.layers.2.mlp.up_proj", "lm_head"


def adapter(folder: Path, tensors: Mapping[str, torch.Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True)
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(
        {PREFIX + name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    return folder


def factors(
    module: str, shape: tuple[int, int], rank: int = 2, seed: int = 0
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, b = (
        torch.randn(rank, shape[1], generator=generator),
        torch.randn(shape[0], rank, generator=generator),
    )
    return {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}


def alone(model: Path | str, lora: Path | str) -> Recipe:
    return Recipe.from_dict(
        {
            "merge_method": "passthrough",
            "models": [{"model": f"{model}+{lora}"}],
            "dtype": "float32",
        }
    )


def merged(recipe: Recipe, block: int | None = None) -> dict[str, torch.Tensor]:
    return dict(merged_tensors(make_plan(recipe), block=block))


def expect(
    model: Path, changed: Mapping[str, torch.Tensor], got: Mapping[str, torch.Tensor]
) -> None:
    """`changed` for its names, the model's own bits for all others."""
    own = load_file(model / "model.safetensors")
    assert got.keys() == own.keys()
    for name, tensor in own.items():
        if name in changed:
            torch.testing.assert_close(got[name], changed[name], rtol=1e-6, atol=1e-6)
            assert not torch.equal(got[name], tensor.float())
        else:
            assert torch.equal(got[name], tensor.float()), name


@pytest.fixture
def base(pico: Path) -> dict[str, torch.Tensor]:
    return {
        n: t.float() for n, t in load_file(pico / "base" / "model.safetensors").items()
    }


@pytest.mark.parametrize(
    ("config", "scales"),
    [
        ({}, {Q: 3.0, UP: 2.0}),
        ({"use_rslora": True}, {Q: 6 / 2**0.5, UP: 6 / 3**0.5}),
        ({"alpha_pattern": {"q_proj": 10}}, {Q: 5.0, UP: 2.0}),
        ({"alpha_pattern": {r"model\.layers\.[12]\..*": 1}}, {Q: 0.5, UP: 1 / 3}),
        (
            {
                "alpha_pattern": {
                    "proj": 10,
                    "layers.1.self_attn.q_proj": 4,
                    "q_proj": 8,
                }
            },
            {Q: 2.0, UP: 2.0},
        ),
        ({"alpha_pattern": {UP: 0}}, {Q: 3.0, UP: 0.0}),
        ({"lora_alpha": -1.5}, {Q: -0.75, UP: -0.5}),
    ],
)
def test_scale_b_a_is_added(
    pico: Path,
    tmp_path: Path,
    base: dict[str, torch.Tensor],
    config: dict[str, Any],
    scales: dict[str, float],
) -> None:
    tensors = {**factors(Q, (16, 16)), **factors(UP, (32, 16), rank=3)}
    lora = adapter(
        tmp_path / "lora", tensors, **{"rank_pattern": {"up_proj": 3}, **config}
    )
    wanted = {
        f"{m}.weight": base[f"{m}.weight"]
        + s * tensors[f"{m}.lora_B.weight"] @ tensors[f"{m}.lora_A.weight"]
        for m, s in scales.items()
    }
    expect(
        pico / "base",
        {n: t for n, t in wanted.items() if scales[n.removesuffix(".weight")]},
        merged(alone(pico / "base", lora)),
    )


def test_names_of_older_files(
    pico: Path, tmp_path: Path, base: dict[str, torch.Tensor]
) -> None:
    tensors = factors(Q, (16, 16))
    product = 3 * tensors[f"{Q}.lora_B.weight"] @ tensors[f"{Q}.lora_A.weight"]
    lora = adapter(
        tmp_path / "lora",
        {n.replace(".weight", ".default.weight"): t for n, t in tensors.items()},
    )
    expect(
        pico / "base",
        {f"{Q}.weight": base[f"{Q}.weight"] + product},
        merged(alone(pico / "base", lora)),
    )


def test_embedding_factors_are_of_the_transpose(
    pico: Path, tmp_path: Path, base: dict[str, torch.Tensor]
) -> None:
    a, b = torch.randn(2, 32), torch.randn(16, 2)
    lora = adapter(
        tmp_path / "lora",
        {
            "model.embed_tokens.lora_embedding_A": a,
            "model.embed_tokens.lora_embedding_B": b,
        },
    )
    name = "model.embed_tokens.weight"
    expect(
        pico / "base",
        {name: base[name] + 3 * (b @ a).T},
        merged(alone(pico / "base", lora)),
    )


def test_modules_to_save_replace(
    pico: Path, tmp_path: Path, base: dict[str, torch.Tensor]
) -> None:
    head, norm = torch.randn(32, 16), torch.randn(16)
    tensors = {
        f"{HEAD}.modules_to_save.weight": head,
        "model.norm.weight": norm,
        **factors(Q, (16, 16)),
    }
    lora = adapter(tmp_path / "lora", tensors, modules_to_save=["lm_head"])
    product = 3 * tensors[f"{Q}.lora_B.weight"] @ tensors[f"{Q}.lora_A.weight"]
    wanted = {
        "lm_head.weight": head,
        "model.norm.weight": norm,
        f"{Q}.weight": base[f"{Q}.weight"] + product,
    }
    expect(pico / "base", wanted, merged(alone(pico / "base", lora)))


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    GPT2LMHeadModel(
        GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    ).save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def test_conv1d_keeps_its_weight_the_other_way_round(
    gpt2: Path, tmp_path: Path
) -> None:
    attention, square = "transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_proj"
    tensors = {**factors(attention, (48, 16)), **factors(square, (16, 16), seed=1)}
    lora = adapter(tmp_path / "lora", tensors, fan_in_fan_out=True)
    own = load_file(gpt2 / "model.safetensors")
    names = {
        m: m if f"{m}.weight" in own else m.removeprefix("transformer.")
        for m in (attention, square)
    }
    wanted = {
        f"{names[m]}.weight": own[f"{names[m]}.weight"]
        + 3 * (tensors[f"{m}.lora_B.weight"] @ tensors[f"{m}.lora_A.weight"]).T
        for m in (attention, square)
    }
    expect(gpt2, wanted, merged(alone(gpt2, lora)))


def test_a_bias_that_was_trained_too(gpt2: Path, tmp_path: Path) -> None:
    bias = torch.randn(48)
    tensors = {
        **factors("transformer.h.0.attn.c_attn", (48, 16)),
        "transformer.h.0.attn.c_attn.base_layer.bias": bias,
    }
    got = merged(
        alone(
            gpt2,
            adapter(tmp_path / "lora", tensors, fan_in_fan_out=True, bias="lora_only"),
        )
    )
    name = next(n for n in got if n.endswith("h.0.attn.c_attn.bias"))
    assert torch.equal(got[name], bias)


def test_patterns_are_matched_with_pefts_own_names(pico: Path, tmp_path: Path) -> None:
    """The model may have been saved without its head, and so without `model.`."""
    bare = tmp_path / "bare"
    shutil.copytree(pico / "base", bare)
    own = load_file(bare / "model.safetensors")
    save_file(
        {n.removeprefix("model."): t for n, t in own.items()},
        bare / "model.safetensors",
        metadata={"format": "pt"},
    )
    tensors = factors(Q, (16, 16))
    lora = adapter(
        tmp_path / "lora",
        tensors,
        alpha_pattern={f"^{Q}": 8, Q.replace(".", r"\."): 10},
    )
    got = merged(alone(bare, lora))[f"{Q.removeprefix('model.')}.weight"]
    product = tensors[f"{Q}.lora_B.weight"] @ tensors[f"{Q}.lora_A.weight"]
    torch.testing.assert_close(got, own[f"{Q}.weight"].float() + 4 * product)


@pytest.mark.parametrize(
    ("tensors", "config", "told"),
    [
        (
            factors(Q, (16, 16)),
            {"use_dora": True},
            "got DoRA .use_dora.; merge it into its model with peft",
        ),
        (
            factors(Q, (16, 16)),
            {"peft_type": "IA3"},
            "expected a LoRA adapter, got IA3",
        ),
        (factors(Q, (16, 16)), {"peft_type": None}, "expected a LoRA adapter"),
        (
            factors(Q, (16, 16)),
            {"init_lora_weights": "pissa_niter_4"},
            "got 'pissa_niter_4'",
        ),
        (factors(Q, (16, 16)), {"layer_replication": [[0, 2]]}, "replicated layers"),
        (
            factors(Q, (16, 16), rank=3),
            {},
            "adapter_config.json says rank 2, the factors have rank 3",
        ),
        (
            factors(Q, (16, 16)),
            {"rank_pattern": {"q_proj": 4}},
            "adapter_config.json says rank 4",
        ),
        (factors(Q, (16, 16)), {"rank_pattern": {"(": 4}}, "rank_pattern"),
        (factors(Q, (16, 16)), {"rank_pattern": [1]}, "rank_pattern"),
        (factors(Q, (16, 16)), {"alpha_pattern": "x"}, "alpha_pattern"),
        (factors(Q, (16, 16)), {"r": "2"}, "expected numbers for r"),
        (factors(Q, (16, 16)), {"r": 0}, "adapter_config.json says rank 0"),
        (
            factors(Q, (16, 16)),
            {"lora_alpha": None},
            "expected numbers for r, lora_alpha",
        ),
        (
            factors(Q, (16, 16)),
            {"lora_alpha": float("nan")},
            "expected numbers for r, lora_alpha",
        ),
        (factors(Q, (24, 16)), {}, r"expected factors for \[16, 16\], got B \[24, 2\]"),
        (factors(UP, (16, 32)), {}, "was the adapter trained on this model"),
        (
            factors("model.layers.9.self_attn.q_proj", (16, 16)),
            {},
            "the model has no such tensor",
        ),
        ({f"{Q}.lora_A.weight": torch.zeros(2, 16)}, {}, "lora_A and lora_B, got one"),
        ({f"{Q}.lora_B.weight": torch.zeros(16, 2)}, {}, "lora_A and lora_B, got one"),
        (
            {
                f"{Q}.lora_A.weight": torch.zeros(16),
                f"{Q}.lora_B.weight": torch.zeros(16),
            },
            {},
            "expected two matrices",
        ),
        (
            {
                f"{Q}.lora_A.weight": torch.zeros(0, 16),
                f"{Q}.lora_B.weight": torch.zeros(16, 0),
            },
            {"r": 0},
            "expected two matrices",
        ),
        (
            {
                f"{Q}.lora_A.weight": torch.zeros(2, 16, 1),
                f"{Q}.lora_B.weight": torch.zeros(16, 2, 1),
            },
            {},
            "expected two matrices",
        ),
        (
            {f"{HEAD}.weight": torch.zeros(40, 16)},
            {},
            "brings 40 tokens for lm_head.weight, but model.embed_tokens.weight has 32",
        ),
        (
            {f"{Q}.lora_magnitude_vector": torch.zeros(16), **factors(Q, (16, 16))},
            {},
            "the model has no such tensor",
        ),
    ],
)
def test_adapters_that_do_not_fit(
    pico: Path,
    tmp_path: Path,
    tensors: dict[str, torch.Tensor],
    config: dict[str, Any],
    told: str,
) -> None:
    lora = adapter(tmp_path / "lora", tensors, **config)
    with pytest.raises(CheckpointError, match=told) as caught:
        merge(alone(pico / "base", lora), tmp_path / "out")
    assert str(lora) in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lora"]


def test_all_misfits_are_told_together(pico: Path, tmp_path: Path) -> None:
    lora = adapter(
        tmp_path / "lora",
        {
            **factors(Q, (24, 16)),
            **factors(UP, (1, 16)),
            "lm_head.weight": torch.zeros(1),
        },
    )
    with pytest.raises(CheckpointError, match="3 problems"):
        AdaptedCheckpoint(Checkpoint(str(pico / "base")), str(lora))


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (
            lambda f: (f / "adapter_config.json").unlink(),
            "adapter_config.json: not found",
        ),
        (
            lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
            "save the adapter as safetensors",
        ),
        (
            lambda f: (f / "adapter_model.safetensors").write_bytes(b"\0" * 40),
            "not a safetensors file",
        ),
        (
            lambda f: (
                (f / "adapter_model.safetensors").rename(f.parent / "w"),
                (f / "adapter_model.safetensors").symlink_to(f.parent / "w"),
            ),
            "link",
        ),
        (lambda f: shutil.rmtree(f), "there is no such folder"),
    ],
)
def test_broken_adapters_are_named(
    pico: Path, tmp_path: Path, harm: Any, told: str
) -> None:
    lora = adapter(tmp_path / "lora", factors(Q, (16, 16)))
    harm(lora)
    with pytest.raises(CheckpointError, match=told):
        make_plan(alone(pico / "base", lora))


def test_factors_that_are_not_finite_are_named(pico: Path, tmp_path: Path) -> None:
    lora = adapter(
        tmp_path / "lora",
        {
            **factors(Q, (16, 16)),
            f"{Q}.lora_B.weight": torch.full((16, 2), float("inf")),
        },
    )
    with pytest.raises(
        CheckpointError, match=r"lora: .*q_proj\.lora_B\.weight: expected finite"
    ):
        merge(alone(pico / "base", lora), tmp_path / "out")


@pytest.mark.parametrize(
    "method", ["linear", "ties", "dare_ties", "slerp", "model_stock"]
)
def test_the_same_bits_for_any_block(pico: Path, tmp_path: Path, method: str) -> None:
    tensors = {
        **factors(Q, (16, 16)),
        **factors(UP, (32, 16), seed=2),
        **factors(HEAD, (32, 16), seed=3),
    }
    lora = adapter(tmp_path / "lora", tensors)
    parameters = {"linear": {"weight": 1}, "slerp": {"t": 0.3}, "model_stock": {}}.get(
        method, {"weight": 0.7, "density": 0.5}
    )
    models = [{"model": f"{pico}/ada+{lora}"}] + (
        [] if method == "slerp" else [{"model": f"{pico}/bob"}]
    )
    recipe = Recipe.from_dict(
        {
            "merge_method": method,
            "base_model": f"{pico}/base+{lora}",
            "models": models,
            "parameters": parameters,
        }
    )
    whole = merged(recipe)
    for block in (1, 17, 48, 1 << 20):
        other = merged(recipe, block)
        assert all(torch.equal(whole[n], other[n]) for n in whole), block


def test_products_of_many_chunks_are_the_same_for_any_block(tmp_path: Path) -> None:
    """More rows than one product holds, read across the borders of its chunks."""
    torch.manual_seed(0)
    model = tmp_path / "wide"
    model.mkdir()
    (model / "config.json").write_text("{}")
    save_file({"w.weight": torch.randn(300, 1000)}, model / "model.safetensors")
    lora = adapter(tmp_path / "lora", factors("w", (300, 1000)))
    operand = AdaptedCheckpoint(Checkpoint(str(model)), str(lora)).operand("w.weight")
    whole = operand.rows(0, 300)
    for first, end in ((0, 1), (64, 66), (65, 131), (100, 300), (299, 300)):
        assert torch.equal(operand.rows(first, end), whole[first:end])


def test_merged_with_others_and_from_a_file_with_relative_paths(
    pico: Path, tmp_path: Path, base: dict[str, torch.Tensor]
) -> None:
    tensors = factors(Q, (16, 16))
    shutil.copytree(pico / "base", tmp_path / "models" / "base")
    shutil.copytree(pico / "ada", tmp_path / "models" / "ada")
    adapter(tmp_path / "models" / "lora", tensors)
    models = (
        "[{model: base+lora, parameters: {weight: 1}}, "
        "{model: {model: ./ada, lora: ./lora}, parameters: {weight: 3}}]"
    )
    text = f"merge_method: linear\nmodels: {models}\ndtype: float32"
    (tmp_path / "models" / "r.yml").write_text(text)
    recipe = Recipe.load(tmp_path / "models" / "r.yml")
    assert recipe.models[0] == f"{tmp_path}/models/base+{tmp_path}/models/lora"
    merge(recipe, tmp_path / "out")
    got = load_file(tmp_path / "out" / "model.safetensors")
    ada = load_file(pico / "ada" / "model.safetensors")
    product = 3 * tensors[f"{Q}.lora_B.weight"] @ tensors[f"{Q}.lora_A.weight"]
    for name, tensor in got.items():
        wanted = (base[name] + 3 * ada[name].float()) / 4 + (
            product if name == f"{Q}.weight" else 0
        )
        torch.testing.assert_close(tensor, wanted, rtol=1e-5, atol=1e-6)
    assert Recipe.load(tmp_path / "out" / "mergekit_config.yml") == recipe
    front = (tmp_path / "out" / "README.md").read_text().split("---")[1]
    assert str(tmp_path) not in front


def test_an_adapter_that_changes_while_it_is_read(
    pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = adapter(tmp_path / "lora", factors(Q, (16, 16)))
    plan = make_plan(alone(pico / "base", lora))
    (lora / "adapter_model.safetensors").write_bytes(
        (lora / "adapter_model.safetensors").read_bytes()
    )
    with pytest.raises(CheckpointError, match="changed while it was read"):
        next(iter(plan.weights.values())).check_unchanged()


def test_a_plus_sign_may_belong_to_a_path(pico: Path, tmp_path: Path) -> None:
    shutil.copytree(pico / "base", tmp_path / "a+b")
    lora = adapter(tmp_path / "l", factors(Q, (16, 16)))
    plain = Recipe.from_dict(
        {"merge_method": "passthrough", "models": [{"model": str(tmp_path / "a+b")}]}
    )
    assert make_plan(plain).jobs
    assert make_plan(alone(tmp_path / "a+b", lora)).jobs
    for name in ("+lora", f"{pico}/base+"):
        with pytest.raises(CheckpointError, match="one side of the plus sign is empty"):
            make_plan(
                Recipe.from_dict(
                    {"merge_method": "passthrough", "models": [{"model": name}]}
                )
            )
