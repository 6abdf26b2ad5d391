"""Between Optuna's parameters and the unit cube `(n, d)` that the surrogate sees."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from paretomerge.errors import ConfigError

Array = NDArray[np.float64]
Conditions = Mapping[str, Sequence[tuple[str, Sequence[Any]]]]
_MOST_STEPS = (
    64  # of an integer that others may depend on: one of many values would explain anything
)
INACTIVE = 0.5  # where a parameter that does not count is put, so that points that mean the same are the same


class Encoding:
    """Numbers are scaled to [0, 1]; a choice among C becomes C coordinates, one of them 1 (one-hot).

    conditions: name -> (parent, values) pairs: the parameter counts only where each `parent`, a choice or an integer, counts and
        has one of its `values`. A point that lacks a parameter is encoded as one where it does not count.
    """

    def __init__(
        self, space: Mapping[str, BaseDistribution], conditions: Conditions | None = None
    ) -> None:
        self.space = dict(space)
        self.conditions = {
            k: [p for p in v if p[0] in self.space]
            for k, v in (conditions or {}).items()
            if k in self.space
        }
        self.columns: dict[str, slice] = {}
        self.d = 0
        for name, distribution in self.space.items():
            if not isinstance(
                distribution, (CategoricalDistribution, FloatDistribution, IntDistribution)
            ):
                raise ConfigError(
                    f"{name}: expected a float, int or categorical parameter, got {distribution}"
                )
            width = (
                len(distribution.choices)
                if isinstance(distribution, CategoricalDistribution)
                else 1
            )
            self.columns[name] = slice(self.d, self.d + width)
            self.d += width

    @property
    def discrete(self) -> NDArray[np.bool_]:
        """Mask `(d,)` of the coordinates that gradients must not move."""
        mask = np.zeros(self.d, dtype=bool)
        for name, distribution in self.space.items():
            mask[self.columns[name]] = (
                not isinstance(distribution, FloatDistribution) or distribution.step is not None
            )
        return mask

    @property
    def discrete_columns(self) -> list[slice]:
        """The coordinates of each choice or integer."""
        discrete = self.discrete
        return [columns for columns in self.columns.values() if discrete[columns.start]]

    def encode(self, params: Sequence[Mapping[str, Any]]) -> Array:
        """`(n, d)`, inactive parameters at their one place. A point with a value that has none, a choice that is not there or a
        logarithm of 0, is NaN.
        """
        x = np.zeros((len(params), self.d))
        placed = np.array(
            [self._write(point, row) for row, point in zip(x, params, strict=True)], dtype=bool
        )
        x = np.where(self.active_mask(x), x, INACTIVE)
        x[~placed] = np.nan
        return x

    def _write(self, point: Mapping[str, Any], row: Array) -> bool:
        """A point into its row `(d,)`; whether every value has a place there."""
        placed = True
        for name, distribution in self.space.items():
            columns = self.columns[name]
            try:
                if name not in point:
                    row[columns] = INACTIVE
                elif isinstance(distribution, CategoricalDistribution):
                    row[columns][_place(distribution, point[name])] = 1.0
                else:
                    row[columns] = self._to_unit(distribution, point[name])
            except (TypeError, ValueError):
                placed = False
        return placed

    def decode(self, x: Array) -> dict[str, Any]:
        """One row `(d,)` -> parameters."""
        out: dict[str, Any] = {}
        for name, distribution in self.space.items():
            part = x[self.columns[name]]
            if isinstance(distribution, CategoricalDistribution):
                out[name] = distribution.choices[int(part.argmax())]
            else:
                out[name] = self._from_unit(distribution, float(part[0]))
        return out

    def project(self, x: Array) -> Array:
        """`(n, d)` with choices made one-hot, steps rounded, and inactive parameters moved to their one place."""
        x = np.clip(x, 0.0, 1.0)
        for name, distribution in self.space.items():
            columns = self.columns[name]
            if isinstance(distribution, CategoricalDistribution):
                x[:, columns] = np.eye(columns.stop - columns.start)[x[:, columns].argmax(1)]
            elif self.discrete[columns][0]:
                x[:, columns.start] = [
                    self._to_unit(distribution, self._from_unit(distribution, v))
                    for v in x[:, columns.start]
                ]
        return np.where(self.active_mask(x), x, INACTIVE)

    def active_mask(self, x: Array) -> NDArray[np.bool_]:
        """Mask `(n, d)` of the coordinates that mean something where the points' choices are as they are."""
        mask, known = np.ones(x.shape, dtype=bool), dict[str, NDArray[np.bool_]]()

        def count(name: str) -> NDArray[np.bool_]:
            if name not in known:
                known[name] = np.ones(len(x), dtype=bool)
                for parent, values in self.conditions.get(name, ()):
                    known[name] = known[name] & count(parent) & self._has(x, parent, values)
            return known[name]

        for name in self.conditions:
            mask[:, self.columns[name]] = count(name)[:, None]
        return mask

    def _has(self, x: Array, name: str, values: Sequence[Any]) -> NDArray[np.bool_]:
        """Mask `(n,)` of the points whose parameter has one of the values."""
        distribution, columns = self.space[name], self.columns[name]
        if isinstance(distribution, CategoricalDistribution):
            return np.asarray(
                x[:, [columns.start + _place(distribution, value) for value in values]].sum(1) > 0
            )
        return np.isin(
            [self._from_unit(distribution, float(unit)) for unit in x[:, columns.start]],
            list(values),
        )

    def neighbours(self, x: Array, rng: np.random.Generator, most: int = 64) -> Array:
        """Points that differ from `x` `(d,)` in one discrete parameter: another choice, or a step up or down."""
        others = []
        for name, distribution in self.space.items():
            columns = self.columns[name]
            if not self.discrete[columns][0]:
                continue
            if isinstance(distribution, CategoricalDistribution):
                values = [
                    row
                    for row in np.eye(columns.stop - columns.start)
                    if not np.array_equal(row, x[columns])
                ]
            else:
                values = [np.array([v]) for v in self._steps(distribution, float(x[columns.start]))]
            for value in values:
                other = x.copy()
                other[columns] = value
                others.append(other)
        others = self._awake(x, others)
        if len(others) > most:
            others = [others[i] for i in rng.choice(len(others), most, replace=False)]
        settled = self.project(np.asarray(others).reshape(-1, self.d))
        return np.asarray(settled[~(settled == x).all(1)])

    def _awake(self, x: Array, others: list[Array]) -> list[Array]:
        """`others`, each once for every value of a choice that counts in it and did not in `x`: at rest it would always be the first."""
        for columns in self.discrete_columns:
            width = columns.stop - columns.start
            if width > 1 and others and (x[columns] == INACTIVE).all():
                counting = self.active_mask(np.asarray(others))[:, columns.start]
                rows: list[list[Array]] = [
                    list(np.eye(width)) if awake else [x[columns]] for awake in counting
                ]
                others = [
                    np.concatenate([other[: columns.start], row, other[columns.stop :]])
                    for other, several in zip(others, rows, strict=True)
                    for row in several
                ]
        return others

    def _steps(self, distribution: Any, unit: float) -> list[float]:
        step, value = distribution.step or 1, self._from_unit(distribution, unit)
        return [
            self._to_unit(distribution, v)
            for v in (value - step, value + step)
            if distribution.low <= v <= distribution.high
        ]

    def _to_unit(self, distribution: Any, value: float) -> float:
        low, high = distribution.low, distribution.high
        if distribution.log:  # of 0 math raises, where NumPy would go on with infinity
            low, high, value = math.log(low), math.log(high), math.log(value)
        return float((value - low) / (high - low)) if high > low else 0.5

    def _from_unit(self, distribution: Any, unit: float) -> float:
        low, high = distribution.low, distribution.high
        value = low + unit * (high - low)
        if distribution.log:
            value = float(np.exp(np.log(low) + unit * (np.log(high) - np.log(low))))
        if distribution.step is not None:
            value = low + round((value - low) / distribution.step) * distribution.step
        value = min(max(value, low), high)
        return round(value) if isinstance(distribution, IntDistribution) else float(value)


def _place(distribution: BaseDistribution, value: Any) -> int:
    """Number of a choice, by Optuna's rule of which are the same: NaN is itself, and a list can be one. An integer is its own."""
    return int(distribution.to_internal_repr(value))


def infer_conditions(
    points: Sequence[Mapping[str, Any]], space: Mapping[str, BaseDistribution]
) -> Conditions:
    """What finished define-by-run trials show: a parameter that they had exactly under some values of another counts under these.

    Conditions of conditions are found one by one: a parent counts only if some point had it and yet lacked the parameter, and
    so none can be its own ancestor.
    """
    found: dict[str, list[tuple[str, Sequence[Any]]]] = {}
    parents = sorted(
        (name for name in space if _may_be_parent(space[name])),
        key=lambda name: isinstance(space[name], IntDistribution),
    )
    for name in space:
        having = [point for point in points if name in point]
        lacking = [point for point in points if name not in point]
        for parent in parents if having and lacking else ():
            if parent != name and (values := _under(parent, space[parent], having, lacking)):
                found[name] = [(parent, values)]
                break
    return found


def _may_be_parent(distribution: BaseDistribution) -> bool:
    few = (
        isinstance(distribution, IntDistribution)
        and distribution.high - distribution.low < _MOST_STEPS
    )
    return few or isinstance(distribution, CategoricalDistribution)


def _under(
    parent: str,
    distribution: Any,
    having: Sequence[Mapping[str, Any]],
    lacking: Sequence[Mapping[str, Any]],
) -> list[Any]:
    """The parent's values that all `having` show and none of `lacking`, an integer's without a gap; none where they do not tell."""
    others = [point[parent] for point in lacking if parent in point]
    if not others or not all(parent in point for point in having):
        return []
    values = {_place(distribution, value): value for value in (point[parent] for point in having)}
    if isinstance(distribution, IntDistribution):
        values = {value: value for value in range(min(values), max(values) + 1)}
    return (
        []
        if any(_place(distribution, other) in values for other in others)
        else list(values.values())
    )
