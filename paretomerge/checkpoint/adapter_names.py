"""The tensors of a model by the names that peft has for them: those in memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from paretomerge.checkpoint.gathered import Moves, find_moves
from paretomerge.checkpoint.loaded_names import LoadedNames, Shape, loaded_names
from paretomerge.checkpoint.model_config import declares_own_head, text_config
from paretomerge.checkpoint.reader import Checkpoint
from paretomerge.errors import CheckpointError

_STACKED = 3  # dimensions of stacked experts


class Packed(NamedTuple):
    """Stored tensors that are other tensors in memory, such as the matrices of stacked experts.

    Attributes:
        stored: Names in the checkpoint.
        loaded: Names in memory.
        moves: How the ones become the others.
    """

    stored: tuple[str, ...]
    loaded: tuple[str, ...]
    moves: Moves


@dataclass(frozen=True)
class ModelNames:
    """Finds the tensors of a model by the names that peft has for them.

    Attributes:
        checkpoint: The model.
        adapter: Name of the adapter, for error messages.
    """

    checkpoint: Checkpoint
    adapter: str

    def find(self, name: str) -> str:
        """Return the model's own name of a tensor.

        A model that was saved without its head has names without the prefix of the base model, and
        some models have other names in memory, which are those of peft. A tied tensor that is not
        stored keeps its name in memory.
        """
        candidates = (
            name,
            name.removeprefix("model."),
            f"model.{name}",
            name.removeprefix("transformer."),
        )
        for candidate in candidates:
            if candidate in self.checkpoint.headers:
                return candidate
        if self._loaded is not None:
            loaded = self._loaded.find(name)
            if loaded is not None and loaded in self._stored_by_loaded:
                return self._stored_by_loaded[loaded]
            if loaded is not None and self._loaded.tied_group(loaded):
                return loaded
            if loaded is not None and self.packed(loaded) is not None:
                return loaded
        elif self.checkpoint.architecture.is_tied_head(name):
            raise self._untold_ties(name)
        if self._loaded is not None and self._loaded.is_used(name):
            raise CheckpointError(
                f"{self.adapter}: {name}: the model stores the tensor in one with others; load the "
                "model with transformers and save it with save_pretrained, which takes them apart"
            )
        raise CheckpointError(
            f"{self.adapter}: {name}: the model has no such tensor; "
            "was the adapter trained on this model?"
        )

    def find_parameter(
        self, module: str, n_wrappers: int, targets: Sequence[str]
    ) -> str | None:
        """Find the parameter that peft wraps, of a module with one or several that it wraps.

        peft wraps them one around the other, in the order in which the module lists them.

        Args:
            module: The module, without wrappers.
            n_wrappers: Number of wrappers around the one of the parameter.
            targets: Names of parameters, or their ends, as in `target_parameters`.

        Returns:
            The parameter's name in memory; None if peft wraps the module itself.
        """
        wrapped = []
        for name in self._parameters_of(module):
            if any(f".{name}".endswith(f".{target}") for target in targets):
                wrapped.append(name)
        if n_wrappers < len(wrapped):
            return wrapped[-1 - n_wrappers]
        if not n_wrappers:
            return None
        raise CheckpointError(
            f"{self.adapter}: {module}: the model has no such parameter among those of "
            "`target_parameters`; was the adapter trained on this model?"
        )

    def _parameters_of(self, module: str) -> list[str]:
        if self._loaded is None:
            raise CheckpointError(
                f"{self.adapter}: {module}: transformers has no class that tells which parameters "
                "`target_parameters` mean; merge it into its model with peft first"
            )
        # Adapters of a model without its head have names without the prefix of the base model.
        prefix = f"{self._loaded.base_prefix}."
        modules = (module, f"{prefix}{module}", module.removeprefix(prefix))
        parameters = []
        for name, _ in self._loaded.model.named_parameters():
            if name.rpartition(".")[0] in modules:
                parameters.append(name)
        return parameters

    def stores_input_first(self, parameter: str) -> bool:
        """Whether stacked experts are (experts, input, output) and not (experts, output, input)."""
        assert self._loaded is not None
        module: Any = self._loaded.model.get_submodule(parameter.rpartition(".")[0])
        return bool(getattr(module, "is_transposed", False))

    def packed(self, name: str) -> Packed | None:
        """Return the stored tensors that a tensor in memory is made from; None if it is stored."""
        header = self.checkpoint.headers.get(name)
        # Experts may be stored under their name in memory, but transposed. transformers takes
        # seconds to load, and nothing else has three dimensions.
        if header is not None and len(header.shape) != _STACKED:
            return None
        return self._packed.get(name) if self._loaded is not None else None

    @cached_property
    def _packed(self) -> Mapping[str, Packed]:
        """For each tensor in memory that is stored in another form, the stored tensors."""
        assert self._loaded is not None
        headers = self.checkpoint.headers
        result = {}
        for group in self._loaded.arrange(headers).packed:
            shapes = [headers[name].shape for name in group.names]
            loaded, moves = find_moves(group, shapes, self.checkpoint.name)
            for name in loaded:
                result[name] = Packed(group.names, loaded, moves)
        return result

    def shape(self, name: str) -> Shape:
        """Return the shape of a tensor that was found."""
        packed = self.packed(name)
        if packed is not None:
            return packed.moves.loaded_shapes[packed.loaded.index(name)]
        return self.checkpoint.headers[self.stored_name(name)].shape

    def tied_group(self, name: str) -> dict[str, str]:
        """Return the tensors that share their values with a tensor, and where these are stored.

        Args:
            name: The model's own name of a tensor.

        Returns:
            Name -> name of a stored tensor with its values; {} if the tensor is not tied.
        """
        if not self.checkpoint.architecture.can_be_tied(name):
            return {}
        if self._stores_heads:
            return {}
        if self._loaded is None:
            raise self._untold_ties(name)
        loaded = self._loaded.find(name)
        members = self._loaded.tied_group(loaded) if loaded else ()
        stored = [self._stored_by_loaded.get(member) for member in members]
        stored_name = next((entry for entry in stored if entry), None)
        if stored_name is None:
            return {}
        group = {}
        for member, own_name in zip(members, stored, strict=True):
            group[own_name or member] = own_name or stored_name
        return group

    def all_tied(self) -> dict[str, str]:
        """Return all tied tensors of the model, and where these are stored, as `tied_group`.

        Once one of them has values of its own, the config says that nothing is tied.
        """
        result: dict[str, str] = {}
        if self._loaded is not None:
            for name in self._loaded.tied:
                result |= self.tied_group(self._stored_by_loaded.get(name, name))
        return result

    def stored_name(self, name: str) -> str:
        """Return the name of the stored tensor with the values of a tensor."""
        if name in self.checkpoint.headers:
            return name
        return self.tied_group(name)[name]

    @property
    def _stores_heads(self) -> bool:
        """Whether the config says that nothing is tied, or nothing else is known of the model."""
        config = self.checkpoint.config
        if declares_own_head(config):
            return True
        is_tied = text_config(config).get("tie_word_embeddings")
        has_head = self.checkpoint.architecture.has_head
        return self._loaded is None and has_head and not is_tied

    @cached_property
    def _loaded(self) -> LoadedNames | None:
        return loaded_names(self.checkpoint.config)

    @cached_property
    def _stored_by_loaded(self) -> Mapping[str, str]:
        assert self._loaded is not None
        return self._loaded.by_loaded_name(self.checkpoint.headers)

    def _untold_ties(self, name: str) -> CheckpointError:
        return CheckpointError(
            f"{self.adapter}: {name}: the adapter changes an embedding that the model may share "
            "with others, and transformers has no class that tells with which; merge it into its "
            "model with peft first, and save the model with tie_word_embeddings: false"
        )
