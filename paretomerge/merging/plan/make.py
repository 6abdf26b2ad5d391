"""From a recipe to a plan: all meaning checked against headers before a weight is read, and every error told at once."""

from collections.abc import Mapping, Sequence

from paretomerge.checkpoint.adapter import AdaptedCheckpoint
from paretomerge.checkpoint.reader import Checkpoint
from paretomerge.checkpoint.reference import Reference
from paretomerge.errors import ErrorCollector, RecipeError, unknown_name
from paretomerge.merging.methods import METHODS
from paretomerge.merging.plan.layout import Layout, needed
from paretomerge.merging.plan.parameters import check_names
from paretomerge.merging.plan.plan import Plan, Weights
from paretomerge.recipe import Recipe


def open_weights(
    models: Sequence[str],
    already: Mapping[str, Weights] | None = None,
    allow_nan: bool = False,
    download: bool = True,
) -> dict[str, Weights]:
    """Open each model that is not open `already`; all that fail are told at once. See `Checkpoint` for the last two."""
    opened: dict[str, Weights] = {}
    problems = ErrorCollector()
    for model in models:
        with problems.collect():
            opened[model] = (
                already[model]
                if already and model in already
                else _open(model, allow_nan, download)
            )
    problems.raise_if_any()
    return opened


def _open(model: str, allow_nan: bool, download: bool) -> Weights:
    reference = Reference.parse(model)
    checkpoint = Checkpoint(reference.model, allow_nan, download)
    return AdaptedCheckpoint(checkpoint, reference.adapter) if reference.adapter else checkpoint


def make_plan(
    recipe: Recipe,
    weights: Mapping[str, Weights] | None = None,
    allow_nan: bool = False,
    download: bool = True,
) -> Plan:
    """Check the recipe against the table of methods and the models' headers, and lay out the work.

    weights: models that are open already, by the name that the recipe uses. allow_nan, download: see `Checkpoint`.
    """
    from paretomerge.merging.plan.steps import open_steps

    problems = ErrorCollector()
    opened: dict[str, Weights] = {}
    with problems.collect():
        if recipe.merge_method not in METHODS:
            raise RecipeError(
                f"merge_method: {unknown_name('method', recipe.merge_method, METHODS)}"
            )
    method = METHODS.get(recipe.merge_method)
    notes: tuple[str, ...] = ()
    if method:
        with problems.collect():
            notes = check_names(recipe, method)
    with problems.collect():
        opened = open_steps(recipe, weights or {}, allow_nan, download)
        opened = open_weights(needed(recipe), opened, allow_nan, download)
    if problems or method is None:
        problems.raise_if_any()
        raise AssertionError("an unknown_name method was noted")
    return Layout(recipe, method, opened, notes, allow_nan).plan()
