"""Methods on the singular vectors of whole matrices (tsv, iso_c, iso_cts), and wudi.

They are for the matrices of layers. Norms, biases and embeddings take the mean of the deltas, as in
the programs that the papers published.

The papers have one lambda for all sources. Here each source has a weight besides, which multiplies
its delta first: the methods work on w_i tau_i. K is the number of sources with a weight other than
0; the others are left out.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from paretomerge.merging.block import Block, BlockMerger, Inputs
from paretomerge.merging.methods.common import (
    count_used,
    linear_combination,
    merge_in_pieces,
    weighted_deltas,
)
from paretomerge.merging.singular import singular_vectors


def tsv(inputs: Inputs) -> BlockMerger:
    """Task singular vectors: theta_0 + lambda U S V^T, from the top 1/K of each w_i tau_i.

    Gargiulo et al. 2025 arXiv 2412.00081, alg. 1. The singular vectors of the tasks stand side by
    side in U and V, which are made orthogonal by Procrustes, so that tasks do not interfere.
    """
    weights = inputs.per_source("weight")
    k = count_used(weights)

    def merged_delta(block: Block) -> Tensor:
        left, values, right = [], [], []
        for delta in weighted_deltas(block, weights):
            u, s, v = singular_vectors(delta)
            rank = max(1, len(s) // k)
            left.append(u[:, :rank])
            values.append(s[:rank])
            right.append(v[:rank])
        # Singular vectors of different tasks overlap, so that the sum would interfere.
        u = _orthogonalized(torch.cat(left, 1))
        v = _orthogonalized(torch.cat(right, 0))
        return (u * torch.cat(values)) @ v

    return _on_matrices(inputs, merged_delta)


def iso_c(inputs: Inputs) -> BlockMerger:
    """Isotropic merging: theta_0 + lambda mean(S) U V^T, where sum w_i tau_i = U S V^T.

    Marczak et al. 2025, arXiv 2502.04959, sec. 4 (common subspace). The spectrum becomes flat.
    """
    weights = inputs.per_source("weight")

    def merged_delta(block: Block) -> Tensor:
        u, s, v = singular_vectors(_sum_of_deltas(block, weights))
        return (u * s.mean()) @ v

    return _on_matrices(inputs, merged_delta)


def iso_cts(inputs: Inputs) -> BlockMerger:
    """Isotropic merging in common and task-specific subspaces.

    Marczak et al. 2025, arXiv 2502.04959, sec. 4.2. The top `common_fraction` of the directions of
    sum w_i tau_i; the others are each task's top directions outside the common ones.
    """
    weights = inputs.per_source("weight")
    k = count_used(weights)
    common_fraction = inputs.number("common_fraction")

    def merged_delta(block: Block) -> Tensor:
        u, s, v = singular_vectors(_sum_of_deltas(block, weights))
        rank = len(s)
        # The tasks share what is left of the rank; the common subspace gets the remainder.
        remaining = rank - int(common_fraction * rank)
        task_rank = round(remaining / k)
        task_rank = min(task_rank, rank // k)
        common_rank = rank - task_rank * k
        common = u[:, :common_rank]
        left = [common]
        values = [s[:common_rank]]
        right = [v[:common_rank]]
        # One w_i tau_i at a time: matrices are large.
        for delta in weighted_deltas(block, weights):
            # The part of tau_i outside the common subspace: tau_i - U U^T tau_i
            projection = common @ (common.T @ delta)
            specific = delta - projection
            u, s, v = singular_vectors(specific)
            left.append(u[:, :task_rank])
            values.append(s[:task_rank])
            right.append(v[:task_rank])
        flat_value = torch.cat(values).mean()
        u = _orthogonalized(torch.cat(left, 1))
        v = _orthogonalized(torch.cat(right, 0))
        return u @ v * flat_value

    return _on_matrices(inputs, merged_delta)


def wudi(inputs: Inputs) -> BlockMerger:
    """Minimise sum_i |(tau - tau_i) tau_i^T|^2 / |tau_i|^2, the interference with the tasks.

    Cheng et al. 2025 (Whoever started the interference should end it), arXiv 2503.08099, eq. 9.
    tau_i stands for w_i tau_i. Adam descends from sum tau_i, `steps` times at the learning rate
    `lr`. Its steps are as large for small deltas as for large ones, so that lambda does not stand
    for weights.
    """
    weights = inputs.per_source("weight")
    lr = inputs.number("lr")
    steps = inputs.integer("steps")

    def merged_delta(block: Block) -> Tensor:
        deltas = list(weighted_deltas(block, weights))
        gram_matrices = []
        for delta in deltas:
            # A tau_i of zero interferes with nothing.
            squared_norm = delta.square().sum().clamp_min(1e-30)
            gram = delta.T @ delta
            gram_matrices.append(gram / squared_norm)
        merged = torch.stack(deltas).sum(0)
        optimizer = torch.optim.Adam([merged], lr=lr)
        for _ in range(steps):
            # The gradient of each term is 2 (tau - tau_i) tau_i^T tau_i / |tau_i|^2.
            terms = []
            for delta, gram in zip(deltas, gram_matrices, strict=True):
                terms.append((merged - delta) @ gram)
            half_gradient = torch.stack(terms).sum(0)
            merged.grad = 2 * half_gradient
            optimizer.step()
        return merged

    return _on_matrices(inputs, merged_delta)


def _on_matrices(inputs: Inputs, merged_delta: BlockMerger) -> BlockMerger:
    """Merge theta_0 + lambda tau for a matrix of a layer; the mean of the deltas for other tensors.

    A stack of experts is merged matrix by matrix.
    """
    scale = inputs.number("lambda")
    weights = inputs.per_source("weight")
    k = count_used(weights)
    if k == 0:
        return linear_combination(weights, 1.0)
    if not inputs.is_matrix:
        # theta_0 + lambda / K sum w_i tau_i
        coefficients = [scale / k * weight for weight in weights]
        mean_weight = sum(weights) / k
        return linear_combination(coefficients, 1 - scale * mean_weight)

    def merge_matrix(matrix: Block) -> Tensor:
        delta = merged_delta(matrix)
        return delta.mul_(scale).add_(matrix.base)

    rows_of_matrix = inputs.shape[-2]
    return merge_in_pieces(inputs, rows_of_matrix, merge_matrix)


def _sum_of_deltas(block: Block, weights: Sequence[float]) -> Tensor:
    """The sum of w_i tau_i; at least one weight is not 0."""
    deltas = weighted_deltas(block, weights)
    total = next(deltas)
    for delta in deltas:
        total.add_(delta)
    return total


def _orthogonalized(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns or rows (Procrustes)."""
    u, _, v = singular_vectors(matrix)
    return u @ v
