"""The evaluated merges behind the landscape: parameters, and every test example right or wrong.

`data/merges.npz` is read with NumPy alone and holds no pickle. Its arrays:

- `header`: JSON; the space, the tasks, digests of the models and of the test examples, versions.
- `stage` `(n,)`: why it was merged: `START`, `DESIGN` or `PROBE`.
- `method` `(n,)`: index of the merge method.
- `numbers` `(n, d)`: weights and densities in the user's units; NaN where one is inactive.
- `items`: bits, `numpy.unpackbits(items, axis=1, count=m * n_examples)`, task by task.

`benchmarks/landscape` makes the file.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self, TypedDict

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
)

from paretomerge.errors import ConfigError, unknown_name
from paretomerge.types import Array, Conditions, Params, ParamValue

MERGES_FILE = Path(__file__).parent / "data" / "merges.npz"

START, DESIGN, PROBE = range(3)
"""Stages: a baseline recipe; a proposal of the seeded design; a point of a surrogate's front."""

MethodIndices = NDArray[np.uint8]
"""Per point the index of its method in `MergeSpace.methods`, `(n,)`."""


@dataclass(frozen=True)
class MergeSpace:
    """A choice of merge method and d numbers, some of them densities.

    Attributes:
        methods: names of the merge methods.
        numbers: name of a weight or density -> (low, high).
        density_methods: methods that read densities. Under the others, densities are inactive.
    """

    methods: tuple[str, ...]
    numbers: Mapping[str, tuple[float, float]]
    density_methods: tuple[str, ...]

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """The space in Optuna's terms, `method` first."""
        space: dict[str, BaseDistribution] = {}
        # Samplers suggest in this order, and a density is active under some methods only.
        space["method"] = CategoricalDistribution(self.methods)
        for name, (low, high) in self.numbers.items():
            space[name] = FloatDistribution(low, high)
        return space

    @property
    def conditions(self) -> Conditions:
        """Parameter -> (parent, values) pairs: it is active where the parent has such a value."""
        condition = ("method", self.density_methods)
        densities = [name for name in self.numbers if name.startswith("density")]
        return dict.fromkeys(densities, (condition,))

    @property
    def bounds(self) -> tuple[Array, Array]:
        """The lowest and the highest value of each number, `(d,)` each."""
        pairs = list(self.numbers.values())
        low, high = np.array(pairs).T
        return low, high

    @property
    def is_density(self) -> NDArray[np.bool_]:
        """Mask `(d,)` of the densities."""
        conditions = self.conditions
        return np.array([name in conditions for name in self.numbers])

    def rows(self, points: Sequence[Params]) -> tuple[MethodIndices, Array]:
        """Parameter sets as arrays.

        Args:
            points: n parameter sets. Values of inactive parameters are ignored.

        Returns:
            Indices of the methods `(n,)`; numbers `(n, d)`, NaN where one is inactive.

        Raises:
            ConfigError: a parameter is unknown, missing or out of bounds.
        """
        shape = (len(points), len(self.numbers))
        method = np.zeros(shape[0], dtype=np.uint8)
        # NaN marks inactive numbers, because 0 is an ordinary weight.
        numbers = np.full(shape, np.nan)
        for i, point in enumerate(points):
            method[i] = self._method_index(point)
            numbers[i] = self._numbers(point)
        return method, numbers

    def point(self, method: int, numbers: Array) -> dict[str, ParamValue]:
        """One row as parameters, without the inactive ones.

        Args:
            method: index of the method.
            numbers: `(d,)`, NaN where one is inactive.

        Returns:
            Parameter name -> value.
        """
        point: dict[str, ParamValue] = {}
        point["method"] = self.methods[int(method)]
        # Plain floats: Optuna stores no NumPy numbers.
        values = numbers.tolist()
        for name, value in zip(self.numbers, values, strict=True):
            if not np.isnan(value):
                point[name] = value
        return point

    def _method_index(self, point: Params) -> int:
        # Names come before values: a misspelt name would be reported as a missing number.
        parameters = ("method", *self.numbers)
        for name in point:
            if name not in parameters:
                raise ConfigError(unknown_name("parameter", name, parameters))
        method = point.get("method")
        if method not in self.methods:
            raise ConfigError(unknown_name("method", str(method), self.methods))
        return self.methods.index(str(method))

    def _numbers(self, point: Params) -> Array:
        conditions = self.conditions
        reads_densities = point["method"] in self.density_methods
        n_numbers = len(self.numbers)
        row = np.full(n_numbers, np.nan)
        for j, (name, (low, high)) in enumerate(self.numbers.items()):
            if name not in conditions or reads_densities:
                row[j] = _number(point, name, low, high)
        return row


class _SpaceHeader(TypedDict):
    """The space in a file's header."""

    # `dense` holds the density methods. The shipped file has this key, so it cannot be renamed.
    methods: list[str]
    numbers: dict[str, list[float]]
    dense: list[str]


def _number(point: Params, name: str, low: float, high: float) -> float:
    value = point.get(name)
    # NaN fails both comparisons, so it is rejected as well.
    if isinstance(value, int | float | np.number) and low <= value <= high:
        return float(value)
    raise ConfigError(f"{name}: expected a number from {low} to {high}, got {value!r}")


@dataclass(frozen=True)
class ScoredMerges:
    """n merges of `space`, each scored on the same test examples of m tasks.

    Attributes:
        space: what the parameters are.
        tasks: names of the m tasks.
        stage: `(n,)`, `START`, `DESIGN` or `PROBE`.
        method: `(n,)`, index of the merge method.
        numbers: `(n, d)`, in the user's units; NaN where one is inactive.
        correct: `(n, m, n_examples)`, whether the merge answers the example correctly.
        labels: names of the baseline recipes, which are the first rows.
        provenance: design, seeds, versions, digests of the models and of the examples.
    """

    space: MergeSpace
    tasks: tuple[str, ...]
    stage: NDArray[np.uint8]
    method: MethodIndices
    numbers: Array
    correct: NDArray[np.bool_]
    labels: tuple[str, ...] = ()
    provenance: Mapping[str, object] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.method)

    @property
    def n_examples(self) -> int:
        """Test examples per task."""
        return int(self.correct.shape[2])

    @property
    def scores(self) -> Array:
        """Accuracies `(n, m)`."""
        return np.asarray(self.correct.mean(2))

    @property
    def stderr(self) -> Array:
        """Standard errors of the accuracies `(n, m)`."""
        return standard_error(self.scores, self.n_examples)

    @property
    def baselines(self) -> dict[str, dict[str, ParamValue]]:
        """Baseline recipes by name: each model alone, uniform average, published defaults."""
        starts = {}
        for i, label in enumerate(self.labels):
            method = self.method[i]
            numbers = self.numbers[i]
            starts[label] = self.space.point(method, numbers)
        return starts

    @classmethod
    def load(cls, file: Path = MERGES_FILE) -> Self:
        """Read a file of merges.

        Args:
            file: see this module's docstring for its format.

        Returns:
            The merges of the file.
        """
        # No `allow_pickle`: a file cannot run code.
        with np.load(file) as data:
            text = str(data["header"])
            arrays = {name: data[name] for name in data.files}
        header = json.loads(text)
        tasks = tuple(header["tasks"])
        n_tasks = len(tasks)
        n_examples = header["items"]
        # Rows are padded to whole bytes; without `count` the padding would be read as examples.
        n_bits = n_tasks * n_examples
        bits = np.unpackbits(arrays["items"], axis=1, count=n_bits)
        correct = bits.reshape(-1, n_tasks, n_examples)
        return cls(
            space=_space_of(header["space"]),
            tasks=tasks,
            stage=arrays["stage"],
            method=arrays["method"],
            numbers=arrays["numbers"],
            correct=correct.astype(bool),
            labels=tuple(header["labels"]),
            provenance=header["made"],
        )


def _space_of(header: _SpaceHeader) -> MergeSpace:
    """The space that a file's header describes."""
    bounds = {}
    for name, (low, high) in header["numbers"].items():
        bounds[name] = (low, high)
    return MergeSpace(
        methods=tuple(header["methods"]),
        numbers=bounds,
        density_methods=tuple(header["dense"]),
    )


def standard_error(accuracy: Array, n_examples: int) -> Array:
    """Standard error of a mean of zeros and ones, as `Score.mean_of` has it.

    Args:
        accuracy: the mean p, of any shape.
        n_examples: number n of zeros and ones.

    Returns:
        sqrt(p (1 - p) / (n - 1)), of the same shape.
    """
    # s^2 / n, with the unbiased variance s^2 = n p (1 - p) / (n - 1) of zeros and ones.
    variance = accuracy * (1 - accuracy)
    return np.sqrt(variance / (n_examples - 1))
