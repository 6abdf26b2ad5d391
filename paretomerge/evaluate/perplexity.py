"""Perplexity on a text file. Every other window of it is searched on, the rest is held out."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from paretomerge.errors import EvaluationError
from paretomerge.evaluate.evaluator import Candidate, Score, Scores, Split
from paretomerge.evaluate.model_kind import ModelKind

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from paretomerge.evaluate.inference.batching import AdaptiveBatcher

_WINDOW = 512  # tokens; less where the model reads less
_BATCH_TOKENS = 8192  # in one forward pass
_MIN_WINDOWS = 4
_MAX_EXPONENT = 700  # exp of more overflows a float64


class _Window(NamedTuple):
    """A piece of the text: its tokens, and the bytes of text of all tokens but the first."""

    tokens: list[int]
    n_bytes: int


class PerplexityEvaluator:
    """Perplexity of a text, or bits per byte.

    `perplexity` is exp of the mean negative log-likelihood of a token. `bits_per_byte` is the
    negative log-likelihood in bits, per byte of text; it compares models with different tokenizers.

    The text is cut into windows of 512 tokens, each read without the ones before it. A window
    begins with the token that begins a sequence, if the tokenizer puts it before texts: models such
    as Llama and Gemma are not trained to read without it. The first token of a window has no
    context and is not counted. The standard error is that of a mean over windows.

    Args:
        name: The score's name.
        path: A text file in UTF-8, of four windows or more.
        metric: `perplexity` or `bits_per_byte`.
        add_bos_token: Whether windows begin with the token that begins a sequence; None to do what
            the tokenizer does.

    Raises:
        EvaluationError: The file cannot be read. `evaluate` raises it where the text is too short.
    """

    def __init__(
        self,
        name: str,
        path: Path,
        metric: str = "perplexity",
        add_bos_token: bool | None = None,
    ) -> None:
        self.name = name
        self.metric = metric
        self._add_bos_token = add_bos_token
        try:
            self._text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise EvaluationError(
                f"{name}: {path} cannot be read as a text file in UTF-8: {error}"
            ) from error
        self._windows: dict[Split, list[_Window]] = {}
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._batcher: AdaptiveBatcher | None = None

    def check_model_kind(self, kind: ModelKind) -> None:
        """Check that models of a kind have this score; see `Evaluator`."""
        kind.check_is_decoder(self.name)

    def evaluate(self, candidate: Candidate, split: Split) -> Scores:
        """Score the text; see `Evaluator.evaluate`."""
        # All merges of a study have one tokenizer, so the text is cut once.
        if self._tokenizer is not candidate.text_tokenizer:
            self._windows = self._cut_text(candidate)
            self._tokenizer = candidate.text_tokenizer
        windows = self._windows[split]
        n = len(windows)
        tokens = [window.tokens for window in windows]
        losses = self._losses(candidate.model, tokens)
        counts = [self._count(window) for window in windows]
        mean, stderr = _ratio_of_sums(losses, counts)
        if self.metric == "bits_per_byte":
            score = Score(mean, stderr, n)
        else:
            perplexity = math.exp(mean) if mean < _MAX_EXPONENT else math.inf
            # delta method: the derivative of exp is exp
            perplexity_stderr = perplexity * stderr
            score = Score(perplexity, perplexity_stderr, n)
        return {self.name: score}

    def _count(self, window: _Window) -> float:
        """What a window's loss in nats is divided by: its tokens, or its bytes times ln 2."""
        if self.metric == "perplexity":
            return len(window.tokens) - 1
        return window.n_bytes * math.log(2)

    def _cut_text(self, candidate: Candidate) -> dict[Split, list[_Window]]:
        tokenizer = candidate.text_tokenizer
        tokens = tokenizer.encode(self._text, add_special_tokens=False)
        config = candidate.model.config.get_text_config()
        max_positions = getattr(config, "max_position_embeddings", _WINDOW)
        size = min(_WINDOW, max_positions)
        first = self._first_tokens(tokenizer)
        step = size - len(first)
        windows = []
        for start in range(0, len(tokens), step):
            part = first + tokens[start : start + step]
            # the first token has no context, so a single one has no loss
            if len(part) > 1:
                counted = part[1:]
                text = tokenizer.decode(counted)
                n_bytes = len(text.encode())
                # at least 1, since tokens without text must not make the divisor 0
                n_bytes = max(1, n_bytes)
                window = _Window(part, n_bytes)
                windows.append(window)
        if len(windows) < _MIN_WINDOWS:
            raise EvaluationError(
                f"{self.name}: the text must have at least {_MIN_WINDOWS * step} tokens, "
                f"got {len(tokens)}"
            )
        return {"search": windows[::2], "held_out": windows[1::2]}

    def _first_tokens(self, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
        """What every window begins with: the token that begins a sequence, or nothing."""
        bos = tokenizer.bos_token_id
        adds_bos = self._add_bos_token
        if adds_bos is None:
            adds_bos = bos is not None and tokenizer.encode("a")[:1] == [bos]
        if not adds_bos:
            return []
        if bos is None:
            raise EvaluationError(
                f"{self.name}: add_bos_token: the tokenizer has no token that begins a sequence"
            )
        return [bos]

    def _losses(
        self, model: "PreTrainedModel", windows: Sequence[Sequence[int]]
    ) -> list[float]:
        """Summed negative log-likelihood of each window's tokens, without the first."""
        import torch

        from paretomerge.evaluate.inference.batching import AdaptiveBatcher
        from paretomerge.evaluate.inference.likelihood import LogLikelihoods

        size = len(windows[0])
        if self._batcher is None:
            rows = max(1, _BATCH_TOKENS // size)
            self._batcher = AdaptiveBatcher(rows)
        requests = []
        for window in windows:
            first = window[:1]
            others = window[1:]
            requests.append((first, others))
        # a sum of hundreds of log-probabilities is too coarse in bfloat16
        work = LogLikelihoods(model, requests, size, torch.float32)
        results = work.run(self._batcher)
        return [-log_likelihood for log_likelihood, _ in results]


def _ratio_of_sums(
    losses: Sequence[float], counts: Sequence[float]
) -> tuple[float, float]:
    """sum(losses) / sum(counts) and its standard error (Cochran 1977, sec. 2.11)."""
    n = len(losses)
    total_count = sum(counts)
    ratio = sum(losses) / total_count
    squared_deviations = []
    for loss, count in zip(losses, counts, strict=True):
        deviation = loss - ratio * count
        squared_deviations.append(deviation**2)
    squares = sum(squared_deviations)
    variance = squares / max(n - 1, 1)
    mean_count = total_count / n
    stderr = math.sqrt(variance / n) / mean_count
    return ratio, stderr
