"""Per-method parameters such as gamma and epsilon: which are searched, and in which range.

What a parameter means, its default and the methods that have it are in the table of methods
(`paretomerge.merging.methods`). Some have no range and keep their defaults, unless the user sets
them (`SETTABLE`). Two parameters cannot be set. `lambda` would scale what the weights scale
already, since they are free to be large and are never normalised. `k` of consensus_ta counts
models.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from paretomerge.errors import ConfigError, unknown_name
from paretomerge.merging.methods import METHODS, Parameter
from paretomerge.recipe import ParameterSetting


@dataclass(frozen=True)
class SearchRange:
    """Default search range of one parameter.

    Attributes:
        low: Lower bound.
        high: Upper bound.
        baseline: Value in the baseline recipes.
    """

    low: float
    high: float
    baseline: float


SEARCH_RANGES: dict[str, SearchRange] = {
    "gamma": SearchRange(0.0, 0.1, 0.01),
    # della's epsilon is searched as a share of min(density, 1 - density), see `della_epsilon`.
    "epsilon": SearchRange(0.0, 0.9, 0.3),
    "select_topk": SearchRange(0.05, 1.0, 1.0),
    "mask_lambda": SearchRange(0.2, 0.8, 0.4),
    # Of regmean: published values are between 0.1 and 0.95.
    "alpha": SearchRange(0.0, 1.0, 0.9),
}
"""The per-method parameters that are searched by default."""

SETTABLE = ("common_fraction", "steps", "lr")
"""Per-method parameters that are searched, or fixed at another value, only where the user says so.

Their defaults are those of the papers. Every further parameter makes a space harder to search.
"""

AVAILABLE = (*SEARCH_RANGES, *SETTABLE)
"""The names that `method_parameters` can have."""

ParameterBounds = float | tuple[float, float]
"""A per-method parameter in study.yaml: a number fixes it, [low, high] are its bounds."""


def methods_with(
    parameter: str,
    methods: Sequence[str],
) -> tuple[str, ...]:
    """Return those of `methods` that have a parameter of that name."""
    matches = [method for method in methods if find_parameter(method, parameter)]
    return tuple(matches)


def search_range(parameter: str) -> SearchRange:
    """Return the default range of one of `AVAILABLE`; its bounds are equal where it is fixed."""
    if parameter in SEARCH_RANGES:
        return SEARCH_RANGES[parameter]
    method, *_ = methods_with(parameter, tuple(METHODS))
    row = find_parameter(method, parameter)
    assert row is not None and row.default is not None
    default = float(row.default)
    return SearchRange(default, default, default)


def is_whole_number(parameter: str) -> bool:
    """Return whether a parameter counts something, so that it takes no fractions."""
    rows = [find_parameter(method, parameter) for method in METHODS]
    return any(row is not None and type(row.default) is int for row in rows)


def find_parameter(method: str, name: str) -> Parameter | None:
    """Return the parameter of a method, None if the method has none of that name."""
    for parameter in METHODS[method].parameters:
        if parameter.name == name:
            return parameter
    return None


def _is_searchable(method: str) -> bool:
    if METHODS[method].base != "required":
        return False
    return find_parameter(method, "weight") is not None


SEARCHABLE_METHODS = tuple(filter(_is_searchable, METHODS))
"""Methods on deltas that have a weight per source."""


def check_searchable(methods: Sequence[str]) -> None:
    """Check that a search can use methods.

    Args:
        methods: Names of methods.

    Raises:
        ConfigError: One is unknown, or is not in `SEARCHABLE_METHODS`.
    """
    for method in methods:
        if method not in SEARCHABLE_METHODS:
            problem = unknown_name("searchable method", method, SEARCHABLE_METHODS)
            raise ConfigError(f"space.methods: {problem}")


def check_needs_no_data(methods: Sequence[str]) -> None:
    """Check that methods can merge without statistics of the sources.

    Args:
        methods: Names of methods.

    Raises:
        ConfigError: One needs data.
    """
    for method in methods:
        if METHODS[method].statistics is not None:
            raise ConfigError(
                f"space.methods: {method} needs statistics of the models on text; set "
                "`calibration` to their folder, or to the text of each model"
            )


def bounds_of(setting: ParameterBounds) -> tuple[float, float]:
    """Return the lower and upper bound of a setting; they are equal if it fixes the parameter."""
    if isinstance(setting, (tuple, list)):
        low, high = setting
    else:
        low = high = setting
    return float(low), float(high)


def check_method_parameters(
    settings: Mapping[str, ParameterBounds], methods: Sequence[str]
) -> None:
    """Check the user's bounds of per-method parameters.

    Args:
        settings: Parameter name -> value or bounds.
        methods: The methods of the space.

    Raises:
        ConfigError: No method has the parameter, or a bound is outside what the methods allow.
    """
    available = [name for name in AVAILABLE if methods_with(name, methods)]
    for name, setting in settings.items():
        if name not in available:
            problem = unknown_name(
                "parameter of these methods", name, available or ["none"]
            )
            raise ConfigError(f"space.method_parameters: {problem}")
        low, high = bounds_of(setting)
        lowest, highest = _allowed_bounds(name, methods)
        is_inside = lowest <= low <= high <= highest and math.isfinite(high)
        # Equal bounds would fix the parameter, for which the user writes a number.
        is_interval = isinstance(setting, (tuple, list))
        is_empty = is_interval and low == high
        if is_whole_number(name):
            if is_interval or not is_inside or low != int(low):
                raise ConfigError(
                    f"space.method_parameters.{name}: expected a whole number "
                    f"from {lowest:g} on, got {setting}"
                )
        elif is_empty or not is_inside:
            raise ConfigError(
                f"space.method_parameters.{name}: expected a number, or [low, high], "
                f"from {lowest:g} to {highest:g}, got {setting}"
            )


def della_epsilon(density: ParameterSetting, share: float) -> ParameterSetting:
    """Return della's epsilon for a density in a recipe: `share` of min(density, 1 - density).

    DELLA (Deep et al. 2024, arXiv 2406.11617) needs keep probabilities density +- epsilon inside
    (0, 1). A share below 1 satisfies this for every density, so every trial is valid.

    Args:
        density: A number, a gradient (list of numbers), or entries with `filter` and `value`.
        share: In [0, 1).

    Returns:
        Epsilon in the form that `density` has.
    """
    if isinstance(density, Mapping):
        value = della_epsilon(density["value"], share)
        return {**density, "value": value}
    if isinstance(density, list):
        return [della_epsilon(entry, share) for entry in density]
    # The distance of the density to the nearer end of [0, 1].
    margin = min(density, 1 - density)
    return share * margin


def _allowed_bounds(name: str, methods: Sequence[str]) -> tuple[float, float]:
    if name == "epsilon":
        # At a share of 1 a keep probability reaches 0 or 1, which della refuses.
        return 0.0, 0.99
    method, *_ = methods_with(name, methods)
    parameter = find_parameter(method, name)
    assert parameter is not None
    return parameter.low, parameter.high
