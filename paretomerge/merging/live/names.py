"""The one place for internals of transformers: the names of tensors in a loaded model.

transformers renames some tensors of a checkpoint while it loads it, such as the head of GPT-NeoX.
It has no public interface for these names. `tests/merging/live/test_names.py` fails if the
internals change.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

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
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    state = model.state_dict(keep_vars=True)
    conversions = get_model_conversion_mapping(model)
    renamings = [change for change in conversions if isinstance(change, WeightRenaming)]
    matches = {}
    for name in names:
        matches[name] = name
        if name not in state:
            # Conversions other than renamings pack tensors together, so they are not applied.
            matches[name], _ = rename_source_key(name, renamings, [])
        if matches[name] not in state:
            raise CheckpointError(
                f"The loaded model has no tensor of its own for {name!r}, so it cannot be replaced "
                "in place"
            )
    return matches
