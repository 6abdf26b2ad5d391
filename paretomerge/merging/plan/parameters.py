"""The settings of a recipe against the parameters of its method: names, levels, kinds and ranges."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from paretomerge.errors import ErrorCollector, RecipeError, shorten, unknown_name
from paretomerge.merging.methods import IGNORED_PARAMETERS, METHODS, Method, Parameter
from paretomerge.recipe import Recipe, settings

_EVERYWHERE = {
    parameter.name for method in METHODS.values() for parameter in method.parameters
} | set(IGNORED_PARAMETERS)


def check_names(recipe: Recipe, method: Method) -> tuple[str, ...]:
    """Parameters that no method has are errors. Those that this one does not read are told and left alone, as in mergekit:
    published recipes are full of them."""
    problems = ErrorCollector()
    notes: list[str] = []
    for where, parameters, source in _levels(recipe):
        with problems.collect():
            notes += _names(where, parameters, source, method)
    with problems.collect():
        if method.base in ("required", "source") and recipe.base_model is None:
            raise RecipeError(f"{method.name}: expected `base_model`, got none")
    problems.raise_if_any()
    return tuple(notes)


def _levels(recipe: Recipe) -> list[tuple[str, Mapping[str, Any], bool]]:
    """(where, parameters, whether it is a source's own) of every level that has parameters."""
    levels: list[tuple[str, Mapping[str, Any], bool]] = [("parameters", recipe.parameters, False)]
    levels += [
        (f"modules.{name}: parameters", module.parameters, False)
        for name, module in recipe.modules.items()
    ]
    for i, piece in enumerate(recipe.pieces()):
        levels.append((f"slices[{i}]: parameters", piece.parameters, False))
        levels += [
            (f"{source.model}: parameters", source.parameters, True) for source in piece.sources
        ]
    return levels


def _names(where: str, parameters: Mapping[str, Any], source: bool, method: Method) -> list[str]:
    known = {parameter.name: parameter for parameter in method.parameters}
    notes = []
    problems = ErrorCollector()
    for name in parameters:
        with problems.collect():
            if name in IGNORED_PARAMETERS:
                continue
            if name not in _EVERYWHERE:
                raise RecipeError(
                    f"{where}: {unknown_name(f'parameter of {method.name}', name, known or ['none'])}"
                )
            if name not in known:
                notes.append(f"{where}: `{name}` means nothing to {method.name} and is ignored")
            elif source and not known[name].per_source:
                notes.append(
                    f"{where}: `{name}` holds for the whole merge and is ignored here; move it to the top level's `parameters`"
                )
            else:
                for value in _leaves(parameters[name]):
                    _value(known[name], value, where)
    problems.raise_if_any()
    return notes


def _leaves(setting: Any) -> Iterator[Any]:
    """Every single value of a setting. A gradient stays between its values, so these are all there is to check."""
    for entry in setting if isinstance(setting, (list, tuple)) else [setting]:
        if isinstance(entry, Mapping):
            yield from _leaves(entry["value"])
        else:
            yield entry


def parameter_values(
    method: Method, levels: Sequence[Mapping[str, Any]], tensor: str, t: float, where: str
) -> dict[str, Any]:
    """What a source's own parameters are for one tensor at depth t; levels from the innermost outwards."""
    parameters = {}
    for parameter in method.parameters:
        if parameter.per_source:
            nowhere = not any(parameter.name in level for level in levels)
            parameters[parameter.name] = _value(
                parameter,
                settings(levels, parameter.name, tensor, t),
                where.removesuffix(f": {tensor}") if nowhere else where,
            )
    return parameters


def option_values(
    method: Method, levels: Sequence[Mapping[str, Any]], tensor: str, t: float
) -> dict[str, Any]:
    """What the parameters of the whole merge are for one tensor. mergekit never reads them from a source."""
    return {
        k.name: _value(k, settings(levels, k.name, tensor, t), tensor)
        for k in method.parameters
        if not k.per_source
    }


def _value(parameter: Parameter, value: Any, where: str) -> Any:
    value = (
        parameter.default if value is None else _number(value) if isinstance(value, str) else value
    )
    if value is None:
        raise RecipeError(
            f"{where}: expected a value for `{parameter.name}`, which has no default; add it under `parameters`"
        )
    if isinstance(parameter.default, bool) and value in (0, 1) and not isinstance(value, str):
        return bool(value)
    if parameter.choices:
        if value not in parameter.choices:
            raise RecipeError(
                f"{where}: {parameter.name}: expected one of {parameter.choices}, got {shorten(value)}"
            )
    elif isinstance(parameter.default, bool):
        raise RecipeError(
            f"{where}: {parameter.name}: expected true or false, got {shorten(value)}"
        )
    elif (
        isinstance(value, (bool, str))
        or not parameter.low <= value <= parameter.high
        or value in (float("inf"), float("-inf"))
    ):
        raise RecipeError(
            f"{where}: {parameter.name}: expected a number{_range(parameter)}, got {shorten(value)}"
        )
    elif type(parameter.default) is int and value != int(value):
        raise RecipeError(
            f"{where}: {parameter.name}: expected a whole number, got {shorten(value)}"
        )
    return value


def _range(parameter: Parameter) -> str:
    if parameter.high < float("inf"):
        return f" from {parameter.low} to {parameter.high}"
    return f" from {parameter.low} on" if parameter.low > float("-inf") else ""


def _number(text: str) -> Any:
    """mergekit takes "0.5" for 0.5."""
    try:
        return float(text)
    except ValueError:
        return text
