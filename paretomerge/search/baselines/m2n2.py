"""M2N2 (Abrantes, Lange & Tang 2025, "Competition and attraction improve model fusion", arXiv 2508.16204), in the space
of parameters.

Every example is a resource of limited capacity, shared among the members of the archive that solve it: who solves what
few others solve is fit, so the archive keeps its diversity without a measure of distance. A mate is chosen for being
strong where the first parent is weak. The child mixes them in one ratio up to a split point and in the opposite one
after it. There the split runs along the model's tensors; here along the parameters in their order. Mixing is along the
line, not the sphere: the sphere has a meaning for weights, not for coefficients.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from paretomerge.errors import ConfigError
from paretomerge.search.options import check_options
from paretomerge.search.point_sampler import Archive

Array = NDArray[np.float64]
_CHILDREN = 8  # the first that is new is taken
_EPSILON = 1e-9


@dataclass(frozen=True)
class M2N2:
    """members: how many the archive holds; the least fit leaves when one more comes.
    mutation: standard deviation of the noise on a number, as a share of its bounds; mutated: how likely each is mutated.

    Outcomes per example are read from the trials' user attribute `scores`. An objective whose examples nobody kept (a
    function of your own, sparsity) counts as one example, its values scaled to [0, 1]: the sampler then still works, with
    less to tell members apart by.
    """

    members: int = 15
    mutation: float = 0.15
    mutated: float = 0.3

    def __post_init__(self) -> None:
        check_options("m2n2", self)
        if self.members < 2 or self.mutation < 0 or not 0 <= self.mutated <= 1:
            got = f"{self.members}, {self.mutation} and {self.mutated}"
            raise ConfigError(
                f"m2n2: expected members >= 2, mutation >= 0 and mutated in [0, 1], got {got}"
            )

    def propose(self, archive: Archive, rng: np.random.Generator) -> Array:
        """Children `(k, d)` of pairs of members."""
        if len(archive.usable) < 2:
            return np.zeros((0, archive.encoding.d))
        outcomes, capacity = resources(archive)
        kept = survivors(outcomes, capacity, self.members)
        x = archive.x[archive.usable[kept]]
        fit = fitness(outcomes[kept], capacity)
        children = []
        for _ in range(_CHILDREN):
            first = _drawn(fit, rng)
            second = _drawn(attraction(outcomes[kept], capacity, first), rng)
            children.append(self._child(archive, x[first], x[second], rng))
        return np.stack(children)

    def _child(self, archive: Archive, a: Array, b: Array, rng: np.random.Generator) -> Array:
        """Split-point crossover (sec. 3.1), then mutation of some of the parameters."""
        parameters = len(archive.widths)
        ratio, split = rng.random(), rng.integers(parameters + 1)
        share = np.repeat(np.where(np.arange(parameters) < split, ratio, 1 - ratio), archive.widths)
        moved = np.repeat(rng.random(parameters) < self.mutated, archive.widths)
        return (
            share * a
            + (1 - share) * b
            + moved * self.mutation * rng.standard_normal(archive.encoding.d)
        )


def resources(archive: Archive) -> tuple[Array, Array]:
    """Outcomes `(n, examples)` in [0, 1] of the usable trials, and the capacity `(examples,)` of each example.

    The examples of one objective have a capacity of 1 together, so that objectives count alike however many they have.
    """
    kept = [archive.observations.example_scores[i] for i in archive.usable]
    y = archive.y[archive.usable]
    outcomes, capacity = [], []
    for k in range(y.shape[1]):
        column = [items[k] for items in kept]
        table = _table(column, y[:, k])
        outcomes.append(table)
        capacity.append(np.full(table.shape[1], 1 / table.shape[1]))
    return np.concatenate(outcomes, axis=1), np.concatenate(capacity)


def _table(column: list[Array | None], y: Array) -> Array:
    """One objective's outcomes `(n, examples)`, more is better; its values as one example where the examples are not known.

    A trial alone that lacks them, for it was left before all were asked, has in each what its value lets one expect.
    """
    known = np.array([row is not None and len(row) > 0 for row in column], dtype=bool)
    rows = [row for row, there in zip(column, known, strict=True) if there and row is not None]
    if len({len(row) for row in rows}) != 1 or not np.isfinite(rows).all():
        return _scaled(y[:, None])
    table = np.stack(rows)
    told, mean = y[known] - y[known].mean(), table.mean(1)
    slope = float(told @ mean) / max(float(told @ told), _EPSILON)
    everyone = np.repeat(
        (mean.mean() + slope * (y - y[known].mean()))[:, None], table.shape[1], axis=1
    ).clip(table.min(), table.max())
    everyone[known] = table
    return _scaled(-everyone if slope < 0 else everyone)  # an error count: the fewer the better


def _scaled(table: Array) -> Array:
    low, high = table.min(), table.max()
    return (table - low) / (high - low) if high > low else np.ones_like(table)


def fitness(outcomes: Array, capacity: Array) -> Array:
    """`(n,)`: what each gets of every example when all share it by their outcomes (Abrantes et al. 2025, sec. 3.2)."""
    return np.asarray((outcomes * capacity / (outcomes.sum(0) + _EPSILON)).sum(1))


def attraction(outcomes: Array, capacity: Array, first: int) -> Array:
    """`(n,)`: how much better each is than `first`, on examples that few solve above all (sec. 3.3)."""
    gain = np.maximum(outcomes - outcomes[first], 0)
    gain = (gain * capacity / (outcomes.sum(0) + _EPSILON)).sum(1)
    if not gain.sum() > 0:  # nobody is better anywhere
        gain = np.ones(len(outcomes))
    gain[first] = 0
    return np.asarray(gain)


def survivors(outcomes: Array, capacity: Array, members: int) -> list[int]:
    """The archive after all n came in their order, the least fit leaving each time."""
    kept: list[int] = []
    for index in range(len(outcomes)):
        kept.append(index)
        if len(kept) > members:
            del kept[int(fitness(outcomes[kept], capacity).argmin())]
    return kept


def _drawn(weights: Array, rng: np.random.Generator) -> int:
    total = weights.sum()
    return int(rng.choice(len(weights), p=weights / total if total > 0 else None))
