"""Methods on the singular vectors of whole matrices (tsv, iso_c, iso_cts), and wudi.

They are for the matrices of layers. Norms, biases and embeddings take the mean of the deltas, as in
the programs that the papers published.
"""

import torch

from paretomerge.merging.block import Block, BlockMerger, Inputs
from paretomerge.merging.methods.common import linear_combination, merge_in_pieces


def tsv(inputs: Inputs) -> BlockMerger:
    """Task singular vectors: theta_0 + lambda U S V^T, from the top 1/K of each tau_i.

    Gargiulo et al. 2025 arXiv 2412.00081, alg. 1. The singular vectors of the tasks stand side by
    side in U and V, which are made orthogonal by Procrustes, so that tasks do not interfere.
    """
    k = len(inputs.sources)

    def merged_delta(block: Block) -> torch.Tensor:
        factors = [_svd(block.delta(i)) for i in range(k)]
        full_rank = len(factors[0][1])
        rank = max(1, full_rank // k)
        left = torch.cat([u[:, :rank] for u, _, _ in factors], 1)
        values = torch.cat([s[:rank] for _, s, _ in factors])
        right = torch.cat([v[:rank] for _, _, v in factors], 0)
        return (_orthogonalized(left) * values) @ _orthogonalized(right)

    return _on_matrices(inputs, merged_delta)


def iso_c(inputs: Inputs) -> BlockMerger:
    """Isotropic merging: theta_0 + lambda mean(S) U V^T, where sum tau_i = U S V^T.

    Marczak et al. 2025, arXiv 2502.04959, sec. 4 (common subspace). The spectrum becomes flat.
    """

    def merged_delta(block: Block) -> torch.Tensor:
        u, s, v = _svd(_sum_of_deltas(block))
        return (u * s.mean()) @ v

    return _on_matrices(inputs, merged_delta)


def iso_cts(inputs: Inputs) -> BlockMerger:
    """Isotropic merging in common and task-specific subspaces.

    Marczak et al. 2025, arXiv 2502.04959, sec. 4.2. The top `common_fraction` of the directions of
    sum tau_i; the others are each task's top directions outside the common ones.
    """
    k = len(inputs.sources)
    common_fraction = inputs.number("common_fraction")

    def merged_delta(block: Block) -> torch.Tensor:
        u, s, v = _svd(_sum_of_deltas(block))
        rank = len(s)
        task_rank = round((rank - int(common_fraction * rank)) / k)
        task_rank = min(task_rank, rank // k)
        common_rank = rank - task_rank * k
        common = u[:, :common_rank]
        left, values, right = [common], [s[:common_rank]], [v[:common_rank]]
        for i in range(k):
            delta = block.delta(i)
            outside_common = delta - common @ (common.T @ delta)
            task_u, task_s, task_v = _svd(outside_common)
            left.append(task_u[:, :task_rank])
            values.append(task_s[:task_rank])
            right.append(task_v[:task_rank])
        flat_value = torch.cat(values).mean()
        u, v = _orthogonalized(torch.cat(left, 1)), _orthogonalized(torch.cat(right, 0))
        return u @ v * flat_value

    return _on_matrices(inputs, merged_delta)


def wudi(inputs: Inputs) -> BlockMerger:
    """Minimise sum_i |(tau - tau_i) tau_i^T|^2 / |tau_i|^2, the interference with the tasks.

    Cheng et al. 2025 (Whoever started the interference should end it), arXiv 2503.08099, eq. 9.
    Adam descends from sum tau_i, `steps` times at the learning rate `lr`.
    """
    k = len(inputs.sources)
    lr, steps = inputs.number("lr"), inputs.integer("steps")

    def merged_delta(block: Block) -> torch.Tensor:
        deltas = [block.delta(i) for i in range(k)]
        gram_matrices = []
        for delta in deltas:
            squared_norm = delta.square().sum().clamp_min(1e-30)
            gram_matrices.append(delta.T @ delta / squared_norm)
        merged = torch.stack(deltas).sum(0)
        optimizer = torch.optim.Adam([merged], lr=lr)
        for _ in range(steps):
            # The gradient of each term is 2 (tau - tau_i) tau_i^T tau_i / |tau_i|^2.
            pairs = zip(deltas, gram_matrices, strict=True)
            terms = [(merged - delta) @ gram for delta, gram in pairs]
            merged.grad = 2 * torch.stack(terms).sum(0)
            optimizer.step()
        return merged

    return _on_matrices(inputs, merged_delta)


def _on_matrices(inputs: Inputs, merged_delta: BlockMerger) -> BlockMerger:
    """Merge theta_0 + lambda tau for a matrix of a layer; the mean of the deltas for other tensors.

    A stack of experts is merged matrix by matrix.
    """
    scale, k = inputs.number("lambda"), len(inputs.sources)
    if not inputs.is_matrix:
        return linear_combination([scale / k] * k, 1 - scale)

    def merge_matrix(matrix: Block) -> torch.Tensor:
        return merged_delta(matrix).mul_(scale).add_(matrix.base)

    return merge_in_pieces(inputs, inputs.shape[-2], merge_matrix)


def _sum_of_deltas(block: Block) -> torch.Tensor:
    total = block.delta(0)
    for i in range(1, len(block.inputs.sources)):
        total.add_(block.delta(i))
    return total


def _svd(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U (rows, r), S (r,), V^T (r, columns)."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return u, s, v


def _orthogonalized(matrix: torch.Tensor) -> torch.Tensor:
    """The nearest matrix with orthonormal columns or rows (Procrustes)."""
    u, _, v = _svd(matrix)
    return u @ v
