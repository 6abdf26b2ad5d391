"""Seconds per token as a score: measured on the live model, one sequence, with its cache of keys and values."""

import math
import statistics
import time
from collections.abc import Mapping
from typing import Any

from paretomerge.evaluate.evaluator import Candidate, Score, Split

_PROMPT, _WARM, _TOKENS = 32, 4, 32


class SpeedEvaluator:
    """The median seconds of a step of generation, by the clock of this machine: nothing else should run on it.

    Batch 1 after a prompt of 32 tokens, where reading the weights takes most of the time, so that layers count. The standard
    error is that of a median of 32 steps.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def evaluate(self, live: Candidate, split: Split) -> Mapping[str, Score]:
        import torch

        device, vocabulary = (
            live.model.device,
            int(live.model.get_input_embeddings().weight.shape[0]),
        )
        tokens = (torch.arange(_PROMPT, device=device) % vocabulary)[None]
        taken = []
        with torch.inference_mode():
            state = live.model(tokens, use_cache=True)
            for _ in range(_WARM + _TOKENS):
                since = _now(device)
                state = live.model(
                    state.logits[:, -1:].argmax(-1),
                    past_key_values=state.past_key_values,
                    use_cache=True,
                )
                taken.append(_now(device) - since)
        steps = taken[_WARM:]
        error = math.sqrt(math.pi / 2) * statistics.stdev(steps) / math.sqrt(len(steps))
        return {self.name: Score(statistics.median(steps), error, len(steps))}


def _now(device: Any) -> float:
    """Seconds, once the device has done what it was told."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
    return time.perf_counter()
