"""Singular values where float32 fails, and the product of a rank."""

import numpy as np
import pytest
import torch

from paretomerge.merging.singular import factors_of_rank, singular_vectors


def test_singular_vectors_are_found_where_float32_fails(monkeypatch):
    """LAPACK can fail in float32 on the deltas of adapters; then float64 is taken."""
    exact = torch.linalg.svd

    def svd(matrix, full_matrices=True):
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("failed to converge")
        return exact(matrix, full_matrices=full_matrices)

    monkeypatch.setattr(torch.linalg, "svd", svd)
    torch.manual_seed(0)
    matrix = torch.randn(6, 4)
    u, s, v = singular_vectors(matrix)
    assert u.dtype == torch.float32
    torch.testing.assert_close((u * s) @ v, matrix)


@pytest.mark.parametrize("shape", [(6, 4), (4, 9)])
def test_the_product_of_a_rank_is_the_nearest(shape):
    """Its error is that of the singular values that are left out (Eckart and Young)."""
    torch.manual_seed(1)
    matrix = torch.randn(shape)
    values = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    for rank in range(5):
        left, right = factors_of_rank(*singular_vectors(matrix), rank)
        assert left.shape == (shape[0], rank) and right.shape == (rank, shape[1])
        error = (matrix - left @ right).square().sum().item()
        assert error == pytest.approx(np.square(values[rank:]).sum(), abs=1e-4)
        # Neither is tiny or huge.
        torch.testing.assert_close(left.norm(), right.norm())
