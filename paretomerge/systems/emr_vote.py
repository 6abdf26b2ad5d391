"""The arithmetic of EMR-Merging on blocks: electing the unified weights, and the sums of lambda.

Huang et al. 2024, arXiv 2405.17461, section 3.2.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from paretomerge.errors import CheckpointError


class Elected(NamedTuple):
    """The unified weights of a block.

    Attributes:
        unified: theta_0 + tau_u: in each entry the weight of one model, or of the base.
        size: |tau_u|.
        votes: tau_i s of each model, which is positive where its mask is 1.
    """

    unified: Tensor
    size: Tensor
    votes: list[Tensor]


def elect(base: Tensor, sources: Sequence[Tensor]) -> Elected:
    """Elect the unified weights (Huang et al. 2024, section 3.2, steps 1 and 2).

    Args:
        base: theta_0, in float32.
        sources: The theta_i, likewise.
    """
    deltas = [source - base for source in sources]
    total = deltas[0].clone()
    for delta in deltas[1:]:
        total.add_(delta)
    # s, which is -1 where the mean is 0, as in the authors' program.
    sign = (total > 0).float().mul_(2).sub_(1)
    unified = base.clone()
    size = torch.zeros_like(base)
    votes = []
    for source, delta in zip(sources, deltas, strict=True):
        vote = delta.mul_(sign)
        votes.append(vote)
        # The weight itself and not base + tau, which would round.
        unified = torch.where(vote > size, source, unified)
        torch.maximum(size, vote, out=size)
    return Elected(unified, size, votes)


@dataclass
class Totals:
    """Sums over the tensors of one task.

    Attributes:
        of_delta: Of mean |tau_i|.
        of_masked: Of mean |M_i tau_u|.
        n_masked: Parameters whose mask is 1.
        n_parameters: All parameters.
    """

    of_delta: float = 0.0
    of_masked: float = 0.0
    n_masked: int = 0
    n_parameters: int = 0

    @property
    def density(self) -> float:
        """The share of parameters whose mask is 1."""
        return self.n_masked / self.n_parameters

    def add(self, other: "Totals") -> None:
        """Add the sums over other parameters."""
        self.of_delta += other.of_delta
        self.of_masked += other.of_masked
        self.n_masked += other.n_masked
        self.n_parameters += other.n_parameters

    def scale(self, name: str) -> float:
        """Lambda.

        Raises:
            CheckpointError: If it is 0/0, or if no entry of the model is in the unified one.
        """
        if not self.of_delta:
            raise CheckpointError(
                f"{name}: equals the base, so that its lambda is 0/0; leave it out"
            )
        if not self.of_masked:
            raise CheckpointError(
                f"{name}: is outvoted in every parameter, so that nothing of it is left; leave it "
                "out"
            )
        return self.of_delta / self.of_masked
