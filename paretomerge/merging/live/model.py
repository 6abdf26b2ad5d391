"""What live models share: their interface, a loaded merge, and weights that stay in memory."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from paretomerge.checkpoint.architecture import Architecture
from paretomerge.checkpoint.header import Header
from paretomerge.checkpoint.operand import InMemoryTensor, Operand, read_tensor
from paretomerge.merging.plan.plan import ModelConfig, Plan, Weights
from paretomerge.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class LiveModel(Protocol):
    """A loaded model that takes on one merge after another, without a file on disk."""

    @property
    def checkpoints(self) -> Mapping[str, Weights]:
        """The models that are kept in memory, by the names that recipes use."""
        ...

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase | None":
        """The tokenizer of every merge; None for models that read no text."""
        ...

    def load(self, recipe: Recipe) -> "LoadedMerge":
        """Replace the weights by those of a recipe. Earlier results of `load` become invalid."""
        ...


@dataclass(frozen=True)
class LoadedMerge:
    """A merge that is loaded.

    Attributes:
        model: The model, in eval mode.
        facts: Measurements that come with the merge. `layers` and `parameters`: the numbers of
            layers and of parameters of the checkpoint that the recipe would write. `sparsity`, for
            merges in place only: see `ResidentModel.load`.
    """

    model: "PreTrainedModel"
    facts: Mapping[str, float]

    @classmethod
    def from_plan(
        cls, plan: Plan, model: "PreTrainedModel", **facts: float
    ) -> "LoadedMerge":
        """Describe a model that was loaded by a plan.

        Args:
            plan: The plan.
            model: The model.
            **facts: Measurements besides the size.
        """
        parameters = sum(prod(job.shape) for job in plan.jobs)
        size = {"layers": len(plan.route), "parameters": parameters}
        return cls(model, {**size, **facts})


class CachedWeights:
    """Opened weights (`Weights`) for many merges.

    By default every tensor stays on the device once it has been read. On the CPU, tensors of mapped
    files are not copied.

    Args:
        weights: The weights to read.
        device: The device that keeps the tensors.
        keep: Whether tensors stay on the device. If not, they stay in their mapped files, and those
            that are computed, such as a model with an adapter, are computed again by each merge.
    """

    def __init__(
        self, weights: Weights, device: str = "cpu", keep: bool = True
    ) -> None:
        self.weights = weights
        self.device = device
        self.keep = keep
        self._cache: dict[str, InMemoryTensor] = {}

    @property
    def folder(self) -> Path:
        """The folder of the model."""
        return self.weights.folder

    @property
    def weight_folders(self) -> tuple[Path, ...]:
        """The folders whose files hold the weights."""
        return self.weights.weight_folders

    @property
    def tokenizer_folder(self) -> Path:
        """The folder with the tokenizer."""
        return self.weights.tokenizer_folder

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        return self.weights.config

    @property
    def headers(self) -> Mapping[str, Header]:
        """Shape and dtype by tensor name."""
        return self.weights.headers

    @property
    def architecture(self) -> Architecture:
        """The layers, modules and roles of the tensors."""
        return self.weights.architecture

    @property
    def dtype(self) -> str:
        """The model's dtype, as torch names it."""
        return self.weights.dtype

    def operand(self, name: str) -> Operand:
        """Return a tensor; the first call reads it, if it stays on the device."""
        if not self.keep:
            return self.weights.operand(name)
        if name not in self._cache:
            operand = self.weights.operand(name)
            dtype = getattr(torch, operand.dtype)
            tensor = _in_fewest_bytes(read_tensor(operand), dtype)
            self._cache[name] = InMemoryTensor(tensor.to(self.device))
        return self._cache[name]

    def check_unchanged(self) -> None:
        """Raise CheckpointError if the files have changed since the model was opened."""
        self.weights.check_unchanged()


def _in_fewest_bytes(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor in a dtype if that changes no value, else as it is.

    What is computed comes in float32. Recipe steps have rounded it to their dtype; a model with an
    adapter has not, and a merge to disk reads it unrounded.
    """
    cast = tensor.to(dtype)
    if cast is tensor or torch.equal(cast.to(tensor.dtype), tensor):
        return cast
    return tensor
