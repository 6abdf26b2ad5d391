"""Data-flow space: which layer of which model comes next, and at what scale (Akiba et al. 2024, arXiv 2403.13187, sec. 3.2)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from types import MappingProxyType
from typing import Any

from paretomerge.checkpoint.fold import Fold
from paretomerge.errors import RecipeError
from paretomerge.recipe import Recipe, Slice, Source


@dataclass(frozen=True)
class RouteLayer:
    """One layer of a route. scale: what the stream is multiplied by on its way from the layer before, above 0."""

    model: str
    layer: int
    scale: float = 1.0


Route = Sequence[RouteLayer]


def route_recipe(
    route: Route,
    fold: Fold | None,
    seed: int = 0,
    recipes: Mapping[str, Recipe] = MappingProxyType({}),
) -> Recipe:
    """The route as a plain passthrough, the scales folded into what layers add to the stream.

    The embedding is that of the first layer's model, final norm and head those of the last one's, as mergekit has it.
    fold: where layers write the stream; may be None where all scales are 1. recipes: those of models that are merges themselves,
    by the name that the route calls them by.
    """
    if not route:
        raise RecipeError("route: expected one layer or more, got none")
    if wrong := [step for step in route if not 0 < step.scale < math.inf]:
        raise RecipeError(
            f"route: expected scales above 0, got {wrong[0].scale} into layer {wrong[0].layer} of {wrong[0].model}"
        )
    if (
        route[0].scale != 1
    ):  # nothing comes before; and where the stream is smallest, the norms' epsilon would make the fold inexact
        raise RecipeError(
            f"route: expected a scale of 1 into the first layer, got {route[0].scale}"
        )
    if fold is None and any(step.scale != 1 for step in route):
        raise RecipeError("route: expected scales of 1 without a fold, got others")
    slices: list[Slice] = []
    runs: list[
        tuple[RouteLayer, int, float]
    ] = []  # the first step, how many layers, and the scale of the stream in them
    for step, carried in zip(route, accumulate((step.scale for step in route), mul), strict=True):
        if runs and step == RouteLayer(runs[-1][0].model, runs[-1][0].layer + runs[-1][1]):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1, carried)
        else:
            runs.append((step, 1, carried))
    for first, length, carried in runs:
        source = Source(first.model, (first.layer, first.layer + length), _folded(fold, carried))
        slices.append(Slice((source,)))
    used = [name for name in recipes if any(step.model == name for step in route)]
    return Recipe(
        "passthrough",
        tuple(slices),
        seed=seed,
        steps=tuple(step for name in used for step in recipes[name].as_steps(name)),
    )


def _folded(fold: Fold | None, carried: float) -> Mapping[str, Any]:
    """The settings of layers that work on the stream divided by `carried`."""
    if fold is None or carried == 1:
        return {}
    reads = [{"filter": part, "value": carried} for part in fold.reads]
    adds = [{"filter": part, "value": 1 / carried} for part in fold.writes]
    about = (
        [{"filter": part, "value": fold.neutral} for part in fold.writes] if fold.neutral else []
    )
    return {"scale": [*reads, *adds, {"value": 1.0}]} | (
        {"about": [*about, {"value": 0.0}]} if about else {}
    )


def recipe_route(recipe: Recipe, fold: Fold | None) -> list[RouteLayer]:
    """The route that `route_recipe` wrote as `recipe`. Raises RecipeError for any other recipe."""
    beside = [f"`{part}`" for part in ("modules", "parameters") if getattr(recipe, part)]
    if recipe.merge_method != "passthrough" or beside:
        got = recipe.merge_method if recipe.merge_method != "passthrough" else " and ".join(beside)
        raise RecipeError(f"expected layers of one model, passed through, got {got}")
    route: list[RouteLayer] = []
    before = 1.0
    for i, piece in enumerate(recipe.slices):
        (source, *others), where = piece.sources, f"slices[{i}]"
        if others or source.layer_range is None:
            raise RecipeError(
                f"{where}: expected layers of one model, got all of {source.model}, or of several models"
            )
        carried = _carried(source.parameters, fold)
        if dict(source.parameters) != _folded(fold, carried) or piece.parameters:
            raise RecipeError(
                f"{where}: {source.model}: expected scales that a route folds into its layers, got others"
            )
        first, end = source.layer_range
        route += [
            RouteLayer(source.model, first, carried / before),
            *(RouteLayer(source.model, layer) for layer in range(first + 1, end)),
        ]
        before = carried
    return route


def _carried(parameters: Mapping[str, Any], fold: Fold | None) -> float:
    """The scale of the stream that layers with these settings work on."""
    scales = parameters.get("scale")
    if fold is None or not isinstance(scales, (list, tuple)):
        return 1.0
    divided = [
        entry.get("value")
        for entry in scales
        if isinstance(entry, Mapping) and entry.get("filter") == fold.writes[0]
    ]
    return 1 / divided[0] if divided and isinstance(divided[0], float) and divided[0] > 0 else 1.0
