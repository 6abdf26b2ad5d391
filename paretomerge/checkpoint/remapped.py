"""An embedding in the merged vocabulary, read a block of rows at a time."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from paretomerge.checkpoint.operand import Operand
from paretomerge.checkpoint.vocabulary import RowMap

if TYPE_CHECKING:
    import torch

_MEAN_CHUNK_ROWS = 1024


@dataclass(frozen=True)
class RemappedTensor:
    """A model's embedding, head or per-token vector, with the rows of another vocabulary.

    Attributes:
        operand: The tensor in the model's own vocabulary.
        row_map: Where each output row comes from.
        operand_of: Returns the same tensor of another model, by the model's name.
    """

    operand: Operand
    row_map: RowMap
    operand_of: Callable[[str], Operand]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the merged vocabulary."""
        own_shape = self.operand.shape
        n_rows = self.row_map.n_rows
        return (*own_shape[:-1], n_rows) if self._is_vector else (n_rows, *own_shape[1:])

    @property
    def dtype(self) -> str:
        """Dtype of the stored tensor, as torch names it."""
        return self.operand.dtype

    def rows(self, first: int, end: int, device: str = "cpu") -> "torch.Tensor":
        """Read rows [first, end) in float32; see `Operand.rows`."""
        if self._is_vector:
            return self._vector(device)
        if self.row_map.is_identity:
            return self.operand.rows(first, end, device)
        merged = self._token_rows(first, end, device)
        n_tokens = self.row_map.n_tokens
        if end > n_tokens:
            merged[max(n_tokens - first, 0) :] = self._mean_row.to(device)
        return merged

    @property
    def _is_vector(self) -> bool:
        """One entry per token: a bias, or BART's bias of shape (1, tokens)."""
        return len(self.operand.shape) == 1 or self.operand.shape[0] == 1

    def _vector(self, device: str) -> "torch.Tensor":
        def donor_vector(model: str) -> "torch.Tensor":
            return self._donors[model].rows(0, 1, device)[0]

        own_vector = self.operand.rows(0, 1, device)[0]
        vector = self.row_map.apply(own_vector, donor_vector)
        return vector.clone()[None]

    def _token_rows(self, first: int, end: int, device: str) -> "torch.Tensor":
        """Rows [first, end), with zeros for rows that no token has."""
        import torch

        merged = torch.zeros((end - first, self.shape[1]), device=device)
        wanted = self.row_map.own_rows[first:end]
        # Consecutive rows are read together: most of a vocabulary is shared and in one order.
        breaks = np.flatnonzero(np.diff(wanted) != 1) + 1
        for run in np.split(np.arange(len(wanted)), breaks):
            own_row = int(wanted[run[0]])
            if own_row >= 0:
                block = self.operand.rows(own_row, own_row + len(run), device)
                merged[run[0] : run[-1] + 1] = block
        for row in range(first, end):
            sources = self.row_map.donor_rows.get(row)
            if sources:
                rows = [self._donors[model].rows(r, r + 1, device)[0] for model, r in sources]
                merged[row - first] = torch.stack(rows).mean(0)
        return merged

    @cached_property
    def _donors(self) -> dict[str, Operand]:
        """The tensor of each donor, made once: a tensor that is computed is then computed once."""
        return {model: self.operand_of(model) for model in self.row_map.donors}

    @cached_property
    def _mean_row(self) -> "torch.Tensor":
        """(columns,) mean over the rows of all tokens, which the padding rows hold."""
        import torch

        n_tokens = self.row_map.n_tokens
        total = torch.zeros(self.shape[1], dtype=torch.float64)
        for start in range(0, n_tokens, _MEAN_CHUNK_ROWS):
            end = min(start + _MEAN_CHUNK_ROWS, n_tokens)
            total += self._token_rows(start, end, "cpu").double().sum(0)
        return (total / n_tokens).to(torch.float32)
