"""Tensors in the form that transformers gives them in memory, and back, read a few rows at a time.

transformers stacks, cuts, transposes or reorders some tensors while it loads them. All these
conversions move elements and change none. So they are applied here to the positions of the
elements instead of the elements, with transformers' own code; what is read later is only what is
asked for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np

from paretomerge.checkpoint.loaded_names import PackedTensors, Shape
from paretomerge.checkpoint.operand import Operand, matrix_shape
from paretomerge.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    Positions = NDArray[np.int64]

# Layers have the same conversions, so few differ. Those of single elements can take gigabytes.
_MAX_ROW_MOVES = 64
_MAX_ELEMENT_MOVES = 1


@dataclass(frozen=True, eq=False)
class GatheredTensor:
    """A tensor whose elements are those of other tensors, in another order.

    Attributes:
        shape: Shape of the tensor.
        dtype: Dtype of the stored tensors, as torch names it.
        parts: The tensors that hold the elements.
        moves: Where each row or element comes from.
        index: Which of the tensors of `moves` this one is.
        is_loaded: Whether this is a tensor in memory, made from stored ones; else the reverse.
    """

    shape: Shape
    dtype: str
    parts: tuple[Operand, ...]
    moves: "Moves"
    index: int
    is_loaded: bool

    def rows(
        self,
        first: int,
        end: int,
        device: str = "cpu",
    ) -> "torch.Tensor":
        """Read rows [first, end) in float32; see `Operand.rows`."""
        import torch

        columns = matrix_shape(self.shape)[1]
        width = columns if self.moves.by_row else 1
        per_row = columns // width if width else 0
        positions = self._positions[first * per_row : end * per_row]
        run = self._find_run(positions)
        if run is not None:
            part, start = run
            return part.rows(start, start + len(positions), device)
        # Sorted, so that each part is read once and from its beginning to its end.
        order = np.argsort(positions, kind="stable")
        ordered = positions[order]
        result = torch.empty((len(positions), width), device=device)
        starts = self._starts
        cuts = np.searchsorted(ordered, starts)
        for k, part in enumerate(self.parts):
            low, high = cuts[k], cuts[k + 1]
            if low == high:
                continue
            wanted = ordered[low:high] - starts[k]
            block = _read(part, wanted, width, device)
            target = torch.from_numpy(order[low:high]).to(device)
            result[target] = block
        return result.view(end - first, columns)

    def _find_run(self, positions: "Positions") -> tuple[Operand, int] | None:
        """The part that holds some rows one after the other, and the first of them there.

        Such as one expert's rows in a tensor of all experts.
        """
        if not self.moves.by_row or not len(positions):
            return None
        low, high = positions[0], positions[-1]
        k = int(np.searchsorted(self._starts, low, side="right")) - 1
        if high >= self._starts[k + 1] or (np.diff(positions) != 1).any():
            return None
        return self.parts[k], int(low - self._starts[k])

    @cached_property
    def _starts(self) -> "Positions":
        sizes = [0]
        for part in self.parts:
            rows, columns = matrix_shape(part.shape)
            sizes.append(rows if self.moves.by_row else rows * columns)
        return np.cumsum(sizes)

    @property
    def _positions(self) -> "Positions":
        if self.is_loaded:
            return self.moves.forward(self.index)
        return self.moves.backward(self.index)


def _read(
    part: Operand, wanted: "Positions", width: int, device: str
) -> "torch.Tensor":
    """Read rows of a part, or elements if `width` is 1; `wanted` is sorted."""
    import torch

    columns = matrix_shape(part.shape)[1]
    per_row = columns // width
    first = int(wanted[0]) // per_row
    end = int(wanted[-1]) // per_row + 1
    block = part.rows(first, end, device).view(-1, width)
    inside = wanted - first * per_row
    if len(inside) == len(block):
        return block
    return block[torch.from_numpy(inside).to(device)]


@dataclass(frozen=True)
class Moves:
    """Where a conversion moves the rows or elements of some tensors.

    Equal conversions have equal moves, so that all layers share them.

    Attributes:
        patterns: The patterns of transformers' conversion, which tell conversions apart.
        stored_shapes: Shapes of the tensors in the checkpoint.
        loaded_shapes: Shapes of the tensors in memory.
        by_row: Whether whole rows are moved.
        packed: One group of tensors that is converted in this way.
    """

    patterns: tuple[str, ...]
    stored_shapes: tuple[Shape, ...]
    loaded_shapes: tuple[Shape, ...]
    by_row: bool
    packed: "_Unhashed"

    def forward(self, index: int) -> "Positions":
        """For each row or element of a tensor in memory, its position in the stored tensors."""
        return self._all[0][index]

    def backward(self, index: int) -> "Positions":
        """For each row or element of a stored tensor, its position in the tensors in memory."""
        return self._all[1][index]

    @property
    def _all(self) -> "tuple[list[Positions], list[Positions]]":
        return _row_moves(self) if self.by_row else _element_moves(self)


@dataclass(frozen=True, eq=False)
class _Unhashed:
    """Holds what does not count when two `Moves` are compared."""

    value: PackedTensors

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Unhashed)

    def __hash__(self) -> int:
        return 0


@lru_cache(_MAX_ROW_MOVES)
def _row_moves(moves: Moves) -> "tuple[list[Positions], list[Positions]]":
    return _trace(moves)


@lru_cache(_MAX_ELEMENT_MOVES)
def _element_moves(moves: Moves) -> "tuple[list[Positions], list[Positions]]":
    return _trace(moves)


def _trace(moves: Moves) -> "tuple[list[Positions], list[Positions]]":
    """Convert the positions instead of the elements."""
    units = _unit_shapes(moves.stored_shapes, moves.by_row)
    converted = moves.packed.value.convert(_positions_of(units))
    forward = [tensor.reshape(-1).numpy() for tensor in converted.values()]
    together = np.concatenate(forward)
    back = np.full(len(together), -1, dtype=np.int64)
    back[together] = np.arange(len(together))
    if (back < 0).any():
        packed = moves.packed.value
        raise _cannot_convert(packed, packed.first_loaded, "weights are lost")
    sizes = [int(np.prod(shape)) for shape in units]
    backward = np.split(back, np.cumsum(sizes)[:-1])
    return forward, backward


def _unit_shapes(shapes: Sequence[Shape], by_row: bool) -> list[Shape]:
    return [(*shape[:-1], 1) if by_row else shape for shape in shapes]


def _positions_of(shapes: Sequence[Shape]) -> "list[torch.Tensor]":
    """Tensors of some shapes that together hold 0, 1, 2, ..."""
    import torch

    tensors = []
    start = 0
    for shape in shapes:
        size = int(np.prod(shape))
        tensors.append(torch.arange(start, start + size).view(shape))
        start += size
    return tensors


def find_moves(
    packed: PackedTensors, shapes: Sequence[Shape], model: str
) -> tuple[tuple[str, ...], Moves]:
    """Find out where transformers moves the elements of some tensors.

    Args:
        packed: The tensors.
        shapes: Their shapes.
        model: Name of the model, for error messages.

    Returns:
        The names in memory, and the moves.

    Raises:
        CheckpointError: If transformers cannot convert tensors of such shapes, or loses elements.
    """
    loaded = _loaded_shapes(packed, shapes, model)
    loaded_shapes = tuple(loaded.values())
    moves = Moves(
        patterns=(*packed.patterns, repr(packed.converter)),
        stored_shapes=tuple(shapes),
        loaded_shapes=loaded_shapes,
        by_row=_moves_rows(packed, shapes, loaded_shapes),
        packed=_Unhashed(packed),
    )
    n_stored = sum(int(np.prod(shape)) for shape in shapes)
    n_loaded = sum(int(np.prod(shape)) for shape in loaded_shapes)
    if n_stored != n_loaded:
        raise _cannot_convert(packed, model, f"{n_stored} weights become {n_loaded}")
    return tuple(loaded), moves


def _loaded_shapes(
    packed: PackedTensors, shapes: Sequence[Shape], model: str
) -> Mapping[str, Shape]:
    import torch

    tensors = [torch.empty(shape, device="meta") for shape in shapes]
    # The conversions raise exceptions of any class for tensors that they were not made for.
    try:
        converted = packed.convert(tensors)
    except Exception as error:
        raise _cannot_convert(packed, model, str(error)) from error
    return {name: tuple(tensor.shape) for name, tensor in converted.items()}


def _moves_rows(
    packed: PackedTensors, shapes: Sequence[Shape], loaded_shapes: Sequence[Shape]
) -> bool:
    """Whether a conversion leaves every row in one piece: then rows of one element show it."""
    columns = {shape[-1] if shape else 1 for shape in (*shapes, *loaded_shapes)}
    if len(columns) != 1 or any(len(shape) < 2 for shape in shapes):
        return False
    try:
        converted = packed.convert(_positions_of(_unit_shapes(shapes, by_row=True)))
    except Exception:  # rows of one element cannot be cut
        return False
    found = [tuple(tensor.shape) for tensor in converted.values()]
    return found == _unit_shapes(loaded_shapes, by_row=True)


def _cannot_convert(packed: PackedTensors, model: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"{model}: {packed.names[0]}: transformers cannot load the tensor into "
        f"{packed.first_loaded} ({why}); load the model with transformers and save it again"
    )
