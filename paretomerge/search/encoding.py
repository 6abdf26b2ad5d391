"""Optuna parameters as points of the unit cube, and back.

`Encoding` gives surrogates and variation operators one array `(n, d)` for a mixed, conditional
space. `infer_conditions` reads the conditions of a define-by-run study from its finished trials.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from paretomerge.errors import ConfigError
from paretomerge.types import Array, Conditions, Params, ParamValue

Mask = NDArray[np.bool_]
Indices = NDArray[np.intp]

Space = Mapping[str, BaseDistribution]
"""Parameter -> distribution."""

ParamDict = dict[str, ParamValue]
"""Parameters of one trial, to be filled in."""

Condition = tuple[str, Sequence[ParamValue]]
"""A parent, and its values under which a parameter is active."""

INACTIVE = 0.5
"""The coordinate of an inactive parameter: points that differ only there become one point."""

# An integer with more values than there are trials separates any two groups of trials by chance.
_MAX_PARENT_VALUES = 64


class Encoding:
    """Maps parameters to points of the unit cube and back.

    A number takes one coordinate, scaled to [0, 1] (in logarithms for `log=True`). A categorical
    parameter with C choices takes C coordinates, one-hot. An inactive parameter has all its
    coordinates at `INACTIVE`; a parameter that a point lacks is encoded in the same way.

    Args:
        space: Parameter -> distribution.
        conditions: Parameter -> pairs (parent, values), each parent categorical or an integer. The
            parameter is active where every parent is active and has one of its values. Parameters
            that are not in `space` are ignored.

    Attributes:
        space: Parameter -> distribution, in the order of the coordinates.
        conditions: Those of `conditions` that lie inside `space`.
        columns: Parameter -> its coordinates.
        d: Number of coordinates.

    Raises:
        ConfigError: A distribution is neither float, int nor categorical.
    """

    def __init__(self, space: Space, conditions: Conditions | None = None) -> None:
        self.space = dict(space)
        self.conditions = _conditions_inside(self.space, conditions or {})
        self.columns: dict[str, slice] = {}
        self.d = 0
        self._codecs: dict[str, _Codec] = {}
        for name, distribution in self.space.items():
            codec = _codec(name, distribution)
            self._codecs[name] = codec
            end = self.d + codec.width
            self.columns[name] = slice(self.d, end)
            self.d = end

    @property
    def discrete(self) -> Mask:
        """Mask `(d,)` of the coordinates without a gradient: choices, integers and steps."""
        mask = np.zeros(self.d, dtype=bool)
        for name, codec in self._codecs.items():
            mask[self.columns[name]] = codec.discrete
        return mask

    @property
    def discrete_columns(self) -> list[slice]:
        """The coordinates of each discrete parameter."""
        slices = []
        for name, codec in self._codecs.items():
            if codec.discrete:
                slices.append(self.columns[name])
        return slices

    def encode(self, params: Sequence[Params]) -> Array:
        """Encode parameters.

        Args:
            params: n points; each may lack parameters.

        Returns:
            `(n, d)`. A row is NaN where a value has no place in the space: a choice that is not
            listed, a logarithm of 0, a text for a number.
        """
        n = len(params)
        x = np.zeros((n, self.d))
        valid = np.zeros(n, dtype=bool)
        for i, point in enumerate(params):
            valid[i] = self._encode_into(x[i], point)
        active = self.active_mask(x)
        x = np.where(active, x, INACTIVE)
        # After the inactive coordinates, which would overwrite the NaN.
        x[~valid] = np.nan
        return x

    def _encode_into(self, row: Array, point: Params) -> bool:
        """Write a point into `row` `(d,)`, and return whether all its values are valid."""
        valid = True
        for name, codec in self._codecs.items():
            columns = self.columns[name]
            if name not in point:
                row[columns] = INACTIVE
                continue
            try:
                row[columns] = codec.encode(point[name])
            except (TypeError, ValueError):
                # A trial of an earlier space may have such a value: `encode` makes its row NaN.
                valid = False
        return valid

    def decode(self, x: Array) -> dict[str, Any]:
        """Decode one point `(d,)`; of a categorical parameter, the greatest coordinate wins."""
        params = {}
        for name, codec in self._codecs.items():
            columns = self.columns[name]
            params[name] = codec.decode(x[columns])
        return params

    def project(self, x: Array) -> Array:
        """Move points to the nearest ones that parameters can express.

        Args:
            x: `(n, d)`, any real numbers.

        Returns:
            `(n, d)`: clipped to the cube, choices one-hot, integers and steps rounded, inactive
            parameters at `INACTIVE`.
        """
        x = np.clip(x, 0.0, 1.0)
        for name, codec in self._codecs.items():
            if codec.discrete:
                columns = self.columns[name]
                units = x[:, columns]
                x[:, columns] = codec.round(units)
        active = self.active_mask(x)
        return np.where(active, x, INACTIVE)

    def active_mask(self, x: Array) -> Mask:
        """Mask `(n, d)` of the active coordinates of points `x` `(n, d)`."""
        mask = np.ones(x.shape, dtype=bool)
        cache: dict[str, Mask] = {}
        for name in self.conditions:
            columns = self.columns[name]
            active = self._is_active(name, x, cache)
            mask[:, columns] = active[:, None]
        return mask

    def _is_active(self, name: str, x: Array, cache: dict[str, Mask]) -> Mask:
        """Mask `(n,)` of the points where a parameter is active; `cache` holds earlier results."""
        if name in cache:
            return cache[name]
        # Set before the recursion into the parents, which would not end in a cycle of conditions.
        active = np.ones(len(x), dtype=bool)
        cache[name] = active
        for parent, values in self.conditions.get(name, ()):
            columns = self.columns[parent]
            units = x[:, columns]
            codec = self._codecs[parent]
            has_value = codec.has_value(units, values)
            parent_active = self._is_active(parent, x, cache)
            active = active & parent_active & has_value
            cache[name] = active
        return active

    def neighbours(self, x: Array, rng: Generator, most: int = 64) -> Array:
        """Points that differ from `x` in one discrete parameter: another choice, or one step.

        Args:
            x: `(d,)`, projected.
            rng: Chooses among the neighbours where there are more than `most`.
            most: Greatest number of neighbours.

        Returns:
            `(k, d)`, projected, none equal to `x`.
        """
        points: list[Array] = []
        for name, codec in self._codecs.items():
            columns = self.columns[name]
            current = x[columns]
            for units in codec.alternatives(current):
                neighbour = _replaced(x, columns, units)
                points.append(neighbour)
        points = self._with_every_activated_choice(x, points)
        if len(points) > most:
            n = len(points)
            chosen = rng.choice(n, most, replace=False)
            points = [points[i] for i in chosen]
        stacked = np.asarray(points)
        # Without any neighbour, the array would have the shape (0,).
        stacked = stacked.reshape(-1, self.d)
        projected = self.project(stacked)
        # The projection undoes a change of an inactive parameter.
        is_same = projected == x
        unchanged = is_same.all(1)
        changed: Array = projected[~unchanged]
        return changed

    def _with_every_activated_choice(
        self, x: Array, points: list[Array]
    ) -> list[Array]:
        """Repeat each point for every choice of a categorical parameter that it makes active.

        The coordinates of an inactive parameter are equal, so without this its first choice would
        always be taken.
        """
        for columns in self.discrete_columns:
            inactive = x[columns]
            width = len(inactive)
            is_active = (inactive != INACTIVE).any()
            if width == 1 or not points or is_active:
                continue
            active = self.active_mask(np.asarray(points))
            is_activated = active[:, columns.start]
            repeated = []
            for point, activated in zip(points, is_activated, strict=True):
                every_choice = inactive[None]
                if activated:
                    every_choice = np.eye(width)
                for units in every_choice:
                    copy = _replaced(point, columns, units)
                    repeated.append(copy)
            points = repeated
        return points


class _Codec(Protocol):
    """Between one parameter's values and its `width` coordinates."""

    @property
    def width(self) -> int: ...

    @property
    def discrete(self) -> bool: ...

    def encode(self, value: ParamValue) -> float | Array:
        """Coordinates `(width,)` of a value; TypeError or ValueError where it has none."""

    def decode(self, unit: Array) -> ParamValue:
        """The value at coordinates `(width,)`."""

    def round(self, units: Array) -> Array:
        """Coordinates `(n, width)` of the nearest values; for discrete parameters."""

    def has_value(self, units: Array, values: Sequence[ParamValue]) -> Mask:
        """Mask `(n,)` of the points `(n, width)` that have one of the values."""

    def alternatives(self, unit: Array) -> Sequence[float | Array]:
        """Coordinates of the neighbouring values; none for continuous parameters."""


class _Choices:
    """A categorical parameter, one-hot."""

    discrete = True

    def __init__(self, distribution: CategoricalDistribution) -> None:
        self.width = len(distribution.choices)
        self._distribution = distribution
        self._one_hot = np.eye(self.width)

    def encode(self, value: ParamValue) -> Array:
        index = _choice_index(self._distribution, value)
        return np.asarray(self._one_hot[index])

    def decode(self, unit: Array) -> ParamValue:
        choices = self._distribution.choices
        index = int(unit.argmax())
        return choices[index]

    def round(self, units: Array) -> Array:
        indices = units.argmax(1)
        rounded: Array = self._one_hot[indices]
        return rounded

    def has_value(self, units: Array, values: Sequence[ParamValue]) -> Mask:
        indices = [_choice_index(self._distribution, value) for value in values]
        total = units[:, indices].sum(1)
        has_value: Mask = total > 0
        return has_value

    def alternatives(self, unit: Array) -> Sequence[Array]:
        # The coordinates of an inactive parameter are equal, so no choice is its current one.
        is_equal = self._one_hot == unit
        is_current = is_equal.all(1)
        others = self._one_hot[~is_current]
        return list(others)


class _Number:
    """A float or an integer, scaled to [0, 1]."""

    width = 1

    def __init__(self, distribution: FloatDistribution | IntDistribution) -> None:
        self._low = distribution.low
        self._high = distribution.high
        self._log = distribution.log
        self._step = distribution.step
        self._integer = isinstance(distribution, IntDistribution)
        self.discrete = self._integer or self._step is not None

    def encode(self, value: ParamValue) -> float:
        return self._to_unit(value)  # type: ignore[arg-type]  # raises TypeError for a text

    def decode(self, unit: Array) -> float:
        return self._from_unit(float(unit[0]))

    def round(self, units: Array) -> Array:
        rounded = []
        for unit in units[:, 0]:
            value = self._from_unit(unit)
            rounded.append(self._to_unit(value))
        return np.array(rounded)[:, None]

    def has_value(self, units: Array, values: Sequence[ParamValue]) -> Mask:
        decoded = []
        for unit in units[:, 0]:
            value = self._from_unit(float(unit))
            decoded.append(value)
        return np.isin(decoded, list(values))  # type: ignore[arg-type]  # of numbers only

    def alternatives(self, unit: Array) -> Sequence[float]:
        if not self.discrete:
            return []
        value = self.decode(unit)
        step = self._step or 1
        neighbours = []
        for neighbour in (value - step, value + step):
            if self._low <= neighbour <= self._high:
                neighbours.append(self._to_unit(neighbour))
        return neighbours

    def _to_unit(self, value: float) -> float:
        low: float = self._low
        high: float = self._high
        if self._log:
            # math.log raises for 0, where np.log would return an infinity.
            low = math.log(low)
            high = math.log(high)
            value = math.log(value)
        # A range of one value has no extent to divide by.
        if high <= low:
            return 0.5
        share = (value - low) / (high - low)
        return float(share)

    def _from_unit(self, unit: float) -> float:
        low, high = self._low, self._high
        value = low + unit * (high - low)
        if self._log:
            log_low = np.log(low)
            log_range = np.log(high) - log_low
            log_value = log_low + unit * log_range
            value = float(np.exp(log_value))
        if self._step is not None:
            steps = round((value - low) / self._step)
            value = low + steps * self._step
        # Rounding, also that of exp and log, may leave the range.
        value = min(max(value, low), high)
        if self._integer:
            return round(value)
        return float(value)


def _codec(name: str, distribution: BaseDistribution) -> _Codec:
    if isinstance(distribution, CategoricalDistribution):
        return _Choices(distribution)
    if isinstance(distribution, FloatDistribution | IntDistribution):
        return _Number(distribution)
    raise ConfigError(
        f"{name}: expected a float, int or categorical parameter, got {distribution}"
    )


def _conditions_inside(
    space: Space, conditions: Conditions
) -> dict[str, list[Condition]]:
    """The conditions between parameters of the space."""
    inside: dict[str, list[Condition]] = {}
    for name, pairs in conditions.items():
        if name not in space:
            continue
        inside[name] = []
        for parent, values in pairs:
            if parent in space:
                inside[name].append((parent, values))
    return inside


def _choice_index(distribution: BaseDistribution, value: ParamValue) -> int:
    """Index of a choice; an integer is its own index.

    Optuna's rule decides which choices are equal: NaN equals itself, and a choice may be a list.
    """
    return int(distribution.to_internal_repr(value))


def _replaced(point: Array, columns: slice, units: float | Array) -> Array:
    """A copy of `point` `(d,)` with other coordinates in `columns`."""
    copy = point.copy()
    copy[columns] = units
    return copy


def infer_conditions(
    points: Sequence[Params], space: Space
) -> dict[str, list[Condition]]:
    """Infer when parameters are active from the trials of a define-by-run study.

    A parameter gets the condition (parent, values) if exactly the points whose parent has one of
    the values have the parameter. Conditions nest, since a parent may have a condition too. A
    parent qualifies only if some point has the parent and lacks the parameter, so no parameter
    becomes its own ancestor.

    Args:
        points: Parameters of complete trials.
        space: Parameter -> distribution.

    Returns:
        Parameter -> its one condition; parameters without a condition are left out. Categorical
        parents are preferred to integers.
    """
    categorical = []
    integers = []
    for name, distribution in space.items():
        if isinstance(distribution, CategoricalDistribution):
            categorical.append(name)
        elif _is_short_integer(distribution):
            integers.append(name)
    conditions: dict[str, list[Condition]] = {}
    for name in space:
        having = [point for point in points if name in point]
        lacking = [point for point in points if name not in point]
        if not having or not lacking:
            continue
        for parent in categorical + integers:
            distribution = space[parent]
            values = _activating_values(parent, distribution, having, lacking)
            if parent != name and values:
                conditions[name] = [(parent, values)]
                break
    return conditions


def _is_short_integer(distribution: BaseDistribution) -> bool:
    if not isinstance(distribution, IntDistribution):
        return False
    width = distribution.high - distribution.low
    return width < _MAX_PARENT_VALUES


def _activating_values(
    parent: str,
    distribution: BaseDistribution,
    having: Sequence[Params],
    lacking: Sequence[Params],
) -> list[ParamValue]:
    """The parent's values in all of `having` and none of `lacking`; empty where it does not decide.

    The values of an integer form an interval, which may hold values that no point has.
    """
    values_lacking = []
    for point in lacking:
        if parent in point:
            values_lacking.append(point[parent])
    if not values_lacking or not all(parent in point for point in having):
        return []
    by_index: dict[int, ParamValue] = {}
    for point in having:
        value = point[parent]
        index = _choice_index(distribution, value)
        by_index[index] = value
    if isinstance(distribution, IntDistribution):
        first = min(by_index)
        last = max(by_index)
        interval = range(first, last + 1)
        by_index = {value: value for value in interval}
    indices_lacking = [_choice_index(distribution, value) for value in values_lacking]
    if any(index in by_index for index in indices_lacking):
        return []
    return list(by_index.values())
