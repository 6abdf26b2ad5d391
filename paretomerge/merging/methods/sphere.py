"""Means on a sphere: nuslerp, multislerp, karcher. Their points lie in the span of the sources, so that one pass for the
inner products finds the coefficients, whatever the number of iterations."""

import math
from collections.abc import Sequence

import numpy as np
import torch

from paretomerge.merging.methods.averaging import combination, gram
from paretomerge.merging.methods.inputs import Block, Combine, Inputs

_SMALL = 1e-8
_OPPOSITE = (
    -1 + 1e-6
)  # cosine up to which, for sums in float32, two directions are opposite: no arc is the shortest
_CANCELLED = 1e-3  # length of a mean of unit vectors up to which, for sums in float32, they cancel


def nuslerp(inputs: Inputs) -> Combine:
    """Spherical interpolation by weights, t = w_2 / (w_1 + w_2), of two models or of their deltas to a base.

    One vector is the whole tensor; with `nuslerp_flatten: false` each row, and with `nuslerp_row_wise: true` besides
    each column (mergekit's name for it).
    """
    first, second = inputs.each("weight")
    t = second / (first + second) if abs(first + second) >= 1e-6 else 0.5
    deltas = inputs.base is not None
    if inputs.options["nuslerp_flatten"] or len(inputs.shape) < 2:
        products = gram(inputs, deltas)
        cosine = products[0, 1] / max(math.sqrt(products[0, 0]) * math.sqrt(products[1, 1]), 1e-14)
        a, b = (c.item() for c in _arc(torch.tensor(cosine, dtype=torch.float64), t))
        return combination([a, b], 1 - a - b if deltas else 0.0)
    axis = 0 if inputs.options["nuslerp_row_wise"] else -1

    def by_vector(block: Block) -> torch.Tensor:
        shape = inputs.shape if axis == 0 else (block.end - block.first, inputs.matrix_shape[1])
        one, two = ((block.delta(i) if deltas else block.source(i)).view(shape) for i in (0, 1))
        norms = one.double().norm(dim=axis, keepdim=True) * two.double().norm(
            dim=axis, keepdim=True
        )
        cosine = (one.double() * two.double()).sum(axis, keepdim=True) / norms.clamp_min(1e-14)
        a, b = (c.to(one.dtype) for c in _arc(cosine, t))
        merged = one.mul_(a).add_(two.mul_(b)).view(block.end - block.first, -1)
        return merged.add_(block.base) if deltas else merged

    if axis == -1:
        return by_vector
    return in_one_piece(inputs, by_vector)


def _arc(cosine: torch.Tensor, t: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Coefficients of two vectors with these cosines (float64) at `t`; a line where the arc has no direction.

    mergekit's float32 sine of opposite vectors is a rounding error, and so is what it divides by it.
    """
    angle = torch.acos(cosine.clamp(-1, 1))
    sine = torch.sin(angle)
    line = (sine < _SMALL) | (cosine < _OPPOSITE)
    safe = torch.where(line, torch.ones_like(sine), sine)
    first = torch.where(line, torch.full_like(sine, 1 - t), torch.sin((1 - t) * angle) / safe)
    return first, torch.where(line, torch.full_like(sine, t), torch.sin(t * angle) / safe)


def multislerp(inputs: Inputs) -> Combine:
    """The weighted mean direction at the weighted mean length, of the models or of their deltas to a base.

    Where the directions cancel, the weighted sum; one model alone is itself.
    """
    k = len(inputs.sources)
    if k == 1:
        return combination([1.0])
    weights = np.array(inputs.each("weight"))
    if inputs.options["normalize_weights"]:
        weights = weights / weights.sum()
    products = gram(inputs, inputs.base is not None)
    norms = np.sqrt(np.diag(products))
    direction = weights / (norms + float(inputs.options["eps"]))
    length = math.sqrt(max(direction @ products @ direction, 0.0))
    cancelled = length <= max(
        float(inputs.options["eps"]), _CANCELLED * np.abs(direction * norms).sum()
    )
    shrunk = math.cos(
        float(inputs.options["eps"])
    )  # mergekit's exponential map of a tangent of length eps, not 0
    coefficients = weights if cancelled else direction / length * float(weights @ norms) * shrunk
    return _of(inputs, coefficients.tolist())


def karcher(inputs: Inputs) -> Combine:
    """The mean on the sphere (Riemannian centre of mass) at the mean length.

    Iterates u <- exp_u(mean of log_u(u_i)) until the step is below `tol` or `max_iter` is reached.
    """
    products = gram(inputs)
    k = len(products)
    norms = np.sqrt(np.diag(products))
    tolerance = float(inputs.options["tol"])
    valid = np.flatnonzero(norms > tolerance)
    if k == 1 or not len(valid):
        return combination([1.0 if k == 1 else 0.0] * k)
    cosines = products[np.ix_(valid, valid)] / np.outer(norms[valid], norms[valid])
    mean = _unit(np.full(len(valid), 1 / len(valid)), cosines, max(tolerance, _CANCELLED))
    for _ in range(int(inputs.options["max_iter"])):
        step = _log(mean, cosines, tolerance)
        size = _length(step, cosines)
        if size < tolerance:
            break
        mean = _unit(math.cos(size) * mean + math.sin(size) / size * step, cosines, tolerance)
    coefficients = np.zeros(k)
    coefficients[valid] = mean / norms[valid] * norms.mean()
    return combination(coefficients.tolist())


def _log(mean: np.ndarray, cosines: np.ndarray, tolerance: float) -> np.ndarray:
    """Mean of the tangents from `mean` to each unit vector; all are coefficients of the unit vectors."""
    step = np.zeros(len(mean))
    for i, cosine in enumerate(np.clip(cosines @ mean, -1, 1)):
        angle = math.acos(cosine)
        if angle >= tolerance and cosine > _OPPOSITE and math.sin(angle) > _SMALL:
            towards = -cosine * mean
            towards[i] += 1
            step += towards * angle / math.sin(angle) / len(mean)
    return step


def _unit(vector: np.ndarray, cosines: np.ndarray, tolerance: float) -> np.ndarray:
    length = _length(vector, cosines)
    return vector / length if length >= tolerance else np.eye(len(vector))[0]


def _length(vector: np.ndarray, cosines: np.ndarray) -> float:
    return math.sqrt(max(float(vector @ cosines @ vector), 0.0))


def _of(inputs: Inputs, coefficients: Sequence[float]) -> Combine:
    """sum c_i theta_i, or theta_0 + sum c_i tau_i where there is a base.

    The taus are formed: the coefficient of a small one is so large that c_i theta_i - c_i theta_0 would lose it.
    """
    if inputs.base is None:
        return combination(coefficients)

    def combine(block: Block) -> torch.Tensor:
        merged = block.delta(0).mul_(coefficients[0])
        for i, coefficient in enumerate(coefficients[1:], 1):
            merged.add_(block.delta(i).mul_(coefficient))
        return merged.add_(block.base)

    return combine


def in_one_piece(inputs: Inputs, merge: Combine) -> Combine:
    """For rules that need a whole tensor at once."""
    return in_pieces(inputs, inputs.matrix_shape[0], merge)


def in_pieces(inputs: Inputs, rows: int, merge: Combine) -> Combine:
    """For rules that need `rows` rows at once, such as a matrix of a stack: a piece is merged when its first block is asked
    for, and kept until the next."""
    kept: dict[int, torch.Tensor] = {}

    def give(block: Block) -> torch.Tensor:
        parts = []
        for piece in range(block.first // rows, -(-block.end // rows)):
            first = piece * rows
            if piece not in kept:
                kept.clear()
                kept[piece] = merge(inputs.at(first, first + rows)).view(rows, -1)
            parts.append(kept[piece][max(block.first - first, 0) : block.end - first])
        return torch.cat(parts)

    return give
