"""Models under the names and in the layout of another one, which the result of a merge follows.

One model may have two sets of names: those on disk, and those in memory, which peft uses and which
`save_pretrained(save_original_format=False)` writes. In memory, experts are stacked into one
tensor. A language model may also be part of a larger model that sees or hears. Whatever the
layout, transformers loads it into one place, and through these places tensors are matched here.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple
from weakref import WeakKeyDictionary

from paretomerge.checkpoint.architecture import Architecture
from paretomerge.checkpoint.gathered import GatheredTensor, Moves, find_moves
from paretomerge.checkpoint.header import Header
from paretomerge.checkpoint.loaded_names import LoadedNames, Shape, loaded_names
from paretomerge.checkpoint.operand import Operand
from paretomerge.errors import CheckpointError
from paretomerge.merging.plan.opened_recipe import name_at_layer_0
from paretomerge.merging.plan.plan import ModelConfig, Weights


@dataclass(frozen=True)
class _Gathering:
    """A tensor that is put together from others.

    Attributes:
        parts: Names of the others, or how these are put together themselves.
        moves: Where each row or element comes from.
        index: Which of the tensors of `moves` this one is.
        is_loaded: Whether it is in memory and made from stored tensors; else the reverse.
    """

    parts: tuple["_Origin", ...]
    moves: Moves
    index: int
    is_loaded: bool

    @property
    def shape(self) -> Shape:
        """Shape of the tensor."""
        if self.is_loaded:
            return self.moves.loaded_shapes[self.index]
        return self.moves.stored_shapes[self.index]


_Origin = str | _Gathering
"""Where a tensor comes from: the name of a stored tensor, or how it is put together."""


class _Place(NamedTuple):
    """What a checkpoint holds for some tensors in memory: the same, or a packed form of them.

    Attributes:
        stored: Names in the checkpoint.
        loaded: Names in memory.
        moves: How the ones become the others; None if one tensor is loaded as it is.
    """

    stored: tuple[str, ...]
    loaded: tuple[str, ...]
    moves: Moves | None


@dataclass(frozen=True)
class _Layout:
    """How a model's tensors are had under the names of another one.

    Attributes:
        origins: Name -> where the tensor comes from.
        headers: Name -> shape and dtype.
        architecture: What the names say about the network.
    """

    origins: Mapping[str, _Origin]
    headers: Mapping[str, Header]
    architecture: Architecture


class ArrangedWeights:
    """Opened weights (`Weights`) under the names and in the layout of another model.

    Args:
        weights: The weights to read.
        layout: How they are arranged.
    """

    def __init__(self, weights: Weights, layout: _Layout) -> None:
        self.weights = weights
        self.headers = layout.headers
        self.architecture = layout.architecture
        self._origins = layout.origins

    @property
    def folder(self) -> Path:
        """The folder of the model."""
        return self.weights.folder

    @property
    def weight_folders(self) -> tuple[Path, ...]:
        """The folders whose files hold the weights."""
        return self.weights.weight_folders

    @property
    def tokenizer_folder(self) -> Path:
        """The folder with the tokenizer."""
        return self.weights.tokenizer_folder

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        return self.weights.config

    @property
    def dtype(self) -> str:
        """The model's dtype, as torch names it."""
        return self.weights.dtype

    def operand(self, name: str) -> Operand:
        """Return a tensor as merges read it."""
        return self._open(self._origins[name])

    def _open(self, origin: _Origin) -> Operand:
        if isinstance(origin, str):
            return self.weights.operand(origin)
        parts = tuple(self._open(part) for part in origin.parts)
        return GatheredTensor(
            shape=origin.shape,
            dtype=parts[0].dtype,
            parts=parts,
            moves=origin.moves,
            index=origin.index,
            is_loaded=origin.is_loaded,
        )

    def check_unchanged(self) -> None:
        """Raise CheckpointError if the files have changed since the model was opened."""
        self.weights.check_unchanged()


# A search plans thousands of merges of the same models. A layout refers to neither model, so that
# both can be freed.
_LAYOUTS: WeakKeyDictionary[Weights, WeakKeyDictionary[Weights, _Layout | None]]
_LAYOUTS = WeakKeyDictionary()


def arrange_like(
    template_name: str, template: Weights, model: str, weights: Weights
) -> Weights:
    """Return a model under the names and in the layout of another one.

    Args:
        template_name: The model whose names the result of a merge has, for error messages.
        template: That model.
        model: Name of the other model, for error messages.
        weights: The other model.

    Returns:
        `weights` themselves if the names are the same, or if transformers does not know the models;
        else a view of them. Tensors that the template has no place for keep their names.

    Raises:
        CheckpointError: If transformers could not load the tensors.
    """
    known = _LAYOUTS.setdefault(weights, WeakKeyDictionary())
    if template not in known:
        layout = None
        if not _has_same_layout(template, weights):
            layout = _find_layout(template_name, template, model, weights)
        known[template] = layout
    layout = known[template]
    return weights if layout is None else ArrangedWeights(weights, layout)


def _has_same_layout(template: Weights, weights: Weights) -> bool:
    """Whether names and shapes already match, so that transformers need not be asked."""
    pairs = ((template, weights), (weights, template))
    return all(_covers(one, other) for one, other in pairs)


def _covers(weights: Weights, other: Weights) -> bool:
    """Whether a model has a tensor for each one of another model."""
    architecture = other.architecture
    shapes = _shapes_of_kinds(weights)
    for kind, other_shapes in _shapes_of_kinds(other).items():
        if architecture.is_auxiliary(kind):
            continue
        if kind in shapes:
            if shapes[kind].isdisjoint(other_shapes):
                return False
        elif not _has_equivalent(weights.architecture, kind):
            return False
    return True


def _has_equivalent(architecture: Architecture, name: str) -> bool:
    # The embedding stands for a head that is not stored, but the head may have another name.
    is_other_head = architecture.is_tied_head(name) and architecture.has_head
    return architecture.find_equivalent(name) is not None and not is_other_head


def _shapes_of_kinds(weights: Weights) -> dict[str, set[Shape]]:
    """Shapes of a model's tensors in any layer, by their names at layer 0."""
    architecture = weights.architecture
    shapes: dict[str, set[Shape]] = defaultdict(set)
    for name, header in weights.headers.items():
        shape = header.shape
        # Vocabularies may differ in size.
        axis = architecture.vocabulary_axis(name, shape)
        if axis is not None:
            shape = (*shape[:axis], 0, *shape[axis + 1 :])
        shapes[name_at_layer_0(name, architecture)].add(shape)
    return shapes


def _find_layout(
    template_name: str, template: Weights, model: str, weights: Weights
) -> _Layout | None:
    template_names = loaded_names(template.config)
    if template_names is None:
        return None
    names = _names_like(template, weights) or template_names
    renamed = _common_names(template_names, names)
    if renamed is None:
        return None
    loaded = _loaded_origins(model, weights, names)
    own = {renamed.get(name, name): origin for name, origin in loaded.items()}
    # The names of all tensors: a model may lack some.
    names_in_memory = [renamed.get(name, name) for name in names.state]
    try:
        architecture = Architecture.infer(names_in_memory, weights.config)
        places = _Places(
            name=template_name,
            architecture=Architecture.infer(template_names.state, template.config),
            stored_architecture=template.architecture,
        )
    except CheckpointError:
        # Layers cannot be told apart in memory, so the names are matched as they are.
        return None
    places.add_all(template, template_names)
    return _Arranger(model, weights, places, architecture, own).layout()


def _names_like(template: Weights, weights: Weights) -> LoadedNames | None:
    """Names of a model in memory: in the template's class if it is a model of the same type."""
    config = weights.config
    is_same_type = config.get("model_type") == template.config.get("model_type")
    if is_same_type and "architectures" in template.config:
        config = {**config, "architectures": template.config["architectures"]}
    return loaded_names(config)


def _common_names(
    template_names: LoadedNames, names: LoadedNames
) -> Mapping[str, str] | None:
    """Names of a model in memory -> names of the template in memory.

    None if neither is a part of the other.
    """
    if type(template_names.model) is type(names.model):
        return {}
    inner = _names_inside(template_names, names)
    if inner is not None:
        return inner
    outer = _names_inside(names, template_names)
    if outer is not None:
        return {name: own for own, name in outer.items()}
    return None


def _names_inside(outer: LoadedNames, inner: LoadedNames) -> dict[str, str] | None:
    """Names of a language model -> names of the same tensors in a model that contains it."""
    base = f"{inner.base_prefix}."
    body = [name for name in inner.state if name.startswith(base)]
    stems = {name.removeprefix(base) for name in body}
    prefixes: set[str] | None = None
    for stem in stems:
        found = _prefixes_before(stem, outer.state)
        # Models may differ in depth.
        if found:
            prefixes = found if prefixes is None else prefixes & found
    if not prefixes or len(prefixes) > 1:
        return None
    prefix = prefixes.pop()
    result = {}
    for name in inner.state:
        candidates = [f"{prefix}{name.removeprefix(base)}"]
        if not name.startswith(base):
            # Heads may be outside of the language model.
            candidates = [f"{prefix.removesuffix(base)}{name}", name]
        match = next((entry for entry in candidates if entry in outer.state), None)
        result[name] = match or candidates[0]
    return result


def _prefixes_before(stem: str, names: Iterable[str]) -> set[str]:
    found = set()
    for name in names:
        prefix = name.removesuffix(stem)
        if prefix != name and prefix.endswith("."):
            found.add(prefix)
    return found


def _loaded_origins(
    model: str, weights: Weights, names: LoadedNames
) -> dict[str, _Origin]:
    """Name in memory -> where transformers has the tensor from."""
    arrangement = names.arrange(weights.headers)
    origins: dict[str, _Origin] = dict(arrangement.plain)
    for packed in arrangement.packed:
        shapes = [weights.headers[name].shape for name in packed.names]
        loaded, moves = find_moves(packed, shapes, model)
        for index, name in enumerate(loaded):
            origins[name] = _Gathering(packed.names, moves, index, is_loaded=True)
    return origins


class _Places:
    """Where the template stores each tensor in memory.

    Args:
        name: The template, for error messages.
        architecture: What its names in memory say about it.
        stored_architecture: What its names in the checkpoint say about it.
    """

    def __init__(
        self, name: str, architecture: Architecture, stored_architecture: Architecture
    ) -> None:
        self.name = name
        self.architecture = architecture
        self.stored_architecture = stored_architecture
        self._by_kind: dict[str, dict[int | None, _Place]] = defaultdict(dict)

    def add_all(self, template: Weights, names: LoadedNames) -> None:
        """Add the places of all tensors of the template.

        Args:
            template: The template.
            names: The names of its tensors in memory.
        """
        arrangement = names.arrange(template.headers)
        for loaded, stored in arrangement.plain.items():
            self._add(_Place((stored,), (loaded,), None))
        for packed in arrangement.packed:
            shapes = [template.headers[stored].shape for stored in packed.names]
            loaded_names, moves = find_moves(packed, shapes, self.name)
            self._add(_Place(packed.names, loaded_names, moves))

    def _add(self, place: _Place) -> None:
        for loaded in place.loaded:
            kind = name_at_layer_0(loaded, self.architecture)
            layer = self.architecture.layer(loaded)
            self._by_kind[kind][layer] = place

    def find(self, kind: str, layer: int | None) -> _Place | None:
        """Find the place of a tensor in memory.

        Args:
            kind: The tensor's name, at layer 0 if it is in a layer.
            layer: Its layer. In a model with more layers than the template, those beyond are stored
                like others with the same tensors.

        Returns:
            The place; None if the template has none.
        """
        by_layer = self._by_kind.get(kind, {})
        if layer in by_layer:
            return by_layer[layer]
        if layer is None or not by_layer:
            return None
        place = next(iter(by_layer.values()))
        stored = [self.stored_architecture.at_layer(n, layer) for n in place.stored]
        loaded = [self.architecture.at_layer(n, layer) for n in place.loaded]
        return _Place(tuple(stored), tuple(loaded), place.moves)


@dataclass(frozen=True)
class _Arranger:
    """Arranges a model's tensors as the template stores them.

    Attributes:
        model: The model, for error messages.
        weights: The model.
        places: Where the template stores its tensors.
        architecture: What the names in memory, in the template's words, say about the model.
        loaded: Name in memory, in the template's words -> where the model has the tensor.
    """

    model: str
    weights: Weights
    places: _Places
    architecture: Architecture
    loaded: Mapping[str, _Origin]

    def layout(self) -> _Layout:
        """Arrange all tensors. Those without a place in the template keep their names."""
        origins: dict[str, _Origin] = {}
        for name in self.loaded:
            kind = name_at_layer_0(name, self.architecture)
            place = self.places.find(kind, self.architecture.layer(name))
            # Of several tensors that are packed together, the first one stands for all.
            if place is not None and place.loaded[0] == name:
                origins |= self._arrange(place)
        used: set[str] = set()
        for origin in origins.values():
            used.update(_leaves(origin))
        for name in self.weights.headers:
            if name not in used:
                origins.setdefault(name, name)
        ordered = dict(sorted(origins.items()))
        headers = {name: self._header(origin) for name, origin in ordered.items()}
        separated = self.weights.architecture.separated
        names = [name for name, origin in ordered.items() if origin in separated]
        inferred = Architecture.infer(ordered, self.weights.config)
        return _Layout(
            origins=ordered,
            headers=headers,
            architecture=replace(inferred, separated=frozenset(names)),
        )

    def _arrange(self, place: _Place) -> dict[str, _Origin]:
        """The tensors that the template stores at a place: name -> origin; {} if one is missing."""
        parts = tuple(self.loaded[name] for name in place.loaded if name in self.loaded)
        if len(parts) < len(place.loaded):
            return {}
        if place.moves is None:
            return {place.stored[0]: parts[0]}
        stored = _unpacked(parts, place.moves)
        if stored is not None:
            return dict(zip(place.stored, stored, strict=True))
        for name, part, shape in zip(
            place.loaded, parts, place.moves.loaded_shapes, strict=True
        ):
            actual = self._header(part).shape
            if actual != shape:
                raise CheckpointError(
                    f"{self.model}: {name}: expected {list(shape)}, as in {self.places.name}, "
                    f"got {list(actual)}; do the models come from one base?"
                )
        origins: dict[str, _Origin] = {}
        for index, name in enumerate(place.stored):
            origins[name] = _Gathering(parts, place.moves, index, is_loaded=False)
        return origins

    def _header(self, origin: _Origin) -> Header:
        headers = self.weights.headers
        if isinstance(origin, str):
            return headers[origin]
        first = next(_leaves(origin))
        # The tensor is in no file: only its dtype and shape are read from this header.
        return Header(Path(), headers[first].dtype, origin.shape, 0)


def _leaves(origin: _Origin) -> Iterator[str]:
    """Names of the stored tensors that a tensor is put together from."""
    if isinstance(origin, str):
        yield origin
        return
    for part in origin.parts:
        yield from _leaves(part)


def _unpacked(parts: tuple[_Origin, ...], moves: Moves) -> tuple[_Origin, ...] | None:
    """The stored tensors of a model that packs them as the template does; None if it does not."""
    first = parts[0]
    if isinstance(first, str) or first.moves != moves:
        return None
    for index, part in enumerate(parts):
        if part != _Gathering(first.parts, moves, index, is_loaded=True):
            return None
    return first.parts
