"""study.yaml -> the objects that it names."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optuna.samplers import BaseSampler
from pydantic import ValidationError

from paretomerge.checkpoint.reader import Checkpoint
from paretomerge.checkpoint.reference import is_folder
from paretomerge.config.schema import StudyConfig, ThenConfig, load_config, told
from paretomerge.errors import ConfigError, shorten
from paretomerge.evaluate.backend import Backend
from paretomerge.evaluate.evaluator import CombinedEvaluator, Evaluator, MergeFact, Objective
from paretomerge.evaluate.function import FunctionEvaluator
from paretomerge.evaluate.harness import HarnessEvaluator
from paretomerge.evaluate.judge import JudgeEvaluator
from paretomerge.evaluate.perplexity import PerplexityEvaluator
from paretomerge.evaluate.score_cache import ScoreCache
from paretomerge.evaluate.speed import SpeedEvaluator
from paretomerge.evaluate.tasks import HarnessTask, TaskLoader
from paretomerge.recipe import Recipe, under
from paretomerge.record.storage import Storage
from paretomerge.space.build import build_space, route_space
from paretomerge.space.routes.space import RouteSearchSpace
from paretomerge.space.sources import digest, named_sources
from paretomerge.space.space import SearchSpace
from paretomerge.space.weights.space import WeightSearchSpace
from paretomerge.study.goals import Constraint, Goals
from paretomerge.study.hierarchy import Then
from paretomerge.study.racing import Racing
from paretomerge.study.study import Placement, Study
from paretomerge.study.warm import Asked, known_points

_NEVER_ASKED = {"batch_size", "cache", "time_limit", "race"}
_NOT_ASKED: Any = dict.fromkeys(
    (
        "trials",
        "budget",
        "threads",
        "out",
        "storage",
        "study_name",
        "watch",
        "device",
        "sampler",
        "starts",
        "warm_start",
    ),
    True,
) | {"evaluate": _NEVER_ASKED, "then": {"trials", "sampler"}}
"""Keys that may change while a study goes on: they change neither what a point means nor how it is scored."""


def load_study(path: str | Path) -> tuple[Study, StudyConfig]:
    """The study that a study.yaml describes, with the file's content; nothing is merged or scored yet."""
    import torch

    config = load_config(path)
    torch.set_num_threads(config.threads)
    folder = Path(path).resolve().parent
    space = make_space(config, folder)
    files = _files(config, folder)
    harness = _harness(
        config, folder, {o.title: HarnessTask(o.task, o.metric) for o in config.scored if o.task}
    )
    study = Study(
        _out(config, Path(path)),
        space,
        Goals(
            _evaluator(config, folder, harness),
            tuple(_objectives(config, harness)),
            tuple(Constraint(c.title, c.at_least, c.at_most) for c in config.bounds),
            _harness(config, folder, {name: HarnessTask(name) for name in config.watch}, harness),
            config.evaluate.time_limit,
            _racing(config),
        ),
        make_sampler(config, space),
        known=lambda: known_points(
            _asked(config, folder, files, space),
            config.starts,
            config.warm_start,
            _earlier,
            _record_of,
        ),
        storage=_storage(config, Path(path)),
        identity=config.model_dump(mode="json", exclude=_NOT_ASKED) | files,
        placement=Placement(config.dtype, config.device),
        then=_then(config, space) if config.then else None,
    )
    study.record.note("home", str(folder))
    return study, config


def make_space(config: StudyConfig, folder: Path) -> WeightSearchSpace | RouteSearchSpace:
    """The space that a study.yaml in `folder` describes."""
    base, sources = study_models(config, folder)
    return build_space(
        config.space, base, sources, Checkpoint(base).architecture, config.seed, folder / "runs"
    )


def study_models(config: StudyConfig, folder: Path) -> tuple[str, dict[str, str]]:
    """Base, and source's name -> model, of a study.yaml in `folder`."""
    return _model(folder, config.base), named_sources(
        [_model(folder, model) for model in config.models]
    )


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
        elif (data := entry.perplexity or (entry.judge and entry.judge.prompts)) and (
            folder / data
        ).is_file():
            scores[entry.title] = hashlib.sha256((folder / data).read_bytes()).hexdigest()[:16]
    return {
        "files of base": digest(base),
        "files of models": sorted(map(digest, sources.values())),
        "files of scores": scores,
    }


def task_digest(folder: Path, task: str) -> str:
    """Of the YAML and Python files of a folder of tasks, less those that define another task alone."""
    found = hashlib.sha256()
    for file in sorted(
        file for file in folder.rglob("*") if file.suffix in (".yaml", ".yml", ".py")
    ):
        content = file.read_bytes()
        defined = re.search(rb"^task:[ \t]+([^\s#]+)", content, re.MULTILINE)
        if defined is None or defined[1].strip(b"\"'") == task.encode():
            found.update(f"{file.relative_to(folder)} {len(content)} ".encode() + content)
    return found.hexdigest()[:16]


def _asked(
    config: StudyConfig, folder: Path, files: Mapping[str, Any], space: SearchSpace | None = None
) -> Asked:
    """What the scores of a study mean, whatever file says it: models and data by where they are, and what `_files` found."""
    scored = files.get("files of scores", {})
    items = config.evaluate.model_dump(mode="json", exclude=_NEVER_ASKED)
    if config.evaluate.include_path:  # other tasks name no files
        items |= {
            key: str((folder / (getattr(config.evaluate, key) or ".")).resolve())
            for key in ("include_path", "data_root")
        }
    question = {
        "base": _model(folder, config.base),
        "models": sorted(_model(folder, model) for model in config.models),
        "files of base": files.get("files of base"),
        "files of models": files.get("files of models"),
        "items": items,
        "seed": config.seed,
        "dtype": config.dtype,
    }
    scores = {
        e.title: e.model_dump(mode="json", exclude={"direction", "name"})
        | {"files": scored.get(e.title)}
        for e in config.scored
    }
    return Asked(folder, question, scores, lambda: space or make_space(config, folder))


def _earlier(identity: Mapping[str, Any], folder: Path) -> Asked:
    """The same of another study, from what its record kept."""
    try:
        settings = {
            key: value for key, value in identity.items() if key in StudyConfig.model_fields
        }
        return _asked(StudyConfig.model_validate(settings), folder, identity)
    except ValidationError as error:
        raise ConfigError(
            f"expected a study that this version reads, got {told(error.errors()[0])}"
        ) from error


def _record_of(path: Path) -> Storage:
    """Where the study of a study.yaml keeps its record."""
    return _storage(load_config(path), path)


def _storage(config: StudyConfig, path: Path) -> Storage:
    if config.storage is None:
        return Storage.at(_out(config, path) / "study.db", config.study_name)
    return Storage(config.storage, config.study_name).located(path.resolve().parent)


def _out(config: StudyConfig, path: Path) -> Path:
    """The study's folder."""
    return path.resolve().parent / (config.out or f"runs/{path.stem}")


def _then(config: StudyConfig, space: SearchSpace) -> Then:
    """The second level; what is wrong with its settings is told before the first begins."""
    settings = config.then
    assert settings is not None

    def routes(pool: Mapping[str, Recipe]) -> RouteSearchSpace:
        try:
            return route_space(settings.routes, space.base, space.sources, config.seed, pool)
        except ConfigError as error:
            raise ConfigError(str(error).replace("space.", "then.", 1)) from error

    def sampler(space: SearchSpace) -> BaseSampler:
        made: BaseSampler = make_sampler(config, space, settings)
        return made

    sources_alone = routes({})
    sampler(sources_alone)
    prefer = (
        tuple(settings.prefer.get(o.title, 0.0) for o in config.objectives)
        if settings.prefer
        else None
    )
    return Then(
        config.trials,
        routes,
        sampler,
        settings.front or Then.front,
        prefer,
        tuple(sources_alone.notes),
    )


def make_sampler(config: StudyConfig, space: SearchSpace, then: ThenConfig | None = None) -> Any:
    """`sampler: name` or `sampler: {name: ..., option: ...}`: a preset, or any of Optuna's by its class name. then: for the second
    level, which begins with the sources and the pool, each alone.
    """
    from paretomerge.search.registry import SearchProblem, make

    chosen = then.sampler if then and then.sampler else config.sampler
    options = {"name": chosen} if isinstance(chosen, str) else dict(chosen)
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError(f"sampler: expected a name, or `name` and options, got {shorten(chosen)}")
    starts = list(space.starts().values())[: len(space.sources) if then else None]
    sources = len(config.models) if then else len(space.sources)
    problem = SearchProblem(
        space.distributions,
        len(config.objectives),
        seed=config.seed,
        conditions=space.conditions,
        starts=len(starts),
        sources=sources,
        trials=then.trials if then else config.trials,
        start=starts[sources] if len(starts) > sources else None,
        importance=space.importance
        if config.space.importance and isinstance(space, WeightSearchSpace)
        else {},
    )
    return make(name, problem, options)


def _harness(
    config: StudyConfig,
    folder: Path,
    tasks: dict[str, HarnessTask],
    beside: HarnessEvaluator | None = None,
) -> HarnessEvaluator | None:
    if not tasks:
        return None
    settings = config.evaluate
    return HarnessEvaluator(
        tasks,
        TaskLoader(
            folder / settings.include_path if settings.include_path else None,
            (folder / settings.data_root).resolve() if settings.data_root else folder,
            settings.splits,
            settings.search_items,
            config.seed,
        ),
        batch_size=settings.batch_size,
        search_evaluator=beside,
        cache=ScoreCache(folder / settings.cache) if settings.cache else None,
        backend=_backend(settings.backend),
    )


def _backend(settings: str | dict[str, Any] | None) -> Backend | None:
    if settings is None or isinstance(settings, str):
        return Backend(settings) if settings else None
    return Backend(
        settings["name"], {key: value for key, value in settings.items() if key != "name"}
    )


def _racing(config: StudyConfig) -> Racing | None:
    settings = config.evaluate
    return (
        Racing(settings.confidence or Racing.confidence, seed=config.seed)
        if settings.race
        else None
    )


def _evaluator(config: StudyConfig, folder: Path, harness: HarnessEvaluator | None) -> Evaluator:
    """Everything that a trial needs, as one."""
    parts: list[Evaluator] = [harness] if harness else []
    for o in config.scored:
        if o.function:
            parts.append(FunctionEvaluator.load(o.title, o.function, folder))
        elif o.perplexity:
            parts.append(
                PerplexityEvaluator(o.title, folder / o.perplexity, o.metric or "perplexity")
            )
        elif o.judge:
            parts.append(
                JudgeEvaluator(
                    o.title,
                    folder / o.judge.prompts,
                    o.judge.criteria,
                    o.judge.base_url,
                    o.judge.model,
                    o.judge.max_tokens,
                )
            )
        elif o.size == "seconds_per_token":
            parts.append(SpeedEvaluator(o.title))
        elif o.sparsity or o.size:
            parts.append(MergeFact("sparsity" if o.sparsity else str(o.size), o.title))
    return CombinedEvaluator(tuple(parts))


def _objectives(config: StudyConfig, harness: HarnessEvaluator | None) -> list[Objective]:
    told = (harness.directions() if harness else {}) | {
        o.title: False for o in config.objectives if o.lower_is_better
    }
    return [
        Objective(
            o.title, told.get(o.title, True) if o.direction is None else o.direction == "maximize"
        )
        for o in config.objectives
    ]


def _model(folder: Path, model: str) -> str:
    """Local paths, of a model and its adapter, are made absolute; anything else is a Hub name."""
    name = under(folder, model)
    parts = [name] if is_folder(name) else name.split("+")
    return "+".join(
        str((folder / part).resolve()) if part.startswith((".", "/")) else part for part in parts
    )
