"""How finely one kind of number (weight, density) is split over a model, and how a slice's setting is written from it."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from paretomerge.checkpoint.architecture import ROLES, Architecture
from paretomerge.errors import ConfigError
from paretomerge.space.weights.layers import ONE, Grouping, group_of

Cell = tuple[int, str]
"""(group of layers or control point, role): one parameter per source. The role is '' where roles are not told apart."""

REST = "other"
"""The role of tensors that no pattern selects."""


@dataclass(frozen=True)
class Granularity:
    """Bounds, groups of consecutive layers, and kinds of tensors told apart.

    roles: True for attention, mlp and the rest; or role -> parts of tensor names, the first that matches counts.
    smooth: the groups are control points, evenly spaced from the first layer to the last, with straight lines between.
    """

    bounds: tuple[float, float]
    groups: Grouping = ONE
    roles: bool | Mapping[str, Sequence[str]] = False
    smooth: bool = False

    def __post_init__(self) -> None:
        if not -math.inf < self.bounds[0] < self.bounds[1] < math.inf:
            raise ConfigError(
                f"bounds: expected [low, high] with low < high, got {list(self.bounds)}"
            )
        if self.smooth and (
            self.groups.ranges or self.groups.by != "depth" or self.groups.count < 2
        ):
            got = (
                f"{len(self.groups.ranges)} ranges"
                if self.groups.ranges
                else f"{self.groups.count} by {self.groups.by}"
            )
            raise ConfigError(
                f"smooth: expected `groups` to be a number of control points, 2 or more, got {got}"
            )
        if not self.roles and self.roles is not False:
            raise ConfigError(
                f"roles: expected false, true, or names with parts of tensor names, got {self.roles}"
            )
        for role, patterns in self.roles.items() if isinstance(self.roles, Mapping) else ():
            if (
                not role
                or "/" in role
                or isinstance(patterns, str)
                or not patterns
                or not all(patterns)
            ):
                raise ConfigError(
                    f"roles: expected a name without `/` and a list of parts of tensor names, got {role}: {patterns}"
                )

    def clip(self, value: float) -> float:
        return min(max(float(value), self.bounds[0]), self.bounds[1])


@dataclass(frozen=True)
class ParameterLayout:
    """A dial on one architecture.

    starts: first layers of the groups. Embeddings belong to the first group and its control point, final norm and head to
    the last, as in recipes. Only cells that have a tensor are parameters.
    """

    kind: str
    dial: Granularity
    architecture: Architecture
    starts: tuple[int, ...]

    @classmethod
    def of(
        cls,
        kind: str,
        dial: Granularity,
        architecture: Architecture,
        mass: Sequence[float] | None = None,
    ) -> "ParameterLayout":
        """mass: of each layer's deltas, for groups by profile."""
        try:
            split = cls(kind, dial, architecture, dial.groups.starts(architecture.depth, mass))
            split._check_roles()
        except ConfigError as error:
            raise ConfigError(f"space.{kind}.{error}") from error
        return split

    def cut(self, starts: Sequence[int]) -> "ParameterLayout":
        """The same with groups that end where `starts` begin, too."""
        return replace(self, starts=tuple(sorted({*self.starts, *starts})))

    @cached_property
    def roles(self) -> Mapping[str, tuple[str, ...]]:
        """Role -> filters that select its tensors, the rest last and without any; {} where roles are not told apart."""
        if not self.dial.roles:
            return {}
        if isinstance(self.dial.roles, Mapping):
            named = {role: tuple(patterns) for role, patterns in self.dial.roles.items()}
        else:
            named = {role: self.architecture.role_filters(role) for role in ROLES[:-1]}
        return {role: patterns for role, patterns in named.items() if role != REST} | {REST: ()}

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """Every cell that governs a tensor, by group, then role."""
        governed = {cell for shares in self.shares.values() for cell in shares}
        return tuple(
            (group, role)
            for group in range(len(self.starts))
            for role in self.roles or ("",)
            if (group, role) in governed
        )

    @cached_property
    def shares(self) -> Mapping[str, Mapping[Cell, float]]:
        """Tensor -> the cells that govern it, with their shares, which sum to 1: several only between control points."""
        return {
            name: {(g, self.role(name)): share for g, share in self._groups(name)}
            for name in self.architecture.names
        }

    def names(self, source: str) -> dict[Cell, str]:
        """Cell -> `weight/<source>/<group>/<role>`; a level that is not split is left out."""
        many = len(self.starts) > 1
        return {
            (g, r): f"{self.kind}/{source}" + (f"/{g}" if many else "") + (f"/{r}" if r else "")
            for g, r in self.cells
        }

    def role(self, name: str) -> str:
        """The role of a tensor: the first whose filter is a part of its name."""
        found = (
            role
            for role, patterns in self.roles.items()
            if any(pattern in name for pattern in patterns)
        )
        return next(found, REST) if self.roles else ""

    def setting(
        self, value: Callable[[Cell], float], first: int, end: int, each_layer: bool = False
    ) -> Any:
        """What a recipe says of layers [first, end): a number, a gradient, or entries of `filter` and `value`.

        value: of a cell. The layers are inside one group, but for control points: then the gradient consists of these
        where the layers are all that there are, else, or with `each_layer`, of a value for each layer.
        """
        if self.dial.smooth:
            return self._gradients(
                value, range(first, end), each_layer or end - first < self.architecture.depth
            )
        group = group_of(self.starts, first)
        if not self.roles:
            return value((group, ""))
        return self._entries([(role, value((group, role))) for g, role in self.cells if g == group])

    def _gradients(self, value: Callable[[Cell], float], layers: range, each_layer: bool) -> Any:
        points = range(len(self.starts))
        roles = [role for role in self.roles or ("",) if any(r == role for _, r in self.cells)]
        entries = [
            {"filter": name, "value": value((points[-1], self.role(name)))} for name in self._behind
        ]
        lines = []
        for role in roles:
            control = [
                value((point, role)) if (point, role) in self.cells else 0.0 for point in points
            ]
            if each_layer:
                control = [_line(control, layer, self.architecture.depth) for layer in layers]
            lines.append((role, control if len(control) > 1 else control[0]))
        said = self._entries(lines) if self.roles else [{"value": lines[0][1]}]
        return [*entries, *said] if entries or self.roles else lines[0][1]

    def _entries(self, values: Sequence[tuple[str, Any]]) -> list[dict[str, Any]]:
        """Filters for all roles but the last that there is: it takes whatever is left."""
        entries = [
            {"filter": pattern, "value": value}
            for role, value in values[:-1]
            for pattern in self.roles[role]
        ]
        return [*entries, {"value": values[-1][1]}]

    def _groups(self, name: str) -> Iterator[tuple[int, float]]:
        layer, last = self.architecture.layer(name), len(self.starts) - 1
        if layer is None:
            ahead = (
                name not in self._behind
                if self.dial.smooth
                else self.architecture.is_embedding(name)
            )
            yield (0 if ahead else last), 1.0
        elif not self.dial.smooth:
            yield group_of(self.starts, layer), 1.0
        else:
            position = _position(layer, self.architecture.depth, len(self.starts))
            low = min(int(position), last - 1)
            yield from (
                (g, s) for g, s in ((low, 1 - (position - low)), (low + 1, position - low)) if s > 0
            )

    @cached_property
    def _behind(self) -> tuple[str, ...]:
        """Final norm and head, which come after the last control point; the grammar gives them a gradient's first value, so
        they need filters of their own. (A name that is a part of another's can have none.)"""
        names = [
            n
            for n in self.architecture.by_layer.get(None, ())
            if not self.architecture.is_embedding(n)
        ]
        return tuple(
            n
            for n in names
            if not any(n in other and n != other for other in self.architecture.names)
        )

    def _check_roles(self) -> None:
        for role, patterns in (
            self.dial.roles.items() if isinstance(self.dial.roles, Mapping) else ()
        ):
            for pattern in patterns:
                if not any(pattern in name for name in self.architecture.names):
                    raise ConfigError(
                        f"roles.{role}: expected a part of a tensor's name, got {pattern!r}, which is in none"
                    )


def _position(layer: int, depth: int, points: int) -> float:
    return layer / (depth - 1) * (points - 1)


def _line(control: Sequence[float], layer: int, depth: int) -> float:
    position = _position(layer, depth, len(control))
    low = min(int(position), len(control) - 2)
    return control[low] + (position - low) * (control[low + 1] - control[low])
