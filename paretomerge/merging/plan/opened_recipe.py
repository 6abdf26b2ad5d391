"""A recipe with its models opened: look-ups that laying out a plan needs."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from paretomerge.checkpoint.architecture import (
    DEFAULT_MODULE,
    LANGUAGE_MODULE,
    Architecture,
)
from paretomerge.checkpoint.header import Header
from paretomerge.checkpoint.loaded_names import loaded_names
from paretomerge.checkpoint.reference import canonical_name
from paretomerge.checkpoint.vocabulary import Vocabulary
from paretomerge.merging.methods import Method
from paretomerge.merging.plan.plan import TensorRef, Weights
from paretomerge.merging.statistics import MergeStatistics
from paretomerge.recipe import Recipe

Shape = tuple[int, ...]


def models_to_open(recipe: Recipe) -> tuple[str, ...]:
    """The models of a recipe, and the model that only gives its tokenizer, if there is one."""
    source = recipe.tokenizer_source
    if recipe.tokenizer:
        source = recipe.tokenizer.source
    # `union` and `base` stand for models that the recipe names already.
    if source is None or source in ("union", "base", *recipe.models):
        return recipe.models
    return (*recipe.models, source)


@dataclass(frozen=True)
class OpenedRecipe:
    """A recipe whose method is known and whose models are open.

    Attributes:
        recipe: The recipe.
        method: The row of the recipe's method in the table of methods.
        weights: The opened models by the names that the recipe uses.
        allow_mismatch: Whether models are merged that do not seem to belong together.
        statistics: The statistics of the sources, for a method that needs data.
    """

    recipe: Recipe
    method: Method
    weights: Mapping[str, Weights]
    allow_mismatch: bool = False
    statistics: MergeStatistics | None = None

    @cached_property
    def template_name(self) -> str:
        """The model whose tensors and config the result follows: the base, else the first model."""
        return self.recipe.base_model or self.recipe.models[0]

    @cached_property
    def template(self) -> Weights:
        """The opened model `template_name`."""
        return self.weights[self.template_name]

    @cached_property
    def architecture(self) -> Architecture:
        """The architecture of the template."""
        return self.template.architecture

    @cached_property
    def language_module(self) -> str:
        """The module whose layers can be stacked; the whole model if it has one module."""
        return self.architecture.module(self.architecture.prefix)

    @cached_property
    def locations(self) -> dict[str, str]:
        """Where each model lies, the same for every spelling of one path."""
        return {model: canonical_name(model) for model in self.recipe.models}

    @cached_property
    def template_shapes(self) -> Mapping[str, set[Shape]]:
        """Shapes of the template's tensors, in any layer, by their names at layer 0."""
        # Layers differ in shape in some families, and a route may move them.
        shapes: dict[str, set[Shape]] = defaultdict(set)
        for name, header in self.template.headers.items():
            kind = name_at_layer_0(name, self.architecture)
            shapes[kind].add(header.shape)
        return shapes

    def header(self, ref: TensorRef) -> Header:
        """Return shape and dtype of a tensor."""
        weights = self.weights[ref.model]
        return weights.headers[ref.name]

    def name_at(self, name: str, layer: int | None) -> str:
        """Return the template's name of a tensor in a layer; None stands for outside the layers."""
        if layer is None:
            return name
        return self.architecture.at_layer(name, layer)

    def find_tensor(self, model: str, name: str, layer: int | None) -> TensorRef | None:
        """Find the tensor of a model that corresponds to one of the template.

        Args:
            model: The model to look in.
            name: The template's name of the tensor, at layer 0 if it is in a layer.
            layer: The layer of `model` to look in; None outside the layers.

        Returns:
            The tensor, under the name that the model has for it; None if the model has none.
        """
        architecture = self.weights[model].architecture
        # A model may tie its head, or have been saved without the prefix of its base model.
        wanted = self.name_at(name, layer)
        match = architecture.find_equivalent(wanted)
        if match is None:
            return None
        return TensorRef(model, match)

    def find_in_template(self, name: str) -> str | None:
        """Find the template's tensor that corresponds to one of a model; None if there is none."""
        return self.architecture.find_equivalent(name)

    def is_tied_head(self, name: str) -> bool:
        """Whether a head of that name is the input embedding in the template."""
        return self.architecture.is_tied_head(name)

    def may_lack(self, model: str, name: str) -> bool:
        """Whether a model may lack a tensor of the template, which then stays as it is there.

        Args:
            model: The model.
            name: The template's name of the tensor.
        """
        if self.allow_mismatch or self.is_auxiliary(name):
            return True
        if self.weights[model].architecture.lacks_head(name):
            return True
        # A language model without further parts may be merged into one that also sees.
        is_language = self.architecture.module(name) == self.language_module
        modules = self.weights[model].architecture.modules
        has_only_language = set(modules) <= {LANGUAGE_MODULE, DEFAULT_MODULE}
        return not is_language and has_only_language

    def is_auxiliary(self, name: str) -> bool:
        """Whether the template computes the same without a tensor of that name."""
        return not self.computes_with(self.template_name, name)

    def computes_with(self, model: str, name: str) -> bool:
        """Whether a model needs its tensor of that name; True if nothing says that it does not."""
        weights = self.weights[model]
        if weights.architecture.is_auxiliary(name):
            return False
        loaded = loaded_names(weights.config)
        return loaded is None or loaded.is_used(name)

    def merged_shape(self, ref: TensorRef, vocabulary: Vocabulary | None) -> Shape:
        """Return the shape of a tensor, with the rows of the merged vocabulary if there is one."""
        shape = self.header(ref).shape
        if vocabulary is None:
            return shape
        axis = self.vocabulary_axis(ref)
        if axis is None:
            return shape
        resized = list(shape)
        resized[axis] = vocabulary.size
        return tuple(resized)

    def vocabulary_axis(self, ref: TensorRef) -> int | None:
        """Return the axis along which a tensor has one entry per token; None if it has none."""
        architecture = self.weights[ref.model].architecture
        shape = self.header(ref).shape
        return architecture.vocabulary_axis(ref.name, shape)


def name_at_layer_0(name: str, architecture: Architecture) -> str:
    """Return the name of the same tensor in layer 0; tensors outside the layers keep theirs."""
    if architecture.layer(name) is None:
        return name
    return architecture.at_layer(name, 0)
