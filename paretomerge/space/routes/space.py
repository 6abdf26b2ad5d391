"""What spaces of routes have in common: models cut into blocks of layers, a fold for scales, recipes as models among others."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from optuna.distributions import BaseDistribution

from paretomerge.checkpoint.fold import Fold
from paretomerge.checkpoint.reference import canonical_name
from paretomerge.errors import ConfigError, RecipeError
from paretomerge.recipe import Recipe
from paretomerge.space.routes.stacks import RouteLayer, recipe_route, route_recipe

Params = Mapping[str, Any]
_SAME = 1e-9  # scales are products and quotients of each other


def hand_over(one: str, other: str) -> str:
    """What a start is called that goes from one source to another half-way."""
    return f"{one}, then {other}"


def without_middle(one: str) -> str:
    """What a start is called that leaves out a source's middle block."""
    return f"{one}, middle left out"


@dataclass(frozen=True)
class RouteSearchSpace(ABC):
    """Routes through `sources` (name -> path) of `depths` layers (by name), each cut into `blocks` of layers.

    Block b of a model of L layers has its layers b L / blocks to (b + 1) L / blocks, so deep and shallow models can follow each
    other. scale: bounds of what the stream is multiplied by on its way into a block; without a `fold` there is none.
    recipes: path -> recipe of those sources that are merges themselves. matched: label of a start that is a hand-over -> the scale
    that it begins with, by default 1.
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
        shallow = min(self.depths[name] for name in self.sources)
        if not 1 <= self.blocks <= shallow:
            raise ConfigError(
                f"space.blocks: expected 1 to {shallow}, the layers of the shallowest model, got {self.blocks}"
            )
        if not 0 < self.scale[0] < 1 < self.scale[1]:
            raise ConfigError(f"space.scale: expected 0 < low < 1 < high, got {list(self.scale)}")

    @property
    def routed(self) -> bool:
        return True

    @property
    @abstractmethod
    def distributions(self) -> Mapping[str, BaseDistribution]:
        """Every parameter, whether or not it counts at a given point, in the order of the walk."""

    @property
    @abstractmethod
    def conditions(self) -> Mapping[str, Sequence[tuple[str, Sequence[Any]]]]:
        """name -> (parent, values) pairs: the parameter counts where every parent has one of its values."""

    @abstractmethod
    def starts(self) -> Mapping[str, Mapping[str, Any]]:
        """Label -> known good point; each source alone first."""

    def shorter(self, name: str) -> Mapping[str, Any] | None:
        """The point that is a source without its middle block; None where the space has none."""
        return None

    @abstractmethod
    def warm(self, recipe: Recipe) -> Mapping[str, Any]:
        """The point that gives the user's recipe; a ConfigError says what in it is outside the space."""

    @abstractmethod
    def route(self, params: Params) -> list[RouteLayer]:
        """The layers of one point."""

    def recipe(self, params: Params) -> Recipe:
        """The recipe of one point."""
        return route_recipe(self.route(params), self.fold, self.seed, self.recipes)

    def block(self, name: str, b: int, entering: float = 1.0) -> list[RouteLayer]:
        """The layers of a source's block b."""
        first, *rest = self.layers(name, b)
        return [
            RouteLayer(self.sources[name], first, entering),
            *(RouteLayer(self.sources[name], layer) for layer in rest),
        ]

    def layers(self, name: str, b: int) -> range:
        depth = self.depths[name]
        return range(b * depth // self.blocks, (b + 1) * depth // self.blocks)

    def named(self, recipe: Recipe) -> list[RouteLayer]:
        """The route of a recipe, models by their names; a ConfigError says what in it is no route through the sources."""
        spelt = {canonical_name(path): name for name, path in self.sources.items()}
        try:
            route = recipe_route(recipe, self.fold)
        except RecipeError as error:
            raise ConfigError(str(error)) from error
        if unknown := [step.model for step in route if canonical_name(step.model) not in spelt]:
            raise ConfigError(f"expected layers of the study's models, got {unknown[0]}")
        return [
            RouteLayer(spelt[canonical_name(step.model)], step.layer, step.scale) for step in route
        ]

    @property
    def half(self) -> int:
        """The block where starts hand over."""
        return self.blocks // 2

    def stands(
        self, route: Sequence[RouteLayer], start: int, name: str, b: int, scaled: bool = True
    ) -> bool:
        """Whether a route (of names) has block b of a source at `start`, with a scale at most into its first layer."""
        layers = self.layers(name, b)
        here = route[start:][: len(layers)]
        whole = [(step.model, step.layer) for step in here] == [(name, layer) for layer in layers]
        return whole and all(abs(step.scale - 1) <= _SAME for step in here[1 if scaled else 0 :])

    def within(self, name: str, scale: float) -> float:
        """The scale that parameter `name` would have; ConfigError where its bounds do not hold it."""
        low, high = self.scale
        if self.fold is None or not low - _SAME <= scale <= high + _SAME:
            raise ConfigError(f"{name}: expected {low} to {high}, got {scale:g}")
        return min(max(scale, low), high)

    def entering(self, label: str) -> float:
        """The scale of a start, within the bounds."""
        return min(max(self.matched.get(label, 1.0), self.scale[0]), self.scale[1])

    def left_over(self, route: Sequence[RouteLayer], taken: int) -> None:
        """Raise ConfigError where a route (of names) does not end at `taken`."""
        if taken < len(route):
            told = route[taken]
            raise ConfigError(
                f"expected blocks of {self.blocks} a model, in their order, got layer {told.layer} of {told.model} at {taken}"
            )
