"""What a study is going to do and how long it will take, before it does anything.

Everything is checked as `search` does it, and nothing is written. The times come from the record
where the study has trials. Otherwise one merge is made in memory and scored on a few examples.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from statistics import mean, median, pstdev
from tempfile import TemporaryDirectory
from typing import TypeVar

from paretomerge.config.settings import StudySettings
from paretomerge.errors import (
    EvaluationError,
    ParetoMergeError,
    StudyError,
)
from paretomerge.evaluate.evaluator import (
    Candidate,
    Evaluator,
    PerExample,
    evaluators_in,
)
from paretomerge.evaluate.judge import JudgeEvaluator
from paretomerge.merging.plan.make import open_weights
from paretomerge.merging.plan.plan import Weights
from paretomerge.record.record import Record
from paretomerge.record.trial import Trial, count_evaluated
from paretomerge.search.mmmo.sampler import MMMOSampler
from paretomerge.study.build import build_search
from paretomerge.study.calibration import StatisticsPreview, preview_statistics
from paretomerge.study.forecast import (
    TYPICAL_SPREAD,
    Forecast,
    TrialCosts,
    forecast,
    mmmo_ask_seconds,
    shared,
)
from paretomerge.study.memory import MemoryPlan
from paretomerge.study.model_check import plan_first_baseline
from paretomerge.study.search import Search

_Result = TypeVar("_Result")
_LEAST_EXAMPLES = 16
"""Examples of each task that one merge is scored on, where a batch has fewer."""

_LEAST_TRIALS = 5
"""Trials in the record that show how much their times differ."""

_SHORT = 2.0
"""Seconds: a measurement below is made twice, since the first call of anything is slow."""


@dataclass(frozen=True)
class ModelPreview:
    """A model of a study.

    Attributes:
        name: Its name in trials; `base` for the base.
        path: A folder, or a name on the Hub.
        bytes: Size of its weights.
        parameters: Number of its parameters.
    """

    name: str
    path: str
    bytes: int
    parameters: int


@dataclass(frozen=True)
class ScorePreview:
    """A score of a study.

    Attributes:
        name: Its name.
        direction: `maximize` or `minimize` for objectives; None for what only a constraint uses.
        search_examples: Examples of a trial; None for what does not come from listed examples.
        held_out_examples: Held-out examples; None likewise.
    """

    name: str
    direction: str | None
    search_examples: int | None = None
    held_out_examples: int | None = None


@dataclass(frozen=True)
class Times:
    """Estimated seconds.

    Attributes:
        basis: What the estimate rests on, in words, or why there is none.
        merge: One merge in memory; None where it is not known.
        scores: Score -> seconds on its search examples, as far as they were measured.
        trial: One trial; None where nothing was measured.
        search: All trials that are still to do; None likewise.
        held_out: One merge on the held-out examples, of which the baselines and the front are
            scored at the end; None likewise.
        costs: What the forecasts rest on; None likewise.
    """

    basis: str
    merge: float | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    trial: float | None = None
    search: float | None = None
    held_out: float | None = None
    costs: TrialCosts | None = None


@dataclass(frozen=True)
class StudyPreview:
    """What a study is going to do.

    Attributes:
        models: The base and the sources.
        parameters: Number of parameters of the search space.
        scores: The objectives, then what only constraints use.
        watch: Scores that are only watched.
        trials: Evaluations in all.
        done: Evaluations that are in the record.
        baselines: Number of baseline recipes, which come first; `starts` are among them.
        checkpoint_bytes: Size of one written checkpoint.
        statistics: Statistics of the models that are made before the first trial; None where none
            are needed, or where they are there.
        out: The study's folder.
        times: The estimated times.
        memory: The peak of memory and disk, and what does not fit.
        forecasts: The trials that are left with one worker, and with as many as were asked for;
            empty where there is no estimate of a trial.
        notes: What users should know about the study.
    """

    models: tuple[ModelPreview, ...]
    parameters: int
    scores: tuple[ScorePreview, ...]
    watch: tuple[str, ...]
    trials: int
    done: int
    baselines: int
    checkpoint_bytes: int
    statistics: StatisticsPreview | None
    out: str
    times: Times
    memory: MemoryPlan
    forecasts: tuple[Forecast, ...]
    notes: tuple[str, ...]


def preview_study(
    settings: StudySettings, measure: bool = True, workers: int | None = None
) -> StudyPreview:
    """Check a study as a search does before its first trial, and estimate its time.

    Nothing is recorded, and no file or folder is left behind.

    Args:
        settings: The study.
        measure: Whether a study without trials is measured on one merge in memory, which loads its
            models. Models that are not on this machine are never downloaded for that.
        workers: Number of live models that memory and time are planned for; by default the
            study's.

    Returns:
        The preview.

    Raises:
        ParetoMergeError: Something is missing or does not fit. All problems are reported at once.
    """
    # A cache of scores is created when it is opened, and hides how long scoring takes.
    evaluation = replace(settings.evaluation, cache=None)
    settings = replace(settings, evaluation=evaluation)
    with _no_bytecode(), TemporaryDirectory(prefix="paretomerge-") as folder:
        settings, statistics = preview_statistics(
            settings, Path(folder) / "statistics", measure
        )
        search = build_search(settings, with_models=True, cache_folder=Path(folder))
        notes = search.check_models()
        notes += [*search.space.notes, *search.warm_start.notes]
        trials = _recorded(settings)
        scores = _scores(search, settings)
        models = (search.space.base, *search.space.sources.values())
        opened = open_weights(models, download=False)
        times = _times(search, settings, scores, trials, opened, measure)
        notes += search.goals.notes
        plan = plan_first_baseline(search.space, search.placement)
        memory = search.memory_plan(settings.evaluation.batch_size, workers)
        names = ("base", *search.space.sources)
        model_previews = []
        for name, path in zip(names, models, strict=True):
            model_previews.append(_model(name, path, opened[path]))
        return StudyPreview(
            models=tuple(model_previews),
            parameters=len(search.space.distributions),
            scores=scores,
            watch=tuple(measure.name for measure in settings.watch),
            trials=settings.total_trials,
            done=count_evaluated(trials),
            baselines=_count_baselines(search),
            checkpoint_bytes=plan.bytes_written(),
            statistics=statistics,
            out=str(settings.out_folder),
            times=times,
            memory=memory,
            forecasts=_forecasts(times, settings, trials, memory),
            notes=tuple(dict.fromkeys(notes)),
        )


def _count_baselines(search: Search) -> int:
    """Number of recipes that are evaluated before the sampler proposes the first one."""
    agenda = search.first_level.agenda([])
    # Trials of a warm start have their scores already.
    return sum(not trial.scores for trial in agenda)


@contextmanager
def _no_bytecode() -> Iterator[None]:
    """Import the user's modules without leaving `__pycache__` beside them."""
    before = sys.dont_write_bytecode
    sys.dont_write_bytecode = True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before


def _recorded(settings: StudySettings) -> list[Trial]:
    try:
        return Record.read(settings.storage).trials()
    except StudyError:
        # There is no record yet. One of another study was refused before.
        return []


def _model(name: str, path: str, weights: Weights) -> ModelPreview:
    headers = weights.headers.values()
    size = sum(header.bytes for header in headers)
    parameters = sum(prod(header.shape) for header in headers)
    return ModelPreview(name, path, size, parameters)


def _scores(search: Search, settings: StudySettings) -> tuple[ScorePreview, ...]:
    counts: dict[str, tuple[int, int]] = {}
    for evaluator in evaluators_in(search.goals.evaluator):
        if isinstance(evaluator, PerExample):
            held_out = evaluator.examples("held_out")
            for name, examples in evaluator.examples("search").items():
                counts[name] = (len(examples), len(held_out[name]))
        elif isinstance(evaluator, JudgeEvaluator):
            counts[evaluator.name] = evaluator.counts
    directions = {}
    for objective in search.goals.objectives:
        directions[objective.name] = "maximize" if objective.maximise else "minimize"
    scores = []
    for measure in settings.measures:
        direction = directions.get(measure.name)
        n_search, n_held_out = counts.get(measure.name, (None, None))
        scores.append(ScorePreview(measure.name, direction, n_search, n_held_out))
    return tuple(scores)


def _times(
    search: Search,
    settings: StudySettings,
    scores: tuple[ScorePreview, ...],
    trials: list[Trial],
    opened: Mapping[str, Weights],
    measure: bool,
) -> Times:
    remaining = max(settings.total_trials - count_evaluated(trials), 0)
    seconds = []
    for trial in trials:
        is_scored = not trial.failure and not trial.warm_start and trial.same_as is None
        if is_scored and trial.seconds:
            seconds.append(sum(trial.seconds.values()))
    if seconds:
        usual = median(seconds)
        basis = f"the median time of {len(seconds)} trials in the record"
        costs = _recorded_costs(trials)
        return Times(basis, trial=usual, search=usual * remaining, costs=costs)
    if not measure:
        return Times("no merge was made to measure it")
    if settings.evaluation.backend:
        return Times(
            "a `backend` loads each merge in a program of its own, which is not measured"
        )
    missing = _not_here(opened)
    if missing:
        return Times(
            f"{', '.join(missing)} would have to be downloaded for a measurement"
        )
    sample = max(settings.evaluation.batch_size, _LEAST_EXAMPLES)
    times = _Measurement(search, scores, sample).times(remaining)
    assert times.merge is not None
    costs = TrialCosts(
        times.merge,
        sum(times.scores.values()),
        _ask_seconds(search, settings),
        spread=TYPICAL_SPREAD,
    )
    return replace(times, costs=costs)


def _ask_seconds(search: Search, settings: StudySettings) -> float:
    """Estimate what a proposal takes. Only the default sampler takes a time that matters."""
    if not isinstance(search.sampler, MMMOSampler):
        return 0.0
    parameters = len(search.space.distributions)
    return mmmo_ask_seconds(settings.total_trials, parameters, len(settings.objectives))


def _recorded_costs(trials: list[Trial]) -> TrialCosts:
    """What trials took; each has its times in the record."""
    merges, scores, asks = [], [], []
    for trial in trials:
        seconds = trial.seconds
        if trial.failure or trial.warm_start or "evaluate" not in seconds:
            continue
        merges.append(seconds.get("merge", 0.0))
        scores.append(seconds["evaluate"])
        # Baselines come from no proposal.
        if not trial.label:
            asks.append(seconds.get("ask", 0.0))
    works = [merge + score for merge, score in zip(merges, scores, strict=True)]
    if not works:
        return TrialCosts(0.0, 0.0)
    spread = TYPICAL_SPREAD
    if len(works) >= _LEAST_TRIALS and mean(works) > 0:
        spread = pstdev(works) / mean(works)
    costs = TrialCosts(median(merges), mean(scores), spread=spread)
    # Without proposals in the record, the default stands.
    return replace(costs, ask=median(asks)) if asks else costs


def _forecasts(
    times: Times, settings: StudySettings, trials: list[Trial], memory: MemoryPlan
) -> tuple[Forecast, ...]:
    """Forecasts of the trials that are left, for one worker and for those of the memory plan."""
    if times.costs is None or times.costs.work <= 0:
        return ()
    remaining = max(settings.total_trials - count_evaluated(trials), 0)
    places = memory.machine.gpus
    if memory.device == "cpu":
        places = (os.cpu_count() or 1) // (settings.threads or 1)
    forecasts = []
    for workers in sorted({1, memory.workers}):
        costs = shared(times.costs, workers, places)
        forecasts.append(forecast(costs, remaining, workers))
    return tuple(forecasts)


def _not_here(opened: Mapping[str, Weights]) -> list[str]:
    """The models on the Hub whose weights are not on this machine."""
    missing = []
    for model, weights in opened.items():
        files = {header.file for header in weights.headers.values()}
        if not all(file.exists() for file in files):
            missing.append(model)
    return missing


class _Measurement:
    """Makes one merge in memory and scores it on some examples.

    Args:
        search: The study.
        scores: Its scores.
        sample: The most examples of each task to score on: one batch, for the time of an example
            depends on the size of its batch.
    """

    def __init__(
        self, search: Search, scores: tuple[ScorePreview, ...], sample: int
    ) -> None:
        self._search = search
        self._sample = sample
        self._held_out = {score.name: score.held_out_examples for score in scores}
        self._seconds: dict[str, float] = {}
        self._held_out_seconds = 0.0
        self._unmeasured: list[str] = []

    def times(self, remaining: int) -> Times:
        """Measure; `remaining` is the number of trials that are still to do."""
        search = self._search
        # The last baseline merges all sources with the last of the methods.
        label, params = list(search.space.baselines().items())[-1]
        level = search.first_level
        recipe = level.recipe(params)
        try:
            with search.live:
                # The first merge reads the models from disk, which a search does once.
                level.load(recipe)
                merge, candidate = _timed(lambda: level.load(recipe))
                # Without a key, so that no score comes from a cache.
                candidate = replace(candidate, key="")
                for evaluator in evaluators_in(search.goals.evaluator):
                    self._measure(evaluator, candidate)
        except (ParetoMergeError, RuntimeError, MemoryError) as error:
            raise EvaluationError(
                f"the merge {label!r}, which was made to measure the time, cannot be scored: "
                f"{error}"
            ) from error
        trial = merge + sum(self._seconds.values())
        return Times(
            self._basis(label),
            merge=merge,
            scores=self._seconds,
            trial=trial,
            search=trial * remaining,
            held_out=merge + self._held_out_seconds,
        )

    def _measure(self, evaluator: Evaluator, candidate: Candidate) -> None:
        if isinstance(evaluator, JudgeEvaluator):
            # Each answer of a judge may cost money.
            self._unmeasured.append(evaluator.name)
            return
        if isinstance(evaluator, PerExample):
            for name, examples in evaluator.examples("search").items():
                self._measure_task(evaluator, candidate, name, len(examples))
            return
        seconds, scores = _timed(lambda: evaluator.evaluate(candidate, "search"))
        self._seconds[next(iter(scores))] = seconds
        # Half of a text is held out, and most functions score both splits alike.
        self._held_out_seconds += seconds

    def _measure_task(
        self, evaluator: PerExample, candidate: Candidate, name: str, n: int
    ) -> None:
        count = min(n, self._sample)
        # Spread over the task, whose examples may be sorted by length.
        indices = [i * n // count for i in range(count)]

        def score() -> object:
            return evaluator.example_scores(candidate, "search", {name: indices})

        seconds, _ = _timed(score)
        if seconds < _SHORT:
            seconds, _ = _timed(score)
        per_example = seconds / count
        self._seconds[name] = per_example * n
        self._held_out_seconds += per_example * (self._held_out[name] or 0)

    def _basis(self, label: str) -> str:
        placement = self._search.placement
        text = f"one merge ({label}) that was made in memory on {placement.device} and scored"
        if any(self._held_out.values()):
            text += f", on up to {self._sample} examples of each task"
        if self._search.then is not None:
            text += "; trials of the second level are taken to last as long"
        if self._unmeasured:
            text += f"; without {', '.join(self._unmeasured)}, where a judge is asked"
        return f"{text}; without the time that the sampler takes to propose"


def _timed(call: Callable[[], _Result]) -> tuple[float, _Result]:
    """The seconds that a call takes, and its result."""
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result
