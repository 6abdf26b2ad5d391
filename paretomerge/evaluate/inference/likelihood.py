"""Log-probabilities of answers: equal sequences run once, a context with several answers runs once for all of them, and so does what
many contexts begin with.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from paretomerge.errors import EvaluationError
from paretomerge.evaluate.inference.padding import padded_right
from paretomerge.evaluate.inference.prefill import (
    Tokens,
    common,
    goes_on,
    grouped,
    last_alone,
    read,
    repeated,
)

Wanted = tuple[int, Tokens]  # the number of a request, and its answer
_WORTH = 2 / 3  # of the tokens: a second forward pass has a price of its own


@dataclass(frozen=True)
class Job:
    """Rows of one forward pass: `prefix`, and the answers that begin behind each of `suffixes`, which follow it."""

    prefix: Tokens
    suffixes: tuple[Tokens, ...]
    wanted: tuple[tuple[Wanted, ...], ...]

    @property
    def rows(self) -> int:
        return len(self.suffixes)


class Likelihoods:
    """What is to be run for `requests` of (context, answer) tokens. `answers`, in their order, fill while jobs are run.

    longest: tokens that the model reads at a time; of what is longer, the end counts. dtype: of the softmax, None for the logits'.
    Only the positions that answers need are carried to the vocabulary.
    """

    def __init__(
        self,
        model: Any,
        requests: Sequence[tuple[Sequence[int], Sequence[int]]],
        longest: int,
        dtype: Any = None,
    ) -> None:
        self.answers: list[tuple[float, bool]] = [(float("nan"), False)] * len(requests)
        self._model, self._dtype = model, dtype
        self._goes_on = goes_on(model)
        alone, shared = self._sorted(requests, longest)
        self.runs: list[tuple[Callable[[Sequence[Job]], None], list[Job]]] = [
            (self._alone, jobs) for jobs in self._together(alone)
        ]
        self.runs += [(self._shared, jobs) for jobs in self._together(shared)]

    def _together(self, jobs: Sequence[Job]) -> list[list[Job]]:
        """What is to be read side by side."""
        return [[jobs[i] for i in group] for group in grouped([job.prefix for job in jobs])]

    def _sorted(
        self, requests: Sequence[tuple[Sequence[int], Sequence[int]]], longest: int
    ) -> tuple[list[Job], list[Job]]:
        """Jobs of one row each, and jobs of a context with several."""
        contexts: dict[Tokens, dict[Tokens, list[Wanted]]] = {}
        for i, (context, answer) in enumerate(requests):
            inputs = tuple((*context, *answer)[-(longest + 1) : -1])
            cut = len(inputs) - len(answer) + 1
            contexts.setdefault(inputs[:cut], {}).setdefault(inputs[cut:], []).append(
                (i, tuple(answer))
            )
        alone: dict[Tokens, list[Wanted]] = {}
        shared = []
        for prefix, suffixes in contexts.items():
            if self._goes_on and _worth(prefix, suffixes):
                shared.append(Job(prefix, tuple(suffixes), tuple(map(tuple, suffixes.values()))))
                continue
            for suffix, wanted in suffixes.items():
                alone.setdefault(prefix + suffix, []).extend(wanted)
        return [Job(inputs, ((),), (tuple(wanted),)) for inputs, wanted in alone.items()], shared

    @torch.no_grad()
    def _alone(self, jobs: Sequence[Job]) -> None:
        """Sequences side by side, padded on the right."""
        rows = [job.prefix for job in jobs]
        starts = [
            len(row) - max(len(answer) for _, answer in job.wanted[0])
            for row, job in zip(rows, jobs, strict=True)
        ]
        head = common(list(zip(rows, starts, strict=True))) if self._goes_on else ()
        more = (
            {"past_key_values": repeated(self._model, head, len(rows)), "use_cache": True}
            if head
            else {}
        )
        ids = padded_right([row[len(head) :] for row in rows], self._model.device)
        width = len(head) + ids.shape[1]
        logits = self._model(ids, **more, **last_alone(self._model, width - min(starts))).logits
        offset = width - logits.shape[1]
        placed = [
            (r, len(row) - offset, wanted)
            for r, (row, job) in enumerate(zip(rows, jobs, strict=True))
            for wanted in job.wanted[0]
        ]
        self._settle(logits, placed)

    @torch.no_grad()
    def _shared(self, jobs: Sequence[Job]) -> None:
        """Contexts side by side; then everything that follows any of them, from the contexts' cache."""
        device = self._model.device
        ahead = max(len(suffix) for job in jobs for suffix in job.suffixes)
        reading = read(self._model, [job.prefix for job in jobs], ahead)
        lengths = reading.mask.sum(1)
        owner = torch.tensor([g for g, job in enumerate(jobs) for _ in job.suffixes], device=device)
        suffixes = [suffix for job in jobs for suffix in job.suffixes]
        follow = padded_right(suffixes, device)
        present = (
            torch.arange(follow.shape[1], device=device)
            < torch.tensor([len(s) for s in suffixes], device=device)[:, None]
        )
        reading.cache.batch_select_indices(owner)
        positions = lengths[owner][:, None] + torch.arange(follow.shape[1], device=device)
        seen = torch.cat([reading.mask[owner], present.long()], 1)
        rest = self._model(
            follow,
            attention_mask=seen,
            position_ids=positions,
            past_key_values=reading.cache,
            use_cache=True,
        ).logits
        logits = torch.cat([reading.logits[owner, -1:], rest], 1)
        wanted = [each for job in jobs for each in job.wanted]
        self._settle(
            logits,
            [
                (r, len(suffixes[r]) + 1, want)
                for r, several in enumerate(wanted)
                for want in several
            ],
        )

    def _settle(self, logits: torch.Tensor, placed: Iterable[tuple[int, int, Wanted]]) -> None:
        """Each answer from the logits `(rows, positions, vocabulary)` of its row that end before the position it is placed with."""
        asked = list(placed)
        flat = [
            (r, end - len(answer) + t, token, n, t)
            for n, (r, end, (_, answer)) in enumerate(asked)
            for t, token in enumerate(answer)
        ]
        row, column, token, number, place = torch.tensor(flat, device=logits.device).T
        chances = torch.log_softmax(logits[row, column], -1, dtype=self._dtype)
        shape = len(asked), max(len(answer) for _, _, (_, answer) in asked)
        chance, greedy = (
            torch.zeros(shape, dtype=chances.dtype, device=logits.device),
            torch.ones(shape, dtype=torch.bool, device=logits.device),
        )
        chance[number, place] = chances.gather(1, token[:, None])[:, 0]
        greedy[number, place] = chances.argmax(1) == token
        if chance.isnan().any():
            raise EvaluationError(
                "expected log-probabilities, got NaN: the merged weights overflow"
            )
        for (_, _, (i, _)), total, hit in zip(
            asked, chance.sum(1).tolist(), greedy.all(1).tolist(), strict=True
        ):
            self.answers[i] = total, hit


def _worth(prefix: Tokens, suffixes: dict[Tokens, list[Wanted]]) -> bool:
    """Whether one reading of the context saves enough."""
    follow = sum(map(len, suffixes))
    return len(prefix) + follow <= _WORTH * (len(prefix) * len(suffixes) + follow)
