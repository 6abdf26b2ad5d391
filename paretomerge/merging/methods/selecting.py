"""Methods that decide entry by entry whose change to take: sce, nearswap, arcee_fusion, RAM, consensus, competition."""

from collections.abc import Callable

import numpy as np
import torch

from paretomerge.merging.methods.averaging import total
from paretomerge.merging.methods.inputs import Block, Combine, Inputs
from paretomerge.merging.methods.prune import masked
from paretomerge.merging.methods.select import largest
from paretomerge.merging.methods.sphere import in_one_piece
from paretomerge.merging.methods.task_vectors import elected


def sce(inputs: Inputs) -> Combine:
    """Select, calculate, erase (Wan et al. 2024, FuseChat, sec. 3.3).

    Keep the entries of largest variance over the models, weigh each model by the mean square of what is left of its
    delta (alike, where those add up to less than 1e-6), and sum the entries that have the sign of the unweighted sum.
    """
    k = len(inputs.sources)
    select = _by_variance(inputs, float(inputs.options["select_topk"]))
    if select is None:
        return lambda block: block.base.clone()
    squares = [0.0] * k
    for block in inputs.blocks():
        for i, delta in enumerate(select(block)):
            squares[i] += delta.mul_(delta).sum().item()
    means = [square / inputs.size for square in squares]
    weights = [mean / sum(means) for mean in means] if sum(means) >= 1e-6 else [1 / k] * k

    def combine(block: Block) -> torch.Tensor:
        deltas = select(block)
        sign = elected(deltas)
        merged, divisor = torch.zeros_like(sign), torch.zeros_like(sign)
        for delta, weight in zip(deltas, weights, strict=True):
            delta.mul_(sign).clamp_min_(0)
            divisor.add_(delta.sign().mul_(weight))
            merged.add_(delta.mul_(weight))
        return merged.mul_(sign).div_(divisor.clamp_min_(1e-6)).add_(block.base)

    return combine


def _by_variance(inputs: Inputs, share: float) -> "Callable[[Block], list[torch.Tensor]] | None":
    """Deltas with all but the `share` of the entries that vary most set to zero; None where nothing is kept."""
    k = len(inputs.sources)

    def deltas(block: Block) -> list[torch.Tensor]:
        return [block.delta(i) for i in range(k)]

    if share >= 1:
        return deltas
    varied = sum(int(np.count_nonzero(_differ(block, k))) for block in inputs.blocks())
    count = int(np.float32(varied) * np.float32(share))
    if count <= 0:
        return None
    if count >= inputs.size:
        return deltas
    (cut,) = largest(inputs, [(_variance, count)])

    def kept(_: torch.Tensor, block: Block) -> np.ndarray:
        found: np.ndarray = (cut.keep_(_variance(block), block.start) > 0).cpu().numpy().reshape(-1)
        return found

    select = masked(inputs, kept, remember=True)
    return lambda block: select(deltas(block), block)


def _differ(block: Block, k: int) -> np.ndarray:
    """Entries that are not the same in all models."""
    first = block.source(0)
    differ = torch.zeros_like(first, dtype=torch.bool)
    for i in range(1, k):
        differ |= block.source(i) != first
    return differ.cpu().numpy()


def _variance(block: Block) -> torch.Tensor:
    """K times the variance over the models: of their differences to the first, so that equal entries give exactly 0."""
    k = len(block.inputs.sources)
    first = block.source(0)
    apart = [block.source(i).sub_(first) for i in range(1, k)]
    mean = total(apart).div_(k) if apart else torch.zeros_like(first)
    squares = mean.square()
    for difference in apart:
        squares.add_(difference.sub_(mean).square_())
    return squares


def nearswap(inputs: Inputs) -> Combine:
    """Move from the base towards the other model by min(1, t / |a - b|) of the way: all of it where they are near."""
    t = float(inputs.options["t"])

    def combine(block: Block) -> torch.Tensor:
        base = block.source(0)
        delta = block.source(1).sub_(base)
        share = torch.full_like(delta, t).div_(delta.abs().clamp_min_(1e-6)).clamp_(0, 1)
        return base.add_(delta.mul_(share))

    return combine


def arcee_fusion(inputs: Inputs) -> Combine:
    """Take the other model's change where its importance reaches the median + 1.5 interquartile ranges.

    Importance is |b - a| times the divergence KL(softmax(b) | softmax(a)) of its row. All entries are looked at, where
    mergekit samples a million.
    """

    def importance(block: Block) -> torch.Tensor:
        base, other = block.source(0), block.source(1)
        p, q = torch.softmax(other, 1).add_(1e-8), torch.softmax(base, 1).add_(1e-8)
        divergence = (
            (p * (p / q).log()).sum(1, keepdim=True).clamp_min_(0)
        )  # below 0 it is a rounding error
        return other.sub_(base).abs_().mul_(divergence)

    n = inputs.size
    places = [int(share * (n - 1)) for share in (0.25, 0.5, 0.75)]
    low, middle, high = (
        cut.value for cut in largest(inputs, [(importance, n - place) for place in places])
    )
    threshold = middle + 1.5 * (high - low)

    def combine(block: Block) -> torch.Tensor:
        base = block.source(0)
        return base.add_(block.source(1).sub_(base).mul_(importance(block) >= threshold))

    return combine


def ram(inputs: Inputs) -> Combine:
    """Changes that one model alone makes are kept, shared ones averaged over those that make them (RAM, arXiv 2601.13572)."""
    return _ram(inputs, [1.0] * len(inputs.sources))


def ramplus_tl(inputs: Inputs) -> Combine:
    """RAM, with a model's own changes scaled by 1 + r clip(shared / own, 0, alpha), counted in this tensor."""
    epsilon, r, alpha = (float(inputs.options[name]) for name in ("epsilon", "r", "alpha"))
    k = len(inputs.sources)
    shared, own = [0] * k, [0] * k
    for block in inputs.blocks():
        changed = [block.delta(i).abs_() > epsilon for i in range(k)]
        count = torch.stack(changed).sum(0)
        for i, entries in enumerate(changed):
            own[i] += int((entries & (count == 1)).sum())
            shared[i] += int((entries & (count > 1)).sum())
    return _ram(
        inputs, [1 + r * min(s / o if o else 0.0, alpha) for s, o in zip(shared, own, strict=True)]
    )


def _ram(inputs: Inputs, scales: list[float]) -> Combine:
    epsilon = float(inputs.options["epsilon"])

    def combine(block: Block) -> torch.Tensor:
        summed, alone = torch.zeros_like(block.base), torch.zeros_like(block.base)
        count = torch.zeros_like(block.base)
        for i, scale in enumerate(scales):
            delta = block.delta(i)
            delta.mul_(delta.abs() > epsilon)
            count.add_(delta != 0)
            summed.add_(delta)
            alone.add_(delta.mul_(scale))
        return torch.where(count > 1, summed.div_(count.clamp_min(1)), alone).add_(block.base)

    return combine


def consensus_ta(inputs: Inputs) -> Combine:
    """Task arithmetic on the entries that at least k tasks call their own (Wang et al. 2024, TALL masks, eq. 4 and 5).

    A task calls an entry its own where |tau_t| >= mask_lambda |sum tau - tau_t|.
    """
    weights, own = inputs.each("weight"), float(inputs.options["mask_lambda"])
    needed, scale = float(inputs.options["k"]), float(inputs.options["lambda"])

    def combine(block: Block) -> torch.Tensor:
        deltas = [block.delta(i).mul_(weight) for i, weight in enumerate(weights)]
        summed = total(deltas)
        count = torch.zeros_like(summed)
        for delta in deltas:
            count.add_(delta.abs() >= summed.sub(delta).abs_().mul_(own))
        return summed.mul_(count >= needed).mul_(scale).add_(block.base)

    return combine


def pcb(inputs: Inputs) -> Combine:
    """Parameter competition balancing (Du et al. 2024, eq. 2 to 6): a score inside each task times one between tasks;
    the top `density` of each task's scores are its entries' weights in a mean.

    Norm(x) is x over its largest magnitude.
    """
    k = len(inputs.sources)

    def merge(block: Block) -> torch.Tensor:
        deltas = [block.delta(i) for i in range(k)]
        summed, weights = torch.zeros_like(block.base), torch.zeros_like(block.base)
        for i, delta in enumerate(deltas):
            inside = _softmax(_norm(delta.square()).mul_(k))
            between = torch.zeros_like(delta)
            for other in deltas:
                between.add_(_softmax(_norm(delta * other)))
            score = inside.mul_(between)
            count = int(float(inputs.parameters[i]["density"]) * delta.numel())
            if count < delta.numel():
                score.mul_(_top(score, count))
            score.div_(
                score.max().clamp_min(1e-38)
            )  # scores of a large tensor are tiny; only their ratios count
            summed.add_(delta.mul(score).mul_(float(inputs.parameters[i]["weight"])))
            weights.add_(score)
        return (
            summed.div_(weights.clamp_min(1e-12))
            .mul_(float(inputs.options["lambda"]))
            .add_(block.base)
        )

    return in_one_piece(inputs, merge)


def _norm(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.div_(tensor.abs().max().clamp_min(1e-38))


def _softmax(tensor: torch.Tensor) -> torch.Tensor:
    return torch.softmax(tensor.view(-1), 0).view_as(tensor)


def _top(score: torch.Tensor, count: int) -> torch.Tensor:
    kept = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
    if count > 0:
        kept[torch.topk(score.view(-1), count).indices] = True
    return kept.view_as(score)
