"""The data of a plan: the models that it reads and one job for each tensor of the result."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from paretomerge.checkpoint.architecture import Architecture
from paretomerge.checkpoint.header import Header
from paretomerge.checkpoint.model_config import (
    routed_config,
    untied_config,
    without_predictors,
)
from paretomerge.checkpoint.operand import Operand, size_in_bytes
from paretomerge.checkpoint.remapped import RemappedTensor
from paretomerge.checkpoint.vocabulary import Vocabulary
from paretomerge.merging.methods import Method
from paretomerge.merging.statistics import MergeStatistics, Statistic
from paretomerge.recipe import Recipe
from paretomerge.types import Params

INPUT_CACHE_BYTES = 400 << 20
"""Memory for inputs that a method reads more than once. Larger inputs are read from disk again."""

ModelConfig = dict[str, Any]  # Any: the content of a JSON file
"""The content of a `config.json`."""


class TensorRef(NamedTuple):
    """One tensor of one model.

    Attributes:
        model: The model, as the recipe names it.
        name: The tensor's name in the checkpoint of that model.
    """

    model: str
    name: str


class LayerRef(NamedTuple):
    """One layer of one model.

    Attributes:
        model: The model, as the recipe names it.
        layer: The layer's number, from 0.
    """

    model: str
    layer: int


class Weights(Protocol):
    """An opened model: on disk, with an adapter, in memory, or the result of a recipe step."""

    @property
    def folder(self) -> Path:
        """The folder of the model."""
        ...

    @property
    def weight_folders(self) -> tuple[Path, ...]:
        """The folders whose files hold the weights; () for a merge that has no files."""
        ...

    @property
    def tokenizer_folder(self) -> Path:
        """The folder with the tokenizer, which may be that of an adapter."""
        ...

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        ...

    @property
    def headers(self) -> Mapping[str, Header]:
        """Shape and dtype by tensor name."""
        ...

    @property
    def architecture(self) -> Architecture:
        """The layers, modules and roles of the tensors."""
        ...

    @property
    def dtype(self) -> str:
        """The model's dtype, as torch names it."""
        ...

    def operand(self, name: str) -> Operand:
        """Return a tensor as merges read it."""
        ...

    def check_unchanged(self) -> None:
        """Raise CheckpointError if the files have changed since the model was opened."""
        ...


@dataclass(frozen=True)
class TensorJob:
    """How one tensor of the result is made.

    Attributes:
        name: The tensor's name in the result.
        shape: The tensor's shape in the result.
        dtype: The tensor's dtype in the result, as torch names it.
        base: The tensor that task vectors are taken from; None where the method needs none.
        sources: The tensors to merge.
        parameters: The method's parameters per source, in the order of `sources`.
        options: The method's parameters for the whole merge.
        copy: True if the one source is copied as it is stored, without the method.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    base: TensorRef | None
    sources: tuple[TensorRef, ...]
    parameters: tuple[Params, ...] = ()
    options: Params = field(default_factory=dict)
    copy: bool = False

    @property
    def inputs(self) -> tuple[TensorRef, ...]:
        """Every tensor that the job reads: the sources, then the base if there is one."""
        if self.base is None:
            return self.sources
        return (*self.sources, self.base)


@dataclass(frozen=True)
class Plan:
    """A checked recipe, laid out as tensor jobs.

    Attributes:
        recipe: The recipe.
        method: The row of the recipe's method in the table of methods.
        weights: The opened models by the names that the recipe uses.
        jobs: One job per tensor of the result, sorted by name.
        dtype: The dtype that the result's config states.
        route: For each layer of the result, the layer that its config entries are copied from.
        vocabulary: The merged vocabulary, if the recipe asks for one.
        notes: Parts of the recipe that have no effect.
        untied: True if the result has an LM head of its own where the template ties it to the
            embedding.
        allow_nan: True if NaN and infinite weights are merged like others.
        statistics: The statistics of the sources, for a method that needs data.
    """

    recipe: Recipe
    method: Method
    weights: Mapping[str, Weights]
    jobs: tuple[TensorJob, ...]
    dtype: str
    route: tuple[LayerRef, ...]
    vocabulary: Vocabulary | None = None
    notes: tuple[str, ...] = ()
    untied: bool = False
    allow_nan: bool = False
    statistics: MergeStatistics | None = None

    @property
    def template(self) -> Weights:
        """The model whose config the result follows: the base, else the first model."""
        name = self.recipe.base_model or self.recipe.models[0]
        return self.weights[name]

    @cached_property
    def config(self) -> ModelConfig:
        """The `config.json` of the result.

        Depth, per-layer lists, dtype and vocabulary follow the recipe.

        Raises:
            CheckpointError: If a config cannot describe such a sequence of layers.
        """
        route = []
        for model, layer in self.route:
            config = self.weights[model].config
            route.append((config, layer))
        # Entries per layer move with their layers: sliding windows, layer types, and the like.
        config = routed_config(self.template.config, route, self.dtype)
        if not self._has_predictors:
            config = without_predictors(config)
        if self.untied:
            config = untied_config(config)
        if self.vocabulary is not None:
            config = _update_vocabulary(config, self.vocabulary.config_updates)
        return config

    @property
    def _has_predictors(self) -> bool:
        """Whether a predictor of further tokens is among the tensors of the result."""
        architecture = self.template.architecture
        # In other orders of the layers there is none behind the last one.
        beyond = architecture.is_predictor
        if len(self.route) not in (0, architecture.depth):
            beyond = architecture.is_named_predictor
        return any(beyond(job.name) for job in self.jobs)

    def operand(self, ref: TensorRef) -> Operand:
        """Return a tensor as jobs read it, in the merged vocabulary where there is one.

        Args:
            ref: A tensor of one of the plan's models.
        """
        model, name = ref
        weights = self.weights[model]
        operand = weights.operand(name)
        if self.vocabulary is None:
            return operand
        axis = weights.architecture.vocabulary_axis(name, operand.shape)
        if axis is None:
            return operand

        def operand_of(donor: str) -> Operand:
            # A token that a model lacks is taken from another one, which may name the tensor
            # differently or tie it to its embedding.
            donor_weights = self.weights[donor]
            name_in_donor = donor_weights.architecture.find_equivalent(name) or name
            return donor_weights.operand(name_in_donor)

        row_map = self.vocabulary.row_maps[model]
        return RemappedTensor(operand, row_map, operand_of)

    def statistic(self, ref: TensorRef) -> Statistic | None:
        """Return the statistic of a source's tensor; None if the plan has none of it.

        Args:
            ref: A tensor of one of the plan's sources.
        """
        if self.statistics is None:
            return None
        return self.statistics.find(*ref)

    def check_unchanged(self) -> None:
        """Raise CheckpointError if a file has changed since the plan was made."""
        for weights in self.weights.values():
            weights.check_unchanged()
        if self.statistics is not None:
            self.statistics.check_unchanged()

    def bytes_read(self) -> int:
        """Size of all inputs, each counted as often as a job has it."""
        total = 0
        for job in self.jobs:
            for model, name in job.inputs:
                header = self.weights[model].headers[name]
                total += header.bytes
        return total

    def bytes_written(self) -> int:
        """Size of the result's tensors."""
        return sum(size_in_bytes(job.shape, job.dtype) for job in self.jobs)


def _update_vocabulary(
    config: ModelConfig, updates: Mapping[str, object]
) -> ModelConfig:
    """The config with its vocabulary entries replaced, at the top and in the text part."""
    result = dict(config)
    # Multimodal configs nest the language part, which has a `vocab_size` of its own.
    if "text_config" in config:
        size = {"vocab_size": updates["vocab_size"]}
        result["text_config"] = _update_vocabulary(config["text_config"], size)
    for key, value in updates.items():
        # A level without `vocab_size` gets none. A special token may be new to the template.
        is_new_token = key != "vocab_size" and value is not None
        if key in config or is_new_token:
            result[key] = value
    return result
