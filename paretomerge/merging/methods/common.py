"""What several families of merge methods share: sums, inner products, merging in pieces."""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from paretomerge.merging.block import Block, BlockMerger, Inputs
from paretomerge.types import Array


def linear_combination(
    weights: Sequence[float],
    base_weight: float = 0.0,
) -> BlockMerger:
    """Merge c_0 theta_0 + sum c_i theta_i.

    A model with coefficient 0 is not read. A single coefficient of 1 gives that model's exact bits.

    Args:
        weights: c_1 ... c_K.
        base_weight: c_0.

    Returns:
        The function that merges a block.
    """

    def merge_block(block: Block) -> Tensor:
        merged = None
        if base_weight != 0:
            merged = block.base.mul(base_weight)
        for i, weight in enumerate(weights):
            if weight != 0:
                # Not torch.add(alpha=...): a fused multiply-add rounds differently at the ends of
                # blocks.
                term = block.source(i).mul_(weight)
                merged = term if merged is None else merged.add_(term)
        if merged is None:
            return block.source(0).zero_()
        return merged

    return merge_block


def weighted_deltas(block: Block, weights: Sequence[float]) -> Iterator[Tensor]:
    """Scale the deltas, for methods that work on w_i tau_i in place of tau_i.

    A source with weight 0 is left out and not read, as if the recipe did not list it. A delta of 0
    would still count among the K sources, and its singular vectors would be arbitrary.

    Args:
        block: Rows of the tensor.
        weights: w_1 ... w_K.

    Yields:
        w_i tau_i of each source that is used, one at a time: a new tensor that the caller may write
        to.
    """
    for i, weight in enumerate(weights):
        if weight != 0:
            yield times_(block.delta(i), weight)


def count_used(weights: Sequence[float]) -> int:
    """The number of sources whose weight is not 0."""
    return sum(weight != 0 for weight in weights)


def times_(tensor: Tensor, factor: float) -> Tensor:
    """Multiply in place."""
    # Saves a pass over the block where there is nothing to multiply.
    if factor == 1:
        return tensor
    return tensor.mul_(factor)


def sum_tensors(tensors: Sequence[Tensor]) -> Tensor:
    """The sum, as a new tensor; terms are added in order."""
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total.add_(tensor)
    return total


def gram_matrix(inputs: Inputs, deltas: bool = False) -> Array:
    """Inner products of the sources, over the whole tensor.

    Args:
        inputs: The tensor.
        deltas: Whether to take the inner products of tau_i instead of theta_i.

    Returns:
        (K, K). Products of a block are in float32, their sum over the blocks is in float64.
    """
    k = inputs.n_sources
    upper = np.zeros((k, k))
    for block in inputs.blocks():
        vectors = []
        for i in range(k):
            rows = block.delta(i) if deltas else block.source(i)
            vectors.append(rows.view(-1))
        for i, j in itertools.combinations_with_replacement(range(k), 2):
            product = torch.dot(vectors[i], vectors[j])
            upper[i, j] += product.item()
    lower = np.triu(upper, 1).T
    return np.asarray(upper + lower)


def merge_whole_tensor(inputs: Inputs, merge: BlockMerger) -> BlockMerger:
    """For rules that need all rows of a tensor at once: `merge` gets one block with all rows."""
    return merge_in_pieces(inputs, inputs.rows, merge)


def merge_in_pieces(
    inputs: Inputs,
    rows: int,
    merge: BlockMerger,
) -> BlockMerger:
    """For rules that need `rows` rows at once, such as one matrix of a stack.

    A piece is merged when its first block is asked for. Its result stays in memory until a block of
    another piece is asked for.

    Args:
        inputs: The tensor.
        rows: The number of rows of a piece; the last one may have fewer.
        merge: Merges one piece.

    Returns:
        The function that merges a block.
    """
    merged_pieces: dict[int, Tensor] = {}

    def merged_piece(piece: int) -> Tensor:
        if piece not in merged_pieces:
            merged_pieces.clear()
            first = piece * rows
            block = inputs.block(first, min(first + rows, inputs.rows))
            merged_pieces[piece] = merge(block).view(block.rows, -1)
        return merged_pieces[piece]

    def merge_block(block: Block) -> Tensor:
        parts = []
        first_piece = block.first // rows
        end_piece = -(-block.end // rows)
        for piece in range(first_piece, end_piece):
            offset = piece * rows
            first = max(block.first - offset, 0)
            end = block.end - offset
            parts.append(merged_piece(piece)[first:end])
        return torch.cat(parts)

    return merge_block
