"""What a merge method receives for one tensor: the rows of every model, block by block.

A merge method is a function from `Inputs` to a `BlockMerger`. It may first read the whole tensor
through `Inputs.blocks()`, as often as it needs, to measure norms, angles or thresholds. It returns
a function that merges any one block. Blocks are small enough to stay in the cache of one core.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from paretomerge.checkpoint.operand import Operand, matrix_shape
from paretomerge.merging.parameter_values import number_in
from paretomerge.merging.statistics import Statistic
from paretomerge.types import Params

UInt16Array = NDArray[np.uint16]

# Measured: smaller blocks stay in the cache better, larger ones make threads wait less for each
# other.
CPU_BLOCK = 131_072
"""Elements of a block on the CPU."""

GPU_BLOCK = 1 << 26
"""Elements of a block on a GPU."""


class RandomStream:
    """Uniform random integers with an address, for the mask of one source's tensor.

    The numbers are a function of (seed, tensor name, source index, position) alone. They are the
    same in any order of reads and in any process.

    Args:
        seed: The seed of the recipe.
        tensor: The name of the tensor.
        source_index: The place of the source among the sources.
    """

    _CHUNK = 1 << 17

    def __init__(
        self,
        seed: int,
        tensor: str,
        source_index: int,
    ) -> None:
        self._address = f"{seed}\0{tensor}\0{source_index}"
        # Blocks are read in order and are smaller than a chunk, so the last chunk is read again.
        self._last_index = -1
        self._last_chunk: UInt16Array = np.empty(0, np.uint16)

    def uint16(self, start: int, end: int) -> UInt16Array:
        """Independent uniform integers in [0, 65536).

        Args:
            start: Flat position of the first entry in the tensor.
            end: Flat position after the last entry.

        Returns:
            One integer per entry, shape `(end - start,)`.
        """
        parts = []
        first_chunk = start // self._CHUNK
        end_chunk = -(-end // self._CHUNK)
        for index in range(first_chunk, end_chunk):
            offset = index * self._CHUNK
            first = max(start - offset, 0)
            chunk = self._chunk(index)
            parts.append(chunk[first : end - offset])
        # Most blocks lie in one chunk, and need no copy.
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts)

    def _chunk(self, index: int) -> UInt16Array:
        if index != self._last_index:
            address = f"{self._address}\0{index}"
            digest = hashlib.sha256(address.encode()).digest()
            seed = int.from_bytes(digest[:16], "little")
            generator = np.random.SFC64(seed)
            raw = generator.random_raw(self._CHUNK // 4)
            # Little-endian on every machine, so that masks are the same everywhere.
            self._last_chunk = raw.astype("<u8", copy=False).view("<u2")
            self._last_index = index
        return self._last_chunk


@dataclass(frozen=True)
class Inputs:
    """One tensor of every model, with the parameters of the merge.

    Attributes:
        name: The name of the tensor.
        shape: The one shape of all tensors. All axes but the last count as rows.
        base: theta_0, or None where the recipe has none.
        sources: theta_1 ... theta_K. A method on deltas does not get the base among them.
        parameters: The parameters of each source (`weight`, `density`, ...), in the order of
            `sources`.
        options: The parameters of the whole merge (`lambda`, `normalize`, ...).
        seed: The seed of the recipe, for random masks.
        device: The device of the blocks, as torch names it.
        is_matrix: True for a linear map of a layer, or a stack of them (experts); False for norms,
            biases and embeddings.
        statistics: What calibration text says about the tensor of each source; None for a source
            of which the text says nothing. Empty for methods that need no data.
    """

    name: str
    shape: tuple[int, ...]
    base: Operand | None
    sources: Sequence[Operand]
    parameters: Sequence[Params]
    options: Params
    seed: int = 0
    device: str = "cpu"
    is_matrix: bool = False
    statistics: Sequence[Statistic | None] = ()

    @property
    def rows(self) -> int:
        """The number of rows."""
        return matrix_shape(self.shape)[0]

    @property
    def columns(self) -> int:
        """The number of columns: the size of the last axis."""
        return matrix_shape(self.shape)[1]

    @property
    def numel(self) -> int:
        """The number n of entries."""
        return self.rows * self.columns

    @property
    def n_sources(self) -> int:
        """The number K of sources."""
        return len(self.sources)

    def per_source(self, name: str) -> list[float]:
        """One parameter of every source, K numbers: `inputs.per_source("weight")`."""
        return [number_in(parameters, name) for parameters in self.parameters]

    def number(self, name: str) -> float:
        """A numeric parameter of the whole merge: `inputs.number("lambda")`."""
        return number_in(self.options, name)

    def integer(self, name: str) -> int:
        """A whole-number parameter of the whole merge: `inputs.integer("steps")`."""
        return int(number_in(self.options, name))

    def flag(self, name: str) -> bool:
        """A boolean parameter of the whole merge: `inputs.flag("normalize")`."""
        return bool(self.options[name])

    @cached_property
    def random_streams(self) -> tuple[RandomStream, ...]:
        """One stream of random integers for each source."""
        streams = []
        for index in range(self.n_sources):
            streams.append(RandomStream(self.seed, self.name, index))
        return tuple(streams)

    def block(self, first: int, end: int) -> "Block":
        """Rows [first, end) of the tensor."""
        return Block(self, first, end)

    def blocks(
        self,
        elements: int | None = None,
        rows: tuple[int, int] | None = None,
    ) -> "Iterator[Block]":
        """All blocks of the tensor, from its first row to its last.

        Args:
            elements: The most elements of a block, at least one row; by default the size that suits
                the device. Statistics use the default, because a float sum depends on where blocks
                end.
            rows: Rows [first, end) to cut into blocks; by default all.

        Yields:
            Consecutive blocks of whole rows.
        """
        if not elements:
            elements = CPU_BLOCK if self.device == "cpu" else GPU_BLOCK
        step = max(1, elements // max(1, self.columns))
        start, stop = rows or (0, self.rows)
        for first in range(start, stop, step):
            end = min(first + step, stop)
            yield Block(self, first, end)


@dataclass(frozen=True)
class Block:
    """Rows [first, end) of one tensor. Each model's rows are read when they are asked for.

    Attributes:
        inputs: The tensor.
        first: The first row.
        end: The row after the last.
    """

    inputs: Inputs
    first: int
    end: int

    @property
    def start(self) -> int:
        """Position of the block's first element in the flat tensor."""
        return self.first * self.inputs.columns

    @property
    def numel(self) -> int:
        """The number of entries of the block."""
        return self.rows * self.inputs.columns

    @property
    def rows(self) -> int:
        """The number of rows of the block."""
        return self.end - self.first

    @cached_property
    def base(self) -> Tensor:
        """theta_0, (rows, columns) in float32. It is read once and shared: do not write to it."""
        base = self.inputs.base
        assert base is not None
        return base.rows(self.first, self.end, self.inputs.device)

    def source(self, index: int) -> Tensor:
        """theta_i, (rows, columns) in float32: a new tensor that the caller may write to."""
        source = self.inputs.sources[index]
        return source.rows(self.first, self.end, self.inputs.device)

    def delta(self, index: int) -> Tensor:
        """tau_i = theta_i - theta_0, (rows, columns): a new tensor that the caller may write to."""
        return self.source(index).sub_(self.base)

    def deltas(self) -> list[Tensor]:
        """tau_1 ... tau_K: new tensors that the caller may write to."""
        return [self.delta(index) for index in range(self.inputs.n_sources)]

    def random_uint16(self, index: int) -> UInt16Array:
        """Uniform integers in [0, 65536), one per entry of source i, shape `(numel,)`."""
        stream = self.inputs.random_streams[index]
        end = self.start + self.numel
        return stream.uint16(self.start, end)


BlockMerger = Callable[[Block], Tensor]
"""Merges one block: the rows of every model -> the merged rows, (rows, columns) in float32."""

MergeFunction = Callable[[Inputs], BlockMerger]
"""A merge method: the inputs of one tensor -> the function that merges its blocks."""
