"""Seconds per generated token as a score, measured on the live model with its key-value cache."""

import math
import statistics
import time
from typing import TYPE_CHECKING

from paretomerge.evaluate.evaluator import Candidate, Score, Scores, Split
from paretomerge.evaluate.model_kind import ModelKind

if TYPE_CHECKING:
    import torch

_PROMPT_TOKENS = 32
_WARM_UP_STEPS = 4
_MEASURED_STEPS = 32
# Ratio of the standard errors of a median and a mean, for many normal errors.
_MEDIAN_TO_MEAN = math.sqrt(math.pi / 2)


class SpeedEvaluator:
    """The median seconds of a generation step, by the clock of this machine.

    The batch is one sequence with a prompt of 32 tokens: reading the weights takes most of the
    time there, so the number of layers shows. Nothing else should run on the machine.

    The standard error is that of a median of 32 steps.

    Attributes:
        name: The score's name.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def check_model_kind(self, kind: ModelKind) -> None:
        """Check that models of a kind have this score; see `Evaluator`."""
        kind.check_is_decoder(self.name)

    def evaluate(self, candidate: Candidate, split: Split) -> Scores:
        """Time the generation; see `Evaluator.evaluate`. The split makes no difference."""
        steps = _time_steps(candidate)[_WARM_UP_STEPS:]
        n = len(steps)
        median = statistics.median(steps)
        deviation = statistics.stdev(steps)
        stderr = _MEDIAN_TO_MEAN * deviation / math.sqrt(n)
        return {self.name: Score(median, stderr, n)}


def _time_steps(candidate: Candidate) -> list[float]:
    """Seconds of each generation step, warm-up included."""
    import torch

    model = candidate.model
    device = model.device
    embeddings = model.get_input_embeddings()
    vocabulary = int(embeddings.weight.shape[0])
    # which tokens does not matter for the time
    tokens = torch.arange(_PROMPT_TOKENS, device=device) % vocabulary
    prompt = tokens[None]
    seconds = []
    with torch.inference_mode():
        output = model(prompt, use_cache=True)
        for _ in range(_WARM_UP_STEPS + _MEASURED_STEPS):
            start = _synchronized_time(device)
            last_logits = output.logits[:, -1:]
            next_token = last_logits.argmax(-1)
            cache = output.past_key_values
            output = model(next_token, past_key_values=cache, use_cache=True)
            end = _synchronized_time(device)
            seconds.append(end - start)
    return seconds


def _synchronized_time(device: "torch.device") -> float:
    """Seconds on the clock, read once the device has finished its queued work."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
    return time.perf_counter()
