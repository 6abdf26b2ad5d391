"""The work of a merge in pieces: tensors, or some rows of one, each merged by one process."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from paretomerge.checkpoint.operand import (
    FLOAT_DTYPES,
    StoredTensor,
    matrix_shape,
    read_tensor,
)
from paretomerge.merging.block import CPU_BLOCK
from paretomerge.merging.job_io import job_inputs
from paretomerge.merging.plan.plan import Plan, TensorJob

# Allocating and freeing this many bytes once makes glibc keep blocks of this size on its heap.
# Without it, glibc returns them to the kernel after every operation, and fetches and clears them
# again.
_WARM_HEAP = 31 << 20

# Some tenths of a second of work: processes end at about the same time, and seldom ask for more.
_MOST_ELEMENTS = 1 << 24
# Smaller tensors are merged several at a time. This is some hundredths of a second.
_LEAST_ELEMENTS = 1 << 20

BlockCallback = Callable[[TensorJob, int, Tensor], None]
"""Receives each merged block: (job, flat position of its first element, the block).

The block is (rows, columns) in float32, or for a copied tensor as it is stored.
"""

Rows = tuple[int, int]
"""Rows [first, end) of a tensor, all dimensions but the last being rows."""


class Piece(NamedTuple):
    """A tensor of the result, or some rows of it.

    Attributes:
        job: The place of its job in the plan.
        rows: The rows; None for all of them.
    """

    job: int
    rows: Rows | None = None


Task = tuple[Piece, ...]
"""What a process merges before it asks for more."""


def cut_into_tasks(plan: Plan, workers: int) -> list[Task]:
    """Cut a plan into tasks.

    Args:
        plan: The plan.
        workers: The number of processes that share the tasks.

    Returns:
        The tasks, in the order in which they should begin: the longest ones first, where one of
        them could keep all others waiting, and else in the order of the plan, in which the
        checksums follow.
    """
    n_elements = sum(math.prod(job.shape) for job in plan.jobs)
    # Of a tensor that cannot be cut.
    long = n_elements / (4 * workers)
    first: list[Task] = []
    others: list[Task] = []
    group: list[Piece] = []
    in_group = 0
    for index, job in enumerate(plan.jobs):
        size = math.prod(job.shape)
        if size > _MOST_ELEMENTS and _can_be_cut(plan, job):
            for rows in _row_ranges(job):
                others.append((Piece(index, rows),))
        elif size >= long:
            first.append((Piece(index),))
        else:
            group.append(Piece(index))
            in_group += size
        if in_group >= _LEAST_ELEMENTS:
            others.append(tuple(group))
            group, in_group = [], 0
    if group:
        others.append(tuple(group))
    return [*first, *others]


def _can_be_cut(plan: Plan, job: TensorJob) -> bool:
    """Whether some rows of a tensor can be merged without reading the others."""
    # A tensor of an earlier step may need all of its rows, too.
    if plan.recipe.steps:
        return False
    if job.copy:
        return plan.operand(job.sources[0]).dtype in FLOAT_DTYPES
    return not plan.method.multi_pass


def _row_ranges(job: TensorJob) -> list[Rows]:
    rows, columns = matrix_shape(job.shape)
    # Whole blocks, so that these are the same as without a cut.
    block_rows = max(1, CPU_BLOCK // max(1, columns))
    blocks = math.ceil(_MOST_ELEMENTS / (block_rows * max(1, columns)))
    step = blocks * block_rows
    ranges = []
    for first in range(0, rows, step):
        ranges.append((first, min(first + step, rows)))
    return ranges


def prepare_process() -> None:
    """Make this process merge as all others do; call it once before the first piece."""
    torch.empty(_WARM_HEAP, dtype=torch.uint8)


def merge_task(
    plan: Plan,
    task: Task,
    on_block: BlockCallback,
    cache_bytes: int,
) -> None:
    """Merge the pieces of a task on the CPU; see `merge_piece`."""
    for piece in task:
        job = plan.jobs[piece.job]
        merge_piece(plan, job, on_block, cache_bytes=cache_bytes, rows=piece.rows)


def merge_piece(
    plan: Plan,
    job: TensorJob,
    on_block: BlockCallback,
    *,
    device: str = "cpu",
    cache_bytes: int = 0,
    block_elements: int | None = None,
    rows: Rows | None = None,
) -> None:
    """Merge a tensor of the result, or some rows of it.

    Args:
        plan: The plan that the job belongs to.
        job: The tensor.
        on_block: Receives each merged block.
        device: Where to merge.
        cache_bytes: Inputs that the method reads more than once stay in memory up to this size.
        block_elements: The most elements of a block; by default the size that suits the device.
        rows: The rows to merge; by default all.
    """
    if job.copy:
        _copy(plan, job, on_block, rows)
        return
    # An empty tensor has nothing to merge, and nothing that a method could measure.
    if not math.prod(job.shape):
        return
    inputs = job_inputs(plan, job, device, cache_bytes)
    merge_block = plan.method.function(inputs)
    for block in inputs.blocks(block_elements, rows):
        on_block(job, block.start, merge_block(block))


def _copy(
    plan: Plan,
    job: TensorJob,
    on_block: BlockCallback,
    rows: Rows | None,
) -> None:
    """Hand over the one source as it is, some rows at a time."""
    operand = plan.operand(job.sources[0])
    # Float32 does not hold every whole number, so these are not read by rows.
    if operand.dtype not in FLOAT_DTYPES:
        on_block(job, 0, read_tensor(operand))
        return
    n_rows, columns = matrix_shape(job.shape)
    start, stop = rows or (0, n_rows)
    step = max(1, CPU_BLOCK // max(columns, 1))
    for first in range(start, stop, step):
        end = min(first + step, stop)
        if isinstance(operand, StoredTensor):
            block = operand.rows_as_stored(first, end)
        else:
            block = operand.rows(first, end)
        on_block(job, first * columns, block)
