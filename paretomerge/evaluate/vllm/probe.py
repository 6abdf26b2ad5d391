"""Log-probabilities of a fixed prompt, by which two engines' weights are compared."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from paretomerge.errors import EvaluationError
from paretomerge.evaluate.evaluator import Candidate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Several kinds of text, since a merge may change one of them alone.
_TEXT = (
    "The capital of France is Paris. Il fait beau ce matin. 12 + 30 = 42. "
    'def area(r): return 3.14 * r ** 2 {"name": "Ada", "age": 36} '
    "Question: how many legs do seven spiders have?"
)
_MAX_TOKENS = 64


@dataclass(frozen=True)
class Probe:
    """A prompt, and what a model thinks of it.

    Attributes:
        tokens: Token ids of the prompt.
        log_probabilities: Of each token but the first, given those before it.
    """

    tokens: list[int]
    log_probabilities: list[float]

    def difference(self, others: Sequence[float]) -> float:
        """How far other log-probabilities of the same prompt are from these.

        Args:
            others: Log-probabilities; fewer where the prompt was cut.

        Returns:
            The mean absolute difference, in nats.
        """
        pairs = zip(self.log_probabilities, others, strict=False)
        differences = [abs(own - other) for own, other in pairs]
        return math.fsum(differences) / len(differences)


def probe_tokens(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The prompt in a tokenizer's tokens.

    Raises:
        EvaluationError: The tokenizer makes fewer than two tokens of it.
    """
    tokens: list[int] = tokenizer.encode(_TEXT)[:_MAX_TOKENS]
    if len(tokens) < 2:
        raise EvaluationError(
            "the tokenizer makes fewer than two tokens of an English sentence, so the weights "
            "in vLLM cannot be checked"
        )
    return tokens


def probe(candidate: Candidate, max_tokens: int) -> Probe:
    """Compute the log-probabilities with transformers, from the model in memory.

    Args:
        candidate: The merge.
        max_tokens: The most tokens that the engine reads.

    Returns:
        The log-probabilities.

    Raises:
        EvaluationError: They are NaN.
    """
    # Importing torch takes seconds, and `status` and `report` do not need it.
    import torch

    tokens = probe_tokens(candidate.text_tokenizer)[:max_tokens]
    model = candidate.model
    ids = torch.tensor([tokens], device=model.device)
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[0, :-1]
    log_softmax = logits.float().log_softmax(-1)
    log_probabilities = log_softmax.gather(1, ids[0, 1:, None])[:, 0].tolist()
    if any(math.isnan(value) for value in log_probabilities):
        raise EvaluationError("logits are NaN: the merged weights overflow")
    return Probe(tokens, log_probabilities)
