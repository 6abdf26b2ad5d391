"""Singular value decompositions that do not fail, and the factors that a cut of them gives."""

import torch
from torch import Tensor


def singular_vectors(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Decompose a matrix (rows, columns) = U diag(S) V; r is the smaller of both sizes.

    Args:
        matrix: The matrix.

    Returns:
        U (rows, r), S (r,) with the largest first, V (r, columns), in the dtype of the matrix.
    """
    try:
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        # LAPACK's divide and conquer can fail in float32 on many equal singular values, as deltas
        # of adapters have them.
        u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u.to(matrix.dtype), s.to(matrix.dtype), v.to(matrix.dtype)


def factors_of_rank(
    u: Tensor, s: Tensor, v: Tensor, rank: int
) -> tuple[Tensor, Tensor]:
    """The best approximation of a rank, as a product of two matrices (Eckart and Young 1936).

    Args:
        u: (rows, r), left singular vectors.
        s: (r,), singular values, the largest first.
        v: (r, columns), right singular vectors.
        rank: The rank, at most r.

    Returns:
        (rows, rank) and (rank, columns).
    """
    # Both factors get the root, so that neither is tiny or huge in a narrow dtype.
    roots = s[:rank].sqrt()
    left = u[:, :rank] * roots
    right = roots[:, None] * v[:rank]
    return left, right
