"""Which layers of a loaded model hold the tensors of its checkpoint."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import nn

from paretomerge.checkpoint.loaded_names import LoadedNames

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LayerKind = Literal["linear", "conv1d", "embedding", "norm", "other"]
"""How a layer computes with its tensors; `other` is not known."""

LAYER_KINDS = ("linear", "conv1d", "embedding", "norm")
"""Those that exclusive parts can be added to."""


@dataclass(frozen=True)
class Place:
    """A layer of a loaded model.

    Attributes:
        path: Its path in the model.
        kind: How it computes with its tensors.
        tensors: Name in the layer (`weight`, `bias`) -> name in the checkpoint.
    """

    path: str
    kind: LayerKind
    tensors: Mapping[str, str]


@dataclass(frozen=True)
class Places:
    """Where the tensors of a checkpoint are in a loaded model.

    Attributes:
        layers: The layers with tensors of the checkpoint.
        packed: Names of tensors that transformers packs together when it loads them.
        tied: Groups of tensors of the checkpoint that are one tensor in the model.
    """

    layers: tuple[Place, ...]
    packed: frozenset[str]
    tied: tuple[tuple[str, ...], ...]

    @property
    def unsupported(self) -> dict[str, str]:
        """Name of a tensor that cannot differ between rows -> what holds it."""
        reasons = dict.fromkeys(sorted(self.packed), "a pack of several tensors")
        for place in self.layers:
            if place.kind == "other":
                reasons |= dict.fromkeys(place.tensors.values(), place.path)
        return reasons


def find_places(model: "PreTrainedModel", names: Iterable[str]) -> Places:
    """Find the tensors of a checkpoint in a loaded model.

    Args:
        model: The model; its weights may have no memory.
        names: Names of all tensors of its checkpoint.

    Returns:
        Where they are. A tied tensor is in several layers.
    """
    loaded = LoadedNames.of_model(model)
    arrangement = loaded.arrange(names)
    packed: set[str] = set()
    for group in arrangement.packed:
        packed.update(group.names)
    layers = []
    for path, layer in model.named_modules():
        tensors = {}
        for own_name, _ in layer.named_parameters(recurse=False):
            full_name = f"{path}.{own_name}" if path else own_name
            stored = _stored_names(full_name, loaded, arrangement.plain)
            if stored:
                tensors[own_name] = stored[0]
        if tensors:
            layers.append(Place(path, layer_kind(layer), tensors))
    tied = set()
    for name in loaded.tied:
        group_names = _stored_names(name, loaded, arrangement.plain)
        if len(group_names) > 1:
            tied.add(group_names)
    return Places(tuple(layers), frozenset(packed), tuple(sorted(tied)))


def _stored_names(
    full_name: str, loaded: LoadedNames, plain: Mapping[str, str]
) -> tuple[str, ...]:
    """Names in the checkpoint of one tensor in memory, the owner's first where it is tied."""
    group = loaded.tied_group(full_name) or (full_name,)
    return tuple(plain[name] for name in group if name in plain)


def layer_kind(layer: nn.Module) -> LayerKind:
    """How a layer computes with its tensors.

    A subclass with a computation of its own is `other`: what it does with a matrix is not known.
    """
    from transformers.pytorch_utils import Conv1D

    if _computes_as(layer, nn.Linear):
        return "linear"
    if _computes_as(layer, Conv1D):
        return "conv1d"
    if _computes_as(layer, nn.Embedding) or _is_scaled_embedding(layer):
        return "embedding"
    parameters = list(layer.parameters())
    is_norm = type(layer).__name__.endswith("Norm")
    if is_norm and all(parameter.dim() == 1 for parameter in parameters):
        return "norm"
    return "other"


def _computes_as(layer: nn.Module, kind: type[nn.Module]) -> bool:
    own: Callable[..., object] = type(layer).forward
    return isinstance(layer, kind) and own is kind.forward


def _is_scaled_embedding(layer: nn.Module) -> bool:
    """Whether it is an embedding that only multiplies what it looks up by `embed_scale`."""
    has_name = type(layer).__name__.endswith("ScaledWordEmbedding")
    return isinstance(layer, nn.Embedding) and has_name
