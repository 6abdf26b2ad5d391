"""Train the experts of the SmolLM2 family: LoRA adapters of the base that build.py writes.

    python -m examples.smollm.train examples/smollm/models/base arithmetic   # an hour on one core
    python -m examples.smollm.train examples/smollm/models/base arithmetic --device cuda

Seeded, in float32 and on one thread, so a run can be repeated. The adapters are committed.
"""

import argparse
import random
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from examples.smollm.skills import EXPERTS, SKILLS
from examples.smollm.skills.splits import Item

ADAPTERS = Path(__file__).parent / "adapters"
STEPS = {"arithmetic": 240, "french": 150, "extraction": 90, "composed": 150}
IGNORED = -100


@dataclass(frozen=True)
class Training:
    """Sizes and rates. The defaults made the committed adapters.

    Attributes:
        steps: optimiser steps; None: as many as the skill needs.
        batch: dialogues per step.
        rate: the learning rate, which falls linearly to a twentieth after a short rise.
    """

    steps: int | None = None
    batch: int = 16
    rate: float = 8e-4
    rank: int = 8
    seed: int = 0
    device: str = "cpu"


def train(base: Path, skill: str, training: Training, out: Path) -> list[float]:
    """Train one adapter, and write it to `out`; the loss of each step."""
    torch.manual_seed(training.seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = with_adapter(model.to(training.device), training)
    steps = training.steps or STEPS[skill]
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=training.rate, weight_decay=0.0)
    rise = torch.optim.lr_scheduler.LinearLR(
        optimizer, 0.1, total_iters=max(steps // 20, 1)
    )
    fall = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=steps)
    rng = random.Random(f"{training.seed} {skill} training")
    losses = []
    since = time.monotonic()
    for step in range(1, steps + 1):
        items = [SKILLS[skill]("train", rng) for _ in range(training.batch)]
        ids, labels = encode(tokenizer, items, training.device)
        loss = adapted(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        rise.step()
        fall.step()
        losses.append(loss.item())
        left = (time.monotonic() - since) / step * (steps - step) / 60
        print(
            f"{skill} {step}/{steps}: loss {losses[-1]:.3f}, {left:.0f} min left",
            flush=True,
        )
    save(adapted, out)
    return losses


def with_adapter(model: PreTrainedModel, training: Training) -> PeftModel:
    """The model with a fresh adapter on all linear layers of its blocks."""
    config = LoraConfig(
        r=training.rank,
        lora_alpha=2 * training.rank,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def save(adapted: PeftModel, out: Path) -> None:
    """Write the adapter in bfloat16; its base is named where it is used, not here."""
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    adapted.peft_config["default"].base_model_name_or_path = "SmolLM2-135M-Instruct"
    adapted.save_pretrained(str(out))
    (out / "README.md").unlink(missing_ok=True)  # peft's empty model card


def encode(
    tokenizer: PreTrainedTokenizerBase, items: list[Item], device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, both (items, longest). Only the answers are learnt."""
    dialogues = [encode_dialogue(tokenizer, item) for item in items]
    longest = max(len(prompt) + len(answer) for prompt, answer in dialogues)
    ids = torch.zeros(len(items), longest, dtype=torch.long)
    labels = torch.full((len(items), longest), IGNORED)
    for row, (prompt, answer) in enumerate(dialogues):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return ids.to(device), labels.to(device)


def encode_dialogue(
    tokenizer: PreTrainedTokenizerBase, item: Item
) -> tuple[list[int], list[int]]:
    """Tokens of the prompt in the model's chat format, and of the answer with its end."""
    messages = [{"role": "user", "content": item["prompt"]}]
    prompt = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    answer = f"{item['answer']}{tokenizer.eos_token}"
    return (
        tokenizer(prompt, add_special_tokens=False)["input_ids"],
        tokenizer(answer, add_special_tokens=False)["input_ids"],
    )


def main() -> None:
    """Train the experts that are named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path)
    parser.add_argument(
        "skills", nargs="*", choices=list(SKILLS), default=list(EXPERTS)
    )
    parser.add_argument("--out", type=Path, default=ADAPTERS)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the same sums in the same order on every machine
    training = replace(Training(), steps=arguments.steps, device=arguments.device)
    for skill in arguments.skills:
        train(arguments.base, skill, training, arguments.out / skill)


if __name__ == "__main__":
    main()
