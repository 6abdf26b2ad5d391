"""Build a `Search` from the settings of a study.

This makes spaces, evaluators and samplers, and reads the headers of models.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from optuna.samplers import BaseSampler

from paretomerge.config.convert import settings_of
from paretomerge.config.schema import load_config
from paretomerge.config.settings import (
    VLLM_OPTIONS,
    SamplerSetting,
    SecondLevel,
    SourcesSetting,
    StudySettings,
)
from paretomerge.config.workers import RayWorkers
from paretomerge.errors import (
    ConfigError,
    ErrorCollector,
    StudyError,
    shorten,
    unknown_name,
)
from paretomerge.evaluate.backend import Backend, EvaluationBackend, ModelOptions
from paretomerge.evaluate.evaluator import (
    CombinedEvaluator,
    Evaluator,
    MergeFact,
    Objective,
)
from paretomerge.evaluate.function import FunctionEvaluator
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
from paretomerge.evaluate.vllm.backend import VLLMBackend
from paretomerge.evaluate.vllm.process import find_interpreter
from paretomerge.merging.engine import usable_device
from paretomerge.merging.live.result_tokenizer import write_result_tokenizer
from paretomerge.merging.plan.make import open_weights
from paretomerge.pareto.preference import MEAN, Prefer, Preference
from paretomerge.recipe import Recipe
from paretomerge.record.folder import check_writable
from paretomerge.record.record import Record
from paretomerge.record.storage import Storage
from paretomerge.search.mmmo.sampler import MMMOSampler
from paretomerge.search.registry import SearchProblem, make, preferring
from paretomerge.space.build import Pool, build_route_space, build_space
from paretomerge.space.measurements import Measurements
from paretomerge.space.routes.space import RouteSearchSpace
from paretomerge.space.sources import model_path, named_sources
from paretomerge.space.space import SearchSpace
from paretomerge.space.specs import RouteSpace, WeightSpace
from paretomerge.space.weights.space import WeightSearchSpace
from paretomerge.study.agenda import WarmStart
from paretomerge.study.executor import Executor
from paretomerge.study.goals import Goals, RaceSettings
from paretomerge.study.identity import (
    question_of,
    question_of_record,
    study_identity,
)
from paretomerge.study.live_models import LiveModels
from paretomerge.study.model_check import (
    check_models,
    check_routes,
    model_kind,
    plan_first_baseline,
)
from paretomerge.study.placement import Placement
from paretomerge.study.processes import Processes
from paretomerge.study.ray_actors import RayActors
from paretomerge.study.search import Search
from paretomerge.study.second_level import SecondLevelPlan
from paretomerge.study.stopping import StoppingRule
from paretomerge.study.trial_runner import TrialRunner
from paretomerge.study.warm_start import EarlierStudies


def build_search(
    settings: StudySettings,
    with_models: bool = False,
    cache_folder: Path | None = None,
) -> Search:
    """Build the search that settings describe. Nothing is merged or scored yet.

    Args:
        settings: The settings.
        with_models: Whether to check the device, and that the models can be merged.
        cache_folder: Where measurements of the models are stored; by default `runs` beside the
            study.yaml.

    Returns:
        The search. Its record is created when it is first used.

    Raises:
        ParetoMergeError: Something is wrong; all problems are reported at once. Their classes:
        ConfigError: A setting cannot be applied.
        CheckpointError: A model cannot be read.
        EvaluationError: A task, a metric or a function is missing.
        StudyError: The record holds trials of another study.
    """
    return _Builder(_as_recorded(settings), cache_folder).search(with_models)


def build_runner(
    settings: StudySettings,
    lock: AbstractContextManager[object],
    on_scoring: Callable[[], None],
) -> tuple[TrialRunner, Goals]:
    """Build what evaluates the trials of a study in a process without its record.

    Args:
        settings: The settings.
        lock: Held while a merge is in a live model.
        on_scoring: Called when the scoring of a trial begins.

    Returns:
        The runner, and what it scores.

    Raises:
        ParetoMergeError: As for `build_search`.
    """
    builder = _Builder(settings)
    goals = builder.goals()
    where: SourcesSetting = settings.sources or "device"
    models = LiveModels(builder.space, builder.placement, lambda: where)
    sources = list(builder.space.sources)
    runner = TrialRunner(goals, models, sources, lock, on_scoring=on_scoring)
    return runner, goals


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
    return Pool(
        base,
        named_sources(models),
        settings.allow_mismatch,
        same_vocabulary=settings.tokenizer_source is None,
    )


@dataclass(frozen=True)
class _Builder:
    """Makes the parts of a search of one study's settings."""

    settings: StudySettings
    cache_folder: Path | None = None

    def search(self, with_models: bool) -> Search:
        settings = self.settings
        # Each part is made in a block of its own, so that one error reports what is wrong in all
        # of them. Parts that need the space wait for it.
        errors = ErrorCollector()
        if with_models:
            self._check_places(errors)
        with errors.collect():
            self._check_space(with_models, errors)
        goals: Goals | None = None
        with errors.collect():
            goals = self.goals()
        errors.raise_if_any()
        assert goals is not None
        if with_models:
            goals.check_model_kind(model_kind(self.space))
        search = Search(
            settings.out_folder,
            self.space,
            goals,
            self.sampler(self.space),
            warm_start=self.warm_start,
            storage=settings.storage,
            root=str(settings.root),
            identity=study_identity(settings, self.pool),
            placement=self.placement,
            then=self.second_level(settings.then) if settings.then else None,
            rule=StoppingRule(
                settings.total_trials, settings.budget.until, settings.budget.patience
            ),
            executor=self.executor(goals),
            workers=settings.workers if isinstance(settings.workers, int) else 1,
        )
        # Last: a study that is refused leaves nothing behind.
        self.measurements.write()
        return search

    def executor(self, goals: Goals) -> Callable[[SourcesSetting], Executor] | None:
        """Makes what evaluates trials outside this process; None where this process does."""
        settings = self.settings
        if settings.workers == 1:
            return None
        for measure in settings.measures:
            is_timed = isinstance(measure, Size) and measure.kind == "seconds_per_token"
            if is_timed and settings.device == "cpu":
                raise ConfigError(
                    f"workers: {measure.name!r} measures time, and other workers would slow it "
                    "down; set `workers: 1`"
                )
        workers = settings.workers
        # A worker proposes nothing, and an object of the user's need not be sent to it.
        for_worker = replace(settings, sampler="mmmo", workers=1)
        races = goals.race is not None

        def make_executor(sources: SourcesSetting) -> Executor:
            # Decided once: each worker sees less free memory than the one before it.
            placed = replace(for_worker, sources=sources)
            if isinstance(workers, RayWorkers):
                return RayActors(placed, workers, goals.time_limit, races)
            return Processes(placed, workers, goals.time_limit, races)

        return make_executor

    def _check_places(self, errors: ErrorCollector) -> None:
        """Check what a search writes to and computes on."""
        settings = self.settings
        with errors.collect():
            usable_device(settings.device)
        with errors.collect():
            check_writable(settings.out_folder)
        if settings.storage_url and settings.storage.file:
            with errors.collect():
                check_writable(settings.storage.file.parent, "storage")
        if settings.evaluation.cache:
            cache = settings.root / settings.evaluation.cache
            with errors.collect():
                check_writable(cache.parent, "evaluate.cache")

    def _check_space(self, with_models: bool, errors: ErrorCollector) -> None:
        """Make what depends on the space, to report all that is wrong with it."""
        if with_models:
            # Before the space, which may fail at the first model that cannot be read.
            models = (self.pool.base, *self.pool.sources.values())
            with errors.collect():
                open_weights(models, download=False)
        space = self.space
        with errors.collect():
            self.sampler(space)
        if self.settings.then:
            with errors.collect():
                self.second_level(self.settings.then)
        if with_models:
            with errors.collect():
                check_models(space, self.placement)
            if space.routed or self.settings.then:
                with errors.collect():
                    check_routes(space)

    @cached_property
    def pool(self) -> Pool:
        return study_pool(self.settings)

    @cached_property
    def measurements(self) -> Measurements:
        return Measurements(self.cache_folder or self.settings.root / "runs")

    @cached_property
    def placement(self) -> Placement:
        settings = self.settings
        return Placement(
            settings.dtype,
            settings.device,
            settings.sources,
            settings.result_tokenizer_source,
            settings.chat_template,
            settings.allow_mismatch,
        )

    @cached_property
    def space(self) -> SearchSpace:
        settings = self.settings
        if not isinstance(settings.space, WeightSpace | RouteSpace):
            return settings.space
        return build_space(
            settings.space,
            self.pool,
            settings.seed,
            self.measurements,
            settings.root,
        )

    @cached_property
    def backend(self) -> EvaluationBackend | None:
        """What answers the requests of all tasks, the watched ones included."""
        return _backend(self.settings.evaluation.backend, self.settings.root)

    def goals(self) -> Goals:
        settings = self.settings
        errors = ErrorCollector()
        harness: HarnessEvaluator | None = None
        watched_harness: HarnessEvaluator | None = None
        evaluator: Evaluator | None = None
        watched: Evaluator | None = None
        with self._prompts_tokenizer() as tokenizer:
            with errors.collect():
                harness = self.harness(settings.measures, tokenizer, selects=True)
            with errors.collect():
                # It gets the search evaluator, so that no example that the search has seen is ever
                # held out.
                watched_harness = self.harness(settings.watch, tokenizer, harness)
        with errors.collect():
            evaluator = self.evaluator(harness, settings.measures)
        with errors.collect():
            if settings.watch:
                watched = self.evaluator(watched_harness, settings.watch)
        errors.raise_if_any()
        assert evaluator is not None
        race = None
        if settings.evaluation.race is not None:
            race = RaceSettings(settings.evaluation.race, seed=settings.seed)
        objectives = self.objectives(harness)
        minimised = [objective for objective in objectives if not objective.maximise]
        if settings.prefer == MEAN and minimised:
            raise ConfigError(
                f"prefer: mean: {minimised[0].name!r} is minimised; write weights, as "
                "{gsm8k: 0.7, brevity: 0.3}"
            )
        return Goals(
            evaluator,
            objectives,
            settings.constraints,
            watched,
            settings.evaluation.time_limit,
            race,
        )

    @contextmanager
    def _prompts_tokenizer(self) -> Iterator[str]:
        """A folder with the tokenizer whose chat template prompts are written with."""
        settings = self.settings
        # Without chats no tokenizer is read, so it need not be made.
        has_chats = False
        for measure in (*settings.measures, *settings.watch):
            if isinstance(measure, Task):
                prompts = settings.evaluation.prompt_settings(measure)
                has_chats = has_chats or prompts["apply_chat_template"]
        has_own = settings.tokenizer_source or settings.chat_template
        if not (has_own and has_chats):
            yield self.pool.base
            return
        # The result's tokenizer, which no folder has yet. Requests are built before any merge.
        with TemporaryDirectory(prefix="paretomerge-") as folder:
            plan = plan_first_baseline(self.space, self.placement)
            write_result_tokenizer(plan, Path(folder))
            yield folder

    def _harness_task(self, task: Task) -> HarnessTask:
        prompts = self.settings.evaluation.prompt_settings(task)
        options = ModelOptions(
            prompts.pop("think_end_token"), prompts.pop("add_bos_token")
        )
        return HarnessTask(
            task.task, task.metric, task.search_items, Prompts(**prompts), options
        )

    def harness(
        self,
        measures: Sequence[Measure],
        tokenizer: str,
        beside: HarnessEvaluator | None = None,
        *,
        selects: bool = False,
    ) -> HarnessEvaluator | None:
        """The evaluator of those measures that are tasks; None if none is.

        selects: Whether it has selection examples.
        """
        tasks: dict[str, HarnessTask] = {}
        for measure in measures:
            if isinstance(measure, Task):
                tasks[measure.name] = self._harness_task(measure)
        if not tasks:
            return None
        evaluation = self.settings.evaluation
        folder = self.settings.root
        data_root = folder
        if evaluation.data_root:
            data_root = (folder / evaluation.data_root).resolve()
        loader = TaskLoader(
            folder / evaluation.include_path if evaluation.include_path else None,
            data_root,
            evaluation.splits,
            evaluation.search_items,
            evaluation.held_out_items,
            evaluation.selection_items if selects else None,
            self.settings.seed,
            tokenizer,
        )
        return HarnessEvaluator(
            tasks,
            loader,
            batch_size=evaluation.batch_size,
            search_evaluator=beside,
            cache=ScoreCache(folder / evaluation.cache) if evaluation.cache else None,
            backend=self.backend,
        )

    def evaluator(
        self, harness: HarnessEvaluator | None, measures: Sequence[Measure]
    ) -> Evaluator:
        """All measures as one evaluator; `harness` has those that are tasks."""
        parts: list[Evaluator] = [harness] if harness else []
        errors = ErrorCollector()
        for measure in measures:
            if not isinstance(measure, Task):
                with errors.collect():
                    parts.append(_evaluator_of(measure, self.settings))
        errors.raise_if_any()
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
            if settings.prefer is None:
                return setting
            return preferring(setting, self._problem(space, then))
        name, options = description
        sampler = make(name, self._problem(space, then), options)
        _check_names(sampler, space)
        return sampler

    def _problem(self, space: SearchSpace, then: SecondLevel | None) -> SearchProblem:
        """What the sampler of a level is set up for."""
        settings = self.settings
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
        prefer: Prefer | None = None
        if isinstance(settings.prefer, Mapping):
            names = [measure.name for measure in settings.objectives]
            prefer = Preference.parse(settings.prefer, names).weights
        elif settings.prefer is not None:
            prefer = MEAN
        return SearchProblem(
            space.distributions,
            len(settings.objectives),
            seed=settings.seed,
            conditions=space.conditions,
            starts=len(starts),
            sources=n_sources,
            trials=then.trials if then else settings.budget.trials,
            start=starts[n_sources] if len(starts) > n_sources else None,
            importance=importance,
            prefer=prefer,
        )

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
        identity = study_identity(settings, self.pool)
        earlier = EarlierStudies(
            settings.root,
            self.space,
            question_of(settings, identity),
            storage_of_file,
            question_of_record,
        )
        return earlier.read(settings.starts, settings.warm_start)


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
    setting: str | Mapping[str, Any] | None, root: Path
) -> EvaluationBackend | None:
    if not setting:
        return None
    arguments = {} if isinstance(setting, str) else dict(setting)
    name = setting if isinstance(setting, str) else arguments.pop("name")
    if name != "vllm":
        return Backend(name, arguments)
    # Their types are checked with the other settings.
    own: dict[str, Any] = {}
    for key in VLLM_OPTIONS:
        if key in arguments:
            own[key] = arguments.pop(key)
    if "python" in own:
        own["python"] = find_interpreter(own["python"], root)
    return VLLMBackend(arguments, **own)


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


def storage_of_file(path: Path) -> Storage:
    """Where the study of a study.yaml keeps its record."""
    return settings_of(load_config(path), path.parent, path.stem).storage


def _as_recorded(settings: StudySettings) -> StudySettings:
    """Settings that allow a mismatch if the search that made the record did."""
    # The flag of one command: resuming, scoring and writing must do the same.
    if settings.allow_mismatch:
        return settings
    try:
        recorded = Record.read(settings.storage).allows_mismatch()
    except StudyError:
        # There is no record yet, or it cannot be read, which the search itself reports.
        recorded = False
    return replace(settings, allow_mismatch=recorded)
