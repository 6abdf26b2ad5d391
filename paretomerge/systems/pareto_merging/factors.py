"""The deltas of one matrix in K models, as two common factors and one small core per model.

D_k is about A G_k B^T for all k at once, with A (c, r), B (d, r) and G_k (r, r): the structure of
Pareto Merging (Chen & Kwok 2024, arXiv 2408.12105). A holds the top left singular vectors of
[D_1 ... D_K] side by side, B the top right ones of the D_k below each other, and G_k = A^T D_k B is
then the best core for each k (least squares with orthonormal A and B). This is the truncated
higher-order SVD (De Lathauwer et al. 2000, A Multilinear Singular Value Decomposition).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Up to this size all singular vectors come from an eigendecomposition, a few seconds on a core.
_LARGEST_EXACT = 2048
# Halko et al. 2011 (arXiv 0909.4061), algorithm 4.4: more directions than are wanted, and several
# rounds, which make the error of the subspace negligible beside the truncation.
_MORE_DIRECTIONS = 16
_ROUNDS = 8
# A direction with a smaller share of the energy is rounding: LoRA deltas have few directions.
_LEAST_SHARE = 1e-12
_FIRST_RANK = 64  # where the search for a rank with enough energy begins


@dataclass(frozen=True)
class Factors:
    """K deltas of one matrix, about A G_k B^T.

    Attributes:
        a: (c, r_a), where r_a is the rank, or fewer where fewer directions have any energy.
        b: (d, r_b).
        cores: (K, r_a, r_b), the G_k.
    """

    a: Tensor
    b: Tensor
    cores: Tensor

    def update(self, gamma: Tensor) -> Tensor:
        """A (sum_k gamma_k G_k) B^T.

        Args:
            gamma: (K,), a point of the simplex.

        Returns:
            (c, d).
        """
        core = torch.tensordot(gamma, self.cores, dims=1)
        # The narrow product first: r (c r + c d) multiplications in place of c d d.
        update: Tensor = (self.a @ core) @ self.b.T
        return update

    def elements(self) -> int:
        """The number of stored elements."""
        return self.a.numel() + self.b.numel() + self.cores.numel()

    def cut(self, rank: int) -> "Factors":
        """The factors at a smaller rank."""
        return Factors(self.a[:, :rank], self.b[:, :rank], self.cores[:, :rank, :rank])


def factorise(
    deltas: Tensor, rank: int | None = None, energy: float | None = None
) -> Factors:
    """Factorise the deltas of one matrix.

    Args:
        deltas: (K, c, d), the D_k.
        rank: The rank r.
        energy: In place of the rank: the share of sum_k |D_k|_F^2 to keep, above 0 and up to 1. The
            smallest rank that keeps it is taken.

    Returns:
        The factors in float64, on the device of the deltas.
    """
    if (rank is None) == (energy is None):
        raise AssertionError("give a rank or a share of the energy")
    largest = max(deltas.shape[1:])
    count = rank or _FIRST_RANK
    while True:
        a = _top_directions(deltas, count)
        b = _top_directions(deltas.transpose(1, 2), count)
        factors = Factors(a, b, _cores(deltas, a, b))
        if energy is None:
            return factors
        enough = _rank_with_energy(
            factors.cores, energy * float(energies(deltas).sum())
        )
        if enough is not None:
            return factors.cut(enough)
        if count >= largest:
            # All directions are in, and only rounding is missing.
            return factors
        count *= 2


def energies(deltas: Tensor) -> Tensor:
    """(K,) squared Frobenius norms of deltas or cores (K, ..., ...), in float64."""
    squares = [
        torch.linalg.vector_norm(delta, dtype=torch.float64) ** 2 for delta in deltas
    ]
    return torch.stack(squares)


def _cores(deltas: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The best cores (K, r_a, r_b) for orthonormal A and B: G_k = A^T D_k B."""
    cores = []
    for delta in deltas:
        cores.append((a.T @ delta.double()) @ b)
    return torch.stack(cores)


def _top_directions(deltas: Tensor, count: int) -> Tensor:
    """Top left singular vectors (c, up to count) of deltas (K, c, d) side by side, in float64."""
    size = deltas.shape[1]
    if size <= _LARGEST_EXACT:
        identity = torch.eye(size, dtype=torch.float64, device=deltas.device)
        values, vectors = torch.linalg.eigh(_times_gram(deltas, identity))
    else:
        values, vectors = _subspace(deltas, min(count + _MORE_DIRECTIONS, size))
    # `eigh` sorts upwards.
    values, vectors = values.flip(0), vectors.flip(1)
    n_real = int((values > _LEAST_SHARE * values[0]).sum())
    top: Tensor = vectors[:, : min(count, n_real)]
    return top.contiguous()


def _subspace(deltas: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues (count,), upwards, and eigenvectors (c, count) of the Gram matrix."""
    generator = torch.Generator().manual_seed(0)
    size = (deltas.shape[1], count)
    start = torch.randn(size, dtype=torch.float64, generator=generator)
    basis = torch.linalg.qr(start.to(deltas.device))[0]
    for _ in range(_ROUNDS):
        basis = torch.linalg.qr(_times_gram(deltas, basis))[0]
    values, rotation = torch.linalg.eigh(basis.T @ _times_gram(deltas, basis))
    return values, basis @ rotation


def _times_gram(deltas: Tensor, right: Tensor) -> Tensor:
    """(sum_k D_k D_k^T) times a matrix, one delta in float64 at a time."""
    product = torch.zeros_like(right)
    for delta in deltas:
        wide = delta.double()
        product += wide @ (wide.T @ right)
    return product


def _rank_with_energy(cores: Tensor, wanted: float) -> int | None:
    """The smallest r whose leading r x r parts of the cores have an energy; None if none has."""
    squares = cores.square().sum(0)
    sums = squares.cumsum(0).cumsum(1)
    rows, columns = sums.shape
    for rank in range(1, max(rows, columns) + 1):
        kept = float(sums[min(rank, rows) - 1, min(rank, columns) - 1])
        if kept >= wanted:
            return rank
    return None
