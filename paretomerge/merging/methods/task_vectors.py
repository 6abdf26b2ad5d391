"""Methods that add deltas (task vectors) tau_i = theta_i - theta_0 to the base: sparsify, agree on signs, sum.

All are one computation. Each delta is pruned in place, block by block; then the deltas are summed by weight, or only
those entries whose sign wins the vote.
"""

from collections.abc import Sequence

import torch

from paretomerge.merging.methods.averaging import combination, total
from paretomerge.merging.methods.inputs import Block, Combine, Inputs
from paretomerge.merging.methods.prune import Prune, band, by_rank, drop, trim

_NONE = 1e-8  # a sum of weights this small is no divisor (mergekit's threshold)


def task_arithmetic(inputs: Inputs) -> Combine:
    """theta_0 + lambda sum w_i tau_i (Ilharco et al. 2023, sec. 2)."""
    scale = float(inputs.options["lambda"]) / _divisor(inputs)
    weights = [scale * weight for weight in inputs.each("weight")]
    return combination(weights, 1.0 - sum(weights))


def ties(inputs: Inputs) -> Combine:
    """Trim, elect sign, average what agrees (Yadav et al. 2023, sec. 3)."""
    return elected_sum(inputs, trim(inputs))


def dare_linear(inputs: Inputs) -> Combine:
    """Drop at random and rescale, then sum (Yu et al. 2024, sec. 3)."""
    return plain_sum(inputs, drop(inputs))


def dare_ties(inputs: Inputs) -> Combine:
    """Drop at random and rescale, then elect signs and sum what agrees."""
    return elected_sum(inputs, drop(inputs))


def della(inputs: Inputs) -> Combine:
    """Drop at random, small entries of a row more often, then elect signs (Deep et al. 2024, sec. 3)."""
    return elected_sum(inputs, by_rank(inputs))


def della_linear(inputs: Inputs) -> Combine:
    """Drop at random, small entries of a row more often, then sum."""
    return plain_sum(inputs, by_rank(inputs))


def breadcrumbs(inputs: Inputs) -> Combine:
    """Drop the largest and the smallest entries, then sum (Davari and Belilovsky 2024, sec. 3)."""
    return plain_sum(inputs, band(inputs))


def breadcrumbs_ties(inputs: Inputs) -> Combine:
    """Drop the largest and the smallest entries, then elect signs."""
    return elected_sum(inputs, band(inputs))


def plain_sum(inputs: Inputs, prune: Sequence[Prune]) -> Combine:
    """theta_0 + lambda sum w_i prune(tau_i), divided by sum w_i where `normalize` asks for it."""
    scale = float(inputs.options["lambda"]) / _divisor(inputs)
    weights = [scale * weight for weight in inputs.each("weight")]

    def combine(block: Block) -> torch.Tensor:
        merged = block.base.clone()
        for i, weight in enumerate(weights):
            if weight != 0:
                merged.add_(prune[i](block.delta(i), block).mul_(weight))
        return merged

    return combine


def elected_sum(inputs: Inputs, prune: Sequence[Prune]) -> Combine:
    """Elect the sign of sum w_i tau_i per entry (0 counts as +), sum what agrees, divide by the weights that agree."""
    weights = inputs.each("weight")
    scale, normalize = float(inputs.options["lambda"]), bool(inputs.options["normalize"])
    used = [i for i, weight in enumerate(weights) if weight != 0]

    def combine(block: Block) -> torch.Tensor:
        deltas = [_times(prune[i](block.delta(i), block), weights[i]) for i in used]
        return (
            _times(vote(deltas, [weights[i] for i in used], normalize), scale).add_(block.base)
            if used
            else block.base.clone()
        )

    return combine


def elected(deltas: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sign of the sum per entry, 1 or -1; a sum of 0 counts as +."""
    summed = total(deltas).add_(0.0)  # adding 0 turns -0 into +0
    return torch.copysign(torch.ones((), device=summed.device), summed)


def vote(deltas: Sequence[torch.Tensor], weights: Sequence[float], normalize: bool) -> torch.Tensor:
    """Sum of the weighted `deltas` (written to) that have the elected sign; a negative weight has turned its delta."""
    sign = elected(deltas)
    agreeing = [delta.mul_(sign).clamp_min_(0) for delta in deltas]
    merged = total(agreeing).mul_(sign)
    if not normalize:
        return merged
    divisor = agreeing[0].sign_().mul_(weights[0])
    for entry, weight in zip(agreeing[1:], weights[1:], strict=True):
        divisor.add_(entry.sign_().mul_(weight))
    if min(weights) > _NONE:
        return merged.div_(divisor.clamp_min_(_NONE))
    return merged.div_(torch.where(divisor.abs() < _NONE, torch.ones_like(divisor), divisor))


def _times(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    return tensor if factor == 1 else tensor.mul_(factor)


def _divisor(inputs: Inputs) -> float:
    total = sum(inputs.each("weight"))
    return total if inputs.options["normalize"] and abs(total) >= _NONE else 1.0
