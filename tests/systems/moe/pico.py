"""Pico dense models of the families that become experts, with the tokenizer of single letters."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from tests.conftest import save_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
IDS = torch.tensor([[5, 9, 3, 17, 4, 22, 8, 2, 30, 11, 6, 7]])


def dense(kind: str, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """A random dense model in float32, whose norms and biases are not all 1 or 0."""
    extra: dict[str, Any] = {"head_dim": 8} if kind == "qwen3" else {}
    config = getattr(transformers, f"{CLASSES[kind]}Config")(
        **{**SIZES, **extra, **settings}
    )
    torch.manual_seed(seed)
    model: PreTrainedModel = getattr(transformers, f"{CLASSES[kind]}ForCausalLM")(
        config
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def save_dense(folder: Path, kind: str, seed: int = 0, **settings: Any) -> str:
    """Save a dense model with its tokenizer; returns its folder."""
    dense(kind, seed, **settings).save_pretrained(folder)
    save_tokenizer(folder, adds_bos=settings.pop("adds_bos", False))
    return str(folder)


def load(folder: Path | str) -> PreTrainedModel:
    """Load a model as users do; transformers must neither make anything up nor leave it out."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype="auto"
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[kind], (kind, info[kind])
    return model.eval()


def logits(model: PreTrainedModel, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=ids).logits
