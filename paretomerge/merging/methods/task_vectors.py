"""Methods that add deltas (task vectors) tau_i = theta_i - theta_0 to the base.

All are one computation: sparsify each tau_i block by block, then add up w_i tau_i, either all
entries or only those whose sign wins a vote.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from paretomerge.merging.block import Block, BlockMerger, Inputs
from paretomerge.merging.methods.common import (
    linear_combination,
    sum_tensors,
    times_,
)
from paretomerge.merging.methods.sparsify import (
    Sparsifier,
    magprune,
    random_drop,
    top_magnitudes,
    without_outliers,
)

_MIN_WEIGHT_SUM = 1e-8  # mergekit divides by no smaller sum of weights

# Of a float32
_SIGN_BIT = -(1 << 31)
_BITS_OF_ONE = 0x3F800000


def task_arithmetic(inputs: Inputs) -> BlockMerger:
    """Task arithmetic: theta_0 + lambda sum w_i tau_i.

    Ilharco et al. 2023, arXiv 2212.04089, sec. 2. `normalize` divides by sum w_i.
    """
    weights = _scaled_weights(inputs)
    # theta_0 + sum c_i (theta_i - theta_0) = (1 - sum c_i) theta_0 + sum c_i theta_i
    return linear_combination(weights, 1.0 - sum(weights))


def ties(inputs: Inputs) -> BlockMerger:
    """Trim each tau_i to its largest entries, elect signs, average the entries that agree.

    Yadav et al. 2023, arXiv 2306.01708, sec. 3.
    """
    return _elected_sum(inputs, top_magnitudes(inputs))


def dare_linear(inputs: Inputs) -> BlockMerger:
    """Drop entries at random and rescale, then add up.

    Yu et al. 2024, arXiv 2311.03099, sec. 3.
    """
    return _plain_sum(inputs, random_drop(inputs))


def dare_ties(inputs: Inputs) -> BlockMerger:
    """Drop entries at random and rescale, then elect signs and add up the entries that agree.

    Yu et al. 2024, arXiv 2311.03099, sec. 3, with the vote of TIES.
    """
    return _elected_sum(inputs, random_drop(inputs))


def della(inputs: Inputs) -> BlockMerger:
    """Drop entries at random, small ones of a row more often, rescale, then elect signs.

    Deep et al. 2024, arXiv 2406.11617, sec. 3.
    """
    return _elected_sum(inputs, magprune(inputs))


def della_linear(inputs: Inputs) -> BlockMerger:
    """Drop entries at random, small ones of a row more often, rescale, then add up.

    Deep et al. 2024, arXiv 2406.11617, sec. 3, without the vote.
    """
    return _plain_sum(inputs, magprune(inputs))


def breadcrumbs(inputs: Inputs) -> BlockMerger:
    """Drop the largest and the smallest entries, then add up.

    Davari and Belilovsky 2024, arXiv 2312.06795, sec. 3.
    """
    return _plain_sum(inputs, without_outliers(inputs))


def breadcrumbs_ties(inputs: Inputs) -> BlockMerger:
    """Drop the largest and the smallest entries, then elect signs.

    Davari and Belilovsky 2024, arXiv 2312.06795, sec. 3, with the vote of TIES.
    """
    return _elected_sum(inputs, without_outliers(inputs))


def _plain_sum(
    inputs: Inputs,
    sparsifiers: Sequence[Sparsifier],
) -> BlockMerger:
    """Merge theta_0 + lambda sum w_i sparse(tau_i), divided by sum w_i if `normalize` is on."""
    weights = _scaled_weights(inputs)

    def merge_block(block: Block) -> Tensor:
        merged = block.base.clone()
        for i, weight in enumerate(weights):
            if weight != 0:
                sparsify = sparsifiers[i]
                delta = sparsify(block.delta(i), block)
                merged.add_(times_(delta, weight))
        return merged

    return merge_block


def _scaled_weights(inputs: Inputs) -> list[float]:
    """The factors lambda w_i, divided by sum w_i if `normalize` is on."""
    weights = inputs.per_source("weight")
    total = sum(weights)
    has_sum = abs(total) >= _MIN_WEIGHT_SUM
    divisor = 1.0
    if inputs.flag("normalize") and has_sum:
        divisor = total
    scale = inputs.number("lambda") / divisor
    return [scale * weight for weight in weights]


def _elected_sum(
    inputs: Inputs,
    sparsifiers: Sequence[Sparsifier],
) -> BlockMerger:
    """Merge theta_0 + lambda times the sum, or average, of the entries with the elected sign."""
    weights = inputs.per_source("weight")
    scale = inputs.number("lambda")
    normalize = inputs.flag("normalize")
    sources = range(inputs.n_sources)
    used = [i for i in sources if weights[i] != 0]
    used_weights = [weights[i] for i in used]
    all_votes = inputs.per_source("vote")
    votes = [all_votes[i] for i in used]

    def merge_block(block: Block) -> Tensor:
        if not used:
            return block.base.clone()
        deltas = []
        for i in used:
            sparsify = sparsifiers[i]
            delta = sparsify(block.delta(i), block)
            deltas.append(times_(delta, weights[i]))
        merged = _disjoint_merge_(deltas, used_weights, votes, normalize)
        return times_(merged, scale).add_(block.base)

    return merge_block


def elect_signs(deltas: Sequence[Tensor], votes: Sequence[float]) -> Tensor:
    """The elected sign of each entry, sgn(sum v_i tau_i).

    Yadav et al. 2023, sec. 3, "elect", with v_i = 1.

    Args:
        deltas: Weighted tau_i, so that a negative weight turns its model's vote.
        votes: v_i, which count in the election alone.

    Returns:
        1 or -1 per entry; a sum of 0 counts as +.
    """
    if all(vote == 1 for vote in votes):
        total = sum_tensors(deltas)
    else:
        total = torch.zeros_like(deltas[0])
        for delta, vote in zip(deltas, votes, strict=True):
            total.add_(delta * vote)
    # Adding 0 turns -0 into +0.
    total.add_(0.0)
    # The sign bit of the sum and the other bits of 1: a third of the time of torch.copysign.
    bits = total.view(torch.int32)
    bits.bitwise_and_(_SIGN_BIT).bitwise_or_(_BITS_OF_ONE)
    return total


def _disjoint_merge_(
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    votes: Sequence[float],
    normalize: bool,
) -> Tensor:
    """Sum of the entries that have the elected sign, or their average.

    Yadav et al. 2023, sec. 3, "disjoint merge".

    Args:
        deltas: w_i tau_i; written to.
        weights: w_i.
        votes: v_i; see `elect_signs`.
        normalize: Whether to divide each entry by the sum of the weights that agree.

    Returns:
        A new tensor.
    """
    signs = elect_signs(deltas, votes)
    # |w_i tau_i| where it has the elected sign, else 0
    for delta in deltas:
        delta.mul_(signs).clamp_min_(0)
    merged = sum_tensors(deltas).mul_(signs)
    if not normalize:
        return merged
    # The sum of the weights that agree, per entry
    divisor = times_(deltas[0].sign_(), weights[0])
    for i in range(1, len(weights)):
        agrees = deltas[i].sign_()
        divisor.add_(times_(agrees, weights[i]))
    if min(weights) > _MIN_WEIGHT_SUM:
        return merged.div_(divisor.clamp_min_(_MIN_WEIGHT_SUM))
    # Weights of both signs can cancel: such an entry is not divided.
    is_zero = divisor.abs() < _MIN_WEIGHT_SUM
    divisor = torch.where(is_zero, torch.ones_like(divisor), divisor)
    return merged.div_(divisor)
