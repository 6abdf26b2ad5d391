"""The value of a merge parameter for one tensor at one depth: scalars, gradients and filters.

The terms are mergekit's: a *setting* is what the YAML says about a parameter; it is a scalar, a
*gradient* (numbers spread evenly over the depth) or a list of *conditionals* (`{filter, value}`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

# Any: a setting is a recursive union of scalars, lists and mappings that the grammar has checked.
ParameterSetting = Any
"""A scalar, a list of numbers (gradient) or a list of `{filter, value}` (conditionals)."""


def evaluate_setting(
    setting: ParameterSetting,
    tensor: str,
    depth: float,
) -> Any:
    """Evaluate a setting for one tensor.

    Args:
        setting: The setting, as the grammar allows it.
        tensor: Name of the tensor, compared with the filters of conditionals.
        depth: Relative depth of the tensor's layer in [0, 1], for gradients.

    Returns:
        The scalar value; None if no filter matches.
    """
    if not isinstance(setting, (list, tuple)) or not setting:
        return setting
    if all(isinstance(entry, Mapping) for entry in setting):
        return _first_match(setting, tensor, depth)
    return _interpolate(setting, depth)


def find_value(
    levels: Sequence[Mapping[str, ParameterSetting]],
    name: str,
    tensor: str,
    depth: float,
) -> Any:
    """Find the value of a parameter in nested levels of settings.

    Args:
        levels: Settings by parameter name, from the innermost level (a source) outwards.
        name: Name of the parameter.
        tensor: Name of the tensor.
        depth: Relative depth of the tensor's layer in [0, 1].

    Returns:
        The value at the first level that has one for this tensor; None without any. A level
        whose filters do not match falls through to the next.
    """
    for level in levels:
        if name not in level:
            continue
        value = evaluate_setting(level[name], tensor, depth)
        # `is not None`: 0 and False are values.
        if value is not None:
            return value
    return None


def _first_match(
    conditionals: Sequence[Mapping[str, Any]],
    tensor: str,
    depth: float,
) -> Any:
    for conditional in conditionals:
        pattern = conditional.get("filter")
        if pattern is None or pattern == "*" or pattern in tensor:
            return evaluate_setting(conditional["value"], tensor, depth)
    return None


def _interpolate(gradient: Sequence[float], depth: float) -> float:
    """Linear interpolation between evenly spaced values."""
    last = len(gradient) - 1
    position = depth * last
    low = min(int(position), last)
    # At depth 1 there is no next value, and the weight of `slope` is 0.
    high = min(low + 1, last)
    # Not `(1 - weight) * low + weight * high`, which rounds differently: a recipe must give the
    # same weights in every version.
    slope = gradient[high] - gradient[low]
    return gradient[low] + (position - low) * slope
