"""Parameters of methods besides weight and density: which are searched, from where to where, and how a recipe says them.

What a parameter means, its default and who reads it stand in METHODS. `lambda` is not here: weights are free to be large and
are never normalised, so it would scale what the weights scale. Nor is `k` of consensus_ta, which counts models.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from paretomerge.errors import ConfigError, unknown_name
from paretomerge.merging.methods import METHODS, Parameter


@dataclass(frozen=True)
class Range:
    """Where one parameter is searched. start: its value in the known starts."""

    low: float
    high: float
    start: float


RANGES: dict[str, Range] = {
    "gamma": Range(0.0, 0.1, 0.01),
    "epsilon": Range(
        0.0, 0.9, 0.3
    ),  # a share of min(density, 1 - density), so that every point is valid
    "select_topk": Range(0.05, 1.0, 1.0),
    "mask_lambda": Range(0.2, 0.8, 0.4),
}

ParameterBounds = float | tuple[float, float]
"""In study.yaml: a number fixes a parameter, [low, high] are its bounds."""

SEARCHABLE = tuple(
    method.name
    for method in METHODS.values()
    if method.base == "required"
    and any(parameter.name in ("weight", "select_topk") for parameter in method.parameters)
)
"""Methods on deltas that have a weight per source, and sce, which weighs the sources itself."""


def readers(parameter: str, methods: Sequence[str]) -> tuple[str, ...]:
    """Those of `methods` that have the parameter."""
    return tuple(method for method in methods if parameter_of(parameter, method))


def parameter_of(name: str, method: str) -> Parameter | None:
    return next(
        (parameter for parameter in METHODS[method].parameters if parameter.name == name), None
    )


def check_settings(settings: Mapping[str, ParameterBounds], methods: Sequence[str]) -> None:
    """Knobs that the methods have, and bounds inside what they allow."""
    known = [name for name in RANGES if readers(name, methods)]
    for name, setting in settings.items():
        if name not in known:
            raise ConfigError(
                f"space.method_parameters: {unknown_name('parameter of these methods', name, known or ['none'])}"
            )
        low, high = setting if isinstance(setting, (tuple, list)) else (setting, setting)
        parameter = parameter_of(name, readers(name, methods)[0])
        least, most = (
            (0.0, 0.99)
            if name == "epsilon"
            else (parameter.low, parameter.high)
            if parameter
            else (0.0, 1.0)
        )
        if not (least <= low <= high <= most) or (
            isinstance(setting, (tuple, list)) and low == high
        ):
            raise ConfigError(
                f"space.method_parameters.{name}: expected a number, or [low, high], from {least:g} to {most:g}, got {setting}"
            )


def epsilon_of(density: Any, share: float) -> Any:
    """della's epsilon for a density, or for entries or a gradient (one value a layer) of them: `share` of min(d, 1 - d)."""
    if isinstance(density, Mapping):
        return {**density, "value": epsilon_of(density["value"], share)}
    if isinstance(density, list):
        return [epsilon_of(entry, share) for entry in density]
    return share * min(density, 1 - density)
