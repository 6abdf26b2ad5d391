"""The loop over one level: ask, merge, evaluate, tell.

A finished trial is on disk before the next one is asked for.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from paretomerge.errors import StudyError
from paretomerge.evaluate.evaluator import Score
from paretomerge.record.record import Record
from paretomerge.record.results import hypervolume_of, reference_of
from paretomerge.record.trial import Trial, count_evaluated
from paretomerge.study.event import Event
from paretomerge.study.executor import Executor, stopwatch
from paretomerge.study.level import Level
from paretomerge.study.optimiser import Optimiser
from paretomerge.study.stopping import End, StoppingRule

# So many failures in a row have a cause outside the candidates, such as a broken task.
_MOST_FAILURES_IN_A_ROW = 10


class Loop:
    """One run of a study.

    Attributes:
        finished: Every finished trial, in the order of their numbers; the loop adds to it.
    """

    def __init__(
        self,
        record: Record,
        executor: Executor,
        total: int,
        watch: Callable[[Event], None],
    ) -> None:
        self.finished = record.trials()
        self._record = record
        self._executor = executor
        self._total = total
        self._watch = watch

    def explore(self, level: Level, rule: StoppingRule, last_end: End | None) -> End:
        """Search one level until the rule ends it.

        Args:
            level: The level.
            rule: When to stop.
            last_end: How the latest run ended.

        Returns:
            How this one ended.

        Raises:
            StudyError: Ten trials failed in a row, or the record cannot be written.
        """
        finished = self.finished
        begun = len(finished)
        # Who reads the record knows from this which parameters of a trial mattered.
        self._record.set_conditions(level.number, level.space.conditions)
        optimiser = Optimiser(level, self._record)
        agenda = deque(level.agenda(finished))
        if finished or any(trial.warm_start for trial in agenda):
            # The random state of Optuna's samplers is not in the record. A new process starts from
            # the seed, and without this it would propose its first points again.
            level.sampler.reseed_rng()
        # Recipes are compared across levels and runs: a merge that was scored once is never
        # scored again.
        by_recipe = self._scored_recipes(level)
        while True:
            # The trial refers to this dict, so stages may fill it after the trial is made.
            seconds: dict[str, float] = {}
            start = agenda.popleft() if agenda else None
            if start is not None and start.scores:
                trial = self._take_over(start, level, optimiser)
            else:
                # A start that the user added is tried even after the study stopped because little
                # was to be gained.
                heeded_end = None if start else last_end
                end = rule.before_asking(finished, heeded_end, begun)
                if end:
                    return end
                self._executor.prepare(level)
                with stopwatch(seconds, "ask"):
                    asked = optimiser.ask(start)
                end = rule.after_asking(asked.gain, finished, last_end, level.number)
                if end:
                    return end
                trial = self._executor.evaluate(
                    asked, level, finished, by_recipe, seconds
                )
                # From here on the trial is on disk. A killed process loses at most the trial that
                # it was scoring.
                with stopwatch(seconds, "record"):
                    optimiser.tell(trial)
            finished.append(trial)
            # A failed recipe is tried again when it is proposed again: the cause may have gone.
            if not trial.failure:
                by_recipe.setdefault(level.recipe(trial.params).key, trial)
            if not trial.warm_start:
                self._report(trial, seconds)
            _stop_if_all_fail(finished)

    def _scored_recipes(self, level: Level) -> dict[str, Trial]:
        """Recipe key -> the first trial that scored it, of all levels."""
        by_recipe: dict[str, Trial] = {}
        for trial in self.finished:
            if not trial.failure:
                by_recipe.setdefault(trial.recipe.key, trial)
        return by_recipe

    def _take_over(self, start: Trial, level: Level, optimiser: Optimiser) -> Trial:
        """Add another study's trial, with those of its scores that this study needs."""
        # Violations are computed again: this study may have other bounds on the same scores.
        goals = self._executor.goals
        scores = {name: start.scores[name] for name in goals.score_names}
        trial = replace(
            start,
            number=len(self.finished),
            scores=scores,
            constraints=goals.violations(scores),
            recipe_yaml=level.recipe(start.params).to_yaml(),
        )
        optimiser.take_over(trial)
        held_out: dict[str, Score] = {}
        for name, score in (trial.held_out or {}).items():
            if name in scores:
                held_out[name] = score
        if held_out:
            self._record.add_held_out(trial.number, "objectives", held_out)
        return trial

    def _report(self, trial: Trial, seconds: Mapping[str, float]) -> None:
        objectives = self._record.objectives
        sources = self.finished[: len(self._record.sources)]
        reference = reference_of(sources, objectives)
        volume = hypervolume_of(self.finished, objectives, reference)
        done = count_evaluated(self.finished)
        event = Event(trial, done, self._total, volume, seconds)
        self._watch(event)


def _stop_if_all_fail(finished: Sequence[Trial]) -> None:
    latest = finished[-_MOST_FAILURES_IN_A_ROW:]
    if len(latest) < _MOST_FAILURES_IN_A_ROW:
        return
    if all(trial.failure for trial in latest):
        raise StudyError(
            f"the last {_MOST_FAILURES_IN_A_ROW} trials failed; the latest: {latest[-1].failure}"
        )
