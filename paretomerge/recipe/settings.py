"""The value of a merge parameter for one tensor at one depth: scalars, gradients and filters.

The terms are mergekit's: a *setting* is what the YAML says about a parameter; it is a scalar, a
*gradient* (values spread evenly over the depth) or one or more *conditionals* (`{filter, value}`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

# Any: a setting is a recursive union of scalars, lists and mappings that the grammar has checked.
ParameterSetting = Any
"""A scalar, a list of scalars (gradient), or `{filter, value}` or a list of it (conditionals)."""

ReadScalar = Callable[[Any], Any]
"""Turns a scalar as the YAML has it into a value of the parameter's type."""


def _as_written(scalar: Any) -> Any:
    return scalar


def evaluate_setting(
    setting: ParameterSetting,
    tensor: str,
    depth: float,
    read: ReadScalar = _as_written,
) -> Any:
    """Evaluate a setting for one tensor.

    Args:
        setting: The setting, as the grammar allows it.
        tensor: Name of the tensor, compared with the filters of conditionals.
        depth: Relative depth of the tensor's layer in [0, 1], for gradients.
        read: Applied to each scalar, before a gradient is interpolated.

    Returns:
        The value; None if no filter matches.
    """
    if isinstance(setting, Mapping):
        return _first_match([setting], tensor, depth, read)
    if not isinstance(setting, (list, tuple)) or not setting:
        return read(setting)
    if all(isinstance(entry, Mapping) for entry in setting):
        return _first_match(setting, tensor, depth, read)
    values = [read(entry) for entry in setting]
    return _at_depth(values, depth)


def find_value(
    levels: Sequence[Mapping[str, ParameterSetting]],
    name: str,
    tensor: str,
    depth: float,
    read: ReadScalar = _as_written,
) -> Any:
    """Find the value of a parameter in nested levels of settings.

    Args:
        levels: Settings by parameter name, from the innermost level (a source) outwards.
        name: Name of the parameter.
        tensor: Name of the tensor.
        depth: Relative depth of the tensor's layer in [0, 1].
        read: Applied to each scalar, before a gradient is interpolated.

    Returns:
        The value at the first level that has one for this tensor; None without any. A level
        whose filters do not match falls through to the next.
    """
    for level in levels:
        if name not in level:
            continue
        value = evaluate_setting(level[name], tensor, depth, read)
        # `is not None`: 0 and False are values.
        if value is not None:
            return value
    return None


def _first_match(
    conditionals: Sequence[Mapping[str, Any]],
    tensor: str,
    depth: float,
    read: ReadScalar,
) -> Any:
    for conditional in conditionals:
        pattern = conditional.get("filter")
        if pattern is None or pattern == "*" or pattern in tensor:
            return evaluate_setting(conditional["value"], tensor, depth, read)
    return None


def _at_depth(gradient: Sequence[Any], depth: float) -> Any:
    """Linear interpolation between evenly spaced numbers; the value before, of flags and words."""
    last = len(gradient) - 1
    position = depth * last
    low = min(int(position), last)
    if any(isinstance(value, (bool, str)) for value in gradient):
        return gradient[low]
    # At depth 1 there is no next value, and the weight of `slope` is 0.
    high = min(low + 1, last)
    # Not `(1 - weight) * low + weight * high`, which rounds differently: a recipe must give the
    # same weights in every version.
    slope = gradient[high] - gradient[low]
    return gradient[low] + (position - low) * slope
