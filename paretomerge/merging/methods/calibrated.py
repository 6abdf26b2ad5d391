"""Averages that know from text which directions of its weights each source uses: regmean, fisher.

Both are weighted means of the deltas with a matrix, or a vector, in place of a number as the weight
of a source: theta_0 + lambda s (sum |w_i| A_i)^-1 sum w_i A_i tau_i. With equal A_i it is the
weighted mean of the tau_i (s = 1), or with `normalize: false` their sum, as in task arithmetic
(s = sum |w_i|). The papers have theta_i in place of tau_i, which is the same where the inverse
exists. Where it does not, the text has said nothing, and the mean is taken, as for tensors without
statistics; in the papers' form such directions would become zero.

A negative weight moves the merge away from its source. |w_i| keeps the sum of the A_i positive.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from paretomerge.merging.block import Block, BlockMerger, Inputs
from paretomerge.merging.methods.common import linear_combination, merge_in_pieces
from paretomerge.merging.methods.method import ROWS_OF_PIECE
from paretomerge.merging.statistics import Statistic

# Of matrices with a diagonal of ones. Those that were summed up in float32 are known no better.
_LEAST_EIGENVALUE = 1e-6
# Of the power method. The margin makes up for what so many steps miss.
_POWER_STEPS = 20
_POWER_MARGIN = 1.5


def regmean(inputs: Inputs) -> BlockMerger:
    """RegMean: least squares of what the layers of the sources put out on their own text.

    Jin et al. 2023 (Dataless knowledge fusion), arXiv 2212.09849, sec. 3:
    W^T = (sum w_i G_i)^-1 sum w_i G_i W_i^T with G_i = mean of x x^T. The entries off the diagonal
    of G_i are multiplied by `alpha`.
    """
    return _least_squares(inputs, inputs.number("alpha"))


def regmean_pp(inputs: Inputs) -> BlockMerger:
    """RegMean++: RegMean on inputs that came through the merged lower layers.

    Nguyen et al. 2025, arXiv 2508.03121, sec. 4. The statistics have been made with an alpha, and
    hold it already.
    """
    return _least_squares(inputs, alpha=1.0)


def fisher(inputs: Inputs) -> BlockMerger:
    """Fisher-weighted averaging: sum c_i (F_i + eps) theta_i / sum c_i (F_i + eps).

    Matena and Raffel 2022, arXiv 2111.09832, eq. 3. F_i are mean squared gradients of single
    examples. c_i is w_i, with `normalize_fisher` divided by the L2 norm of F_i over the model.
    """
    shares = _Shares.of(inputs)
    statistics = _used_statistics(inputs, shares.used)
    if statistics is None:
        return shares.mean()
    eps = inputs.number("eps")
    factors = []
    for i, statistic in zip(shares.used, statistics, strict=True):
        norm = statistic.norm if inputs.flag("normalize_fisher") else 1.0
        factors.append(shares.weights[i] / norm)
    # Only their ratios count. The largest is 1, so that no precision of float32 is too small.
    largest = max(map(abs, factors))
    factors = [factor / largest for factor in factors]

    def merge_block(block: Block) -> Tensor:
        merged = torch.zeros_like(block.base)
        total = torch.zeros_like(block.base)
        for i, statistic, factor in zip(shares.used, statistics, factors, strict=True):
            squares = statistic.operand.rows(block.first, block.end, inputs.device)
            precision = squares.add_(eps).mul_(abs(factor))
            total.add_(precision)
            delta = block.delta(i).mul_(precision)
            if factor < 0:
                delta.neg_()
            merged.add_(delta)
        return merged.div_(total).mul_(shares.scale).add_(block.base)

    return merge_block


@dataclass(frozen=True)
class _Shares:
    """The weights of a merge.

    Attributes:
        weights: w_1 ... w_K.
        scale: What the mean of the deltas is multiplied by.
    """

    weights: Sequence[float]
    scale: float

    @classmethod
    def of(cls, inputs: Inputs) -> "_Shares":
        weights = inputs.per_source("weight")
        scale = inputs.number("lambda")
        if not inputs.flag("normalize"):
            scale *= sum(map(abs, weights))
        return cls(weights, scale)

    @cached_property
    def used(self) -> list[int]:
        """The sources whose weight is not 0."""
        return [i for i, weight in enumerate(self.weights) if weight != 0]

    @cached_property
    def total(self) -> float:
        """The sum of |w_i|."""
        return sum(map(abs, self.weights))

    def mean(self) -> BlockMerger:
        """Merge theta_0 + lambda s sum w_i tau_i / sum |w_i|."""
        if not self.used:
            return linear_combination(self.weights, 1.0)
        factors = [self.scale * weight / self.total for weight in self.weights]
        return linear_combination(factors, 1 - sum(factors))


def _used_statistics(inputs: Inputs, used: Sequence[int]) -> list[Statistic] | None:
    """The statistic of each source that is used; None where the text says nothing of the tensor."""
    if not inputs.statistics or not used:
        return None
    statistics = []
    for i in used:
        statistic = inputs.statistics[i]
        if statistic is None:
            return None
        statistics.append(statistic)
    return statistics


def _least_squares(inputs: Inputs, alpha: float) -> BlockMerger:
    shares = _Shares.of(inputs)
    statistics = _used_statistics(inputs, shares.used)
    if statistics is None:
        return shares.mean()
    of_rows = statistics[0].of_rows
    grams = _Grams(shares, statistics, alpha, inputs.device)
    n_outputs = inputs.columns if of_rows else inputs.rows
    # Either way is the same mean. Products with matrices (inputs, inputs) cost most, so the cheaper
    # way is that with fewer rows.
    merge = grams.mean_of if n_outputs <= grams.size else grams.mean_by_matrices

    def deltas(block: Block) -> Iterator[Tensor]:
        for i in shares.used:
            delta = block.delta(i)
            yield delta.T if of_rows else delta

    def merge_piece(block: Block) -> Tensor:
        merged = merge(deltas(block))
        if of_rows:
            merged = merged.T
        return merged.mul(shares.scale).add_(block.base)

    rows = inputs.rows if of_rows else min(ROWS_OF_PIECE, inputs.rows)
    return merge_in_pieces(inputs, rows, merge_piece)


@dataclass(frozen=True)
class _Grams:
    """The matrices G_i of the sources that are used, and S = sum |w_i| G_i.

    The weighted mean of deltas tau_i (outputs, inputs) is (sum w_i tau_i G_i) S^-1. Where S has no
    inverse, it is m = sum w_i tau_i / sum |w_i|. With the pseudo-inverse S^+ both are one:
    m + (sum w_i tau_i G_i - m S) S^+.

    Nothing is read before a block is asked for: an empty tensor never is.

    Attributes:
        shares: The weights.
        statistics: The G_i, (d, d), of the sources that are used.
        alpha: What the entries off their diagonals are multiplied by.
        device: Where to compute.
    """

    shares: _Shares
    statistics: Sequence[Statistic]
    alpha: float
    device: str

    @property
    def size(self) -> int:
        """The number of inputs, d."""
        return self.statistics[0].operand.shape[0]

    @property
    def weights(self) -> list[float]:
        """The weights of the sources that are used."""
        return [self.shares.weights[i] for i in self.shares.used]

    def gram(self, statistic: Statistic) -> Tensor:
        """One G_i in float64."""
        gram = statistic.operand.rows(0, self.size, self.device).double()
        diagonal = gram.diagonal().clone()
        gram.mul_(self.alpha).diagonal().copy_(diagonal)
        return gram

    @cached_property
    def total(self) -> Tensor:
        """S, in float64."""
        total = torch.zeros(
            self.size, self.size, dtype=torch.float64, device=self.device
        )
        for weight, statistic in zip(self.weights, self.statistics, strict=True):
            total.add_(self.gram(statistic), alpha=abs(weight))
        return total

    @cached_property
    def inverse(self) -> Tensor:
        """S^+, in float64."""
        return _pseudo_inverse(self.total)

    def mean_of(self, deltas: Iterable[Tensor]) -> Tensor:
        """The mean of deltas with fewer rows than columns.

        Args:
            deltas: A delta (n, d) for each source that is used.

        Returns:
            (n, d) in float32.
        """
        deltas = list(deltas)
        mean = torch.zeros_like(deltas[0], dtype=torch.float64)
        for weight, delta in zip(self.weights, deltas, strict=True):
            mean.add_(delta, alpha=weight / self.shares.total)
        # sum w_i tau_i G_i - m S, as a sum over sources that is 0 for equal deltas.
        residual = torch.zeros_like(mean)
        for weight, delta, statistic in zip(
            self.weights, deltas, self.statistics, strict=True
        ):
            change = delta * weight - mean * abs(weight)
            residual.addmm_(change, self.gram(statistic))
        return mean.addmm_(residual, self.inverse).float()

    def mean_by_matrices(self, deltas: Iterable[Tensor]) -> Tensor:
        """The same for deltas with more rows than columns, of which one is in memory at a time."""
        merged: Tensor | None = None
        for delta, matrix in zip(deltas, self.matrices, strict=True):
            if merged is None:
                merged = torch.zeros_like(delta)
            merged.addmm_(delta, matrix)
        assert merged is not None
        return merged

    @cached_property
    def matrices(self) -> list[Tensor]:
        """M_i = w_i G_i S^+ + (1 - S S^+) w_i / sum |w_i|: the mean is sum tau_i M_i.

        One matrix (d, d) in float32 for each source that is used.
        """
        # What the inverse does not reach. It also takes up the rounding: with equal signs the M_i
        # add up to 1, so that copies of one model give that model.
        rest = (self.total @ self.inverse).neg_()
        rest.diagonal().add_(1.0)
        matrices = []
        for weight, statistic in zip(self.weights, self.statistics, strict=True):
            matrix = (self.gram(statistic) @ self.inverse).mul_(weight)
            matrix.add_(rest, alpha=weight / self.shares.total)
            matrices.append(matrix.float())
        return matrices


def _pseudo_inverse(gram: Tensor) -> Tensor:
    """The inverse of a matrix G, (d, d) in float64; zero on inputs of which G knows nothing.

    G is first scaled to a diagonal of ones: features of language models differ in size by factors
    of thousands, which says nothing about what is known of them.
    """
    size = gram.diagonal()
    # A feature that is always zero has no row.
    scale = torch.where(size > 0, size, torch.ones_like(size)).rsqrt()
    scaled = gram * scale[:, None] * scale
    inverse, unknown = _inverse(scaled)
    inverse.mul_(scale).mul_(scale[:, None])
    if unknown is None:
        return inverse
    # An orthonormal basis Q of the inputs x with G x = 0, and (1 - Q Q^T) inverse (1 - Q Q^T)
    basis = torch.linalg.qr(unknown * scale[:, None]).Q
    inverse -= basis @ (basis.T @ inverse)
    inverse -= (inverse @ basis) @ basis.T
    return inverse


def _inverse(matrix: Tensor) -> tuple[Tensor, Tensor | None]:
    """The inverse of a matrix, (d, d), and the eigenvectors, (d, n), that it leaves out.

    None where it leaves out nothing.
    """
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if not failed:
        inverse = torch.cholesky_inverse(factor)
        condition = _largest_eigenvalue(matrix) * _largest_eigenvalue(inverse)
        if condition * _LEAST_EIGENVALUE < 1:
            return inverse, None
    # A tenth of the speed, and seldom needed: with alpha below 1 the matrix is well-conditioned.
    values, vectors = torch.linalg.eigh(matrix)
    known = values > _LEAST_EIGENVALUE * values[-1]
    kept = vectors[:, known]
    inverse = (kept / values[known]) @ kept.T
    return inverse, vectors[:, ~known]


def _largest_eigenvalue(matrix: Tensor) -> float:
    """The largest eigenvalue of a positive definite matrix, too large rather than too small.

    By the power method. The trace bounds it from above.
    """
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(len(matrix), generator=generator, dtype=matrix.dtype)
    vector = vector.to(matrix.device)
    norm = vector.norm()
    for _ in range(_POWER_STEPS):
        vector = matrix @ (vector / norm)
        norm = vector.norm()
    estimate = _POWER_MARGIN * float(norm)
    return min(estimate, float(matrix.trace()))
