"""An earlier step of a recipe as a model to merge from: its tensors are computed when a later step reads them."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paretomerge.checkpoint.architecture import Architecture
from paretomerge.checkpoint.header import Header
from paretomerge.checkpoint.operand import Operand, extent
from paretomerge.errors import ParetoMergeError, RecipeError
from paretomerge.merging.plan.make import make_plan, open_weights
from paretomerge.merging.plan.plan import Plan, TensorJob, Weights
from paretomerge.recipe import Recipe

if TYPE_CHECKING:
    import torch

    from paretomerge.merging.block import BlockMerger, Inputs


class RecipeStep:
    """The result of `plan`, never written to disk. A tensor is rounded to the step's dtype, as if it had been."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._jobs = {job.name: job for job in plan.jobs}
        here = Path()
        self.headers: Mapping[str, Header] = {
            name: Header(here, job.dtype, job.shape, 0) for name, job in self._jobs.items()
        }

    @property
    def folder(self) -> Path:
        """Where the tokenizer is."""
        return self.plan.template.folder

    @property
    def config(self) -> dict[str, Any]:
        return self.plan.config

    @cached_property
    def architecture(self) -> Architecture:
        return Architecture.infer(self.headers, self.config)

    @property
    def dtype(self) -> str:
        return self.plan.dtype

    def operand(self, name: str) -> Operand:
        job = self._jobs[name]
        if not job.copy:
            return Computed(self.plan, job)
        operand = self.plan.operand(job.sources[0])
        return operand if operand.dtype == job.dtype else Rounded(operand, job.dtype)

    def check_unchanged(self) -> None:
        for weights in self.plan.weights.values():
            weights.check_unchanged()


@dataclass(frozen=True)
class Computed:
    """A tensor of a step."""

    plan: Plan
    job: TensorJob

    @property
    def shape(self) -> tuple[int, ...]:
        return self.job.shape

    @property
    def dtype(self) -> str:
        return self.job.dtype

    def rows(self, first: int, end: int, device: str = "cpu") -> "torch.Tensor":
        import torch

        from paretomerge.merging.job_io import cast_block

        if not torch.Size(self.shape).numel():
            return torch.empty((end - first, extent(self.shape)[1]), device=device)
        inputs, merge_block = self._prepared(device)
        return cast_block(self.plan, self.job, merge_block(inputs.block(first, end))).to(
            torch.float32
        )

    def _prepared(self, device: str) -> "tuple[Inputs, BlockMerger]":
        if device not in self._by_device:
            from paretomerge.merging.job_io import job_inputs

            inputs = job_inputs(self.plan, self.job, device)
            self._by_device[device] = (inputs, self.plan.method.function(inputs))
        return self._by_device[device]

    @cached_property
    def _by_device(self) -> "dict[str, tuple[Inputs, BlockMerger]]":
        return {}


@dataclass(frozen=True)
class Rounded:
    """A tensor that a step copies, in the step's dtype."""

    operand: Operand
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.operand.shape

    def rows(self, first: int, end: int, device: str = "cpu") -> "torch.Tensor":
        import torch

        return (
            self.operand.rows(first, end, device).to(getattr(torch, self.dtype)).to(torch.float32)
        )


def open_steps(
    recipe: Recipe, already: Mapping[str, Weights], allow_nan: bool, download: bool = True
) -> dict[str, Weights]:
    """The named steps of a recipe, each able to use those before it; and what was open already."""
    if not recipe.steps:
        return dict(already)
    opened = dict(open_weights(recipe.files, already, allow_nan, download))
    for step in recipe.steps:
        if step.tokenizer or step.tokenizer_source or step.chat_template:
            raise RecipeError(
                f"{step.name}: expected tokenizer and chat template in the last document, got them in a step; move them there"
            )
        assert step.name is not None
        try:
            opened[step.name] = RecipeStep(make_plan(step, opened, allow_nan))
        except ParetoMergeError as error:
            raise type(error)(
                f"{step.name}: {error}", tuple(f"{step.name}: {part}" for part in error.parts)
            ) from error
    return opened
