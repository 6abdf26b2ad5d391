"""The exact k-th largest magnitude of a tensor that is read block by block, without a sort.

This is Floyd and Rivest's selection (1975, CACM 18(3)). A sorted sample gives a bracket for the
value. One pass counts the entries above the bracket and collects those inside, a few per cent of
all. The rest is a selection among the collected. Of entries with equal magnitudes the first counts
as larger.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from paretomerge.merging.block import Block, Inputs

Magnitude = Callable[[Block], Tensor]
"""A block -> what its entries are ranked by: (rows, columns), not negative."""

Magnitudes = NDArray[np.float32]
BoolArray = NDArray[np.bool_]

_BELOW_ALL = np.float32(-1)
_ABOVE_ALL = np.float32(np.inf)
_ZERO = np.float32(0)
_DIRECT_LIMIT = 1 << 17  # tensors of up to so many entries are collected whole
_SAMPLE_SIZE = 1 << 17
_MAX_MISSES = 3  # after so many wrong brackets the sample is not used any more
_MIN_SAMPLE = 256  # a part of the sample with fewer entries gives no bracket


class Query(NamedTuple):
    """Asks for the threshold of the `k` largest entries by `magnitude`, 0 < k <= n."""

    magnitude: Magnitude
    k: int


class Bracket(NamedTuple):
    """The magnitudes from `low` to `high`, both included."""

    low: np.float32
    high: np.float32


@dataclass(frozen=True)
class Threshold:
    """Separates the k largest entries of a tensor from the others.

    Attributes:
        value: Entries with a larger magnitude are among the k largest.
        last: Flat position of the last entry that has exactly this magnitude and is among them.
    """

    value: float
    last: int

    def keep_(self, values: Tensor, start: int) -> Tensor:
        """Set entries that are not among the k largest to zero, in place.

        Args:
            values: A block of the tensor, signed.
            start: Flat position of its first entry.

        Returns:
            `values`.
        """
        # hardshrink zeroes |x| <= lambda: the next smaller float keeps entries that are equal to
        # the value.
        value = np.float32(self.value)
        below_value = float(np.nextafter(value, np.float32(-1)))
        flat = values.view(-1)
        # Entries up to `last` stay if they are equal to the value, those after it do not.
        inclusive = max(self.last + 1 - start, 0)
        before = flat[:inclusive]
        after = flat[inclusive:]
        if before.numel() and below_value >= 0:
            torch.hardshrink(before, below_value, out=before)
        if after.numel():
            torch.hardshrink(after, self.value, out=after)
        return values


def top_k_thresholds(inputs: Inputs, queries: Sequence[Query]) -> list[Threshold]:
    """Find the threshold of each query. All queries share the passes, so the base is read once.

    Args:
        inputs: The tensor.
        queries: What to select. Queries with the same `magnitude` object compute it once per block.

    Returns:
        For each query the threshold that keeps exactly k entries. Zeros are all alike: which of
        them are among the k makes no difference.
    """
    blocks = list(inputs.blocks())
    if inputs.numel <= _DIRECT_LIMIT:
        thresholds = []
        collected = _every_nth(queries, blocks, 1)
        for query, values in zip(queries, collected, strict=True):
            thresholds.append(_threshold_among(values, query.k))
        return thresholds
    samples = _sorted_samples(queries, blocks, inputs.numel)
    searches = []
    for query, sample in zip(queries, samples, strict=True):
        searches.append(_Search(query, sample, above_floor=inputs.numel))
    unfinished = searches
    while unfinished:
        # Each pass reads the tensor once for all searches.
        _search_pass(blocks, unfinished)
        unfinished = [search for search in unfinished if search.threshold is None]
    return [search.threshold for search in searches if search.threshold is not None]


def _search_pass(blocks: Sequence[Block], searches: "Sequence[_Search]") -> None:
    """Look for the threshold of each search inside its next bracket."""
    brackets = [search.next_bracket() for search in searches]
    magnitudes = [search.query.magnitude for search in searches]
    counted = _count_pass(blocks, magnitudes, brackets)
    for i, search in enumerate(searches):
        above, inside = counted[i]
        rank = search.query.k - above
        if 0 < rank <= inside.count:
            search.threshold = inside.threshold(rank, blocks, search.query.magnitude)
        else:
            search.exclude(brackets[i], above, inside.count)


def _sorted_samples(
    queries: Sequence[Query],
    blocks: Sequence[Block],
    n: int,
) -> list[Magnitudes]:
    """A sorted sample of each query's magnitudes: some entries of equidistant blocks."""
    sampled_count = max(4, len(blocks) // 64)
    distance = -(-len(blocks) // sampled_count)
    sampled = blocks[::distance]
    entries = sum(block.numel for block in sampled)
    sample_size = max(_SAMPLE_SIZE, n // 128)
    step = max(1, entries // sample_size)
    return [np.sort(sample) for sample in _every_nth(queries, sampled, step)]


@dataclass
class _Search:
    """Where the k-th largest magnitude must be: above `floor` and below `ceiling`.

    Attributes:
        query: What is searched.
        sample: A sorted sample of the magnitudes.
        above_floor: The number of entries above the floor.
        from_ceiling: The number of entries at the ceiling or above.
        misses: The number of brackets that did not contain the value.
        threshold: The result, once it is found.
    """

    query: Query
    sample: Magnitudes
    above_floor: int
    from_ceiling: int = 0
    misses: int = 0
    floor: np.float32 = _BELOW_ALL
    ceiling: np.float32 = _ABOVE_ALL
    threshold: Threshold | None = None

    def next_bracket(self) -> Bracket:
        """The bracket of the next pass; the whole interval where the sample says too little."""
        sample = self.sample
        sample = sample[sample > self.floor]
        sample = sample[sample < self.ceiling]
        if len(sample) < _MIN_SAMPLE or self.misses == _MAX_MISSES:
            return Bracket(max(self.floor, _ZERO), self.ceiling)
        n = self.above_floor - self.from_ceiling
        k = self.query.k - self.from_ceiling
        low, high = _bracket(sample, n, k)
        # What earlier passes excluded stays excluded.
        low = max(low, self.floor)
        high = min(high, self.ceiling)
        return Bracket(low, high)

    def exclude(
        self,
        bracket: Bracket,
        above: int,
        inside: int,
    ) -> None:
        """Exclude a bracket, from the numbers of entries above it and inside it."""
        self.misses += 1
        if self.query.k <= above:
            self.floor = bracket.high
            self.above_floor = above
        else:
            self.ceiling = bracket.low
            self.from_ceiling = above + inside


def _bracket(
    sample: Magnitudes,
    n: int,
    k: int,
) -> Bracket:
    """Where the k-th largest of n entries most likely is, by a sorted sample of them.

    Returns:
        Two values of the sample; twice the same where many entries share it.
    """
    m = len(sample)
    # Where in the sample, in increasing order, the value is expected
    place = m - k / n * m
    likely_place = max(int(place), 0)
    likely = sample[min(likely_place, m - 1)]
    first_equal = np.searchsorted(sample, likely, "left")
    end_equal = np.searchsorted(sample, likely, "right")
    # The rank in the sample is binomial, with variance m p (1 - p) and p = k / n. The bracket
    # spans four standard errors, and a margin because the rows of a tensor differ.
    share = k / n
    variance = m * k / n * (1 - share)
    slack = 4 * variance**0.5 + 0.005 * m
    if end_equal - first_equal > slack:
        return Bracket(likely, likely)
    low, high = _ZERO, _ABOVE_ALL
    if place - slack >= 0:
        low = sample[int(place - slack)]
    if place + slack < m:
        high = sample[int(place + slack)]
    return Bracket(low, high)


class _EntriesInside:
    """The entries of a tensor that are inside a bracket: values and positions, block by block."""

    def __init__(self, bracket: Bracket) -> None:
        self.count = 0
        self._low = bracket.low
        self._values: list[Magnitudes] = []
        self._positions: list[NDArray[np.uint32]] = []

    def add_block(self, magnitudes: Magnitudes, is_above: BoolArray) -> None:
        """Collect a block's entries; is_above: those above the bracket."""
        is_inside = (magnitudes >= self._low) ^ is_above
        positions = np.flatnonzero(is_inside)
        self.count += len(positions)
        self._values.append(magnitudes[positions])
        # Positions inside a block fit 32 bits, which halves the memory.
        self._positions.append(positions.astype(np.uint32))

    def threshold(
        self,
        k: int,
        blocks: Sequence[Block],
        magnitude: Magnitude,
    ) -> Threshold:
        """The threshold of the `k` largest of these."""
        values = np.concatenate(self._values)
        rank = len(values) - k
        value = np.partition(values, rank)[rank]
        is_above = values > value
        equal = k - int(np.count_nonzero(is_above))
        for block, block_values, positions in zip(
            blocks, self._values, self._positions, strict=True
        ):
            equal_positions = positions[block_values == value]
            if equal <= len(equal_positions):
                last = int(equal_positions[equal - 1])
                return Threshold(float(value), block.start + last)
            equal -= len(equal_positions)
        raise AssertionError("the entries with this value were counted before")


class _EqualEntries:
    """The entries of a tensor that share one value: their number in each block."""

    def __init__(self, bracket: Bracket) -> None:
        self.count = 0
        self._value = bracket.low
        self._counts: list[int] = []

    def add_block(self, magnitudes: Magnitudes, is_above: BoolArray) -> None:
        """Count a block's entries."""
        count = int(np.count_nonzero(magnitudes == self._value))
        self.count += count
        self._counts.append(count)

    def threshold(
        self,
        k: int,
        blocks: Sequence[Block],
        magnitude: Magnitude,
    ) -> Threshold:
        """The threshold of the first `k` of these."""
        if self._value == 0:
            return Threshold(0.0, -1)
        for block, count in zip(blocks, self._counts, strict=True):
            if k <= count:
                (magnitudes,) = _flat_magnitudes(block, [magnitude])
                positions = np.flatnonzero(magnitudes == self._value)
                last = int(positions[k - 1])
                return Threshold(float(self._value), block.start + last)
            k -= count
        raise AssertionError("the entries with this value were counted before")


def _count_pass(
    blocks: Sequence[Block],
    magnitudes: Sequence[Magnitude],
    brackets: Sequence[Bracket],
) -> list[tuple[int, _EntriesInside | _EqualEntries]]:
    """In one pass, count the entries above each bracket and collect those inside."""
    above = [0] * len(brackets)
    inside: list[_EntriesInside | _EqualEntries] = []
    for bracket in brackets:
        if bracket.low == bracket.high:
            inside.append(_EqualEntries(bracket))
        else:
            inside.append(_EntriesInside(bracket))
    for block in blocks:
        for i, values in enumerate(_flat_magnitudes(block, magnitudes)):
            is_above = values > brackets[i].high
            above[i] += int(np.count_nonzero(is_above))
            inside[i].add_block(values, is_above)
    return list(zip(above, inside, strict=True))


def _every_nth(
    queries: Sequence[Query],
    blocks: Sequence[Block],
    step: int,
) -> list[Magnitudes]:
    """For each query the magnitudes of every `step`-th entry of the blocks."""
    parts: list[list[Magnitudes]] = [[] for _ in queries]
    magnitudes = [query.magnitude for query in queries]
    for block in blocks:
        for i, values in enumerate(_flat_magnitudes(block, magnitudes)):
            parts[i].append(values[::step].copy())
    return [np.concatenate(part) for part in parts]


def _flat_magnitudes(block: Block, magnitudes: Sequence[Magnitude]) -> list[Magnitudes]:
    """The magnitudes of a block's entries by each function, flat; a function is called once."""
    # A block keeps its base once it is read. A new block frees it after this pass.
    block = block.inputs.block(block.first, block.end)
    computed: dict[int, Magnitudes] = {}
    for magnitude in magnitudes:
        if id(magnitude) not in computed:
            computed[id(magnitude)] = _flat(magnitude(block))
    return [computed[id(magnitude)] for magnitude in magnitudes]


def _flat(magnitudes: Tensor) -> Magnitudes:
    """A flat array. NaN, where it is allowed, counts as the largest: every entry has a rank."""
    flat: Magnitudes = magnitudes.reshape(-1).cpu().numpy()
    # One sum costs less than a test of each entry.
    if torch.isfinite(magnitudes.sum()):
        return flat
    return np.nan_to_num(flat, nan=np.inf, posinf=np.inf)


def _threshold_among(values: Magnitudes, k: int) -> Threshold:
    """The threshold of the `k` largest of all values of a tensor, in their order."""
    rank = len(values) - k
    value = np.partition(values, rank)[rank]
    above = int(np.count_nonzero(values > value))
    equal_positions = np.flatnonzero(values == value)
    last = int(equal_positions[k - above - 1])
    return Threshold(float(value), last)
