"""docs/lab/evaluation.md: what scoring costs beside forward passes, and beside the harness's own
model.

    python -m benchmarks.evaluation

First the shipped specialists: seconds to build three tasks of 600 examples and, merge after merge,
the share of the time that is not forward passes (goal: under 10 %). Then a Llama of random weights
(4 layers, width 256, 8,000 tokens; prompts of single characters) on one thread: the same requests
through lm-evaluation-harness's HFLM and through ours, both warm, in turns; medians of three.
"""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

from benchmarks.reporting import markdown_row, markdown_table
from paretomerge.evaluate.evaluator import Candidate
from paretomerge.evaluate.harness import HarnessEvaluator
from paretomerge.evaluate.inference.language_model import ResidentLM
from paretomerge.evaluate.tasks import HarnessTask, TaskLoader
from paretomerge.examples import SPECIALISTS

ROUNDS = 3
N_EXAMPLES = 12
BATCH_SIZE = 16
SCRIBE = SPECIALISTS / "models" / "scribe"


@dataclass(frozen=True)
class Workload:
    """Lengths of requests, in characters.

    Attributes:
        shared: text that all prompts begin with.
        prompt: text of each prompt behind it.
        answer: of an answer whose likelihood is asked; 0: the answer is generated.
    """

    shared: int
    prompt: int
    answer: int


WORKLOADS = {
    "four endings": Workload(0, 80, 25),
    "five shots, short answers": Workload(0, 400, 4),
    "five shots, one token": Workload(0, 400, 1),
    "the same five shots for all, short answers": Workload(330, 70, 4),
    "the same five shots for all, one token": Workload(330, 70, 1),
    "written answers": Workload(0, 60, 0),
    "written answers, the same five shots for all": Workload(330, 60, 0),
}
"""Row of the table -> its requests."""


# ----- the share of forward passes


class ForwardTimer:
    """Adds up the seconds of a model's forward passes."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.seconds = 0.0
        self._since = 0.0
        model.register_forward_pre_hook(self._start)
        model.register_forward_hook(self._stop)

    def _start(self, *_: object) -> None:
        self._since = time.perf_counter()

    def _stop(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._since


def specialists() -> str:
    """Seconds to build the tasks and to score a merge, and the share that is not forward passes."""
    model = AutoModelForCausalLM.from_pretrained(SCRIBE, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(SCRIBE)
    timer = ForwardTimer(model)
    since = time.perf_counter()
    tasks = {name: HarnessTask(name) for name in ("sort", "reverse", "translate")}
    splits = {"search": "search", "held_out": "held_out"}
    loader = TaskLoader(SPECIALISTS / "tasks", SPECIALISTS, splits)
    evaluator = HarnessEvaluator(tasks, loader, batch_size=128)
    built = time.perf_counter() - since
    candidate = Candidate(model, tokenizer, {})
    evaluator.evaluate(candidate, "search")  # warm
    shares, seconds = [], []
    for _ in range(2 * ROUNDS):
        timer.seconds = 0.0
        since = time.perf_counter()
        evaluator.evaluate(candidate, "search")
        whole = time.perf_counter() - since
        seconds.append(whole)
        shares.append(1 - timer.seconds / whole)
    return (
        f"specialists: built in {built:.1f} s; {statistics.median(seconds):.2f} s a merge, of "
        "which "
        f"{statistics.median(shares):.1%} is not forward passes (goal: under 10 %)"
    )


# ----- beside the harness's own model


def compare_models() -> None:
    """Print the table of ratios."""
    tokenizer = AutoTokenizer.from_pretrained(SCRIBE)
    model = random_llama(tokenizer.eos_token_id)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH_SIZE)
    ours = ResidentLM(model, tokenizer, BATCH_SIZE)
    header = ["requests", "times as fast as the harness's `hf`"]
    header.append("largest difference of a log-probability")
    print(markdown_table(header, []))
    for name, workload in WORKLOADS.items():
        method, requests = make_requests(workload)
        their_method, our_method = getattr(theirs, method), getattr(ours, method)
        their_answers = their_method(requests, disable_tqdm=True)
        our_answers = our_method(requests, disable_tqdm=True)
        ratios = []
        for _ in range(ROUNDS):
            their_seconds = seconds_of(their_method, requests)
            ratios.append(their_seconds / seconds_of(our_method, requests))
        ratio = f"{statistics.median(ratios):.1f}"
        print(
            markdown_row([name, ratio, difference(their_answers, our_answers)]),
            flush=True,
        )


def random_llama(eos_token_id: int) -> LlamaForCausalLM:
    """A small Llama of random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        vocab_size=8000,
    )
    model = LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = eos_token_id
    return model


def make_requests(workload: Workload) -> tuple[str, list[Any]]:
    """The method of the harness's model, and its requests."""
    rng = random.Random(0)

    def text(length: int) -> str:
        return "".join(rng.choices("abcdefghijkl", k=length))

    requests = []
    shared = text(workload.shared)
    length = workload.prompt
    if not workload.answer:
        settings = {"until": ["e", "kk", "ab"], "max_gen_toks": 48}
        for _ in range(N_EXAMPLES):
            prompt = shared + text(rng.randint(length // 2, length))
            requests.append(SimpleNamespace(args=(prompt, settings)))
        return "generate_until", requests
    for _ in range(N_EXAMPLES):
        change = rng.randint(-length // 5, length // 5)
        prompt = shared + text(length + change)
        for letter in "abcd":
            answer = letter + text(workload.answer - 1)
            requests.append(SimpleNamespace(args=(prompt, answer)))
    return "loglikelihood", requests


def difference(theirs: Sequence[Any], ours: Sequence[Any]) -> str:
    """How far two sets of answers are apart."""
    pairs = list(zip(theirs, ours, strict=True))
    if isinstance(theirs[0], str):
        differing = sum(their != our for their, our in pairs)
        return f"{differing} texts differ" if differing else "the same texts"
    largest = 0.0
    for (their_value, their_greedy), (our_value, our_greedy) in pairs:
        assert their_greedy == our_greedy
        largest = max(largest, abs(their_value - our_value))
    return f"{largest:.0e}"


def seconds_of(method: Callable[..., object], requests: Sequence[Any]) -> float:
    """Seconds of one call."""
    since = time.perf_counter()
    method(requests, disable_tqdm=True)
    return time.perf_counter() - since


def main() -> None:
    """Print both."""
    torch.set_num_threads(1)
    print(specialists() + "\n")
    compare_models()


if __name__ == "__main__":
    main()
