"""A recipe step as a model that later steps merge from: tensors are computed when they are read."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from paretomerge.checkpoint.architecture import Architecture
from paretomerge.checkpoint.header import Header
from paretomerge.checkpoint.operand import Operand, matrix_shape
from paretomerge.merging.plan.plan import ModelConfig, Plan, TensorJob

if TYPE_CHECKING:
    import torch

    from paretomerge.merging.block import BlockMerger, Inputs


class RecipeStep:
    """The result of a plan as opened model weights (`Weights`), without a file on disk.

    Tensors are rounded to the dtype of the step, as if they had been written.

    Args:
        plan: The plan of the step.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._jobs = {}
        self.headers: dict[str, Header] = {}
        for job in plan.jobs:
            self._jobs[job.name] = job
            self.headers[job.name] = _header(job)

    @property
    def folder(self) -> Path:
        """The folder of the plan's template."""
        return self.plan.template.folder

    @property
    def tokenizer_folder(self) -> Path:
        """The folder with the tokenizer: that of the plan's template."""
        return self.plan.template.tokenizer_folder

    @property
    def config(self) -> ModelConfig:
        """The configuration of the step's result."""
        return self.plan.config

    @cached_property
    def architecture(self) -> Architecture:
        """The architecture of the step's result."""
        architecture = Architecture.infer(self.headers, self.config)
        separated: set[str] = set()
        for weights in self.plan.weights.values():
            separated |= weights.architecture.separated
        present = separated.intersection(self.headers)
        return replace(architecture, separated=frozenset(present))

    @property
    def dtype(self) -> str:
        """The dtype of the step's result."""
        return self.plan.dtype

    def operand(self, name: str) -> Operand:
        """Return a tensor of the result, which is computed as it is read."""
        job = self._jobs[name]
        # Copies go without float32, which cannot hold all integers.
        if not job.copy:
            return MergedTensor(self.plan, job)
        operand = self.plan.operand(job.sources[0])
        if operand.dtype == job.dtype:
            return operand
        return RoundedTensor(operand, job.dtype)

    def check_unchanged(self) -> None:
        """Raise CheckpointError if the files of any input have changed since they were opened."""
        for weights in self.plan.weights.values():
            weights.check_unchanged()


def _header(job: TensorJob) -> Header:
    # The tensor is in no file: only its dtype and shape are read from this header.
    no_file = Path()
    return Header(no_file, job.dtype, job.shape, 0)


@dataclass(frozen=True)
class MergedTensor:
    """A tensor of a recipe step, merged as its rows are read.

    Attributes:
        plan: The plan of the step.
        job: The job of the tensor.
    """

    plan: Plan
    job: TensorJob

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return self.job.shape

    @property
    def dtype(self) -> str:
        """The dtype that the step rounds to."""
        return self.job.dtype

    def rows(self, first: int, end: int, device: str = "cpu") -> "torch.Tensor":
        """Merge rows [first, end).

        Args:
            first: The first row.
            end: The row after the last one.
            device: The device to merge on.

        Returns:
            `(end - first, columns)` in float32, rounded to the step's dtype.
        """
        import torch

        from paretomerge.merging.job_io import cast_block

        # There is nothing to merge in a tensor without entries, and nothing a method could measure.
        if not torch.Size(self.shape).numel():
            _, columns = matrix_shape(self.shape)
            return torch.empty((end - first, columns), device=device)
        inputs, combine = self._prepare(device)
        block = combine(inputs.block(first, end))
        rounded = cast_block(self.plan, self.job, block)
        return rounded.to(torch.float32)

    def _prepare(self, device: str) -> "tuple[Inputs, BlockMerger]":
        """The tensor's inputs and the function that merges its blocks."""
        # Many methods read the whole tensor before the first block, so this is done once.
        if device not in self._prepared:
            from paretomerge.merging.job_io import job_inputs

            inputs = job_inputs(self.plan, self.job, device)
            combine = self.plan.method.function(inputs)
            self._prepared[device] = (inputs, combine)
        return self._prepared[device]

    @cached_property
    def _prepared(self) -> "dict[str, tuple[Inputs, BlockMerger]]":
        return {}


@dataclass(frozen=True)
class RoundedTensor:
    """A tensor that a recipe step copies, rounded to the step's dtype.

    Attributes:
        operand: The tensor to copy.
        dtype: The dtype that the step rounds to.
    """

    operand: Operand
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return self.operand.shape

    def rows(self, first: int, end: int, device: str = "cpu") -> "torch.Tensor":
        """Read rows [first, end).

        Args:
            first: The first row.
            end: The row after the last one.
            device: The device of the result.

        Returns:
            `(end - first, columns)` in float32, rounded to the step's dtype.
        """
        import torch

        rows = self.operand.rows(first, end, device)
        rounded = rows.to(getattr(torch, self.dtype))
        return rounded.to(torch.float32)
