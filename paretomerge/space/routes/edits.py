"""Data-flow space by edits of a working route: blocks are skipped, repeated or replaced.

A random route gives a broken model. Here every point is a few edits away from a model that works,
and points that are near each other give similar routes.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import permutations
from typing import cast

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

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

AS_ROUTED = "as routed"
"""The value of `from/b` that does not replace the block's model."""


@dataclass(frozen=True)
class EditSearchSpace(RouteSearchSpace):
    """Routes that are edits of one model, or of two with a hand-over between them.

    A point that leaves out every block goes through the first one.

    Parameters of a point:
        `lead`, `hand_over`, `follow`: `lead` gives the blocks before block number `hand_over`,
        `follow` gives the others.

        `times/b`: how often block b comes, 0 to `most`.

        `from/b`: another model for block b, or `AS_ROUTED`.

        `scale/b`: what the residual stream is multiplied by on its way into block b, unless that
        comes first.

    Attributes:
        most: How often a block may come.
    """

    most: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.most < 1:
            raise ConfigError(f"space.most: expected 1 or more, got {self.most}")

    @cached_property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Every parameter, active or not, in the order of the route."""
        names = tuple(self.sources)
        has_choice = len(names) > 1
        distributions: dict[str, BaseDistribution] = {}
        if has_choice:
            distributions["lead"] = CategoricalDistribution(names)
            # At `blocks`, after the last block, `lead` gives all of them.
            distributions["hand_over"] = IntDistribution(1, self.blocks)
            distributions["follow"] = CategoricalDistribution(names)
        replacements = (AS_ROUTED, *names)
        for b in range(self.blocks):
            distributions[f"times/{b}"] = IntDistribution(0, self.most)
            if has_choice:
                distributions[f"from/{b}"] = CategoricalDistribution(replacements)
            # Only the first block can never come after another one.
            if self.fold is not None and b > 0:
                scale = FloatDistribution(*self.scale, log=True)
                distributions[f"scale/{b}"] = scale
        return distributions

    @cached_property
    def conditions(self) -> Conditions:
        """When parameters are active.

        The model and the scale of a block are active if it is used, `follow` if there is a
        hand-over.
        """
        used = tuple(range(1, self.most + 1))
        # `follow` gives no block if the hand-over is after the last one.
        before_the_end = tuple(range(1, self.blocks))
        conditions: dict[str, ActiveWhere] = {}
        for name in self.distributions:
            kind, _, block = name.partition("/")
            if kind in ("from", "scale"):
                parent = f"times/{block}"
                conditions[name] = ((parent, used),)
        if "follow" in self.distributions:
            conditions["follow"] = (("hand_over", before_the_end),)
        return conditions

    def route(self, params: Params) -> list[RouteLayer]:
        """Return the layers of a point.

        Args:
            params: The value of each parameter.
        """
        first_source = next(iter(self.sources))
        # A space of one source has no choice of models, and so lacks these parameters.
        lead = cast(str, params.get("lead", first_source))
        follow = cast(str, params.get("follow", first_source))
        hand_over = cast(int, params.get("hand_over", self.blocks))
        route: list[RouteLayer] = []
        for b in range(self.blocks):
            source = lead if b < hand_over else follow
            replacement = params.get(f"from/{b}", AS_ROUTED)
            if replacement != AS_ROUTED:
                source = cast(str, replacement)
            times = cast(int, params[f"times/{b}"])
            for turn in range(times):
                # The scale applies on the way into the block, not between its repeats.
                is_scaled = bool(route) and turn == 0
                scale = params.get(f"scale/{b}", 1.0) if is_scaled else 1.0
                layers = self.block(source, b, cast(float, scale))
                route += layers
        # A model needs a layer, so a point that skips all blocks gets one.
        return route or self.block(lead, 0)

    def baselines(self) -> dict[str, Point]:
        """Return the points of the baseline recipes by label.

        Each source alone comes first. Then come the simplest frankenmerges: hand-overs half-way,
        and each source with its middle block twice.
        """
        names = list(self.sources)
        half = self.half
        starts = {}
        for name in names:
            starts[name] = self._source_point(name)
        # With one block per model there is no middle to hand over at.
        pairs = permutations(names, 2) if half else ()
        for first, second in pairs:
            label = handover_label(first, second)
            starts[label] = self._source_point(first)
            starts[label] |= {"hand_over": half, "follow": second}
            if self.fold is not None:
                scale = f"scale/{half}"
                starts[label][scale] = self.handover_scale(label)
        if self.most > 1:
            for name in names:
                point = self._source_point(name)
                point[f"times/{half}"] = 2
                starts[f"{name}, middle twice"] = point
        return starts

    def point_without_middle(self, source: str) -> Point | None:
        """Return the point of a source without its middle block; None if there is one block only.

        Args:
            source: The source's name.
        """
        if self.half == 0:
            return None
        point = self._source_point(source)
        point[f"times/{self.half}"] = 0
        return point

    def params_of(self, recipe: Recipe) -> Point:
        """Return the point of a recipe of the user's.

        Args:
            recipe: A route through the sources.

        Raises:
            ConfigError: If the recipe is outside the space; the message says which part.
        """
        matcher = BlockMatcher(self, recipe)
        lead = matcher.first_source
        point = self._source_point(lead)
        # Blocks come in their order, so one pass over them reads any route of this space.
        for b in range(self.blocks):
            source, times = self._match_block(matcher, b)
            point[f"times/{b}"] = times
            if source is None:
                continue
            if source != lead:
                point[f"from/{b}"] = source
            if not matcher.is_at_start and matcher.next_scale != 1:
                scale = f"scale/{b}"
                point[scale] = matcher.checked_scale(scale)
            matcher.advance(source, b, times)
        matcher.raise_if_unmatched()
        return point

    def _source_point(self, name: str) -> Point:
        """The point of one source, from its first layer to its last."""
        point: Point = {
            "lead": name,
            "follow": name,
            "hand_over": self.blocks,
        }
        for b in range(self.blocks):
            point[f"from/{b}"] = AS_ROUTED
            point[f"times/{b}"] = 1
            point[f"scale/{b}"] = 1.0
        # Spaces of one source, or without a fold, lack some of these parameters.
        return {key: point[key] for key in self.distributions}

    def _match_block(self, matcher: BlockMatcher, b: int) -> tuple[str | None, int]:
        """The source whose block b comes next in a route, and how often it comes."""
        for name in self.sources:
            times = matcher.count_repeats(name, b, self.most)
            if times:
                return name, times
        return None, 0
