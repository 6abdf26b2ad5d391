"""The memory of a loaded model, by the names that a checkpoint has for its tensors."""

import threading
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import torch

from paretomerge.errors import CheckpointError
from paretomerge.merging.live.names import Conversion, loading_layout
from paretomerge.merging.plan.plan import TensorJob

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# transformers makes it up where a checkpoint has none, and scores of text do not depend on it.
_MADE_UP = "pooler."


class LoadedTensors:
    """The tensors of a loaded model that a merge overwrites.

    Args:
        model: The loaded model.
        names: The names of all tensors of the checkpoint that it was loaded from.
    """

    def __init__(self, model: "PreTrainedModel", names: Iterable[str]) -> None:
        self._model = model
        # The model's own tensors: what is written here is what the model computes with.
        self._state = model.state_dict(keep_vars=False)
        layout = loading_layout(model, names)
        self.unused = layout.unused
        self._renamed = layout.renamed
        self._conversions: dict[str, Conversion] = {}
        for conversion in layout.conversions:
            for name in conversion.members:
                self._conversions[name] = conversion

    def find(self, name: str) -> torch.Tensor | None:
        """The model's own tensor; None if the model has it only together with others, or not."""
        loaded = self._renamed.get(name)
        return None if loaded is None else self._state[loaded]

    def conversion(self, name: str) -> Conversion | None:
        """How transformers changes a tensor when it loads it; None if it does not."""
        return self._conversions.get(name)

    def not_written(self, names: Iterable[str]) -> list[str]:
        """Names of tensors that would keep their values if only these were written."""
        written = set(names)
        memory = set()
        for name in written & self._renamed.keys():
            memory.add(self._state[self._renamed[name]].data_ptr())
        left_out = []
        for name, loaded in self._renamed.items():
            # A tied tensor is written with the one whose memory it shares.
            if name not in written and self._state[loaded].data_ptr() not in memory:
                left_out.append(name)
        left_out += [name for name in self._conversions if name not in written]
        return left_out

    def convert(
        self, conversion: Conversion, tensors: Mapping[str, torch.Tensor]
    ) -> None:
        """Write tensors that transformers changes when it loads them.

        Args:
            conversion: The change.
            tensors: All its members, by their names in the checkpoint.
        """
        for name, result in conversion.apply(self._model, tensors).items():
            self._state[name].copy_(result)

    def check_loaded(self, read: Callable[[str], torch.Tensor]) -> None:
        """Check that the model has every tensor of its checkpoint where a merge would write it.

        Args:
            read: Reads a tensor of the checkpoint that the model was loaded from.

        Raises:
            CheckpointError: If a tensor is elsewhere, or the checkpoint lacks a part of the model.
        """
        filled: set[int] = set()
        for name, loaded in self._renamed.items():
            filled.add(self._check_equal(loaded, read(name)))
        # Equal conversions come one after another.
        for conversion in dict.fromkeys(self._conversions.values()):
            tensors = {name: read(name) for name in conversion.members}
            for loaded, result in conversion.apply(self._model, tensors).items():
                filled.add(self._check_equal(loaded, result))
        for name, parameter in self._model.named_parameters():
            # Tied parameters are one piece of memory.
            if parameter.data_ptr() not in filled and _MADE_UP not in name:
                kind = type(self._model).__name__
                raise CheckpointError(
                    f"the checkpoint has no {name}, which a {kind} needs: it would be random. "
                    "Correct `architectures` in config.json, or name a complete base"
                )

    def _check_equal(self, name: str, expected: torch.Tensor) -> int:
        """Compare a tensor of the model with what was loaded into it; return its address."""
        tensor = self._state[name]
        if not torch.equal(tensor, expected.to(tensor)):
            raise CheckpointError(
                f"transformers changes {name} when it loads the base, in a way that cannot be "
                "repeated in memory; write merges with `paretomerge merge` instead"
            )
        address: int = tensor.data_ptr()
        return address


class StagedTensors:
    """Tensors of one merge that wait for others, because transformers changes them together.

    Several threads may use it.
    """

    def __init__(self, loaded: LoadedTensors) -> None:
        self._loaded = loaded
        self._lock = threading.Lock()
        self._tensors: dict[str, torch.Tensor] = {}
        self._missing: dict[str, int] = {}

    def memory(self, job: TensorJob, device: str) -> torch.Tensor:
        """Flat memory for a merged tensor."""
        with self._lock:
            if job.name not in self._tensors:
                dtype = getattr(torch, job.dtype)
                empty = torch.empty(job.shape, dtype=dtype, device=device)
                self._tensors[job.name] = empty
                self._missing[job.name] = empty.numel()
            return self._tensors[job.name].view(-1)

    def written(self, job: TensorJob, count: int) -> None:
        """Note that elements were written; what is complete goes into the model."""
        conversion = self._loaded.conversion(job.name)
        assert conversion is not None
        with self._lock:
            self._missing[job.name] -= count
            # A member that has not begun yet is not complete, either.
            is_complete = not any(
                self._missing.get(name, 1) for name in conversion.members
            )
            if not is_complete:
                return
            tensors = {name: self._tensors.pop(name) for name in conversion.members}
        self._loaded.convert(conversion, tensors)
