"""Second moments of what goes into the linear layers of a model: the statistics of RegMean."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from paretomerge.calibration.text import Batch
from paretomerge.merging.live.names import loading_layout

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FLOAT32_BYTES = 4
_WEIGHT = ".weight"

Forward = Callable[[Batch], object]
"""Runs the model, or a part of it, on a batch."""


@dataclass(frozen=True)
class LinearLayer:
    """A linear layer of a loaded model.

    Attributes:
        tensor: The name of its weight in the checkpoint.
        module: The layer.
        of_rows: Whether the weight has the inputs along its rows, as GPT-2's.
    """

    tensor: str
    module: nn.Module
    of_rows: bool

    @property
    def inputs(self) -> int:
        """The number d of inputs."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight.shape[0 if self.of_rows else 1]


@dataclass(frozen=True)
class SharedInput:
    """Linear layers with one input, such as q, k and v, in the order in which they run.

    Attributes:
        layers: The layers.
    """

    layers: tuple[LinearLayer, ...]

    @property
    def first(self) -> LinearLayer:
        """The layer that runs first; its name is that of the statistic."""
        return self.layers[0]


class _Stop(Exception):  # noqa: N818 - the way out of a forward pass, no error
    """All inputs of a pass have been seen."""


def linear_layers(
    model: "PreTrainedModel", tensors: Sequence[str]
) -> list[LinearLayer]:
    """Find the linear layers of a model whose weights are in a checkpoint as they are.

    Args:
        model: The loaded model.
        tensors: The names of all tensors of its checkpoint.

    Returns:
        The layers. A head that is tied to the embedding is none of them, for an embedding has no
        inputs, and neither are packed experts.
    """
    embedding = model.get_input_embeddings()
    layers = []
    for tensor, loaded in loading_layout(model, tensors).renamed.items():
        if not loaded.endswith(_WEIGHT):
            continue
        module = model.get_submodule(loaded.removesuffix(_WEIGHT))
        if not isinstance(module, nn.Linear | Conv1D):
            continue
        if embedding is None or module.weight is not embedding.weight:
            layers.append(LinearLayer(tensor, module, isinstance(module, Conv1D)))
    return layers


def find_shared_inputs(
    layers: Sequence[LinearLayer], batch: Batch, forward: Forward
) -> list[SharedInput]:
    """Find which layers have one input, by a forward pass.

    Args:
        layers: The layers.
        batch: A batch to run.
        forward: Runs the model.

    Returns:
        The inputs in the order of the pass. Layers that do not see each token of the batch once,
        such as the experts that a router chooses among, are left out.
    """
    calls: Counter[LinearLayer] = Counter()
    sees_others: set[LinearLayer] = set()
    groups: list[tuple[Tensor, list[LinearLayer]]] = []

    def note(layer: LinearLayer, value: Tensor) -> None:
        calls[layer] += 1
        if not _sees_all_tokens(value, batch):
            sees_others.add(layer)
        # The tensor itself, which stays alive here: two layers that get it share their statistic.
        if groups and groups[-1][0] is value:
            groups[-1][1].append(layer)
        else:
            groups.append((value, [layer]))

    with _hooks(dict.fromkeys(layers, note)), torch.no_grad():
        forward(batch)
    shared = []
    for _, members in groups:
        by_side: dict[bool, list[LinearLayer]] = {}
        for layer in members:
            if calls[layer] == 1 and layer not in sees_others:
                by_side.setdefault(layer.of_rows, []).append(layer)
        shared += [SharedInput(tuple(side)) for side in by_side.values()]
    return shared


def measure_inputs(
    inputs: Sequence[SharedInput],
    batches: Sequence[Batch],
    forward: Forward,
    memory: int,
) -> Iterator[tuple[SharedInput, Tensor]]:
    """Measure G = mean of x x^T over all tokens, for each input.

    The matrices of a large model do not fit into memory together, so the text is read once for
    every few layers, up to the last of these.

    Args:
        inputs: The inputs, in the order of the forward pass.
        batches: The text.
        forward: Runs the model.
        memory: Bytes that the matrices may take at a time; at least one is made.

    Yields:
        Each input and its G, (d, d) in float32.
    """
    n_tokens = sum(int(batch.mask.sum()) for batch in batches)
    for part in _parts(inputs, memory):
        sums: dict[int, Tensor] = {}
        for batch in batches:
            _add_products(sums, part, batch, forward)
        for shared in part:
            # Freed as soon as it has been used.
            yield shared, sums.pop(id(shared)).div_(n_tokens)


def _add_products(
    sums: dict[int, Tensor],
    part: Sequence[SharedInput],
    batch: Batch,
    forward: Forward,
) -> None:
    """Add the sum of x x^T over a batch to each sum."""
    by_layer = {shared.first: shared for shared in part}
    mask = batch.mask.bool().reshape(-1)
    last = part[-1].first

    def add(layer: LinearLayer, value: Tensor) -> None:
        rows = value.reshape(-1, value.shape[-1])[mask].float()
        product = rows.T @ rows
        key = id(by_layer[layer])
        if key in sums:
            sums[key].add_(product)
        else:
            sums[key] = product
        if layer is last:
            raise _Stop

    with _hooks(dict.fromkeys(by_layer, add)), torch.no_grad():
        try:
            forward(batch)
        except _Stop:
            return


def _parts(inputs: Sequence[SharedInput], memory: int) -> Iterator[list[SharedInput]]:
    """Consecutive inputs whose matrices fit into memory together."""
    part: list[SharedInput] = []
    size = 0
    for shared in inputs:
        bytes_of_one = _FLOAT32_BYTES * shared.first.inputs**2
        if part and size + bytes_of_one > memory:
            yield part
            part, size = [], 0
        part.append(shared)
        size += bytes_of_one
    if part:
        yield part


def _sees_all_tokens(value: Tensor, batch: Batch) -> bool:
    """Whether a layer's input has one row for each token of a batch, in order."""
    examples, length = batch.ids.shape
    return tuple(value.shape[:-1]) in ((examples, length), (examples * length,))


@contextmanager
def _hooks(
    on_input: Mapping[LinearLayer, Callable[[LinearLayer, Tensor], None]],
) -> Iterator[None]:
    """Call a function with the input of each layer, before the layer runs."""
    handles = []

    def hook_of(layer: LinearLayer) -> Callable[[nn.Module, Any], None]:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            on_input[layer](layer, arguments[0])

        return hook

    try:
        for layer in on_input:
            handles.append(layer.module.register_forward_pre_hook(hook_of(layer)))
        yield
    finally:
        for handle in handles:
            handle.remove()
