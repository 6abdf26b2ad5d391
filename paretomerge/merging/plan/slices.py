"""Checks and completes the slices of a recipe: layer ranges in numbers, sources in order."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from paretomerge.errors import RecipeError
from paretomerge.merging.methods import Method
from paretomerge.merging.plan.opened_recipe import OpenedRecipe
from paretomerge.recipe import Module, ParameterSetting, Slice, Source


@dataclass(frozen=True)
class CompleteSource:
    """A source of a slice, with its layer range in numbers.

    Attributes:
        model: The model, as the recipe names it.
        first_layer: The first layer.
        end_layer: The layer after the last one.
        parameters: Settings by parameter name, for this source only.
    """

    model: str
    first_layer: int
    end_layer: int
    parameters: Mapping[str, ParameterSetting]

    @property
    def depth(self) -> int:
        """Number of layers."""
        return self.end_layer - self.first_layer


@dataclass(frozen=True)
class CompleteSlice:
    """A slice that has been checked, with its sources as the method needs them.

    Attributes:
        sources: The sources. A base that is one of the models to merge is the first one.
        parameters: Settings by parameter name, for all sources of the slice.
        base_model: Takes the place of the recipe's base model for these layers.
    """

    sources: tuple[CompleteSource, ...]
    parameters: Mapping[str, ParameterSetting]
    base_model: str | None

    @property
    def depth(self) -> int:
        """Number of layers, the same for all sources."""
        return self.sources[0].depth

    def first_layer_of(self, model: str | None) -> int:
        """Return the first layer of a model in this slice; that of the first source by default.

        Args:
            model: A model that may be among the sources.
        """
        for source in self.sources:
            if source.model == model:
                return source.first_layer
        return self.sources[0].first_layer


def complete_slice(opened: OpenedRecipe, piece: Slice, where: str) -> CompleteSlice:
    """Check a slice, write out its layer ranges, and order its sources for the method.

    Args:
        opened: The recipe with its models.
        piece: A slice of the recipe.
        where: The slice's place in the recipe, for error messages.

    Returns:
        The slice with numbers for all layer ranges.

    Raises:
        RecipeError: If a layer range exceeds its model, if ranges differ in length, or if the
            method takes another number of models.
    """
    method = opened.method
    sources = []
    for source in piece.sources:
        complete = _complete_source(opened, source, where)
        sources.append(complete)
    base = piece.base_model or opened.recipe.base_model
    models = [source for source in sources if source.model != base]
    # As in mergekit: an optional base is added to `models`, but not to `slices`.
    has_whole_models = all(source.layer_range is None for source in piece.sources)
    # Whole models are merged with the whole base, also where it is not listed.
    whole_base = base if has_whole_models else None
    _check_equal_depth(opened, sources, whole_base, where)
    base_is_model = method.base == "source"
    if method.base == "optional":
        base_is_model = has_whole_models
    if base is not None and base_is_model:
        if len(models) == len(sources):
            # As in mergekit: a base that is not listed is one more source, without parameters.
            unlisted = replace(sources[0], model=base, parameters={})
            sources.append(unlisted)
        # Methods on a base and others, such as slerp, expect the base first. The sort is stable.
        sources.sort(key=lambda source: source.model != base)
    # A base that only serves for task vectors is not one of the models to merge.
    base_is_reference = method.base in ("required", "reference")
    counted = models if base_is_reference else sources
    _check_model_count(method, len(counted), where)
    return CompleteSlice(
        sources=tuple(sources),
        parameters=piece.parameters,
        base_model=piece.base_model,
    )


def without_layer_ranges(opened: OpenedRecipe, module: str, content: Module) -> Module:
    """Drop the layer ranges of a module whose layers cannot be stacked, such as a vision tower.

    Args:
        opened: The recipe with its models.
        module: The module's name; not the language module.
        content: What the recipe says of the module. It may spell out the whole range of layers.

    Returns:
        The module with whole models as sources.

    Raises:
        RecipeError: If a range is not that of a whole model.
    """
    architecture = opened.architecture
    # A foreign module may have several stacks of layers, of different depths.
    whole_ranges: list[tuple[int, int] | None] = [None]
    for stack in architecture.stacks:
        name_in_stack = f"{stack.prefix}0."
        if architecture.module(name_in_stack) == module:
            whole_ranges.append((0, stack.depth))
    slices = []
    is_stacked = len(content.slices) > 1
    for piece in content.slices:
        for source in piece.sources:
            if is_stacked or source.layer_range not in whole_ranges:
                raise RecipeError(
                    f"modules.{module}: expected whole models, got layers {source.layer_range}; "
                    "list them under `models`"
                )
        sources = [replace(source, layer_range=None) for source in piece.sources]
        whole_models = replace(piece, sources=tuple(sources))
        slices.append(whole_models)
    return replace(content, slices=tuple(slices))


def _complete_source(
    opened: OpenedRecipe, source: Source, where: str
) -> CompleteSource:
    # Ranges are checked against each model's own depth: models may differ in it.
    depth = opened.weights[source.model].architecture.depth
    first, end = source.layer_range or (0, depth)
    if end > depth:
        where = f"{where}: {source.model}"
        raise RecipeError(
            f"{where}: expected layers below {depth}, got [{first}, {end})"
        )
    return CompleteSource(
        model=source.model,
        first_layer=first,
        end_layer=end,
        parameters=source.parameters,
    )


def _check_equal_depth(
    opened: OpenedRecipe,
    sources: Sequence[CompleteSource],
    whole_base: str | None,
    where: str,
) -> None:
    lengths = {source.depth for source in sources}
    models = [source.model for source in sources]
    if whole_base is not None:
        lengths.add(opened.weights[whole_base].architecture.depth)
        models.insert(0, whole_base)
    if len(lengths) == 1:
        return
    depths = {}
    for model in models:
        depths[model] = opened.weights[model].architecture.depth
    raise RecipeError(f"{where}: expected models of equal depth, got {depths}")


def _check_model_count(method: Method, count: int, where: str) -> None:
    least, most = method.models
    is_enough = count >= least
    is_too_many = most is not None and count > most
    if is_enough and not is_too_many:
        return
    if least == most:
        wanted = f"{least} models"
    elif most is None:
        wanted = f"{least} or more models"
    else:
        wanted = f"{least} to {most} models"
    if method.base == "required":
        wanted += " besides the base"
    message = f"expected {wanted}, got {count}"
    raise RecipeError(f"{where}: {method.name}: {message}")
