"""A live model whose weights are replaced in place; its sources stay in memory between merges.

While searching, a candidate never touches the disk: it is written into the tensors of a model that is loaded once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from paretomerge.errors import CheckpointError, RecipeError
from paretomerge.merge.engine import merge_tensor
from paretomerge.merge.plan import make_plan, open_checkpoints
from paretomerge.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Merged:
    """What the merge saw on its way.

    l1: L1 norm of (merged - base) over that of the farthest source, as written, after the cast (MM-MO's sparsity
    objective in units that do not depend on the model's size; Li et al. 2024, sec. 3.4).
    """

    l1: float


class ResidentModel:
    """`model` (a transformers model in eval mode) with `tokenizer`, to be filled with one recipe after another.

    base: the checkpoint that gives the architecture, and the reference of the sparsity. sources: kept in memory.
    dtype: of the live weights; the base's own by default, so that scores equal those of the written checkpoint.
    """

    def __init__(self, base: str, sources: Sequence[str], dtype: str | None = None, device: str = "cpu") -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.checkpoints = open_checkpoints((base, *sources))
        self.base = base
        self.sources = tuple(source for source in sources if source != base)
        self.dtype = dtype or self.checkpoints[base].dtype
        folder = self.checkpoints[base].folder
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, self.dtype))
        self.model.to(device).eval()
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
        self._live = self.model.state_dict(keep_vars=False)
        missing = [name for name in self.checkpoints[base].headers if name not in self._live]
        if missing:
            raise CheckpointError(f"{base}: {missing[0]!r} has no place of that name in the loaded model; it cannot be replaced in place")
        self._read: Any = lru_cache(maxsize=None)(self._load)
        self._farthest: float | None = None

    def load(self, recipe: Recipe) -> Merged:
        """Replace every weight by the recipe's. The tensors are those that `merge` would write, bit for bit."""
        plan = make_plan(recipe, self.checkpoints)
        if len(plan.route) != self.checkpoints[self.base].architecture.depth:
            raise RecipeError(
                f"expected a recipe with the base's depth, got {len(plan.route)} layers; write it out with `paretomerge merge`"
            )
        dtype = getattr(torch, self.dtype)
        moved = 0.0
        with torch.no_grad():
            for job in plan.jobs:
                merged = merge_tensor(plan, job, self._read).to(dtype)
                moved += self.distance(merged, job.name)
                self._live[job.name].copy_(merged)
        return Merged(l1=moved / self.farthest)

    @property
    def farthest(self) -> float:
        """max_i L1(tau_i) over the sources."""
        if self._farthest is None:
            names = self.checkpoints[self.base].headers
            totals = [sum(self.distance(self._read(s, n), n) for n in names) for s in self.sources]
            self._farthest = max(totals, default=0.0) or 1.0
        return self._farthest

    def distance(self, tensor: torch.Tensor, name: str) -> float:
        """L1 distance of one tensor to the base's of that name."""
        total: float = (tensor.to(torch.float32) - self._read(self.base, name)).abs().sum(dtype=torch.float64).item()
        return total

    def _load(self, model: str, tensor: str) -> torch.Tensor:
        return self.checkpoints[model].tensor(tensor).to(self.model.device, torch.float32)
