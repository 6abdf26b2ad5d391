"""Build a `Search` from the settings of a study.

This makes spaces, evaluators and samplers, and reads the headers of models.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from optuna.samplers import BaseSampler
from pydantic import ValidationError

from paretomerge.config.convert import config_of, settings_of
from paretomerge.config.schema import StudyConfig, load_config, message_of
from paretomerge.config.settings import SamplerSetting, SecondLevel, StudySettings
from paretomerge.errors import ConfigError, shorten, unknown_name
from paretomerge.evaluate.backend import Backend, ModelOptions
from paretomerge.evaluate.evaluator import (
    CombinedEvaluator,
    Evaluator,
    MergeFact,
    Objective,
)
from paretomerge.evaluate.function import FunctionEvaluator
from paretomerge.evaluate.function_digest import file_digest, function_digest
from paretomerge.evaluate.harness import HarnessEvaluator
from paretomerge.evaluate.judge import JudgeEvaluator
from paretomerge.evaluate.measures import (
    Function,
    Judge,
    Measure,
    Perplexity,
    Size,
    Sparsity,
    Task,
    lower_is_better,
)
from paretomerge.evaluate.perplexity import PerplexityEvaluator
from paretomerge.evaluate.score_cache import ScoreCache
from paretomerge.evaluate.speed import SpeedEvaluator
from paretomerge.evaluate.tasks import HarnessTask, Prompts, TaskLoader
from paretomerge.recipe import Recipe
from paretomerge.record.storage import Storage
from paretomerge.search.mmmo.sampler import MMMOSampler
from paretomerge.search.registry import SearchProblem, make
from paretomerge.space.build import Pool, build_route_space, build_space
from paretomerge.space.routes.space import RouteSearchSpace
from paretomerge.space.sources import digest, model_path, named_sources
from paretomerge.space.space import SearchSpace
from paretomerge.space.specs import RouteSpace, WeightSpace
from paretomerge.space.weights.space import WeightSearchSpace
from paretomerge.study.agenda import WarmStart
from paretomerge.study.goals import Goals, RaceSettings
from paretomerge.study.search import Placement, Search
from paretomerge.study.second_level import SecondLevelPlan
from paretomerge.study.stopping import StoppingRule
from paretomerge.study.warm_start import EarlierStudies, Question

# How fast a score comes and when scoring stops may change; what the score means may not.
_CHANGEABLE_EVALUATION = {"batch_size", "cache", "time_limit", "race"}
_CHANGEABLE: dict[str, Any] = {
    **dict.fromkeys(
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
    ),
    "evaluate": _CHANGEABLE_EVALUATION,
    "then": {"trials", "sampler"},
}
"""Keys that may change between two runs of a study.

They change neither what a point means nor what its scores mean.
"""


def build_search(settings: StudySettings) -> Search:
    """Build the search that settings describe. Nothing is merged or scored yet.

    Args:
        settings: The settings.

    Returns:
        The search, with its record open.

    Raises:
        ConfigError: A setting cannot be applied.
        CheckpointError: A model cannot be read.
        EvaluationError: A task, a metric or a function is missing.
        StudyError: The record holds trials of another study.
    """
    return _Builder(settings).search()


def build_sampler(settings: StudySettings, space: SearchSpace) -> BaseSampler:
    """Make the sampler of a study's first level.

    Args:
        settings: The settings.
        space: The search space.

    Returns:
        The sampler.

    Raises:
        ConfigError: The sampler or one of its options is unknown.
    """
    return _Builder(settings).sampler(space)


def study_pool(settings: StudySettings) -> Pool:
    """The base, and the name and path of each source; local paths are absolute.

    Args:
        settings: The settings.

    Returns:
        The models.

    Raises:
        ConfigError: A model is named twice.
    """
    models = [model_path(settings.root, model) for model in settings.models]
    base = model_path(settings.root, settings.base)
    return Pool(base, named_sources(models))


def task_digest(folder: Path, task: str) -> str:
    """Digest the YAML and Python files that a task may depend on.

    These are all such files of the folder, except those that define another task.

    Args:
        folder: The folder.
        task: The task's name.

    Returns:
        16 hexadecimal digits.
    """
    content_digest = hashlib.sha256()
    files = []
    for file in folder.rglob("*"):
        if file.suffix in (".yaml", ".yml", ".py"):
            files.append(file)
    # Sorted, since the order of a directory differs between file systems.
    for file in sorted(files):
        content = file.read_bytes()
        # A search in the text and not a YAML parser: the harness's files have tags such as
        # `!function`, which a safe loader refuses.
        definition = re.search(rb"^task:[ \t]+([^\s#]+)", content, re.MULTILINE)
        # A file that defines no task may be included by any of them.
        defines_another = False
        if definition is not None:
            defines_another = definition[1].strip(b"\"'") != task.encode()
        if not defines_another:
            # With the length, so that text cannot move from one file to the next unnoticed.
            header = f"{file.relative_to(folder)} {len(content)} "
            content_digest.update(header.encode() + content)
    return content_digest.hexdigest()[:16]


@dataclass(frozen=True)
class _Builder:
    """Makes the parts of a search of one study's settings."""

    settings: StudySettings

    def search(self) -> Search:
        settings = self.settings
        space = self.space
        goals = self.goals()
        return Search(
            settings.out_folder,
            space,
            goals,
            self.sampler(space),
            warm_start=self.warm_start,
            storage=settings.storage,
            root=str(settings.root),
            identity=self.identity,
            placement=Placement(settings.dtype, settings.device),
            then=self.second_level(settings.then) if settings.then else None,
            rule=StoppingRule(
                settings.total_trials, settings.budget.until, settings.budget.patience
            ),
        )

    @cached_property
    def pool(self) -> Pool:
        return study_pool(self.settings)

    @cached_property
    def space(self) -> SearchSpace:
        settings = self.settings
        if not isinstance(settings.space, WeightSpace | RouteSpace):
            return settings.space
        return build_space(
            settings.space, self.pool, settings.seed, settings.root / "runs"
        )

    def goals(self) -> Goals:
        settings = self.settings
        tasks: dict[str, HarnessTask] = {}
        for measure in settings.measures:
            if isinstance(measure, Task):
                tasks[measure.name] = HarnessTask(
                    measure.task, measure.metric, measure.num_fewshot
                )
        watched_tasks = {name: HarnessTask(name) for name in settings.watch}
        # The watched evaluator gets the search evaluator, so that no example that the search has
        # seen is ever held out.
        harness = self.harness(tasks)
        watched = self.harness(watched_tasks, harness)
        race = None
        if settings.evaluation.race is not None:
            race = RaceSettings(settings.evaluation.race, seed=settings.seed)
        return Goals(
            self.evaluator(harness),
            self.objectives(harness),
            settings.constraints,
            watched,
            settings.evaluation.time_limit,
            race,
        )

    def harness(
        self, tasks: Mapping[str, HarnessTask], beside: HarnessEvaluator | None = None
    ) -> HarnessEvaluator | None:
        if not tasks:
            return None
        evaluation = self.settings.evaluation
        options = ModelOptions(evaluation.think_end_token, evaluation.add_bos_token)
        folder = self.settings.root
        data_root = folder
        if evaluation.data_root:
            data_root = (folder / evaluation.data_root).resolve()
        loader = TaskLoader(
            folder / evaluation.include_path if evaluation.include_path else None,
            data_root,
            evaluation.splits,
            evaluation.search_items,
            self.settings.seed,
            Prompts(
                evaluation.num_fewshot,
                evaluation.apply_chat_template,
                evaluation.fewshot_as_multiturn,
                evaluation.system_instruction,
                evaluation.gen_kwargs,
                self.pool.base,
            ),
        )
        return HarnessEvaluator(
            tasks,
            loader,
            batch_size=evaluation.batch_size,
            search_evaluator=beside,
            cache=ScoreCache(folder / evaluation.cache) if evaluation.cache else None,
            backend=_backend(evaluation.backend, options),
            options=options,
        )

    def evaluator(self, harness: HarnessEvaluator | None) -> Evaluator:
        """Everything that a trial is scored with, as one evaluator."""
        parts: list[Evaluator] = [harness] if harness else []
        for measure in self.settings.measures:
            if not isinstance(measure, Task):
                parts.append(_evaluator_of(measure, self.settings))
        return CombinedEvaluator(tuple(parts))

    def objectives(self, harness: HarnessEvaluator | None) -> tuple[Objective, ...]:
        """The objectives with their directions. A task has a direction once it is loaded."""
        task_directions = harness.directions() if harness else {}
        objectives = []
        for measure in self.settings.objectives:
            if measure.direction is not None:
                maximise = measure.direction == "maximize"
            elif isinstance(measure, Task):
                maximise = task_directions[measure.name]
            else:
                maximise = not lower_is_better(measure)
            objectives.append(Objective(measure.name, maximise))
        return tuple(objectives)

    def sampler(
        self, space: SearchSpace, then: SecondLevel | None = None
    ) -> BaseSampler:
        """The sampler of a level."""
        settings = self.settings
        setting: SamplerSetting = settings.sampler
        if then is not None and then.sampler is not None:
            setting = then.sampler
        description = _sampler_description(setting)
        if description is None:
            assert isinstance(setting, BaseSampler)
            _check_names(setting, space)
            return setting
        name, options = description
        starts = list(space.baselines().values())
        n_sources = len(space.sources)
        if then is not None:
            # The first level has scored the sources and the pool, so only they count as starts. The
            # other baselines of the space would lengthen the sampler's start-up.
            starts = starts[:n_sources]
            n_sources = len(settings.models)
        importance: Mapping[str, float] = {}
        # Importance is measured on the deltas of a weight space, which a second level has not.
        spec = settings.space
        asked_for = isinstance(spec, WeightSpace) and spec.importance
        if asked_for and isinstance(space, WeightSearchSpace):
            importance = space.importance
        problem = SearchProblem(
            space.distributions,
            len(settings.objectives),
            seed=settings.seed,
            conditions=space.conditions,
            starts=len(starts),
            sources=n_sources,
            trials=then.trials if then else settings.budget.trials,
            start=starts[n_sources] if len(starts) > n_sources else None,
            importance=importance,
        )
        sampler = make(name, problem, options)
        _check_names(sampler, space)
        return sampler

    def second_level(self, then: SecondLevel) -> SecondLevelPlan:
        """The plan of the second level."""
        settings = self.settings

        def make_space(recipes: Mapping[str, Recipe]) -> RouteSearchSpace:
            pool = Pool(self.space.base, self.space.sources)
            try:
                return build_route_space(then.routes, pool, settings.seed, recipes)
            except ConfigError as error:
                # The space names keys as under `space:`, but the user wrote them under `then:`.
                message = str(error).replace("space.", "then.", 1)
                raise ConfigError(message) from error

        def make_sampler(space: SearchSpace) -> BaseSampler:
            return self.sampler(space, then)

        # Made once without a pool: a wrong setting must not surface after hours of the first level.
        sources_alone = make_space({})
        make_sampler(sources_alone)
        prefer = None
        if then.prefer:
            names = [measure.name for measure in settings.objectives]
            weights = [then.prefer.get(name, 0.0) for name in names]
            prefer = tuple(weights)
        return SecondLevelPlan(
            settings.budget.trials,
            make_space,
            make_sampler,
            then.front or SecondLevelPlan.front,
            prefer,
            tuple(sources_alone.notes),
        )

    def warm_start(self) -> WarmStart:
        settings = self.settings
        if not settings.starts and not settings.warm_start:
            return WarmStart()
        files: dict[str, Any] = {}
        for key, value in self.identity.items():
            if key.startswith("files of"):
                files[key] = value
        earlier = EarlierStudies(
            settings.root,
            self.space,
            _question(settings, files),
            storage_of_file,
            _question_of_record,
        )
        return earlier.read(settings.starts, settings.warm_start)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What makes trials comparable: settings, and digests of the files behind them."""
        settings = self.settings
        # A study.yaml cannot describe samplers and spaces that are the user's objects. The sampler
        # may change anyway; of a space its class and its parameters are compared.
        then = _without_sampler(settings.then)
        described = replace(
            settings,
            # The same question, however it is written.
            base=self._neutral_path(settings.base),
            models=tuple(map(self._neutral_path, settings.models)),
            sampler="mmmo",
            then=then,
        )
        own_space = {}
        if not isinstance(settings.space, WeightSpace | RouteSpace):
            described = replace(described, space=WeightSpace())
            parameters = sorted(settings.space.distributions)
            own_space = {"own space": [type(settings.space).__qualname__, parameters]}
        config = config_of(described).model_dump(mode="json", exclude=_CHANGEABLE)
        return config | own_space | self._file_digests()

    def _neutral_path(self, model: str) -> str:
        """A model's path from the study's root, where it is below it."""
        root = self.settings.root.resolve()
        path = model_path(root, model)
        return "+".join(part.removeprefix(f"{root}/") for part in path.split("+"))

    def _file_digests(self) -> dict[str, Any]:
        scores = {}
        for measure in self.settings.measures:
            measure_digest = self._measure_digest(measure)
            if measure_digest:
                scores[measure.name] = measure_digest
        # Sorted like the models in `_question`: their order does not change what scores mean.
        digests = [digest(model) for model in self.pool.sources.values()]
        models = sorted(digests)
        return {
            "files of base": digest(self.pool.base),
            "files of models": models,
            "files of scores": scores,
        }

    def _measure_digest(self, measure: Measure) -> str:
        """Digest what decides a score: a function's source, a task's files, or a text.

        The digest is empty where no local file decides it.
        """
        folder = self.settings.root
        include_path = self.settings.evaluation.include_path
        if isinstance(measure, Task):
            if not include_path:
                return ""
            return task_digest(folder / include_path, measure.task)
        if isinstance(measure, Function):
            return function_digest(measure.function, folder)
        if isinstance(measure, Perplexity | Judge):
            path = measure.path if isinstance(measure, Perplexity) else measure.prompts
            return file_digest(folder / path)
        return ""


def _evaluator_of(measure: Measure, settings: StudySettings) -> Evaluator:
    folder = settings.root
    match measure:
        case Function():
            if callable(measure.function):
                return FunctionEvaluator(measure.name, measure.function)
            return FunctionEvaluator.load(measure.name, measure.function, folder)
        case Perplexity():
            return PerplexityEvaluator(
                measure.name,
                folder / measure.path,
                measure.metric,
                settings.evaluation.add_bos_token,
            )
        case Judge():
            return JudgeEvaluator(
                measure.name,
                folder / measure.prompts,
                measure.criteria,
                measure.base_url,
                measure.model,
                measure.max_tokens,
            )
        case Size(kind="seconds_per_token"):
            return SpeedEvaluator(measure.name)
        case Size():
            return MergeFact(measure.kind, measure.name)
        case Sparsity():
            return MergeFact("sparsity", measure.name)
        case _:
            raise TypeError(f"{measure!r} has no evaluator")


def _backend(
    setting: str | Mapping[str, Any] | None, options: ModelOptions
) -> Backend | None:
    if not setting:
        return None
    if isinstance(setting, str):
        return Backend(setting, options.arguments)
    arguments = dict(setting)
    name = arguments.pop("name")
    return Backend(name, options.arguments | arguments)


def _check_names(sampler: BaseSampler, space: SearchSpace) -> None:
    """Check that a sampler's arguments name parameters of the study."""
    # The parameters of another space would be proposed, and those of the study drawn at random.
    names = sampler.parameter_names if isinstance(sampler, MMMOSampler) else set()
    for name in sorted(names - set(space.distributions)):
        problem = unknown_name("parameter", name, space.distributions)
        raise ConfigError(f"sampler: {problem}")


def _sampler_description(setting: SamplerSetting) -> tuple[str, dict[str, Any]] | None:
    """A sampler's name in the registry, and its options.

    None for a sampler object of the user's, which is used as it is.
    """
    if isinstance(setting, str):
        return setting, {}
    if isinstance(setting, BaseSampler):
        # An MMMOSampler without a search space is made again with the study's space.
        setting = getattr(setting, "study_yaml", None) or {}
        if not setting:
            return None
    options = dict(setting)
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError(
            f"sampler: a name, or `name` and options, not {shorten(setting)}"
        )
    return name, options


def _without_sampler(then: SecondLevel | None) -> SecondLevel | None:
    return replace(then, sampler=None) if then else None


def _question(settings: StudySettings, files: Mapping[str, Any]) -> Question:
    """What a study's scores mean, with absolute paths of models and data."""
    # Sorted: the same models in another order give the same scores.
    models = [model_path(settings.root, model) for model in settings.models]
    pool_models = sorted(models)
    evaluation = asdict(settings.evaluation)
    # Batch sizes, caches and races change how fast scores come, not what they mean.
    for key in _CHANGEABLE_EVALUATION:
        del evaluation[key]
    if settings.evaluation.include_path:  # other tasks name no files
        for key in ("include_path", "data_root"):
            setting = getattr(settings.evaluation, key) or "."
            path = settings.root / setting
            evaluation[key] = str(path.resolve())
    file_digests = files.get("files of scores", {})
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
            if value is not None:
                answer[key] = str(value)
        answer["kind"] = type(measure).__name__
        answer["files"] = file_digests.get(measure.name)
        scores[measure.name] = answer
    return Question(
        {
            "base": model_path(settings.root, settings.base),
            "models": pool_models,
            "files of base": files.get("files of base"),
            "files of models": files.get("files of models"),
            "items": evaluation,
            "seed": settings.seed,
            "dtype": settings.dtype,
        },
        scores,
    )


def _question_of_record(identity: Mapping[str, Any], folder: Path) -> Question:
    """What the scores of an earlier study mean, from its record."""
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
    return _question(settings_of(config, folder), identity)


def storage_of_file(path: Path) -> Storage:
    """Where the study of a study.yaml keeps its record."""
    return settings_of(load_config(path), path.parent, path.stem).storage
