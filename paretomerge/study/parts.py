"""The parts of a study that its settings describe and that evaluate merges.

A worker process needs these and no more: they know no sampler and no record.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from paretomerge.config.settings import (
    VLLM_OPTIONS,
    SourcesSetting,
    StudySettings,
)
from paretomerge.errors import (
    ConfigError,
    ErrorCollector,
)
from paretomerge.evaluate.backend import Backend, EvaluationBackend, ModelOptions
from paretomerge.evaluate.evaluator import (
    CombinedEvaluator,
    Evaluator,
    MergeFact,
    Objective,
)
from paretomerge.evaluate.examples import Examples, GroupExamples
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
from paretomerge.merging.live.result_tokenizer import write_result_tokenizer
from paretomerge.pareto.preference import MEAN
from paretomerge.space.build import Pool, build_space, cached_profile
from paretomerge.space.lineage import LineageSearchSpace
from paretomerge.space.measurements import Measurements
from paretomerge.space.sources import model_path, named_sources
from paretomerge.space.space import SearchSpace
from paretomerge.space.specs import LineageSpace, RouteSpace, WeightSpace
from paretomerge.study.goals import Goals, RaceSettings
from paretomerge.study.lineage.individuals import RecordedIndividuals
from paretomerge.study.live_models import LiveModels
from paretomerge.study.model_check import (
    plan_first_baseline,
)
from paretomerge.study.placement import Placement
from paretomerge.study.trial_runner import TrialRunner
from paretomerge.types import Array


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
    folder = settings.calibration_folder
    calibration = None if folder is None else str(folder)
    return Pool(
        base,
        named_sources(models),
        settings.allow_mismatch,
        same_vocabulary=settings.tokenizer_source is None,
        calibration=calibration,
    )


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
    parts = StudyParts(settings)
    goals = parts.goals()
    where: SourcesSetting = settings.sources or "device"
    models = LiveModels(parts.space, parts.placement, lambda: where)
    sources = list(parts.space.sources)
    runner = TrialRunner(goals, models, sources, lock, on_scoring=on_scoring)
    return runner, goals


@dataclass(frozen=True)
class StudyParts:
    """Makes the models, the space and the evaluators of a study.

    Attributes:
        settings: The settings.
        cache_folder: Where measurements of the models are stored; by default `runs` beside the
            study.yaml.
    """

    settings: StudySettings
    cache_folder: Path | None = None

    @cached_property
    def pool(self) -> Pool:
        """The base and the sources."""
        return study_pool(self.settings)

    @cached_property
    def measurements(self) -> Measurements:
        """What was measured of the models before."""
        return Measurements(self.cache_folder or self.settings.root / "runs")

    @cached_property
    def placement(self) -> Placement:
        """What all merges of the study have in common."""
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
        """The first level's search space."""
        settings = self.settings
        if isinstance(settings.space, LineageSpace):
            pool = self.pool
            return LineageSearchSpace(pool.base, pool.sources, self.individuals)
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
    def individuals(self) -> RecordedIndividuals:
        """The trials in the record, from which a lineage takes its parents."""
        return RecordedIndividuals(self.settings.storage)

    def products_of_deltas(self) -> Array:
        """Inner products `(K, K)` of the sources' deltas, measured once."""
        profile = cached_profile(self.measurements, self.pool)
        self.measurements.write()
        return np.asarray(profile.products)

    @cached_property
    def backend(self) -> EvaluationBackend | None:
        """What answers the requests of all tasks, the watched ones included."""
        return _backend(self.settings.evaluation.backend, self.settings.root)

    def goals(self) -> Goals:
        """What is scored, with its data loaded; one error reports all that is wrong."""
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

    def _task_loader(self, tokenizer: str, selects: bool) -> TaskLoader:
        evaluation = self.settings.evaluation
        folder = self.settings.root
        data_root = folder
        if evaluation.data_root:
            data_root = (folder / evaluation.data_root).resolve()
        return TaskLoader(
            folder / evaluation.include_path if evaluation.include_path else None,
            data_root,
            evaluation.splits,
            evaluation.search_items,
            evaluation.held_out_items,
            evaluation.selection_items if selects else None,
            self.settings.seed,
            tokenizer,
        )

    def search_examples(self, task: Task) -> Examples | GroupExamples:
        """The search examples of a task, which need not be one that the study scores.

        Args:
            task: The task.

        Returns:
            Its examples, with prompts as the study puts them.

        Raises:
            EvaluationError: The task is missing, or its data cannot be loaded.
        """
        spec = self._harness_task(task)
        # Its tokenizer has the chat template that the models were trained with.
        loader = self._task_loader(self.pool.base, selects=True)
        loader.check({task.name: spec})
        return loader.load(task.name, spec, "search")

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
        loader = self._task_loader(tokenizer, selects)
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
