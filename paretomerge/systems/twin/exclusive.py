"""The exclusive part of a task: v_t = theta_t - theta*, each matrix cut to its largest directions.

Twin-Merging, Lu et al. 2024, arXiv 2406.15479: the truncated singular value decomposition of each
matrix; tensors of one dimension stay whole. Embeddings are matrices like others, as in the
published program.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from paretomerge.errors import CheckpointError
from paretomerge.merging.singular import factors_of_rank, singular_vectors

_LEFT, _RIGHT, _WHOLE = ".left", ".right", ".whole"


@dataclass(frozen=True)
class LowRank:
    """A matrix as the product of two.

    Attributes:
        left: `(rows, r)`.
        right: `(r, columns)`.
    """

    left: Tensor
    right: Tensor

    @property
    def n_dims(self) -> int:
        """Dimensions of the tensor."""
        return 2

    def dense(self) -> Tensor:
        """The whole matrix `(rows, columns)`, in float32."""
        return self.left.float() @ self.right.float()


@dataclass(frozen=True)
class Whole:
    """A tensor that is stored as it is.

    Attributes:
        tensor: The tensor.
    """

    tensor: Tensor

    @property
    def n_dims(self) -> int:
        """Dimensions of the tensor."""
        return self.tensor.dim()

    def dense(self) -> Tensor:
        """The tensor in float32."""
        return self.tensor.float()


Part = LowRank | Whole
"""What a task adds to one tensor."""

Parts = Mapping[str, Part]
"""Name of a tensor in the checkpoint -> what a task adds to it; nothing to the others."""


def rank_of(shape: tuple[int, ...], share: float) -> int:
    """Directions that are stored of a matrix: a share of its full rank, at least one."""
    # Shares are decimal numbers: 0.29 * 100 is below 29.
    return max(1, int(share * min(shape) + 1e-9))


def compress(delta: Tensor, share: float, dtype: torch.dtype) -> Part:
    """Store a difference of weights in fewer numbers.

    Args:
        delta: theta_t - theta*, of one or two dimensions, in float32.
        share: Directions that are stored, as a share of the full rank, above 0 and at most 1.
        dtype: The dtype of what is stored.

    Returns:
        The factors, on the CPU; the tensor itself where they would hold as many numbers or more.
    """
    if delta.dim() == 1:
        return Whole(delta.to("cpu", dtype))
    rank = rank_of(tuple(delta.shape), share)
    if rank * sum(delta.shape) >= delta.numel():
        return Whole(delta.to("cpu", dtype))
    left, right = factors_of_rank(*singular_vectors(delta), rank)
    left, right = left.to("cpu", dtype), right.to("cpu", dtype)
    return LowRank(left.contiguous(), right.contiguous())


def save_parts(parts: Parts, file: Path) -> None:
    """Write the parts of a task as a safetensors file."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for name, part in parts.items():
        if isinstance(part, Whole):
            tensors[name + _WHOLE] = part.tensor.contiguous()
        else:
            tensors[name + _LEFT] = part.left
            tensors[name + _RIGHT] = part.right
    save_file(tensors, file, metadata={"format": "pt"})
    # It gives access to the owner alone; a model folder is like any other folder.
    file.chmod(0o644)


def load_parts(file: Path) -> dict[str, Part]:
    """Read what `save_parts` wrote.

    Args:
        file: The file.

    Returns:
        Name of a tensor -> what the task adds to it.

    Raises:
        CheckpointError: The file is damaged or holds something else.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{file}: cannot be read: {error}; make the Twin-Merging folder again"
        ) from error
    parts: dict[str, Part] = {}
    for key, tensor in tensors.items():
        if key.endswith(_WHOLE):
            parts[key.removesuffix(_WHOLE)] = Whole(tensor)
        elif key.endswith(_LEFT):
            name = key.removesuffix(_LEFT)
            right = tensors.get(name + _RIGHT)
            if right is None or right.shape[0] != tensor.shape[1]:
                raise CheckpointError(
                    f"{file}: {name}: the two factors do not belong together; make the "
                    "Twin-Merging folder again"
                )
            parts[name] = LowRank(tensor, right)
        elif not key.endswith(_RIGHT):
            raise CheckpointError(
                f"{file}: {key}: not a part of a Twin-Merging folder; make the folder again"
            )
    return parts
