"""The tensors of a model by their names in memory, which are the names that peft knows."""

from collections.abc import Mapping
from dataclasses import dataclass

from paretomerge.checkpoint.gathered import GatheredTensor, find_moves
from paretomerge.checkpoint.loaded_names import LoadedNames, loaded_names
from paretomerge.checkpoint.operand import Operand
from paretomerge.errors import CheckpointError
from paretomerge.merging.plan.plan import Weights


@dataclass(frozen=True)
class LoadedModel:
    """A model's tensors as transformers has them in memory, read from disk when they are needed.

    Attributes:
        names: The names in memory, and the model without memory for its weights.
        operands: Name in memory -> the tensor. Tied tensors have one operand.
        unused: Stored tensors that transformers does not load.
    """

    names: LoadedNames
    operands: Mapping[str, Operand]
    unused: tuple[str, ...]

    @classmethod
    def of(
        cls, name: str, weights: Weights, like: Weights | None = None
    ) -> "LoadedModel":
        """Find the tensors of a model.

        Args:
            name: The model, for error messages.
            weights: The model.
            like: A model whose class the names follow; by default its own.

        Raises:
            CheckpointError: If transformers has no class for the model.
        """
        config = weights.config
        if like is not None and "architectures" in like.config:
            config = {**config, "architectures": like.config["architectures"]}
        names = loaded_names(config)
        if names is None:
            raise CheckpointError(
                f"{name}: transformers has no class of its own for this model, so the names of its "
                "modules, which an adapter needs, are unknown"
            )
        arrangement = names.arrange(weights.headers)
        operands: dict[str, Operand] = {}
        used = set(arrangement.plain.values())
        for loaded, stored in arrangement.plain.items():
            operands[loaded] = weights.operand(stored)
        for packed in arrangement.packed:
            used.update(packed.names)
            parts = tuple(weights.operand(part) for part in packed.names)
            shapes = [part.shape for part in parts]
            members, moves = find_moves(packed, shapes, name)
            for index, loaded in enumerate(members):
                operands[loaded] = GatheredTensor(
                    shape=moves.loaded_shapes[index],
                    dtype=parts[0].dtype,
                    parts=parts,
                    moves=moves,
                    index=index,
                    is_loaded=True,
                )
        _add_tied(names, operands)
        unused = tuple(stored for stored in weights.headers if stored not in used)
        return cls(names, operands, unused)


def _add_tied(names: LoadedNames, operands: dict[str, Operand]) -> None:
    """Add tensors that are not stored, because they share the values of others.

    Of tied tensors any one may be stored. If several are, transformers leaves them apart where
    their values differ, so they keep their own operands.
    """
    for name in names.tied:
        group = names.tied_group(name)
        stored = next((member for member in group if member in operands), None)
        if stored is None:
            continue
        for member in group:
            operands.setdefault(member, operands[stored])
