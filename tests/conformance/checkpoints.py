"""The models that both sides merge, written without transformers so that both versions of it read the same files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

Weights = dict[str, torch.Tensor]
VOCABULARY = ("<pad>", ".", *"abcdefghijklmnopqrstuvwxyz", *"=:~ ")
EXTRA = ("<|user|>", "<|bot|>")


def llama_shapes(
    layers: int, width: int, rows: int, *, biases: bool = False, tied: bool = False
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama; with biases and tied embeddings, of a Qwen2."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (rows, width),
        "model.norm.weight": (width,),
    }
    if not tied:
        shapes["lm_head.weight"] = (rows, width)
    for layer in (f"model.layers.{i}." for i in range(layers)):
        for name, side in (("q", width), ("k", width // 2), ("v", width // 2)):
            shapes[f"{layer}self_attn.{name}_proj.weight"] = (side, width)
            if biases:
                shapes[f"{layer}self_attn.{name}_proj.bias"] = (side,)
        shapes[f"{layer}self_attn.o_proj.weight"] = (width, width)
        shapes |= {
            f"{layer}mlp.{name}_proj.weight": (2 * width, width)
            for name in ("gate", "up")
        }
        shapes[f"{layer}mlp.down_proj.weight"] = (width, 2 * width)
        shapes |= {
            f"{layer}{name}_layernorm.weight": (width,)
            for name in ("input", "post_attention")
        }
    return shapes


def gpt2_shapes(layers: int, width: int, rows: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (rows, width),
        "transformer.wpe.weight": (32, width),
    }
    norms = [f"transformer.h.{i}.ln_{j}" for i in range(layers) for j in (1, 2)]
    shapes |= {
        f"{norm}.{kind}": (width,)
        for norm in (*norms, "transformer.ln_f")
        for kind in ("weight", "bias")
    }
    sides = {
        "attn.c_attn": (width, 3 * width),
        "attn.c_proj": (width, width),
        "mlp.c_fc": (width, 4 * width),
        "mlp.c_proj": (4 * width, width),
    }
    for name, shape in sides.items():
        shapes |= {f"transformer.h.{i}.{name}.weight": shape for i in range(layers)}
        shapes |= {f"transformer.h.{i}.{name}.bias": (shape[1],) for i in range(layers)}
    return shapes


def config(
    kind: str, layers: int, width: int, rows: int, dtype: str, *, tied: bool = False
) -> dict[str, Any]:
    shared = {
        "model_type": kind,
        "torch_dtype": dtype,
        "vocab_size": rows,
        "tie_word_embeddings": tied,
        "eos_token_id": 1,
        "bos_token_id": 1,
    }
    if kind == "gpt2":
        return shared | {
            "architectures": ["GPT2LMHeadModel"],
            "n_layer": layers,
            "n_embd": width,
            "n_head": 2,
            "n_positions": 32,
        }
    return shared | {
        "architectures": [
            "Qwen2ForCausalLM" if kind == "qwen2" else "LlamaForCausalLM"
        ],
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 32,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
    }


def save(
    folder: Path,
    weights: Weights,
    settings: Mapping[str, Any],
    tokens: tuple[str, ...] = VOCABULARY,
    template: str = "",
) -> None:
    """One checkpoint folder, with a tokenizer of single letters; tokens in <> are special."""
    folder.mkdir(parents=True)
    dtype = getattr(torch, settings["torch_dtype"])
    save_file(
        {name: w.to(dtype).contiguous() for name, w in weights.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    _write(folder / "config.json", settings)
    tokenizer = Tokenizer(
        models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="<pad>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    tokenizer.add_special_tokens([t for t in tokens if t.startswith("<")])
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<pad>",
        "pad_token": "<pad>",
        "eos_token": ".",
    }
    _write(
        folder / "tokenizer_config.json",
        named | ({"chat_template": template} if template else {}),
    )


def _write(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=1), encoding="utf-8")


def draw(
    shapes: Mapping[str, tuple[int, ...]],
    generator: torch.Generator,
    around: Weights | None = None,
) -> Weights:
    """Normal weights (norms near 1), or weights that differ from `around` by small normal deltas."""
    if around is not None:
        return {
            name: w + 0.02 * torch.randn(w.shape, generator=generator)
            for name, w in around.items()
        }
    noise = {
        name: 0.05 * torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }
    return {
        name: 1 + w if "norm" in name or "ln_" in name else w
        for name, w in noise.items()
    }


def build(folder: Path) -> Path:
    """All models below `folder`, about 2 MB; see docs/conformance.md for what each is for."""
    generator = torch.Generator().manual_seed(1)
    base = _family(folder, "", "llama", 4, 16, generator)
    _family(folder, "wide-", "llama", 2, 64, generator)
    _family(folder, "qwen-", "qwen2", 3, 16, generator)
    _family(folder, "gpt2-", "gpt2", 3, 16, generator)
    for name, dtype in (
        ("base-bf16", "bfloat16"),
        ("ada-bf16", "bfloat16"),
        ("bob-bf16", "bfloat16"),
        ("cyd-f16", "float16"),
    ):
        save(folder / name, base[name.split("-")[0]], config("llama", 4, 16, 32, dtype))
    save(
        folder / "twin", base["base"], config("llama", 4, 16, 32, "float32")
    )  # every delta is 0
    save(
        folder / "deep",
        draw(llama_shapes(6, 16, 32), generator),
        config("llama", 6, 16, 32, "float32"),
    )
    tied = {name: w for name, w in base["cyd"].items() if name != "lm_head.weight"}
    save(folder / "tied", tied, config("llama", 4, 16, 32, "float32", tied=True))
    broken = {
        name: w.index_fill(0, torch.tensor([3]), torch.nan)
        if name == "model.norm.weight"
        else w
        for name, w in base["ada"].items()
    }
    save(folder / "broken", broken, config("llama", 4, 16, 32, "float32"))
    save(folder / "pickled", base["ada"], config("llama", 4, 16, 32, "float32"))
    torch.save(base["ada"], folder / "pickled" / "pytorch_model.bin")
    (folder / "pickled" / "model.safetensors").unlink()
    grid = {name: (64 * w).round() / 64 for name, w in base["base"].items()}
    save(folder / "grid", grid, config("llama", 4, 16, 32, "float32"))
    steps = {
        name: w + (torch.randint(2, w.shape, generator=generator) - 0.5) / 8
        for name, w in grid.items()
    }
    save(
        folder / "steps", steps, config("llama", 4, 16, 32, "float32")
    )  # every delta is 1/16 or -1/16, exactly
    _with_tokens(folder, base, generator)
    _adapter(folder / "lora", generator)
    return folder


def _family(
    folder: Path,
    prefix: str,
    kind: str,
    layers: int,
    width: int,
    generator: torch.Generator,
) -> dict[str, Weights]:
    rows, tied = len(VOCABULARY), kind != "llama"
    shapes = (
        gpt2_shapes(layers, width, rows)
        if kind == "gpt2"
        else llama_shapes(layers, width, rows, biases=tied, tied=tied)
    )
    family = {"base": draw(shapes, generator)}
    family |= {
        name: draw(shapes, generator, family["base"]) for name in ("ada", "bob", "cyd")
    }
    for name, weights in family.items():
        save(
            folder / f"{prefix}{name}",
            weights,
            config(kind, layers, width, rows, "float32", tied=tied),
        )
    return family


def _with_tokens(
    folder: Path, family: Mapping[str, Weights], generator: torch.Generator
) -> None:
    """`tokens-ada` has two tokens more, `tokens-bob` another one and a shuffled vocabulary, `tokens-cyd` rows without tokens."""
    shuffled = [*VOCABULARY[:2], *reversed(VOCABULARY[2:])]
    vocabularies = {
        "ada": (*VOCABULARY, *EXTRA),
        "bob": (*shuffled, "<|tool|>"),
        "cyd": VOCABULARY,
    }
    rows = {"ada": 34, "bob": 33, "cyd": 40}
    for name, tokens in vocabularies.items():
        weights = dict(family[name])
        order = torch.tensor([VOCABULARY.index(t) for t in tokens if t in VOCABULARY])
        for table in ("model.embed_tokens.weight", "lm_head.weight"):
            more = 0.05 * torch.randn(rows[name] - len(order), 16, generator=generator)
            weights[table] = torch.cat([weights[table][order], more])
        template = (
            "{% for m in messages %}{{ m.content }}.{% endfor %}"
            if name == "ada"
            else ""
        )
        save(
            folder / f"tokens-{name}",
            weights,
            config("llama", 4, 16, rows[name], "float32"),
            tokens,
            template,
        )


def _adapter(folder: Path, generator: torch.Generator) -> None:
    """A LoRA of rank 4 on `base`, as peft writes it."""
    folder.mkdir()
    targets = {
        "q_proj": ("self_attn", 16, 16),
        "v_proj": ("self_attn", 16, 8),
        "down_proj": ("mlp", 32, 16),
    }
    tensors = {}
    for layer in range(4):
        for name, (block, inner, outer) in targets.items():
            prefix = f"base_model.model.model.layers.{layer}.{block}.{name}"
            tensors[f"{prefix}.lora_A.weight"] = 0.1 * torch.randn(
                4, inner, generator=generator
            )
            tensors[f"{prefix}.lora_B.weight"] = 0.1 * torch.randn(
                outer, 4, generator=generator
            )
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "base",
        "r": 4,
        "lora_alpha": 8,
    }
    more = {
        "target_modules": list(targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "fan_in_fan_out": False,
    }
    _write(folder / "adapter_config.json", settings | more)
