"""What scoring a merge costs beside its forward passes, and against the harness's own `hf` model: `python benchmarks/evaluation.py`.

First the shipped specialists: seconds to build three tasks of 600 items, and, merge after merge, the share of what is not forward
passes (goal: under 10 %). Then a Llama of random weights (4 layers, width 256, 8,000 tokens; prompts of single characters) on
one thread: the same requests through lm-evaluation-harness's HFLM and through ours, both warm, in turns; medians of three.
"""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from paretomerge.evaluate.evaluator import Candidate
from paretomerge.evaluate.harness import HarnessEvaluator
from paretomerge.evaluate.inference.language_model import ResidentLM
from paretomerge.evaluate.tasks import HarnessTask, TaskLoader

ROOT = Path(__file__).resolve().parent.parent
SPECIALISTS = ROOT / "examples" / "specialists"
ROUNDS, ITEMS, BATCH = 3, 12, 16
KINDS = {
    "four endings": (0, 80, 25),
    "five shots, short answers": (0, 400, 4),
    "five shots, one token": (0, 400, 1),
    "the same five shots for all, short answers": (330, 70, 4),
    "the same five shots for all, one token": (330, 70, 1),
    "written answers": (0, 60, 0),
    "written answers, the same five shots for all": (330, 60, 0),
}
"""Requests -> characters that all prompts begin with, of the prompt behind them, and of an answer (0: it is written)."""


def specialists() -> None:
    """Build, forward, everything else."""
    folder = SPECIALISTS / "models" / "scribe"
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    forward = [0.0, 0.0]
    model.register_forward_pre_hook(lambda *_: forward.__setitem__(0, time.perf_counter()))
    model.register_forward_hook(
        lambda *_: forward.__setitem__(1, forward[1] + time.perf_counter() - forward[0])
    )
    since = time.perf_counter()
    tasks = {name: HarnessTask(name) for name in ("sort", "reverse", "translate")}
    splits = {"search": "search", "held_out": "held_out"}
    evaluator = HarnessEvaluator(
        tasks, TaskLoader(SPECIALISTS / "tasks", ROOT, splits), batch_size=128
    )
    built = time.perf_counter() - since
    live = Candidate(model, tokenizer, {})
    evaluator.evaluate(live, "search")
    shares, seconds = [], []
    for _ in range(2 * ROUNDS):
        forward[1], since = 0.0, time.perf_counter()
        evaluator.evaluate(live, "search")
        seconds.append(time.perf_counter() - since)
        shares.append(1 - forward[1] / seconds[-1])
    print(
        f"specialists: built in {built:.1f} s; {statistics.median(seconds):.2f} s a merge, of which",
        end=" ",
    )
    print(f"{statistics.median(shares):.1%} is not forward passes (goal: under 10 %)\n")


def requests(kind: str) -> tuple[str, list[Any]]:
    """The method of the harness's model, and its requests."""
    rng = random.Random(0)

    def text(n: int) -> str:
        return "".join(rng.choices("abcdefghijkl", k=n))

    head, length, answer = KINDS[kind]
    shots = text(head)
    if not answer:
        settings = {"until": ["e", "kk", "ab"], "max_gen_toks": 48}
        return "generate_until", [
            SimpleNamespace(args=(shots + text(rng.randint(length // 2, length)), settings))
            for _ in range(ITEMS)
        ]
    found = []
    for _ in range(ITEMS):
        context = shots + text(length + rng.randint(-length // 5, length // 5))
        found += [SimpleNamespace(args=(context, letter + text(answer - 1))) for letter in "abcd"]
    return "loglikelihood", found


def against() -> None:
    """The table of ratios."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(SPECIALISTS / "models" / "scribe")
    settings = LlamaConfig(
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        vocab_size=8000,
    )
    model = LlamaForCausalLM(settings).eval()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    theirs, ours = (
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH),
        ResidentLM(model, tokenizer, BATCH),
    )
    print(
        "| requests | times as fast as the harness's `hf` | largest difference of a log-probability |\n|---|---:|---:|"
    )
    for kind in KINDS:
        method, asked = requests(kind)
        told = [getattr(lm, method)(asked, disable_tqdm=True) for lm in (theirs, ours)]
        seconds = [
            [timed(getattr(lm, method), asked) for lm in (theirs, ours)] for _ in range(ROUNDS)
        ]
        ratio = statistics.median(a / b for a, b in seconds)
        print(f"| {kind} | {ratio:.1f} | {difference(*told)} |", flush=True)


def difference(one: Sequence[Any], other: Sequence[Any]) -> str:
    if isinstance(one[0], str):
        return (
            "the same texts"
            if list(one) == list(other)
            else f"{sum(a != b for a, b in zip(one, other, strict=True))} texts differ"
        )
    assert all(a[1] == b[1] for a, b in zip(one, other, strict=True))
    return f"{max(abs(a[0] - b[0]) for a, b in zip(one, other, strict=True)):.0e}"


def timed(call: Callable[..., Any], asked: Sequence[Any]) -> float:
    since = time.perf_counter()
    call(asked, disable_tqdm=True)
    return time.perf_counter() - since


if __name__ == "__main__":
    torch.set_num_threads(1)
    specialists()
    against()
