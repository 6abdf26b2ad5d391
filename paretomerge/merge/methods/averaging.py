"""Methods that average whole weights: linear, slerp, Model Stock; and passthrough, which takes one source as it is."""

import itertools

import torch

from paretomerge.merge.methods.method import Inputs

_COLINEAR = 0.9995  # |cos| above which the arc is a line (mergekit's threshold)


def linear(inputs: Inputs) -> torch.Tensor:
    """sum w_i theta_i, divided by sum w_i unless `normalize` is off (Wortsman et al. 2022, model soups)."""
    weights = inputs.each("weight")
    merged = torch.zeros_like(inputs.sources[0])
    for weight, source in zip(weights, inputs.sources, strict=True):
        merged.add_(source, alpha=weight)
    return merged.div_(sum(weights)) if inputs.options["normalize"] else merged


def slerp(inputs: Inputs) -> torch.Tensor:
    """Spherical interpolation from the base (t = 0) to the other model (t = 1); a line where they are colinear."""
    t = float(inputs.options["t"])
    start, end = inputs.sources
    cosine = torch.dot(_unit(start), _unit(end)).item()
    if abs(cosine) > _COLINEAR:
        return torch.lerp(start, end, t)
    angle = torch.arccos(torch.tensor(cosine, dtype=torch.float64))
    first = torch.sin((1 - t) * angle) / torch.sin(angle)
    second = torch.sin(t * angle) / torch.sin(angle)
    return start * first.item() + end * second.item()


def _unit(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.flatten()
    norm = torch.linalg.vector_norm(flat)
    return flat / norm if norm > 1e-8 else flat


def model_stock(inputs: Inputs) -> torch.Tensor:
    """t mean + (1 - t) base with t = K cos / (1 + (K - 1) cos) (Jang et al. 2024, eq. 6).

    cos is the mean pairwise cosine of the deltas. A delta of zero leaves the base.
    """
    base = inputs.base
    assert base is not None
    deltas = [delta.flatten() for delta in inputs.deltas()]
    pairs = [torch.cosine_similarity(a, b, dim=0).item() for a, b in itertools.combinations(deltas, 2)]
    cosine = sum(pairs) / len(pairs)
    k = len(deltas)
    t = k * cosine / (1 + (k - 1) * cosine)
    return torch.lerp(base, torch.stack(list(inputs.sources)).mean(0), t)


def passthrough(inputs: Inputs) -> torch.Tensor:
    """The one source, times `scale`."""
    return inputs.sources[0] * float(inputs.knobs[0]["scale"])
