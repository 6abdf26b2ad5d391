"""The statistics that a recipe's method needs, checked against the models of the recipe."""

from collections.abc import Mapping, Sequence

from paretomerge.checkpoint.architecture import Architecture
from paretomerge.checkpoint.digest import digest_of_weights
from paretomerge.errors import ErrorCollector, RecipeError
from paretomerge.merging.methods import Method
from paretomerge.merging.plan.parameters import parameter_levels
from paretomerge.merging.plan.plan import Plan, TensorJob, Weights
from paretomerge.merging.statistics import (
    MergeStatistics,
    StatisticsFolder,
    ThroughMerge,
    open_statistics,
)
from paretomerge.recipe import Recipe

_MAX_NAMES_IN_NOTE = 3


def find_statistics(
    recipe: Recipe,
    method: Method,
    opened: Mapping[str, Weights],
    download: bool = True,
) -> MergeStatistics | None:
    """Open the statistics that a recipe's method needs.

    Args:
        recipe: The recipe.
        method: The row of its method in the table of methods.
        opened: Its models.
        download: False if the weights of models on the Hub may be missing. Their statistics are
            then checked when the merge is made.

    Returns:
        The statistics of each source; None if the method needs none.

    Raises:
        RecipeError: The recipe names no statistics, or they are of other models.
        CheckpointError: They cannot be read.
    """
    kind = method.statistics
    if kind is None:
        return None
    if recipe.calibration is None:
        raise RecipeError(
            f"{method.name}: needs statistics of the models on text; make them with `paretomerge "
            "calibrate`, and name the folder as `calibration: FOLDER`"
        )
    folder = open_statistics(recipe.calibration)
    digests: dict[str, str] = {}
    for model in recipe.models:
        digests[model] = digest_of_weights(opened[model].weight_folders)
    sources = _sources(recipe)
    by_model = {}
    problems = ErrorCollector()
    for model in sources:
        is_absent = not download and not digests[model]
        # A step has no files, and so no statistics either.
        if is_absent and opened[model].weight_folders:
            continue
        with problems.collect():
            by_model[model] = folder.of(model, digests[model], kind)
    problems.raise_if_any()
    if folder.manifest.through_merge is not None and kind == "regmean_pp":
        base = digests[recipe.base_model] if recipe.base_model else ""
        _check_same_merge(recipe, folder, folder.manifest.through_merge, base)
    return MergeStatistics(folder, by_model)


def _sources(recipe: Recipe) -> list[str]:
    """The models that are merged, without those that deltas are taken from."""
    sources = []
    for piece in recipe.all_slices():
        base = piece.base_model or recipe.base_model
        sources += [source.model for source in piece.sources if source.model != base]
    return list(dict.fromkeys(sources))


def _check_same_merge(
    recipe: Recipe,
    folder: StatisticsFolder,
    merge: ThroughMerge,
    base: str,
) -> None:
    """Check that statistics came through the layers of such a merge."""
    where = f"calibration: {folder.folder}"
    cure = "make them again with `paretomerge calibrate --through-merge`"
    if base != merge.base:
        raise RecipeError(
            f"{where}: the statistics came through a merge over another base; {cure}"
        )
    for level in parameter_levels(recipe):
        alpha = level.parameters.get("alpha", merge.alpha)
        if alpha != merge.alpha:
            raise RecipeError(
                f"{level.where}: alpha: the statistics came through a merge with alpha "
                f"{merge.alpha:g}, not {alpha}; leave it out, or {cure} --alpha {alpha}"
            )


def check_statistics(plan: Plan) -> list[str]:
    """Check that statistics fit the tensors of a plan.

    Args:
        plan: A plan of a method that needs statistics.

    Returns:
        Notes on matrices of layers that have no statistics.

    Raises:
        RecipeError: Some of the sources have a statistic of a tensor and others have none, or it
            has another shape.
    """
    problems = ErrorCollector()
    without = []
    n_with = 0
    for job in plan.jobs:
        if job.copy:
            continue
        found = [plan.statistic(ref) is not None for ref in job.sources]
        if all(found):
            n_with += 1
            with problems.collect():
                _check_shapes(plan, job)
        elif any(found):
            ref = job.sources[found.index(False)]
            with problems.collect():
                raise RecipeError(
                    f"{job.name}: the statistics have {ref.name} of other sources, but not of "
                    f"{ref.model}; make them again with `paretomerge calibrate`, with all models "
                    "in one format"
                )
        elif is_layer_matrix(plan.template.architecture, job.name, job.shape):
            without.append(job.name)
    problems.raise_if_any()
    if not n_with:
        assert plan.statistics is not None
        raise RecipeError(
            f"calibration: {plan.statistics.folder.folder} has statistics of none of the tensors "
            "that are merged; make them again with `paretomerge calibrate`"
        )
    return [f"{plan.method.name}: {averaged_text(without)}"] if without else []


def is_layer_matrix(
    architecture: Architecture, name: str, shape: Sequence[int]
) -> bool:
    """Whether a tensor is a matrix inside of a layer, which a user expects to have a statistic.

    Args:
        architecture: The architecture of its model.
        name: The tensor.
        shape: Its shape.
    """
    is_in_layer = architecture.layer(name) is not None
    # Layers of the other parts of a model have roles, too.
    return len(shape) >= 2 and (is_in_layer or architecture.role(name) != "other")


def averaged_text(without: Sequence[str]) -> str:
    """Say that matrices have no statistics.

    Args:
        without: Their names, one or more.
    """
    listed = ", ".join(without[:_MAX_NAMES_IN_NOTE])
    if without[_MAX_NAMES_IN_NOTE:]:
        listed += ", ..."
    return f"{len(without)} matrices of layers have no statistics and are averaged: {listed}"


def _check_shapes(plan: Plan, job: TensorJob) -> None:
    """Check the shape of every statistic of a tensor."""
    for ref in job.sources:
        statistic = plan.statistic(ref)
        assert statistic is not None
        shape = tuple(statistic.operand.shape)
        expected = job.shape
        if plan.method.statistics != "fisher":
            inputs = job.shape[0 if statistic.of_rows else -1]
            expected = (inputs, inputs)
        if shape == expected:
            continue
        cure = "make them again with `paretomerge calibrate`"
        if plan.vocabulary is not None:
            cure = "they do not work with a merged vocabulary"
        raise RecipeError(
            f"{job.name}: the statistics of {ref.model} have the shape {list(shape)}, expected "
            f"{list(expected)}; {cure}"
        )
