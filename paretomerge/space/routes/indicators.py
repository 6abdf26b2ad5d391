"""Data-flow space by indicators: the layers of all models in a row, a few times over, each used or skipped, with scales.

Akiba et al. 2024 (arXiv 2403.13187), sec. 3.2: model 1's layers, then model 2's, and so on, the whole sequence `repeats` times;
CMA-ES decides for each place whether it is used. They multiply the stream by one number per pair of layers; here it is one per
place, which is the same for a route without loops and does not grow with the square of the layers.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations
from typing import Any

from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution

from paretomerge.errors import ConfigError
from paretomerge.recipe import Recipe
from paretomerge.space.routes.space import RouteSearchSpace, hand_over
from paretomerge.space.routes.stacks import RouteLayer

Params = Mapping[str, Any]


@dataclass(frozen=True)
class IndicatorSearchSpace(RouteSearchSpace):
    """See RouteSearchSpace for the models and their blocks; with `blocks` as many as a model has layers, places are layers.

    `use/r/name/b`: 1 where block b of source `name` is gone through in round r (from 1). `scale/r/name/b`: what the stream is
    multiplied by on its way there, unless it comes first. Integers and floats only, so that CMA-ES moves all of them.
    A point that uses nothing goes through the first block.
    """

    repeats: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.repeats < 1:
            raise ConfigError(f"space.repeats: expected 1 or more, got {self.repeats}")

    @cached_property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Every parameter, whether or not it counts at a given point, in the order of the walk."""
        space = dict[str, BaseDistribution]()
        for r, name, b in self._places():
            space[f"use/{r}/{name}/{b}"] = IntDistribution(0, 1)
            if self.fold is not None and (r, name, b) != next(self._places()):
                space[f"scale/{r}/{name}/{b}"] = FloatDistribution(*self.scale, log=True)
        return space

    @cached_property
    def conditions(self) -> dict[str, tuple[tuple[str, tuple[Any, ...]], ...]]:
        """A scale counts where its place is used."""
        scales = [name for name in self.distributions if name.startswith("scale/")]
        return {name: (("use/" + name.removeprefix("scale/"), (1,)),) for name in scales}

    def route(self, params: Params) -> list[RouteLayer]:
        """The layers of one point."""
        route: list[RouteLayer] = []
        for r, name, b in self._places():
            if params[f"use/{r}/{name}/{b}"]:
                route += self.block(
                    name, b, params.get(f"scale/{r}/{name}/{b}", 1.0) if route else 1.0
                )
        return route or self.block(next(iter(self.sources)), 0)

    def starts(self) -> dict[str, dict[str, Any]]:
        """Each source alone; then hand-overs half-way, where the order of the models allows them."""
        names, half = list(self.sources), self.half
        starts = {name: self._used({(1, name, b) for b in range(self.blocks)}) for name in names}
        for one, other in permutations(names, 2) if half else ():
            again = 1 if names.index(one) < names.index(other) else 2
            if again <= self.repeats:
                taken = {(1, one, b) for b in range(half)} | {
                    (again, other, b) for b in range(half, self.blocks)
                }
                label = hand_over(one, other)
                starts[label] = self._used(taken)
                if self.fold is not None:
                    starts[label][f"scale/{again}/{other}/{half}"] = self.entering(label)
        return starts

    def warm(self, recipe: Recipe) -> dict[str, Any]:
        """The point that gives the user's recipe; a ConfigError says what in it is outside the space."""
        route, point, taken = self.named(recipe), self._used(set()), 0
        for (
            r,
            name,
            b,
        ) in self._places():  # the earliest place that fits never stands in the way of another
            if taken < len(route) and self.stands(route, taken, name, b):
                point[f"use/{r}/{name}/{b}"] = 1
                if taken and route[taken].scale != 1:
                    point[f"scale/{r}/{name}/{b}"] = self.within(
                        f"scale/{r}/{name}/{b}", route[taken].scale
                    )
                taken += len(self.layers(name, b))
        self.left_over(route, taken)
        return point

    def _places(self) -> Iterator[tuple[int, str, int]]:
        for r in range(1, self.repeats + 1):
            for name in self.sources:
                yield from ((r, name, b) for b in range(self.blocks))

    def _used(self, places: set[tuple[int, str, int]]) -> dict[str, Any]:
        every = [(r, name, b) for r, name, b in self._places()]
        point: dict[str, Any] = {
            f"use/{r}/{name}/{b}": int((r, name, b) in places) for r, name, b in every
        }
        point |= {f"scale/{r}/{name}/{b}": 1.0 for r, name, b in every}
        return {name: point[name] for name in self.distributions}
