"""PerplexityEvaluator of a text file: every other window of it is searched on, the rest is held out."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from paretomerge.errors import EvaluationError
from paretomerge.evaluate.evaluator import Candidate, Score, Split

_WINDOW = 512  # tokens, or what the model reads at most
_TOKENS = 8192  # in one forward pass


class PerplexityEvaluator:
    """metric `perplexity`: `exp` of the mean negative log-likelihood of a token; `bits_per_byte`: what a byte of the text costs.

    The text is cut into windows of 512 tokens, each read without the ones before it; a token has those of its window for a
    context, and the first of each is not counted. The standard error is that of a mean over windows.
    """

    def __init__(self, name: str, path: Path, metric: str = "perplexity") -> None:
        self.name, self.metric = name, metric
        try:
            self._text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise EvaluationError(
                f"{name}: expected a text file in UTF-8, got {path}: {error}"
            ) from error
        self._windows: tuple[Any, dict[Split, list[tuple[list[int], int]]]] | None = None
        self._room: Any = None

    def evaluate(self, live: Candidate, split: Split) -> Mapping[str, Score]:
        windows = self._cut(live)[split]
        losses = self._losses(live.model, [tokens for tokens, _ in windows])
        counts = [
            len(tokens) - 1 if self.metric == "perplexity" else size * math.log(2)
            for tokens, size in windows
        ]
        mean = sum(losses) / sum(counts)
        # of a ratio of sums: its windows' deviations from it, over the mean count
        n = len(windows)
        spread = sum(
            (loss - mean * count) ** 2 for loss, count in zip(losses, counts, strict=True)
        ) / max(n - 1, 1)
        error = math.sqrt(spread / n) / (sum(counts) / n)
        if self.metric == "bits_per_byte":
            return {self.name: Score(mean, error, n)}
        value = math.exp(mean) if mean < 700 else math.inf
        return {self.name: Score(value, value * error, n)}

    def _cut(self, live: Candidate) -> dict[Split, list[tuple[list[int], int]]]:
        """split -> windows of tokens, each with the bytes of text that its counted tokens stand for."""
        if self._windows is None or self._windows[0] is not live.tokenizer:
            tokens = live.tokenizer.encode(self._text, add_special_tokens=False)
            size = min(
                _WINDOW,
                getattr(live.model.config.get_text_config(), "max_position_embeddings", _WINDOW),
            )
            parts = [tokens[i : i + size] for i in range(0, len(tokens), size)]
            parts = [part for part in parts if len(part) > 1]
            if len(parts) < 4:
                raise EvaluationError(
                    f"{self.name}: expected a text of at least {4 * size} tokens, got {len(tokens)}"
                )
            sized = [
                (part, max(1, len(live.tokenizer.decode(part[1:]).encode()))) for part in parts
            ]
            self._windows = live.tokenizer, {"search": sized[::2], "held_out": sized[1::2]}
        return self._windows[1]

    def _losses(self, model: Any, windows: Sequence[Sequence[int]]) -> list[float]:
        """Summed negative log-likelihood of all tokens but the first, per window."""
        import torch

        from paretomerge.evaluate.inference.likelihood import Likelihoods
        from paretomerge.evaluate.inference.memory import Room

        size = len(windows[0])
        work = Likelihoods(
            model, [(window[:1], window[1:]) for window in windows], size, torch.float32
        )
        self._room = self._room or Room(max(1, _TOKENS // size))
        for run, jobs in work.runs:
            self._room.run(run, jobs)
        return [-chance for chance, _ in work.answers]
