"""One tensor as a merge reads it: a few rows at a time, in float32, wherever the tensor is stored.

A tensor is seen as a matrix (rows, columns): all dimensions but the last are rows; a vector is one
row. Merges to disk read files with `pread` into fresh memory: a file that shrinks while it is read
then gives an error and not a dead process (SIGBUS). Live models map them instead, since they read
the same tensors for every candidate, and all processes of a machine share the mapped pages.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from paretomerge.errors import CheckpointError

if TYPE_CHECKING:
    import mmap

    import torch

DTYPE_BYTES = {
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
"""Bytes of one element, by the name of the dtype in torch."""

FLOAT_DTYPES = ("float64", "float32", "float16", "bfloat16")
"""Dtypes that are merged; tensors of other dtypes are copied."""


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return (rows, columns) of a tensor of any shape, seen as a matrix."""
    if not shape:
        return 1, 1
    return math.prod(shape[:-1]), shape[-1]


def size_in_bytes(shape: tuple[int, ...], dtype: str) -> int:
    """Return the size of a stored tensor in bytes."""
    return math.prod(shape) * DTYPE_BYTES[dtype]


class Operand(Protocol):
    """A tensor that a merge can read."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        ...

    @property
    def dtype(self) -> str:
        """Dtype of the stored tensor, as torch names it."""
        ...

    def rows(
        self,
        first: int,
        end: int,
        device: str = "cpu",
    ) -> "torch.Tensor":
        """Read rows [first, end).

        Returns:
            (end - first, columns) in float32, in memory that the caller may write to.
        """
        ...


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in an open file.

    Attributes:
        descriptor: Returns the file descriptor; the file may be opened at the first call.
        offset: Position of the first byte of the tensor in the file.
        shape: Shape of the tensor.
        dtype: Dtype of the tensor, as torch names it.
        label: Model and tensor, for error messages.
        allow_nan: Whether NaN and infinity are read like other values, or are an error.
    """

    descriptor: Callable[[], int]
    offset: int
    shape: tuple[int, ...]
    dtype: str
    label: str
    allow_nan: bool = False

    def rows(
        self,
        first: int,
        end: int,
        device: str = "cpu",
    ) -> "torch.Tensor":
        """Read rows [first, end) in float32; see `Operand.rows`."""
        import torch

        return self.rows_as_stored(first, end).to(device, torch.float32)

    def rows_as_stored(self, first: int, end: int) -> "torch.Tensor":
        """Read rows [first, end) as (end - first, columns) in the stored dtype, on the CPU.

        Raises:
            CheckpointError: If the file cannot be read, or holds NaN or infinity.
        """
        import torch

        columns = matrix_shape(self.shape)[1]
        dtype = getattr(torch, self.dtype)
        rows = torch.empty((end - first, columns), dtype=dtype)
        self._read_into(rows, first * columns)
        return self._checked(rows)

    def part(self, first: int, end: int) -> "torch.Tensor":
        """Read elements [first, end) of the flat tensor in the stored dtype, on the CPU.

        Raises:
            CheckpointError: If the file cannot be read, or holds NaN or infinity.
        """
        import torch

        elements = torch.empty(end - first, dtype=getattr(torch, self.dtype))
        self._read_into(elements, first)
        return self._checked(elements)

    def read(self) -> "torch.Tensor":
        """Read the whole tensor in the stored dtype, on the CPU.

        Raises:
            CheckpointError: If the file cannot be read, or holds NaN or infinity.
        """
        import numpy as np
        import torch

        # numpy asks the kernel for huge pages and torch does not: far fewer page faults.
        n_bytes = size_in_bytes(self.shape, self.dtype)
        buffer = torch.from_numpy(np.empty(n_bytes, np.uint8))
        dtype = getattr(torch, self.dtype)
        tensor = buffer.view(dtype).view(self.shape)
        self._read_into(tensor, 0)
        return self._checked(tensor)

    def mapped(self, mapping: "mmap.mmap") -> "torch.Tensor | None":
        """The whole tensor as a view of a mapped file, without a copy.

        Args:
            mapping: The tensor's file, mapped from its first byte.

        Returns:
            The tensor in the stored dtype; None if it begins between two of its elements.

        Raises:
            CheckpointError: If the tensor holds NaN or infinity.
        """
        import torch

        if self.offset % DTYPE_BYTES[self.dtype]:
            return None
        n_elements = math.prod(self.shape)
        if self.offset + size_in_bytes(self.shape, self.dtype) > len(mapping):
            raise CheckpointError(
                f"{self.label}: the file is shorter than its header says; download it again"
            )
        dtype = getattr(torch, self.dtype)
        # `frombuffer` takes no empty buffer.
        if not n_elements:
            return torch.empty(self.shape, dtype=dtype)
        flat = torch.frombuffer(
            mapping, dtype=dtype, count=n_elements, offset=self.offset
        )
        return self._checked(flat.view(self.shape))

    def _checked(self, tensor: "torch.Tensor") -> "torch.Tensor":
        if not self.allow_nan and self.dtype in FLOAT_DTYPES:
            check_finite(tensor, self.label)
        return tensor

    def _read_into(self, tensor: "torch.Tensor", first_element: int) -> None:
        """Fill `tensor` with the elements from `first_element` on."""
        import torch

        if tensor.numel() == 0:
            return
        # As bytes, because numpy has no bfloat16.
        flat = tensor.reshape(-1)
        raw = memoryview(flat.view(torch.uint8).numpy())
        start = self.offset + first_element * DTYPE_BYTES[self.dtype]
        n_read = 0
        # One call reads at most 2 GB, so large tensors take several.
        while n_read < len(raw):
            rest = raw[n_read:]
            try:
                count = os.preadv(self.descriptor(), [rest], start + n_read)
            except OSError as error:
                raise CheckpointError(
                    f"{self.label}: cannot be read: {error}"
                ) from error
            if count == 0:
                raise CheckpointError(
                    f"{self.label}: the file ended too early; did it change while it was read?"
                )
            n_read += count


@dataclass(frozen=True)
class InMemoryTensor:
    """A tensor that is in memory, in the dtype of its storage."""

    tensor: "torch.Tensor"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> str:
        """Dtype of the tensor, as torch names it."""
        return str(self.tensor.dtype).removeprefix("torch.")

    def read(self) -> "torch.Tensor":
        """Return the tensor itself, not a copy."""
        return self.tensor

    def rows(
        self,
        first: int,
        end: int,
        device: str = "cpu",
    ) -> "torch.Tensor":
        """Copy rows [first, end) to float32; see `Operand.rows`."""
        import torch

        matrix = self.tensor.view(matrix_shape(self.shape))
        block = matrix[first:end]
        if torch.device(device).type != block.device.type:
            # Cast after the move: half of the bytes cross the bus.
            return block.to(device).to(torch.float32)
        # `copy`, as the caller may write to what it gets.
        return block.to(device, torch.float32, copy=True)


class CachedTensor:
    """A stored tensor that is read once, at its first use, and stays in memory as it is stored.

    For methods that read their inputs more than once.
    """

    def __init__(self, operand: StoredTensor) -> None:
        self.shape = operand.shape
        self.dtype = operand.dtype
        self._operand = operand
        self._cached: InMemoryTensor | None = None

    def rows(
        self,
        first: int,
        end: int,
        device: str = "cpu",
    ) -> "torch.Tensor":
        """Read rows [first, end) in float32; see `Operand.rows`."""
        if self._cached is None:
            self._cached = InMemoryTensor(self._operand.read())
        return self._cached.rows(first, end, device)


def read_tensor(operand: Operand) -> "torch.Tensor":
    """Read a whole tensor: in its stored dtype if it is stored or in memory, else in float32."""
    if isinstance(operand, (StoredTensor, InMemoryTensor)):
        return operand.read()
    n_rows = matrix_shape(operand.shape)[0]
    return operand.rows(0, n_rows).view(operand.shape)


def check_finite(tensor: "torch.Tensor", label: str) -> None:
    """Check that a tensor holds neither NaN nor infinity.

    Args:
        tensor: The tensor.
        label: Name of the tensor in the error message.

    Raises:
        CheckpointError: If it does.
    """
    import torch

    # The sum is not finite if an element is not, and costs a fraction of looking at each one.
    # A sum of finite elements can overflow, hence the second test.
    if not math.isfinite(tensor.sum().item()) and not torch.isfinite(tensor).all():
        raise CheckpointError(
            f"{label}: expected finite weights, got NaN or infinity; is the download or the "
            "training broken? `paretomerge merge --allow-nan` merges them anyway"
        )
