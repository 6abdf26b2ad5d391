"""What a loaded model calls the tensors of its checkpoint: transformers renames some while it loads (GPT-NeoX's head)."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from paretomerge.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def live_names(model: "PreTrainedModel", names: Iterable[str]) -> dict[str, str]:
    """Name in the checkpoint -> name in the loaded model. Raises CheckpointError for tensors that have no place of their own."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    known = model.state_dict(keep_vars=True)
    renamings = [
        change
        for change in get_model_conversion_mapping(model)
        if isinstance(change, WeightRenaming)
    ]
    found = {
        name: name if name in known else rename_source_key(name, renamings, [])[0] for name in names
    }
    if missing := [name for name, live in found.items() if live not in known]:
        raise CheckpointError(
            f"{missing[0]!r} has no place of that name in the loaded model; it cannot be replaced in place"
        )
    return found
