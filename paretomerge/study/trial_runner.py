"""Merge one candidate into a live model and score it.

An error becomes a failed trial that records the reason.
"""

import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

from paretomerge.errors import ParetoMergeError, StudyError
from paretomerge.evaluate.evaluator import Candidate, Score
from paretomerge.evaluate.time_limit import enforce_time_limit
from paretomerge.recipe import Recipe
from paretomerge.record.trial import Trial
from paretomerge.study.goals import Goals
from paretomerge.study.live_models import LiveModels
from paretomerge.study.race import Race

HeldOutKind = Literal["objectives", "watched"]


@dataclass(frozen=True)
class Job:
    """A merge to score.

    Attributes:
        trial: The trial.
        recipe: Its recipe.
        pool: Name -> recipe of the merges that the second level takes from.
        finished: The trials before it; a race compares it with them.
        held_out: `objectives` or `watched`, to score that on the held-out examples; empty to score
            the search examples.
    """

    trial: Trial
    recipe: Recipe
    pool: Mapping[str, Recipe] = field(default_factory=dict)
    finished: Sequence[Trial] = ()
    held_out: HeldOutKind | Literal[""] = ""


def _do_nothing() -> None:
    pass


class TrialRunner:
    """Evaluates trials of any level, in this process.

    Args:
        goals: What is scored.
        models: The live models.
        sources: Names of the models that are merged.
        lock: Held while a merge is in a live model.
        on_error: Called for every error before it is taken for a failed trial; it may raise.
        on_scoring: Called when a merge is made and its scoring begins.
    """

    def __init__(
        self,
        goals: Goals,
        models: LiveModels,
        sources: Sequence[str],
        lock: AbstractContextManager[object],
        on_error: Callable[[], None] = _do_nothing,
        on_scoring: Callable[[], None] = _do_nothing,
    ) -> None:
        self._goals = goals
        self._models = models
        self._lock = lock
        self._on_error = on_error
        self._on_scoring = on_scoring
        self._race: Race | None = None
        if goals.race:
            self._race = Race(goals, goals.race, sources)

    def run(self, job: Job) -> Trial:
        """Merge and score a trial.

        Args:
            job: The trial, and what it needs.

        Returns:
            The trial with its scores and the seconds of its stages, or with the reason for its
            failure. With `held_out`, the trial with these held-out scores alone.

        Raises:
            StudyError: The models cannot be loaded together. Then every trial would fail.
        """
        self._load_models(job)
        seconds: dict[str, float] = {}
        # The trial refers to this dict, so stages may fill it after the trial is made.
        trial = replace(job.trial, seconds=seconds)
        try:
            # No other thread may load another merge before this one is scored.
            with self._lock:
                with stopwatch(seconds, "merge"):
                    model = self._models.of_level(trial.level, job.pool)
                    candidate = self._models.load(model, job.recipe)
                if job.held_out:
                    scores = self._hold_out(job.held_out, candidate)
                    return replace(job.trial, held_out=scores)
                self._on_scoring()
                with (
                    stopwatch(seconds, "evaluate"),
                    enforce_time_limit(self._goals.time_limit),
                ):
                    scores, final = self._score(job, candidate)
        except (ParetoMergeError, RuntimeError, MemoryError) as error:
            self._on_error()
            # torch reports exhausted memory as a RuntimeError. Any other exception is a bug, and
            # must not hide among failed trials.
            kind = type(error).__name__
            failure = f"{kind}: {error}"
            return replace(trial, failure=failure, traceback=traceback.format_exc())
        violations = self._goals.violations(scores)
        return replace(trial, scores=scores, constraints=violations, final=final)

    def _hold_out(self, kind: str, candidate: Candidate) -> dict[str, Score]:
        evaluator = self._goals.evaluator
        if kind == "watched":
            assert self._goals.watched is not None
            evaluator = self._goals.watched
        return dict(evaluator.evaluate(candidate, "held_out"))

    def _load_models(self, job: Job) -> None:
        try:
            with self._lock:
                self._models.of_level(job.trial.level, job.pool)
        except (RuntimeError, MemoryError) as error:
            self._on_error()
            raise StudyError(f"the models cannot be loaded: {error}") from error

    def _score(self, job: Job, candidate: Candidate) -> tuple[dict[str, Score], bool]:
        """The scores, and whether they cover all examples."""
        # Baselines are never left early: users compare with them, and races are fitted to them.
        if self._race is None or job.trial.label:
            return self._goals.score(candidate, "search"), True
        return self._race.score(candidate, job.finished)


@contextmanager
def stopwatch(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Note the wall-clock seconds of a stage."""
    start = time.perf_counter()
    yield
    elapsed = time.perf_counter() - start
    seconds[stage] = round(elapsed, 4)
