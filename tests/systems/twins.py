"""Twin-Merging folders for tests, and what they mean by independent arithmetic."""

import json
import shutil
import string
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from paretomerge.systems.twin import TwinModel
from tests.architectures import ARCHITECTURES
from tests.conftest import save_tokenizer
from tests.pico import moved

LETTERS = {"ada": "abcdefgh", "bob": "ijklmnop", "cyd": "qrstuvwx"}
"""The letters that the prompts of a task are made of."""


def prompts_of(letters: str, n: int = 30, seed: int = 0) -> list[str]:
    """Different words of some letters."""
    generator = torch.Generator().manual_seed(seed)
    words = {}
    while len(words) < n:
        length = int(torch.randint(3, 9, (1,), generator=generator))
        picks = torch.randint(len(letters), (length,), generator=generator)
        words["".join(letters[i] for i in picks)] = None
    return list(words)


PROMPTS = {task: prompts_of(letters) for task, letters in LETTERS.items()}


def save_family(
    folder: Path, name: str, settings: Sequence[str] = ("ada", "bob")
) -> None:
    """A base of an architecture and experts that differ from it, in float32."""
    base = moved(ARCHITECTURES[name](), seed=5)
    base.save_pretrained(folder / "base")
    save_tokenizer(folder / "base")
    for seed, expert in enumerate(settings, start=1):
        model = ARCHITECTURES[name]()
        model.load_state_dict(base.state_dict())
        moved(model, seed).save_pretrained(folder / expert)
        save_tokenizer(folder / expert)


def dense_state(
    folder: Path, weights: Sequence[float], dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """theta* + sum_t g_t v_t, from the files alone; in their dtype by default."""
    state = load_file(folder / "shared" / "model.safetensors")
    total = {name: tensor.double() for name, tensor in state.items()}
    for number, weight in enumerate(weights, start=1):
        stored = load_file(folder / f"exclusive-{number}.safetensors")
        for key, tensor in stored.items():
            name, _, kind = key.rpartition(".")
            if kind == "whole":
                total[name] += weight * tensor.double()
            if kind == "left":
                total[name] += (
                    weight * tensor.double() @ stored[f"{name}.right"].double()
                )
    return {name: total[name].to(dtype or state[name].dtype) for name in state}


def dense_model(
    folder: Path, weights: Sequence[float], scratch: Path
) -> PreTrainedModel:
    """The plain model of fixed weights, loaded by transformers."""
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(folder / "shared", scratch)
    state = dense_state(folder, weights)
    save_file(state, scratch / "model.safetensors", metadata={"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(scratch).eval()


def encode(prompts: Sequence[str], left: bool = True) -> dict[str, torch.Tensor]:
    """Token ids and mask of words, padded on one side."""
    tokens = ["<pad>", ".", *string.ascii_lowercase, *"=:~ "]
    longest = max(map(len, prompts))
    ids, mask = [], []
    for prompt in prompts:
        row = [tokens.index(letter) for letter in prompt]
        n = longest - len(row)
        ids.append([0] * n + row if left else row + [0] * n)
        mask.append([0] * n + [1] * len(row) if left else [1] * len(row) + [0] * n)
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def plain_logits(model: PreTrainedModel, prompt: str) -> torch.Tensor:
    """Logits of one unpadded prompt."""
    with torch.no_grad():
        return model(input_ids=encode([prompt])["input_ids"]).logits[0]


def manifest(folder: Path) -> Mapping[str, object]:
    """twin.json."""
    return json.loads((folder / "twin.json").read_text())


def router_by_hand(model: TwinModel, folder: Path, prompt: str) -> torch.Tensor:
    """Weights of the tasks of one prompt, by the formula, from the files."""
    shared = AutoModelForCausalLM.from_pretrained(folder / "shared").eval()
    stored = load_file(folder / "router.safetensors")
    ids = encode([prompt])["input_ids"]
    with torch.no_grad():
        states = shared(input_ids=ids, output_hidden_states=True).hidden_states[-1]
    x = (states[0].mean(0) - stored["mean"]) / stored["deviation"]
    for layer in (0, 3):
        x = stored[f"layers.{layer}.weight"] @ x + stored[f"layers.{layer}.bias"]
        x = torch.where(x > 0, x, 0.01 * x)
    logits = stored["layers.6.weight"] @ x + stored["layers.6.bias"]
    exponents = logits.exp()
    return exponents / exponents.sum()
