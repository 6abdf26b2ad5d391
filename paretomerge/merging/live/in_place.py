"""A live model whose weights are replaced in place; its sources stay in memory between merges.

While searching, a candidate never touches the disk: it is written into the tensors of a model that is loaded once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from paretomerge.checkpoint.architecture import Architecture
from paretomerge.checkpoint.header import Header
from paretomerge.checkpoint.operand import InMemory, whole
from paretomerge.errors import RecipeError
from paretomerge.merging.block import CPU_BLOCK
from paretomerge.merging.engine import run
from paretomerge.merging.job_io import cast_block
from paretomerge.merging.live.names import live_names
from paretomerge.merging.plan.make import make_plan, open_weights
from paretomerge.merging.plan.plan import Plan, TensorJob, Weights
from paretomerge.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Warm:
    """`weights` with every tensor that has been read once kept on `device`."""

    def __init__(self, weights: Weights, device: str = "cpu") -> None:
        self.weights = weights
        self.device = device
        self._kept: dict[str, InMemory] = {}

    @property
    def folder(self) -> Path:
        return self.weights.folder

    @property
    def config(self) -> dict[str, Any]:
        return self.weights.config

    @property
    def headers(self) -> Mapping[str, Header]:
        return self.weights.headers

    @property
    def architecture(self) -> Architecture:
        return self.weights.architecture

    @property
    def dtype(self) -> str:
        return self.weights.dtype

    def operand(self, name: str) -> InMemory:
        if name not in self._kept:
            operand = self.weights.operand(name)
            self._kept[name] = InMemory(
                whole(operand).to(self.device, getattr(torch, operand.dtype))
            )
        return self._kept[name]

    def check_unchanged(self) -> None:
        self.weights.check_unchanged()


@dataclass(frozen=True)
class Merged:
    """A merge that is loaded. facts: `layers` and `parameters` of what would be written, and for merges in place `sparsity`:
    minus the L1 norm of (merged - base) over that of the farthest source, as written, after the cast (MM-MO's objective in
    units that do not depend on the model's size; Li et al. 2024, sec. 3.4).
    """

    model: "PreTrainedModel"
    facts: Mapping[str, float]

    @classmethod
    def of(cls, plan: Plan, model: "PreTrainedModel", **facts: float) -> "Merged":
        """What the plan tells, and `facts`."""
        return cls(
            model,
            {
                "layers": len(plan.route),
                "parameters": sum(prod(job.shape) for job in plan.jobs),
                **facts,
            },
        )


class ResidentModel:
    """`model` (a transformers model in eval mode) with `tokenizer`, to be filled with one recipe after another.

    base: the checkpoint that gives the architecture, and the reference of the sparsity. sources: kept in memory.
    dtype: of the live weights; the base's own by default, so that scores equal those of the written checkpoint.
    """

    def __init__(
        self, base: str, sources: Sequence[str], dtype: str | None = None, device: str = "cpu"
    ) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        opened = open_weights((base, *sources))
        self.checkpoints: dict[str, Weights] = {
            name: Warm(weights, device) for name, weights in opened.items()
        }
        self.base = base
        self.sources = tuple(source for source in sources if source != base)
        self.device = device
        self.dtype = dtype or self.checkpoints[base].dtype
        folder = self.checkpoints[base].folder
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, self.dtype)
        )
        self.model.to(device).eval()
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
        state = self.model.state_dict(keep_vars=False)
        self._live = {
            name: state[live]
            for name, live in live_names(self.model, self.checkpoints[base].headers).items()
        }
        self._farthest: float | None = None

    def load(self, recipe: Recipe) -> Merged:
        """Replace every weight by the recipe's. The tensors are those that `merge` would write, bit for bit."""
        plan = make_plan(recipe, self.checkpoints)
        if len(plan.route) != self.checkpoints[self.base].architecture.depth:
            raise RecipeError(
                f"expected a recipe with the base's depth, got {len(plan.route)} layers; write it out with `paretomerge merge`"
            )
        if strange := [
            job.name
            for job in plan.jobs
            if job.name not in self._live or tuple(self._live[job.name].shape) != job.shape
        ]:
            raise RecipeError(
                f"{strange[0]}: expected the tensors of the base, got another; write it out with `paretomerge merge`"
            )
        if plan.untied:
            raise RecipeError(
                "expected a head that is tied as in the base, got one of its own; write it out with `paretomerge merge`"
            )
        moved = dict.fromkeys((job.name for job in plan.jobs), 0.0)

        def put(job: TensorJob, start: int, block: torch.Tensor) -> None:
            live = cast_block(
                plan, job, block, self._live[job.name].view(-1)[start : start + block.numel()]
            )
            moved[job.name] += self._distance(live, job.name, start)

        run(plan, put, device=self.device)
        return Merged.of(plan, self.model, sparsity=-sum(moved.values()) / self.farthest)

    @property
    def farthest(self) -> float:
        """max_i L1(tau_i) over the sources."""
        if self._farthest is None:
            names = self.checkpoints[self.base].headers
            totals = [
                sum(self.distance(self._tensor(s, n), n) for n in names) for s in self.sources
            ]
            self._farthest = max(totals, default=0.0) or 1.0
        return self._farthest

    def distance(self, tensor: torch.Tensor, name: str) -> float:
        """L1 distance of one tensor to the base's of that name."""
        return self._distance(tensor.reshape(-1), name, 0)

    def _distance(self, flat: torch.Tensor, name: str, start: int) -> float:
        base = self._tensor(self.base, name).view(-1)[start : start + flat.numel()]
        total = 0.0
        # by blocks: one order of sums for any number of threads
        for ours, theirs in zip(
            torch.split(flat, CPU_BLOCK), torch.split(base, CPU_BLOCK), strict=True
        ):
            total += (
                (ours.to(torch.float32) - theirs.to(torch.float32))
                .abs()
                .sum(dtype=torch.float64)
                .item()
            )
        return total

    def _tensor(self, model: str, name: str) -> torch.Tensor:
        operand = self.checkpoints[model].operand(name)
        assert isinstance(operand, InMemory)
        return operand.tensor
