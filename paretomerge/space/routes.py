"""Data-flow space by edits of a good route: blocks of layers skipped, repeated or taken from another model, a hand-over, scales.

A random route is garbage; here every point is a few edits from a model that works, and neighbours are near.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from paretomerge.checkpoint.reference import place
from paretomerge.checkpoint.stream import Fold
from paretomerge.errors import ConfigError, RecipeError
from paretomerge.recipe import Recipe
from paretomerge.space.stacks import Step, recipe_route, route_recipe

Params = Mapping[str, Any]
AS_ROUTED = "as routed"
_SAME = 1e-9  # scales are products and quotients of each other


@dataclass(frozen=True)
class EditSpace:
    """Routes through `sources` (name -> path) of `depths` layers (by name), each cut into `blocks` of layers.

    - `lead`, `hand_over`, `follow`: whose blocks come before block number `hand_over`, and whose from there on.
    - `from/b`: another model for block b. `times/b`: 0 leaves it out, 2 goes through it twice.
    - `scale/b`: what the stream is multiplied by on its way into block b, unless it comes first; without a `fold` there is none.

    Block b of a model of L layers has its layers b L / blocks to (b + 1) L / blocks, so deep and shallow models can hand over.
    A point that leaves everything out goes through the first block.
    """

    base: str
    sources: Mapping[str, str]
    depths: Mapping[str, int]
    fold: Fold | None = None
    blocks: int = 8
    scale: tuple[float, float] = (0.7, 1.4)
    most: int = 2
    seed: int = 0
    notes: tuple[str, ...] = ()

    @property
    def routed(self) -> bool:
        return True

    def __post_init__(self) -> None:
        shallow = min(self.depths[name] for name in self.sources)
        if not 1 <= self.blocks <= shallow:
            raise ConfigError(f"space.blocks: expected 1 to {shallow}, the layers of the shallowest model, got {self.blocks}")
        if not 0 < self.scale[0] < 1 < self.scale[1]:
            raise ConfigError(f"space.scale: expected 0 < low < 1 < high, got {list(self.scale)}")
        if self.most < 1:
            raise ConfigError(f"space.most: expected 1 or more, got {self.most}")

    @cached_property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Every parameter, whether or not it counts at a given point."""
        names, space = tuple(self.sources), dict[str, BaseDistribution]()
        if len(names) > 1:
            space |= {"lead": CategoricalDistribution(names), "hand_over": IntDistribution(1, self.blocks)}
            space["follow"] = CategoricalDistribution(names)
            space |= {f"from/{b}": CategoricalDistribution((AS_ROUTED, *names)) for b in range(self.blocks)}
        space |= {f"times/{b}": CategoricalDistribution(tuple(range(self.most + 1))) for b in range(self.blocks)}
        if self.fold is not None:
            space |= {f"scale/{b}": FloatDistribution(*self.scale, log=True) for b in range(1, self.blocks)}
        return space

    @cached_property
    def conditions(self) -> dict[str, tuple[tuple[str, tuple[Any, ...]], ...]]:
        """A block's model and scale count where it is used; the first block is used where nothing else is."""
        used = tuple(range(1, self.most + 1))
        names = [name for name in self.distributions if name.startswith(("from/", "scale/"))]
        return {name: ((f"times/{name.partition('/')[2]}", used),) for name in names}

    def recipe(self, params: Params) -> Recipe:
        """The recipe of one point."""
        return route_recipe(self.route(params), self.fold, self.seed)

    def route(self, params: Params) -> list[Step]:
        """The layers of one point."""
        first = next(iter(self.sources))
        lead, follow = params.get("lead", first), params.get("follow", first)
        route: list[Step] = []
        for b in range(self.blocks):
            source = lead if b < params.get("hand_over", self.blocks) else follow
            if (named := params.get(f"from/{b}", AS_ROUTED)) != AS_ROUTED:
                source = named
            for turn in range(params[f"times/{b}"]):
                entering = params.get(f"scale/{b}", 1.0) if route and turn == 0 else 1.0
                route += self._block(source, b, entering)
        return route or self._block(lead, 0)

    def starts(self) -> dict[str, dict[str, Any]]:
        """Each source alone; then the simplest stacks: hand-overs half-way, and each source with its middle repeated."""
        names, half = list(self.sources), self.blocks // 2
        starts = {name: self._plain(name) for name in names}
        if half:
            for one, other in permutations(names, 2):
                starts[f"{one}, then {other}"] = self._plain(one) | {"hand_over": half, "follow": other}
        if self.most > 1:
            starts |= {f"{name}, middle twice": self._plain(name) | {f"times/{half}": 2} for name in names}
        return starts

    def warm(self, recipe: Recipe) -> dict[str, Any]:
        """The point that gives the user's recipe; a ConfigError says what in it is outside the space."""
        spelt = {place(path): name for name, path in self.sources.items()}
        try:
            route = recipe_route(recipe, self.fold)
        except RecipeError as error:
            raise ConfigError(str(error)) from error
        if unknown := [step.model for step in route if place(step.model) not in spelt]:
            raise ConfigError(f"expected layers of the study's models, got {unknown[0]}")
        left = [Step(spelt[place(step.model)], step.layer, step.scale) for step in route]
        point, taken, total = self._plain(left[0].model) | {f"times/{b}": 0 for b in range(self.blocks)}, 0, len(left)
        for b in range(self.blocks):
            source, turns, scale = self._matched(left, taken, b)
            if turns:
                point |= {f"times/{b}": turns, f"from/{b}": AS_ROUTED if source == left[0].model else source}
                point |= {f"scale/{b}": scale} if taken and b else {}
                taken += turns * len(self._layers(source, b))
        if taken < total:
            told = left[taken]
            raise ConfigError(
                f"expected blocks of {self.blocks} a model, in their order, got layer {told.layer} of {told.model} at {taken}"
            )
        found = {name: value for name, value in point.items() if name in self.distributions}
        for name, value in found.items():
            if name.startswith("scale/") and not self.scale[0] - _SAME <= value <= self.scale[1] + _SAME:
                raise ConfigError(f"{name}: expected {self.scale[0]} to {self.scale[1]}, got {value:g}")
            if name.startswith("scale/"):
                found[name] = min(max(value, self.scale[0]), self.scale[1])
        return found

    def _plain(self, name: str) -> dict[str, Any]:
        """One source from its first layer to its last."""
        point: dict[str, Any] = {"lead": name, "follow": name, "hand_over": self.blocks}
        for b in range(self.blocks):
            point |= {f"from/{b}": AS_ROUTED, f"times/{b}": 1, f"scale/{b}": 1.0}
        return {key: point[key] for key in self.distributions}

    def _layers(self, name: str, b: int) -> range:
        depth = self.depths[name]
        return range(b * depth // self.blocks, (b + 1) * depth // self.blocks)

    def _block(self, name: str, b: int, entering: float = 1.0) -> list[Step]:
        first, *rest = self._layers(name, b)
        return [Step(self.sources[name], first, entering), *(Step(self.sources[name], layer) for layer in rest)]

    def _matched(self, route: Sequence[Step], start: int, b: int) -> tuple[str, int, float]:
        """Whose block b stands at `start` of a route (of names), how often in a row, and the scale into it."""
        for name in self.sources:
            turns = sum(1 for _ in self._turns(route, start, name, b))
            if turns:
                return name, turns, route[start].scale
        return "", 0, 1.0

    def _turns(self, route: Sequence[Step], start: int, name: str, b: int) -> Iterator[int]:
        layers = self._layers(name, b)
        for turn in range(self.most):
            here = route[start + turn * len(layers) :][: len(layers)]
            free = 1 if turn == 0 else 0  # the first layer of all turns may have a scale
            if [(s.model, s.layer) for s in here] != [(name, n) for n in layers] or any(abs(s.scale - 1) > _SAME for s in here[free:]):
                return
            yield turn
