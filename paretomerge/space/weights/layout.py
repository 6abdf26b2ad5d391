"""How weights or densities are divided over a model, and how a recipe states them.

A *cell* is a group of layers and a role of tensors, such as (group 0, mlp). Each source has one
parameter per cell. `ParameterLayout.names` gives the parameter of each cell,
`ParameterLayout.coefficients` the cells that govern each tensor.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from paretomerge.checkpoint.architecture import ROLES, Architecture
from paretomerge.errors import ConfigError
from paretomerge.recipe import ParameterSetting
from paretomerge.space.weights.layers import (
    SINGLE_GROUP,
    Grouping,
    LayerRange,
    group_of,
)
from paretomerge.types import Params

OTHER = "other"
"""The role of tensors that no filter selects."""

SINGLE_ROLE = ""
"""The role of all tensors where roles are not told apart."""


class Cell(NamedTuple):
    """Part of a model that one parameter per source governs.

    Attributes:
        group: Index of the group of layers, or of the control point of a smooth layout.
        role: Role of the tensors, `SINGLE_ROLE` where roles are not told apart.
    """

    group: int
    role: str


@dataclass(frozen=True)
class Granularity:
    """How finely weights or densities are divided over a model, and their bounds.

    Attributes:
        bounds: Lower and upper bound of each parameter.
        groups: Groups of consecutive layers. With `smooth`, their number is that of the control
            points.
        roles: False for one parameter for all tensors of a layer, True for `attention`, `mlp` and
            `other`, or role -> parts of tensor names. A tensor has the first role that matches.
        smooth: Whether the groups are control points, evenly spaced from the first layer to the
            last, with linear interpolation between them.

    Raises:
        ConfigError: A field has an invalid value.
    """

    bounds: tuple[float, float]
    groups: Grouping = SINGLE_GROUP
    roles: bool | Mapping[str, Sequence[str]] = False
    smooth: bool = False

    def __post_init__(self) -> None:
        low, high = self.bounds
        if not -math.inf < low < high < math.inf:
            raise ConfigError(
                f"bounds: expected [low, high] with low < high, got {[low, high]}"
            )
        if self.smooth:
            self._check_control_points()
        if not self.roles and self.roles is not False:
            raise ConfigError(
                f"roles: expected false, true, or names with parts of tensor names, "
                f"got {self.roles}"
            )
        for role, patterns in self.named_roles.items():
            # `/` separates the levels of a parameter's name.
            valid_name = role and "/" not in role
            # A string is a list of characters, and an empty pattern is part of every tensor's name.
            is_list = not isinstance(patterns, str)
            valid_patterns = is_list and patterns and all(patterns)
            if not (valid_name and valid_patterns):
                raise ConfigError(
                    "roles: expected a name without `/` and a list of parts of tensor names, "
                    f"got {role}: {patterns}"
                )

    def _check_control_points(self) -> None:
        groups = self.groups
        if groups.ranges:
            got = f"{len(groups.ranges)} ranges"
        elif groups.by != "depth" or groups.count < 2:
            got = f"{groups.count} by {groups.by}"
        else:
            return
        raise ConfigError(
            f"smooth: expected `groups` to be a number of control points, 2 or more, got {got}"
        )

    @property
    def named_roles(self) -> Mapping[str, Sequence[str]]:
        """The user's own roles -> parts of tensor names; {} where `roles` is a boolean."""
        return self.roles if isinstance(self.roles, Mapping) else {}

    def clip(self, value: float) -> float:
        """Return the value inside the bounds that is nearest to `value`."""
        low, high = self.bounds
        return min(max(float(value), low), high)


@dataclass(frozen=True)
class ParameterLayout:
    """A granularity applied to one architecture: its cells, and the tensors that each governs.

    Embeddings belong to the first group or control point, the final norm and the head to the last,
    as in recipes. A cell without a tensor (embeddings in the middle of the model) has no parameter.

    Attributes:
        kind: `weight` or `density`.
        granularity: Bounds, groups, roles.
        architecture: Architecture of the base.
        starts: First layer of each group of layers. With `smooth`, only their number is used.
    """

    kind: str
    granularity: Granularity
    architecture: Architecture
    starts: tuple[int, ...]

    @classmethod
    def of(
        cls,
        kind: str,
        granularity: Granularity,
        architecture: Architecture,
        mass: Sequence[float] | None = None,
    ) -> "ParameterLayout":
        """Apply a granularity to an architecture.

        Args:
            kind: `weight` or `density`.
            granularity: Bounds, groups, roles.
            architecture: Architecture of the base.
            mass: (L,) Squared L2 norm of each layer's deltas, for groups by profile.

        Raises:
            ConfigError: The groups or roles do not fit the architecture.
        """
        try:
            starts = granularity.groups.starts(architecture.depth, mass)
            _check_roles(granularity, architecture)
        except ConfigError as error:
            raise ConfigError(f"space.{kind}.{error}") from error
        return cls(kind, granularity, architecture, starts)

    def cut_at(self, starts: Sequence[int]) -> "ParameterLayout":
        """Return the layout with additional group boundaries before the layers `starts`."""
        all_starts = {*self.starts, *starts}
        return replace(self, starts=tuple(sorted(all_starts)))

    @property
    def smooth(self) -> bool:
        """Whether values are interpolated between control points."""
        return self.granularity.smooth

    @cached_property
    def role_filters(self) -> Mapping[str, tuple[str, ...]]:
        """Role -> filters (parts of tensor names) that select its tensors, by priority.

        `other` is last and has no filter. Empty where roles are not told apart.
        """
        if not self.granularity.roles:
            return {}
        filters: dict[str, tuple[str, ...]] = {}
        named_roles = self.granularity.named_roles
        if named_roles:
            for role, patterns in named_roles.items():
                filters[role] = tuple(patterns)
        else:
            for role in ROLES:
                filters[role] = self.architecture.role_filters(role)
        # A recipe's last entry has no filter, so the rest must come last.
        filters.pop(OTHER, None)
        filters[OTHER] = ()
        return filters

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles, by priority; `SINGLE_ROLE` alone where roles are not told apart."""
        return tuple(self.role_filters) or (SINGLE_ROLE,)

    def role_of(self, tensor: str) -> str:
        """Return the role of a tensor: the first with a filter that is part of the name."""
        if not self.role_filters:
            return SINGLE_ROLE
        # The order of a recipe's entries, of which the first that matches counts.
        for role, patterns in self.role_filters.items():
            if any(pattern in tensor for pattern in patterns):
                return role
        return OTHER

    @cached_property
    def coefficients(self) -> Mapping[str, Mapping[Cell, float]]:
        """Tensor -> the cells that govern it, with interpolation coefficients that sum to 1.

        Only tensors between two control points of a smooth layout have more than one cell.
        """
        coefficients = {}
        for tensor in self.architecture.names:
            role = self.role_of(tensor)
            of_tensor = {}
            for group, coefficient in self._group_coefficients(tensor).items():
                of_tensor[Cell(group, role)] = coefficient
            coefficients[tensor] = of_tensor
        return coefficients

    def _group_coefficients(self, tensor: str) -> dict[int, float]:
        """The groups or control points that govern a tensor, with their coefficients."""
        layer = self.architecture.layer(tensor)
        last = len(self.starts) - 1
        if layer is None:
            group = 0 if self._precedes_layers(tensor) else last
            return {group: 1.0}
        if not self.smooth:
            group = group_of(self.starts, layer)
            return {group: 1.0}
        lower, fraction = self._position(layer)
        upper = lower + 1
        # A layer at a control point depends on that point alone.
        if fraction == 0:
            return {lower: 1.0}
        if fraction == 1:
            return {upper: 1.0}
        return {lower: 1 - fraction, upper: fraction}

    def _position(self, layer: int) -> tuple[int, float]:
        """The control point at or below a layer, and the fraction of the way to the next one."""
        intervals = len(self.starts) - 1
        position = layer / (self.architecture.depth - 1) * intervals
        # The last layer is at the end of the last interval; there is no interval after it.
        lower = min(int(position), intervals - 1)
        return lower, position - lower

    def _precedes_layers(self, tensor: str) -> bool:
        """Whether a tensor outside the layers belongs to the first group."""
        if self.smooth:
            # All that `_smooth_setting` gives no filter of its own takes a gradient's first value.
            return tensor not in self._tensors_after_layers
        return self.architecture.is_embedding(tensor)

    @cached_property
    def _tensors_after_layers(self) -> tuple[str, ...]:
        """Final norm and head, which take the last control point of a smooth layout.

        The recipe grammar gives tensors outside the layers the first value of a gradient, so these
        need filters of their own. A name that is part of another name cannot have one, since the
        filter would select both; it is left out.
        """
        tensors = []
        for tensor in self.architecture.by_layer.get(None, ()):
            if self.architecture.is_embedding(tensor):
                continue
            selected = [name for name in self.architecture.names if tensor in name]
            if selected == [tensor]:
                tensors.append(tensor)
        return tuple(tensors)

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """Every cell that governs a tensor, by group, then by priority of the role."""
        governing: set[Cell] = set()
        for cells in self.coefficients.values():
            governing.update(cells)
        ordered = []
        for group in range(len(self.starts)):
            for role in self.roles:
                cell = Cell(group, role)
                if cell in governing:
                    ordered.append(cell)
        return tuple(ordered)

    def names(self, source: str) -> dict[Cell, str]:
        """Return the parameter of each cell: `<kind>/<source>/<group>/<role>`.

        The group is left out where there is only one, the role where roles are not told apart.
        """
        names = {}
        several_groups = len(self.starts) > 1
        for cell in self.cells:
            name = f"{self.kind}/{source}"
            if several_groups:
                name += f"/{cell.group}"
            if cell.role != SINGLE_ROLE:
                name += f"/{cell.role}"
            names[cell] = name
        return names

    def setting(
        self,
        params: Params,
        source: str,
        layers: LayerRange,
        each_layer: bool = False,
    ) -> ParameterSetting:
        """Return what a recipe states for a source in some layers.

        Args:
            params: A trial's parameters.
            source: Name of the source.
            layers: Layers [first, end). They lie inside one group, unless the layout is smooth.
            each_layer: Whether gradients of a smooth layout list the value at each layer. If not,
                they list the control points, where `layers` are all layers of the model.

        Returns:
            A number, a gradient, or entries with `filter` and `value`.
        """
        names = self.names(source)

        # Parameters are looked up one by one, for inactive ones may be missing.
        def value(cell: Cell) -> float:
            number = params[names[cell]]
            assert number is not None
            return float(number)

        if self.smooth:
            return self._smooth_setting(value, layers, each_layer)
        first, _ = layers
        group = group_of(self.starts, first)
        if not self.role_filters:
            cell = Cell(group, SINGLE_ROLE)
            return value(cell)
        by_role: dict[str, ParameterSetting] = {}
        for cell in self.cells:
            if cell.group == group:
                by_role[cell.role] = value(cell)
        return self._entries(by_role)

    def _smooth_setting(
        self,
        value: Callable[[Cell], float],
        layers: LayerRange,
        each_layer: bool,
    ) -> ParameterSetting:
        first, end = layers
        # A gradient of control points spans the layers of its slice, so it fits whole models only.
        is_whole_model = end - first == self.architecture.depth
        roles_with_tensors = {cell.role for cell in self.cells}
        gradients: dict[str, ParameterSetting] = {}
        for role in self.roles:
            if role not in roles_with_tensors:
                continue
            gradient = self._control_points(value, role)
            if each_layer or not is_whole_model:
                gradient = self._values_at_layers(gradient, layers)
            gradients[role] = gradient
            if len(gradient) == 1:
                # A slice of one layer has a number in place of a gradient.
                gradients[role] = gradient[0]

        after_layers = []
        last = len(self.starts) - 1
        for tensor in self._tensors_after_layers:
            cell = Cell(last, self.role_of(tensor))
            entry = {"filter": tensor, "value": value(cell)}
            after_layers.append(entry)
        if not after_layers and not self.role_filters:
            return gradients[SINGLE_ROLE]
        # The first entry that matches counts: filters of single tensors come before the roles.
        return [*after_layers, *self._entries(gradients)]

    def _control_points(
        self,
        value: Callable[[Cell], float],
        role: str,
    ) -> list[float]:
        """Values of a role at all control points."""
        control = []
        for point in range(len(self.starts)):
            cell = Cell(point, role)
            if cell in self.cells:
                control.append(value(cell))
            else:
                # No tensor of the role is near the point, so its value has no effect.
                control.append(0.0)
        return control

    def _values_at_layers(
        self,
        control: Sequence[float],
        layers: LayerRange,
    ) -> list[float]:
        """Linear interpolation of control points at layers [first, end)."""
        values = []
        for layer in range(*layers):
            lower, fraction = self._position(layer)
            slope = control[lower + 1] - control[lower]
            values.append(control[lower] + fraction * slope)
        return values

    def _entries(
        self, by_role: Mapping[str, ParameterSetting]
    ) -> list[dict[str, ParameterSetting]]:
        """Entries with filters for each role but the last, which takes all remaining tensors."""
        *filtered_roles, last_role = by_role
        entries = []
        for role in filtered_roles:
            for pattern in self.role_filters[role]:
                entry = {"filter": pattern, "value": by_role[role]}
                entries.append(entry)
        entries.append({"value": by_role[last_role]})
        return entries


def _check_roles(granularity: Granularity, architecture: Architecture) -> None:
    for role, patterns in granularity.named_roles.items():
        for pattern in patterns:
            if any(pattern in name for name in architecture.names):
                continue
            raise ConfigError(
                f"roles.{role}: expected a part of a tensor's name, "
                f"got {pattern!r}, which is in none"
            )
