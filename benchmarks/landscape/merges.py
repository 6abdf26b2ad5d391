"""The data file: what was merged, and which items each merge got right. Readable with numpy alone, no pickle."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from paretomerge.errors import ConfigError, unknown_name

Array = NDArray[np.float64]
HERE = Path(__file__).resolve().parent
FILE = HERE / "merges.npz"
STARTS, DESIGN, PROBE = range(
    3
)  # known before; proposed by the design; where a surrogate saw its front


@dataclass(frozen=True)
class Space:
    """A choice of method and d numbers; the densities count only under some methods.

    numbers: name -> (low, high). dense: the methods that read a density.
    """

    methods: tuple[str, ...]
    numbers: Mapping[str, tuple[float, float]]
    dense: tuple[str, ...]

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        numbers = {name: FloatDistribution(low, high) for name, (low, high) in self.numbers.items()}
        return {"method": CategoricalDistribution(self.methods), **numbers}

    @property
    def conditions(self) -> dict[str, tuple[tuple[str, tuple[str, ...]], ...]]:
        """name -> (parent, values) pairs: the parameter counts only where `parent` has one of `values`."""
        return {
            name: (("method", self.dense),) for name in self.numbers if name.startswith("density")
        }

    @property
    def bounds(self) -> tuple[Array, Array]:
        """The lowest and the highest of each number, `(d,)` each."""
        low, high = np.array(list(self.numbers.values())).T
        return low, high

    @property
    def conditional(self) -> NDArray[np.bool_]:
        """Mask `(d,)` of the numbers that count only under the methods of `dense`."""
        return np.array([name in self.conditions for name in self.numbers])

    def reads_density(self, method: NDArray[Any]) -> NDArray[np.bool_]:
        """Mask `(n,)` of the points whose method, by index, reads densities."""
        return np.isin(method, [self.methods.index(m) for m in self.dense])

    def rows(self, points: Sequence[Mapping[str, Any]]) -> tuple[NDArray[np.uint8], Array]:
        """Parameters by name -> index of the method `(n,)` and numbers `(n, d)`, NaN where one does not count."""
        method = np.zeros(len(points), dtype=np.uint8)
        numbers = np.full((len(points), len(self.numbers)), np.nan)
        for i, point in enumerate(points):
            known = ("method", *self.numbers)
            for name in point:
                if name not in known:
                    raise ConfigError(unknown_name("parameter", name, known))
            chosen = point.get("method")
            if chosen not in self.methods:
                raise ConfigError(unknown_name("method", str(chosen), self.methods))
            method[i] = self.methods.index(chosen)
            for j, (name, (low, high)) in enumerate(self.numbers.items()):
                if name not in self.conditions or chosen in self.dense:
                    numbers[i, j] = _number(point, name, low, high)
        return method, numbers

    def point(self, method: int, numbers: Array) -> dict[str, Any]:
        """One row by name, without the parameters that do not count."""
        named = zip(self.numbers, numbers.tolist(), strict=True)
        return {"method": self.methods[int(method)]} | {
            name: value for name, value in named if not np.isnan(value)
        }


def _number(point: Mapping[str, Any], name: str, low: float, high: float) -> float:
    value = point.get(name)
    if not isinstance(value, (int, float, np.number)) or not low <= value <= high:
        raise ConfigError(f"{name}: expected a number from {low} to {high}, got {value!r}")
    return float(value)


@dataclass(frozen=True)
class Merges:
    """n merges over `space`, each scored on the same items of each of m tasks.

    stage: `(n,)`, why it was merged: STARTS, DESIGN or PROBE. method: `(n,)` index. numbers: `(n, d)` in the user's units,
    NaN where one does not count. correct: `(n, m, items)`. labels: names of the known starts, which are the first rows.
    made: how (design, seeds, versions, digests of the models).
    """

    space: Space
    tasks: tuple[str, ...]
    stage: NDArray[np.uint8]
    method: NDArray[np.uint8]
    numbers: Array
    correct: NDArray[np.bool_]
    labels: tuple[str, ...] = ()
    made: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.method)

    @property
    def items(self) -> int:
        """Items a task."""
        return self.correct.shape[2]

    @property
    def scores(self) -> Array:
        """Shares of right items `(n, m)`."""
        return np.asarray(self.correct.mean(2))

    @property
    def stderr(self) -> Array:
        """Standard errors of the scores `(n, m)`, as `Score.mean_of` has them."""
        return standard_error(self.scores, self.items)

    @property
    def starts(self) -> dict[str, dict[str, Any]]:
        """Known starts by name: each source alone, the soup, published defaults."""
        return {
            label: self.space.point(self.method[i], self.numbers[i])
            for i, label in enumerate(self.labels)
        }

    def extended(
        self, stage: int, method: NDArray[np.uint8], numbers: Array, correct: NDArray[np.bool_]
    ) -> "Merges":
        """These merges and more."""
        return replace(
            self,
            stage=np.concatenate([self.stage, np.full(len(method), stage, dtype=np.uint8)]),
            method=np.concatenate([self.method, method]),
            numbers=np.concatenate([self.numbers, numbers]),
            correct=np.concatenate([self.correct, correct]),
        )

    def save(self, file: Path = FILE) -> None:
        """Write the file, whole or not at all."""
        header = {
            "space": {
                "methods": self.space.methods,
                "numbers": dict(self.space.numbers),
                "dense": self.space.dense,
            },
            "tasks": self.tasks,
            "items": self.items,
            "labels": self.labels,
            "made": self.made,
        }
        bits = np.packbits(self.correct.reshape(len(self), -1), axis=1)
        partial = file.with_suffix(".partial.npz")
        columns = {
            "stage": self.stage,
            "method": self.method,
            "numbers": self.numbers,
            "items": bits,
        }
        np.savez_compressed(partial, header=np.array(json.dumps(header)), **columns)
        partial.replace(file)

    @classmethod
    def load(cls, file: Path = FILE) -> "Merges":
        with np.load(file) as data:
            header = json.loads(str(data["header"]))
            stage, method, numbers, bits = (
                data[name] for name in ("stage", "method", "numbers", "items")
            )
        tasks, items, space = tuple(header["tasks"]), header["items"], header["space"]
        correct = (
            np.unpackbits(bits, axis=1, count=len(tasks) * items)
            .reshape(-1, len(tasks), items)
            .astype(bool)
        )
        bounds = {name: (low, high) for name, (low, high) in space["numbers"].items()}
        built = Space(tuple(space["methods"]), bounds, tuple(space["dense"]))
        return cls(
            built, tasks, stage, method, numbers, correct, tuple(header["labels"]), header["made"]
        )


def standard_error(scores: Array, items: int) -> Array:
    """Of the mean of `items` rights and wrongs whose mean is `scores`: sqrt(p (1 - p) / (items - 1))."""
    return np.sqrt(scores * (1 - scores) / (items - 1))
