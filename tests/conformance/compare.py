"""Two checkpoint folders, tensor by tensor. Everything here answers with a list of differences, empty where there are none."""

import json
from pathlib import Path
from typing import Any

import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors.torch import load_file
from tokenizers import Tokenizer

TOLERANCE = 1e-5  # of the largest entry: docs/conformance.md
_DEPTH = ("num_hidden_layers", "n_layer")
_TABLES = ("model.embed_tokens.weight", "lm_head.weight")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def differences(ours: Path, oracle: Path, *, by_token: bool = False) -> list[str]:
    """Of names, shapes, dtypes, values, and of the depth and the vocabulary that the config tells.

    by_token: rows of the embedding and the head that belong to one token are compared, whatever their numbers: the
    order of a union's added tokens is a deviation (`union-order`).
    """
    a, b = weights(ours), weights(oracle)
    if by_token:
        a = {
            name: _in_order_of(t, vocabulary(ours), vocabulary(oracle))
            if name in _TABLES
            else t
            for name, t in a.items()
        }
    found = [f"{name}: only in ours" for name in sorted(a.keys() - b.keys())]
    found += [f"{name}: only in the oracle's" for name in sorted(b.keys() - a.keys())]
    for name in sorted(a.keys() & b.keys()):
        found += [f"{name}: {told}" for told in _tensor(a[name], b[name])]
    mine, other = _json(ours / "config.json"), _json(oracle / "config.json")
    keys = (*_DEPTH, "vocab_size")
    found += [
        f"config.json: {key}: ours {mine.get(key)}, oracle {other.get(key)}"
        for key in keys
        if mine.get(key) != other.get(key)
    ]
    return found


def _in_order_of(
    table: torch.Tensor, ours: dict[str, int], oracle: dict[str, int]
) -> torch.Tensor:
    """The rows of `table` moved to the numbers that the oracle gives to their tokens."""
    if ours.keys() != oracle.keys() or max(oracle.values()) >= len(table):
        return table  # tokenizer_differences tells it better
    out = table.clone()
    for token, number in oracle.items():
        out[number] = table[ours[token]]
    return out


def relative_error(ours: torch.Tensor, oracle: torch.Tensor) -> float:
    """max |a - b| / max |b|; where b is 0 throughout, max |a|."""
    a, b = ours.double(), oracle.double()
    scale = b.abs().max().item()
    return (a - b).abs().max().item() / (scale or 1.0)


def _tensor(ours: torch.Tensor, oracle: torch.Tensor) -> list[str]:
    if ours.shape != oracle.shape or ours.dtype != oracle.dtype:
        return [
            f"ours {ours.dtype} {list(ours.shape)}, oracle {oracle.dtype} {list(oracle.shape)}"
        ]
    if not torch.isfinite(oracle).all():
        return ["the oracle's is not finite: a deviation, not a comparison"]
    if oracle.dtype in (torch.bfloat16, torch.float16):
        apart = int((_ordinal(ours) - _ordinal(oracle)).abs().max())
        return [f"{apart} units in the last place apart"] if apart > 1 else []
    error = relative_error(ours, oracle)
    if error <= TOLERANCE:
        return []
    wrong = (
        ((ours - oracle).abs() > TOLERANCE * oracle.abs().max()).double().mean().item()
    )
    return [f"relative error {error:.2g} in {wrong:.1%} of the entries"]


def _ordinal(tensor: torch.Tensor) -> torch.Tensor:
    """16-bit floats numbered in the order of their values, 0 and -0 alike."""
    bits = tensor.contiguous().view(torch.int16).to(torch.int32)
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


def vocabulary(folder: Path) -> dict[str, int]:
    vocabulary: dict[str, int] = Tokenizer.from_file(
        str(folder / "tokenizer.json")
    ).get_vocab()
    return vocabulary


def chat_template(folder: Path) -> str:
    """From the file of its own, where newer writers put it, or from the config."""
    file = folder / "chat_template.jinja"
    return (
        file.read_text(encoding="utf-8")
        if file.is_file()
        else _json(folder / "tokenizer_config.json").get("chat_template", "")
    )


def rendered(folder: Path) -> str:
    """A short conversation in the words of the folder's chat template, as transformers renders it."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    messages = [
        {"role": role, "content": role[0]}
        for role in ("system", "user", "assistant", "user")
    ]
    return environment.from_string(chat_template(folder)).render(
        messages=messages, add_generation_prompt=True, bos_token="BOS", eos_token="EOS"
    )


def tokenizer_differences(
    ours: Path, oracle: Path, *, template: bool = True
) -> list[str]:
    """Of the set of tokens, the numbers in use and, with `template`, the chat template."""
    a, b = vocabulary(ours), vocabulary(oracle)
    found = [
        f"token {t!r}: only in {'ours' if t in a else 'the oracle'}"
        for t in sorted(a.keys() ^ b.keys())
    ]
    if sorted(a.values()) != sorted(b.values()):
        found.append(
            f"numbers of the tokens: ours up to {max(a.values())}, oracle up to {max(b.values())}"
        )
    if template and rendered(ours) != rendered(oracle):
        found.append(
            f"chat template: ours renders {rendered(ours)!r}, oracle {rendered(oracle)!r}"
        )
    return found


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
