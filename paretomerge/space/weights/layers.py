"""Groups of consecutive layers: of equal depth, of equal mass of the deltas, or as the user says."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

from paretomerge.errors import ConfigError, shorten, unknown_name

_WANTED = "a number, {by: depth or profile, count: ...}, or ranges [[0, 8], [8, 24]] from layer 0 to the depth"


@dataclass(frozen=True)
class Grouping:
    """`count` groups of equal depth or of equal mass (`by: profile`); or `ranges`, [first, end) each, in place of both."""

    count: int = 1
    by: Literal["depth", "profile"] = "depth"
    ranges: tuple[tuple[int, int], ...] = ()

    @classmethod
    def read(cls, data: Any) -> "Grouping":
        """From study.yaml: `4`, `{by: profile, count: 4}` or `[[0, 8], [8, 24]]`."""
        if isinstance(data, Grouping):
            return data
        if _whole(data):
            return cls(_counted(data))
        if isinstance(data, Mapping):
            for key in data:
                if key not in ("by", "count"):
                    raise ConfigError(f"groups: {unknown_name('key', key, ('by', 'count'))}")
            by = data.get("by", "depth")
            if by not in ("depth", "profile"):
                raise ConfigError(
                    f"groups: {unknown_name('kind of grouping', by, ('depth', 'profile'))}"
                )
            return cls(_counted(data.get("count")), by)
        if not isinstance(data, (list, tuple)) or not data:
            raise ConfigError(f"groups: expected {_WANTED}; got {shorten(data)}")
        if not all(
            isinstance(pair, (list, tuple)) and len(pair) == 2 and all(map(_whole, pair))
            for pair in data
        ):
            raise ConfigError(f"groups: expected ranges [first, end), got {shorten(data)}")
        return cls(len(data), ranges=tuple((first, end) for first, end in data))

    def starts(self, depth: int, mass: Sequence[float] | None = None) -> tuple[int, ...]:
        """The first layer of each group of a model with `depth` layers. mass: of each layer's deltas, for `profile`."""
        if self.ranges:
            ends = [0, *(end for _, end in self.ranges)]
            if (
                [first for first, _ in self.ranges] != ends[:-1]
                or ends[-1] != depth
                or any(first >= end for first, end in self.ranges)
            ):
                told = [list(pair) for pair in self.ranges]
                raise ConfigError(
                    f"groups: expected ranges [first, end) that follow one another from 0 to {depth}, got {told}"
                )
            return tuple(ends[:-1])
        if not 1 <= self.count <= max(depth, 1):
            raise ConfigError(
                f"groups: expected 1 to {max(depth, 1)}, the model's layers, got {self.count}"
            )
        if self.by == "depth" or self.count == 1:
            return tuple(-(-group * depth // self.count) for group in range(self.count))
        if mass is None:
            raise ConfigError(
                "groups: expected a profile of the deltas for `by: profile`, got none"
            )
        return blocks_of_equal_mass(mass, self.count)


ONE = Grouping()
"""All layers together."""


def blocks_of_equal_mass(mass: Sequence[float], k: int) -> tuple[int, ...]:
    """First layers of the k contiguous blocks whose masses are the most alike: the least sum of their squares.

    The sum over blocks is given, so this is the least variance between blocks. By dynamic programming, O(k L^2) for L
    layers; of equally good cuts the earliest.
    """
    layers = len(mass)
    sums = [0.0, *accumulate(mass)]
    total = sums[-1] or 1.0

    def cost(first: int, end: int) -> float:
        return float(((sums[end] - sums[first]) / total) ** 2)

    best = [cost(0, end) if end else float("inf") for end in range(layers + 1)]
    cuts: list[list[int]] = []
    for block in range(2, k + 1):
        cut = [
            min(range(block - 1, end), key=lambda c, end=end: best[c] + cost(c, end), default=0)  # type: ignore[misc]
            for end in range(layers + 1)
        ]
        best = [
            best[cut[end]] + cost(cut[end], end) if end >= block else float("inf")
            for end in range(layers + 1)
        ]
        cuts.append(cut)
    starts, end = [0], layers
    for cut in reversed(cuts):
        end = cut[end]
        starts.insert(1, end)
    return tuple(starts)


def group_of(starts: Sequence[int], layer: int) -> int:
    """Which group a layer is in."""
    return bisect_right(starts, layer) - 1


def _whole(value: Any) -> bool:
    return type(value) is int


def _counted(count: Any) -> int:
    if not _whole(count) or count < 1:
        raise ConfigError(f"groups: expected a count of 1 or more, got {shorten(count)}")
    return int(count)
