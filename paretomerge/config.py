"""study.yaml -> the objects that it names. Unknown keys are refused, with the nearest known one."""

import inspect
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from paretomerge.checkpoint.reader import Checkpoint
from paretomerge.errors import ConfigError, unknown
from paretomerge.evaluate.evaluator import All, Evaluator, Objective, Sparsity
from paretomerge.evaluate.function import FunctionEvaluator
from paretomerge.evaluate.harness import HarnessEvaluator, HarnessTask
from paretomerge.space.weights import Dial, WeightSpace, named_sources
from paretomerge.study.study import Study


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DialConfig(_Strict):
    """How finely weights or densities are split."""

    bounds: tuple[float, float]
    layer_groups: int = Field(default=1, ge=1)
    roles: bool = False


class SpaceConfig(_Strict):
    """What the search may vary."""

    methods: list[str] = Field(default=["task_arithmetic", "ties", "dare_ties"], min_length=1)
    weight: DialConfig = DialConfig(bounds=(0.0, 1.5))
    density: DialConfig = DialConfig(bounds=(0.1, 1.0))


class ObjectiveConfig(_Strict):
    """One of `task`, `function` and `sparsity`. `direction` overrides what the task says of itself."""

    task: str | None = None
    metric: str | None = None
    function: str | None = None
    sparsity: bool = False
    name: str | None = None
    direction: str | None = Field(default=None, pattern="^(maximize|minimize)$")

    @model_validator(mode="after")
    def _one_kind(self) -> "ObjectiveConfig":
        kinds = [self.task is not None, self.function is not None, self.sparsity]
        if sum(kinds) != 1:
            raise ValueError("expected one of `task`, `function` and `sparsity: true`")
        return self

    @property
    def title(self) -> str:
        if self.name:
            return self.name
        return self.task or ("sparsity" if self.sparsity else str(self.function).partition(":")[2])


class EvaluateConfig(_Strict):
    """How lm-evaluation-harness runs."""

    include_path: str | None = None
    data_root: str | None = None
    splits: dict[str, str] | None = None
    search_items: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=16, ge=1)

    @model_validator(mode="after")
    def _both_splits(self) -> "EvaluateConfig":
        if self.splits is not None and set(self.splits) != {"search", "held_out"}:
            raise ValueError(f"splits: expected `search` and `held_out`, got {', '.join(self.splits)}")
        return self


class StudyConfig(_Strict):
    """A whole study.yaml. Paths start from the file's folder."""

    base: str
    models: list[str] = Field(min_length=2)
    space: SpaceConfig = SpaceConfig()
    objectives: list[ObjectiveConfig] = Field(min_length=1)
    watch: list[str] = []
    evaluate: EvaluateConfig = EvaluateConfig()
    sampler: dict[str, Any] = {"name": "MMMOSampler"}
    trials: int = Field(default=60, ge=1)
    seed: int = 0
    out: str | None = None
    storage: str | None = None
    dtype: str | None = Field(default=None, pattern="^(float32|float16|bfloat16)$")
    device: str = "cpu"
    threads: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _distinct_names(self) -> "StudyConfig":
        titles = [o.title for o in self.objectives] + self.watch
        double = sorted({t for t in titles if titles.count(t) > 1})
        if double:
            raise ValueError(f"objectives and watch: expected different names, got {double[0]!r} twice; set `name`")
        return self


def load_config(path: str | Path) -> StudyConfig:
    """Read and check a study.yaml."""
    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: expected a study.yaml, got no such file") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: expected YAML, got {error}") from error
    try:
        return StudyConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{path}: " + "; ".join(_told(e) for e in error.errors())) from error


def load_study(path: str | Path) -> tuple[Study, StudyConfig]:
    """The study that a study.yaml describes, with the file's content; nothing is merged or scored yet."""
    import torch

    config = load_config(path)
    torch.set_num_threads(config.threads)
    folder = Path(path).resolve().parent
    base = _model(folder, config.base)
    space = WeightSpace(
        base,
        named_sources([_model(folder, model) for model in config.models]),
        Checkpoint(base).architecture,
        tuple(config.space.methods),
        Dial(**config.space.weight.model_dump()),
        Dial(**config.space.density.model_dump()),
        config.seed,
    )
    harness = _harness(config, folder, {o.title: HarnessTask(o.task, o.metric) for o in config.objectives if o.task})
    study = Study(
        folder / (config.out or f"runs/{Path(path).stem}"),
        space,
        All(tuple(_evaluators(config, folder, harness))),
        _objectives(config, harness),
        make_sampler(config, space),
        watched=_harness(config, folder, {name: HarnessTask(name) for name in config.watch}),
        storage=config.storage,
        identity=config.model_dump(mode="json", exclude={"trials", "threads", "out", "storage", "watch", "device", "sampler"}),
        dtype=config.dtype,
        device=config.device,
    )
    return study, config


def make_sampler(config: StudyConfig, space: WeightSpace) -> Any:
    """`sampler: {name: ..., option: ...}`: ours, or any of Optuna's by its class name."""
    import optuna

    from paretomerge.search.mmmo import MMMOSampler

    options = dict(config.sampler)
    name = options.pop("name", None)
    known = {n: getattr(optuna.samplers, n) for n in optuna.samplers.__all__ if n.endswith("Sampler") and n != "BaseSampler"}
    known["MMMOSampler"] = MMMOSampler
    if name not in known:
        raise ConfigError(f"sampler: {unknown('name', name, known)}")
    if name == "CmaEsSampler" and len(config.objectives) > 1:
        raise ConfigError("sampler: CmaEsSampler takes one objective; choose NSGAIISampler or MMMOSampler for several")
    defaults: dict[str, Any] = {"seed": config.seed}
    if name == "MMMOSampler":
        starts = len(space.starts())
        defaults |= {"space": space.distributions, "conditions": space.conditions}
        defaults |= {"n_startup": starts + 2, "reference_trials": len(space.sources)}
    accepted = inspect.signature(known[name].__init__).parameters
    for option in options:
        if option not in accepted:
            raise ConfigError(f"sampler: {unknown(f'option of {name}', option, set(accepted) - {'self'})}")
    return known[name](**{k: v for k, v in defaults.items() if k in accepted} | options)


def _harness(config: StudyConfig, folder: Path, tasks: dict[str, HarnessTask]) -> HarnessEvaluator | None:
    if not tasks:
        return None
    settings = config.evaluate
    return HarnessEvaluator(
        tasks,
        include_path=folder / settings.include_path if settings.include_path else None,
        data_root=(folder / settings.data_root).resolve() if settings.data_root else folder,
        splits=settings.splits,
        search_items=settings.search_items,
        batch_size=settings.batch_size,
        seed=config.seed,
    )


def _evaluators(config: StudyConfig, folder: Path, harness: HarnessEvaluator | None) -> list[Evaluator]:
    parts: list[Evaluator] = [harness] if harness else []
    parts += [FunctionEvaluator.load(o.title, o.function, folder) for o in config.objectives if o.function]
    return parts + ([Sparsity()] if any(o.sparsity for o in config.objectives) else [])


def _objectives(config: StudyConfig, harness: HarnessEvaluator | None) -> list[Objective]:
    told = harness.directions() if harness else {}
    return [Objective(o.title, told.get(o.title, True) if o.direction is None else o.direction == "maximize") for o in config.objectives]


def _model(folder: Path, model: str) -> str:
    """A local path is made absolute; anything else is a Hub name."""
    return str((folder / model).resolve()) if (folder / model).exists() or model.startswith(".") else model


def _told(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        fields: Any = StudyConfig.model_fields
        for part in error["loc"][:-1]:
            kind = fields[part].annotation if isinstance(part, str) and part in fields else None
            kind = ObjectiveConfig if part == "objectives" else kind
            fields = getattr(kind, "model_fields", fields)
        return f"{'.'.join(str(p) for p in error['loc'][:-1]) or 'study'}: {unknown('key', error['loc'][-1], fields)}"
    got = "" if error["type"] == "missing" else f", got {error['input']!r}"
    return f"{where or 'study'}: {error['msg'].removeprefix('Value error, ')}{got if len(got) < 100 else ''}"
