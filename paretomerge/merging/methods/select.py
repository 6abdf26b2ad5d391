"""The k-th largest magnitude of a tensor that is seen block by block, exactly, without sorting it.

A sample brackets the value; one pass counts what lies above the bracket and collects what lies inside, a few per cent;
the rest is a selection among those. Entries of equal magnitude are told apart by their place: the first are the larger.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from paretomerge.merging.methods.inputs import Block, Inputs

Score = Callable[[Block], torch.Tensor]
"""A block -> its entries' magnitudes: (rows, columns), not negative."""

Range = tuple[np.float32, np.float32]

_DIRECT = 1 << 17  # elements below which everything is collected
_SAMPLE = 1 << 17
_MISSES = 3  # after so many no sample is trusted
_KNOWN = 256  # entries of a sample that are enough to look for a value among


@dataclass(frozen=True)
class Cut:
    """Separates the k largest: those above `value`, and of those equal to it the ones up to flat position `last`."""

    value: float
    last: int

    def keep_(self, block: torch.Tensor, start: int) -> torch.Tensor:
        """Zero, in place, what is not among the k largest. block: signed values; start: its flat position."""
        inclusive = float(np.nextafter(np.float32(self.value), np.float32(-1)))
        flat = block.view(-1)
        among = min(max(self.last + 1 - start, 0), flat.numel())
        if among and inclusive >= 0:
            torch.hardshrink(flat[:among], inclusive, out=flat[:among])
        if among < flat.numel():
            torch.hardshrink(flat[among:], self.value, out=flat[among:])
        return block


def largest(inputs: Inputs, wanted: Sequence[tuple[Score, int]]) -> list[Cut]:
    """For each (score, k), 0 < k <= n, the cut that keeps exactly k entries, zeros aside, which are all alike.

    All are found in the same passes, so that what the scores share (the base) is read once.
    """
    n = inputs.size
    if n <= _DIRECT:
        every = _gathered(wanted, list(inputs.blocks()), 1)
        return [_cut(every[i], k) for i, (_, k) in enumerate(wanted)]
    blocks = list(inputs.blocks())
    chosen = blocks[:: -(-len(blocks) // max(8, len(blocks) // 64))]
    step = max(1, sum(block.size for block in chosen) // max(_SAMPLE, n // 128))
    samples = [np.sort(sample) for sample in _gathered(wanted, chosen, step)]
    open_ = {i: _Interval(k, n) for i, (_, k) in enumerate(wanted)}
    cuts: dict[int, Cut] = {}
    while open_:
        ranges = {i: interval.likely(samples[i]) for i, interval in open_.items()}
        seen = _look(blocks, [wanted[i][0] for i in open_], list(ranges.values()))
        for i, (above, found) in zip(ranges, seen, strict=True):
            score, k = wanted[i]
            if above < k <= above + found.count:
                cuts[i] = found.cut(k - above, blocks, score)
                del open_[i]
            else:
                open_[i].miss(ranges[i], above, found.count)
    return [cuts[i] for i in range(len(wanted))]


@dataclass
class _Interval:
    """Where the k-th largest is known to be: above `floor` and below `ceiling`; `over` entries are not below it, `upto`
    entries are above the floor."""

    k: int
    upto: int
    over: int = 0
    misses: int = 0
    floor: np.float32 = field(default_factory=lambda: np.float32(-1))
    ceiling: np.float32 = field(default_factory=lambda: np.float32(np.inf))

    def likely(self, sample: np.ndarray) -> Range:
        """A range for the next look; the whole interval where the sample knows little of it."""
        part = sample[(sample > self.floor) & (sample < self.ceiling)]
        if len(part) < _KNOWN or self.misses == _MISSES:
            return max(self.floor, np.float32(0)), self.ceiling
        low, high = _bracket(part, self.upto - self.over, self.k - self.over)
        return max(low, self.floor), min(high, self.ceiling)

    def miss(self, seen: Range, above: int, inside: int) -> None:
        """The value was not in the range, above which there are `above` entries: the sample misled."""
        self.misses += 1
        if self.k <= above:
            self.floor, self.upto = seen[1], above
        else:
            self.ceiling, self.over = seen[0], above + inside


def _gathered(
    wanted: Sequence[tuple[Score, int]], blocks: Sequence[Block], step: int
) -> list[np.ndarray]:
    """For each score the magnitudes of every `step`-th entry of the blocks."""
    parts: list[list[np.ndarray]] = [[] for _ in wanted]
    for block in blocks:
        for part, magnitudes in zip(
            parts, _scored(block, [score for score, _ in wanted]), strict=True
        ):
            part.append(magnitudes[::step].copy())
    return [np.concatenate(part) for part in parts]


def _scored(block: Block, scores: Sequence[Score]) -> list[np.ndarray]:
    """Flat magnitudes by score; one that is asked for twice is computed once."""
    block = block.inputs.at(
        block.first, block.end
    )  # a fresh one: it keeps the base only for this pass
    seen: dict[int, np.ndarray] = {}
    return [
        seen[id(s)] if id(s) in seen else seen.setdefault(id(s), _flat(s(block))) for s in scores
    ]


def _bracket(sample: np.ndarray, n: int, k: int) -> Range:
    """Two of the sample's values between which the k-th largest most likely lies; one value where many entries share it."""
    m = len(sample)
    place = m - k / n * m
    likely = sample[min(max(int(place), 0), m - 1)]
    first, end = np.searchsorted(sample, likely, "left"), np.searchsorted(sample, likely, "right")
    slack = (
        4 * (m * k / n * (1 - k / n)) ** 0.5 + 0.005 * m
    )  # sampling alone, and rows that are unlike each other
    if end - first > slack:
        return likely, likely
    low = sample[int(place - slack)] if place - slack >= 0 else np.float32(0)
    high = sample[int(place + slack)] if place + slack < m else np.float32(np.inf)
    return low, high


@dataclass
class _Found:
    """What lies inside a range, its ends included, by block: values and positions; or, of a single value, counts."""

    value: np.float32 | None
    values: list[np.ndarray]
    positions: list[np.ndarray]
    counts: list[int]

    @property
    def count(self) -> int:
        return sum(self.counts)

    def cut(self, k: int, blocks: Sequence[Block], score: Score) -> Cut:
        """The cut that keeps the `k` largest of these."""
        if self.value is None:
            every = np.concatenate(self.values)
            rank = len(every) - k
            value = np.partition(every, rank)[rank]
            equal = k - int(np.count_nonzero(every > value))
            for block, values, positions in zip(blocks, self.values, self.positions, strict=True):
                places = positions[values == value]
                if equal <= len(places):
                    return Cut(float(value), int(places[equal - 1]) + block.start)
                equal -= len(places)
            raise AssertionError("the equal ones were counted before")
        if self.value == 0:
            return Cut(0.0, -1)
        for block, count in zip(blocks, self.counts, strict=True):
            if k <= count:
                places = np.flatnonzero(_scored(block, [score])[0] == self.value)
                return Cut(float(self.value), int(places[k - 1]) + block.start)
            k -= count
        raise AssertionError("the counts by block were summed before")


def _look(
    blocks: Sequence[Block], scores: Sequence[Score], ranges: Sequence[Range]
) -> list[tuple[int, _Found]]:
    """One pass: for each range the number above it, and what lies inside."""
    above = [0] * len(ranges)
    found = [_Found(low if low == high else None, [], [], []) for low, high in ranges]
    for block in blocks:
        for i, magnitudes in enumerate(_scored(block, scores)):
            low, high = ranges[i]
            over = magnitudes > high
            above[i] += int(np.count_nonzero(over))
            if found[i].value is not None:
                found[i].counts.append(int(np.count_nonzero(magnitudes == low)))
                continue
            inside = np.flatnonzero((magnitudes >= low) ^ over)
            found[i].counts.append(len(inside))
            found[i].values.append(magnitudes[inside])
            found[i].positions.append(inside.astype(np.uint32))  # inside the block: half the memory
    return list(zip(above, found, strict=True))


def _cut(values: np.ndarray, k: int) -> Cut:
    """The cut that keeps the `k` largest of all values, in their order."""
    rank = len(values) - k
    value = np.partition(values, rank)[rank]
    equal = np.flatnonzero(values == value)
    return Cut(float(value), int(equal[k - int(np.count_nonzero(values > value)) - 1]))


def _flat(magnitudes: torch.Tensor) -> np.ndarray:
    """NaN, where it is allowed, counts as the largest: every entry then has a place."""
    flat: np.ndarray = magnitudes.reshape(-1).cpu().numpy()
    return (
        flat if torch.isfinite(magnitudes.sum()) else np.nan_to_num(flat, nan=np.inf, posinf=np.inf)
    )
