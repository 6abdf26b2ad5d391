"""Sparsification of deltas: by magnitude, without outliers, at random (DARE), by rank (DELLA).

Each function reads a whole tensor at most a few times and returns one `Sparsifier` per source.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from paretomerge.merging.block import Block, Inputs
from paretomerge.merging.methods.top_k import Magnitude, Query, Threshold, top_k_thresholds

Sparsifier = Callable[[torch.Tensor, Block], torch.Tensor]
"""(a delta's rows, which it may write to; their block) -> the sparse delta."""

EntryMask = Callable[[torch.Tensor, Block], NDArray[np.bool_]]
"""(a tensor's rows; their block) -> True for entries that stay, flat."""

_MASK_CACHE_LIMIT = 1 << 28  # entries: 32 MB of packed mask per source
_RANDOM_RANGE = 65_536  # random integers are below this
_MIN_NORM = 1e-7  # no delta is rescaled by the ratio of a smaller norm


def top_magnitudes(inputs: Inputs) -> list[Sparsifier]:
    """Keep the floor(d n) entries of largest magnitude, of equal ones the first.

    Yadav et al. 2023 (TIES), sec. 3, "trim". d is the source's `density`.
    """
    return _by_magnitude(inputs, [0] * len(inputs.sources))


def without_outliers(inputs: Inputs) -> list[Sparsifier]:
    """Drop the floor(gamma n) entries of largest magnitude and keep the floor(d n) after them.

    Davari and Belilovsky 2024 (Model Breadcrumbs), sec. 3.
    """
    outliers = [int(gamma * inputs.numel) for gamma in inputs.per_source("gamma")]
    return _by_magnitude(inputs, outliers)


def _by_magnitude(inputs: Inputs, outliers: Sequence[int]) -> list[Sparsifier]:
    """Drop each source's `outliers` largest entries, keep the floor(d n) after them, and rescale.

    The density comes first: where both do not fit, fewer outliers are dropped.
    """
    n = inputs.numel
    counts = [int(density * n) for density in inputs.per_source("density")]
    dropped = [min(top, n - count) for top, count in zip(outliers, counts, strict=True)]
    # (source, k) -> the query for its k largest; all thresholds are found in the same passes.
    queries: dict[tuple[int, int], Query] = {}
    for i, (count, top) in enumerate(zip(counts, dropped, strict=True)):
        magnitude = _delta_magnitude(i)
        for k in (top + count, top):
            if count > 0 and 0 < k < n:
                queries[i, k] = Query(magnitude, k)
    found = top_k_thresholds(inputs, list(queries.values())) if queries else []
    thresholds = dict(zip(queries, found, strict=True))
    sparsifiers = []
    for i, (count, top) in enumerate(zip(counts, dropped, strict=True)):
        lower = thresholds.get((i, top + count))
        upper = thresholds.get((i, top))
        sparsifiers.append(_keep_between(lower, upper) if count > 0 else _zero)
    return _rescaled(inputs, sparsifiers)


def _delta_magnitude(index: int) -> Magnitude:
    """|tau_i|."""

    def magnitude(block: Block) -> torch.Tensor:
        return block.delta(index).abs_()

    return magnitude


def _keep_between(lower: Threshold | None, upper: Threshold | None) -> Sparsifier:
    """Keep what `lower` keeps and `upper` does not keep; None keeps all, or nothing."""

    def sparsify(delta: torch.Tensor, block: Block) -> torch.Tensor:
        if lower is not None:
            lower.keep_(delta, block.start)
        if upper is None:
            return delta
        outliers = upper.keep_(delta.clone(), block.start)
        return delta.sub_(outliers)

    return sparsify


def _zero(delta: torch.Tensor, block: Block) -> torch.Tensor:
    return delta.zero_()


def _unchanged(delta: torch.Tensor, block: Block) -> torch.Tensor:
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

    def mask(delta: torch.Tensor, block: Block) -> NDArray[np.bool_]:
        return block.random_uint16(index) < limit

    return mask


def magprune(inputs: Inputs) -> list[Sparsifier]:
    """Keep an entry with a probability that rises linearly with its rank in its row, then rescale.

    Deep et al. 2024 (DELLA), sec. 3.1, "MAGPRUNE". The smallest magnitude of a row is kept with
    probability d - epsilon, the largest with d + epsilon.
    """
    columns = inputs.extent[1]
    densities, epsilons = inputs.per_source("density"), inputs.per_source("epsilon")
    sparsifiers = []
    for i, (density, epsilon) in enumerate(zip(densities, epsilons, strict=True)):
        mask = _magprune_mask(i, density, epsilon, columns)
        sparsifiers.append(_masked_sparsifier(inputs, mask, density))
    return _rescaled(inputs, sparsifiers)


def _magprune_mask(index: int, density: float, epsilon: float, columns: int) -> EntryMask:
    """MAGPRUNE for one source.

    An entry of rank r (0 is the smallest) is kept if its random number u is below
    p_r = d - epsilon + 2 epsilon r / (columns - 1). Equivalently: u asks for a least rank, and the
    entry stays if its magnitude is at least the magnitude of that rank. This needs a sort of each
    row, but no ranks. A negative epsilon prefers small entries: ranks then count from the largest.
    """
    prefers_small = epsilon < 0
    least_rank = _least_rank_by_random_integer(density, abs(epsilon), columns)
    end_integer = int(np.searchsorted(least_rank, columns))  # from here on no rank is large enough

    def mask(delta: torch.Tensor, block: Block) -> NDArray[np.bool_]:
        random = block.random_uint16(index)
        magnitudes = _distinct_magnitudes(delta)
        if prefers_small:
            magnitudes = np.iinfo(np.int32).max - magnitudes
        sorted_rows = np.sort(magnitudes, axis=1).reshape(-1)
        positions = least_rank.take(random, mode="clip").reshape(magnitudes.shape)
        positions += np.arange(len(positions), dtype=np.int32)[:, None] * columns
        is_large = magnitudes >= sorted_rows.take(positions, mode="clip")
        return is_large.reshape(-1) & (random < end_integer)

    return mask


def _least_rank_by_random_integer(
    density: float, epsilon: float, columns: int
) -> NDArray[np.int32]:
    """For each random integer u the least rank r with p_r > u, or `columns` if there is none."""
    u = (np.arange(_RANDOM_RANGE) + 0.5) / _RANDOM_RANGE
    step = 2 * epsilon / (columns - 1) if columns > 1 else 0.0
    if step > 0:
        ranks = np.floor((u - (density - epsilon)) / step) + 1
    else:
        ranks = np.where(u < density, 0, columns)
    return np.asarray(np.clip(ranks, 0, columns).astype(np.int32))


def _distinct_magnitudes(delta: torch.Tensor) -> NDArray[np.int32]:
    """Integers in the order of the magnitudes, no two alike among neighbours.

    The last eight bits are replaced by the place in the row. Deltas of bfloat16 weights often have
    equal magnitudes. Without this, these would share one rank.
    """
    bits: NDArray[np.int32] = delta.cpu().numpy().view(np.int32)
    columns = np.arange(delta.shape[1], dtype=np.int64)
    # 151 is odd: neighbours get places far apart, and 256 columns get 256 different ones.
    places = (columns * 151 % 256).astype(np.int32)
    magnitude_bits = bits & np.int32(0x7FFFFF00)
    return np.asarray(magnitude_bits | places)


def _masked_sparsifier(inputs: Inputs, mask: EntryMask, density: float) -> Sparsifier:
    """Set what a random mask does not keep to zero."""
    if density >= 1:
        return _unchanged
    if density <= 0:
        return _zero
    # Rescaling to the norm reads the tensor once more with the same mask.
    block_mask = BlockMask(inputs, mask, cached=inputs.options["rescale"] is True)

    def sparsify(delta: torch.Tensor, block: Block) -> torch.Tensor:
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

    def __init__(self, inputs: Inputs, mask: EntryMask, cached: bool) -> None:
        self._mask = mask
        self._cached = cached and inputs.numel <= _MASK_CACHE_LIMIT
        self._packed: dict[tuple[int, int], NDArray[np.uint8]] = {}

    def apply_(self, tensors: list[torch.Tensor], block: Block) -> list[torch.Tensor]:
        """Set masked entries to zero, in place, in all tensors; the first one decides the mask."""
        factors = self._entries(tensors[0], block).astype(np.float32)
        for tensor in tensors:
            if tensor.device.type == "cpu":
                flat = tensor.numpy().reshape(-1)
                np.multiply(flat, factors, out=flat)
            else:
                tensor.mul_(torch.from_numpy(factors).to(tensor.device).view_as(tensor))
        return tensors

    def _entries(self, tensor: torch.Tensor, block: Block) -> NDArray[np.bool_]:
        rows = (block.first, block.end)
        if rows in self._packed:
            packed = self._packed.pop(rows)
            return np.unpackbits(packed, count=tensor.numel()).view(np.bool_)
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
    sparse = [i for i, density in enumerate(densities) if density < 1]
    if rescale is False or not sparse:
        return list(sparsifiers)
    if rescale == "inverse_density":
        factors = {i: 1 / densities[i] for i in sparse if densities[i] > 0}
    else:
        weights = inputs.per_source("weight")
        used = [i for i in sparse if weights[i] != 0]
        factors = _norm_ratios(inputs, sparsifiers, used)
    rescaled = list(sparsifiers)
    for i, factor in factors.items():
        rescaled[i] = _scaled(sparsifiers[i], factor)
    return rescaled


def _norm_ratios(
    inputs: Inputs, sparsifiers: Sequence[Sparsifier], indices: Sequence[int]
) -> dict[int, float]:
    """L1 norm of each delta over that of the sparse delta."""
    dense_norms, sparse_norms = dict.fromkeys(indices, 0.0), dict.fromkeys(indices, 0.0)
    for block in inputs.blocks():
        for i in indices:
            magnitudes = block.delta(i).abs_()
            dense_norms[i] += magnitudes.sum().item()
            sparse_norms[i] += sparsifiers[i](magnitudes, block).sum().item()
    ratios = {}
    for i in indices:
        if min(dense_norms[i], sparse_norms[i]) >= _MIN_NORM:
            ratios[i] = dense_norms[i] / sparse_norms[i]
    return ratios


def _scaled(sparsifier: Sparsifier, factor: float) -> Sparsifier:
    def sparsify(delta: torch.Tensor, block: Block) -> torch.Tensor:
        return sparsifier(delta, block).mul_(factor)

    return sparsify
