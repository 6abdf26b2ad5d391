"""Data-flow space by indicators: the blocks of all models in a row, each used or skipped.

Akiba et al. 2024 (arXiv 2403.13187), sec. 3.2: the layers of model 1, then those of model 2, and so
on; the whole sequence is repeated, and CMA-ES decides for each place whether it is used. They
multiply the stream by one number per pair of layers. Here it is one number per place, which is the
same for a route without loops and does not grow with the square of the number of layers.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations
from typing import NamedTuple, cast

from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution

from paretomerge.errors import ConfigError
from paretomerge.recipe import Recipe
from paretomerge.space.routes.passthrough import RouteLayer
from paretomerge.space.routes.space import (
    ActiveWhere,
    BlockMatcher,
    Point,
    RouteSearchSpace,
    handover_label,
)
from paretomerge.types import Conditions, Params


class _Place(NamedTuple):
    """A place of the sequence: a block of a source in one of the repeats.

    Attributes:
        repeat: The repeat, from 1.
        source: The source's name.
        block: The block's number, from 0.
    """

    repeat: int
    source: str
    block: int

    @property
    def use(self) -> str:
        """The parameter that says whether the place is used."""
        return f"use/{self._address}"

    @property
    def scale(self) -> str:
        """The parameter that scales the residual stream on its way into the place."""
        return f"scale/{self._address}"

    @property
    def _address(self) -> str:
        return f"{self.repeat}/{self.source}/{self.block}"


@dataclass(frozen=True)
class IndicatorSearchSpace(RouteSearchSpace):
    """Routes through a fixed sequence of blocks, each of which is used or skipped.

    With as many blocks as a model has layers, places are layers. A point that uses no place goes
    through the first block. All parameters are integers and floats, so that CMA-ES can move them.

    Parameters of a point:
        `use/r/name/b`: 1 if block b of source `name` is used in repeat r (from 1), else 0.

        `scale/r/name/b`: what the residual stream is multiplied by on its way there, unless that
        comes first.

    Attributes:
        repeats: How often the sequence of all models is repeated.
    """

    repeats: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.repeats < 1:
            raise ConfigError(f"space.repeats: expected 1 or more, got {self.repeats}")

    @cached_property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Every parameter, active or not, in the order of the route."""
        distributions: dict[str, BaseDistribution] = {}
        for i, place in enumerate(self._places()):
            distributions[place.use] = IntDistribution(0, 1)
            # Only the first place can never come after another one.
            if self.fold is not None and i > 0:
                distributions[place.scale] = FloatDistribution(*self.scale, log=True)
        return distributions

    @cached_property
    def conditions(self) -> Conditions:
        """A scale is active if its place is used."""
        conditions: dict[str, ActiveWhere] = {}
        for place in self._places():
            if place.scale in self.distributions:
                conditions[place.scale] = ((place.use, (1,)),)
        return conditions

    def route(self, params: Params) -> list[RouteLayer]:
        """Return the layers of a point.

        Args:
            params: The value of each parameter.
        """
        route: list[RouteLayer] = []
        for place in self._places():
            if not params[place.use]:
                continue
            scale = params.get(place.scale, 1.0) if route else 1.0
            layers = self.block(place.source, place.block, cast(float, scale))
            route += layers
        # A model needs a layer, so a point that uses no place gets one block.
        first_source = next(iter(self.sources))
        return route or self.block(first_source, 0)

    def baselines(self) -> dict[str, Point]:
        """Return the points of the baseline recipes by label.

        Each source alone comes first, then hand-overs half-way, where the order of the models and
        the number of repeats allow them.
        """
        names = list(self.sources)
        half = self.half
        starts = {}
        for name in names:
            all_blocks = range(self.blocks)
            places = self._places_of(name, 1, all_blocks)
            starts[name] = self._point(places)
        # With one block per model there is no middle to hand over at.
        pairs = permutations(names, 2) if half else ()
        for first, second in pairs:
            # A model that comes before the other one in the sequence can follow it in the next
            # repeat.
            is_in_order = names.index(first) < names.index(second)
            repeat = 1 if is_in_order else 2
            if repeat > self.repeats:
                continue
            before = self._places_of(first, 1, range(half))
            second_half = range(half, self.blocks)
            after = self._places_of(second, repeat, second_half)
            label = handover_label(first, second)
            starts[label] = self._point(before | after)
            if self.fold is not None:
                scale = _Place(repeat, second, half).scale
                starts[label][scale] = self.handover_scale(label)
        return starts

    def params_of(self, recipe: Recipe) -> Point:
        """Return the point of a recipe of the user's.

        Args:
            recipe: A route through the sources.

        Raises:
            ConfigError: If the recipe is outside the space; the message says which part.
        """
        matcher = BlockMatcher(self, recipe)
        point = self._point(())
        # Taking the first place that fits is enough: later places can still take all that follows.
        for place in self._places():
            source, block = place.source, place.block
            # `most=1`: the same block may come again, but in the next repeat.
            if matcher.count_repeats(source, block, most=1) == 0:
                continue
            point[place.use] = 1
            if not matcher.is_at_start and matcher.next_scale != 1:
                point[place.scale] = matcher.checked_scale(place.scale)
            matcher.advance(source, block)
        matcher.raise_if_unmatched()
        return point

    @staticmethod
    def _places_of(source: str, repeat: int, blocks: range) -> set[_Place]:
        return {_Place(repeat, source, b) for b in blocks}

    def _places(self) -> Iterator[_Place]:
        for repeat in range(1, self.repeats + 1):
            for name in self.sources:
                for b in range(self.blocks):
                    yield _Place(repeat, name, b)

    def _point(self, used: Collection[_Place]) -> Point:
        """The point that uses some places, without scales."""
        point: Point = {}
        for place in self._places():
            point[place.use] = int(place in used)
            point[place.scale] = 1.0
        return {name: point[name] for name in self.distributions}
