"""An embedding in the merged vocabulary, read a block of rows at a time."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from paretomerge.checkpoint.operand import Operand
from paretomerge.checkpoint.vocabulary import RowMap, RowSources

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
        if self._is_vector:
            return (*own_shape[:-1], n_rows)
        return (n_rows, *own_shape[1:])

    @property
    def dtype(self) -> str:
        """Dtype of the stored tensor, as torch names it."""
        return self.operand.dtype

    def rows(
        self,
        first: int,
        end: int,
        device: str = "cpu",
    ) -> "torch.Tensor":
        """Read rows [first, end) in float32; see `Operand.rows`."""
        if self._is_vector:
            return self._vector(device)
        if self.row_map.is_identity:
            return self.operand.rows(first, end, device)
        merged = self._token_rows(first, end, device)
        n_tokens = self.row_map.n_tokens
        # Padding rows hold the mean, as in `RowMap.apply`, which says why.
        if end > n_tokens:
            first_padding = max(n_tokens - first, 0)
            merged[first_padding:] = self._mean_row.to(device)
        return merged

    @property
    def _is_vector(self) -> bool:
        """One entry per token: a bias, or BART's bias of shape (1, tokens)."""
        own_shape = self.operand.shape
        return len(own_shape) == 1 or own_shape[0] == 1

    def _vector(self, device: str) -> "torch.Tensor":
        def donor_vector(model: str) -> "torch.Tensor":
            return self._donors[model].rows(0, 1, device)[0]

        own_vector = self.operand.rows(0, 1, device)[0]
        vector = self.row_map.apply(own_vector, donor_vector)
        # An identity map gives a view, and the caller may write to what it gets.
        return vector.clone()[None]

    def _token_rows(
        self,
        first: int,
        end: int,
        device: str,
    ) -> "torch.Tensor":
        """Rows [first, end), with zeros for rows that no token has."""
        import torch

        n_columns = self.shape[1]
        merged = torch.zeros((end - first, n_columns), device=device)
        own_rows = self.row_map.own_rows[first:end]
        # Consecutive rows are read together: most of a vocabulary is shared and in one order.
        is_jump = np.diff(own_rows) != 1
        run_starts = np.flatnonzero(is_jump) + 1
        for run in np.split(np.arange(len(own_rows)), run_starts):
            start, stop = run[0], run[-1] + 1
            own_row = int(own_rows[start])
            if own_row >= 0:
                own_end = own_row + len(run)
                merged[start:stop] = self.operand.rows(own_row, own_end, device)
        for row in range(first, end):
            sources = self.row_map.donor_rows.get(row)
            if sources:
                merged[row - first] = self._mean_of(sources, device)
        return merged

    def _mean_of(self, sources: RowSources, device: str) -> "torch.Tensor":
        """Mean of some rows of donors."""
        import torch

        rows = []
        for model, donor_row in sources:
            block = self._donors[model].rows(donor_row, donor_row + 1, device)
            rows.append(block[0])
        return torch.stack(rows).mean(0)

    @cached_property
    def _donors(self) -> dict[str, Operand]:
        """The tensor of each donor, made once: a tensor that is computed is then computed once."""
        return {model: self.operand_of(model) for model in self.row_map.donors}

    @cached_property
    def _mean_row(self) -> "torch.Tensor":
        """(columns,) mean over the rows of all tokens, which the padding rows hold."""
        import torch

        n_tokens = self.row_map.n_tokens
        n_columns = self.shape[1]
        # Always in chunks of one size and on the CPU: the sum, and so the merged weights, must
        # not depend on the blocks of a merge or on its device.
        total = torch.zeros(n_columns, dtype=torch.float64)
        for start in range(0, n_tokens, _MEAN_CHUNK_ROWS):
            end = min(start + _MEAN_CHUNK_ROWS, n_tokens)
            chunk = self._token_rows(start, end, "cpu")
            total += chunk.double().sum(0)
        mean = total / n_tokens
        return mean.to(torch.float32)
