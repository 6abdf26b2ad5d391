"""Groups of consecutive layers: of equal depth, of equal mass of the deltas, or as listed."""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, TypeGuard

from paretomerge.errors import ConfigError, shorten, unknown_name

LayerRange = tuple[int, int]
"""Consecutive layers [first, end)."""

_GRAMMAR = (
    "a number, {by: depth or profile, count: ...}, "
    "or ranges [[0, 8], [8, 24]] from layer 0 to the depth"
)

_KINDS = ("depth", "profile")


@dataclass(frozen=True)
class Grouping:
    """How the layers of a model are divided into groups of consecutive layers.

    Attributes:
        count: Number of groups.
        by: `depth` for groups with equally many layers, `profile` for groups whose deltas have
            about equal mass (squared L2 norm).
        ranges: Layers [first, end) of each group. If there are any, `by` is not used.
    """

    count: int = 1
    by: Literal["depth", "profile"] = "depth"
    ranges: tuple[LayerRange, ...] = ()

    @classmethod
    def parse(cls, data: object) -> "Grouping":
        """Read a grouping as it is written in study.yaml.

        Args:
            data: `4`, `{by: profile, count: 4}`, `[[0, 8], [8, 24]]`, or a `Grouping`.

        Returns:
            The grouping. Whether it fits a model is checked by `starts`.

        Raises:
            ConfigError: The value has none of these forms.
        """
        if isinstance(data, Grouping):
            return data
        if _is_integer(data):
            return cls(_checked_count(data))
        if isinstance(data, Mapping):
            return cls._from_mapping(data)
        if isinstance(data, (list, tuple)) and data:
            return cls._from_ranges(data)
        shown = shorten(data)
        raise ConfigError(f"groups: expected {_GRAMMAR}; got {shown}")

    @classmethod
    def _from_mapping(cls, data: Mapping[object, object]) -> "Grouping":
        keys = ("by", "count")
        for key in data:
            if key not in keys:
                problem = unknown_name("key", key, keys)
                raise ConfigError(f"groups: {problem}")
        by = data.get("by", "depth")
        if by not in _KINDS:
            problem = unknown_name("kind of grouping", by, _KINDS)
            raise ConfigError(f"groups: {problem}")
        count = _checked_count(data.get("count"))
        return cls(count, "profile" if by == "profile" else "depth")

    @classmethod
    def _from_ranges(cls, data: Sequence[object]) -> "Grouping":
        ranges = []
        for pair in data:
            layers = _as_range(pair)
            if layers is None:
                shown = shorten(data)
                raise ConfigError(f"groups: expected ranges [first, end), got {shown}")
            ranges.append(layers)
        return cls(len(ranges), ranges=tuple(ranges))

    def starts(
        self,
        depth: int,
        mass: Sequence[float] | None = None,
    ) -> tuple[int, ...]:
        """Return the first layer of each group.

        Args:
            depth: Number of layers of the model, L.
            mass: (L,) Squared L2 norm of each layer's deltas. Needed for `by: profile`.

        Returns:
            First layers in ascending order, beginning with 0.

        Raises:
            ConfigError: The grouping does not fit the model, or the mass is missing.
        """
        if self.ranges:
            self._check_ranges(depth)
            return tuple(first for first, _ in self.ranges)
        # A model without numbered layers (ALBERT shares one) still has one group.
        most = max(depth, 1)
        if not 1 <= self.count <= most:
            raise ConfigError(
                f"groups: expected 1 to {most}, the model's layers, got {self.count}"
            )
        if self.by == "depth" or self.count == 1:
            return _starts_of_equal_depth(depth, self.count)
        if mass is None:
            raise ConfigError(
                "groups: `by: profile` expected a profile of the deltas, got none"
            )
        return blocks_of_equal_mass(mass, self.count)

    def _check_ranges(self, depth: int) -> None:
        next_layer = 0
        adjacent = True
        for first, end in self.ranges:
            adjacent = adjacent and first == next_layer and first < end
            next_layer = end
        if adjacent and next_layer == depth:
            return
        listed = [list(layers) for layers in self.ranges]
        raise ConfigError(
            "groups: expected ranges [first, end) that follow one another "
            f"from 0 to {depth}, got {listed}"
        )


SINGLE_GROUP = Grouping()
"""All layers in one group."""


def _starts_of_equal_depth(depth: int, count: int) -> tuple[int, ...]:
    """First layers of groups whose numbers of layers differ by at most 1."""
    starts = []
    for group in range(count):
        # Rounded up, so that layer l is in group floor(l * count / depth).
        start = -(-group * depth // count)
        starts.append(start)
    return tuple(starts)


def blocks_of_equal_mass(
    mass: Sequence[float],
    count: int,
) -> tuple[int, ...]:
    """Divide layers into contiguous blocks of masses that are as equal as possible.

    Minimises the sum of squares of the blocks' masses, by dynamic programming in O(count L^2).
    The sum of the masses is fixed, so this also minimises their variance. Of equally good
    divisions, the one with the earliest cuts is taken.

    Args:
        mass: (L,) Mass of each layer, 0 or more.
        count: Number of blocks, 1 to L.

    Returns:
        The first layer of each block.
    """
    layers = len(mass)
    cumulative = [0.0, *accumulate(mass)]
    # Shares of the total keep the squares in range; where nothing moved, any division is as good.
    total = cumulative[-1] or 1.0

    def cost(first: int, end: int) -> float:
        share = (cumulative[end] - cumulative[first]) / total
        return float(share**2)

    # costs[end] is the least cost of layers [0, end) in the number of blocks reached so far, and
    # last_starts[-1][end] is where the last of those blocks starts.
    costs = [cost(0, end) for end in range(layers + 1)]
    costs[0] = math.inf  # a block has at least one layer
    last_starts = []
    for blocks in range(2, count + 1):
        next_costs = [math.inf] * (layers + 1)
        last_start = [0] * (layers + 1)
        for end in range(blocks, layers + 1):
            for first in range(blocks - 1, end):
                candidate = costs[first] + cost(first, end)
                if candidate < next_costs[end]:
                    next_costs[end] = candidate
                    last_start[end] = first
        costs = next_costs
        last_starts.append(last_start)

    # Follow the last blocks back from the last layer.
    starts = []
    end = layers
    for last_start in reversed(last_starts):
        end = last_start[end]
        starts.append(end)
    starts.append(0)
    starts.reverse()
    return tuple(starts)


def group_of(starts: Sequence[int], layer: int) -> int:
    """Return the index of the group that a layer belongs to, given the groups' first layers."""
    return bisect_right(starts, layer) - 1


def _is_integer(value: object) -> TypeGuard[int]:
    # `True` is an `int` for isinstance; in a study.yaml it is a mistake.
    return type(value) is int


def _as_range(pair: object) -> LayerRange | None:
    """The range [first, end) that a pair of integers stands for; None for anything else."""
    if not isinstance(pair, (list, tuple)):
        return None
    if len(pair) != 2:
        return None
    first, end = pair
    if _is_integer(first) and _is_integer(end):
        return first, end
    return None


def _checked_count(count: object) -> int:
    if not _is_integer(count) or count < 1:
        shown = shorten(count)
        raise ConfigError(f"groups: expected a count of 1 or more, got {shown}")
    return count
