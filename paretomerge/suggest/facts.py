"""Facts about the deltas of fine-tunes that say which merges may work."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from paretomerge.suggest.sample import Directions, SampledMatrix
from paretomerge.types import Array

_ENERGY = 0.9


@dataclass(frozen=True)
class DeltaFacts:
    """What the deltas tau_i of K sources are like, over a sample of matrices.

    Attributes:
        names: Names of the sources.
        relative_norms: `(K,)`, norm of tau_i over that of the base.
        unchanged: `(K,)`, the share of entries that are exactly those of the base.
        cosine: `(K, K)`, cosines of the tau_i; 0 for a source that equals the base.
        sign_conflict: `(K, K)`, of all products of two entries the share, by magnitude, that is
            negative: 0 for equal deltas, 0.5 for unrelated ones, 1 for opposite ones. 0 where two
            sources change no entry in common.
        directions: `(K,)`, singular directions that hold 90 % of a matrix's energy, the mean over
            the matrices.
        share_of_rank: `(K,)`, the same as a share of the rank of a matrix.
    """

    names: tuple[str, ...]
    relative_norms: Array
    unchanged: Array
    cosine: Array
    sign_conflict: Array
    directions: Array
    share_of_rank: Array


class FactSums:
    """Sums over matrices, from which the facts follow.

    Args:
        names: Names of the K sources.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        k = len(names)
        self._names = names
        self._base_energy = 0.0
        self._entries = 0
        self._zeros = np.zeros(k)
        self._products = np.zeros((k, k))
        self._magnitudes = np.zeros((k, k))
        self._directions: list[list[float]] = [[] for _ in names]
        self._shares: list[list[float]] = [[] for _ in names]

    def add(self, matrix: SampledMatrix, directions: Mapping[str, Directions]) -> None:
        """Add one matrix.

        Args:
            matrix: The matrix.
            directions: Source -> its leading directions.
        """
        rows = [matrix.deltas[name].double().reshape(-1) for name in self._names]
        deltas = torch.stack(rows)
        self._base_energy += float(matrix.base.double().square().sum())
        self._entries += deltas.shape[1]
        self._zeros += (deltas == 0).sum(1).numpy()
        self._products += (deltas @ deltas.T).numpy()
        magnitudes = deltas.abs()
        self._magnitudes += (magnitudes @ magnitudes.T).numpy()
        rank = min(matrix.base.shape)
        for i, name in enumerate(self._names):
            found = directions[name]
            if found.energy > 0:
                count = _directions_with(found, _ENERGY)
                self._directions[i].append(count)
                self._shares[i].append(count / rank)

    def facts(self) -> DeltaFacts:
        """The facts over all matrices so far."""
        energies = np.diag(self._products)
        lengths = np.sqrt(energies)
        cosine = _ratio(self._products, np.outer(lengths, lengths))
        # sum |x y| = sum of the positive products - sum of the negative ones
        conflict = _ratio(self._magnitudes - self._products, 2 * self._magnitudes)
        return DeltaFacts(
            names=self._names,
            relative_norms=np.sqrt(energies / self._base_energy),
            unchanged=self._zeros / self._entries,
            cosine=cosine.clip(-1, 1),
            sign_conflict=conflict.clip(0, 1),
            directions=_means(self._directions),
            share_of_rank=_means(self._shares),
        )


def _directions_with(directions: Directions, share: float) -> int:
    """The number of directions that hold a share of the energy; all that are known if none do."""
    energies: Tensor = directions.strengths.double().square().cumsum(0)
    enough = energies >= share * directions.energy
    if not bool(enough.any()):
        return len(energies)
    return int(enough.to(torch.int64).argmax()) + 1


def _means(values: list[list[float]]) -> Array:
    return np.asarray([float(np.mean(row)) if row else 0.0 for row in values])


def _ratio(numerator: Array, divisor: Array) -> Array:
    """The ratio, or 0 where the divisor is 0."""
    out = np.zeros_like(numerator)
    return np.asarray(np.divide(numerator, divisor, out=out, where=divisor > 0))
