"""Between Optuna's parameters and the unit cube `(n, d)` that the surrogate sees."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from paretomerge.errors import ConfigError

Array = NDArray[np.float64]
Conditions = Mapping[str, tuple[str, Sequence[Any]]]
_INACTIVE = 1.0  # where a parameter that does not count is put, so that points that mean the same are the same


class Encoding:
    """Numbers are scaled to [0, 1]; a choice among C becomes C coordinates, one of them 1 (one-hot).

    conditions: name -> (parent, values): the parameter counts only where the categorical `parent` has one of `values`.
    """

    def __init__(self, space: Mapping[str, BaseDistribution], conditions: Conditions | None = None) -> None:
        self.space = dict(space)
        self.conditions = {k: v for k, v in (conditions or {}).items() if k in self.space and v[0] in self.space}
        self.columns: dict[str, slice] = {}
        self.d = 0
        for name, distribution in self.space.items():
            if not isinstance(distribution, (CategoricalDistribution, FloatDistribution, IntDistribution)):
                raise ConfigError(f"{name}: expected a float, int or categorical parameter, got {distribution}")
            width = len(distribution.choices) if isinstance(distribution, CategoricalDistribution) else 1
            self.columns[name] = slice(self.d, self.d + width)
            self.d += width

    @property
    def discrete(self) -> NDArray[np.bool_]:
        """Mask `(d,)` of the coordinates that gradients must not move."""
        mask = np.zeros(self.d, dtype=bool)
        for name, distribution in self.space.items():
            mask[self.columns[name]] = not isinstance(distribution, FloatDistribution) or distribution.step is not None
        return mask

    def encode(self, params: Sequence[Mapping[str, Any]]) -> Array:
        """`(n, d)`, inactive parameters at their one place."""
        x = np.zeros((len(params), self.d))
        for row, point in zip(x, params, strict=True):
            for name, distribution in self.space.items():
                if isinstance(distribution, CategoricalDistribution):
                    row[self.columns[name]][distribution.choices.index(point[name])] = 1.0
                else:
                    row[self.columns[name]] = self._to_unit(distribution, point[name])
        return self.settle(x)

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

    def settle(self, x: Array) -> Array:
        """`(n, d)` with choices made one-hot, steps rounded, and inactive parameters moved to their one place."""
        x = np.clip(x, 0.0, 1.0)
        for name, distribution in self.space.items():
            columns = self.columns[name]
            if isinstance(distribution, CategoricalDistribution):
                x[:, columns] = np.eye(columns.stop - columns.start)[x[:, columns].argmax(1)]
            elif self.discrete[columns][0]:
                x[:, columns.start] = [self._to_unit(distribution, self._from_unit(distribution, v)) for v in x[:, columns.start]]
        for name, (parent, values) in self.conditions.items():
            choices = self.space[parent].choices  # type: ignore[attr-defined]
            active = np.isin(x[:, self.columns[parent]].argmax(1), [choices.index(v) for v in values])
            x[~active, self.columns[name]] = _INACTIVE
        return x

    def _to_unit(self, distribution: Any, value: float) -> float:
        low, high = distribution.low, distribution.high
        if distribution.log:
            low, high, value = np.log(low), np.log(high), np.log(value)
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
