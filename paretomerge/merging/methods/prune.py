"""Ways to make a delta sparse. Each looks at a whole tensor once and gives, per source, a function on its blocks."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from paretomerge.merging.methods.inputs import Block, Inputs
from paretomerge.merging.methods.select import Cut, Score, largest

Prune = Callable[[torch.Tensor, Block], torch.Tensor]
"""(a delta's block, written to; the block it belongs to) -> the pruned delta."""

Mask = Callable[[torch.Tensor, Block], np.ndarray]
"""(a delta's block, the block it belongs to) -> which entries stay, flat."""

_REMEMBER = 1 << 28  # elements: 32 MB of packed mask a source
_RANDOM = 65_536  # random numbers are whole numbers below this


def trim(inputs: Inputs) -> list[Prune]:
    """Keep the floor(density n) entries of largest magnitude; among equals the first stay (Yadav et al. 2023, sec. 3)."""
    return _between(inputs, [0] * len(inputs.sources))


def band(inputs: Inputs) -> list[Prune]:
    """Drop the floor(gamma n) largest entries and keep the floor(density n) after them (Davari and Belilovsky 2024)."""
    return _between(inputs, [int(gamma * inputs.size) for gamma in inputs.each("gamma")])


def _between(inputs: Inputs, tops: Sequence[int]) -> list[Prune]:
    """Drop each source's `top` largest entries and keep the floor(density n) after them, then rescale.

    The density comes first: where both do not fit, fewer are dropped at the top.
    """
    n, counts = inputs.size, [int(density * inputs.size) for density in inputs.each("density")]
    wanted: list[tuple[Score, int]] = []
    places: list[tuple[int | None, int | None]] = []
    for i, (count, top) in enumerate(zip(counts, tops, strict=True)):
        top = min(top, n - count)
        score = _magnitude(i)
        ends = []
        for k in (top + count, top):
            cuts = count > 0 and 0 < k < n
            ends.append(len(wanted) if cuts else None)
            wanted += [(score, k)] if cuts else []
        places.append((ends[0], ends[1]))
    found = largest(inputs, wanted) if wanted else []
    prunes = []
    for (low, high), count in zip(places, counts, strict=True):
        prunes.append(
            _window(
                count, None if low is None else found[low], None if high is None else found[high]
            )
        )
    return _rescaled(inputs, prunes)


def _magnitude(index: int) -> Score:
    return lambda block: block.delta(index).abs_()


def _window(count: int, low: Cut | None, high: Cut | None) -> Prune:
    def prune(delta: torch.Tensor, block: Block) -> torch.Tensor:
        if count <= 0:
            return delta.zero_()
        if low is not None:
            low.keep_(delta, block.start)
        return delta if high is None else delta.sub_(high.keep_(delta.clone(), block.start))

    return prune


def drop(inputs: Inputs) -> list[Prune]:
    """Keep each entry with probability `density` (Yu et al. 2024, sec. 3), then rescale (see `_rescaled`)."""
    return _rescaled(
        inputs,
        [
            _masked(inputs, _below(i, round(d * _RANDOM)), d)
            for i, d in enumerate(inputs.each("density"))
        ],
    )


def _below(index: int, limit: int) -> Mask:
    return lambda delta, block: block.bits(index) < limit


def by_rank(inputs: Inputs) -> list[Prune]:
    """Keep an entry with a probability that rises linearly with its rank by magnitude inside its row, from
    density - epsilon to density + epsilon (Deep et al. 2024, sec. 3.1), then rescale."""
    settings = enumerate(zip(inputs.each("density"), inputs.each("epsilon"), strict=True))
    return _rescaled(
        inputs, [_masked(inputs, _ranked(i, d, e, inputs.matrix_shape[1]), d) for i, (d, e) in settings]
    )


def _ranked(index: int, density: float, epsilon: float, columns: int) -> Mask:
    """u below the probability of rank r, said the other way round: the magnitude at least that of the rank that u asks for.

    A negative epsilon prefers the small: ranks then count from the largest. A row of one entry has no ranks.
    """
    drawn = (np.arange(_RANDOM) + 0.5) / _RANDOM
    turned, epsilon = epsilon < 0, abs(epsilon)
    step = (
        2 * epsilon / (columns - 1) if columns > 1 else 0.0
    )  # rank r (0 the smallest) is kept at density - epsilon + step r
    asked = (
        np.floor((drawn - (density - epsilon)) / step) + 1
        if step > 0
        else np.where(drawn < density, 0, columns)
    )
    asked = np.clip(asked, 0, columns).astype(np.int32)  # the number of ranks too small for u
    limit = int(np.searchsorted(asked, columns))  # from here on no rank is large enough

    def mask(delta: torch.Tensor, block: Block) -> np.ndarray:
        magnitudes, bits = _distinct(delta), block.bits(index)
        if turned:
            magnitudes = np.iinfo(np.int32).max - magnitudes
        ordered = np.sort(magnitudes, axis=1).reshape(-1)
        places = asked.take(bits, mode="clip").reshape(magnitudes.shape)
        places += np.arange(len(places), dtype=np.int32)[:, None] * columns
        kept: np.ndarray = magnitudes >= ordered.take(places, mode="clip")
        return kept.reshape(-1) & (bits < limit)

    return mask


def _distinct(delta: torch.Tensor) -> np.ndarray:
    """Magnitudes as whole numbers of the same order, the last eight bits replaced by the place in the row.

    Deltas of bfloat16 weights often have equal magnitudes; without this, all of them would share one rank.
    """
    bits: np.ndarray = delta.cpu().numpy().view(np.int32)
    places = (np.arange(delta.shape[1], dtype=np.int64) * 151 % 256).astype(np.int32)
    distinct: np.ndarray = (bits & np.int32(0x7FFFFF00)) | places
    return distinct


def _masked(inputs: Inputs, mask: Mask, density: float) -> Prune:
    """Zero what a random mask does not keep."""
    if density >= 1:
        return lambda delta, block: delta
    if density <= 0:
        return lambda delta, block: delta.zero_()
    select = masked(inputs, mask, remember=inputs.options["rescale"] is True)
    return lambda delta, block: select([delta], block)[0]


def masked(
    inputs: Inputs, mask: Mask, remember: bool
) -> Callable[[list[torch.Tensor], Block], list[torch.Tensor]]:
    """A function that zeroes, in place, what `mask` (of the first tensor) does not keep.

    remember: masks are kept, packed, from the pass that measures to the pass that merges, which asks for the same blocks.
    """
    remembered: dict[tuple[int, int], np.ndarray] = {}

    def select(tensors: list[torch.Tensor], block: Block) -> list[torch.Tensor]:
        place, size = (block.first, block.end), tensors[0].numel()
        if place in remembered:
            kept = np.unpackbits(remembered.pop(place), count=size).view(np.bool_)
        else:
            kept = mask(tensors[0], block)
            if remember and inputs.size <= _REMEMBER:
                remembered[place] = np.packbits(kept)
        factors = kept.astype(np.float32)
        for tensor in tensors:
            if tensor.device.type == "cpu":
                flat = tensor.numpy().reshape(-1)
                np.multiply(flat, factors, out=flat)
            else:
                tensor.mul_(torch.from_numpy(factors).to(tensor.device).view_as(tensor))
        return tensors

    return select


def _rescaled(inputs: Inputs, prunes: Sequence[Prune]) -> list[Prune]:
    """Each of `prunes`, then scaled: `rescale: true` restores the tensor's L1 norm, as mergekit does; `inverse_density`
    divides by the density, as the DARE paper does. What keeps everything is not scaled."""
    rescale = inputs.options["rescale"]
    sparse = [i for i, density in enumerate(inputs.each("density")) if density < 1]
    if rescale is False or not sparse:
        return list(prunes)
    if rescale == "inverse_density":
        factors = {
            i: 1 / inputs.each("density")[i] for i in sparse if inputs.each("density")[i] > 0
        }
    else:
        factors = _norm_ratios(inputs, prunes, [i for i in sparse if inputs.each("weight")[i] != 0])
    return [_scaled(prune, factors[i]) if i in factors else prune for i, prune in enumerate(prunes)]


def _norm_ratios(
    inputs: Inputs, prunes: Sequence[Prune], indices: Sequence[int]
) -> dict[int, float]:
    """L1 norm of each delta before pruning over that after it."""
    before, after = dict.fromkeys(indices, 0.0), dict.fromkeys(indices, 0.0)
    for block in inputs.blocks():
        for i in indices:
            magnitudes = block.delta(i).abs_()
            before[i] += magnitudes.sum().item()
            after[i] += prunes[i](magnitudes, block).sum().item()
    return {i: before[i] / after[i] for i in indices if min(before[i], after[i]) >= 1e-7}


def _scaled(prune: Prune, factor: float) -> Prune:
    return lambda delta, block: prune(delta, block).mul_(factor)
