"""Check the models of a study before anything is merged."""

from collections.abc import Mapping
from pathlib import Path

from paretomerge.errors import CheckpointError, ErrorCollector
from paretomerge.evaluate.model_kind import ModelKind
from paretomerge.merging.engine import usable_device
from paretomerge.merging.live.model_class import (
    load_tokenizer,
    model_class,
    read_config,
)
from paretomerge.merging.live.routed import check_routable
from paretomerge.merging.plan.make import make_plan, open_weights
from paretomerge.merging.plan.plan import Plan, Weights
from paretomerge.space.space import SearchSpace
from paretomerge.study.placement import Placement
from paretomerge.types import Params


def check_models(space: SearchSpace, placement: Placement) -> list[str]:
    """Check the device, and that the models can be merged, from their headers alone.

    Args:
        space: The space, whose baselines are planned.
        placement: The device, and what all merges have in common.

    Returns:
        Notes on what does not fit, such as tensors that a model lacks, and what becomes of it.

    Raises:
        ParetoMergeError: The device is not there, or models are missing, cannot be read, or do not
            belong together. All problems are reported at once.
    """
    errors = ErrorCollector()
    with errors.collect():
        usable_device(placement.device)
    weights: Mapping[str, Weights] = {}
    with errors.collect():
        models = (space.base, *space.sources.values())
        weights = open_weights(models, download=False)
    if weights:
        with errors.collect():
            _check_loadable(weights[_template(space)].folder)
    # Every baseline is planned as the merge would plan it, so the check and the merge agree.
    baselines: Mapping[str, Params] = {}
    with errors.collect():
        baselines = space.baselines() if weights else {}
    notes: dict[str, None] = {}
    for params in baselines.values():
        with errors.collect():
            plan = make_plan(
                placement.apply(space.recipe(params)),
                weights,
                download=False,
                allow_mismatch=placement.allow_mismatch,
            )
            # The plans of all baselines have the same notes on the models.
            notes.update(dict.fromkeys(plan.notes))
    errors.raise_if_any()
    return list(notes)


def check_routes(space: SearchSpace) -> None:
    """Check that routes through the layers of a space's sources can be loaded in memory.

    Args:
        space: A space of routes, or the first level before one.

    Raises:
        CheckpointError: The architecture does not allow it.
    """
    first = next(iter(space.sources.values()))
    opened = open_weights((first,), download=False)
    check_routable(opened[first])


def _template(space: SearchSpace) -> str:
    """The model that the live model is loaded as."""
    return next(iter(space.sources.values())) if space.routed else space.base


def _check_loadable(folder: Path) -> None:
    """Raise CheckpointError if transformers has no class for a model, or cannot read it."""
    errors = ErrorCollector()
    writes_text = False
    with errors.collect():
        writes_text = model_class(read_config(folder)).can_generate()
    with errors.collect():
        # Image classifiers have none. From a model that writes text it is missing.
        if load_tokenizer(folder) is None and writes_text:
            raise CheckpointError(
                f"{folder}: has no tokenizer, which a model that writes text needs; copy the "
                "files of the tokenizer, such as tokenizer.json, into the folder"
            )
    errors.raise_if_any()


def model_kind(space: SearchSpace) -> ModelKind:
    """Read from a config what the merges of a space can do.

    Args:
        space: The space.

    Returns:
        What its merges can do.

    Raises:
        CheckpointError: transformers does not know such a model.
    """
    template = _template(space)
    weights = open_weights((template,), download=False)
    config = read_config(weights[template].folder)
    return ModelKind.of(model_class(config), config)


def plan_first_baseline(space: SearchSpace, placement: Placement) -> Plan:
    """Plan one merge of a space, for what all its merges have in common.

    Args:
        space: The space.
        placement: What all merges have in common.

    Returns:
        The plan of the first baseline, from headers alone.

    Raises:
        ParetoMergeError: The models cannot be read or merged.
    """
    params = next(iter(space.baselines().values()))
    recipe = placement.apply(space.recipe(params))
    return make_plan(recipe, download=False, allow_mismatch=placement.allow_mismatch)
