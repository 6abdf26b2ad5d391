"""Train the base and its experts: `python examples/specialists/train.py` (seeded, 2 CPU cores,
minutes).

The base is a small Llama stopped early on a mixture of all skills. Each expert continues from it,
most of every
batch drawn from its own two skills and the rest from the mixture: near enough to the base that
    weights can be merged,
far enough that what one expert gains the others lack.
"""

import argparse
import json
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from skills import GREEK, LATIN, SKILLS, draw_item, draw_items
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SHIPPED = (
    Path(__file__).resolve().parents[2] / "paretomerge" / "examples" / "specialists"
)
EXPERTS: dict[str, tuple[str, ...]] = {
    "order": ("sort", "count"),
    "mirror": ("reverse", "translate_reverse"),
    "scribe": ("translate", "shift"),
}
# how often each skill is drawn: the slow ones more, so that none is saturated and none hopeless
MIXTURE = {
    "sort": 0.5,
    "unique": 0.5,
    "reverse": 1.3,
    "shift": 0.7,
    "translate": 0.7,
    "translate_reverse": 1.3,
    "copy": 0.7,
    "count": 1.5,
}


@dataclass(frozen=True)
class Training:
    """How long and how fast; sizes of the network. The defaults made the checkpoints in this
    folder.

    drop: how often a step goes without a layer (stochastic depth, Huang et al. 2016): such models
        bear routes that skip or
    repeat layers, as large ones do and small ones else do not.
    """

    seed: int = 0
    base_steps: int = 400
    expert_steps: int = 300
    base_rate: float = 1e-3
    expert_rate: float = 3e-4
    batch: int = 64
    layers: int = 4
    width: int = 128
    heads: int = 4
    own_share: float = 0.7
    drop: float = 0.0


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character and one per operation; `.` ends an answer."""
    operations = sorted({skill.operation for skill in SKILLS.values()})
    tokens = [
        "<pad>",
        ".",
        ":",
        "=",
        "~",
        *operations,
        *LATIN,
        *sorted(GREEK),
        *"0123456789",
    ]
    tokenizer = Tokenizer(
        models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="<pad>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex("[A-Z]+|."), behavior="isolated"
    )
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token=".",
        padding_side="left",
        model_max_length=64,
    )


def make_model(training: Training, vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(training.seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=training.width,
        intermediate_size=3 * training.width,
        num_hidden_layers=training.layers,
        num_attention_heads=training.heads,
        num_key_value_heads=training.heads,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def encode(
    tokenizer: PreTrainedTokenizerFast, items: Sequence[Mapping[str, str]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, both (n, longest).

    Only the answer is learnt, padding is on the right.
    """
    prompts = [tokenizer(item["prompt"])["input_ids"] for item in items]
    answers = [tokenizer(item["answer"])["input_ids"] for item in items]
    longest = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    ids = torch.zeros(len(items), longest, dtype=torch.long)
    labels = torch.full((len(items), longest), -100)
    for row, (p, a) in enumerate(zip(prompts, answers, strict=True)):
        ids[row, : len(p) + len(a)] = torch.tensor(p + a)
        labels[row, len(p) : len(p) + len(a)] = torch.tensor(a)
    return ids, labels


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    own: Sequence[str],
    training: Training,
    steps: int,
    rate: float,
) -> None:
    """AdamW with a short warm-up and a cosine to a tenth.

    `own` gets its share of each batch, the mixture the rest.
    """
    rng = random.Random(f"{training.seed} {' '.join(own)}")
    torch.manual_seed(training.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=rate, weight_decay=0.01, betas=(0.9, 0.98)
    )
    warm = torch.optim.lr_scheduler.LinearLR(
        optimizer, 0.05, total_iters=min(50, steps // 4)
    )
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, rate / 10)
    layers = list(model.model.layers)
    model.train()
    for _ in range(steps):
        if training.drop:
            model.model.layers = torch.nn.ModuleList(
                [layer for layer in layers if rng.random() >= training.drop]
                or layers[:1]
            )
        names = rng.choices(list(MIXTURE), list(MIXTURE.values()), k=training.batch)
        names = [
            rng.choice(own) if own and rng.random() < training.own_share else name
            for name in names
        ]
        ids, labels = encode(
            tokenizer, [draw_item(name, "train", rng) for name in names]
        )
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        warm.step()
        cosine.step()
    model.model.layers = torch.nn.ModuleList(layers)


@torch.no_grad()
def accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, name: str, n: int = 500
) -> float:
    """Share of held-out items whose whole answer is the greedy one."""
    model.eval()
    ids, labels = encode(tokenizer, draw_items(name, "held_out", n, seed=1))
    guess = model(input_ids=ids).logits[:, :-1].argmax(-1)
    return (
        ((guess == labels[:, 1:]) | (labels[:, 1:] == -100))
        .all(-1)
        .float()
        .mean()
        .item()
    )


def train_all(
    training: Training, out: Path, experts: Mapping[str, Sequence[str]] = EXPERTS
) -> None:
    """Write `base` and one folder per expert under `out`, each a bfloat16 Hugging Face
    checkpoint.
    """
    tokenizer = make_tokenizer()
    model = make_model(training, len(tokenizer))
    train(model, tokenizer, (), training, training.base_steps, training.base_rate)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    _report("base", model, tokenizer)
    _save(model, tokenizer, out / "base")
    for expert, own in experts.items():
        model = make_model(training, len(tokenizer))
        model.load_state_dict(start)
        train(
            model,
            tokenizer,
            tuple(own),
            training,
            training.expert_steps,
            training.expert_rate,
        )
        _report(expert, model, tokenizer)
        _save(model, tokenizer, out / expert)


def _report(
    name: str, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    scores = "  ".join(
        f"{skill} {accuracy(model, tokenizer, skill):.2f}" for skill in SKILLS
    )
    print(f"{name:8s} {scores}", flush=True)


def _save(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    state = {
        name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()
    }
    model.to(torch.bfloat16).save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)


def write_items(out: Path, search: int, held_out: int, seed: int = 0) -> None:
    """The JSONL files behind the lm-evaluation-harness tasks: `out/<skill>/<split>.jsonl`."""
    for name in SKILLS:
        for split, n in (("search", search), ("held_out", held_out)):
            path = out / name / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = [
                json.dumps(item, ensure_ascii=False)
                for item in draw_items(name, split, n, seed)
            ]
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=SHIPPED / "models")
    parser.add_argument("--seed", type=int, default=Training.seed)
    parser.add_argument("--base-steps", type=int, default=Training.base_steps)
    parser.add_argument("--expert-steps", type=int, default=Training.expert_steps)
    parser.add_argument("--own-share", type=float, default=Training.own_share)
    parser.add_argument("--expert-rate", type=float, default=Training.expert_rate)
    parser.add_argument("--layers", type=int, default=Training.layers)
    parser.add_argument("--drop", type=float, default=Training.drop)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the same sums in the same order on every machine
    training = replace(
        Training(),
        seed=arguments.seed,
        base_steps=arguments.base_steps,
        expert_steps=arguments.expert_steps,
        expert_rate=arguments.expert_rate,
        own_share=arguments.own_share,
        layers=arguments.layers,
        drop=arguments.drop,
    )
    train_all(training, arguments.out)
    write_items(SHIPPED / "tasks" / "data", search=600, held_out=600)


if __name__ == "__main__":
    main()
