"""Methods on the singular vectors of whole matrices (tsv, iso_c, iso_cts), and WUDI, which fits one delta to all.

They are for the matrices of layers; norms, biases and embeddings take the mean of the deltas, as in the papers' programs.
"""

import torch

from paretomerge.merging.methods.averaging import combination
from paretomerge.merging.methods.inputs import Block, Combine, Inputs
from paretomerge.merging.methods.sphere import in_pieces


def tsv(inputs: Inputs) -> Combine:
    """Task singular vectors (Gargiulo et al. 2025, alg. 1): the top 1/K of each task's singular vectors side by side,
    made orthogonal by Procrustes, with their singular values."""
    k = len(inputs.sources)

    def delta(block: Block) -> torch.Tensor:
        parts = [_svd(block.delta(i)) for i in range(k)]
        rank = max(1, len(parts[0][1]) // k)
        left = torch.cat([u[:, :rank] for u, _, _ in parts], 1)
        values = torch.cat([s[:rank] for _, s, _ in parts])
        right = torch.cat([v[:rank] for _, _, v in parts], 0)
        return (_orthogonal(left) * values) @ _orthogonal(right)

    return _on_matrices(inputs, delta)


def iso_c(inputs: Inputs) -> Combine:
    """Isotropic merging in the common subspace (Marczak et al. 2025, sec. 4): the sum's spectrum made flat at its mean."""

    def delta(block: Block) -> torch.Tensor:
        u, s, v = _svd(_sum(inputs, block))
        return (u * s.mean()) @ v

    return _on_matrices(inputs, delta)


def iso_cts(inputs: Inputs) -> Combine:
    """Isotropic merging in common and task-specific subspaces (Marczak et al. 2025, sec. 4.2).

    The sum's top `common_fraction` of directions, and for the others each task's own, outside the common ones.
    """
    k, fraction = len(inputs.sources), float(inputs.options["common_fraction"])

    def delta(block: Block) -> torch.Tensor:
        u, s, v = _svd(_sum(inputs, block))
        own = min(round((len(s) - int(fraction * len(s))) / k), len(s) // k)
        common = len(s) - own * k
        left, values, right = [u[:, :common]], [s[:common]], [v[:common]]
        for i in range(k):
            part = block.delta(i)
            a, b, c = _svd(part - left[0] @ (left[0].T @ part))
            left.append(a[:, :own])
            values.append(b[:own])
            right.append(c[:own])
        flat = torch.cat(values).mean()
        return _orthogonal(torch.cat(left, 1)) @ _orthogonal(torch.cat(right, 0)) * flat

    return _on_matrices(inputs, delta)


def wudi(inputs: Inputs) -> Combine:
    """Whoever started the interference (Cheng et al. 2025, eq. 9): from the sum of the deltas, descend
    sum_i |(tau - tau_i) tau_i^T|^2 / |tau_i|^2 by Adam, `steps` times at rate `lr`."""
    k = len(inputs.sources)

    def delta(block: Block) -> torch.Tensor:
        deltas = [block.delta(i) for i in range(k)]
        gramians = [d.T @ d / d.square().sum().clamp_min(1e-30) for d in deltas]
        merged = torch.stack(deltas).sum(0)
        optimizer = torch.optim.Adam([merged], lr=float(inputs.options["lr"]))
        for _ in range(int(inputs.options["steps"])):
            # the gradient of each term is 2 (tau - tau_i) tau_i^T tau_i / |tau_i|^2
            merged.grad = 2 * torch.stack(
                [(merged - d) @ g for d, g in zip(deltas, gramians, strict=True)]
            ).sum(0)
            optimizer.step()
        return merged

    return _on_matrices(inputs, delta)


def _on_matrices(inputs: Inputs, delta: Combine) -> Combine:
    """theta_0 + lambda delta for a matrix of a layer (or each of a stack of experts'); the mean of the deltas elsewhere."""
    scale, k = float(inputs.options["lambda"]), len(inputs.sources)
    if not inputs.matrix:
        return combination([scale / k] * k, 1 - scale)
    return in_pieces(
        inputs, inputs.shape[-2], lambda matrix: delta(matrix).mul_(scale).add_(matrix.base)
    )


def _sum(inputs: Inputs, block: Block) -> torch.Tensor:
    total = block.delta(0)
    for i in range(1, len(inputs.sources)):
        total.add_(block.delta(i))
    return total


def _svd(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U (rows, r), S (r,), V^T (r, columns)."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return u, s, v


def _orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """The nearest matrix with orthonormal columns or rows (Procrustes)."""
    u, _, v = _svd(matrix)
    return u @ v
