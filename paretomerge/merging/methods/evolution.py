"""Crossover of two models, entry by entry, as evolutionary merging uses it."""

import torch
from torch import Tensor

from paretomerge.merging.block import Block, BlockMerger, Inputs

_RANDOM_RANGE = 65_536  # random integers are below this
_OTHER = 1  # the place of the other model; the base is the first source


def crossover(inputs: Inputs) -> BlockMerger:
    """Move a random share of the entries from the base towards the other model.

    Du et al. 2024 (Evolver), arXiv 2406.12208: mutation and binomial crossover. An entry becomes
    (1 - t) theta_0 + t theta_1 with probability `crossover_rate`, else it stays theta_0. theta_0 is
    the base, which is the first source: the parent. Evolver's F is t, its CR the crossover rate.
    """
    t = inputs.number("t")
    # In steps of 1 / 65536, as for all random masks.
    limit = round(inputs.number("crossover_rate") * _RANDOM_RANGE)

    def merge_block(block: Block) -> Tensor:
        parent = block.source(0)
        if limit == 0 or t == 0:
            return parent
        child = block.source(_OTHER)
        if t != 1:
            # At t = 1 the entries are those of the other model, bit for bit.
            child.mul_(t).add_(parent.mul(1 - t))
        if limit == _RANDOM_RANGE:
            return child
        is_crossed = torch.from_numpy(block.random_uint16(_OTHER) < limit)
        is_crossed = is_crossed.view(child.shape).to(child.device)
        return torch.where(is_crossed, child, parent)

    return merge_block
