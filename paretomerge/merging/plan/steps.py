"""A recipe step as a model that later steps merge from: tensors are computed when they are read."""

import threading
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from paretomerge.checkpoint.architecture import Architecture
from paretomerge.checkpoint.header import Header
from paretomerge.checkpoint.operand import Operand, matrix_shape
from paretomerge.merging.plan.plan import ModelConfig, Plan, TensorJob, Weights

if TYPE_CHECKING:
    import torch

    from paretomerge.merging.block import BlockMerger, Inputs


class RecipeStep:
    """The result of a plan as opened model weights (`Weights`), without a file on disk.

    Tensors are rounded to the dtype of the step, as if they had been written.

    Args:
        plan: The plan of the step.
        shared: Whether several other steps read this one. Then each of its blocks is merged once
            for all of them. Without, a lineage of merges would take a time that doubles with each
            generation.
    """

    def __init__(self, plan: Plan, shared: bool = False) -> None:
        self.plan = plan
        self._shared = shared
        # The tensors that are being read now, by name and thread: methods have a state while they
        # merge a tensor, and threads must not share it.
        self._read: WeakValueDictionary[tuple[str, int], MergedTensor] = (
            WeakValueDictionary()
        )
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
    def weight_folders(self) -> tuple[Path, ...]:
        """None: a step has no files."""
        return ()

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
            return self._merged_tensor(job)
        operand = self.plan.operand(job.sources[0])
        if operand.dtype == job.dtype:
            return operand
        return RoundedTensor(operand, job.dtype)

    def _merged_tensor(self, job: TensorJob) -> "MergedTensor":
        if not self._shared:
            return MergedTensor(self.plan, job)
        key = (job.name, threading.get_ident())
        tensor = self._read.get(key)
        if tensor is None:
            # It lives as long as a reader has it.
            tensor = MergedTensor(self.plan, job, keeps_block=True)
            self._read[key] = tensor
        return tensor

    @cached_property
    def _models(self) -> "dict[int, Weights]":
        """What this step rests on, by identity: steps and models with files, each once."""
        found: dict[int, Weights] = {}
        for weights in self.plan.weights.values():
            found[id(weights)] = weights
            if isinstance(weights, RecipeStep):
                found |= weights._models
        return found

    def check_unchanged(self) -> None:
        """Raise CheckpointError if the files of any input have changed since they were opened."""
        plans = [self.plan]
        for weights in self._models.values():
            # A step has no weights of its own, but perhaps statistics.
            if isinstance(weights, RecipeStep):
                plans.append(weights.plan)
            else:
                weights.check_unchanged()
        for plan in plans:
            if plan.statistics is not None:
                plan.statistics.check_unchanged()


def plans_of_steps(plan: Plan) -> list[Plan]:
    """The plans of all steps that a plan rests on, each once.

    Args:
        plan: The plan of a recipe.
    """
    found: dict[int, Plan] = {}
    for weights in RecipeStep(plan)._models.values():
        if isinstance(weights, RecipeStep):
            found[id(weights)] = weights.plan
    return list(found.values())


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
        keeps_block: Whether the latest block stays in memory, for other readers that ask for it.
    """

    plan: Plan
    job: TensorJob
    keeps_block: bool = False

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

        # There is nothing to merge in a tensor without entries, and nothing a method could measure.
        if not torch.Size(self.shape).numel():
            _, columns = matrix_shape(self.shape)
            return torch.empty((end - first, columns), device=device)
        if not self.keeps_block:
            return self._merge(first, end, device).to(torch.float32)
        key = (first, end, device)
        if key not in self._block:
            self._block.clear()
            self._block[key] = self._merge(first, end, device)
        # A copy, as the caller may write to what it gets.
        return self._block[key].to(torch.float32, copy=True)

    def _merge(self, first: int, end: int, device: str) -> "torch.Tensor":
        """Rows [first, end) in the step's dtype."""
        from paretomerge.merging.job_io import cast_block

        inputs, combine = self._prepare(device)
        block = combine(inputs.block(first, end))
        return cast_block(self.plan, self.job, block)

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

    @cached_property
    def _block(self) -> "dict[tuple[int, int, str], torch.Tensor]":
        """The latest block, by its rows and device."""
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
