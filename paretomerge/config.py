"""study.yaml -> the objects that it names. Unknown keys are refused, with the nearest known one."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from optuna.samplers import BaseSampler
from pydantic import Field, ValidationError, field_validator, model_validator

from paretomerge.checkpoint.reader import Checkpoint
from paretomerge.checkpoint.reference import is_folder
from paretomerge.errors import ConfigError, shown, unknown
from paretomerge.evaluate.evaluator import All, Evaluator, Fact, Objective
from paretomerge.evaluate.function import FunctionEvaluator
from paretomerge.evaluate.harness import HarnessEvaluator, HarnessTask
from paretomerge.evaluate.speed import Speed
from paretomerge.recipe import Recipe, under
from paretomerge.schema import BudgetConfig, ConstraintConfig, EvaluateConfig, ObjectiveConfig, ThenConfig
from paretomerge.space.config import SpaceConfig, Strict, build_space, route_space
from paretomerge.space.routes import RouteSpace
from paretomerge.space.sources import digest, named_sources
from paretomerge.space.space import Space
from paretomerge.space.weights import WeightSpace
from paretomerge.study.budget import Budget
from paretomerge.study.goals import Constraint, Goals
from paretomerge.study.hierarchy import Then
from paretomerge.study.study import Placement, Study
from paretomerge.study.warm import Asked, known_points

_NOT_ASKED: Any = dict.fromkeys(
    ("trials", "budget", "threads", "out", "storage", "watch", "device", "sampler", "starts", "warm_start"), True
) | {"evaluate": {"batch_size"}, "then": {"trials", "sampler"}}
"""Keys that may change while a study goes on: they change neither what a point means nor how it is scored."""


class StudyConfig(Strict):
    """A whole study.yaml. Paths start from the file's folder."""

    base: str
    models: list[str] = Field(min_length=2)
    space: SpaceConfig = SpaceConfig()
    objectives: list[ObjectiveConfig] = Field(min_length=1)
    constraints: list[ConstraintConfig] = Field(default=[])
    watch: list[str] = Field(default=[])
    starts: list[str] = Field(default=[])
    warm_start: list[str] = Field(default=[])
    evaluate: EvaluateConfig = EvaluateConfig()
    sampler: str | dict[str, Any] = "mmmo"
    trials: int = Field(default=60, ge=1)
    budget: BudgetConfig = BudgetConfig()
    then: ThenConfig | None = None
    seed: int = 0
    out: str | None = None
    storage: str | None = None
    dtype: str | None = Field(default=None, pattern="^(float32|float16|bfloat16)$")
    device: str = "cpu"
    threads: int = Field(default=1, ge=1)

    @field_validator("starts", "warm_start", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="before")
    @classmethod
    def _trials_once(cls, data: Any) -> Any:
        """`budget: {trials: 60}` means `trials: 60`."""
        budget = data.get("budget") if isinstance(data, dict) else None
        if not isinstance(budget, dict) or budget.get("trials") is None:
            return data
        if "trials" in data:
            raise ValueError("trials: expected it once, got it at the top and under `budget`; keep one of them")
        return data | {"trials": budget["trials"], "budget": budget | {"trials": None}}

    @property
    def limit(self) -> Budget:
        """The budget as `Study.run` takes it."""
        return Budget(self.trials + (self.then.trials if self.then else 0), self.budget.share, self.budget.patience)

    @property
    def bounds(self) -> list[ConstraintConfig]:
        """The constraints; one without a name has that of the objective with the same score."""
        named = {o.model_copy(update={"name": None, "direction": None}): o.title for o in reversed(self.objectives)}
        return [c if c.name else c.model_copy(update={"name": named.get(c.scored)}) for c in self.constraints]

    @property
    def scored(self) -> list[ObjectiveConfig]:
        """Objectives, and what only constraints ask for."""
        plain = {o.model_copy(update={"name": o.title, "direction": None}) for o in self.objectives}
        return [*self.objectives, *dict.fromkeys(c.scored for c in self.bounds if c.scored not in plain)]

    @model_validator(mode="after")
    def _levels_fit(self) -> "StudyConfig":
        if self.then is None:
            return self
        if self.space.routes is not None:
            raise ValueError("then: expected a first level that merges in place, got `space.routes`; leave `then` out")
        if sparse := [o.title for o in self.scored if o.sparsity]:
            raise ValueError(f"then: expected scores that routes have, got {sparse[0]!r}, a sparsity")
        names = [o.title for o in self.objectives]
        if strange := [name for name in self.then.prefer or {} if name not in names]:
            raise ValueError(f"then.prefer: {unknown('objective', strange[0], names)}")
        return self

    @model_validator(mode="after")
    def _distinct_names(self) -> "StudyConfig":
        titles = [o.title for o in self.scored] + self.watch
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
    space = make_space(config, folder)
    files = _files(config, folder)
    harness = _harness(config, folder, {o.title: HarnessTask(o.task, o.metric) for o in config.scored if o.task})
    study = Study(
        _out(config, Path(path)),
        space,
        Goals(
            All(tuple(_evaluators(config, folder, harness))),
            tuple(_objectives(config, harness)),
            tuple(Constraint(c.title, c.at_least, c.at_most) for c in config.bounds),
            _harness(config, folder, {name: HarnessTask(name) for name in config.watch}),
        ),
        make_sampler(config, space),
        known=lambda: known_points(_asked(config, folder, files, space), config.starts, config.warm_start, _earlier, _record_of),
        storage=_storage(config, folder),
        identity=config.model_dump(mode="json", exclude=_NOT_ASKED) | files,
        placement=Placement(config.dtype, config.device),
        then=_then(config, space) if config.then else None,
    )
    study.record.note("home", str(folder))
    return study, config


def make_space(config: StudyConfig, folder: Path) -> WeightSpace | RouteSpace:
    """The space that a study.yaml in `folder` describes."""
    base, sources = study_models(config, folder)
    return build_space(config.space, base, sources, Checkpoint(base).architecture, config.seed, folder / "runs")


def study_models(config: StudyConfig, folder: Path) -> tuple[str, dict[str, str]]:
    """Base, and source's name -> model, of a study.yaml in `folder`."""
    return _model(folder, config.base), named_sources([_model(folder, model) for model in config.models])


def _files(config: StudyConfig, folder: Path) -> dict[str, Any]:
    """What the files hold that trials depend on: local models, functions beside the study.yaml, tasks of the user's own."""
    base, sources = study_models(config, folder)
    scores = {}
    for entry in config.scored:
        module = folder / (str(entry.function).partition(":")[0].replace(".", "/") + ".py")
        if entry.function and module.is_file():
            scores[entry.title] = hashlib.sha256(module.read_bytes()).hexdigest()[:16]
        elif entry.task and config.evaluate.include_path:
            scores[entry.title] = task_digest(folder / config.evaluate.include_path, entry.task)
    return {"files of base": digest(base), "files of models": sorted(map(digest, sources.values())), "files of scores": scores}


def task_digest(folder: Path, task: str) -> str:
    """Of the YAML and Python files of a folder of tasks, less those that define another task alone."""
    found = hashlib.sha256()
    for file in sorted(file for file in folder.rglob("*") if file.suffix in (".yaml", ".yml", ".py")):
        content = file.read_bytes()
        defined = re.search(rb"^task:[ \t]+([^\s#]+)", content, re.MULTILINE)
        if defined is None or defined[1].strip(b"\"'") == task.encode():
            found.update(f"{file.relative_to(folder)} {len(content)} ".encode() + content)
    return found.hexdigest()[:16]


def _asked(config: StudyConfig, folder: Path, files: Mapping[str, Any], space: Space | None = None) -> Asked:
    """What the scores of a study mean, whatever file says it: models and data by where they are, and what `_files` found."""
    scored = files.get("files of scores", {})
    items = config.evaluate.model_dump(mode="json", exclude={"batch_size"})
    if config.evaluate.include_path:  # other tasks name no files
        items |= {key: str((folder / (getattr(config.evaluate, key) or ".")).resolve()) for key in ("include_path", "data_root")}
    question = {
        "base": _model(folder, config.base),
        "models": sorted(_model(folder, model) for model in config.models),
        "files of base": files.get("files of base"),
        "files of models": files.get("files of models"),
        "items": items,
        "seed": config.seed,
        "dtype": config.dtype,
    }
    scores = {e.title: e.model_dump(mode="json", exclude={"direction", "name"}) | {"files": scored.get(e.title)} for e in config.scored}
    return Asked(folder, question, scores, lambda: space or make_space(config, folder))


def _earlier(identity: Mapping[str, Any], folder: Path) -> Asked:
    """The same of another study, from what its record kept."""
    try:
        settings = {key: value for key, value in identity.items() if key in StudyConfig.model_fields}
        return _asked(StudyConfig.model_validate(settings), folder, identity)
    except ValidationError as error:
        raise ConfigError(f"expected a study that this version reads, got {_told(error.errors()[0])}") from error


def _record_of(path: Path) -> str:
    """Where the study of a study.yaml keeps its record."""
    config = load_config(path)
    return _storage(config, path.resolve().parent) or f"sqlite:///{_out(config, path) / 'study.db'}"


def _storage(config: StudyConfig, folder: Path) -> str | None:
    """The URL, a file's path being made absolute."""
    kind, _, file = (config.storage or "").partition(":///")
    return f"{kind}:///{folder / file}" if kind == "sqlite" and file and not file.startswith(":memory:") else config.storage


def _out(config: StudyConfig, path: Path) -> Path:
    """The study's folder."""
    return path.resolve().parent / (config.out or f"runs/{path.stem}")


def _then(config: StudyConfig, space: Space) -> Then:
    """The second level; what is wrong with its settings is told before the first begins."""
    settings = config.then
    assert settings is not None

    def routes(pool: Mapping[str, Recipe]) -> Space:
        try:
            return route_space(settings.routes, space.base, space.sources, config.seed, pool)
        except ConfigError as error:
            raise ConfigError(str(error).replace("space.", "then.", 1)) from error

    def sampler(space: Space) -> BaseSampler:
        made: BaseSampler = make_sampler(config, space, settings)
        return made

    sources_alone = routes({})
    sampler(sources_alone)
    prefer = tuple(settings.prefer.get(o.title, 0.0) for o in config.objectives) if settings.prefer else None
    return Then(config.trials, routes, sampler, settings.front or Then.front, prefer, tuple(sources_alone.notes))


def make_sampler(config: StudyConfig, space: Space, then: ThenConfig | None = None) -> Any:
    """`sampler: name` or `sampler: {name: ..., option: ...}`: a preset, or any of Optuna's by its class name. then: for the second
    level, which begins with the sources and the pool, each alone.
    """
    from paretomerge.search.presets import Problem, make

    chosen = then.sampler if then and then.sampler else config.sampler
    options = {"name": chosen} if isinstance(chosen, str) else dict(chosen)
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError(f"sampler: expected a name, or `name` and options, got {shown(chosen)}")
    starts = list(space.starts().values())[: len(space.sources) if then else None]
    sources = len(config.models) if then else len(space.sources)
    problem = Problem(
        space.distributions,
        len(config.objectives),
        seed=config.seed,
        conditions=space.conditions,
        starts=len(starts),
        sources=sources,
        trials=then.trials if then else config.trials,
        start=starts[sources] if len(starts) > sources else None,
        importance=space.importance if config.space.importance and isinstance(space, WeightSpace) else {},
    )
    return make(name, problem, options)


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
    parts += [FunctionEvaluator.load(o.title, o.function, folder) for o in config.scored if o.function]
    for o in config.scored:
        if o.size == "seconds_per_token":
            parts.append(Speed(o.title))
        elif o.sparsity or o.size:
            parts.append(Fact("sparsity" if o.sparsity else str(o.size), o.title))
    return parts


def _objectives(config: StudyConfig, harness: HarnessEvaluator | None) -> list[Objective]:
    told = (harness.directions() if harness else {}) | {o.title: False for o in config.objectives if o.size}
    return [Objective(o.title, told.get(o.title, True) if o.direction is None else o.direction == "maximize") for o in config.objectives]


def _model(folder: Path, model: str) -> str:
    """Local paths, of a model and its adapter, are made absolute; anything else is a Hub name."""
    name = under(folder, model)
    parts = [name] if is_folder(name) else name.split("+")
    return "+".join(str((folder / part).resolve()) if part.startswith((".", "/")) else part for part in parts)


def _told(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        fields: Any = StudyConfig.model_fields
        for part in error["loc"][:-1]:
            kind = fields[part].annotation if isinstance(part, str) and part in fields else None
            kind = {"objectives": ObjectiveConfig, "constraints": ConstraintConfig}.get(part, kind)
            kind = next((one for one in get_args(kind) if hasattr(one, "model_fields")), kind)  # of `RoutesConfig | None`
            fields = getattr(kind, "model_fields", fields)
        return f"{'.'.join(str(p) for p in error['loc'][:-1]) or 'study'}: {unknown('key', error['loc'][-1], fields)}"
    got = "" if error["type"] == "missing" else f", got {error['input']!r}"
    return f"{where or 'study'}: {error['msg'].removeprefix('Value error, ')}{got if len(got) < 100 else ''}"
