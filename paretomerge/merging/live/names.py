"""The tensors of a checkpoint in a loaded model."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from paretomerge.checkpoint.loaded_names import LoadedNames
from paretomerge.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def names_in_model(model: "PreTrainedModel", names: Iterable[str]) -> dict[str, str]:
    """Find the tensors of a checkpoint in a loaded model.

    Args:
        model: The loaded model.
        names: Names of tensors in a checkpoint of the model.

    Returns:
        Name in the checkpoint -> name in the model's `state_dict`.

    Raises:
        CheckpointError: If a tensor has no place of its own in the model, for example because the
            model packs several tensors into one.
    """
    loaded_names = LoadedNames.of_model(model)
    matches = {}
    for name in names:
        loaded = loaded_names.find(name)
        if loaded is None:
            raise CheckpointError(
                f"The loaded model has no tensor of its own for {name!r}, so it cannot be replaced "
                "in place"
            )
        matches[name] = loaded
    return matches
