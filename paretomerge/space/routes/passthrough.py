"""Routes through the layers of several models, written as passthrough recipes and read back.

A route is a point of data-flow space (Akiba et al. 2024, arXiv 2403.13187, sec. 3.2): which layer
of which model comes next, and by what scale the residual stream is multiplied on its way there. As
a recipe it is a frankenmerge: slices of layers, stacked by mergekit's `passthrough` method. Scales
are folded into the weights, so that the result is a plain checkpoint (see
`paretomerge.checkpoint.fold`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from paretomerge.checkpoint.fold import Fold
from paretomerge.errors import RecipeError
from paretomerge.recipe import ParameterSetting, Recipe, Slice, Source


@dataclass(frozen=True)
class RouteLayer:
    """One layer of a route.

    Attributes:
        model: The model that the layer is taken from.
        layer: The layer's number in that model, from 0.
        scale: What the residual stream is multiplied by on its way from the layer before; above 0.
    """

    model: str
    layer: int
    scale: float = 1.0


Route = Sequence[RouteLayer]
"""The layers of a merged model, in order."""


@dataclass
class _Run:
    """Consecutive layers of one model at one scale, which become one slice.

    Attributes:
        model: The model.
        first: The first layer.
        end: The layer after the last one.
        stream_scale: The product of all scales up to here.
    """

    model: str
    first: int
    end: int
    stream_scale: float

    def continues_with(self, step: RouteLayer) -> bool:
        """Whether a layer can be the next one of this run."""
        is_next_layer = (step.model, step.layer) == (self.model, self.end)
        return is_next_layer and step.scale == 1


def route_to_recipe(
    route: Route,
    fold: Fold | None,
    seed: int = 0,
    recipes: Mapping[str, Recipe] = MappingProxyType({}),
) -> Recipe:
    """Write a route as a passthrough recipe, with the scales folded into the layers' weights.

    As in mergekit, the embedding is that of the first layer's model, and the final norm and the LM
    head are those of the last layer's model.

    Args:
        route: The layers, in order. The scale into the first one must be 1.
        fold: Which weights of a layer write to the residual stream; None if all scales are 1.
        seed: The seed of the recipe.
        recipes: Recipes of those models that are merges themselves, by the names in the route.

    Returns:
        The recipe, with the merges that it uses as steps.

    Raises:
        RecipeError: If the route is empty or a scale cannot be folded.
    """
    _check_scales(route, fold)
    slices = []
    for run in _runs(route):
        parameters = _fold_parameters(fold, run.stream_scale)
        source = Source(
            model=run.model,
            layer_range=(run.first, run.end),
            parameters=parameters,
        )
        slices.append(Slice((source,)))
    models = {step.model for step in route}
    steps: list[Recipe] = []
    for name, recipe in recipes.items():
        if name in models:
            steps += recipe.as_steps(name)
    return Recipe(
        merge_method="passthrough",
        slices=tuple(slices),
        seed=seed,
        steps=tuple(steps),
    )


def recipe_to_route(recipe: Recipe, fold: Fold | None) -> list[RouteLayer]:
    """Read back the route of a recipe that `route_to_recipe` has written.

    Args:
        recipe: The recipe.
        fold: The fold that it was written with.

    Returns:
        The layers, in order.

    Raises:
        RecipeError: If the recipe is not one that `route_to_recipe` writes.
    """
    _check_is_passthrough(recipe)
    route: list[RouteLayer] = []
    previous_scale = 1.0
    for i, piece in enumerate(recipe.slices):
        source, *others = piece.sources
        if others or source.layer_range is None:
            raise RecipeError(
                f"slices[{i}]: expected layers of one model, got all of {source.model}, or of "
                "several models"
            )
        stream_scale = _stream_scale(source.parameters, fold)
        # Writing the scale that was read must give the same parameters.
        folded = _fold_parameters(fold, stream_scale)
        is_folded = dict(source.parameters) == folded
        if piece.parameters or not is_folded:
            raise RecipeError(
                f"slices[{i}]: {source.model}: expected scales that a route folds into its layers, "
                "got others"
            )
        first, end = source.layer_range
        # Only the scale of the whole stream is written, so that into the slice is a quotient.
        scale = stream_scale / previous_scale
        route.append(RouteLayer(source.model, first, scale))
        for layer in range(first + 1, end):
            route.append(RouteLayer(source.model, layer))
        previous_scale = stream_scale
    return route


def _check_scales(route: Route, fold: Fold | None) -> None:
    """Raise RecipeError for an empty route and for scales that cannot be folded."""
    if not route:
        raise RecipeError("route: expected one layer or more, got none")
    for step in route:
        if not 0 < step.scale < math.inf:
            raise RecipeError(
                f"route: expected scales above 0, got {step.scale} into layer {step.layer} of "
                f"{step.model}"
            )
    # No layer before the first one could take up its scale. And the stream is smallest there, so
    # the epsilon of the norms would make the fold inexact.
    if route[0].scale != 1:
        raise RecipeError(
            f"route: expected a scale of 1 into the first layer, got {route[0].scale}"
        )
    is_scaled = any(step.scale != 1 for step in route)
    if fold is None and is_scaled:
        raise RecipeError(
            "route: expected scales of 1, because this family of models has no fold, got others"
        )


def _runs(route: Route) -> list[_Run]:
    """The route as runs of consecutive layers."""
    runs: list[_Run] = []
    stream_scale = 1.0
    for step in route:
        if runs and runs[-1].continues_with(step):
            runs[-1].end += 1
            continue
        stream_scale *= step.scale
        run = _Run(
            model=step.model,
            first=step.layer,
            end=step.layer + 1,
            stream_scale=stream_scale,
        )
        runs.append(run)
    return runs


def _fold_parameters(
    fold: Fold | None, stream_scale: float
) -> dict[str, ParameterSetting]:
    """Parameters of `passthrough` for layers whose stream is divided by `stream_scale`."""
    if fold is None or stream_scale == 1:
        return {}
    # A layer adds f to the stream h. In a model that carries h / S, it has to add f / S. Where no
    # norm at its entrance cancels S, what the layer reads is multiplied by S.
    scale = [{"filter": part, "value": stream_scale} for part in fold.reads]
    scale += [{"filter": part, "value": 1 / stream_scale} for part in fold.writes]
    # The last entry, without a filter, leaves all other tensors as they are.
    others: dict[str, ParameterSetting] = {"value": 1.0}
    parameters: dict[str, ParameterSetting] = {"scale": [*scale, others]}
    # Gemma's norms multiply by 1 + weight: there the weight that adds nothing is -1, not 0.
    if fold.neutral:
        about = [{"filter": part, "value": fold.neutral} for part in fold.writes]
        parameters["about"] = [*about, {"value": 0.0}]
    return parameters


def _stream_scale(
    parameters: Mapping[str, ParameterSetting], fold: Fold | None
) -> float:
    """The scale that parameters were folded from; 1 if they are of another form."""
    conditionals = parameters.get("scale")
    if fold is None or not isinstance(conditionals, (list, tuple)):
        return 1.0
    for entry in conditionals:
        if not isinstance(entry, Mapping):
            continue
        if entry.get("filter") != fold.writes[0]:
            continue
        factor = entry.get("value")
        if isinstance(factor, float) and factor > 0:
            return 1 / factor
        return 1.0
    return 1.0


def _check_is_passthrough(recipe: Recipe) -> None:
    """Raise RecipeError for recipes of other methods, or with parts that no route has."""
    unexpected = []
    if recipe.merge_method != "passthrough":
        unexpected = [recipe.merge_method]
    else:
        unexpected += ["`modules`"] if recipe.modules else []
        unexpected += ["`parameters`"] if recipe.parameters else []
    if unexpected:
        listed = " and ".join(unexpected)
        raise RecipeError(f"expected layers of one model, passed through, got {listed}")
