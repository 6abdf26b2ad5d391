"""One tensor as a merge reads it: rows at a time, in float32, wherever it lies.

A tensor is seen as (rows, columns): all sides but the last are rows; a vector is one row. Reads go through `pread`
into fresh memory, never through a mapping: a file that shrinks while it is read gives an error, not a dead process.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from paretomerge.errors import CheckpointError

if TYPE_CHECKING:
    import torch

BYTES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
FLOATS = ("float64", "float32", "float16", "bfloat16")


def extent(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns) of a tensor of that shape."""
    return (math.prod(shape[:-1]), shape[-1]) if shape else (1, 1)


def size_in_bytes(shape: tuple[int, ...], dtype: str) -> int:
    """Of a tensor as it is stored."""
    return math.prod(shape) * BYTES[dtype]


class Operand(Protocol):
    """A tensor to be read; `dtype` is that of its storage, as torch names it."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> str: ...

    def rows(self, first: int, end: int, device: str = "cpu") -> "torch.Tensor":
        """Rows [first, end) as (end - first, columns) in float32, the caller's to write to."""
        ...


@dataclass(frozen=True)
class Stored:
    """A tensor at `offset` of an open file. `label` (model: tensor) names it in errors."""

    descriptor: Callable[[], int]
    offset: int
    shape: tuple[int, ...]
    dtype: str
    label: str
    allow_nan: bool = False

    def rows(self, first: int, end: int, device: str = "cpu") -> "torch.Tensor":
        import torch

        return self.stored(first, end).to(device, torch.float32)

    def stored(self, first: int, end: int) -> "torch.Tensor":
        """Rows [first, end) as they are stored."""
        import torch

        columns = extent(self.shape)[1]
        rows = torch.empty((end - first, columns), dtype=getattr(torch, self.dtype))
        self._fill(rows, first * columns)
        return rows if self.allow_nan or self.dtype not in FLOATS else finite(rows, self.label)

    def whole(self) -> "torch.Tensor":
        """The tensor as it is stored."""
        import numpy as np
        import torch

        # numpy asks for huge pages, torch does not: far fewer page faults
        raw = torch.from_numpy(np.empty(size_in_bytes(self.shape, self.dtype), np.uint8))
        stored = raw.view(getattr(torch, self.dtype)).view(self.shape)
        self._fill(stored, 0)
        return stored if self.allow_nan or self.dtype not in FLOATS else finite(stored, self.label)

    def _fill(self, stored: "torch.Tensor", element: int) -> None:
        import torch

        if stored.numel() == 0:
            return
        raw = memoryview(stored.reshape(-1).view(torch.uint8).numpy())
        start = self.offset + element * BYTES[self.dtype]
        done = 0
        while done < len(raw):
            try:
                got = os.preadv(self.descriptor(), [raw[done:]], start + done)
            except OSError as error:
                raise CheckpointError(f"{self.label}: cannot be read: {error}") from error
            if got == 0:
                raise CheckpointError(
                    f"{self.label}: the file ended too early; did it change while it was read?"
                )
            done += got


@dataclass(frozen=True)
class InMemory:
    """A tensor that is in memory, in the dtype of its storage."""

    tensor: "torch.Tensor"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> str:
        return str(self.tensor.dtype).removeprefix("torch.")

    def whole(self) -> "torch.Tensor":
        return self.tensor

    def rows(self, first: int, end: int, device: str = "cpu") -> "torch.Tensor":
        import torch

        return self.tensor.view(extent(self.shape))[first:end].to(device, torch.float32, copy=True)


class Held:
    """`operand`, read from disk when it is first asked for and kept as it is stored: for what is looked at more than once."""

    def __init__(self, operand: Stored) -> None:
        self.operand = operand
        self.shape = operand.shape
        self.dtype = operand.dtype
        self._kept: InMemory | None = None

    def rows(self, first: int, end: int, device: str = "cpu") -> "torch.Tensor":
        if self._kept is None:
            self._kept = InMemory(self.operand.whole())
        return self._kept.rows(first, end, device)


def whole(operand: Operand) -> "torch.Tensor":
    """All of a tensor, as it is stored where it is stored, else in float32."""
    if isinstance(operand, (Stored, InMemory)):
        return operand.whole()
    return operand.rows(0, extent(operand.shape)[0]).view(operand.shape)


def finite(tensor: "torch.Tensor", label: str) -> "torch.Tensor":
    """The tensor, if it has neither NaN nor infinity; a sum finds them at a fraction of the cost of a look at each."""
    import torch

    if not math.isfinite(tensor.sum().item()) and not torch.isfinite(tensor).all():
        raise CheckpointError(
            f"{label}: expected finite weights, got NaN or infinity; is the download or the training broken? --allow-nan merges them anyway"
        )
    return tensor
