"""Check the models of a study before anything is merged."""

from collections.abc import Mapping
from pathlib import Path

from paretomerge.errors import CheckpointError, ErrorCollector
from paretomerge.merging.engine import usable_device
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
        Where mismatches are allowed, what does not fit and what becomes of it.

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
    # The live model begins as this one.
    template = next(iter(space.sources.values())) if space.routed else space.base
    if weights:
        with errors.collect():
            _check_loadable(template, weights[template].folder)
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
            if placement.allow_mismatch:
                # The plans of all baselines have the same notes on the models.
                notes.update(dict.fromkeys(plan.notes))
    errors.raise_if_any()
    return list(notes)


def _check_loadable(model: str, folder: Path) -> None:
    """Raise CheckpointError if transformers cannot load a model to score it, or its tokenizer."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoTokenizer

    # Both raise many classes, with advice for developers in further lines.
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise CheckpointError(
            f"{model}: transformers cannot read its config: {_first_line(error)}"
        ) from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise CheckpointError(
            f"{model}: transformers has no causal language model of the type "
            f"{config.model_type!r}, so its merges cannot be scored"
        )
    try:
        AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise CheckpointError(
            f"{model}: its tokenizer cannot be loaded ({_first_line(error)}); copy the files of "
            f"the tokenizer, such as tokenizer.json, into {folder}"
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".: ") if lines else type(error).__name__


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
