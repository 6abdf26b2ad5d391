"""Interpolation and means on a sphere: slerp, nuslerp, multislerp, karcher.

Their results lie in the span of the sources. One pass for the inner products is enough to find the
coefficients, whatever the number of iterations.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from paretomerge.merging.block import Block, BlockMerger, Inputs
from paretomerge.merging.methods.common import (
    gram_matrix,
    linear_combination,
    merge_whole_tensor,
    sum_tensors,
)
from paretomerge.types import Array

_COLINEAR = 0.9995  # |cos| above which slerp is linear (mergekit's threshold)
_SMALL = 1e-8
# In float32, two directions with a cosine below this are opposite: no arc between them is the
# shortest.
_OPPOSITE = -1 + 1e-6
_MIN_LENGTHS = 1e-14  # inner products are not divided by less
_CANCELLED = 1e-3  # in float32, unit vectors whose mean is shorter than this cancel


def slerp(inputs: Inputs) -> BlockMerger:
    """Spherical interpolation of two models.

    Shoemake 1985: sin((1 - t) Omega) / sin(Omega) theta_0 + sin(t Omega) / sin(Omega) theta_1.
    Omega is the angle between the two tensors. t = 0 gives the base, which is the first source, t =
    1 the other model. The interpolation is linear where the two are nearly colinear.
    """
    products = gram_matrix(inputs)
    coefficients = _slerp_coefficients(products, inputs.number("t"))
    return linear_combination(coefficients)


def _slerp_coefficients(products: Array, t: float) -> list[float]:
    """Coefficients of the two sources, from their (2, 2) inner products."""
    first = math.sqrt(products[0, 0])
    second = math.sqrt(products[1, 1])
    # mergekit does not normalise a tensor of zeros.
    first_divisor = first if first > _SMALL else 1.0
    second_divisor = second if second > _SMALL else 1.0
    cosine = products[0, 1] / (first_divisor * second_divisor)
    if abs(cosine) > _COLINEAR:
        return [1 - t, t]
    angle = math.acos(cosine)
    sine = math.sin(angle)
    first_coefficient = math.sin((1 - t) * angle) / sine
    second_coefficient = math.sin(t * angle) / sine
    return [first_coefficient, second_coefficient]


def nuslerp(inputs: Inputs) -> BlockMerger:
    """Spherical interpolation at t = w_2 / (w_1 + w_2), of two models or of their deltas to a base.

    mergekit. One vector is the whole tensor; with `nuslerp_flatten: false` each row is one, and
    with `nuslerp_row_wise: true` besides each column (mergekit's name for it).
    """
    first, second = inputs.per_source("weight")
    weight_sum = first + second
    t = 0.5
    if abs(weight_sum) >= 1e-6:
        t = second / weight_sum
    flatten = inputs.flag("nuslerp_flatten")
    if not flatten and len(inputs.shape) >= 2:
        return _nuslerp_by_vector(inputs, t)
    deltas = inputs.base is not None
    products = gram_matrix(inputs, deltas)
    first_length = math.sqrt(products[0, 0])
    second_length = math.sqrt(products[1, 1])
    lengths = first_length * second_length
    cosine = products[0, 1] / max(lengths, _MIN_LENGTHS)
    first_coefficient, second_coefficient = _arc_coefficients(
        torch.tensor(cosine, dtype=torch.float64), t
    )
    a = first_coefficient.item()
    b = second_coefficient.item()
    # theta_0 + a tau_1 + b tau_2 = (1 - a - b) theta_0 + a theta_1 + b theta_2
    base_weight = 1 - a - b if deltas else 0.0
    return linear_combination([a, b], base_weight)


def _nuslerp_by_vector(inputs: Inputs, t: float) -> BlockMerger:
    """Interpolates each row, or each column, by its own angle."""
    by_column = inputs.flag("nuslerp_row_wise")
    deltas = inputs.base is not None
    axis = 0 if by_column else -1

    def merge_block(block: Block) -> Tensor:
        shape = inputs.shape if by_column else (block.rows, inputs.columns)
        read = block.delta if deltas else block.source
        first = read(0).view(shape)
        second = read(1).view(shape)
        cosines = _cosines(first, second, axis)
        a, b = _arc_coefficients(cosines, t)
        first.mul_(a.to(first.dtype))
        second.mul_(b.to(first.dtype))
        merged = first.add_(second).view(block.rows, -1)
        return merged.add_(block.base) if deltas else merged

    # A column crosses all blocks, so it needs the whole tensor.
    return merge_whole_tensor(inputs, merge_block) if by_column else merge_block


def _cosines(
    first: Tensor,
    second: Tensor,
    axis: int,
) -> Tensor:
    """Cosines of the vectors along an axis, in float64; the axis stays, with size 1."""
    first, second = first.double(), second.double()
    first_norms = first.norm(dim=axis, keepdim=True)
    second_norms = second.norm(dim=axis, keepdim=True)
    norms = first_norms * second_norms
    products = (first * second).sum(axis, keepdim=True)
    cosines: Tensor = products / norms.clamp_min(_MIN_LENGTHS)
    return cosines


def _arc_coefficients(cosine: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """Slerp coefficients of pairs of vectors with these cosines (float64), at `t`.

    The interpolation is linear where the arc has no direction. There, mergekit divides by a float32
    sine that is only a rounding error.
    """
    angle = torch.acos(cosine.clamp(-1, 1))
    sine = torch.sin(angle)
    is_linear = (sine < _SMALL) | (cosine < _OPPOSITE)
    # 1 instead of a sine that is only a rounding error
    ones = torch.ones_like(sine)
    divisor = torch.where(is_linear, ones, sine)
    first = torch.sin((1 - t) * angle) / divisor
    second = torch.sin(t * angle) / divisor
    linear_first = torch.full_like(sine, 1 - t)
    linear_second = torch.full_like(sine, t)
    first = torch.where(is_linear, linear_first, first)
    second = torch.where(is_linear, linear_second, second)
    return first, second


def multislerp(inputs: Inputs) -> BlockMerger:
    """The weighted mean direction at the weighted mean length, of the models or of their deltas.

    mergekit. The direction is sum w_i theta_i / |theta_i|, the length sum w_i |theta_i|. Where the
    directions cancel, the result is the weighted sum. One model alone is not changed.
    """
    if inputs.n_sources == 1:
        return linear_combination([1.0])
    weights = np.array(inputs.per_source("weight"))
    if inputs.flag("normalize_weights"):
        weights = weights / weights.sum()
    eps = inputs.number("eps")
    products = gram_matrix(inputs, inputs.base is not None)
    norms = np.sqrt(np.diag(products))
    direction = weights / (norms + eps)
    length = _length(direction, products)
    longest = np.abs(direction * norms).sum()
    is_cancelled = length <= max(eps, _CANCELLED * longest)
    if is_cancelled:
        return _sum_of_vectors(inputs, weights.tolist())
    mean_norm = float(weights @ norms)
    # mergekit's exponential map gets a tangent of length eps instead of 0, which shrinks the
    # result.
    shrinkage = math.cos(eps)
    coefficients = direction / length * mean_norm * shrinkage
    return _sum_of_vectors(inputs, coefficients.tolist())


def _sum_of_vectors(inputs: Inputs, coefficients: Sequence[float]) -> BlockMerger:
    """Add up c_i theta_i, or theta_0 + sum c_i tau_i where there is a base."""
    if inputs.base is None:
        return linear_combination(coefficients)

    def merge_block(block: Block) -> Tensor:
        # Not c_i theta_i - c_i theta_0: the coefficient of a small tau_i is so large that its
        # digits are lost.
        terms = []
        for i, coefficient in enumerate(coefficients):
            delta = block.delta(i)
            terms.append(delta.mul_(coefficient))
        return sum_tensors(terms).add_(block.base)

    return merge_block


def karcher(inputs: Inputs) -> BlockMerger:
    """The Riemannian centre of mass of the directions, at the mean length.

    Karcher 1977. Iterates u <- exp_u(mean_i log_u(u_i)) until the step is shorter than `tol`, at
    most `max_iter` times. All vectors are coefficients of the unit vectors u_i = theta_i /
    |theta_i|.
    """
    products = gram_matrix(inputs)
    k = len(products)
    norms = np.sqrt(np.diag(products))
    tolerance = inputs.number("tol")
    nonzero = np.flatnonzero(norms > tolerance)
    if k == 1:
        return linear_combination([1.0])
    if not len(nonzero):
        return linear_combination([0.0] * k)
    lengths = norms[nonzero]
    products_of_nonzero = products[np.ix_(nonzero, nonzero)]
    cosines = products_of_nonzero / np.outer(lengths, lengths)
    max_iter = inputs.integer("max_iter")
    mean = _mean_direction(cosines, tolerance, max_iter)
    coefficients = np.zeros(k)
    # Tensors of zeros have no direction, but count in the mean length.
    coefficients[nonzero] = mean / lengths * norms.mean()
    return linear_combination(coefficients.tolist())


def _mean_direction(
    cosines: Array,
    tolerance: float,
    max_iter: int,
) -> Array:
    """Karcher's iteration: the mean of the unit vectors with these cosines."""
    k = len(cosines)
    arithmetic_mean = np.full(k, 1 / k)
    mean = _normalized(arithmetic_mean, cosines, max(tolerance, _CANCELLED))
    for _ in range(max_iter):
        step = _mean_log(mean, cosines, tolerance)
        size = _length(step, cosines)
        if size < tolerance:
            break
        # exp_u(v) = cos(|v|) u + sin(|v|) / |v| v
        along_mean = math.cos(size) * mean
        along_step = math.sin(size) / size * step
        moved = along_mean + along_step
        mean = _normalized(moved, cosines, tolerance)
    return mean


def _mean_log(
    mean: Array,
    cosines: Array,
    tolerance: float,
) -> Array:
    """The mean over i of log_u(u_i) = angle / sin(angle) (u_i - cos(angle) u); u is `mean`."""
    k = len(mean)
    step = np.zeros(k)
    cosines_to_mean = np.clip(cosines @ mean, -1, 1)
    for i, cosine in enumerate(cosines_to_mean):
        angle = math.acos(cosine)
        sine = math.sin(angle)
        has_direction = cosine > _OPPOSITE and sine > _SMALL
        if angle >= tolerance and has_direction:
            # u_i - cos(angle) u, as coefficients of the unit vectors
            tangent = -cosine * mean
            tangent[i] += 1
            step += tangent * angle / sine / k
    return step


def _normalized(
    vector: Array,
    cosines: Array,
    tolerance: float,
) -> Array:
    """The vector at length 1; the first unit vector where its length is below the tolerance."""
    length = _length(vector, cosines)
    if length >= tolerance:
        return vector / length
    first: Array = np.eye(len(vector))[0]
    return first


def _length(coefficients: Array, products: Array) -> float:
    """The length of a combination of vectors with these inner products."""
    square = float(coefficients @ products @ coefficients)
    # Rounding can make it negative.
    return math.sqrt(max(square, 0.0))
