"""Batches that fit: where memory runs out, half as many rows, and so from then on."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch


class Room:
    """Room for `rows` in one forward pass. It shrinks with the first batch that finds no memory, and stays so."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def run(
        self,
        work: Callable[[Any], Any],
        jobs: Sequence[Any],
        rows_of: Callable[[Any], int] = lambda job: 1,
    ) -> None:
        """Give `work` all jobs, batch by batch. Raises what it raises where a batch of one finds no memory."""
        for batch in self._batches(jobs, rows_of):
            self._halving(work, batch, rows_of)

    def _batches(
        self, jobs: Sequence[Any], rows_of: Callable[[Any], int]
    ) -> Iterator[Sequence[Any]]:
        begin = 0
        while begin < len(jobs):
            end, rows = begin, 0
            while end < len(jobs) and (end == begin or rows + rows_of(jobs[end]) <= self.rows):
                rows += rows_of(jobs[end])
                end += 1
            yield jobs[begin:end]
            begin = end

    def _halving(
        self, work: Callable[[Any], Any], batch: Sequence[Any], rows_of: Callable[[Any], int]
    ) -> None:
        try:
            work(batch)
            return
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if len(batch) == 1 or not _out_of_memory(error):
                raise
        half = (len(batch) + 1) // 2
        self.rows = min(self.rows, sum(map(rows_of, batch[:half])))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._halving(work, batch[:half], rows_of)
        self._halving(work, batch[half:], rows_of)


def _out_of_memory(error: BaseException) -> bool:
    """Whether it tells of memory; on a CPU, torch has no class of error for it."""
    return (
        isinstance(error, (torch.OutOfMemoryError, MemoryError))
        or "allocate memory" in str(error)
        or "out of memory" in str(error)
    )
