"""Counts the memory of tensors as a merge makes them, also on a device that is not there."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ABSENT_DEVICE = "ve:0"
"""A device of torch that no machine of ours has, and that torch does not set up at first use."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are alive; views count nothing.

    Args:
        existing: Tensors that are there already.
        device: Count only tensors on this absent device, which the CPU plays: each move to it is a
            copy. What is computed from its tensors is on it, too.
    """

    def __init__(
        self, existing: Iterable[torch.Tensor] = (), device: str | None = None
    ) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._device = torch.device(device) if device else None
        self._sizes: dict[int, int] = {}
        # Kept alive, so that no new memory has the place of an existing one.
        self._existing = [tensor.untyped_storage() for tensor in existing]
        self._known = {storage._cdata for storage in self._existing}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        # In inference mode `to` comes as a whole, and would be nothing between CPU and CPU.
        if func.namespace == "aten" and func._opname == "to":
            with self:
                return func.decompose(*args, **kwargs)
        arguments = _storages((args, kwargs))
        is_made_there = self._device is None
        if self._device is not None and kwargs.get("device") == self._device:
            kwargs["device"] = torch.device("cpu")
            is_made_there = True
        on_device = any(key in self._sizes for key in arguments)
        result = func(*args, **kwargs)
        for key, storage in _storages(result).items():
            if key in arguments or key in self._sizes or key in self._known:
                continue
            if is_made_there or on_device:
                self._add(key, storage)
        return result

    def _add(self, key: int, storage: torch.UntypedStorage) -> None:
        self._sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def _storages(tree: Any) -> dict[int, torch.UntypedStorage]:
    """Address -> storage of each tensor."""
    found = {}
    for leaf in tree_leaves(tree):
        if isinstance(leaf, torch.Tensor):
            storage = leaf.untyped_storage()
            found[storage._cdata] = storage
    return found
