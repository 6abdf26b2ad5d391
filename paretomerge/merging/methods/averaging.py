"""Methods whose result is a combination sum c_i theta_i of whole tensors: the coefficients are all there is to find."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch

from paretomerge.merging.methods.inputs import Block, Combine, Inputs

_COLINEAR = 0.9995  # |cos| above which the arc is a line (mergekit's threshold)


def combination(weights: Sequence[float], base_weight: float = 0.0) -> Combine:
    """c theta_0 + sum c_i theta_i. What has coefficient 0 is not read; coefficient 1 alone gives that model's bits.

    Multiplies, then adds: a fused multiply-add would round otherwise at the ends of blocks than in their middle.
    """

    def combine(block: Block) -> torch.Tensor:
        merged = block.base.mul(base_weight) if base_weight != 0 else None
        for i, weight in enumerate(weights):
            if weight != 0:
                term = block.source(i).mul_(weight)
                merged = term if merged is None else merged.add_(term)
        return block.source(0).zero_() if merged is None else merged

    return combine


def linear(inputs: Inputs) -> Combine:
    """sum w_i theta_i, divided by sum w_i unless `normalize` is off (Wortsman et al. 2022, model soups)."""
    weights = inputs.each("weight")
    total = sum(weights) if inputs.options["normalize"] else 1.0
    return combination([weight / total for weight in weights])


def passthrough(inputs: Inputs) -> Combine:
    """The one source, times `scale`; with `about`, what it has beyond that value is scaled."""
    scale, about = float(inputs.parameters[0]["scale"]), float(inputs.parameters[0]["about"])
    if about == 0:
        return combination([scale])
    return lambda block: block.source(0).mul_(scale).add_(about * (1 - scale))


def slerp(inputs: Inputs) -> Combine:
    """Spherical interpolation from the base (t = 0) to the other model (t = 1); a line where they are colinear."""
    return combination(arc(gram(inputs), float(inputs.options["t"])))


def model_stock(inputs: Inputs) -> Combine:
    """t mean + (1 - t) base with t = K cos / (1 + (K - 1) cos) (Jang et al. 2024, eq. 6).

    cos is the mean pairwise cosine of the deltas, of the whole tensor or, with `filter_wise`, of each row. A delta of
    zero leaves the base.
    """
    k = len(inputs.sources)
    if not inputs.options["filter_wise"]:
        t = _stock(torch.from_numpy(gram(inputs, deltas=True))[..., None]).item()
        return combination([t / k] * k, 1 - t)

    def by_row(block: Block) -> torch.Tensor:
        deltas = [block.delta(i) for i in range(k)]
        products = [[(a.double() * b.double()).sum(1) for b in deltas] for a in deltas]
        t = _stock(torch.stack([torch.stack(row) for row in products])).to(deltas[0].dtype)
        return total(deltas).mul_((t / k)[:, None]).add_(block.base)

    return by_row


def _stock(products: torch.Tensor) -> torch.Tensor:
    """t of Model Stock from inner products (K, K, rows) in float64: (rows,). Where it has no value the base stays."""
    k = len(products)
    pairs = []
    for i, j in itertools.combinations(range(k), 2):
        floor = (products[i, i].sqrt() * products[j, j].sqrt()).clamp_min(1e-6)
        pairs.append((products[i, j] / floor).clamp(-1, 1))
    cosine = torch.stack(pairs).mean(0)
    divisor = 1 + (k - 1) * cosine
    lost = divisor.abs() < 1e-6
    return torch.where(
        lost,
        torch.zeros_like(cosine),
        k * cosine / torch.where(lost, torch.ones_like(divisor), divisor),
    )


def total(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Their sum, a new tensor."""
    summed = tensors[0].clone()
    for tensor in tensors[1:]:
        summed.add_(tensor)
    return summed


def gram(inputs: Inputs, deltas: bool = False) -> np.ndarray:
    """(K, K) inner products of the sources, or of their deltas, over the whole tensor; sums of blocks in float64."""
    k = len(inputs.sources)
    products = np.zeros((k, k))
    for block in inputs.blocks():
        tensors = [(block.delta(i) if deltas else block.source(i)).view(-1) for i in range(k)]
        for i, j in itertools.combinations_with_replacement(range(k), 2):
            products[i, j] += torch.dot(tensors[i], tensors[j]).item()
    return products + np.triu(products, 1).T


def arc(products: np.ndarray, t: float) -> list[float]:
    """Coefficients of the point at `t` on the arc between two tensors of these inner products."""
    first, second = (math.sqrt(products[i, i]) for i in (0, 1))
    cosine = products[0, 1] / (
        (first if first > 1e-8 else 1.0) * (second if second > 1e-8 else 1.0)
    )
    if abs(cosine) > _COLINEAR:
        return [1 - t, t]
    angle = math.acos(cosine)
    return [math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)]
