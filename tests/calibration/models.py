"""Pico models of several families, with text, and RegMean's formula written down once more."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from tests.conftest import save_tokenizer
from tests.pico import moved

SOURCES = ("one", "two")


def save_gpt2(folder: Path) -> None:
    """A base and two sources of GPT-2, whose layers are transposed and have biases."""
    config = GPT2Config(
        vocab_size=32,
        n_positions=32,
        n_embd=16,
        n_layer=2,
        n_head=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    torch.manual_seed(3)
    model = moved(GPT2LMHeadModel(config), seed=9)
    for seed, name in enumerate(("base", *SOURCES)):
        if seed:
            moved(model, seed)
        model.save_pretrained(folder / name)
        save_tokenizer(folder / name)


def gram_by_hand(
    model: PreTrainedModel, module: str, sequences: list[list[int]]
) -> Tensor:
    """Mean of x x^T at the input of a module, token by token, without batches."""
    layer = model.get_submodule(module)
    seen: list[Tensor] = []
    handle = layer.register_forward_hook(
        lambda _, arguments, __: seen.append(arguments[0].detach()[0].double())
    )
    with torch.no_grad():
        for ids in sequences:
            model(torch.tensor([ids]))
    handle.remove()
    tokens = torch.cat(seen)
    total = torch.zeros(tokens.shape[1], tokens.shape[1], dtype=torch.float64)
    for x in tokens:
        total += torch.outer(x, x)
    return total / len(tokens)


def regmean_by_hand(weights: list[Tensor], grams: list[Tensor], alpha: float) -> Tensor:
    """W^T = (sum G_i)^-1 sum G_i W_i^T, for weights (outputs, inputs)."""
    inputs = weights[0].shape[1]
    left = torch.zeros(inputs, inputs, dtype=torch.float64)
    right = torch.zeros(inputs, weights[0].shape[0], dtype=torch.float64)
    for weight, gram in zip(weights, grams, strict=True):
        scaled = alpha * gram + (1 - alpha) * torch.diag(torch.diag(gram))
        left += scaled
        right += scaled @ weight.double().T
    return torch.linalg.solve(left, right).T
