"""Token sequences side by side in one tensor. What is put in is token 0, which nothing looks at."""

from collections.abc import Sequence
from typing import Any

import torch


def padded_right(rows: Sequence[Sequence[int]], device: Any) -> torch.Tensor:
    """`(rows, longest)`; a causal model needs no mask for it."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)


def padded_left(
    rows: Sequence[Sequence[int]], device: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, mask and positions, `(rows, longest)` each: what follows comes right behind every row."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*[0] * (longest - len(row)), *row] for row in rows], device=device)
    mask = torch.tensor(
        [[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device
    )
    return ids, mask, (mask.cumsum(1) - 1).clamp_min(0)
