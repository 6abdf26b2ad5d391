"""Methods that add deltas (task vectors) tau_i = theta_i - theta_0 to the base: sparsify, agree on signs, sum."""

from collections.abc import Sequence

import torch

from paretomerge.merge.methods.method import Inputs


def task_arithmetic(inputs: Inputs) -> torch.Tensor:
    """theta_0 + lambda sum w_i tau_i (Ilharco et al. 2023, sec. 2)."""
    return _add(inputs, _weighted_sum(inputs, inputs.deltas()))


def ties(inputs: Inputs) -> torch.Tensor:
    """Trim, elect sign, average what agrees (Yadav et al. 2023, sec. 3)."""
    trimmed = [trim_(delta, d) for delta, d in zip(inputs.deltas(), inputs.each("density"), strict=True)]
    return _add(inputs, _agreeing_sum(inputs, trimmed))


def dare_linear(inputs: Inputs) -> torch.Tensor:
    """Drop at random and rescale, then sum (Yu et al. 2024, sec. 3)."""
    return _add(inputs, _weighted_sum(inputs, _dropped(inputs)))


def dare_ties(inputs: Inputs) -> torch.Tensor:
    """Drop at random and rescale, then elect signs and sum what agrees."""
    return _add(inputs, _agreeing_sum(inputs, _dropped(inputs)))


def trim_(delta: torch.Tensor, density: float) -> torch.Tensor:
    """Zero, in place, all but the floor(density * n) entries of largest magnitude; among equals the first stay."""
    n = delta.numel()
    keep = int(density * n)
    if keep >= n:
        return delta
    if keep <= 0:
        return delta.zero_()
    magnitude = delta.abs().flatten()
    threshold = torch.kthvalue(magnitude, n - keep + 1).values
    kept = magnitude > threshold
    equal = (magnitude == threshold).nonzero().flatten()
    kept[equal[: keep - int(kept.sum())]] = True
    return delta.mul_(kept.view_as(delta))


def _dropped(inputs: Inputs) -> list[torch.Tensor]:
    densities = inputs.each("density")
    rescale = inputs.options["rescale"]
    deltas = inputs.deltas()
    return [drop_(d, p, u(), rescale) if p < 1 else d for d, p, u in zip(deltas, densities, inputs.uniform, strict=True)]


def drop_(delta: torch.Tensor, density: float, uniform: torch.Tensor, rescale: bool | str) -> torch.Tensor:
    """Keep, in place, each entry with probability `density` (where `uniform` is below it).

    rescale True restores the tensor's L1 norm, as mergekit does; `inverse_density` divides by density, as the paper does.
    """
    before = delta.abs().sum() if rescale is True else None
    delta.mul_(uniform < density)
    if before is not None:
        after = delta.abs().sum()
        return delta.mul_(before / after) if after > 0 else delta
    if rescale == "inverse_density" and density > 0:
        return delta.div_(density)
    return delta


def _weighted_sum(inputs: Inputs, deltas: Sequence[torch.Tensor]) -> torch.Tensor:
    weights = inputs.each("weight")
    merged = torch.zeros_like(deltas[0])
    for weight, delta in zip(weights, deltas, strict=True):
        merged.add_(delta, alpha=weight)
    return merged.div_(_divisor(sum(weights))) if inputs.options["normalize"] else merged


def _agreeing_sum(inputs: Inputs, deltas: Sequence[torch.Tensor]) -> torch.Tensor:
    """Elect the sign of sum w_i tau_i per entry (0 counts as +), sum what agrees, divide by the agreeing weights."""
    weights = inputs.each("weight")
    weighted = [delta * weight for weight, delta in zip(weights, deltas, strict=True)]
    positive = torch.stack(weighted).sum(0) >= 0
    merged = torch.zeros_like(deltas[0])
    total = torch.zeros_like(deltas[0])
    for weight, entry in zip(weights, weighted, strict=True):
        agrees = torch.where(positive, entry > 0, entry < 0)  # a negative weight turns its delta
        merged.add_(entry * agrees)
        total.add_(agrees, alpha=weight)
    if not inputs.options["normalize"]:
        return merged
    return merged.div_(torch.where(total.abs() < 1e-8, torch.ones_like(total), total))


def _divisor(total: float) -> float:
    return 1.0 if abs(total) < 1e-8 else total


def _add(inputs: Inputs, merged: torch.Tensor) -> torch.Tensor:
    assert inputs.base is not None
    return merged.mul_(float(inputs.options["lambda"])).add_(inputs.base)
