"""A live model made of layers that stay where they are: a route refers to the layers of its sources, and copies nothing.

While searching in data-flow space every candidate has its own number and order of layers. Their tensors are the resident
ones of the sources; only those that a scale divides are computed, where the last candidate's were.
"""

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from paretomerge.checkpoint.operand import whole
from paretomerge.errors import CheckpointError, RecipeError
from paretomerge.merging.engine import run
from paretomerge.merging.job_io import cast_block
from paretomerge.merging.live.in_place import Merged, Warm
from paretomerge.merging.live.names import live_names
from paretomerge.merging.plan.make import make_plan, open_weights
from paretomerge.merging.plan.plan import Pair, Plan, TensorJob, Weights
from paretomerge.merging.plan.steps import RecipeStep
from paretomerge.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SHELLS = 32  # models without weights that are kept, one per depth and kinds of layers


class RoutedModel:
    """`model` (a transformers model in eval mode) with `tokenizer`, to follow one route after another.

    sources: models whose layers routes take, kept in memory in `dtype`, by default the first one's. recipes: by the name that
    routes call them by, merges whose layers they may take, too: each is merged once. already: models that are open, by name.
    A route of another depth has another model object.
    """

    def __init__(
        self,
        sources: Sequence[str],
        dtype: str | None = None,
        device: str = "cpu",
        recipes: Mapping[str, Recipe] = MappingProxyType({}),
        already: Mapping[str, Weights] = MappingProxyType({}),
    ) -> None:
        opened = open_weights(sources, already)
        self.checkpoints: dict[str, Weights] = {
            n: w if isinstance(w, Warm) else Warm(w, device) for n, w in opened.items()
        }
        for name, recipe in recipes.items():
            self.checkpoints[name] = Warm(RecipeStep(make_plan(recipe, self.checkpoints)), device)
        self._steps = {
            step.name: step for name, recipe in recipes.items() for step in recipe.as_steps(name)
        }
        self.device = device
        first = self.checkpoints[sources[0]]
        self.dtype = dtype or first.dtype
        self._folder = first.folder
        self._resident: dict[Pair, nn.Parameter] = {}
        self._computed: list[nn.Parameter] = []
        self._shells: OrderedDict[str, _Shell] = OrderedDict()
        self._shell: _Shell | None = None

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        from transformers import AutoTokenizer

        made: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self._folder)
        return made

    def load(self, recipe: Recipe) -> Merged:
        """Follow a route. The tensors are those that `merge` would write, bit for bit, where `dtype` is the recipe's."""
        if recipe.merge_method != "passthrough":
            raise RecipeError(
                f"expected a route through layers (passthrough), got {recipe.merge_method}; load it in place"
            )
        if strange := [step.name for step in recipe.steps if step != self._steps.get(step.name)]:
            raise RecipeError(
                f"expected steps that are resident, {', '.join(map(str, self._steps)) or 'none'}, got another: {strange[0]}"
            )
        plan = make_plan(replace(recipe, steps=()), self.checkpoints)
        shell = self._shell_of(plan)
        if self._shell is not None:
            self._shell.empty()  # what was computed for the last route is computed over
        computed = self._compute(plan, tuple(job for job in plan.jobs if not _is_reference(job)))
        shell.fill(
            {
                j.name: computed[j.name] if j.name in computed else self._resident_of(j.sources[0])
                for j in plan.jobs
            }
        )
        self._shell = shell
        return Merged.of(plan, shell.model)

    def _compute(self, plan: Plan, jobs: tuple[TensorJob, ...]) -> dict[str, nn.Parameter]:
        """What no source has as it stands, on the device, in memory that earlier routes had: fresh memory costs as much as the
        arithmetic. So much is kept as the longest route needs.
        """
        spare, computed = list(self._computed), {}
        for job in jobs:
            at = next((i for i, old in enumerate(spare) if old.shape == job.shape), None)
            if at is None:
                self._computed.append(self._placed(torch.empty(job.shape, device=self.device)))
            computed[job.name] = self._computed[-1] if at is None else spare.pop(at)

        def put(job: TensorJob, start: int, block: torch.Tensor) -> None:
            cast_block(plan, job, block, computed[job.name].view(-1)[start : start + block.numel()])

        run(replace(plan, jobs=jobs), put, device=self.device)
        return computed

    def _resident_of(self, pair: Pair) -> nn.Parameter:
        if pair not in self._resident:
            model, name = pair
            self._resident[pair] = self._placed(
                whole(self.checkpoints[model].operand(name))
            )  # the tensor itself, in its own dtype
        return self._resident[pair]

    def _placed(self, tensor: torch.Tensor) -> nn.Parameter:
        wanted = getattr(torch, self.dtype) if tensor.is_floating_point() else tensor.dtype
        return nn.Parameter(tensor.to(self.device, wanted), requires_grad=False)

    def _shell_of(self, plan: Plan) -> "_Shell":
        config = {**plan.config, "dtype": self.dtype}
        key = json.dumps(config, sort_keys=True)
        if key not in self._shells:
            self._shells[key] = _Shell(config, self._folder, self.device)
            if len(self._shells) > _SHELLS:
                self._shells.popitem(last=False)
        self._shells.move_to_end(key)
        return self._shells[key]


def _is_reference(job: TensorJob) -> bool:
    """Whether the tensor is a source's as it stands."""
    return job.copy or job.parameters[0]["scale"] == 1


class _Shell:
    """A model of one config without weights of its own. Each layer has its number, so caches of keys and values work."""

    def __init__(self, config: Mapping[str, Any], folder: Path, device: str) -> None:
        from accelerate import init_empty_weights
        from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
        model.tie_weights()
        self.model: PreTrainedModel = model.eval()
        if (folder / "generation_config.json").is_file():
            self.model.generation_config = GenerationConfig.from_pretrained(folder)
        self._places: dict[str, list[tuple[nn.Module, str]]] = {}
        tied: dict[int, list[tuple[nn.Module, str]]] = {}
        for path, module in self.model.named_modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))
            for name, parameter in module.named_parameters(recurse=False):
                places = tied.setdefault(id(parameter), [])
                places.append((module, name))
                self._places[f"{path}.{name}" if path else name] = places
        self._names: dict[str, str] = {}
        self._nothing = dict(self.model.named_parameters(remove_duplicate=False))

    def fill(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Put parameters, by their names in a checkpoint, in their places; those tied to them come along."""
        if not self._names.keys() >= parameters.keys():
            self._names = live_names(self.model, parameters)
        for name, parameter in parameters.items():
            live = self._names[name]
            if parameter.shape != self._nothing[live].shape:
                expected, got = tuple(self._nothing[live].shape), tuple(parameter.shape)
                raise CheckpointError(
                    f"{name}: expected the shape {expected}, got {got}; do the models come from one base?"
                )
            for module, last in self._places[live]:
                module._parameters[last] = parameter
        for name, [(module, last), *_] in self._places.items():
            if module._parameters[last] is self._nothing[name]:
                raise CheckpointError(
                    f"{name}: expected a tensor for it in the route, got none; do the models come from one family?"
                )

    def empty(self) -> None:
        for name, parameter in self._nothing.items():
            for module, last in self._places[name]:
                module._parameters[last] = parameter
