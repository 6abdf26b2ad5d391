"""What a method sees of one tensor: blocks of rows, small enough to stay in a core's cache.

A method is a function from `Inputs` to a `Combine`. It first looks at the whole tensor, as often as it needs, through
`blocks()` (norms, angles, thresholds), and gives back a function that merges any one block.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from paretomerge.checkpoint.operand import Operand, matrix_shape

BLOCK = 131_072  # elements: smaller ones stay in cache better, larger ones let threads wait less for each other
GPU_BLOCK = 1 << 26


class Noise:
    """Random numbers with an address (seed, tensor, place of the model, chunk): the same in any order and process."""

    _CHUNK = 1 << 17

    def __init__(self, seed: int, name: str, index: int) -> None:
        self._address = f"{seed}\0{name}\0{index}"
        self._last: tuple[int, np.ndarray] = (
            -1,
            np.empty(0, np.uint16),
        )  # blocks come in order and share chunks

    def bits(self, start: int, end: int) -> np.ndarray:
        """Independent uniform whole numbers below 65536, one for each element from `start` to `end`, as uint16."""
        parts = []
        for chunk in range(start // self._CHUNK, -(-end // self._CHUNK)):
            first = chunk * self._CHUNK
            parts.append(self._chunk(chunk)[max(start - first, 0) : end - first])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _chunk(self, chunk: int) -> np.ndarray:
        if self._last[0] != chunk:
            digest = hashlib.sha256(f"{self._address}\0{chunk}".encode()).digest()
            generator = np.random.SFC64(int.from_bytes(digest[:16], "little"))
            self._last = (
                chunk,
                generator.random_raw(self._CHUNK // 4).astype("<u8", copy=False).view("<u2"),
            )
        return self._last[1]


@dataclass(frozen=True)
class Inputs:
    """One tensor of every model.

    base: theta_0, or None where the recipe has none.
    sources: theta_i, K of them, the base left out where the method works on deltas. All of one shape.
    parameters: for each source its own settings (`weight`, `density`, ...), in the order of `sources`.
    options: the settings of the whole merge (`lambda`, `normalize`, ...).
    seed: of the recipe; with `name` it is the address of random masks.
    matrix: whether it is a linear map of a layer (or several, of experts), not a norm, a bias or an embedding.
    """

    name: str
    shape: tuple[int, ...]
    base: Operand | None
    sources: Sequence[Operand]
    parameters: Sequence[Mapping[str, Any]]
    options: Mapping[str, Any]
    seed: int = 0
    device: str = "cpu"
    matrix: bool = False

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return matrix_shape(self.shape)

    @property
    def size(self) -> int:
        rows, columns = self.matrix_shape
        return rows * columns

    def each(self, name: str) -> list[float]:
        return [float(parameters[name]) for parameters in self.parameters]

    @cached_property
    def noise(self) -> "tuple[Noise, ...]":
        """A stream of random numbers for each source."""
        return tuple(Noise(self.seed, self.name, i) for i in range(len(self.sources)))

    def at(self, first: int, end: int) -> "Block":
        return Block(self, first, end)

    def blocks(self, elements: int | None = None) -> "Iterator[Block]":
        """The tensor from its first row to its last. Statistics use the default size: sums depend on where blocks end."""
        rows, columns = self.matrix_shape
        step = max(
            1, (elements or (BLOCK if self.device == "cpu" else GPU_BLOCK)) // max(1, columns)
        )
        for first in range(0, rows, step):
            yield Block(self, first, min(first + step, rows))

    def read_tensor(self) -> "Block":
        return Block(self, 0, self.matrix_shape[0])


@dataclass(frozen=True)
class Block:
    """Rows [first, end) of one tensor; each is read when it is asked for."""

    inputs: Inputs
    first: int
    end: int

    @property
    def start(self) -> int:
        """Position of the block's first element in the flat tensor."""
        return self.first * self.inputs.matrix_shape[1]

    @property
    def size(self) -> int:
        return (self.end - self.first) * self.inputs.matrix_shape[1]

    @cached_property
    def base(self) -> torch.Tensor:
        """(rows, columns) of theta_0; read once, not to be written to."""
        assert self.inputs.base is not None
        return self.inputs.base.rows(self.first, self.end, self.inputs.device)

    def source(self, index: int) -> torch.Tensor:
        """(rows, columns) of theta_i, fresh."""
        return self.inputs.sources[index].rows(self.first, self.end, self.inputs.device)

    def delta(self, index: int) -> torch.Tensor:
        """(rows, columns) of tau_i = theta_i - theta_0, fresh."""
        return self.source(index).sub_(self.base)

    def bits(self, index: int) -> np.ndarray:
        """Uniform whole numbers below 65536 for the entries of source i, flat, as uint16."""
        return self.inputs.noise[index].bits(self.start, self.start + self.size)


Combine = Callable[[Block], torch.Tensor]
"""One block of every model -> the merged block, (rows, columns) in float32."""
