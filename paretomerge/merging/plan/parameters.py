"""The parameters of a recipe: checked against those of its method, and looked up for one tensor."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from paretomerge.errors import ErrorCollector, RecipeError, shorten, unknown_name
from paretomerge.merging.methods import IGNORED_PARAMETERS, METHODS, Method, Parameter
from paretomerge.recipe import ParameterSetting, Recipe, find_value
from paretomerge.types import ParamValue


def _names_of_all_methods() -> set[str]:
    names = set(IGNORED_PARAMETERS)
    for method in METHODS.values():
        names |= {parameter.name for parameter in method.parameters}
    return names


_KNOWN_NAMES = _names_of_all_methods()

_Levels = Sequence[Mapping[str, ParameterSetting]]
"""Parameters at each level of a recipe, from the innermost outwards."""


@dataclass(frozen=True)
class Level:
    """A place in a recipe that sets parameters.

    Attributes:
        where: The place, for error messages.
        parameters: The settings by parameter name.
        of_source: True if the level belongs to a single source.
    """

    where: str
    parameters: Mapping[str, ParameterSetting]
    of_source: bool = False


def check_parameters(recipe: Recipe, method: Method) -> tuple[str, ...]:
    """Check all parameters of a recipe: names, levels, types and ranges.

    A name that no method has is an error. A name that only other methods have is ignored with a
    note, as in mergekit: many published recipes have such parameters.

    Args:
        recipe: The recipe.
        method: The row of its method in the table of methods.

    Returns:
        Notes on parameters that have no effect, or another one than in mergekit.

    Raises:
        RecipeError: All mistakes, in one error.
    """
    problems = ErrorCollector()
    notes: list[str] = []
    for level in parameter_levels(recipe):
        with problems.collect():
            notes += _check_level(level, method)
    needs_base = method.base in ("required", "source")
    with problems.collect():
        if needs_base and recipe.base_model is None:
            raise RecipeError(f"{method.name}: expected `base_model`, got none")
    problems.raise_if_any()
    if recipe.calibration is not None and method.statistics is None:
        notes.append(f"`calibration` means nothing to {method.name} and is ignored")
    # A note on a parameter is the same for every source.
    return tuple(dict.fromkeys(notes))


def evaluate_source_parameters(
    method: Method,
    levels: _Levels,
    model: str,
    tensor: str,
    depth: float,
) -> dict[str, ParamValue]:
    """Evaluate the parameters that each source has, for one source and one tensor.

    Args:
        method: The row of the method in the table of methods.
        levels: Settings from the innermost level (the source) outwards.
        model: The source, for error messages.
        tensor: The tensor's name, for filters.
        depth: Relative depth from 0 to 1, for gradients.

    Returns:
        The value of each parameter.

    Raises:
        RecipeError: If a value is missing or not allowed.
    """
    parameters = {}
    for parameter in method.parameters:
        if not parameter.per_source:
            continue
        # A value that no level has is missing for all tensors: one error, not one per tensor.
        is_set = any(parameter.name in level for level in levels)
        where = f"{model}: {tensor}" if is_set else model
        value = _evaluate(parameter, levels, tensor, depth, where)
        parameters[parameter.name] = value
    return parameters


def evaluate_options(
    method: Method,
    levels: _Levels,
    tensor: str,
    depth: float,
) -> dict[str, ParamValue]:
    """Evaluate the parameters of the whole merge for one tensor.

    As in mergekit, `levels` do not include the sources.

    Args:
        method: The row of the method in the table of methods.
        levels: Settings from the innermost level (the slice) outwards.
        tensor: The tensor's name in the result, for filters and error messages.
        depth: Relative depth from 0 to 1, for gradients.

    Returns:
        The value of each parameter.

    Raises:
        RecipeError: If a value is missing or not allowed.
    """
    options = {}
    for parameter in method.parameters:
        if not parameter.per_source:
            value = _evaluate(parameter, levels, tensor, depth, where=tensor)
            options[parameter.name] = value
    return options


def _evaluate(
    parameter: Parameter,
    levels: _Levels,
    tensor: str,
    depth: float,
    where: str,
) -> ParamValue:
    """The value of one parameter for one tensor."""

    def read(scalar: object) -> ParamValue:
        return _check_value(parameter, scalar, where)

    value = find_value(levels, parameter.name, tensor, depth, read)
    # Once more: the value may be missing, or lie between two whole numbers of a gradient.
    return _check_value(parameter, value, where)


def parameter_levels(recipe: Recipe) -> Iterator[Level]:
    """Every level of a recipe that can have parameters."""
    yield Level("parameters", recipe.parameters)
    for name, module in recipe.modules.items():
        where = f"modules.{name}: parameters"
        yield Level(where, module.parameters)
    for i, piece in enumerate(recipe.all_slices()):
        where = f"slices[{i}]: parameters"
        yield Level(where, piece.parameters)
        for source in piece.sources:
            where = f"{source.model}: parameters"
            yield Level(where, source.parameters, of_source=True)


def _check_level(level: Level, method: Method) -> list[str]:
    """Check the parameters of one level; returns notes for the user."""
    method_parameters = {parameter.name: parameter for parameter in method.parameters}
    problems = ErrorCollector()
    notes = []
    for name, setting in level.parameters.items():
        # mergekit's `int8_mask` and the like: they change nothing, and recipes are full of them.
        if name in IGNORED_PARAMETERS:
            continue
        with problems.collect():
            if name not in _KNOWN_NAMES:
                known = method_parameters or ["none"]
                kind = f"parameter of {method.name}"
                message = unknown_name(kind, name, known)
                raise RecipeError(f"{level.where}: {message}")
            parameter = method_parameters.get(name)
            if parameter is None:
                notes.append(
                    f"{level.where}: `{name}` means nothing to {method.name} and is ignored"
                )
            elif level.of_source and not parameter.per_source:
                notes.append(
                    f"{level.where}: `{name}` holds for the whole merge and is ignored here; "
                    "move it to the top level's `parameters`"
                )
            else:
                for value in _values_in(setting):
                    checked = _check_value(parameter, value, level.where)
                    if parameter.note and checked != parameter.default:
                        notes.append(parameter.note)
    problems.raise_if_any()
    return notes


def _values_in(setting: ParameterSetting) -> Iterator[object]:
    """Every single value of a setting. Values between those of a gradient need no check."""
    # A list is a gradient, or a list of conditionals, each with a setting of its own.
    is_list = isinstance(setting, (list, tuple))
    for entry in setting if is_list else [setting]:
        if isinstance(entry, Mapping):
            yield from _values_in(entry["value"])
        else:
            yield entry


def _check_value(parameter: Parameter, setting: Any, where: str) -> ParamValue:
    """The value of a parameter: the default if it is None, numbers in quotes as numbers.

    `setting` is what a YAML file says, of any type.
    """
    value: Any = setting
    if setting is None:
        value = parameter.default
    elif isinstance(setting, str):
        value = _number_from(setting)
    if value is None:
        raise RecipeError(
            f"{where}: expected a value for `{parameter.name}`, which has no default; "
            "add it under `parameters`"
        )
    is_flag = isinstance(parameter.default, bool)
    # 0 and 1 are taken for false and true.
    if is_flag and value in (0, 1) and not isinstance(value, str):
        return bool(value)
    if parameter.choices:
        allowed = f"one of {parameter.choices}"
        is_allowed = value in parameter.choices
    elif is_flag:
        allowed = "true or false"
        is_allowed = False
    elif not _is_in_range(parameter, value):
        allowed = f"a number{_range_text(parameter)}"
        is_allowed = False
    else:
        allowed = "a whole number"
        # bool is a kind of int, so `isinstance` would not do; flags are treated above.
        is_whole_number = type(parameter.default) is int
        is_allowed = not is_whole_number or value == int(value)
    if not is_allowed:
        message = f"expected {allowed}, got {shorten(value)}"
        raise RecipeError(f"{where}: {parameter.name}: {message}")
    checked: ParamValue = value
    return checked


def _is_in_range(parameter: Parameter, value: Any) -> bool:
    if isinstance(value, (bool, str)):
        return False
    # NaN fails both comparisons; infinity passes them where there is no bound.
    is_within_bounds = bool(parameter.low <= value <= parameter.high)
    return is_within_bounds and abs(value) != math.inf


def _range_text(parameter: Parameter) -> str:
    if parameter.high < math.inf:
        return f" from {parameter.low} to {parameter.high}"
    if parameter.low > -math.inf:
        return f" from {parameter.low} on"
    return ""


def _number_from(text: str) -> float | str:
    """The number in a text, as mergekit reads it; the text itself if it is no number."""
    try:
        return float(text)
    except ValueError:
        return text
