"""Tensors in the form that transformers gives them in memory, and back, read a few rows at a time.

transformers stacks, cuts, transposes or reorders some tensors while it loads them. All these
conversions move elements and change none. So they are applied here to the positions of the
elements instead of the elements, with transformers' own code; what is read later is only what is
asked for.
"""

from collections.abc import Sequence
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

# Layers have the same conversions, so few differ. Those of single elements take more memory.
_MAX_ROW_MOVES = 64
_MAX_ELEMENT_MOVES = 4
_STACKED = 3  # dimensions of stacked experts


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

        n_rows, columns = matrix_shape(self.shape)
        if first == end or not columns:
            return torch.empty((end - first, columns), device=device)
        per_slab = n_rows // self.moves.n_slabs
        blocks = []
        while first < end:
            slab = first // per_slab
            start = slab * per_slab
            stop = min(end, start + per_slab)
            blocks.append(self._slab_rows(slab, first - start, stop - start, device))
            first = stop
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks)

    def _slab_rows(
        self, slab: int, first: int, end: int, device: str
    ) -> "torch.Tensor":
        """Read rows [first, end) of a slab."""
        import torch

        if self.moves.n_slabs > 1:
            return self._whole_slab(slab, device)[first:end].clone()
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

    def _whole_slab(self, slab: int, device: str) -> "torch.Tensor":
        """Read a slab. The last one stays in memory: its rows may be all over the stored one."""
        import torch

        known = self._slabs.get((slab, device))
        if known is None:
            (part,) = self.parts
            per_slab = matrix_shape(part.shape)[0] // self.moves.n_slabs
            stored = part.rows(slab * per_slab, (slab + 1) * per_slab, device)
            order = torch.from_numpy(self._positions).to(device)
            known = stored.view(-1)[order].view(-1, matrix_shape(self.shape)[1])
            self._slabs.clear()
            self._slabs[slab, device] = known
        return known

    @cached_property
    def _slabs(self) -> "dict[tuple[int, str], torch.Tensor]":
        return {}

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
        """Where the rows or elements of each part begin."""
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
        n_slabs: Number of equal slabs along the first axis that each move alike, such as experts
            that are transposed; positions are those in one slab.
        is_identity: Whether nothing is moved.
        packed: One group of tensors that is converted in this way.
    """

    patterns: tuple[str, ...]
    stored_shapes: tuple[Shape, ...]
    loaded_shapes: tuple[Shape, ...]
    by_row: bool
    n_slabs: int
    is_identity: bool
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
    shapes = moves.stored_shapes
    if moves.n_slabs > 1:
        shapes = tuple((1, *shape[1:]) for shape in shapes)
    units = _unit_shapes(shapes, moves.by_row)
    if moves.is_identity:
        unmoved = np.arange(int(np.prod(units[0])))
        return [unmoved], [unmoved]
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
    import torch

    tensors = [torch.empty(shape, device="meta") for shape in shapes]
    # The conversions raise exceptions of any class for tensors that they were not made for.
    try:
        converted = packed.convert(tensors)
    except Exception as error:
        raise _cannot_convert(packed, model, str(error)) from error
    loaded_shapes = tuple(tuple(tensor.shape) for tensor in converted.values())
    n_stored = sum(int(np.prod(shape)) for shape in shapes)
    n_loaded = sum(int(np.prod(shape)) for shape in loaded_shapes)
    if n_stored != n_loaded:
        raise _cannot_convert(packed, model, f"{n_stored} weights become {n_loaded}")
    # Experts that are transposed in some checkpoints only.
    is_identity = len(tensors) == 1 and next(iter(converted.values())) is tensors[0]
    by_row = is_identity or _moves_rows(packed, shapes, loaded_shapes)
    moves = Moves(
        patterns=(*packed.patterns, repr(packed.converter)),
        stored_shapes=tuple(shapes),
        loaded_shapes=loaded_shapes,
        by_row=by_row,
        n_slabs=1 if by_row else _count_slabs(packed, shapes, loaded_shapes),
        is_identity=is_identity,
        packed=_Unhashed(packed),
    )
    return tuple(converted), moves


def _count_slabs(
    packed: PackedTensors, shapes: Sequence[Shape], loaded_shapes: Sequence[Shape]
) -> int:
    """Number of slabs along the first axis of one tensor that each move alike; else 1.

    The positions of all elements of a large model's experts would take gigabytes.
    """
    if len(shapes) != 1 or len(loaded_shapes) != 1 or len(shapes[0]) != _STACKED:
        return 1
    n_slabs, *size = shapes[0]
    if loaded_shapes[0][0] != n_slabs or not np.prod(shapes[0]):
        return 1
    # What two slabs show holds for all, for no conversion treats later slabs differently.
    (converted,) = packed.convert(_positions_of([(2, *size)])).values()
    if tuple(converted.shape) != (2, *loaded_shapes[0][1:]):
        return 1
    first, second = converted
    n_elements = int(np.prod(size))
    is_alike = bool((second - n_elements == first).all()) and first.max() < n_elements
    return n_slabs if is_alike else 1


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
