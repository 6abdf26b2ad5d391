"""What a plan will cost: bytes read and written, memory, and an estimate of the time."""

import math
import os
from dataclasses import dataclass
from functools import partial

from paretomerge.merging.methods.method import ROWS_OF_PIECE
from paretomerge.merging.plan.plan import INPUT_CACHE_BYTES, Plan, TensorJob
from paretomerge.merging.plan.steps import plans_of_steps

# The interpreter with torch loaded, measured.
_PROCESS_BYTES = 350_000_000
# Blocks in work, and the entries that the selection of a threshold collects.
_BYTES_IN_WORK = 60_000_000
# An average NVMe drive, read or written.
_DISK_BYTES_PER_SECOND = 1.0e9
_FLOAT32_BYTES = 4
_LEAST_NS_OF_WHOLE_MATRICES = 20.0
# Measured: a worker needs 1.5 s to start.
_SECONDS_PER_WORKER = 2.0
# Blocks in float32 that are alive at a time, beside one per source: no method has more. Measured
# for every method by tests/merging/plan/test_working_memory.py, as are the copies of a matrix.
_BLOCKS_BESIDE_SOURCES = 8
# Of matrices (inputs, inputs) in float64, beside one per source.
_LEAST_SQUARES_COPIES = 9
# Of square matrices, beside two per source: 11 of torch, and 4 that LAPACK asks for.
_SVD_COPIES = 15


@dataclass(frozen=True)
class Cost:
    """What a plan will cost.

    Attributes:
        read: Bytes of the inputs.
        written: Bytes of the result, which is also the free disk space that it needs.
        memory: Peak bytes of all processes.
        seconds: Time on one core with a disk of a gigabyte per second; None for methods that work
            on whole matrices.
    """

    read: int
    written: int
    memory: int
    seconds: float | None


def estimate_cost(plan: Plan, workers: int = 1) -> Cost:
    """Estimate the cost of a plan from headers alone.

    Args:
        plan: The plan.
        workers: Number of processes that merge.

    Returns:
        The estimate.
    """
    read = plan.bytes_read()
    written = plan.bytes_written()
    # Only methods that read a tensor more than once keep its inputs in memory.
    cached = min(INPUT_CACHE_BYTES, read) if plan.method.multi_pass else 0
    memory = cached + workers * worker_bytes(plan)
    seconds = None
    if plan.method.ns_per_entry is not None:
        disk_seconds = (read + written) / _DISK_BYTES_PER_SECOND
        seconds = processor_seconds(plan) + disk_seconds
    return Cost(read, written, memory, seconds)


def processor_seconds(plan: Plan) -> float:
    """Estimate the time of one core; a lower bound for methods that work on whole matrices.

    Each step of the recipe counts once: its blocks are merged once, unless a method reads them
    several times.
    """
    plans = [plan, *plans_of_steps(plan)]
    return sum(_own_seconds(one) for one in plans)


def _own_seconds(plan: Plan) -> float:
    """The time of a plan without its steps."""
    # The pace is measured in nanoseconds per entry of each input, by benchmarks/merge.py.
    pace = plan.method.ns_per_entry or _LEAST_NS_OF_WHOLE_MATRICES
    entries = sum(_input_entries(job) for job in plan.jobs)
    return entries * pace * 1e-9


def worker_bytes(plan: Plan) -> int:
    """Estimate the peak memory of one process of a merge, without inputs that are cached."""
    memory = _PROCESS_BYTES + _BYTES_IN_WORK
    if plan.method.whole_tensors:
        memory += _whole_tensor_bytes(plan)
    return memory


def default_workers(plan: Plan, processors: int) -> int:
    """The number of processes that suits a plan and this machine.

    Args:
        plan: The plan.
        processors: How many may be busy.

    Returns:
        As many as there are processors, but each with two seconds of work or more, and with half
        of the memory of the machine in all.
    """
    seconds = processor_seconds(plan)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    workers = min(
        processors,
        int(seconds / _SECONDS_PER_WORKER),
        int(memory / 2 / worker_bytes(plan)),
    )
    return max(1, workers)


def processors() -> int:
    """How many processors a merge may use by default: what torch would use, without importing it.

    `OMP_NUM_THREADS`, else those that this process may run on.
    """
    first, _, _ = os.environ.get("OMP_NUM_THREADS", "").partition(",")
    if first.strip().isdigit():
        return max(1, int(first))
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _input_entries(job: TensorJob) -> int:
    return math.prod(job.shape) * len(job.inputs)


def working_bytes(plan: Plan, block_elements: int) -> int:
    """Bound the memory that merging one tensor takes beside its inputs and its result.

    It is on the device where blocks are merged. The selection of thresholds runs on the host, and
    is not counted.

    Args:
        plan: The plan.
        block_elements: Elements of a block on the device.

    Returns:
        Bytes, for the most demanding tensor of the plan.
    """
    most = 0
    for job in plan.jobs:
        if job.copy:
            continue
        columns = job.shape[-1] if job.shape else 1
        # A block is at least one row, and at most the tensor.
        elements = min(math.prod(job.shape), max(block_elements, columns))
        blocks = len(job.sources) + _BLOCKS_BESIDE_SOURCES
        most = max(most, _FLOAT32_BYTES * elements * blocks)
    if plan.method.whole_tensors:
        most = max(most, _whole_tensor_bytes(plan))
    return most


def _whole_tensor_bytes(plan: Plan) -> int:
    """Bytes of the factors and copies of the largest matrix that is merged as a whole."""
    most = 0
    if plan.method.family == "calibrated":
        return max(map(partial(_least_squares_bytes, plan), plan.jobs), default=0)
    for job in plan.jobs:
        k = len(job.sources)
        elements = math.prod(job.shape)
        if plan.method.family == "spectral":
            # Norms and embeddings take a mean, and a stack of experts goes matrix by matrix.
            role = plan.template.architecture.role(job.name)
            if len(job.shape) < 2 or role == "other":
                continue
            elements = math.prod(job.shape[-2:])
        copies = max(_SVD_COPIES + 2 * k, 7 + 4 * k)
        most = max(most, _FLOAT32_BYTES * elements * copies)
    return most


def _least_squares_bytes(plan: Plan, job: TensorJob) -> int:
    """Bytes of the matrices that weigh the sources of a tensor, and of the rows in work."""
    statistics = [plan.statistic(ref) for ref in job.sources]
    if job.copy or statistics[0] is None:
        return 0
    inputs, _ = statistics[0].operand.shape
    rows = job.shape[0]
    if not statistics[0].of_rows:
        rows = min(rows, ROWS_OF_PIECE)
    k = len(job.sources)
    # In float64: one per source, their sum, its inverse, and those of LAPACK. In float32: the
    # results.
    matrices = inputs**2 * (8 * (k + _LEAST_SQUARES_COPIES) + 4 * k)
    # The deltas in float32; their mean, the residual and a change in float64.
    copies = k + 8
    return matrices + copies * _FLOAT32_BYTES * rows * job.shape[-1]
