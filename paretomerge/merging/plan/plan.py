"""What a plan is made of: the models it reads, one job for each tensor of the result, and what else the result needs."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from paretomerge.checkpoint.architecture import Architecture
from paretomerge.checkpoint.header import Header
from paretomerge.checkpoint.model_config import routed_config
from paretomerge.checkpoint.operand import Operand, size_in_bytes
from paretomerge.checkpoint.remapped import RemappedTensor
from paretomerge.checkpoint.vocabulary import Vocabulary
from paretomerge.merging.methods import Method
from paretomerge.recipe import Recipe

HELD_BYTES = 400 << 20
"""Inputs of the tensors in work that a method looks at more than once are kept in memory up to this size, else read again."""

Pair = tuple[str, str]
"""(model as the recipe names it, name of a tensor in it)."""


class Weights(Protocol):
    """A model to merge from: on disk, with an adapter, in memory, or the result of an earlier step."""

    @property
    def folder(self) -> Path: ...
    @property
    def config(self) -> dict[str, Any]: ...
    @property
    def headers(self) -> Mapping[str, Header]: ...
    @property
    def architecture(self) -> Architecture: ...
    @property
    def dtype(self) -> str: ...
    def operand(self, name: str) -> Operand: ...
    def check_unchanged(self) -> None: ...


@dataclass(frozen=True)
class TensorJob:
    """One output tensor: which tensors of which models make it, with what settings.

    `parameters` has one entry per source. A `copy` takes its one source as it is stored.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    base: Pair | None
    sources: tuple[Pair, ...]
    parameters: tuple[Mapping[str, Any], ...] = ()
    options: Mapping[str, Any] | None = None
    copy: bool = False

    @property
    def pairs(self) -> tuple[Pair, ...]:
        return self.sources + ((self.base,) if self.base else ())


@dataclass(frozen=True)
class Plan:
    """A recipe that has been understood: every job, in the order of names, and the models that they read.

    route: for each output layer the model and layer that its config entries follow.
    """

    recipe: Recipe
    method: Method
    weights: Mapping[str, Weights]
    jobs: tuple[TensorJob, ...]
    dtype: str
    route: tuple[tuple[str, int], ...]
    vocabulary: Vocabulary | None = None
    notes: tuple[str, ...] = ()
    """What in the recipe has no effect."""
    untied: bool = False
    """Whether the result has a head of its own where the template's is its embedding."""
    allow_nan: bool = False

    @property
    def template(self) -> Weights:
        """The model whose config the result follows."""
        return self.weights[self.recipe.base_model or self.recipe.models[0]]

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json of the result: depth, per-layer lists, dtype and vocabulary follow the recipe."""
        route = [(self.weights[model].config, layer) for model, layer in self.route]
        config = routed_config(self.template.config, route, self.dtype)
        if self.untied:
            config = _with(config, "tie_word_embeddings", False)
        return (
            _with_vocabulary(config, self.vocabulary.config_updates) if self.vocabulary else config
        )

    def operand(self, pair: Pair) -> Operand:
        """What a job reads, in the merged vocabulary where there is one."""
        model, name = pair
        operand = self.weights[model].operand(name)
        if (
            self.vocabulary is None
            or self.weights[model].architecture.vocabulary_axis(name, operand.shape) is None
        ):
            return operand
        return RemappedTensor(
            operand,
            self.vocabulary.row_maps[model],
            lambda other: self.weights[other].operand(self._in(other, name)),
        )

    def bytes_read(self) -> int:
        """One reading of every input."""
        return sum(self.weights[m].headers[t].bytes for job in self.jobs for m, t in job.pairs)

    def bytes_written(self) -> int:
        return sum(size_in_bytes(job.shape, job.dtype) for job in self.jobs)

    def _in(self, model: str, name: str) -> str:
        return self.weights[model].architecture.find_equivalent(name) or name


def _with(config: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """The key set at the top, and in the text part where that has it."""
    text = (
        {"text_config": {**config["text_config"], key: value}}
        if key in config.get("text_config", {})
        else {}
    )
    return {**config, **text, key: value}


def _with_vocabulary(config: dict[str, Any], updates: Mapping[str, Any]) -> dict[str, Any]:
    """The updates at every level that has the key: multimodal configs nest the language part."""
    out = {
        k: _with_vocabulary(v, {"vocab_size": updates["vocab_size"]}) if k == "text_config" else v
        for k, v in config.items()
    }
    return out | {
        k: v for k, v in updates.items() if k in out or (k != "vocab_size" and v is not None)
    }
