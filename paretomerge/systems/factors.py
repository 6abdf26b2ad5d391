"""Low-rank factors of the change of a matrix, or of a stack of matrices, by singular values."""

from dataclasses import dataclass

import torch
from torch import Tensor

from paretomerge.checkpoint.operand import Operand, matrix_shape
from paretomerge.errors import ConfigError
from paretomerge.merging.singular import factors_of_rank, singular_vectors
from paretomerge.systems.peft_places import Kind


@dataclass(frozen=True)
class Cut:
    """How much of each change is kept: a rank, or a share of the energy.

    The energy of a matrix is its squared Frobenius norm, the sum of its squared singular values.

    Attributes:
        rank: The largest rank; None to go by the energy.
        energy: The share of each matrix's energy that is kept by the smallest rank that can, in
            (0, 1]; None to go by the rank.
    """

    rank: int | None = None
    energy: float | None = None

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.energy is None):
            raise ConfigError(
                "extract-lora: set either a rank (--rank 16) or a share of the energy "
                "(--energy 0.9)"
            )
        if self.energy is not None and not 0 < self.energy <= 1:
            raise ConfigError(
                f"energy: must be above 0 and at most 1, not {self.energy}"
            )

    def rank_of(self, values: Tensor) -> int:
        """The rank to keep.

        Args:
            values: All singular values of a matrix, the largest first, in float64.

        Returns:
            0 for a matrix of zeros.
        """
        n_used = int((values > 0).sum())
        if self.rank is not None:
            return min(self.rank, n_used)
        assert self.energy is not None
        kept = values.square().cumsum(0)
        if not n_used:
            return 0
        # The first rank whose share is enough. The last entry of `kept` is the whole.
        enough = kept >= self.energy * kept[-1]
        return int(enough.int().argmax()) + 1


@dataclass(frozen=True)
class Factors:
    """The factors of a change, or of a stack of changes.

    Attributes:
        a: (rank, columns); (experts x rank, columns) of a stack.
        b: (rows, rank); (rows, rank x experts) of a stack.
        rank: Rank of each matrix.
        kept: Energy of the product.
        total: Energy of the change.
    """

    a: Tensor
    b: Tensor
    rank: int
    kept: float
    total: float

    @property
    def transposed(self) -> "Factors":
        """The factors of the transpose."""
        return Factors(self.b.T, self.a.T, self.rank, self.kept, self.total)


def factor_change(
    base: Operand, merged: Operand, kind: Kind, cut: Cut, device: str
) -> Factors:
    """Factor the change of a parameter.

    Args:
        base: The parameter in the base.
        merged: The parameter in the merge.
        kind: How an adapter holds its change.
        cut: What is kept.
        device: Where to compute.
    """
    rows = base.shape[-2]
    n_matrices = matrix_shape(base.shape)[0] // rows if rows else 0
    parts = []
    for index in range(n_matrices):
        first, end = index * rows, (index + 1) * rows
        delta = merged.rows(first, end, device)
        delta.sub_(base.rows(first, end, device))
        parts.append(_factor_matrix(delta.T if kind.is_transposed else delta, cut))
    if len(parts) == 1 and not kind.is_stack:
        return parts[0]
    return _stacked(parts)


def _factor_matrix(delta: Tensor, cut: Cut) -> Factors:
    u, values, v = singular_vectors(delta)
    # In float64, since small values are summed after large ones.
    squares = values.double().square()
    rank = cut.rank_of(values.double())
    b, a = factors_of_rank(u, values, v, rank)
    return Factors(
        a=a,
        b=b,
        rank=rank,
        kept=squares[:rank].sum().item(),
        total=squares.sum().item(),
    )


def _stacked(parts: list[Factors]) -> Factors:
    """The factors of a stack in peft's order (`ParamWrapper`): all have the largest rank."""
    rank = max((part.rank for part in parts), default=0)
    all_a, all_b = [], []
    for part in parts:
        # Zeros behind the factors of lower rank add nothing.
        missing = rank - part.rank
        all_a.append(torch.nn.functional.pad(part.a, (0, 0, 0, missing)))
        all_b.append(torch.nn.functional.pad(part.b, (0, missing)))
    return Factors(
        a=torch.cat(all_a) if all_a else torch.empty(0, 0),
        # (rows, rank, experts): the experts are next to each other.
        b=torch.stack(all_b, 2).flatten(1) if all_b else torch.empty(0, 0),
        rank=rank,
        kept=sum(part.kept for part in parts),
        total=sum(part.total for part in parts),
    )
