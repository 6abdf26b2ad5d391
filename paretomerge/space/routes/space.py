"""What spaces of routes have in common: models cut into blocks of layers, routes made of blocks."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from optuna.distributions import BaseDistribution

from paretomerge.checkpoint.fold import Fold
from paretomerge.checkpoint.reference import canonical_name
from paretomerge.errors import ConfigError, RecipeError
from paretomerge.recipe import Recipe
from paretomerge.space.routes.passthrough import (
    RouteLayer,
    recipe_to_route,
    route_to_recipe,
)
from paretomerge.types import Conditions, Params, ParamValue

Point = dict[str, ParamValue]
"""Values of a space's parameters."""

_Condition = tuple[str, tuple[int, ...]]
ActiveWhere = tuple[_Condition, ...]
"""Pairs (parent, values): a parameter is active where each parent has one of its values."""

# Scales that are read from a recipe are quotients of products, so they are off by rounding.
_SCALE_TOLERANCE = 1e-9


def handover_label(first: str, second: str) -> str:
    """Return the label of the baseline that goes from one source to another half-way."""
    return f"{first}, then {second}"


def without_middle_label(source: str) -> str:
    """Return the label of the baseline that leaves out a source's middle block."""
    return f"{source}, middle left out"


@dataclass(frozen=True)
class RouteSearchSpace(ABC):
    """A search space of routes through the layers of several models.

    Each model is cut into the same number of blocks. Block b of a model of L layers has the layers
    from b L / blocks to (b + 1) L / blocks, so deep and shallow models can follow each other. A
    subclass decides which blocks a point selects.

    Attributes:
        base: The checkpoint that gives the architecture.
        sources: Name of a source -> its path, or its name in `recipes`.
        depths: Name of a source -> its number of layers.
        fold: Which weights of a layer write to the residual stream; None for a space without
            scales.
        blocks: Number of blocks per model.
        scale: Least and largest scale of the residual stream on its way into a block.
        seed: The seed of all recipes.
        notes: What to tell the user about the space.
        recipes: Recipes of those sources that are merges themselves, by their paths in `sources`.
        matched: Label of a hand-over -> the scale that it begins with; 1 for all others.

    Raises:
        ConfigError: If a value is out of range.
    """

    base: str
    sources: Mapping[str, str]
    depths: Mapping[str, int]
    fold: Fold | None = None
    blocks: int = 8
    scale: tuple[float, float] = (0.7, 1.4)
    seed: int = 0
    notes: tuple[str, ...] = ()
    recipes: Mapping[str, Recipe] = field(default_factory=dict)
    matched: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        depths = [self.depths[name] for name in self.sources]
        shallowest = min(depths)
        # A block without a layer would not change the model.
        if not 1 <= self.blocks <= shallowest:
            raise ConfigError(
                f"space.blocks: expected 1 to {shallowest}, the layers of the shallowest model, "
                f"got {self.blocks}"
            )
        low, high = self.scale
        # 1, which leaves the stream as it is, has to be a value of the scales.
        if not 0 < low < 1 < high:
            raise ConfigError(
                f"space.scale: expected 0 < low < 1 < high, got {[low, high]}"
            )

    @property
    def routed(self) -> bool:
        """True: recipes are routes, of any depth."""
        return True

    @property
    @abstractmethod
    def distributions(self) -> Mapping[str, BaseDistribution]:
        """Every parameter, active or not, in the order of the route."""

    @property
    @abstractmethod
    def conditions(self) -> Conditions:
        """When parameters are active."""

    @abstractmethod
    def baselines(self) -> Mapping[str, Point]:
        """Return the points of the baseline recipes by label, each source alone first."""

    def point_without_middle(self, source: str) -> Point | None:
        """Return the point of a source without its middle block, if the space has one.

        Args:
            source: The source's name.
        """
        return None

    @abstractmethod
    def params_of(self, recipe: Recipe) -> Point:
        """Return the point of a recipe of the user's.

        Args:
            recipe: A route through the sources.

        Raises:
            ConfigError: If the recipe is outside the space; the message says which part.
        """

    @abstractmethod
    def route(self, params: Params) -> list[RouteLayer]:
        """Return the layers of a point.

        Args:
            params: The value of each parameter.
        """

    def recipe(self, params: Params) -> Recipe:
        """Return the recipe of a point.

        Args:
            params: The value of each parameter.
        """
        route = self.route(params)
        return route_to_recipe(route, self.fold, self.seed, self.recipes)

    @property
    def half(self) -> int:
        """The middle block, where the baselines hand over."""
        return self.blocks // 2

    def layers(self, name: str, b: int) -> range:
        """Return the layer numbers of a block.

        Args:
            name: The source's name.
            b: The block's number, from 0.
        """
        depth = self.depths[name]
        # Rounding down makes blocks of unequal size where `blocks` does not divide the depth.
        first = b * depth // self.blocks
        end = (b + 1) * depth // self.blocks
        return range(first, end)

    def block(self, name: str, b: int, scale: float = 1.0) -> list[RouteLayer]:
        """Return the layers of a block as a part of a route.

        Args:
            name: The source's name.
            b: The block's number, from 0.
            scale: The scale of the residual stream on its way into the block.
        """
        path = self.sources[name]
        first, *others = self.layers(name, b)
        # The layers of a block follow each other as in their own model, so without a scale.
        unscaled = [RouteLayer(path, layer) for layer in others]
        return [RouteLayer(path, first, scale), *unscaled]

    def handover_scale(self, label: str) -> float:
        """Return the scale that a hand-over begins with, within the space's bounds.

        Args:
            label: The label of the baseline.
        """
        low, high = self.scale
        scale = self.matched.get(label, 1.0)
        return min(max(scale, low), high)


class BlockMatcher:
    """Reads a recipe as blocks of a space, from its first layer to its last.

    Args:
        space: The space.
        recipe: A recipe of the user's.

    Raises:
        ConfigError: If the recipe is not a route through the sources of the space.
    """

    def __init__(self, space: RouteSearchSpace, recipe: Recipe) -> None:
        self._space = space
        self._route = _route_by_names(space, recipe)
        self._position = 0

    @property
    def first_source(self) -> str:
        """The name of the source of the first layer."""
        return self._route[0].model

    @property
    def is_at_start(self) -> bool:
        """Whether no layer has been matched yet."""
        return self._position == 0

    @property
    def is_at_end(self) -> bool:
        """Whether all layers have been matched."""
        return self._position >= len(self._route)

    @property
    def next_scale(self) -> float:
        """The scale into the next layer."""
        return self._route[self._position].scale

    def count_repeats(self, name: str, b: int, most: int) -> int:
        """Count how often a block comes next, one after another.

        A scale is allowed into the first layer only.

        Args:
            name: The source's name.
            b: The block's number.
            most: The count to stop at.
        """
        length = len(self._space.layers(name, b))
        count = 0
        while count < most:
            start = self._position + count * length
            is_first = count == 0
            if not self._has_block(start, name, b, may_be_scaled=is_first):
                break
            count += 1
        return count

    def advance(self, name: str, b: int, count: int = 1) -> None:
        """Go on after a block.

        Args:
            name: The source's name.
            b: The block's number.
            count: How often the block comes, one after another.
        """
        length = len(self._space.layers(name, b))
        self._position += count * length

    def checked_scale(self, parameter: str) -> float:
        """Return the scale into the next layer as the value of a parameter.

        Args:
            parameter: The parameter's name, for the error message.

        Raises:
            ConfigError: If the scale is out of the parameter's bounds.
        """
        low, high = self._space.scale
        scale = self.next_scale
        is_above = scale >= low - _SCALE_TOLERANCE
        is_below = scale <= high + _SCALE_TOLERANCE
        is_inside = is_above and is_below
        if self._space.fold is None or not is_inside:
            message = f"expected {low} to {high}, got {scale:g}"
            raise ConfigError(f"{parameter}: {message}")
        # A scale that rounding has moved out of the bounds is moved back.
        return min(max(scale, low), high)

    def raise_if_unmatched(self) -> None:
        """Raise ConfigError if there are layers left."""
        if not self.is_at_end:
            step = self._route[self._position]
            raise ConfigError(
                f"expected blocks of {self._space.blocks} a model, in their order, "
                f"got layer {step.layer} of {step.model} at {self._position}"
            )

    def _has_block(
        self,
        start: int,
        name: str,
        b: int,
        may_be_scaled: bool,
    ) -> bool:
        layers = self._space.layers(name, b)
        end = start + len(layers)
        part = self._route[start:end]
        # Fewer layers than expected are left at the end of a route.
        expected = [(name, layer) for layer in layers]
        actual = [(step.model, step.layer) for step in part]
        if actual != expected:
            return False
        unscaled = part[1:] if may_be_scaled else part
        errors = [abs(step.scale - 1) for step in unscaled]
        largest_error = max(errors, default=0.0)
        return largest_error <= _SCALE_TOLERANCE


def _route_by_names(space: RouteSearchSpace, recipe: Recipe) -> list[RouteLayer]:
    """The route of a recipe, with models by their names in the space."""
    # A recipe may spell the path of a local folder differently.
    names = {}
    for name, path in space.sources.items():
        names[canonical_name(path)] = name
    # The user wrote a study, in which a recipe outside the space is a mistake of the configuration.
    try:
        route = recipe_to_route(recipe, space.fold)
    except RecipeError as error:
        raise ConfigError(str(error)) from error
    steps = []
    for step in route:
        source = names.get(canonical_name(step.model))
        if source is None:
            raise ConfigError(
                f"expected layers of the study's models, got {step.model}"
            )
        steps.append(replace(step, model=source))
    return steps
