"""An embedding as it would lie in the merged vocabulary: rows taken where they are, a block at a time."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from paretomerge.checkpoint.operand import Operand
from paretomerge.checkpoint.vocabulary import RowMap

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Remapped:
    """A model's `own` embedding, head or vector over tokens in another vocabulary. `of` gives the same tensor of another model."""

    own: Operand
    row_map: RowMap
    of: Callable[[str], Operand]

    @property
    def shape(self) -> tuple[int, ...]:
        n = len(self.row_map.own)
        return (*self.own.shape[:-1], n) if self._is_vector else (n, *self.own.shape[1:])

    @property
    def _is_vector(self) -> bool:
        """One entry per token: a bias, or BART's (1, tokens)."""
        return len(self.own.shape) == 1 or self.own.shape[0] == 1

    @property
    def dtype(self) -> str:
        return self.own.dtype

    def rows(self, first: int, end: int, device: str = "cpu") -> "torch.Tensor":
        if self._is_vector:
            vector = self.row_map.bring(
                self.own.rows(0, 1, device)[0],
                lambda model: self._donors[model].rows(0, 1, device)[0],
            )
            return vector.clone()[None]
        if self.row_map.identity:
            return self.own.rows(first, end, device)
        return self._gathered(first, end, device)

    def _gathered(self, first: int, end: int, device: str) -> "torch.Tensor":
        import torch

        wanted = self.row_map.own[first:end]
        merged = torch.zeros((end - first, self.shape[1]), device=device)
        breaks = np.flatnonzero(np.diff(wanted) != 1) + 1
        for run in np.split(np.arange(len(wanted)), breaks):
            if (row := int(wanted[run[0]])) >= 0:
                merged[run[0] : run[-1] + 1] = self.own.rows(row, row + len(run), device)
        for row in range(first, end):
            if pairs := self.row_map.filled.get(row):
                merged[row - first] = torch.stack(
                    [self._donors[model].rows(r, r + 1, device)[0] for model, r in pairs]
                ).mean(0)
        if end > self.row_map.tokens:
            merged[max(self.row_map.tokens - first, 0) :] = self._mean.to(device)
        return merged

    @cached_property
    def _donors(self) -> dict[str, Operand]:
        """Each made once: what a step computes for a tensor is then computed once, too."""
        return {model: self.of(model) for model in self.row_map.donors}

    @cached_property
    def _mean(self) -> "torch.Tensor":
        """(columns,) the mean of all tokens' rows: what rows that only make up a multiple hold."""
        import torch

        total = torch.zeros(self.shape[1], dtype=torch.float64)
        for start in range(0, self.row_map.tokens, 1024):
            total += (
                self._gathered(start, min(start + 1024, self.row_map.tokens), "cpu").double().sum(0)
            )
        return (total / self.row_map.tokens).to(torch.float32)
