"""Log-likelihoods of answers, with as few tokens read as possible.

Equal sequences are read once. A context with several answers is read once for all of them, if that
saves enough, and so is a prefix that many sequences share.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from paretomerge.errors import EvaluationError
from paretomerge.evaluate.inference.batching import (
    AdaptiveBatcher,
    Process,
    Tokens,
    pad_right,
)
from paretomerge.evaluate.inference.prefill import (
    depends_on_prompt,
    group_by_prefix,
    is_second_pass_worthwhile,
    keep_last_logits,
    prefill,
    prefill_shared_prefix,
    shared_prefix,
    supports_cache,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Request = tuple[Sequence[int], Sequence[int]]
"""Tokens of a context, and of the answer that follows it."""

LogLikelihood = tuple[float, bool]
"""Log-probability of an answer, and whether greedy decoding would write it."""


class Answer(NamedTuple):
    """The answer that a request asks about.

    Attributes:
        request: The request's index.
        tokens: The answer's tokens.
    """

    request: int
    tokens: Tokens


class LocatedAnswer(NamedTuple):
    """Where an answer's log-probabilities are.

    Attributes:
        row: Row of the logits.
        end: The position behind the one that predicts the answer's last token.
        answer: The answer.
    """

    row: int
    end: int
    answer: Answer


Continuations = dict[Tokens, list[Answer]]
"""What follows a context, without the last token of an answer -> the answers that it predicts."""


@dataclass(frozen=True)
class ForwardJob:
    """Sequences that are read together: a prefix, and what follows it in each row.

    Attributes:
        prefix: Tokens that all rows begin with.
        suffixes: The rest of each row.
        answers: The answers that each row predicts; they end one token behind it.
    """

    prefix: Tokens
    suffixes: tuple[Tokens, ...]
    answers: tuple[tuple[Answer, ...], ...]

    @property
    def rows(self) -> int:
        """Rows of the job in a batch."""
        return len(self.suffixes)


Pass = tuple[Process[ForwardJob], list[ForwardJob]]
"""A function that processes a batch of jobs, and its jobs."""


class LogLikelihoods:
    """Computes log-likelihoods of answers to contexts.

    Logits are computed only for the positions that answers need.

    Args:
        model: The causal language model.
        requests: (context, answer) tokens.
        max_length: Tokens that the model reads at a time; longer sequences lose their beginning.
        dtype: Of the softmax; that of the logits where it is None.

    Attributes:
        results: Of each request; NaN until `run` has been called.
        passes: All that `run` does.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        requests: Sequence[Request],
        max_length: int,
        dtype: torch.dtype | None = None,
    ) -> None:
        pending: LogLikelihood = (float("nan"), False)
        self.results = [pending] * len(requests)
        self._model = model
        self._dtype = dtype
        self._supports_cache = supports_cache(model)
        single, shared = self._plan(requests, max_length)
        self.passes: list[Pass] = []
        for jobs in _group_jobs(single):
            self.passes.append((self._read_sequences, jobs))
        for jobs in _group_jobs(shared):
            self.passes.append((self._read_shared_contexts, jobs))

    def run(self, batcher: AdaptiveBatcher) -> list[LogLikelihood]:
        """Compute all results.

        Args:
            batcher: Cuts the jobs into batches.

        Returns:
            `results`, in the order of the requests.

        Raises:
            EvaluationError: The model's log-probabilities are NaN.
        """
        for process, jobs in self.passes:
            batcher.run(process, jobs, lambda job: job.rows)
        return self.results

    def _plan(
        self, requests: Sequence[Request], max_length: int
    ) -> tuple[list[ForwardJob], list[ForwardJob]]:
        """Jobs with one row, and jobs whose rows share a context."""
        single: Continuations = {}
        shared = []
        contexts = _group_by_context(requests, max_length)
        # Its weights are those of the context, so the context is read apart from the answers.
        apart = depends_on_prompt(self._model)
        for context, continuations in contexts.items():
            is_shared = apart or _is_sharing_worthwhile(context, continuations)
            if self._supports_cache and is_shared:
                suffixes = tuple(continuations)
                row_answers = [tuple(answers) for answers in continuations.values()]
                job = ForwardJob(context, suffixes, tuple(row_answers))
                shared.append(job)
            else:
                # another context may have made the same sequence
                for suffix, suffix_answers in continuations.items():
                    sequence = context + suffix
                    single.setdefault(sequence, []).extend(suffix_answers)
        single_jobs = []
        for sequence, sequence_answers in single.items():
            answers = (tuple(sequence_answers),)
            job = ForwardJob(sequence, ((),), answers)
            single_jobs.append(job)
        return single_jobs, shared

    @torch.no_grad()
    def _read_sequences(self, jobs: Sequence[ForwardJob]) -> None:
        """Read whole sequences side by side, padded on the right."""
        model = self._model
        rows = [job.prefix for job in jobs]
        starts = []  # no answer needs logits of earlier positions
        for job in jobs:
            (answers,) = job.answers
            longest_answer = max(len(answer.tokens) for answer in answers)
            start = len(job.prefix) - longest_answer
            starts.append(start)
        prefix: Tokens = ()
        if self._supports_cache:
            prefix = shared_prefix(rows, starts)
        n_shared = len(prefix)
        rests = [row[n_shared:] for row in rows]
        ids = pad_right(rests, model.device)
        width = n_shared + ids.shape[1]
        n_needed = width - min(starts)
        kept = keep_last_logits(model, n_needed)
        if prefix:
            cache = prefill_shared_prefix(model, prefix, len(rows))
            output = model(ids, past_key_values=cache, use_cache=True, **kept)
        else:
            output = model(ids, **kept)
        logits = output.logits
        # the logits are those of the last positions; a model may return more than it was asked for
        offset = width - logits.shape[1]
        located = []
        for r, job in enumerate(jobs):
            # behind the last position, which predicts the token after the prefix
            end = len(job.prefix) - offset
            for answer in job.answers[0]:
                location = LocatedAnswer(r, end, answer)
                located.append(location)
        self._store_results(logits, located)

    @torch.no_grad()
    def _read_shared_contexts(self, jobs: Sequence[ForwardJob]) -> None:
        """Read contexts side by side, then the continuations of all of them from their cache."""
        model = self._model
        device = model.device
        context_of_row: list[int] = []
        suffixes: list[Tokens] = []
        answers: list[tuple[Answer, ...]] = []
        for c, job in enumerate(jobs):
            context_of_row += [c] * job.rows
            suffixes += job.suffixes
            answers += job.answers
        longest_suffix = max(len(suffix) for suffix in suffixes)
        prefixes = [job.prefix for job in jobs]
        contexts = prefill(model, prefixes, longest_suffix)
        context_index = torch.tensor(context_of_row, device=device)
        context_mask = contexts.mask[context_index]
        context_lengths = context_mask.sum(1)
        # the context's last position predicts the first token of every answer
        context_logits = contexts.logits[context_index, -1:]
        if longest_suffix == 0:
            located = []
            for r, of_row in enumerate(answers):
                located += [LocatedAnswer(r, 1, answer) for answer in of_row]
            self._store_results(context_logits, located)
            return
        contexts.cache.batch_select_indices(context_index)

        ids = pad_right(suffixes, device)
        width = ids.shape[1]
        places = torch.arange(width, device=device)
        lengths = [len(suffix) for suffix in suffixes]
        suffix_lengths = torch.tensor(lengths, device=device)
        is_token = places < suffix_lengths[:, None]
        suffix_mask = is_token.long()
        mask = torch.cat([context_mask, suffix_mask], 1)
        positions = context_lengths[:, None] + places
        output = model(
            ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=contexts.cache,
            use_cache=True,
        )
        logits = torch.cat([context_logits, output.logits], 1)
        located = []
        for r, suffix in enumerate(suffixes):
            # 1 for the context's last position
            end = len(suffix) + 1
            for answer in answers[r]:
                location = LocatedAnswer(r, end, answer)
                located.append(location)
        self._store_results(logits, located)

    def _store_results(self, logits: Tensor, located: Sequence[LocatedAnswer]) -> None:
        """Sum each answer's log-probabilities in the logits `(rows, positions, vocabulary)`."""
        # all tokens of all answers at once: a few large tensor operations instead of many small
        index = []
        for n, (r, end, answer) in enumerate(located):
            start = end - len(answer.tokens)
            for t, token in enumerate(answer.tokens):
                position = start + t
                index.append((r, position, token, n, t))
        device = logits.device
        columns = torch.tensor(index, device=device).T
        rows, positions, token_ids, numbers, places = columns
        answer_logits = logits[rows, positions]
        log_probs = torch.log_softmax(answer_logits, -1, dtype=self._dtype)
        token_column = token_ids[:, None]
        chosen = log_probs.gather(1, token_column)
        # one row per answer again; the places behind a shorter answer add 0 and count as greedy
        lengths = [len(location.answer.tokens) for location in located]
        shape = (len(located), max(lengths))
        token_log_probs = torch.zeros(shape, dtype=log_probs.dtype, device=device)
        is_greedy = torch.ones(shape, dtype=torch.bool, device=device)
        token_log_probs[numbers, places] = chosen[:, 0]
        best_tokens = log_probs.argmax(1)
        is_greedy[numbers, places] = best_tokens == token_ids
        if token_log_probs.isnan().any():
            raise EvaluationError(
                "log-probabilities are NaN: the merged weights overflow"
            )
        totals = token_log_probs.sum(1).tolist()
        all_greedy = is_greedy.all(1).tolist()
        for location, total, greedy in zip(located, totals, all_greedy, strict=True):
            request = location.answer.request
            self.results[request] = (total, greedy)


def _group_jobs(jobs: Sequence[ForwardJob]) -> list[list[ForwardJob]]:
    """Groups of jobs that should be read in the same batches, since their prefixes begin alike."""
    prefixes = [job.prefix for job in jobs]
    grouped = []
    for indices in group_by_prefix(prefixes):
        members = [jobs[i] for i in indices]
        grouped.append(members)
    return grouped


def _group_by_context(
    requests: Sequence[Request], max_length: int
) -> dict[Tokens, Continuations]:
    """Context -> its distinct continuations."""
    contexts: dict[Tokens, Continuations] = {}
    for i, (context, answer) in enumerate(requests):
        # the last token is predicted, never read
        sequence = (*context, *answer)
        longest = max_length + 1
        truncated = sequence[-longest:]
        inputs = truncated[:-1]
        # and the context's last token predicts the answer's first
        n_answer = len(answer)
        context_length = len(inputs) - n_answer + 1
        prefix = inputs[:context_length]
        suffix = inputs[context_length:]
        continuations = contexts.setdefault(prefix, {})
        answers = continuations.setdefault(suffix, [])
        answers.append(Answer(i, tuple(answer)))
    return contexts


def _is_sharing_worthwhile(context: Tokens, continuations: Continuations) -> bool:
    """Whether reading the context once saves enough tokens for a second forward pass."""
    n_following = sum(map(len, continuations))
    n_shared = len(context) + n_following
    # without sharing, the context is read once for each continuation
    n_contexts = len(continuations)
    n_separate = n_contexts * len(context) + n_following
    return is_second_pass_worthwhile(n_shared, n_separate)
