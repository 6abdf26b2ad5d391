"""Merge one candidate into the live model and score it.

An error becomes a failed trial that records the reason.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace

from paretomerge.errors import ParetoMergeError, StudyError
from paretomerge.evaluate.evaluator import Candidate, Score
from paretomerge.evaluate.time_limit import enforce_time_limit
from paretomerge.record.trial import Trial
from paretomerge.study.goals import Goals
from paretomerge.study.interrupt import Interrupts
from paretomerge.study.level import Level
from paretomerge.study.race import Race


class Executor:
    """Evaluates trials of any level.

    Args:
        goals: What is scored.
        n_sources: The number of models that are merged.
        lock: Held while a merge is in the live model.
        interrupts: Knows whether Ctrl-C was pressed.
    """

    def __init__(
        self,
        goals: Goals,
        n_sources: int,
        lock: AbstractContextManager[object],
        interrupts: Interrupts,
    ) -> None:
        self.goals = goals
        self._lock = lock
        self._interrupts = interrupts
        self._race: Race | None = None
        if goals.race:
            self._race = Race(goals, goals.race, n_sources)

    def prepare(self, level: Level) -> None:
        """Load the live model of a level, unless it is loaded.

        Args:
            level: The level that is searched now.

        Raises:
            ParetoMergeError: The models cannot be loaded together. Then every trial would fail.
        """
        try:
            with self._lock:
                _ = level.model
        except (RuntimeError, MemoryError) as error:
            self._interrupts.raise_if_pressed()
            raise StudyError(f"the models cannot be loaded: {error}") from error

    def evaluate(
        self,
        asked: Trial,
        level: Level,
        finished: Sequence[Trial],
        by_recipe: Mapping[str, Trial],
        seconds: dict[str, float],
    ) -> Trial:
        """Merge and score a trial.

        Args:
            asked: The trial, without scores.
            level: The level that it belongs to.
            finished: The trials before it.
            by_recipe: Recipe key -> the trial that has scored it. The same recipe is never scored
                twice.
            seconds: The times of the stages are added here.

        Returns:
            The trial with its scores, or with the reason for its failure.
        """
        recipe = level.recipe(asked.params)
        asked = replace(asked, recipe_yaml=recipe.to_yaml(), seconds=seconds)
        # Different parameters may give the same recipe: one may be inactive, or a weight may be 0.
        same = by_recipe.get(recipe.key)
        if same is not None:
            return replace(
                asked,
                scores=same.scores,
                constraints=same.constraints,
                same_as=same.number,
                final=same.final,
            )
        try:
            # No other thread may load another merge before this one is scored.
            with self._lock:
                with stopwatch(seconds, "merge"):
                    candidate = level.load(recipe)
                with (
                    stopwatch(seconds, "evaluate"),
                    enforce_time_limit(self.goals.time_limit),
                ):
                    scores, final = self._score(asked, candidate, finished)
        except (ParetoMergeError, RuntimeError, MemoryError) as error:
            self._interrupts.raise_if_pressed()
            # torch reports exhausted memory as a RuntimeError. Any other exception is a bug, and
            # must not hide among failed trials.
            kind = type(error).__name__
            return replace(asked, failure=f"{kind}: {error}")
        violations = self.goals.violations(scores)
        return replace(asked, scores=scores, constraints=violations, final=final)

    def _score(
        self, asked: Trial, candidate: Candidate, finished: Sequence[Trial]
    ) -> tuple[dict[str, Score], bool]:
        """The scores, and whether they cover all examples."""
        # Baselines are never left early: users compare with them, and races are fitted to them.
        if self._race is None or asked.label:
            return self.goals.score(candidate, "search"), True
        return self._race.score(candidate, finished)


@contextmanager
def stopwatch(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Note the wall-clock seconds of a stage."""
    start = time.perf_counter()
    yield
    elapsed = time.perf_counter() - start
    seconds[stage] = round(elapsed, 4)
