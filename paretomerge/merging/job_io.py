"""What goes into a tensor job's merge method, and the cast of what comes out of it."""

import torch
from torch import Tensor

from paretomerge.checkpoint.operand import (
    CachedTensor,
    Operand,
    StoredTensor,
    size_in_bytes,
)
from paretomerge.errors import CheckpointError
from paretomerge.merging.block import Inputs
from paretomerge.merging.plan.plan import Plan, TensorJob


def job_inputs(
    plan: Plan,
    job: TensorJob,
    device: str = "cpu",
    cache_bytes: int = 0,
) -> Inputs:
    """The inputs of the plan's method for one tensor.

    Args:
        plan: The plan that the job belongs to.
        job: The tensor to merge.
        device: The device of the blocks.
        cache_bytes: Inputs that the method reads more than once stay in memory up to this size.

    Returns:
        Operands that are read when the method asks for their rows, with all parameters.
    """
    operands = [plan.operand(ref) for ref in job.inputs]
    sizes = [size_in_bytes(operand.shape, operand.dtype) for operand in operands]
    # Reading from memory is faster than reading a file twice.
    total_bytes = sum(sizes)
    if plan.method.multi_pass and total_bytes <= cache_bytes:
        operands = [_cached(operand) for operand in operands]
    k = len(job.sources)
    role = plan.template.architecture.role(job.name)
    is_matrix = len(job.shape) >= 2 and role != "other"
    return Inputs(
        name=job.name,
        shape=job.shape,
        base=operands[k] if job.base else None,
        sources=operands[:k],
        parameters=job.parameters,
        options=job.options,
        seed=plan.recipe.seed,
        device=device,
        is_matrix=is_matrix,
        statistics=tuple(plan.statistic(ref) for ref in job.sources),
    )


def _cached(operand: Operand) -> Operand:
    if isinstance(operand, StoredTensor):
        return CachedTensor(operand)
    return operand


def cast_block(
    plan: Plan,
    job: TensorJob,
    block: Tensor,
    out: Tensor | None = None,
) -> Tensor:
    """Cast a merged block to the job's dtype.

    Args:
        plan: The plan that the job belongs to.
        job: The tensor that the block is part of.
        block: The merged block, in float32.
        out: Flat memory for the result, in any dtype.

    Returns:
        The cast block, or `out`.

    Raises:
        CheckpointError: If a weight is too large for the dtype, or for float32, and the plan does
            not allow NaN and infinite weights.
    """
    dtype = getattr(torch, job.dtype)
    # A cast straight into the memory saves one pass over the block.
    if out is not None and out.dtype == dtype:
        result = out.copy_(block.reshape(-1))
    else:
        result = block.to(dtype)
    if not plan.allow_nan and not _is_finite(result):
        largest = block.abs().max().item()
        raise CheckpointError(
            f"{job.name}: expected values that {job.dtype} can hold, got {largest:.3g}; "
            "check the weights of the recipe"
        )
    if out is None or result is out:
        return result
    return out.copy_(result.reshape(-1))


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point():
        return True
    # The sum is much cheaper than a test of each entry. Finite entries may still have an infinite
    # sum.
    if torch.isfinite(tensor.sum()):
        return True
    return bool(torch.isfinite(tensor).all())
