"""Token sequences side by side in a tensor, and batches that fit into memory."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

Tokens = tuple[int, ...]
"""Token ids of one sequence."""

_PADDING = 0  # any token will do: masked or behind the end, it is never attended to

Job = TypeVar("Job")

Process: TypeAlias = Callable[[Sequence[Job]], None]
"""Runs a batch of jobs."""


def pad_right(sequences: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Put sequences side by side, padded at their end.

    Args:
        sequences: Token ids of each row.
        device: Where the result goes.

    Returns:
        Ids `(rows, longest)`. A causal model needs no mask for them, since padding comes last.
    """
    longest = max(len(sequence) for sequence in sequences)
    rows = []
    for sequence in sequences:
        n_padding = longest - len(sequence)
        padding = [_PADDING] * n_padding
        rows.append([*sequence, *padding])
    return torch.tensor(rows, device=device)


def pad_left(
    sequences: Sequence[Sequence[int]], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Put sequences side by side, padded at their beginning, so that tokens can be appended.

    Args:
        sequences: Token ids of each row.
        device: Where the result goes.

    Returns:
        Ids, attention mask and position ids, `(rows, longest)` each.
    """
    longest = max(len(sequence) for sequence in sequences)
    rows = []
    masks = []
    for sequence in sequences:
        n = len(sequence)
        n_padding = longest - n
        padding = [_PADDING] * n_padding
        row_mask = [0] * n_padding + [1] * n
        rows.append([*padding, *sequence])
        masks.append(row_mask)
    ids = torch.tensor(rows, device=device)
    mask = torch.tensor(masks, device=device)
    # padding has a negative position, which position embeddings do not have
    positions = mask.cumsum(1) - 1
    positions = positions.clamp_min(0)
    return ids, mask, positions


class AdaptiveBatcher:
    """Cuts jobs into batches, and halves the batch size where memory runs out.

    The size never grows again: merges of one study have the same shapes, so a batch that failed
    once would fail again.

    Attributes:
        max_rows: Rows of one forward pass.
    """

    def __init__(self, max_rows: int) -> None:
        self.max_rows = max_rows

    def run(
        self,
        process: Process[Job],
        jobs: Sequence[Job],
        count_rows: Callable[[Job], int] | None = None,
    ) -> None:
        """Process all jobs in order, batch by batch.

        Args:
            process: Runs one batch.
            jobs: What to run. A job with more than `max_rows` rows makes a batch of its own.
            count_rows: Rows of a job; 1 by default.

        Raises:
            Exception: What `process` raises, out-of-memory errors only where the batch has one job.
        """
        rows = [1] * len(jobs)
        if count_rows is not None:
            rows = [count_rows(job) for job in jobs]
        for start, end in self._batches(rows):
            batch = jobs[start:end]
            batch_rows = rows[start:end]
            self._run_or_halve(process, batch, batch_rows)

    def _batches(self, rows: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Start and end of each batch. `max_rows` may shrink between two of them."""
        start = 0
        while start < len(rows):
            # at least one job, however many rows it has
            end = start + 1
            total = rows[start]
            while end < len(rows):
                total += rows[end]
                if total > self.max_rows:
                    break
                end += 1
            yield start, end
            start = end

    def _run_or_halve(
        self,
        process: Process[Job],
        batch: Sequence[Job],
        rows: Sequence[int],
    ) -> None:
        try:
            process(batch)
            return
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if len(batch) == 1 or not _is_out_of_memory(error):
                raise
        # outside of the handler, since the exception's traceback keeps the failed tensors alive
        half = (len(batch) + 1) // 2
        rows_that_may_fit = sum(rows[:half])
        self.max_rows = min(self.max_rows, rows_that_may_fit)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        for part in (slice(half), slice(half, None)):
            self._run_or_halve(process, batch[part], rows[part])


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # the allocator of the CPU raises a plain RuntimeError
    message = str(error)
    return "allocate memory" in message or "out of memory" in message
