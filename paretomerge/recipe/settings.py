"""The value of a parameter for one tensor at one depth: scalars, gradients and filters."""

from collections.abc import Mapping, Sequence
from typing import Any

Setting = Any
"""A value as the grammar allows it: a scalar, a list of numbers (gradient), or a list of `{filter, value}`."""


def resolve(setting: Setting, tensor: str, t: float) -> Any:
    """The value of `setting` for `tensor` at depth `t` in [0, 1]; None where no filter matches."""
    if isinstance(setting, (list, tuple)) and setting:
        if all(isinstance(entry, Mapping) for entry in setting):
            for entry in setting:
                pattern = entry.get("filter")
                if pattern is None or pattern == "*" or pattern in tensor:
                    return resolve(entry["value"], tensor, t)
            return None
        position = t * (len(setting) - 1)
        low = min(int(position), len(setting) - 1)
        high = min(low + 1, len(setting) - 1)
        return setting[low] + (position - low) * (setting[high] - setting[low])
    return setting


def settings(levels: Sequence[Mapping[str, Setting]], name: str, tensor: str, t: float) -> Any:
    """Look `name` up from the innermost level outwards; a level where nothing matches falls through."""
    for level in levels:
        if name in level and (value := resolve(level[name], tensor, t)) is not None:
            return value
    return None
