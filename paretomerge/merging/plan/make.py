"""From a recipe to a plan: everything is checked against headers before a weight is read."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from paretomerge.checkpoint.adapter import AdaptedCheckpoint
from paretomerge.checkpoint.reader import Checkpoint
from paretomerge.checkpoint.reference import Reference
from paretomerge.errors import (
    ErrorCollector,
    ParetoMergeError,
    RecipeError,
    shorten,
    unknown_name,
)
from paretomerge.merging.methods import METHODS
from paretomerge.merging.plan.calibration import find_statistics
from paretomerge.merging.plan.layout import lay_out
from paretomerge.merging.plan.one_layout import arrange_like
from paretomerge.merging.plan.opened_recipe import OpenedRecipe, models_to_open
from paretomerge.merging.plan.parameters import check_parameters
from paretomerge.merging.plan.plan import Plan, Weights
from paretomerge.merging.plan.steps import RecipeStep
from paretomerge.merging.statistics import MergeStatistics
from paretomerge.recipe import Recipe

RecipeLike = Recipe | Mapping[str, object] | str | Path
"""A recipe, or what one can be read from. See `as_recipe`."""

# A path may contain the words `merge_method`, but hardly with a colon behind them.
_YAML_TEXT = re.compile(r"\n|\bmerge_method['\"]?\s*:")


def as_recipe(recipe: RecipeLike) -> Recipe:
    """Read a recipe.

    Args:
        recipe: A `Recipe`, a mapping in mergekit's grammar, the path of a YAML file, or the YAML
            text itself.

    Returns:
        The recipe.

    Raises:
        RecipeError: If it is none of these, or an invalid recipe.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Mapping):
        return Recipe.from_dict(recipe)
    if isinstance(recipe, str) and _YAML_TEXT.search(recipe):
        return Recipe.from_yaml(recipe)
    if isinstance(recipe, str | Path) and recipe:
        return Recipe.load(recipe)
    raise RecipeError(
        "recipe: expected a Recipe, a mapping, the path of a YAML file or YAML text, "
        f"got {shorten(recipe)}"
    )


def make_plan(
    recipe: RecipeLike,
    weights: Mapping[str, Weights] | None = None,
    allow_nan: bool = False,
    download: bool = True,
    allow_mismatch: bool = False,
) -> Plan:
    """Check a recipe against its models and lay out the merge as one job per tensor.

    Only configs and headers of the checkpoints are read, no weights.

    Args:
        recipe: The merge to plan, with its steps if it has any; or what `as_recipe` reads.
        weights: Models that are open already, by the names that the recipe uses. All others are
            opened.
        allow_nan: True to merge NaN and infinite weights like others. By default they are an error
            when they are read.
        download: False to plan for models on the Hub from their headers, without their weights.
            Such a plan cannot be carried out.
        allow_mismatch: True to merge models that do not seem to belong together: what a source
            lacks is taken from the base, and what the base has no place for is left out.

    Returns:
        The plan: for each tensor of the result its shape, dtype, inputs and parameters; the config
        of the result; notes on parts of the recipe that have no effect.

    Raises:
        RecipeError: If the method, its parameters, layers or models do not fit together.
        CheckpointError: If a model is missing, cannot be read safely, or has tensors of other
            shapes. If several things are wrong, one error reports all of them; `error.parts` lists
            them.

    Example:
        Print what a merge will write, and what it will cost:

        >>> from paretomerge.merging.plan import estimate_cost
        >>> plan = make_plan(Recipe.load("recipe.yml"))  # doctest: +SKIP
        >>> for job in plan.jobs:  # doctest: +SKIP
        ...     print(job.name, job.shape, job.dtype)
        >>> print(estimate_cost(plan).memory, plan.notes)  # doctest: +SKIP
    """
    recipe = as_recipe(recipe)
    # All checks run, so that one error reports everything that is wrong.
    problems = ErrorCollector()
    with problems.collect():
        if not any(recipe.all_slices()):
            raise RecipeError("recipe: names no models to merge; add `models`")
    with problems.collect():
        if recipe.merge_method not in METHODS:
            message = unknown_name("method", recipe.merge_method, METHODS)
            raise RecipeError(f"merge_method: {message}")
    method = METHODS.get(recipe.merge_method)
    notes: tuple[str, ...] = ()
    if method is not None:
        with problems.collect():
            notes = check_parameters(recipe, method)
    opened: dict[str, Weights] = {}
    with problems.collect():
        opened = _open_steps(recipe, weights or {}, allow_nan, download, allow_mismatch)
        opened = open_weights(models_to_open(recipe), opened, allow_nan, download)
    problems.raise_if_any()
    # An unknown method is one of the problems.
    assert method is not None
    statistics: MergeStatistics | None = None
    with problems.collect():
        statistics = find_statistics(recipe, method, opened, download)
    with problems.collect():
        opened = _arrange_alike(recipe, opened)
    problems.raise_if_any()
    opened_recipe = OpenedRecipe(recipe, method, opened, allow_mismatch, statistics)
    return lay_out(opened_recipe, notes, allow_nan)


def _arrange_alike(recipe: Recipe, opened: Mapping[str, Weights]) -> dict[str, Weights]:
    """The opened models, all under the names of the model that the result follows."""
    template_name = recipe.base_model or recipe.models[0]
    template = opened[template_name]
    result = dict(opened)
    problems = ErrorCollector()
    for model in recipe.models:
        weights = opened[model]
        if weights is template:
            continue
        with problems.collect():
            result[model] = arrange_like(template_name, template, model, weights)
    problems.raise_if_any()
    return result


def open_weights(
    models: Sequence[str],
    already: Mapping[str, Weights] | None = None,
    allow_nan: bool = False,
    download: bool = True,
    mapped: bool = False,
) -> dict[str, Weights]:
    """Open models to merge from.

    Args:
        models: Folders or Hub names, with an optional `@revision` and an optional `+adapter`.
        already: Models that are open already; they are returned as they are.
        allow_nan: True if NaN and infinite weights are no error.
        download: False to read only the headers of models on the Hub.
        mapped: Whether their tensors are views of mapped files; see `Shards`.

    Returns:
        The opened models by name, in the order of `models`.

    Raises:
        CheckpointError: If a model cannot be opened. One error reports all such models.
    """
    already = already or {}
    opened: dict[str, Weights] = {}
    problems = ErrorCollector()
    for model in models:
        with problems.collect():
            if model in already:
                opened[model] = already[model]
            else:
                opened[model] = _open(model, allow_nan, download, mapped)
    problems.raise_if_any()
    return opened


def _open(model: str, allow_nan: bool, download: bool, mapped: bool) -> Weights:
    # `model@revision+adapter`
    reference = Reference.parse(model)
    checkpoint = Checkpoint(reference.model, allow_nan, download, mapped)
    if reference.adapter:
        return AdaptedCheckpoint(checkpoint, reference.adapter)
    return checkpoint


def _open_steps(
    recipe: Recipe,
    already: Mapping[str, Weights],
    allow_nan: bool,
    download: bool,
    allow_mismatch: bool,
) -> dict[str, Weights]:
    """Open the steps of a recipe as models. Each step can use the steps before it.

    Returns:
        The steps by name and the models that they read, besides those that are open already.

    Raises:
        ParetoMergeError: If a step cannot be planned; the message begins with the step's name.
    """
    if not recipe.steps:
        return dict(already)
    opened = open_weights(recipe.source_models, already, allow_nan, download)
    readers: Counter[str] = Counter()
    for document in (*recipe.steps, recipe):
        readers.update(document.models)
    for step in recipe.steps:
        # Steps keep the vocabulary of their base: only the result is written with a tokenizer.
        if step.tokenizer or step.tokenizer_source or step.chat_template:
            raise RecipeError(
                f"{step.name}: expected tokenizer and chat template in the last document, "
                "got them in a step; move them there"
            )
        assert step.name is not None
        # In order: a step may use the steps before it.
        try:
            plan = make_plan(step, opened, allow_nan, allow_mismatch=allow_mismatch)
        except ParetoMergeError as error:
            message = f"{step.name}: {error}"
            parts = tuple(f"{step.name}: {part}" for part in error.parts)
            raise type(error)(message, parts) from error
        opened[step.name] = RecipeStep(plan, shared=readers[step.name] > 1)
    return opened
