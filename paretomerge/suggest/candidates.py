"""The recipes that are compared: each merge method that needs nothing but the models."""

from collections.abc import Mapping
from typing import Any

from paretomerge.merging.methods import METHODS, Method
from paretomerge.recipe import Recipe

_SLOW = ("wudi",)
"""Methods that take hundreds of steps per matrix. `wudi` minimises what is measured here."""

_SUMS = (
    "task_arithmetic",
    "dare_linear",
    "dare_ties",
    "della_linear",
    "breadcrumbs",
    "breadcrumbs_ties",
    "consensus_ta",
    "pcb",
)
"""Methods whose merged delta grows with the number of sources, so that `lambda` must be set.

Others divide by what agrees, or keep a share 1/K of each source: their papers' `lambda` of 1 stays.
"""

UNIFORM = "linear"
"""The uniform average, with which every other merge is compared."""


def candidates(base: str, sources: Mapping[str, str]) -> dict[str, Recipe]:
    """Recipes with the same parameters for all sources, at their papers' settings.

    Args:
        base: The base.
        sources: Name -> path of the fine-tunes.

    Returns:
        Method -> recipe. `lambda`, where a method has it, is left to be set.
    """
    recipes = {}
    for method in METHODS.values():
        least, most = method.models
        enough = least <= len(sources) and (most is None or len(sources) <= most)
        is_average = method.name == UNIFORM
        adds_deltas = method.base == "required" and method.symmetric
        needs_more = method.name in _SLOW or method.statistics is not None
        if enough and not needs_more and (is_average or adds_deltas):
            recipes[method.name] = _recipe(method, base, sources)
    return recipes


def needs_scale(method: str) -> bool:
    """Whether a method's `lambda` depends on the models, so that its default says little."""
    return method in _SUMS


def with_scale(recipe: Recipe, scale: float) -> Recipe:
    """The recipe with another `lambda`."""
    content = recipe.to_dict()
    parameters = content.get("parameters", {}) | {"lambda": scale}
    return Recipe.from_dict(content | {"parameters": parameters})


def _recipe(method: Method, base: str, sources: Mapping[str, str]) -> Recipe:
    parameters: dict[str, Any] = {}
    names = {parameter.name for parameter in method.parameters}
    if "weight" in names:
        parameters["weight"] = 1.0
    if "density" in names:
        parameters["density"] = method.baseline_density
    models = []
    for path in sources.values():
        models.append({"model": path, "parameters": dict(parameters)})
    content: dict[str, Any] = {"merge_method": method.name, "models": models}
    if method.name != UNIFORM:
        content["base_model"] = base
    return Recipe.from_dict(content)
