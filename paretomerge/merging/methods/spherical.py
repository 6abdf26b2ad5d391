"""Interpolation and means on a sphere: slerp, nuslerp, multislerp, karcher.

Their results lie in the span of the sources. One pass for the inner products is enough to find the
coefficients, whatever the number of iterations.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch

from paretomerge.merging.block import Block, BlockMerger, Inputs
from paretomerge.merging.methods.common import gram_matrix, linear_combination, merge_whole_tensor
from paretomerge.types import Array

_COLINEAR = 0.9995  # |cos| above which slerp is linear (mergekit's threshold)
_SMALL = 1e-8
# In float32, two directions with a cosine below this are opposite: no arc between them is the
# shortest.
_OPPOSITE = -1 + 1e-6
_CANCELLED = 1e-3  # in float32, unit vectors whose mean is shorter than this cancel


def slerp(inputs: Inputs) -> BlockMerger:
    """Spherical interpolation of two models.

    Shoemake 1985: sin((1 - t) Omega) / sin(Omega) theta_0 + sin(t Omega) / sin(Omega) theta_1.
    Omega is the angle between the two tensors. t = 0 gives the base, which is the first source, t =
    1 the other model. The interpolation is linear where the two are nearly colinear.
    """
    products = gram_matrix(inputs)
    return linear_combination(_slerp_coefficients(products, inputs.number("t")))


def _slerp_coefficients(products: Array, t: float) -> list[float]:
    """Coefficients of the two sources, from their (2, 2) inner products."""
    first, second = math.sqrt(products[0, 0]), math.sqrt(products[1, 1])
    first_divisor = first if first > _SMALL else 1.0
    second_divisor = second if second > _SMALL else 1.0
    cosine = products[0, 1] / (first_divisor * second_divisor)
    if abs(cosine) > _COLINEAR:
        return [1 - t, t]
    angle = math.acos(cosine)
    return [math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)]


def nuslerp(inputs: Inputs) -> BlockMerger:
    """Spherical interpolation at t = w_2 / (w_1 + w_2), of two models or of their deltas to a base.

    mergekit. One vector is the whole tensor; with `nuslerp_flatten: false` each row is one, and
    with `nuslerp_row_wise: true` besides each column (mergekit's name for it).
    """
    first, second = inputs.per_source("weight")
    weight_sum = first + second
    t = second / weight_sum if abs(weight_sum) >= 1e-6 else 0.5
    if not inputs.flag("nuslerp_flatten") and len(inputs.shape) >= 2:
        return _nuslerp_by_vector(inputs, t)
    deltas = inputs.base is not None
    products = gram_matrix(inputs, deltas)
    lengths = math.sqrt(products[0, 0]) * math.sqrt(products[1, 1])
    cosine = torch.tensor(products[0, 1] / max(lengths, 1e-14), dtype=torch.float64)
    a, b = (coefficient.item() for coefficient in _arc_coefficients(cosine, t))
    return linear_combination([a, b], 1 - a - b if deltas else 0.0)


def _nuslerp_by_vector(inputs: Inputs, t: float) -> BlockMerger:
    """Interpolates each row, or each column, by its own angle."""
    by_column = inputs.flag("nuslerp_row_wise")
    deltas = inputs.base is not None
    axis = 0 if by_column else -1

    def merge_block(block: Block) -> torch.Tensor:
        rows = block.end - block.first
        shape = inputs.shape if by_column else (rows, inputs.extent[1])
        vectors = [block.delta(i) if deltas else block.source(i) for i in range(2)]
        first, second = (vector.view(shape) for vector in vectors)
        first_norm = first.double().norm(dim=axis, keepdim=True)
        second_norm = second.double().norm(dim=axis, keepdim=True)
        norms = first_norm * second_norm
        products = (first.double() * second.double()).sum(axis, keepdim=True)
        a, b = _arc_coefficients(products / norms.clamp_min(1e-14), t)
        first.mul_(a.to(first.dtype))
        second.mul_(b.to(first.dtype))
        merged = first.add_(second).view(rows, -1)
        return merged.add_(block.base) if deltas else merged

    # A column crosses all blocks, so it needs the whole tensor.
    return merge_whole_tensor(inputs, merge_block) if by_column else merge_block


def _arc_coefficients(cosine: torch.Tensor, t: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Slerp coefficients of pairs of vectors with these cosines (float64), at `t`.

    The interpolation is linear where the arc has no direction. There, mergekit divides by a float32
    sine that is only a rounding error.
    """
    angle = torch.acos(cosine.clamp(-1, 1))
    sine = torch.sin(angle)
    is_linear = (sine < _SMALL) | (cosine < _OPPOSITE)
    divisor = torch.where(is_linear, torch.ones_like(sine), sine)
    first = torch.sin((1 - t) * angle) / divisor
    second = torch.sin(t * angle) / divisor
    first = torch.where(is_linear, torch.full_like(sine, 1 - t), first)
    second = torch.where(is_linear, torch.full_like(sine, t), second)
    return first, second


def multislerp(inputs: Inputs) -> BlockMerger:
    """The weighted mean direction at the weighted mean length, of the models or of their deltas.

    mergekit. The direction is sum w_i theta_i / |theta_i|, the length sum w_i |theta_i|. Where the
    directions cancel, the result is the weighted sum. One model alone is not changed.
    """
    if len(inputs.sources) == 1:
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
    if length <= max(eps, _CANCELLED * longest):
        return _sum_of_vectors(inputs, weights.tolist())
    # mergekit's exponential map gets a tangent of length eps instead of 0, which shrinks the
    # result.
    shrinkage = math.cos(eps)
    coefficients = direction / length * float(weights @ norms) * shrinkage
    return _sum_of_vectors(inputs, coefficients.tolist())


def _sum_of_vectors(inputs: Inputs, coefficients: Sequence[float]) -> BlockMerger:
    """Add up c_i theta_i, or theta_0 + sum c_i tau_i where there is a base."""
    if inputs.base is None:
        return linear_combination(coefficients)

    def merge_block(block: Block) -> torch.Tensor:
        # Not c_i theta_i - c_i theta_0: the coefficient of a small tau_i is so large that its
        # digits are lost.
        merged = block.delta(0).mul_(coefficients[0])
        for i, coefficient in enumerate(coefficients[1:], 1):
            merged.add_(block.delta(i).mul_(coefficient))
        return merged.add_(block.base)

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
    if k == 1 or not len(nonzero):
        return linear_combination([1.0 if k == 1 else 0.0] * k)
    lengths = np.outer(norms[nonzero], norms[nonzero])
    cosines = products[np.ix_(nonzero, nonzero)] / lengths
    mean = np.full(len(nonzero), 1 / len(nonzero))
    mean = _normalized(mean, cosines, max(tolerance, _CANCELLED))
    for _ in range(inputs.integer("max_iter")):
        step = _mean_log(mean, cosines, tolerance)
        size = _length(step, cosines)
        if size < tolerance:
            break
        # exp_u(v) = cos(|v|) u + sin(|v|) / |v| v
        moved = math.cos(size) * mean + math.sin(size) / size * step
        mean = _normalized(moved, cosines, tolerance)
    coefficients = np.zeros(k)
    coefficients[nonzero] = mean / norms[nonzero] * norms.mean()
    return linear_combination(coefficients.tolist())


def _mean_log(mean: Array, cosines: Array, tolerance: float) -> Array:
    """The mean over i of log_u(u_i) = angle / sin(angle) (u_i - cos(angle) u); u is `mean`."""
    step = np.zeros(len(mean))
    for i, cosine in enumerate(np.clip(cosines @ mean, -1, 1)):
        angle = math.acos(cosine)
        has_direction = cosine > _OPPOSITE and math.sin(angle) > _SMALL
        if angle >= tolerance and has_direction:
            tangent = -cosine * mean
            tangent[i] += 1
            step += tangent * angle / math.sin(angle) / len(mean)
    return step


def _normalized(vector: Array, cosines: Array, tolerance: float) -> Array:
    """The vector at length 1; the first unit vector where its length is below the tolerance."""
    length = _length(vector, cosines)
    if length >= tolerance:
        return vector / length
    first: Array = np.eye(len(vector))[0]
    return first


def _length(coefficients: Array, products: Array) -> float:
    """The length of a combination of vectors with these inner products."""
    return math.sqrt(max(float(coefficients @ products @ coefficients), 0.0))
