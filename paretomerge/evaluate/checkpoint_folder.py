"""Write a candidate as a checkpoint into memory-backed storage, for engines that load files."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from paretomerge.evaluate.evaluator import Candidate

if TYPE_CHECKING:
    import torch

# Linux only; elsewhere the folder for temporary files is used.
_SHARED_MEMORY = Path("/dev/shm")


def shared_memory() -> str | None:
    """The folder of memory-backed storage; None where there is none."""
    return str(_SHARED_MEMORY) if _SHARED_MEMORY.is_dir() else None


def write_checkpoint(candidate: Candidate, folder: Path) -> None:
    """Write a candidate and its tokenizer.

    Args:
        candidate: The merge.
        folder: Where its files go.
    """
    # Layers that a route repeats share tensors, which safetensors refuses to save.
    state: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    for name, tensor in candidate.model.state_dict().items():
        storage = tensor.untyped_storage().data_ptr()
        state[name] = tensor.detach()
        if storage in storages:
            state[name] = tensor.detach().clone()
        storages.add(storage)
    candidate.model.save_pretrained(folder, state_dict=state)
    candidate.text_tokenizer.save_pretrained(folder)


def checkpoint_parent(candidate: Candidate) -> str | None:
    """Shared memory where it has room for two checkpoints of a candidate; None for the default."""
    if shared_memory() is None:
        return None
    size = sum(tensor.nbytes for tensor in candidate.model.state_dict().values())
    free = shutil.disk_usage(_SHARED_MEMORY).free
    # Shared memory is memory of the machine, so it must not be filled up.
    if free > 2 * size:
        return str(_SHARED_MEMORY)
    return None
