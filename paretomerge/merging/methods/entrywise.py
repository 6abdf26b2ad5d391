"""Methods that decide for each entry whose change to take.

sce, nearswap, arcee_fusion, ram, ramplus_tl, consensus_ta and pcb.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from paretomerge.merging.block import Block, BlockMerger, Inputs
from paretomerge.merging.methods.common import (
    count_used,
    merge_whole_tensor,
    sum_tensors,
    weighted_deltas,
)
from paretomerge.merging.methods.sparsify import BlockMask, BoolArray
from paretomerge.merging.methods.task_vectors import elect_signs
from paretomerge.merging.methods.top_k import Query, top_k_thresholds

SelectedDeltas = Callable[[Block], list[Tensor]]
"""A block -> w_i tau_i of every source that is used, zero where the entry is not selected."""

_MIN_MEAN_SQUARE = 1e-6  # the weights of SCE are divided by no smaller sum
_MIN_MAGNITUDE = 1e-38  # scores are divided by no smaller maximum


def sce(inputs: Inputs) -> BlockMerger:
    """Select, calculate, erase.

    Wan et al. 2024 (FuseChat), arXiv 2408.07990, sec. 3.3. Select the entries of largest variance
    over the models. Calculate each model's weight: the mean square of its selected tau_i (equal
    weights where these add up to less than 1e-6). Erase entries whose sign is not that of the
    sum. The parameter `weight` is not in the paper: it multiplies the source's tau_i first.
    """
    scales = inputs.per_source("weight")
    if count_used(scales) == 0:
        return _base_block
    selected_deltas = _select_by_variance(inputs, inputs.number("select_topk"), scales)
    if selected_deltas is None:
        return _base_block
    weights = _mean_square_weights(inputs, selected_deltas)
    votes = []
    for vote, scale in zip(inputs.per_source("vote"), scales, strict=True):
        if scale != 0:
            votes.append(vote)

    def merge_block(block: Block) -> Tensor:
        deltas = selected_deltas(block)
        signs = elect_signs(deltas, votes)
        merged = torch.zeros_like(signs)
        divisor = torch.zeros_like(signs)
        for delta, weight in zip(deltas, weights, strict=True):
            # Erase: an entry with the other sign becomes negative, and 0.
            delta.mul_(signs).clamp_min_(0)
            agrees = delta.sign()
            divisor.add_(agrees.mul_(weight))
            merged.add_(delta.mul_(weight))
        merged.mul_(signs)
        merged.div_(divisor.clamp_min_(_MIN_MEAN_SQUARE))
        return merged.add_(block.base)

    return merge_block


def _base_block(block: Block) -> Tensor:
    return block.base.clone()


def _mean_square_weights(
    inputs: Inputs, selected_deltas: SelectedDeltas
) -> list[float]:
    """SCE's calculated weights, which add up to 1."""
    k = count_used(inputs.per_source("weight"))
    squares = [0.0] * k
    for block in inputs.blocks():
        for i, delta in enumerate(selected_deltas(block)):
            square = delta.mul_(delta).sum()
            squares[i] += square.item()
    means = [square / inputs.numel for square in squares]
    total = sum(means)
    if total < _MIN_MEAN_SQUARE:
        return [1 / k] * k
    return [mean / total for mean in means]


def _select_by_variance(
    inputs: Inputs,
    share: float,
    scales: Sequence[float],
) -> SelectedDeltas | None:
    """Select the `share` of the varying entries that vary most; None where that is no entry."""

    def scaled_deltas(block: Block) -> list[Tensor]:
        return list(weighted_deltas(block, scales))

    def variance(block: Block) -> Tensor:
        return _variance(block, scales)

    if share >= 1:
        return scaled_deltas
    varying = sum(_count_varying(block, scales) for block in inputs.blocks())
    # In float32, as mergekit: 90 * 0.7 is 63 there, and 62.99... in float64.
    exact_count = np.float32(varying) * np.float32(share)
    count = int(exact_count)
    if count <= 0:
        return None
    if count >= inputs.numel:
        return scaled_deltas
    (threshold,) = top_k_thresholds(inputs, [Query(variance, count)])

    def is_selected(_: Tensor, block: Block) -> BoolArray:
        variances = threshold.keep_(variance(block), block.start)
        selected = (variances > 0).view(-1)
        return np.asarray(selected.cpu().numpy())

    mask = BlockMask(inputs, is_selected, cached=True)

    def selected_deltas(block: Block) -> list[Tensor]:
        return mask.apply_(scaled_deltas(block), block)

    return selected_deltas


def _models_less_a_tensor(block: Block, scales: Sequence[float]) -> Iterator[Tensor]:
    """The models theta_0 + w_i tau_i that are used, all less the same tensor.

    A tensor that is subtracted from all models changes no difference and no variance. Without
    weights theta_i itself is exact, as mergekit has it; w_i tau_i is rounded.
    """
    used = [i for i, scale in enumerate(scales) if scale != 0]
    if all(scales[i] == 1 for i in used):
        for i in used:
            yield block.source(i)
    else:
        yield from weighted_deltas(block, scales)


def _count_varying(block: Block, scales: Sequence[float]) -> int:
    """The number of entries that are not equal in all models."""
    models = _models_less_a_tensor(block, scales)
    first = next(models)
    varies = torch.zeros_like(first, dtype=torch.bool)
    for model in models:
        varies |= model != first
    return int(np.count_nonzero(varies.cpu().numpy()))


def _variance(block: Block, scales: Sequence[float]) -> Tensor:
    """K times the variance of each entry over the models."""
    first, *others = _models_less_a_tensor(block, scales)
    k = 1 + len(others)
    # Of differences to the first model, so that equal entries have a variance of exactly 0.
    differences = [model.sub_(first) for model in others]
    if not differences:
        return torch.zeros_like(first)
    mean = sum_tensors(differences).div_(k)
    # The difference of the first model to itself is 0.
    squares = mean.square()
    for difference in differences:
        deviation = difference.sub_(mean)
        squares.add_(deviation.square_())
    return squares


def nearswap(inputs: Inputs) -> BlockMerger:
    """Move towards the other model, all the way where it is near: theta_0 + s delta.

    mergekit. delta is theta_1 - theta_0, s = min(1, t / |delta|) per entry. theta_0 is the base,
    which is the first source.
    """
    t = inputs.number("t")

    def merge_block(block: Block) -> Tensor:
        base = block.source(0)
        delta = block.source(1).sub_(base)
        distance = delta.abs().clamp_min_(1e-6)
        share = torch.full_like(delta, t).div_(distance)
        delta.mul_(share.clamp_(0, 1))
        return base.add_(delta)

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
    low, median, high = top_k_thresholds(inputs, queries)
    interquartile_range = high.value - low.value
    threshold = median.value + 1.5 * interquartile_range

    def merge_block(block: Block) -> Tensor:
        base = block.source(0)
        delta = block.source(1).sub_(base)
        is_important = _fusion_importance(block) >= threshold
        return base.add_(delta.mul_(is_important))

    return merge_block


def _fusion_importance(block: Block) -> Tensor:
    base = block.source(0)
    other = block.source(1)
    p = torch.softmax(other, 1).add_(1e-8)
    q = torch.softmax(base, 1).add_(1e-8)
    # KL(p | q) = sum p log(p / q); below 0 it is a rounding error.
    log_ratio = (p / q).log()
    divergence = (p * log_ratio).sum(1, keepdim=True)
    divergence.clamp_min_(0)
    return other.sub_(base).abs_().mul_(divergence)


def ram(inputs: Inputs) -> BlockMerger:
    """Keep a change that only one model makes; average a change over the models that make it.

    RAM, arXiv 2601.13572. A model changes an entry where |tau_i| > `epsilon`.
    """
    return _merge_changes(inputs, [1.0] * inputs.n_sources)


def ramplus_tl(inputs: Inputs) -> BlockMerger:
    """RAM, with a model's unique changes scaled by 1 + r clip(shared / unique, 0, alpha).

    RAM+ (tensor level), arXiv 2601.13572. shared and unique are the numbers of entries of this
    tensor that the model changes with others and alone.
    """
    epsilon = inputs.number("epsilon")
    r = inputs.number("r")
    alpha = inputs.number("alpha")
    k = inputs.n_sources
    shared = [0] * k
    unique = [0] * k
    for block in inputs.blocks():
        changed = [delta.abs_() > epsilon for delta in block.deltas()]
        count = torch.stack(changed).sum(0)
        for i, entries in enumerate(changed):
            is_unique = entries & (count == 1)
            is_shared = entries & (count > 1)
            unique[i] += int(is_unique.sum())
            shared[i] += int(is_shared.sum())
    scales = []
    for i in range(k):
        ratio = 0.0
        if unique[i]:
            ratio = shared[i] / unique[i]
        # clip(shared / unique, 0, alpha)
        ratio = min(ratio, alpha)
        scales.append(1 + r * ratio)
    return _merge_changes(inputs, scales)


def _merge_changes(inputs: Inputs, unique_scales: Sequence[float]) -> BlockMerger:
    """Average shared changes; scale unique ones by the factor of their model."""
    epsilon = inputs.number("epsilon")

    def merge_block(block: Block) -> Tensor:
        total = torch.zeros_like(block.base)
        unique = torch.zeros_like(block.base)
        count = torch.zeros_like(block.base)
        for i, scale in enumerate(unique_scales):
            delta = block.delta(i)
            is_changed = delta.abs() > epsilon
            delta.mul_(is_changed)
            count.add_(delta != 0)
            total.add_(delta)
            unique.add_(delta.mul_(scale))
        average = total.div_(count.clamp_min(1))
        merged = torch.where(count > 1, average, unique)
        return merged.add_(block.base)

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

    def merge_block(block: Block) -> Tensor:
        deltas = []
        for i, weight in enumerate(weights):
            deltas.append(block.delta(i).mul_(weight))
        total = sum_tensors(deltas)
        count = torch.zeros_like(total)
        for delta in deltas:
            # Eq. 4: the mask of this task
            others = total.sub(delta).abs_()
            is_in_mask = delta.abs() >= others.mul_(mask_lambda)
            count.add_(is_in_mask)
        # Eq. 5: the entries that are in at least k masks
        total.mul_(count >= least_tasks)
        return total.mul_(scale).add_(block.base)

    return merge_block


def pcb(inputs: Inputs) -> BlockMerger:
    """Parameter competition balancing: an average of the tau_i, weighted per entry by a score.

    Du et al. 2024, arXiv 2410.02396, eq. 2 to 6. The score is softmax(K norm(tau_i^2)), the
    competition inside a task, times sum_j softmax(norm(tau_i tau_j)), the competition between
    tasks. Only the top d of each task's scores count. norm(x) is x over its largest magnitude.
    """
    densities = inputs.per_source("density")
    weights = inputs.per_source("weight")
    scale = inputs.number("lambda")

    def merge(block: Block) -> Tensor:
        deltas = block.deltas()
        total = torch.zeros_like(block.base)
        divisor = torch.zeros_like(block.base)
        for i, delta in enumerate(deltas):
            score = _competition_score(delta, deltas)
            count = int(densities[i] * delta.numel())
            if count < delta.numel():
                score.mul_(_top_entries(score, count))
            # The scores of a large tensor are tiny. Only their ratios count.
            largest = score.max()
            score.div_(largest.clamp_min(_MIN_MAGNITUDE))
            scored_delta = delta.mul(score)
            total.add_(scored_delta.mul_(weights[i]))
            divisor.add_(score)
        average = total.div_(divisor.clamp_min(1e-12))
        return average.mul_(scale).add_(block.base)

    return merge_whole_tensor(inputs, merge)


def _competition_score(delta: Tensor, deltas: Sequence[Tensor]) -> Tensor:
    k = len(deltas)
    # softmax(K norm(tau_i^2)), the competition inside the task
    squares = _norm_(delta.square())
    within_task = _softmax(squares.mul_(k))
    # sum_j softmax(norm(tau_i tau_j)), the competition between tasks
    between_tasks = torch.zeros_like(delta)
    for other in deltas:
        products = _norm_(delta * other)
        between_tasks.add_(_softmax(products))
    return within_task.mul_(between_tasks)


def _norm_(tensor: Tensor) -> Tensor:
    largest = tensor.abs().max()
    return tensor.div_(largest.clamp_min(_MIN_MAGNITUDE))


def _softmax(tensor: Tensor) -> Tensor:
    """Over all entries."""
    flat = tensor.view(-1)
    return torch.softmax(flat, 0).view_as(tensor)


def _top_entries(score: Tensor, count: int) -> Tensor:
    """A mask of the `count` largest scores."""
    mask = torch.zeros_like(score, dtype=torch.bool)
    if count > 0:
        top = torch.topk(score.view(-1), count)
        mask.view(-1)[top.indices] = True
    return mask
