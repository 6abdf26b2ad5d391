"""Data-flow space by edits of a good route: blocks of layers skipped, repeated or taken from another model, a hand-over, scales.

A random route is garbage; here every point is a few edits from a model that works, and neighbours are near.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from paretomerge.errors import ConfigError
from paretomerge.recipe import Recipe
from paretomerge.space.routes.space import RouteSearchSpace, hand_over
from paretomerge.space.routes.stacks import RouteLayer

Params = Mapping[str, Any]
AS_ROUTED = "as routed"


@dataclass(frozen=True)
class EditSearchSpace(RouteSearchSpace):
    """See RouteSearchSpace for the models and their blocks.

    - `lead`, `hand_over`, `follow`: whose blocks come before block number `hand_over`, and whose from there on.
    - `times/b`: how often block b comes, 0 to `most`. `from/b`: another model for it.
    - `scale/b`: what the stream is multiplied by on its way into block b, unless it comes first.

    A point that leaves everything out goes through the first block.
    """

    most: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.most < 1:
            raise ConfigError(f"space.most: expected 1 or more, got {self.most}")

    @cached_property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Every parameter, whether or not it counts at a given point, in the order of the walk."""
        names, space = tuple(self.sources), dict[str, BaseDistribution]()
        if len(names) > 1:
            space |= {
                "lead": CategoricalDistribution(names),
                "hand_over": IntDistribution(1, self.blocks),
            }
            space["follow"] = CategoricalDistribution(names)
        for b in range(self.blocks):
            space[f"times/{b}"] = IntDistribution(0, self.most)
            if len(names) > 1:
                space[f"from/{b}"] = CategoricalDistribution((AS_ROUTED, *names))
            if self.fold is not None and b:
                space[f"scale/{b}"] = FloatDistribution(*self.scale, log=True)
        return space

    @cached_property
    def conditions(self) -> dict[str, tuple[tuple[str, tuple[Any, ...]], ...]]:
        """A block's model and scale count where it is used, who follows where there is a hand-over."""
        used, before = tuple(range(1, self.most + 1)), tuple(range(1, self.blocks))
        names = [name for name in self.distributions if name.startswith(("from/", "scale/"))]
        found: dict[str, tuple[tuple[str, tuple[Any, ...]], ...]]
        found = {name: ((f"times/{name.partition('/')[2]}", used),) for name in names}
        return found | (
            {"follow": (("hand_over", before),)} if "follow" in self.distributions else {}
        )

    def route(self, params: Params) -> list[RouteLayer]:
        """The layers of one point."""
        first = next(iter(self.sources))
        lead, follow = params.get("lead", first), params.get("follow", first)
        route: list[RouteLayer] = []
        for b in range(self.blocks):
            source = lead if b < params.get("hand_over", self.blocks) else follow
            if (named := params.get(f"from/{b}", AS_ROUTED)) != AS_ROUTED:
                source = named
            for turn in range(params[f"times/{b}"]):
                entering = params.get(f"scale/{b}", 1.0) if route and turn == 0 else 1.0
                route += self.block(source, b, entering)
        return route or self.block(lead, 0)

    def starts(self) -> dict[str, dict[str, Any]]:
        """Each source alone; then the simplest stacks: hand-overs half-way, and each source with its middle repeated."""
        names, half = list(self.sources), self.half
        starts = {name: self._plain(name) for name in names}
        for one, other in permutations(names, 2) if half else ():
            label = hand_over(one, other)
            starts[label] = self._plain(one) | {"hand_over": half, "follow": other}
            if self.fold is not None:
                starts[label][f"scale/{half}"] = self.entering(label)
        if self.most > 1:
            starts |= {
                f"{name}, middle twice": self._plain(name) | {f"times/{half}": 2} for name in names
            }
        return starts

    def shorter(self, name: str) -> dict[str, Any] | None:
        """A source without its middle block."""
        return self._plain(name) | {f"times/{self.half}": 0} if self.half else None

    def warm(self, recipe: Recipe) -> dict[str, Any]:
        """The point that gives the user's recipe; a ConfigError says what in it is outside the space."""
        route = self.named(recipe)
        lead, taken = route[0].model, 0
        point = self._plain(lead) | {f"times/{b}": 0 for b in range(self.blocks)}
        for b in range(self.blocks):
            source, turns = self._matched(route, taken, b)
            if turns:
                point |= {f"times/{b}": turns, f"from/{b}": AS_ROUTED if source == lead else source}
                if taken and abs(route[taken].scale - 1) > 0:
                    point[f"scale/{b}"] = self.within(f"scale/{b}", route[taken].scale)
                taken += turns * len(self.layers(source, b))
        self.left_over(route, taken)
        return {name: value for name, value in point.items() if name in self.distributions}

    def _plain(self, name: str) -> dict[str, Any]:
        """One source from its first layer to its last."""
        point: dict[str, Any] = {"lead": name, "follow": name, "hand_over": self.blocks}
        for b in range(self.blocks):
            point |= {f"from/{b}": AS_ROUTED, f"times/{b}": 1, f"scale/{b}": 1.0}
        return {key: point[key] for key in self.distributions}

    def _matched(self, route: Sequence[RouteLayer], start: int, b: int) -> tuple[str, int]:
        """Whose block b stands at `start` of a route (of names), and how often in a row."""
        for name in self.sources:
            turns, length = 0, len(self.layers(name, b))
            while turns < self.most and self.stands(
                route, start + turns * length, name, b, scaled=turns == 0
            ):
                turns += 1
            if turns:
                return name, turns
        return "", 0
