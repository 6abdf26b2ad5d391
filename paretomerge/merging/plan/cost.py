"""What a plan will cost: bytes read and written, memory, and a guess at the time. From headers only."""

import math
from dataclasses import dataclass

from paretomerge.merging.plan.plan import HELD_BYTES, Plan, TensorJob

_PROCESS = 350_000_000  # bytes: the interpreter with torch
_PER_THREAD = 60_000_000  # bytes: blocks in flight, and what selecting a threshold collects
_DISK = 1.0e9  # bytes a second, read or written: a middling NVMe drive


@dataclass(frozen=True)
class Cost:
    """read: bytes of the inputs; written: of the output, also the free disk that is needed; memory: peak bytes;
    seconds: on one core, with a disk of a gigabyte a second; None for methods on whole matrices."""

    read: int
    written: int
    memory: int
    seconds: float | None


def cost(plan: Plan, threads: int = 1) -> Cost:
    elements = sum(math.prod(job.shape) * len(job.pairs) for job in plan.jobs)
    read, written = plan.bytes_read(), plan.bytes_written()
    whole = max((_whole(job) for job in plan.jobs), default=0) if plan.method.whole_tensors else 0
    pace = plan.method.ns_per_entry
    seconds = None if pace is None else elements * pace * 1e-9 + (read + written) / _DISK
    held = min(HELD_BYTES, read) if plan.method.multi_pass else 0
    return Cost(read, written, _PROCESS + held + threads * (_PER_THREAD + whole), seconds)


def _whole(job: TensorJob) -> int:
    """Bytes of a tensor's sources, result and as much again for factors, in float32."""
    return 4 * math.prod(job.shape) * (2 * len(job.pairs) + 2)
