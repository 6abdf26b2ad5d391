"""Scales that bring the residual stream of one model to what the layers of another one expect.

HM3 (arXiv 2409.18893) trains such scales to match statistics of activations, in the manner of Deep
CORAL (Sun & Saenko 2016, arXiv 1607.01719, eq. 1). One scale per switch between models needs no
training: the best one is the root of a cubic.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from paretomerge.checkpoint.architecture import Architecture
from paretomerge.errors import CheckpointError
from paretomerge.merging.live.names import names_in_model
from paretomerge.merging.live.routed import RoutedModel
from paretomerge.recipe import Recipe, Slice, Source
from paretomerge.types import Array

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_Tensors = tuple[torch.Tensor, ...]
_NamedTensors = Mapping[str, torch.Tensor]
_ForwardPreHook = Callable[[nn.Module, _Tensors, _NamedTensors], None]

_MAX_LINES = 64
_MAX_TOKENS_PER_LINE = 512


@dataclass(frozen=True)
class StreamStatistics:
    """Statistics of the residual stream over the tokens of a text.

    Attributes:
        mean: `(d,)`.
        covariance: `(d, d)`, divided by the number of tokens.
    """

    mean: Array
    covariance: Array

    @classmethod
    def from_states(cls, states: torch.Tensor) -> "StreamStatistics":
        """Measure hidden states.

        Args:
            states: `(tokens, d)`.
        """
        values = states.double().cpu().numpy()
        covariance = np.cov(values, rowvar=False, bias=True)
        return cls(values.mean(0), covariance)


def matching_scale(stream: StreamStatistics, expected: StreamStatistics) -> float:
    """Compute the scale that brings a stream closest to the expected one.

    It minimises |s m - m'|^2 / |m'|^2 + |s^2 C - C'|^2 / |C'|^2 over s > 0, with Frobenius norms.

    Args:
        stream: Mean m and covariance C of the stream that leaves the layer before.
        expected: Mean m' and covariance C' of the stream into the next layer, in that layer's own
            model.

    Returns:
        The scale s; 1 if no s > 0 is a minimum.
    """
    # 1 instead of 0, for a model whose stream is constant or centred.
    mean_norm = _squared_norm(expected.mean) or 1.0
    covariance_norm = _squared_norm(expected.covariance) or 1.0
    # Without constants the objective is (a s^2 - 2 b s) + (p s^4 - 2 q s^2).
    # It is the objective of Deep CORAL for covariances, with a term for means besides.
    mean_product = (stream.mean * expected.mean).sum()
    covariance_product = (stream.covariance * expected.covariance).sum()
    a = _squared_norm(stream.mean) / mean_norm
    b = mean_product / mean_norm
    p = _squared_norm(stream.covariance) / covariance_norm
    q = covariance_product / covariance_norm

    def objective(s: float) -> float:
        mean_error = a * s**2 - 2 * b * s
        covariance_error = p * s**4 - 2 * q * s**2
        total = mean_error + covariance_error
        return float(total)

    # Half of its derivative is the cubic 2 p s^3 + (a - 2 q) s - b.
    linear = a - 2 * q
    roots = np.roots([2 * p, 0.0, linear, -b])
    is_real = abs(roots.imag) < 1e-9
    is_positive = roots.real > 1e-9
    candidates = roots.real[is_real & is_positive].tolist()
    return min(candidates, key=objective, default=1.0)


def measure_streams(
    live: RoutedModel,
    sources: Mapping[str, str],
    depths: Mapping[str, int],
    text: Sequence[str],
) -> dict[str, list[StreamStatistics]]:
    """Measure the stream into each layer of each source.

    Args:
        live: A live model with the sources.
        sources: Name of a source -> path that `live` knows it by.
        depths: Name of a source -> number of layers.
        text: Lines of text; the first 64 are used, up to 512 tokens of each.

    Returns:
        Name of a source -> statistics of the stream into each of its layers.
    """
    tokenizer = live.tokenizer
    if tokenizer is None:
        first = next(iter(sources.values()))
        raise CheckpointError(
            f"{first}: has no tokenizer, which matching on a text needs; copy its files, such as "
            "tokenizer.json, into the folder"
        )
    statistics: dict[str, list[StreamStatistics]] = {}
    for name, path in sources.items():
        # A route through the source as it is: its layers then get what they were trained on.
        all_layers = Source(path, (0, depths[name]))
        whole_model = Slice((all_layers,))
        recipe = Recipe("passthrough", (whole_model,))
        model = live.load(recipe).model
        architecture = live.checkpoints[path].architecture
        stack = model.get_submodule(stack_path(model, architecture))
        batches = _token_ids(tokenizer, text)
        inputs = _layer_inputs(model, list(stack.children()), batches)
        statistics[name] = []
        for states in inputs:
            measured = StreamStatistics.from_states(states)
            statistics[name].append(measured)
    return statistics


def stack_path(model: "PreTrainedModel", architecture: Architecture) -> str:
    """Find the layers in a loaded model, which may have other names than the checkpoint.

    Args:
        model: The loaded model.
        architecture: That of its checkpoint.

    Returns:
        The path of the module that holds the layers.
    """
    first = f"{architecture.prefix}0."
    names = [name for name in architecture.names if name.startswith(first)]
    loaded = next(iter(names_in_model(model, names).values()))
    return loaded.partition(".0.")[0]


def _squared_norm(array: Array) -> float:
    return float((array**2).sum())


def _token_ids(
    tokenizer: "PreTrainedTokenizerBase", text: Sequence[str]
) -> Iterable[torch.Tensor]:
    """Token ids `(1, tokens)` of each line that has a token."""
    for line in text[:_MAX_LINES]:
        encoded = tokenizer(
            line, return_tensors="pt", truncation=True, max_length=_MAX_TOKENS_PER_LINE
        )
        ids = encoded["input_ids"]
        if ids.numel():
            yield ids


def _layer_inputs(
    model: "PreTrainedModel",
    layers: Sequence[nn.Module],
    batches: Iterable[torch.Tensor],
) -> list[torch.Tensor]:
    """The hidden states `(tokens, d)` into each layer, over all batches."""
    recorded: list[list[torch.Tensor]] = []
    handles = []
    for layer in layers:
        states: list[torch.Tensor] = []
        hook = _recorder(states)
        handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
        recorded.append(states)
        handles.append(handle)
    try:
        with torch.inference_mode():
            for ids in batches:
                model(ids.to(model.device))
    finally:
        # The layers belong to the live model, which goes on to score candidates.
        for handle in handles:
            handle.remove()
    return [torch.cat(states) for states in recorded]


def _recorder(states: list[torch.Tensor]) -> _ForwardPreHook:
    """A forward hook that appends the hidden states into a layer to `states`."""

    def record(module: nn.Module, args: _Tensors, kwargs: _NamedTensors) -> None:
        # Families differ in whether they pass the hidden states by position.
        stream = args[0] if args else kwargs["hidden_states"]
        # `[0]`: the batch has one line.
        states.append(stream[0].float().cpu())

    return record
