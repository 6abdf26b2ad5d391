"""Sparsification of deltas: by magnitude, without outliers, at random (DARE), by rank (DELLA).

Each function reads a whole tensor at most a few times and returns one `Sparsifier` per source.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from paretomerge.merging.block import Block, Inputs
from paretomerge.merging.methods.top_k import (
    Magnitude,
    Query,
    Threshold,
    top_k_thresholds,
)

BoolArray = NDArray[np.bool_]
Int32Array = NDArray[np.int32]
UInt8Array = NDArray[np.uint8]

Sparsifier = Callable[[Tensor, Block], Tensor]
"""(a delta's rows, which it may write to; their block) -> the sparse delta."""

EntryMask = Callable[[Tensor, Block], BoolArray]
"""(a tensor's rows; their block) -> True for entries that stay, flat."""

RankRange = tuple[int, int]
"""Ranks [first, end) by magnitude, the largest being 0."""

_MASK_CACHE_LIMIT = 1 << 28  # entries: 32 MB of packed mask per source
_RANDOM_RANGE = 65_536  # random integers are below this
_MIN_NORM = 1e-7  # no delta is rescaled by the ratio of a smaller norm


def top_magnitudes(inputs: Inputs) -> list[Sparsifier]:
    """Keep the floor(d n) entries of largest magnitude, of equal ones the first.

    At least one entry is kept unless d is 0, as mergekit does: a norm or a bias may be smaller
    than 1 / d. Yadav et al. 2023 (TIES), sec. 3, "trim". d is the source's `density`.
    """
    n = inputs.numel
    ranges: list[RankRange] = []
    for density in inputs.per_source("density"):
        least = 1 if density > 0 else 0
        count = max(least, int(density * n))
        ranges.append((0, count))
    return _keep_ranks(inputs, ranges)


def without_outliers(inputs: Inputs) -> list[Sparsifier]:
    """Drop the floor(gamma n) entries of largest magnitude and keep the floor(d n) after them.

    The density comes first: where both do not fit, fewer outliers are dropped. Davari and
    Belilovsky 2024 (Model Breadcrumbs), sec. 3. gamma is the source's `gamma`, d its `density`.
    """
    n = inputs.numel
    ranges: list[RankRange] = []
    densities = inputs.per_source("density")
    gammas = inputs.per_source("gamma")
    for density, gamma in zip(densities, gammas, strict=True):
        count = int(density * n)
        first = min(int(gamma * n), n - count)
        ranges.append((first, first + count))
    return _keep_ranks(inputs, ranges)


def _keep_ranks(inputs: Inputs, ranges: Sequence[RankRange]) -> list[Sparsifier]:
    """Keep each source's entries whose rank by magnitude is in its range, and rescale."""
    thresholds = _thresholds(inputs, ranges)
    sparsifiers: list[Sparsifier] = []
    for i, (first, end) in enumerate(ranges):
        if first == end:
            sparsifiers.append(_zero)
            continue
        lower = thresholds.get((i, end))
        upper = thresholds.get((i, first))
        sparsifiers.append(_keep_between(lower, upper))
    return _rescaled(inputs, sparsifiers)


def _thresholds(
    inputs: Inputs,
    ranges: Sequence[RankRange],
) -> dict[tuple[int, int], Threshold]:
    """(source, k) -> the threshold of its k largest entries, for both ends of each source's ranks.

    An end at rank 0 or n has no threshold, nor has an empty range.
    """
    # All thresholds are found in the same passes.
    queries: dict[tuple[int, int], Query] = {}
    for i, (first, end) in enumerate(ranges):
        magnitude = _delta_magnitude(i)
        for k in (end, first):
            if first < end and 0 < k < inputs.numel:
                queries[i, k] = Query(magnitude, k)
    if not queries:
        return {}
    thresholds = top_k_thresholds(inputs, list(queries.values()))
    return dict(zip(queries, thresholds, strict=True))


def _delta_magnitude(index: int) -> Magnitude:
    """|tau_i|."""

    def magnitude(block: Block) -> Tensor:
        return block.delta(index).abs_()

    return magnitude


def _keep_between(lower: Threshold | None, upper: Threshold | None) -> Sparsifier:
    """Keep what `lower` keeps and `upper` does not keep; None keeps all, or nothing."""

    def sparsify(delta: Tensor, block: Block) -> Tensor:
        if lower is not None:
            lower.keep_(delta, block.start)
        if upper is None:
            return delta
        outliers = upper.keep_(delta.clone(), block.start)
        return delta.sub_(outliers)

    return sparsify


def _zero(delta: Tensor, block: Block) -> Tensor:
    return delta.zero_()


def _unchanged(delta: Tensor, block: Block) -> Tensor:
    return delta


def random_drop(inputs: Inputs) -> list[Sparsifier]:
    """Keep each entry with probability d, then rescale (see `_rescaled`).

    Yu et al. 2024 (DARE), sec. 3.
    """
    sparsifiers = []
    for i, density in enumerate(inputs.per_source("density")):
        mask = _random_mask(i, density)
        sparsifiers.append(_masked_sparsifier(inputs, mask, density))
    return _rescaled(inputs, sparsifiers)


def _random_mask(index: int, density: float) -> EntryMask:
    limit = round(density * _RANDOM_RANGE)

    def mask(delta: Tensor, block: Block) -> BoolArray:
        return block.random_uint16(index) < limit

    return mask


def magprune(inputs: Inputs) -> list[Sparsifier]:
    """Keep an entry with a probability that rises linearly with its rank in its row, then rescale.

    Deep et al. 2024 (DELLA), sec. 3.1, "MAGPRUNE". The smallest magnitude of a row is kept with
    probability d - epsilon, the largest with d + epsilon.
    """
    densities = inputs.per_source("density")
    epsilons = inputs.per_source("epsilon")
    sparsifiers = []
    for i, density in enumerate(densities):
        mask = _magprune_mask(i, density, epsilons[i], inputs.columns)
        sparsifiers.append(_masked_sparsifier(inputs, mask, density))
    return _rescaled(inputs, sparsifiers)


def _magprune_mask(
    index: int,
    density: float,
    epsilon: float,
    columns: int,
) -> EntryMask:
    """MAGPRUNE for one source.

    An entry of rank r (0 is the smallest) is kept if its random number u is below
    p_r = d - epsilon + 2 epsilon r / (columns - 1). Equivalently: u asks for a least rank, and the
    entry stays if its magnitude is at least the magnitude of that rank. This needs a sort of each
    row, but no ranks. A negative epsilon prefers small entries: ranks then count from the largest.
    """
    prefers_small = epsilon < 0
    least_rank = _least_rank_by_random_integer(density, abs(epsilon), columns)
    end_integer = int(
        np.searchsorted(least_rank, columns)
    )  # from here on no rank is large enough

    def mask(delta: Tensor, block: Block) -> BoolArray:
        random = block.random_uint16(index)
        magnitudes = _distinct_magnitudes(delta)
        if prefers_small:
            magnitudes = np.iinfo(np.int32).max - magnitudes
        sorted_rows = np.sort(magnitudes, axis=1).reshape(-1)
        # Position of each entry's least rank in the sorted rows
        positions = least_rank.take(random, mode="clip")
        positions = positions.reshape(magnitudes.shape)
        rows = np.arange(len(positions), dtype=np.int32)
        positions += rows[:, None] * columns
        is_large = magnitudes >= sorted_rows.take(positions, mode="clip")
        has_rank = random < end_integer
        return is_large.reshape(-1) & has_rank

    return mask


def _least_rank_by_random_integer(
    density: float,
    epsilon: float,
    columns: int,
) -> Int32Array:
    """For each random integer u the least rank r with p_r > u, or `columns` if there is none."""
    integers = np.arange(_RANDOM_RANGE)
    u = (integers + 0.5) / _RANDOM_RANGE
    step = 0.0
    if columns > 1:
        step = 2 * epsilon / (columns - 1)
    if step > 0:
        lowest = density - epsilon
        # p_r > u where r > (u - (d - epsilon)) / step
        ranks = np.floor((u - lowest) / step) + 1
    else:
        # Every rank has the probability d. A row of one entry has no ranks.
        ranks = np.where(u < density, 0, columns)
    ranks = np.clip(ranks, 0, columns)
    return np.asarray(ranks.astype(np.int32))


def _distinct_magnitudes(delta: Tensor) -> Int32Array:
    """Integers in the order of the magnitudes, no two alike among neighbours.

    The last eight bits are replaced by the place in the row. Deltas of bfloat16 weights often have
    equal magnitudes. Without this, these would share one rank.
    """
    # Non-negative floats are ordered like their bits; the mask removes the sign.
    bits: Int32Array = delta.cpu().numpy().view(np.int32)
    columns = np.arange(delta.shape[1], dtype=np.int64)
    # 151 is odd: neighbours get places far apart, and 256 columns get 256 different ones.
    places = (columns * 151 % 256).astype(np.int32)
    magnitude_bits = bits & np.int32(0x7FFFFF00)
    return np.asarray(magnitude_bits | places)


def _masked_sparsifier(
    inputs: Inputs,
    mask: EntryMask,
    density: float,
) -> Sparsifier:
    """Set what a random mask does not keep to zero."""
    if density >= 1:
        return _unchanged
    if density <= 0:
        return _zero
    # Rescaling to the norm reads the tensor once more with the same mask.
    reads_twice = inputs.options["rescale"] is True
    block_mask = BlockMask(inputs, mask, cached=reads_twice)

    def sparsify(delta: Tensor, block: Block) -> Tensor:
        return block_mask.apply_([delta], block)[0]

    return sparsify


class BlockMask:
    """A mask of a tensor's entries, computed block by block.

    Args:
        inputs: The tensor.
        mask: Computes the mask of a block.
        cached: Whether the masks of the pass that measures are kept, packed, until the pass that
            merges asks for the same blocks.
    """

    def __init__(
        self,
        inputs: Inputs,
        mask: EntryMask,
        cached: bool,
    ) -> None:
        self._mask = mask
        self._cached = cached and inputs.numel <= _MASK_CACHE_LIMIT
        # (first row, end row) -> the packed mask of a block
        self._packed: dict[tuple[int, int], UInt8Array] = {}

    def apply_(
        self,
        tensors: list[Tensor],
        block: Block,
    ) -> list[Tensor]:
        """Set masked entries to zero, in place, in all tensors; the first one decides the mask."""
        entries = self._entries(tensors[0], block)
        factors = entries.astype(np.float32)
        for tensor in tensors:
            if tensor.device.type == "cpu":
                # numpy multiplies in place without the cost of a torch call.
                flat = tensor.numpy().reshape(-1)
                np.multiply(flat, factors, out=flat)
            else:
                on_device = torch.from_numpy(factors).to(tensor.device)
                tensor.mul_(on_device.view_as(tensor))
        return tensors

    def _entries(self, tensor: Tensor, block: Block) -> BoolArray:
        rows = (block.first, block.end)
        # Each mask is needed twice at most, so the second use frees it.
        if rows in self._packed:
            packed = self._packed.pop(rows)
            bits = np.unpackbits(packed, count=tensor.numel())
            return bits.view(np.bool_)
        entries = self._mask(tensor, block)
        if self._cached:
            self._packed[rows] = np.packbits(entries)
        return entries


def _rescaled(inputs: Inputs, sparsifiers: Sequence[Sparsifier]) -> list[Sparsifier]:
    """The sparsifiers, each followed by a factor.

    `rescale: true` restores the tensor's L1 norm, as mergekit does. `rescale: inverse_density`
    divides by d, as the DARE paper does. A source that keeps everything is not scaled.
    """
    rescale = inputs.options["rescale"]
    densities = inputs.per_source("density")
    sources = range(inputs.n_sources)
    sparse = [i for i in sources if densities[i] < 1]
    if rescale is False or not sparse:
        return list(sparsifiers)
    if rescale == "inverse_density":
        nonempty = [i for i in sparse if densities[i] > 0]
        factors = {i: 1 / densities[i] for i in nonempty}
    else:
        # A source of weight 0 is not read.
        weights = inputs.per_source("weight")
        used = [i for i in sparse if weights[i] != 0]
        factors = _norm_ratios(inputs, sparsifiers, used)
    rescaled = list(sparsifiers)
    for i, factor in factors.items():
        rescaled[i] = _scaled(sparsifiers[i], factor)
    return rescaled


def _norm_ratios(
    inputs: Inputs,
    sparsifiers: Sequence[Sparsifier],
    indices: Sequence[int],
) -> dict[int, float]:
    """L1 norm of each delta over that of the sparse delta."""
    dense_norms = dict.fromkeys(indices, 0.0)
    sparse_norms = dict.fromkeys(indices, 0.0)
    for block in inputs.blocks():
        for i in indices:
            magnitudes = block.delta(i).abs_()
            dense_norms[i] += magnitudes.sum().item()
            sparse_magnitudes = sparsifiers[i](magnitudes, block)
            sparse_norms[i] += sparse_magnitudes.sum().item()
    ratios = {}
    for i in indices:
        smaller = min(dense_norms[i], sparse_norms[i])
        if smaller >= _MIN_NORM:
            ratios[i] = dense_norms[i] / sparse_norms[i]
    return ratios


def _scaled(sparsifier: Sparsifier, factor: float) -> Sparsifier:
    def sparsify(delta: Tensor, block: Block) -> Tensor:
        return sparsifier(delta, block).mul_(factor)

    return sparsify
