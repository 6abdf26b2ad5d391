"""Build a `Search` from the settings of a study.

This makes spaces, evaluators and samplers, and reads the headers of models.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from optuna.samplers import BaseSampler

from paretomerge.config.convert import settings_of
from paretomerge.config.schema import load_config
from paretomerge.config.settings import (
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
from paretomerge.evaluate.measures import (
    Size,
)
from paretomerge.merging.engine import usable_device
from paretomerge.merging.plan.make import open_weights
from paretomerge.pareto.preference import MEAN, Prefer, Preference
from paretomerge.recipe import Recipe
from paretomerge.record.folder import check_writable
from paretomerge.record.record import Record
from paretomerge.record.storage import Storage
from paretomerge.search.mmmo.sampler import MMMOSampler
from paretomerge.search.registry import SearchProblem, make, preferring
from paretomerge.space.build import Pool, build_route_space
from paretomerge.space.lineage import LineageSearchSpace
from paretomerge.space.routes.space import RouteSearchSpace
from paretomerge.space.space import SearchSpace
from paretomerge.space.specs import LineageSpace, WeightSpace
from paretomerge.space.weights.space import WeightSearchSpace
from paretomerge.study.agenda import WarmStart
from paretomerge.study.calibration import make_calibration
from paretomerge.study.executor import Executor
from paretomerge.study.goals import Goals
from paretomerge.study.identity import (
    question_of,
    question_of_record,
    study_identity,
)
from paretomerge.study.lineage.build import lineage_sampler
from paretomerge.study.lineage.sampler import LineageSampler
from paretomerge.study.model_check import (
    check_models,
    check_routes,
    model_kind,
)
from paretomerge.study.parts import StudyParts
from paretomerge.study.processes import Processes
from paretomerge.study.ray_actors import RayActors
from paretomerge.study.search import Search
from paretomerge.study.second_level import SecondLevelPlan
from paretomerge.study.stopping import StoppingRule
from paretomerge.study.warm_start import EarlierStudies

_CONVERGED = 1e-9  # a share of the hypervolume that nothing is below but 0


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
    parts = StudyParts(_as_recorded(settings), cache_folder)
    return _Builder(parts).search(with_models)


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
    return _Builder(StudyParts(settings)).sampler(space)


@dataclass(frozen=True)
class _Builder:
    """Makes the parts of a search of one study's settings."""

    parts: StudyParts

    @property
    def settings(self) -> StudySettings:
        """The settings."""
        return self.parts.settings

    def search(self, with_models: bool) -> Search:
        settings = self.settings
        # Each part is made in a block of its own, so that one error reports what is wrong in all
        # of them. Parts that need the space wait for it.
        errors = ErrorCollector()
        if with_models:
            self._check_places(errors)
            if settings.calibration is not None:
                # It takes minutes, and the space plans merges with it.
                errors.raise_if_any()
                make_calibration(self.parts)
        with errors.collect():
            self._check_space(with_models, errors)
        goals: Goals | None = None
        with errors.collect():
            goals = self.parts.goals()
        errors.raise_if_any()
        assert goals is not None
        if with_models:
            goals.check_model_kind(model_kind(self.parts.space))
        sampler = self.sampler(self.parts.space)
        if isinstance(sampler, LineageSampler):
            sampler.check_objectives(goals.objectives)
        search = Search(
            settings.out_folder,
            self.parts.space,
            goals,
            sampler,
            warm_start=self.warm_start,
            storage=settings.storage,
            identity=study_identity(settings, self.parts.pool),
            placement=self.parts.placement,
            then=self.second_level(settings.then) if settings.then else None,
            rule=self.rule(),
            executor=self.executor(goals),
            workers=settings.workers if isinstance(settings.workers, int) else 1,
        )
        # Last: a study that is refused leaves nothing behind.
        self.parts.measurements.write()
        return search

    def rule(self) -> StoppingRule:
        """When the search ends."""
        settings = self.settings
        budget = settings.budget
        if isinstance(settings.space, LineageSpace) and budget.until is None:
            # A lineage whose best models are all alike expects a gain of exactly 0.
            return StoppingRule(settings.total_trials, _CONVERGED, patience=1)
        return StoppingRule(settings.total_trials, budget.until, budget.patience)

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
            models = (self.parts.pool.base, *self.parts.pool.sources.values())
            with errors.collect():
                open_weights(models, download=False)
        space = self.parts.space
        with errors.collect():
            self.sampler(space)
        if self.settings.then:
            with errors.collect():
                self.second_level(self.settings.then)
        if with_models:
            with errors.collect():
                check_models(space, self.parts.placement)
            if space.routed or self.settings.then:
                with errors.collect():
                    check_routes(space)

    def sampler(
        self, space: SearchSpace, then: SecondLevel | None = None
    ) -> BaseSampler:
        """The sampler of a level."""
        settings = self.settings
        setting: SamplerSetting = settings.sampler
        if then is not None and then.sampler is not None:
            setting = then.sampler
        description = _sampler_description(setting)
        if isinstance(space, LineageSearchSpace):
            name, options = description or (type(setting).__name__, {})
            parts = self.parts
            return lineage_sampler(
                name,
                options,
                space,
                parts.individuals,
                parts.products_of_deltas,
                settings.seed,
            )
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
            pool = Pool(self.parts.space.base, self.parts.space.sources)
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
        identity = study_identity(settings, self.parts.pool)
        earlier = EarlierStudies(
            settings.root,
            self.parts.space,
            question_of(settings, identity),
            storage_of_file,
            question_of_record,
        )
        return earlier.read(settings.starts, settings.warm_start)


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
        record = Record.read(settings.storage, to_search=True)
        recorded = record.allows_mismatch()
    except StudyError:
        # There is no record yet, or it cannot be read, which the search itself reports.
        recorded = False
    return replace(settings, allow_mismatch=recorded)
