"""A sample of a model's matrices, and what fine-tunes changed there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from paretomerge.checkpoint.adapter_options import CONV1D_MODELS
from paretomerge.checkpoint.operand import FLOAT_DTYPES, Operand
from paretomerge.errors import CheckpointError
from paretomerge.merging.plan.make import open_weights
from paretomerge.merging.plan.one_layout import arrange_like
from paretomerge.merging.plan.plan import Weights
from paretomerge.merging.singular import singular_vectors

_MOST_LAYERS = 8
_MOST_ENTRIES = 100_000_000  # of one model: of a model of 7 B parameters, one layer
DIRECTIONS = 64
"""Leading singular directions of a delta that are looked at: adapters have no more."""

_POWER_ITERATIONS = 4  # exact to some digits for spectra that fall slowly, too
_SEED = 0


@dataclass(frozen=True)
class Sample:
    """Some layers of a base and of its fine-tunes.

    Attributes:
        base: The name of the base.
        sources: Name -> path of the fine-tunes.
        opened: Path -> weights of all models.
        matrices: Names of the sampled matrices.
        layers: The layers that they belong to.
        transposed: Whether the rows of these matrices are inputs (Conv1D of GPT-2).
    """

    base: str
    sources: Mapping[str, str]
    opened: Mapping[str, Weights]
    matrices: tuple[str, ...]
    layers: tuple[int, ...]
    transposed: bool

    def read(self, name: str) -> "SampledMatrix":
        """Read one matrix of all models.

        Args:
            name: One of `matrices`.
        """
        base = self._whole(self.base, name)
        deltas = {}
        for source, path in self.sources.items():
            deltas[source] = self._whole(path, name) - base
        return SampledMatrix(base, deltas)

    def oriented(self, matrix: Tensor) -> Tensor:
        """A matrix as (outputs, inputs)."""
        return matrix.T if self.transposed else matrix

    def _whole(self, path: str, name: str) -> Tensor:
        weights = self.opened[path]
        # A source may tie a tensor to another one.
        own_name = weights.architecture.find_equivalent(name) or name
        operand: Operand = weights.operand(own_name)
        matrix = operand.rows(0, operand.shape[0]).view(operand.shape)
        return self.oriented(matrix)


@dataclass(frozen=True)
class SampledMatrix:
    """One matrix of a base and its fine-tunes, in float32, as (outputs, inputs).

    Attributes:
        base: theta_0.
        deltas: Source -> tau_i = theta_i - theta_0.
    """

    base: Tensor
    deltas: Mapping[str, Tensor]


def take_sample(base: str, sources: Mapping[str, str]) -> Sample:
    """Choose layers at equal distances, and of them all matrices.

    Args:
        base: The base model.
        sources: Name -> path of the fine-tunes.

    Returns:
        The sample: at most eight layers, and at most 100 million entries of each model, but at
        least one layer. Nothing is read yet but headers.

    Raises:
        CheckpointError: A model cannot be read, or the base has no layer with matrices.
    """
    opened = open_weights((base, *sources.values()))
    architecture = opened[base].architecture
    for path in sources.values():
        if path != base:
            opened[path] = arrange_like(base, opened[base], path, opened[path])
    by_layer: dict[int, list[str]] = {}
    for name, header in opened[base].headers.items():
        layer = architecture.layer(name)
        is_matrix = len(header.shape) == 2 and header.dtype in FLOAT_DTYPES
        if layer is not None and is_matrix:
            by_layer.setdefault(layer, []).append(name)
    if not by_layer:
        raise CheckpointError(f"{base}: has no layers with matrices to compare")
    headers = opened[base].headers
    largest_layer = 0
    for names in by_layer.values():
        entries = sum(prod(headers[name].shape) for name in names)
        largest_layer = max(largest_layer, entries)
    count = max(1, min(_MOST_LAYERS, _MOST_ENTRIES // largest_layer))
    layers = evenly_spaced(sorted(by_layer), count)
    matrices = []
    for layer in layers:
        matrices += sorted(by_layer[layer])
    model_type = opened[base].config.get("model_type")
    return Sample(
        base=base,
        sources=dict(sources),
        opened=opened,
        matrices=tuple(matrices),
        layers=tuple(layers),
        transposed=model_type in CONV1D_MODELS,
    )


def evenly_spaced(layers: Sequence[int], count: int) -> list[int]:
    """Up to `count` of the layers, the middles of as many equal parts of the model."""
    if len(layers) <= count:
        return list(layers)
    chosen = []
    for i in range(count):
        middle = (i + 0.5) * len(layers) / count
        chosen.append(layers[int(middle)])
    return chosen


@dataclass(frozen=True)
class Directions:
    """The leading singular directions of a delta.

    Attributes:
        inputs: `(inputs, r)`, right singular vectors.
        strengths: `(r,)`, singular values, the largest first.
        energy: The squared Frobenius norm of the whole delta.
    """

    inputs: Tensor
    strengths: Tensor
    energy: float


def leading_directions(delta: Tensor) -> Directions:
    """The leading directions of one delta; all of them if it has few rows or columns.

    Args:
        delta: `(outputs, inputs)`.
    """
    energy = float(delta.square().sum())
    if min(delta.shape) <= 2 * DIRECTIONS:
        _, strengths, inputs = singular_vectors(delta)
        return Directions(inputs.T, strengths, energy)
    # It draws a start from the global generator, which is put back.
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(_SEED)
        _, strengths, inputs = torch.svd_lowrank(
            delta, q=DIRECTIONS, niter=_POWER_ITERATIONS
        )
    return Directions(inputs, strengths, energy)
