"""From a recipe to a plan: all meaning checked against headers before a weight is read, and every error told at once."""

from collections.abc import Mapping, Sequence

from paretomerge.checkpoint.adapter import AdaptedCheckpoint
from paretomerge.checkpoint.reader import Checkpoint
from paretomerge.checkpoint.reference import Reference
from paretomerge.errors import Problems, RecipeError, unknown
from paretomerge.merge.job import Plan, Weights
from paretomerge.merge.knobs import check_names
from paretomerge.merge.layout import Layout, needed
from paretomerge.merge.methods import METHODS
from paretomerge.recipe import Recipe


def open_weights(
    models: Sequence[str], already: Mapping[str, Weights] | None = None, allow_nan: bool = False, download: bool = True
) -> dict[str, Weights]:
    """Open each model that is not open `already`; all that fail are told at once. See `Checkpoint` for the last two."""
    opened: dict[str, Weights] = {}
    problems = Problems()
    for model in models:
        with problems.noted():
            opened[model] = already[model] if already and model in already else _open(model, allow_nan, download)
    problems.settle()
    return opened


def _open(model: str, allow_nan: bool, download: bool) -> Weights:
    reference = Reference.parse(model)
    checkpoint = Checkpoint(reference.model, allow_nan, download)
    return AdaptedCheckpoint(checkpoint, reference.adapter) if reference.adapter else checkpoint


def make_plan(recipe: Recipe, weights: Mapping[str, Weights] | None = None, allow_nan: bool = False, download: bool = True) -> Plan:
    """Check the recipe against the table of methods and the models' headers, and lay out the work.

    weights: models that are open already, by the name that the recipe uses. allow_nan, download: see `Checkpoint`.
    """
    from paretomerge.merge.nested import open_steps

    problems = Problems()
    opened: dict[str, Weights] = {}
    with problems.noted():
        if recipe.merge_method not in METHODS:
            raise RecipeError(f"merge_method: {unknown('method', recipe.merge_method, METHODS)}")
    method = METHODS.get(recipe.merge_method)
    notes: tuple[str, ...] = ()
    if method:
        with problems.noted():
            notes = check_names(recipe, method)
    with problems.noted():
        opened = open_steps(recipe, weights or {}, allow_nan, download)
        opened = open_weights(needed(recipe), opened, allow_nan, download)
    if problems or method is None:
        problems.settle()
        raise AssertionError("an unknown method was noted")
    return Layout(recipe, method, opened, notes, allow_nan).plan()
