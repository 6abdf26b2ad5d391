"""Scales that bring the stream of one model to what another's layers are used to: mean and covariance before and after.

HM3 (arXiv 2409.18893) trains its scales to match statistics of activations in the manner of Deep CORAL (Sun & Saenko 2016,
arXiv 1607.01719, eq. 1). One number per hand-over needs no training: the best one is the root of a cubic.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from paretomerge.merging.live.routed import RoutedModel
from paretomerge.recipe import Recipe, Slice, Source

Array = NDArray[np.float64]
_LINES, _TOKENS = 64, 512  # of the text that is looked at


@dataclass(frozen=True)
class Stream:
    """The residual stream over the tokens of a text. mean `(d,)`, covariance `(d, d)`."""

    mean: Array
    covariance: Array

    @classmethod
    def of(cls, states: torch.Tensor) -> "Stream":
        """states `(tokens, d)`."""
        values = states.double().cpu().numpy()
        return cls(values.mean(0), np.cov(values, rowvar=False, bias=True))


def matching_scale(leaving: Stream, expected: Stream) -> float:
    """The s > 0 that minimises |s m - m'|^2 / |m'|^2 + |s^2 C - C'|^2 / |C'|^2; 1 where there is none.

    leaving: the stream as the route has it there (m, C). expected: as the next layer has it in its own model (m', C').
    """
    first, second = (float((a**2).sum()) or 1.0 for a in (expected.mean, expected.covariance))
    a, b = (leaving.mean**2).sum() / first, (leaving.mean * expected.mean).sum() / first
    p, q = (
        (leaving.covariance**2).sum() / second,
        (leaving.covariance * expected.covariance).sum() / second,
    )
    roots = np.roots([2 * p, 0.0, a - 2 * q, -b])
    real = [float(root.real) for root in roots if abs(root.imag) < 1e-9 and root.real > 1e-9]
    return min(real, key=lambda s: a * s**2 - 2 * b * s + p * s**4 - 2 * q * s**2, default=1.0)


def streams(
    live: RoutedModel, sources: Mapping[str, str], depths: Mapping[str, int], text: Sequence[str]
) -> dict[str, list[Stream]]:
    """Of each source (name -> path, which `live` has) the stream into each of its layers."""
    found = {}
    for name, path in sources.items():
        whole = Recipe("passthrough", (Slice((Source(path, (0, depths[name])),)),))
        model = live.load(whole).model
        prefix = live.checkpoints[path].architecture.prefix.rstrip(".")
        found[name] = _recorded(model, model.get_submodule(prefix), live.tokenizer, text)
    return found


def _recorded(model: Any, layers: Any, tokenizer: Any, text: Sequence[str]) -> list[Stream]:
    kept: list[list[torch.Tensor]] = [[] for _ in layers]
    handles = []
    for layer, states in zip(layers, kept, strict=True):

        def note(module: Any, args: Any, kwargs: Any, states: list[torch.Tensor] = states) -> None:
            stream = args[0] if args else kwargs["hidden_states"]
            states.append(stream[0].float().cpu())

        handles.append(layer.register_forward_pre_hook(note, with_kwargs=True))
    try:
        with torch.inference_mode():
            for line in text[:_LINES]:
                ids = tokenizer(line, return_tensors="pt", truncation=True, max_length=_TOKENS)[
                    "input_ids"
                ]
                if ids.numel():
                    model(ids.to(model.device))
    finally:
        for handle in handles:
            handle.remove()
    return [Stream.of(torch.cat(states)) for states in kept]
