"""Convert between a study.yaml and the settings of a study, both ways."""

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from paretomerge.config.calibration import CalibrationData
from paretomerge.config.schema import (
    BudgetConfig,
    CalibrationConfig,
    ConstraintConfig,
    EvaluateConfig,
    MeasureConfig,
    ObjectiveConfig,
    StudyConfig,
    TaskConfig,
    ThenConfig,
    WatchConfig,
    messages_of,
    percentage_of,
    share,
)
from paretomerge.config.settings import (
    Budget,
    Evaluation,
    SamplerSetting,
    SecondLevel,
    StudySettings,
)
from paretomerge.config.space_schema import (
    GranularityConfig,
    RoutesConfig,
    SpaceConfig,
)
from paretomerge.config.workers import RayWorkers, as_workers
from paretomerge.errors import ConfigError
from paretomerge.evaluate.function_digest import is_importable
from paretomerge.evaluate.measures import (
    PROMPT_READERS,
    Constraint,
    Function,
    Judge,
    Measure,
    Perplexity,
    Size,
    Sparsity,
    Task,
    lower_is_better,
)
from paretomerge.pareto.preference import PreferSetting
from paretomerge.space.specs import (
    DENSITY_BOUNDS,
    WEIGHT_BOUNDS,
    LineageSpace,
    RouteSpace,
    WeightSpace,
)
from paretomerge.space.weights.layers import Grouping
from paretomerge.space.weights.layout import Granularity

# What `race: true` means. `RaceSettings` says what it costs.
DEFAULT_CONFIDENCE = 0.95


def settings_of(
    config: StudyConfig, folder: Path, name: str = "study"
) -> StudySettings:
    """Turn a study.yaml's content into settings.

    Args:
        config: The content.
        folder: Where its relative paths start.
        name: The file's name without suffix; the study's folder is `runs/<name>` by default.

    Returns:
        The settings.

    Raises:
        ConfigError: Settings contradict each other.
    """
    objectives = tuple(_objective(objective) for objective in config.objectives)
    constraints = [
        _constraint(constraint, objectives) for constraint in config.constraints
    ]
    until = None
    if config.budget.until:
        until = share(config.budget.until)
    return StudySettings(
        base=config.base,
        models=tuple(config.models),
        objectives=objectives,
        constraints=tuple(constraints),
        watch=tuple(_watched(entry) for entry in config.watch),
        space=_space(config.space),
        then=_second_level(config.then) if config.then else None,
        sampler=config.sampler,
        prefer=config.prefer,
        budget=Budget(config.trials, until, config.budget.patience),
        starts=tuple(config.starts),
        warm_start=tuple(config.warm_start),
        evaluation=_evaluation(config.evaluate),
        seed=config.seed,
        root=folder.resolve(),
        out=Path(config.out or f"runs/{name}"),
        storage_url=config.storage,
        study_name=config.study_name,
        dtype=config.dtype,
        tokenizer_source=config.tokenizer_source,
        chat_template=config.chat_template,
        allow_mismatch=config.allow_mismatch,
        device=config.device,
        sources=config.sources,
        threads=config.threads,
        workers=as_workers("workers", config.workers or 1),
        calibration=_calibration(config.calibration),
    )


def config_of(settings: StudySettings) -> StudyConfig:
    """Turn settings into a study.yaml's content.

    Args:
        settings: The settings.

    Returns:
        The content.

    Raises:
        ConfigError: A file cannot describe it: the sampler or the space is an object of the user's.
    """
    try:
        return StudyConfig(**_content(settings))
    except ValidationError as error:  # of a section; `StudyConfig` raises its own
        raise ConfigError(
            f"a study.yaml cannot describe this study: {messages_of(error)}"
        ) from error


def _content(settings: StudySettings) -> dict[str, Any]:
    # The identity of a study is made from this content (study/identity.py): a key that is added
    # here must have None as its default, or old records are refused.
    return {
        "base": settings.base,
        "models": list(settings.models),
        "space": _space_config(settings.space),
        "objectives": [_objective_config(measure) for measure in settings.objectives],
        "constraints": [
            _constraint_config(constraint, settings)
            for constraint in settings.constraints
        ],
        "watch": [_watch_config(measure) for measure in settings.watch],
        "starts": list(settings.starts),
        "warm_start": list(settings.warm_start),
        "evaluate": _evaluate_config(settings.evaluation),
        "sampler": _sampler_config(settings.sampler),
        "prefer": _prefer_config(settings.prefer),
        "trials": settings.budget.trials,
        "budget": _budget_config(settings.budget),
        "then": _then_config(settings.then) if settings.then else None,
        "seed": settings.seed,
        "out": str(settings.out),
        "storage": settings.storage_url,
        "study_name": settings.study_name,
        "dtype": settings.dtype,
        "tokenizer_source": settings.tokenizer_source,
        "chat_template": settings.chat_template,
        "allow_mismatch": settings.allow_mismatch,
        "device": settings.device,
        "sources": settings.sources,
        "threads": settings.threads or 1,
        "workers": _workers_config(settings.workers),
        "calibration": _calibration_config(settings.calibration),
    }


def _calibration(
    config: str | CalibrationConfig | None,
) -> str | CalibrationData | None:
    if isinstance(config, CalibrationConfig):
        return CalibrationData(**config.model_dump())
    return config


def _calibration_config(
    calibration: str | CalibrationData | None,
) -> str | CalibrationConfig | None:
    if isinstance(calibration, CalibrationData):
        return CalibrationConfig(**calibration.to_dict())
    return calibration


def _workers_config(workers: int | RayWorkers) -> int | dict[str, Any] | None:
    if isinstance(workers, RayWorkers):
        options = {}
        for field in fields(workers):
            value = getattr(workers, field.name)
            if value != field.default:
                options[field.name] = value
        return {"ray": options}
    return None if workers == 1 else workers


def check_functions(settings: StudySettings) -> None:
    """Check that a file can name the study's functions.

    Args:
        settings: The settings.

    Raises:
        ConfigError: A function is not in a module, or not at its top level.
    """
    for measure in settings.measures:
        if not isinstance(measure, Function) or not callable(measure.function):
            continue
        if not is_importable(measure.function):
            raise ConfigError(
                f"{measure.name}: a study.yaml cannot name the function {measure.path!r}. "
                "Move it to the top level of a module beside the file."
            )


def _objective(config: ObjectiveConfig) -> Measure:
    return replace(_measure(config), direction=config.direction)


def _measure(config: MeasureConfig) -> Measure:
    name = config.name or ""  # an empty name becomes the measure's default
    if config.task is not None:
        return _task(config.task, config, name)
    if config.function is not None:
        return Function(config.function, name)
    if config.perplexity is not None:
        return Perplexity(config.perplexity, config.metric or "perplexity", name)  # type: ignore[arg-type]
    if config.judge is not None:
        return Judge(**config.judge.model_dump(), name=config.name or "judge")
    if config.size is not None:
        return Size(config.size, name)
    return Sparsity(config.name or "sparsity")


def _task(task: str, config: TaskConfig, name: str) -> Task:
    prompts = {key: getattr(config, key) for key in PROMPT_READERS}
    return Task(task, config.metric, name, search_items=config.search_items, **prompts)


def _watched(config: str | WatchConfig) -> Measure:
    return Task(config) if isinstance(config, str) else _measure(config)


def _constraint(
    config: ConstraintConfig, objectives: tuple[Measure, ...]
) -> Constraint:
    """Read a bound. Without a name, it is on the objective with the same measure, if any."""
    measure = _measure(config)
    if config.name is None:
        for objective in objectives:
            # The same measure under another name: score it once, under the objective's name.
            if replace(objective, name=measure.name, direction=None) == measure:
                measure = replace(objective, direction=None)
                break
    return Constraint(measure, at_least=config.at_least, at_most=config.at_most)


def _space(config: SpaceConfig) -> WeightSpace | RouteSpace | LineageSpace:
    if config.lineage is not None:
        return LineageSpace()
    if config.routes is not None:
        return RouteSpace(**config.routes.model_dump())
    return WeightSpace(
        methods=config.methods,
        groups=config.groups,
        weight=config.weight.model_dump(exclude_none=True),  # type: ignore[arg-type]
        density=config.density.model_dump(exclude_none=True),  # type: ignore[arg-type]
        method_groups=config.method_groups,
        method_parameters=config.method_parameters,
        subset=config.subset,
        near_duplicates=config.near_duplicates,
        order=config.order,
        importance=config.importance,
    )


def _second_level(config: ThenConfig) -> SecondLevel:
    routes = RouteSpace(**config.routes.model_dump())
    return SecondLevel(
        routes, config.trials, config.front, config.prefer, config.sampler
    )


def _evaluation(config: EvaluateConfig) -> Evaluation:
    race: float | None = None
    if isinstance(config.race, str):
        race = share(config.race)
    elif config.race:
        race = DEFAULT_CONFIDENCE
    others = config.model_dump(exclude={"race"})
    return Evaluation(**others, race=race)


def _measure_config(measure: Measure) -> dict[str, Any]:
    config: dict[str, Any]
    match measure:
        case Task():
            keys = ("task", "metric", "search_items", *PROMPT_READERS)
            config = {key: getattr(measure, key) for key in keys}
        case Function():
            config = {"function": measure.path}
        case Perplexity():
            config = {"perplexity": str(measure.path), "metric": measure.metric}
        case Judge():
            keys = ("criteria", "base_url", "model", "max_tokens")
            judge = {key: getattr(measure, key) for key in keys}
            config = {"judge": {"prompts": str(measure.prompts), **judge}}
        case Sparsity():
            config = {"sparsity": True}
        case Size():
            config = {"size": measure.kind}
    # A default name is not written: a study has one identity, whether the name is spelt out or not.
    if measure.name != measure.default_name:
        config["name"] = measure.name
    return config


def _watch_config(measure: Measure) -> str | WatchConfig:
    if isinstance(measure, Task) and measure == Task(measure.task):
        return measure.task
    return WatchConfig(**_measure_config(measure))


def _objective_config(measure: Measure) -> ObjectiveConfig:
    direction = measure.direction
    # As with names: a default is not written. A task's own is that of its metric, which only the
    # harness knows.
    default = "minimize" if lower_is_better(measure) else "maximize"
    if direction == default and not isinstance(measure, Task):
        direction = None
    return ObjectiveConfig(**_measure_config(measure), direction=direction)


def _constraint_config(
    constraint: Constraint, settings: StudySettings
) -> ConstraintConfig:
    measure = constraint.measure
    # In a file, a bound on an objective repeats the objective's measure.
    if isinstance(measure, str):
        measure = next(one for one in settings.objectives if one.name == measure)
    return ConstraintConfig(
        **_measure_config(measure),
        at_least=constraint.at_least,
        at_most=constraint.at_most,
    )


def _space_config(space: object) -> SpaceConfig:
    if isinstance(space, LineageSpace):
        return SpaceConfig(lineage=True)
    if isinstance(space, RouteSpace):
        return SpaceConfig(routes=_routes_config(space))
    if not isinstance(space, WeightSpace):
        raise ConfigError(
            f"space: a study.yaml cannot describe a {type(space).__name__}"
        )
    return SpaceConfig(
        methods=list(space.methods),
        weight=_granularity_config(space.weight, WEIGHT_BOUNDS),
        density=_granularity_config(space.density, DENSITY_BOUNDS),
        method_groups=_groups_config(space.method_groups),
        method_parameters=dict(space.method_parameters),
        subset=space.subset,
        near_duplicates=space.near_duplicates,
        order=space.order,
        importance=space.importance,
    )


def _granularity_config(
    granularity: Granularity, default_bounds: tuple[float, float]
) -> GranularityConfig:
    settings: dict[str, Any] = {
        "groups": _groups_config(granularity.groups),
        "roles": granularity.roles,
        "smooth": granularity.smooth,
    }
    # The defaults of weights and densities differ, so the schema has none: None means the default.
    if granularity.bounds != default_bounds:
        settings["bounds"] = granularity.bounds
    return GranularityConfig(**settings)


def _groups_config(grouping: Grouping) -> Any:
    if grouping.ranges:
        return [list(layers) for layers in grouping.ranges]
    if grouping.by == "profile":
        return {"by": "profile", "count": grouping.count}
    return grouping.count


def _routes_config(routes: RouteSpace) -> RoutesConfig:
    keys = ("form", "blocks", "scale", "most", "repeats", "match")
    settings = {key: getattr(routes, key) for key in keys}
    return RoutesConfig(**settings)


def _evaluate_config(evaluation: Evaluation) -> EvaluateConfig:
    keys = (
        "include_path",
        "data_root",
        "splits",
        "search_items",
        "held_out_items",
        "selection_items",
        "selection_repeats",
        "batch_size",
        "cache",
        "backend",
        "time_limit",
        *PROMPT_READERS,
    )
    config: dict[str, Any] = {}
    for key in keys:
        config[key] = getattr(evaluation, key)
    for key in ("splits", "backend", "gen_kwargs"):
        if isinstance(config[key], Mapping):
            config[key] = dict(config[key])
    if evaluation.race is not None:
        config["race"] = percentage_of(evaluation.race)
    return EvaluateConfig(**config)


def _sampler_config(sampler: SamplerSetting) -> str | dict[str, Any]:
    if isinstance(sampler, str):
        return sampler
    if isinstance(sampler, Mapping):
        return dict(sampler)
    # `study_yaml` is None on an MMMOSampler that is bound to a space, and missing on all others.
    description: dict[str, Any] | None = getattr(sampler, "study_yaml", None)
    if description is None:
        raise ConfigError(
            f"sampler: a study.yaml cannot describe this {type(sampler).__name__}; name it: "
            "`sampler={'name': ..., option: ...}`"
        )
    return description


def _prefer_config(prefer: PreferSetting | None) -> str | dict[str, float] | None:
    return dict(prefer) if isinstance(prefer, Mapping) else prefer


def _budget_config(budget: Budget) -> BudgetConfig:
    until = None
    if budget.until is not None:
        until = percentage_of(budget.until)
    return BudgetConfig(until=until, patience=budget.patience)


def _then_config(then: SecondLevel) -> ThenConfig:
    sampler = None
    if then.sampler is not None:
        sampler = _sampler_config(then.sampler)
    return ThenConfig(
        routes=_routes_config(then.routes),
        trials=then.trials,
        front=then.front,
        prefer=dict(then.prefer) if then.prefer else None,
        sampler=sampler,
    )
