"""The parts of a recipe: sources, slices, modules and the tokenizer, as frozen data."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from paretomerge.recipe.settings import ParameterSetting

RenameModel = Callable[[str], str]
"""Takes a model's name in a recipe and returns the name to write in its place."""

TOKENIZER_KEYWORDS = ("union", "base")
"""Values of a tokenizer's `source` that are not models."""


@dataclass(frozen=True)
class Source:
    """One model inside a slice.

    Attributes:
        model: A folder or a Hub name, with an optional `@revision` and an optional `+adapter`.
        layer_range: First layer and the layer after the last; None for all layers.
        parameters: Settings by parameter name, for this source only.
    """

    model: str
    layer_range: tuple[int, int] | None = None
    parameters: Mapping[str, ParameterSetting] = field(default_factory=dict)

    def rename_models(self, rename: RenameModel) -> "Source":
        """Return a copy with its model renamed."""
        return replace(self, model=rename(self.model))

    def to_dict(self) -> dict[str, Any]:
        """Return the source as the grammar writes it."""
        data: dict[str, Any] = {"model": self.model}
        if self.layer_range is not None:
            data["layer_range"] = list(self.layer_range)
        if self.parameters:
            data["parameters"] = dict(self.parameters)
        return data


@dataclass(frozen=True)
class Slice:
    """Consecutive output layers, each merged from the same number of layers of every source.

    Attributes:
        sources: The models to merge.
        parameters: Settings by parameter name, for all sources of the slice.
        base_model: Takes the place of the recipe's base model for these layers.
    """

    sources: tuple[Source, ...]
    parameters: Mapping[str, ParameterSetting] = field(default_factory=dict)
    base_model: str | None = None

    @property
    def is_whole_model(self) -> bool:
        """Whether the slice can be written as `models:`, over all layers without settings."""
        if self.parameters or self.base_model:
            return False
        return all(source.layer_range is None for source in self.sources)

    def rename_models(self, rename: RenameModel) -> "Slice":
        """Return a copy with every model renamed."""
        sources = [source.rename_models(rename) for source in self.sources]
        return replace(
            self,
            sources=tuple(sources),
            base_model=rename_optional(self.base_model, rename),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the slice as the grammar writes it."""
        sources = [source.to_dict() for source in self.sources]
        data: dict[str, Any] = {"sources": sources}
        if self.parameters:
            data["parameters"] = dict(self.parameters)
        if self.base_model:
            data["base_model"] = self.base_model
        return data


@dataclass(frozen=True)
class Module:
    """One part of a model that has several, such as the text part of a vision-language model.

    Attributes:
        slices: The layers of the module.
        parameters: Settings by parameter name, for all slices of the module.
    """

    slices: tuple[Slice, ...]
    parameters: Mapping[str, ParameterSetting] = field(default_factory=dict)

    def rename_models(self, rename: RenameModel) -> "Module":
        """Return a copy with every model renamed."""
        slices = [part.rename_models(rename) for part in self.slices]
        return replace(self, slices=tuple(slices))

    def to_dict(self) -> dict[str, Any]:
        """Return the module as the grammar writes it."""
        data = slices_to_dict(self.slices)
        if self.parameters:
            data["parameters"] = dict(self.parameters)
        return data


@dataclass(frozen=True)
class Tokenizer:
    """The vocabulary of the merged model.

    Attributes:
        source: `union`, `base` or a model.
        tokens: Rules for single tokens, by token.
        pad_to_multiple_of: The number of embedding rows is rounded up to a multiple of this.
    """

    source: str
    tokens: Mapping[str, Any] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None

    def rename_models(self, rename: RenameModel) -> "Tokenizer":
        """Return a copy with every model renamed, those in the rules of tokens included."""
        tokens = {}
        for token, rule in self.tokens.items():
            tokens[token] = _rename_in_rule(rule, rename)
        # `union` and `base` are keywords, not models.
        source = rename_tokenizer_source(self.source, rename)
        return replace(self, source=source, tokens=tokens)

    def to_dict(self) -> dict[str, Any]:
        """Return the tokenizer as the grammar writes it."""
        data: dict[str, Any] = {"source": self.source}
        if self.tokens:
            data["tokens"] = dict(self.tokens)
        if self.pad_to_multiple_of:
            data["pad_to_multiple_of"] = self.pad_to_multiple_of
        return data


def slices_to_dict(slices: tuple[Slice, ...]) -> dict[str, Any]:
    """Return `models: ...` if one slice holds whole models, else `slices: ...`."""
    # `models` is the form that people write; mergekit reads both.
    if len(slices) == 1 and slices[0].is_whole_model:
        sources = [source.to_dict() for source in slices[0].sources]
        return {"models": sources}
    return {"slices": [part.to_dict() for part in slices]}


def rename_optional(model: str | None, rename: RenameModel) -> str | None:
    """Rename a model that may be missing."""
    return None if model is None else rename(model)


def rename_tokenizer_source(source: str, rename: RenameModel) -> str:
    """Rename the source of a tokenizer, if it is a model."""
    return source if source in TOKENIZER_KEYWORDS else rename(source)


def _rename_in_rule(rule: object, rename: RenameModel) -> object:
    """Rename the model in `{source: model}` or `{source: {kind: model_token, model: ...}}`."""
    # Rules stay plain data: their models are checked when the vocabularies are merged.
    if not isinstance(rule, Mapping):
        return rule
    source = rule.get("source")
    if isinstance(source, str):
        return {**rule, "source": rename(source)}
    if not isinstance(source, Mapping):
        return rule
    model = source.get("model")
    if not isinstance(model, str):
        return rule
    renamed_source = {**source, "model": rename(model)}
    return {**rule, "source": renamed_source}
