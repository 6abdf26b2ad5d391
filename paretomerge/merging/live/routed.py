"""A live model whose layers are references to the layers of its sources, in the order of a route.

In data-flow space every candidate has its own number and order of layers. Loading one copies no
weights: its layers are the tensors of the sources that stay in memory. Only the tensors that a
scale changes are computed, into memory that earlier candidates used.
"""

import json
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from paretomerge.checkpoint.operand import read_tensor
from paretomerge.errors import CheckpointError, RecipeError
from paretomerge.merging.engine import run
from paretomerge.merging.job_io import cast_block
from paretomerge.merging.live.model import CachedWeights, LoadedMerge
from paretomerge.merging.live.model_class import empty_model, load_tokenizer
from paretomerge.merging.live.names import names_in_model
from paretomerge.merging.live.result_tokenizer import load_result_tokenizer
from paretomerge.merging.plan.make import make_plan, open_weights
from paretomerge.merging.plan.plan import (
    ModelConfig,
    Plan,
    TensorJob,
    TensorRef,
    Weights,
)
from paretomerge.merging.plan.steps import RecipeStep
from paretomerge.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# There is one per depth and sequence of layer kinds. Building one takes longer than loading a
# route.
_MAX_SKELETONS = 32


class RoutedModel:
    """A loaded model that takes on one route through layers after another (a `LiveModel`).

    Routes of different depths are different model objects over the same tensors.

    Args:
        sources: The models whose layers routes use; they stay in memory.
        dtype: The dtype of the loaded weights; by default that of the first source.
        device: cpu, cuda or cuda:N.
        recipes: Merges whose layers routes use, too, by the names that routes have for them. Each
            is merged once.
        already: Models that are open already, by name.
        allow_mismatch: Whether models are merged that do not seem to belong together.
    """

    def __init__(
        self,
        sources: Sequence[str],
        dtype: str | None = None,
        device: str = "cpu",
        recipes: Mapping[str, Recipe] = MappingProxyType({}),
        already: Mapping[str, Weights] = MappingProxyType({}),
        allow_mismatch: bool = False,
    ) -> None:
        self.allow_mismatch = allow_mismatch
        opened = open_weights(sources, already, mapped=True)
        self.checkpoints: dict[str, CachedWeights] = {}
        for name, weights in opened.items():
            self.checkpoints[name] = _cached(weights, device)
        self._steps: dict[str | None, Recipe] = {}
        for name, recipe in recipes.items():
            plan = make_plan(recipe, self.checkpoints, allow_mismatch=allow_mismatch)
            self.checkpoints[name] = CachedWeights(RecipeStep(plan), device)
            for step in recipe.as_steps(name):
                self._steps[step.name] = step
        self.device = device
        first = self.checkpoints[sources[0]]
        self.dtype = dtype or first.dtype
        self._folder = first.folder
        # Parameters that models refer to: those of the sources, and memory for computed ones.
        self._resident: dict[TensorRef, nn.Parameter] = {}
        self._computed: list[nn.Parameter] = []
        self._skeletons: OrderedDict[str, _Skeleton] = OrderedDict()
        self._loaded: _Skeleton | None = None
        self._chat_template: str | None = None
        # An architecture whose routes cannot be loaded is an error before the first of them.
        skeleton = self._skeleton_for(first.config)
        skeleton.find(first.headers)
        self._first_model = skeleton.model

    @property
    def model(self) -> "PreTrainedModel":
        """A model of the class of every route. It may be without weights."""
        return self._first_model

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase | None":
        """The tokenizer of the first source; None for models that read no text."""
        return load_tokenizer(self._folder)

    def load(self, recipe: Recipe) -> LoadedMerge:
        """Load the layers of a route.

        The tensors are those that `merge` would write, bit for bit, if `dtype` is the recipe's.

        Args:
            recipe: A route, as `paretomerge.space.routes.passthrough` writes it.

        Returns:
            The model with its facts. The next call takes its weights away.

        Raises:
            RecipeError: If the recipe is no route, or uses merges that are not in memory.
            CheckpointError: If the recipe does not fit its models.
        """
        if recipe.merge_method != "passthrough":
            raise RecipeError(
                "expected a route through layers (merge_method: passthrough), got "
                f"{recipe.merge_method}"
            )
        for step in recipe.steps:
            if step != self._steps.get(step.name):
                names = ", ".join(str(name) for name in self._steps) or "none"
                raise RecipeError(
                    f"The step {step.name!r} is not one that this model has in memory: {names}"
                )
        for weights in self.checkpoints.values():
            weights.check_unchanged()
        # The steps are in memory as models, so the plan need not merge them again.
        without_steps = replace(recipe, steps=())
        plan = make_plan(
            without_steps, self.checkpoints, allow_mismatch=self.allow_mismatch
        )
        if recipe.chat_template != self._chat_template:
            self.tokenizer = load_result_tokenizer(plan)
            self._chat_template = recipe.chat_template
        skeleton = self._skeleton_for(plan.config)
        if self._loaded is not None:
            # The tensors that were computed for the last route are overwritten now.
            self._loaded.clear()
        computed = self._compute(plan)
        parameters = {}
        for job in plan.jobs:
            parameter = computed.get(job.name)
            if parameter is None:
                parameter = self._resident_parameter(job.sources[0])
            parameters[job.name] = parameter
        skeleton.fill(parameters)
        self._loaded = skeleton
        return LoadedMerge.from_plan(plan, skeleton.model)

    def _compute(self, plan: Plan) -> dict[str, nn.Parameter]:
        """Compute the tensors that no source has as they are.

        Fresh memory would cost as much time as the arithmetic, so the memory of earlier routes is
        used again. As much is kept as the longest route needs.
        """
        jobs = [job for job in plan.jobs if not _is_unchanged(job)]
        spare = list(self._computed)
        computed: dict[str, nn.Parameter] = {}
        for job in jobs:
            parameter = _take_first(spare, job.shape)
            if parameter is None:
                memory = torch.empty(job.shape, device=self.device)
                parameter = self._placed(memory)
                self._computed.append(parameter)
            computed[job.name] = parameter

        def write(job: TensorJob, start: int, block: torch.Tensor) -> None:
            flat = computed[job.name].view(-1)
            end = start + block.numel()
            cast_block(plan, job, block, flat[start:end])

        plan_of_jobs = replace(plan, jobs=tuple(jobs))
        run(plan_of_jobs, write, device=self.device)
        return computed

    def _resident_parameter(self, ref: TensorRef) -> nn.Parameter:
        """A tensor of a source, without a copy if it has the dtype of the loaded weights."""
        if ref not in self._resident:
            operand = self.checkpoints[ref.model].operand(ref.name)
            tensor = read_tensor(operand)
            self._resident[ref] = self._placed(tensor)
        return self._resident[ref]

    def _placed(self, tensor: torch.Tensor) -> nn.Parameter:
        dtype = tensor.dtype
        if tensor.is_floating_point():
            dtype = getattr(torch, self.dtype)
        placed = tensor.to(self.device, dtype)
        return nn.Parameter(placed, requires_grad=False)

    def _skeleton_for(self, config: ModelConfig) -> "_Skeleton":
        """The model of a config. The least recently used ones are dropped."""
        # Routes of one depth can differ in their kinds of layers, so the key is the whole config.
        config = {**config, "dtype": self.dtype}
        key = json.dumps(config, sort_keys=True)
        if key not in self._skeletons:
            skeleton = _Skeleton(config, self._folder, self.device)
            self._skeletons[key] = skeleton
            if len(self._skeletons) > _MAX_SKELETONS:
                self._skeletons.popitem(last=False)
        self._skeletons.move_to_end(key)
        return self._skeletons[key]


def check_routable(weights: Weights) -> None:
    """Check that routes through the layers of a model can be loaded, from its headers alone.

    Args:
        weights: The model.

    Raises:
        CheckpointError: If a tensor of the checkpoint is no parameter of the loaded model, such as
            an expert that transformers packs.
    """
    skeleton = _Skeleton(weights.config, weights.folder, "cpu")
    skeleton.find(weights.headers)


def _cached(weights: Weights, device: str) -> CachedWeights:
    # Models that another live model has in memory are shared, not loaded twice.
    if isinstance(weights, CachedWeights):
        return weights
    return CachedWeights(weights, device)


def _take_first(
    parameters: list[nn.Parameter], shape: tuple[int, ...]
) -> nn.Parameter | None:
    """Take the first parameter of a shape out of a list."""
    for i, parameter in enumerate(parameters):
        if parameter.shape == shape:
            return parameters.pop(i)
    return None


def _is_unchanged(job: TensorJob) -> bool:
    """Whether the result is the source's tensor as it is."""
    if job.copy:
        return True
    return job.parameters[0]["scale"] == 1


class _Slot(NamedTuple):
    """A place for a parameter in a model."""

    module: nn.Module
    name: str

    @property
    def parameter(self) -> nn.Parameter:
        return self.module.get_parameter(self.name)

    def fill(self, parameter: nn.Parameter) -> None:
        self.module.register_parameter(self.name, parameter)


class _Skeleton:
    """A model of one config without weights of its own.

    Every layer has its own number, so caches of keys and values work even if a layer of a source
    comes more than once.

    Args:
        config: The model's configuration.
        folder: The folder with the generation config.
        device: The device of the buffers.
    """

    def __init__(self, config: ModelConfig, folder: Path, device: str) -> None:
        from transformers import GenerationConfig

        model = empty_model(config)
        self.model: PreTrainedModel = model.eval()
        if (folder / "generation_config.json").is_file():
            self.model.generation_config = GenerationConfig.from_pretrained(folder)
        self._slots: dict[str, list[_Slot]] = {}
        slots_of_parameter: dict[int, list[_Slot]] = {}
        for path, module in self.model.named_modules():
            for name, buffer in module.named_buffers(recurse=False):
                on_device = buffer.to(device)
                setattr(module, name, on_device)
            for name, parameter in module.named_parameters(recurse=False):
                # Tied parameters are one object, so they share one list of slots.
                slots = slots_of_parameter.setdefault(id(parameter), [])
                slots.append(_Slot(module, name))
                # Parameters of the model itself have no path.
                full_name = f"{path}.{name}" if path else name
                self._slots[full_name] = slots
        self._names: dict[str, str] = {}
        self._looked_up: set[str] = set()
        # Parameters on torch's meta device: they have a shape and no memory.
        self._empty = dict(self.model.named_parameters(remove_duplicate=False))

    def find(self, names: Iterable[str]) -> dict[str, str]:
        """Find the parameters of a checkpoint.

        Args:
            names: Names in the checkpoint.

        Returns:
            Name in the checkpoint -> name of the parameter, without what the model does not use.

        Raises:
            CheckpointError: If a tensor cannot be put into the model as it is.
        """
        found = names_in_model(self.model, names)
        for name, name_in_model in found.items():
            if name_in_model not in self._empty:
                raise CheckpointError(
                    f"{name} is no parameter of the model, so routes through the layers of this "
                    "architecture cannot be searched in memory; leave `space.routes` or `then` out "
                    "to search its weights, or write routes with `paretomerge merge`"
                )
        return found

    def fill(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Put parameters into the model, also where they are tied.

        Args:
            parameters: Every parameter, by its name in a checkpoint.

        Raises:
            CheckpointError: If a parameter is missing or has another shape than the model's.
        """
        # Routes of one config have the same tensors, so their names are looked up once.
        if self._looked_up != parameters.keys():
            self._names = self.find(parameters)
            self._looked_up = set(parameters)
        for name, name_in_model in self._names.items():
            parameter = parameters[name]
            expected = list(self._empty[name_in_model].shape)
            shape = list(parameter.shape)
            if shape != expected:
                raise CheckpointError(
                    f"{name}: expected the shape {expected}, got {shape}; "
                    "do the models come from one base?"
                )
            for slot in self._slots[name_in_model]:
                slot.fill(parameter)
        # A part of the model that is still empty would compute nothing but an error of torch.
        for name, slots in self._slots.items():
            if slots[0].parameter is self._empty[name]:
                raise CheckpointError(
                    f"{name}: the route has no tensor for this part of the model; "
                    "do the models come from one family?"
                )

    def clear(self) -> None:
        """Take all parameters out of the model."""
        for name, parameter in self._empty.items():
            for slot in self._slots[name]:
                slot.fill(parameter)
