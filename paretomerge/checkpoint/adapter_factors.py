"""Low-rank updates of an adapter, and tensors of a model with such an update."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from paretomerge.checkpoint.operand import Operand, StoredTensor, matrix_shape

if TYPE_CHECKING:
    import torch

# Elements of a product that are computed together. The chunks are fixed, whatever rows are read:
# products of other shapes round differently, and a merge must not depend on its blocks.
_CHUNK_ELEMENTS = 1 << 16


@dataclass(frozen=True)
class Factors:
    """Low-rank factors of an update: delta W = scale B A (Hu et al. 2021, section 4.1).

    Attributes:
        b: (rows of W, rank).
        a: (rank, columns of W).
        scale: lora_alpha / rank, or lora_alpha / sqrt(rank) with rsLoRA (Kalajdzievski 2023).
        transposed: Whether B A is the update of the transpose (embeddings, Conv1D).
    """

    b: StoredTensor
    a: StoredTensor
    scale: float
    transposed: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of W."""
        rows = self.b.shape[0]
        columns = self.a.shape[1]
        return (columns, rows) if self.transposed else (rows, columns)

    def is_equal(self, other: "Factors") -> bool:
        """Whether two updates have the same factors, transposed or not."""
        if self.shape != other.shape or self.scale != other.scale:
            return False
        left, right = self.read()
        other_left, other_right = other.read()
        return left.equal(other_left) and right.equal(other_right)

    def read(self) -> "tuple[torch.Tensor, torch.Tensor]":
        """Read the factors (left, right) whose product has the shape of W, in float32."""
        b = self.b.rows(0, self.b.shape[0])
        a = self.a.rows(0, self.a.shape[0])
        if self.transposed:
            return a.T.contiguous(), b.T.contiguous()
        return b, a

    def pairs(self) -> "list[tuple[torch.Tensor, torch.Tensor]]":
        """Read the factors of all matrices that W consists of: there is one."""
        return [self.read()]


@dataclass(frozen=True)
class ExpertFactors:
    """Low-rank factors of an update of stacked experts, as peft's `ParamWrapper` has them.

    Attributes:
        b: (output, rank x experts), the experts next to each other.
        a: (experts x rank, input), the ranks next to each other.
        scale: See `Factors`.
        n_experts: Number of experts.
        transposed: Whether W is (experts, input, output) instead of (experts, output, input).
    """

    b: StoredTensor
    a: StoredTensor
    scale: float
    n_experts: int
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of W."""
        rows = self.b.shape[0]
        columns = self.a.shape[1]
        size = (columns, rows) if self.transposed else (rows, columns)
        return (self.n_experts, *size)

    def pairs(self) -> "list[tuple[torch.Tensor, torch.Tensor]]":
        """Read the factors (left, right) of each expert, in float32."""
        b = self.b.rows(0, self.b.shape[0])
        a = self.a.rows(0, self.a.shape[0])
        all_b = b.view(b.shape[0], -1, self.n_experts)
        all_a = a.view(self.n_experts, -1, a.shape[1])
        pairs = []
        for expert in range(self.n_experts):
            left = all_b[:, :, expert].contiguous()
            right = all_a[expert]
            if self.transposed:
                left, right = right.T.contiguous(), left.T.contiguous()
            pairs.append((left, right))
        return pairs


@dataclass(frozen=True)
class AdaptedTensor:
    """A tensor of a model plus the products of its adapter's factors.

    Attributes:
        stored: The model's own tensor.
        factors: The factors of the update.
    """

    stored: Operand
    factors: Factors | ExpertFactors

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return self.stored.shape

    @property
    def dtype(self) -> str:
        """Dtype of the stored tensor, as torch names it."""
        return self.stored.dtype

    @cached_property
    def _pairs(self) -> "list[tuple[torch.Tensor, torch.Tensor]]":
        return self.factors.pairs()

    def rows(
        self,
        first: int,
        end: int,
        device: str = "cpu",
    ) -> "torch.Tensor":
        """Read rows [first, end) in float32; see `Operand.rows`."""
        merged = self.stored.rows(first, end, device)
        n_rows = matrix_shape(self.shape)[0] // len(self._pairs)
        if not n_rows:
            return merged
        for k in range(first // n_rows, math.ceil(end / n_rows)):
            # The rows of matrix k.
            start = k * n_rows
            low = max(first, start)
            high = min(end, start + n_rows)
            self._add_product(k, merged[low - first : high - first], low - start)
        return merged

    def _add_product(self, k: int, target: "torch.Tensor", first: int) -> None:
        """Add the update of matrix k to some of its rows, which begin at row `first` of it."""
        left, right = self._pairs[k]
        n_rows, n_columns = left.shape[0], right.shape[1]
        end = first + len(target)
        chunk = max(1, _CHUNK_ELEMENTS // max(1, n_columns))
        chunk_of_first = first // chunk * chunk
        for start in range(chunk_of_first, end, chunk):
            stop = min(start + chunk, n_rows)
            # The factors are small, so the product is computed on the CPU for every device.
            product = left[start:stop] @ right
            product.mul_(self.factors.scale)
            low = max(first, start)
            high = min(end, stop)
            update = product[low - start : high - start]
            target[low - first : high - first].add_(update.to(target.device))
