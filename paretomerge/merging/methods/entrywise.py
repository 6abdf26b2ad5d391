"""Methods that decide for each entry whose change to take.

sce, nearswap, arcee_fusion, ram, ramplus_tl, consensus_ta and pcb.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from paretomerge.merging.block import Block, BlockMerger, Inputs
from paretomerge.merging.methods.common import merge_whole_tensor, sum_tensors
from paretomerge.merging.methods.sparsify import BlockMask
from paretomerge.merging.methods.task_vectors import elect_signs
from paretomerge.merging.methods.top_k import Query, top_k_thresholds

_MIN_MAGNITUDE = 1e-38  # scores are divided by no smaller maximum


def sce(inputs: Inputs) -> BlockMerger:
    """Select, calculate, erase.

    Wan et al. 2024 (FuseChat), arXiv 2408.07990, sec. 3.3. Select the entries of largest variance
    over the models. Calculate each model's weight: the mean square of its selected tau_i (equal
    weights where these add up to less than 1e-6). Erase entries whose sign is not that of the
    unweighted sum.
    """
    selected_deltas = _select_by_variance(inputs, inputs.number("select_topk"))
    if selected_deltas is None:
        return _base_block
    weights = _mean_square_weights(inputs, selected_deltas)

    def merge_block(block: Block) -> torch.Tensor:
        deltas = selected_deltas(block)
        signs = elect_signs(deltas)
        merged, divisor = torch.zeros_like(signs), torch.zeros_like(signs)
        for delta, weight in zip(deltas, weights, strict=True):
            delta.mul_(signs).clamp_min_(0)
            divisor.add_(delta.sign().mul_(weight))
            merged.add_(delta.mul_(weight))
        return merged.mul_(signs).div_(divisor.clamp_min_(1e-6)).add_(block.base)

    return merge_block


SelectedDeltas = Callable[[Block], list[torch.Tensor]]
"""A block -> tau_i of every source, zero where the entry is not selected."""


def _base_block(block: Block) -> torch.Tensor:
    return block.base.clone()


def _mean_square_weights(inputs: Inputs, selected_deltas: SelectedDeltas) -> list[float]:
    """SCE's weights, which add up to 1."""
    k = len(inputs.sources)
    squares = [0.0] * k
    for block in inputs.blocks():
        for i, delta in enumerate(selected_deltas(block)):
            squares[i] += delta.mul_(delta).sum().item()
    means = [square / inputs.numel for square in squares]
    if sum(means) < 1e-6:
        return [1 / k] * k
    return [mean / sum(means) for mean in means]


def _select_by_variance(inputs: Inputs, share: float) -> SelectedDeltas | None:
    """Select the `share` of the varying entries that vary most; None where that is no entry."""
    k = len(inputs.sources)

    def all_deltas(block: Block) -> list[torch.Tensor]:
        return [block.delta(i) for i in range(k)]

    if share >= 1:
        return all_deltas
    varying = sum(_count_varying(block) for block in inputs.blocks())
    # In float32, as mergekit: 90 * 0.7 is 63 there, and 62.99... in float64.
    count = int(np.float32(varying) * np.float32(share))
    if count <= 0:
        return None
    if count >= inputs.numel:
        return all_deltas
    (threshold,) = top_k_thresholds(inputs, [Query(_variance, count)])

    def is_selected(_: torch.Tensor, block: Block) -> NDArray[np.bool_]:
        variances = threshold.keep_(_variance(block), block.start)
        return np.asarray((variances > 0).cpu().numpy().reshape(-1))

    mask = BlockMask(inputs, is_selected, cached=True)

    def selected_deltas(block: Block) -> list[torch.Tensor]:
        return mask.apply_(all_deltas(block), block)

    return selected_deltas


def _count_varying(block: Block) -> int:
    """The number of entries that are not equal in all models."""
    first = block.source(0)
    varies = torch.zeros_like(first, dtype=torch.bool)
    for i in range(1, len(block.inputs.sources)):
        varies |= block.source(i) != first
    return int(np.count_nonzero(varies.cpu().numpy()))


def _variance(block: Block) -> torch.Tensor:
    """K times the variance of each entry over the models."""
    k = len(block.inputs.sources)
    first = block.source(0)
    # Of differences to the first model, so that equal entries have a variance of exactly 0.
    differences = [block.source(i).sub_(first) for i in range(1, k)]
    mean = sum_tensors(differences).div_(k) if differences else torch.zeros_like(first)
    squares = mean.square()
    for difference in differences:
        squares.add_(difference.sub_(mean).square_())
    return squares


def nearswap(inputs: Inputs) -> BlockMerger:
    """Move towards the other model, all the way where it is near: theta_0 + s delta.

    mergekit. delta is theta_1 - theta_0, s = min(1, t / |delta|) per entry. theta_0 is the base,
    which is the first source.
    """
    t = inputs.number("t")

    def merge_block(block: Block) -> torch.Tensor:
        base = block.source(0)
        delta = block.source(1).sub_(base)
        ratio = torch.full_like(delta, t).div_(delta.abs().clamp_min_(1e-6))
        share = ratio.clamp_(0, 1)
        return base.add_(delta.mul_(share))

    return merge_block


def arcee_fusion(inputs: Inputs) -> BlockMerger:
    """Take the other model's changes of importance at or above median + 1.5 IQR.

    mergekit. The importance is |theta_1 - theta_0| KL(softmax(theta_1) | softmax(theta_0)), the
    divergence being that of the row; IQR the interquartile range. The quartiles are those of all
    entries, where mergekit samples a million.
    """
    n = inputs.numel
    queries = []
    for quantile in (0.25, 0.5, 0.75):
        rank = int(quantile * (n - 1))
        queries.append(Query(_fusion_importance, n - rank))
    low, median, high = (found.value for found in top_k_thresholds(inputs, queries))
    threshold = median + 1.5 * (high - low)

    def merge_block(block: Block) -> torch.Tensor:
        base = block.source(0)
        delta = block.source(1).sub_(base)
        return base.add_(delta.mul_(_fusion_importance(block) >= threshold))

    return merge_block


def _fusion_importance(block: Block) -> torch.Tensor:
    base, other = block.source(0), block.source(1)
    p, q = torch.softmax(other, 1).add_(1e-8), torch.softmax(base, 1).add_(1e-8)
    divergence = (p * (p / q).log()).sum(1, keepdim=True)
    # A divergence below 0 is a rounding error.
    return other.sub_(base).abs_().mul_(divergence.clamp_min_(0))


def ram(inputs: Inputs) -> BlockMerger:
    """Keep a change that only one model makes; average a change over the models that make it.

    RAM, arXiv 2601.13572. A model changes an entry where |tau_i| > `epsilon`.
    """
    return _merge_changes(inputs, [1.0] * len(inputs.sources))


def ramplus_tl(inputs: Inputs) -> BlockMerger:
    """RAM, with a model's unique changes scaled by 1 + r clip(shared / unique, 0, alpha).

    RAM+ (tensor level), arXiv 2601.13572. shared and unique are the numbers of entries of this
    tensor that the model changes with others and alone.
    """
    epsilon, r, alpha = inputs.number("epsilon"), inputs.number("r"), inputs.number("alpha")
    k = len(inputs.sources)
    shared, unique = [0] * k, [0] * k
    for block in inputs.blocks():
        changed = [block.delta(i).abs_() > epsilon for i in range(k)]
        count = torch.stack(changed).sum(0)
        for i, entries in enumerate(changed):
            unique[i] += int((entries & (count == 1)).sum())
            shared[i] += int((entries & (count > 1)).sum())
    scales = []
    for i in range(k):
        ratio = shared[i] / unique[i] if unique[i] else 0.0
        scales.append(1 + r * min(ratio, alpha))
    return _merge_changes(inputs, scales)


def _merge_changes(inputs: Inputs, unique_scales: Sequence[float]) -> BlockMerger:
    """Average shared changes; scale unique ones by the factor of their model."""
    epsilon = inputs.number("epsilon")

    def merge_block(block: Block) -> torch.Tensor:
        total, unique = torch.zeros_like(block.base), torch.zeros_like(block.base)
        count = torch.zeros_like(block.base)
        for i, scale in enumerate(unique_scales):
            delta = block.delta(i)
            delta.mul_(delta.abs() > epsilon)
            count.add_(delta != 0)
            total.add_(delta)
            unique.add_(delta.mul_(scale))
        average = total.div_(count.clamp_min(1))
        return torch.where(count > 1, average, unique).add_(block.base)

    return merge_block


def consensus_ta(inputs: Inputs) -> BlockMerger:
    """Task arithmetic on the entries that are in the masks of at least k tasks.

    Wang et al. 2024 (TALL masks), arXiv 2405.07813, eq. 4 and 5. The mask of task t has the entries
    with |tau_t| >= lambda_t |sum tau - tau_t|; lambda_t is the parameter `mask_lambda`.
    """
    weights = inputs.per_source("weight")
    mask_lambda = inputs.number("mask_lambda")
    least_tasks = inputs.number("k")
    scale = inputs.number("lambda")

    def merge_block(block: Block) -> torch.Tensor:
        deltas = [block.delta(i).mul_(weight) for i, weight in enumerate(weights)]
        total = sum_tensors(deltas)
        count = torch.zeros_like(total)
        for delta in deltas:
            others = total.sub(delta).abs_()
            count.add_(delta.abs() >= others.mul_(mask_lambda))
        return total.mul_(count >= least_tasks).mul_(scale).add_(block.base)

    return merge_block


def pcb(inputs: Inputs) -> BlockMerger:
    """Parameter competition balancing: an average of the tau_i, weighted per entry by a score.

    Du et al. 2024, arXiv 2410.02396, eq. 2 to 6. The score is softmax(K norm(tau_i^2)), the
    competition inside a task, times sum_j softmax(norm(tau_i tau_j)), the competition between
    tasks. Only the top d of each task's scores count. norm(x) is x over its largest magnitude.
    """
    k = len(inputs.sources)
    densities, weights = inputs.per_source("density"), inputs.per_source("weight")
    scale = inputs.number("lambda")

    def merge(block: Block) -> torch.Tensor:
        deltas = [block.delta(i) for i in range(k)]
        total, divisor = torch.zeros_like(block.base), torch.zeros_like(block.base)
        for i, delta in enumerate(deltas):
            score = _competition_score(delta, deltas)
            count = int(densities[i] * delta.numel())
            if count < delta.numel():
                score.mul_(_top_entries(score, count))
            # The scores of a large tensor are tiny. Only their ratios count.
            score.div_(score.max().clamp_min(_MIN_MAGNITUDE))
            total.add_(delta.mul(score).mul_(weights[i]))
            divisor.add_(score)
        average = total.div_(divisor.clamp_min(1e-12))
        return average.mul_(scale).add_(block.base)

    return merge_whole_tensor(inputs, merge)


def _competition_score(delta: torch.Tensor, deltas: Sequence[torch.Tensor]) -> torch.Tensor:
    within_task = _softmax(_norm_(delta.square()).mul_(len(deltas)))
    between_tasks = torch.zeros_like(delta)
    for other in deltas:
        between_tasks.add_(_softmax(_norm_(delta * other)))
    return within_task.mul_(between_tasks)


def _norm_(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.div_(tensor.abs().max().clamp_min(_MIN_MAGNITUDE))


def _softmax(tensor: torch.Tensor) -> torch.Tensor:
    """Over all entries."""
    return torch.softmax(tensor.view(-1), 0).view_as(tensor)


def _top_entries(score: torch.Tensor, count: int) -> torch.Tensor:
    """A mask of the `count` largest scores."""
    mask = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
    if count > 0:
        mask[torch.topk(score.view(-1), count).indices] = True
    return mask.view_as(score)
