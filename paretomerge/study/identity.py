"""What makes the trials of a study comparable: settings, and digests of the files behind them."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from paretomerge.config.calibration import CalibrationData
from paretomerge.config.convert import config_of, settings_of
from paretomerge.config.schema import StudyConfig, message_of
from paretomerge.config.settings import (
    VLLM_OPTIONS,
    Evaluation,
    SecondLevel,
    StudySettings,
)
from paretomerge.errors import ConfigError
from paretomerge.evaluate.measures import Function
from paretomerge.space.build import Pool
from paretomerge.space.sources import digest, model_path, neutral_path
from paretomerge.space.specs import LineageSpace, RouteSpace, WeightSpace
from paretomerge.study.calibration import calibration_digest
from paretomerge.study.measure_digest import measure_digest
from paretomerge.study.warm_start import Question

# How fast a score comes and when scoring stops may change; what the score means may not.
_CHANGEABLE_EVALUATION = {
    "batch_size",
    "cache",
    "time_limit",
    "race",
    "selection_repeats",
}
_CHANGEABLE_KEYS = (
    "trials",
    "budget",
    "threads",
    "workers",
    "out",
    "storage",
    "study_name",
    "watch",
    "device",
    "sources",
    "sampler",
    "prefer",
    "starts",
    "warm_start",
    # It decides whether a merge is made, not what comes out.
    "allow_mismatch",
)
_CHANGEABLE: dict[str, Any] = {
    **dict.fromkeys(_CHANGEABLE_KEYS, True),
    "evaluate": _CHANGEABLE_EVALUATION,
    "then": {"trials", "sampler"},
}
"""Keys that may change between two runs of a study.

They change neither what a point means nor what its scores mean.
"""


def study_identity(settings: StudySettings, pool: Pool) -> dict[str, Any]:
    """Describe what must stay as it is for new trials to be comparable with recorded ones.

    Args:
        settings: The study.
        pool: Its models.

    Returns:
        The keys of a study.yaml that may not change, and digests of files.
    """
    # A study.yaml cannot describe samplers and spaces that are the user's objects. The sampler may
    # change anyway; of a space its class and its parameters are compared.
    described = replace(
        settings,
        # The same question, however it is written.
        base=neutral_path(settings.root, settings.base),
        models=tuple(neutral_path(settings.root, model) for model in settings.models),
        tokenizer_source=_neutral_source(settings),
        calibration=_neutral_calibration(settings),
        sampler="mmmo",
        then=_without_sampler(settings.then),
        evaluation=_comparable(settings.evaluation),
    )
    own_space = {}
    if not isinstance(settings.space, WeightSpace | RouteSpace | LineageSpace):
        described = replace(described, space=WeightSpace())
        parameters = sorted(settings.space.distributions)
        own_space = {"own space": [type(settings.space).__qualname__, parameters]}
    config = config_of(described).model_dump(mode="json", exclude=_CHANGEABLE)
    statistics = {}
    if settings.calibration is not None:
        statistics["files of calibration"] = calibration_digest(settings)
    return config | own_space | _file_digests(settings, pool) | statistics


def question_of(settings: StudySettings, identity: Mapping[str, Any]) -> Question:
    """What a study's scores mean, with absolute paths of models and data.

    Args:
        settings: The study.
        identity: Its identity, of which the digests of files are used.

    Returns:
        The question, which another study may have asked, too.
    """
    # Sorted: the same models in another order give the same scores.
    models = [model_path(settings.root, model) for model in settings.models]
    pool_models = sorted(models)
    evaluation = asdict(_comparable(settings.evaluation))
    # Batch sizes, caches and races change how fast scores come, not what they mean.
    for key in _CHANGEABLE_EVALUATION:
        del evaluation[key]
    if settings.evaluation.include_path:  # other tasks name no files
        for key in ("include_path", "data_root"):
            setting = getattr(settings.evaluation, key) or "."
            path = settings.root / setting
            evaluation[key] = str(path.resolve())
    file_digests = identity.get("files of scores", {})
    scores = {}
    for measure in settings.measures:
        # Its name and its direction do not change what is measured.
        neutral = replace(measure, name=measure.default_name, direction=None)
        described = asdict(neutral)
        if isinstance(measure, Function):
            described["function"] = measure.path
        # Options that nobody set are left out, so that a later version may add one.
        answer: dict[str, str | None] = {}
        for key, value in described.items():
            # Keys of generation settings mean the same in any order.
            if isinstance(value, dict):
                value = dict(sorted(value.items()))
            if value is not None:
                answer[key] = str(value)
        answer["kind"] = type(measure).__name__
        answer["files"] = file_digests.get(measure.name)
        scores[measure.name] = answer
    return Question(
        {
            "base": model_path(settings.root, settings.base),
            "models": pool_models,
            "files of base": identity.get("files of base"),
            "files of models": identity.get("files of models"),
            "items": evaluation,
            "seed": settings.seed,
            "dtype": settings.dtype,
            "tokenizer_source": settings.result_tokenizer_source,
            "chat_template": settings.chat_template,
        },
        scores,
    )


def question_of_record(identity: Mapping[str, Any], folder: Path) -> Question:
    """What the scores of an earlier study mean, from its record.

    Args:
        identity: The identity in the record.
        folder: Where its relative paths start.

    Returns:
        The question.

    Raises:
        ConfigError: This version cannot read it.
    """
    # The identity also holds digests of files, which are no keys of a study.yaml.
    content: dict[str, Any] = {}
    for key, value in identity.items():
        if key in StudyConfig.model_fields:
            content[key] = value
    try:
        config = StudyConfig.model_validate(content)
    except ValidationError as error:
        raise ConfigError(
            f"this version cannot read it: {message_of(error.errors()[0])}"
        ) from error
    return question_of(settings_of(config, folder), identity)


def _neutral_calibration(settings: StudySettings) -> str | CalibrationData | None:
    calibration = settings.calibration
    if isinstance(calibration, str):
        return neutral_path(settings.root, calibration)
    if calibration is None:
        return None
    data = {}
    for model, text in calibration.data.items():
        data[neutral_path(settings.root, model)] = text
    return replace(calibration, data=data)


def _neutral_source(settings: StudySettings) -> str | None:
    source = settings.tokenizer_source
    if source in (None, "union", "base"):
        return source
    return neutral_path(settings.root, source)


def _file_digests(settings: StudySettings, pool: Pool) -> dict[str, Any]:
    scores = {}
    for measure in settings.measures:
        files = measure_digest(settings, measure)
        if files:
            scores[measure.name] = files
    # Sorted like the models in `question_of`: their order does not change what scores mean.
    digests = [digest(model) for model in pool.sources.values()]
    return {
        "files of base": digest(pool.base),
        "files of models": sorted(digests),
        "files of scores": scores,
    }


def _comparable(evaluation: Evaluation) -> Evaluation:
    """How merges are scored, without what changes no score."""
    backend = evaluation.backend
    if isinstance(backend, Mapping) and backend["name"] == "vllm":
        options = dict(backend)
        for name in VLLM_OPTIONS:
            options.pop(name, None)
        backend = options
        # Both mean the same, and a study may go on with another interpreter.
        if options.keys() == {"name"}:
            backend = options["name"]
    return replace(_without_selection(evaluation), backend=backend)


def _without_selection(evaluation: Evaluation) -> Evaluation:
    """How merges are scored, without the number of selection examples if it changes no score."""
    # Without splits, or with equal ones, they are taken from the held-out examples.
    splits = evaluation.splits
    if splits is None or splits["search"] == splits["held_out"]:
        return evaluation
    return replace(evaluation, selection_items=None)


def _without_sampler(then: SecondLevel | None) -> SecondLevel | None:
    return replace(then, sampler=None) if then else None
