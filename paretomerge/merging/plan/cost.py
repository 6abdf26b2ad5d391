"""What a plan will cost: bytes read and written, memory, and an estimate of the time."""

import math
from dataclasses import dataclass

from paretomerge.merging.plan.plan import INPUT_CACHE_BYTES, Plan, TensorJob

# The interpreter with torch loaded, measured.
_PROCESS_BYTES = 350_000_000
# Blocks in work, and the entries that the selection of a threshold collects.
_BYTES_PER_THREAD = 60_000_000
# An average NVMe drive, read or written.
_DISK_BYTES_PER_SECOND = 1.0e9
_FLOAT32_BYTES = 4


@dataclass(frozen=True)
class Cost:
    """What a plan will cost.

    Attributes:
        read: Bytes of the inputs.
        written: Bytes of the result, which is also the free disk space that it needs.
        memory: Peak bytes of the process.
        seconds: Time on one core with a disk of a gigabyte per second; None for methods that work
            on whole matrices.
    """

    read: int
    written: int
    memory: int
    seconds: float | None


def estimate_cost(plan: Plan, threads: int = 1) -> Cost:
    """Estimate the cost of a plan from headers alone.

    Args:
        plan: The plan.
        threads: Number of tensors that are merged at a time.

    Returns:
        The estimate.
    """
    method = plan.method
    read = plan.bytes_read()
    written = plan.bytes_written()
    memory_per_thread = _BYTES_PER_THREAD
    if method.whole_tensors:
        tensor_bytes = [_whole_tensor_bytes(job) for job in plan.jobs]
        memory_per_thread += max(tensor_bytes, default=0)
    # Only methods that read a tensor more than once keep its inputs in memory.
    cached = min(INPUT_CACHE_BYTES, read) if method.multi_pass else 0
    memory = _PROCESS_BYTES + cached + threads * memory_per_thread
    seconds = None
    if method.ns_per_entry is not None:
        entries = sum(_input_entries(job) for job in plan.jobs)
        disk_seconds = (read + written) / _DISK_BYTES_PER_SECOND
        # The pace is measured in nanoseconds per entry of each input, by benchmarks/merge.py.
        seconds = entries * method.ns_per_entry * 1e-9 + disk_seconds
    return Cost(read, written, memory, seconds)


def _input_entries(job: TensorJob) -> int:
    return math.prod(job.shape) * len(job.inputs)


def _whole_tensor_bytes(job: TensorJob) -> int:
    """Bytes of a tensor's inputs and result in float32, and as much again for matrix factors."""
    copies = 2 * len(job.inputs) + 2
    return _FLOAT32_BYTES * math.prod(job.shape) * copies
