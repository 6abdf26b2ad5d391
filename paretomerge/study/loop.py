"""The loop over one level: ask, merge, evaluate, tell.

As many trials run as the executor takes. A trial that is done is on disk before the next one is
asked for, and no trial waits for another.
"""

from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import optuna

from paretomerge.errors import StudyError
from paretomerge.evaluate.evaluator import Score
from paretomerge.recipe import Recipe
from paretomerge.record.record import Record
from paretomerge.record.results import SearchHypervolume
from paretomerge.record.trial import Trial, count_evaluated
from paretomerge.study.claims import Claims
from paretomerge.study.event import Event
from paretomerge.study.executor import Executor
from paretomerge.study.goals import Goals
from paretomerge.study.level import Level
from paretomerge.study.optimiser import Asked, Optimiser
from paretomerge.study.stopping import End, StoppingRule
from paretomerge.study.trial_runner import Job, stopwatch

# So many failures in a row have a cause outside the candidates, such as a broken task.
_MOST_FAILURES_IN_A_ROW = 10


class Loop:
    """One run of a study.

    Attributes:
        finished: Every finished trial, in the order of their numbers; the loop adds to it.
        goals: What is scored.
    """

    def __init__(
        self,
        record: Record,
        executor: Executor,
        goals: Goals,
        total: int,
        watch: Callable[[Event], None],
    ) -> None:
        self.finished = record.trials()
        self.goals = goals
        self._record = record
        self._executor = executor
        self._total = total
        self._watch = watch
        self._hypervolume = SearchHypervolume(record.objectives, record.sources)

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
        # Who reads the record knows from this which parameters of a trial mattered.
        self._record.set_conditions(level.number, level.space.conditions)
        claims = Claims(self._record)
        run = _LevelRun(
            self, level, self._record, self._executor, rule, last_end, claims
        )
        try:
            while True:
                end = run.fill()
                if end:
                    return end
                for trial, seconds in run.collect():
                    self._report(trial, seconds)
                    _stop_if_all_fail(self.finished)
        finally:
            claims.close()

    def _report(self, trial: Trial, seconds: Mapping[str, float]) -> None:
        volume = self._hypervolume.of(self.finished)
        done = count_evaluated(self.finished)
        event = Event(trial, done, self._total, volume, seconds)
        self._watch(event)


@dataclass
class _Running:
    """A trial that is being evaluated.

    Attributes:
        asked: The trial, without scores.
        recipe: Its recipe.
        seconds: The times of its stages so far.
        start: The start that it was asked for; None for a proposal.
        repeats: Trials with the same recipe that were asked for meanwhile; they wait for its
            scores.
    """

    asked: Asked
    recipe: Recipe
    seconds: dict[str, float]
    start: Trial | None = None
    repeats: list["_Running"] = field(default_factory=list)

    @cached_property
    def key(self) -> str:
        """The key of its recipe."""
        # A digest of the whole content, which is asked for several times.
        return self.recipe.key


class _LevelRun:
    """The trials of one level that are lined up, running or done in one run."""

    def __init__(
        self,
        loop: Loop,
        level: Level,
        record: Record,
        executor: Executor,
        rule: StoppingRule,
        last_end: End | None,
        claims: Claims,
    ) -> None:
        self._finished = loop.finished
        self._goals = loop.goals
        self._level = level
        self._record = record
        self._executor = executor
        self._rule = rule
        self._last_end = last_end
        self._begun = len(loop.finished)
        self._optimiser = Optimiser(level, record)
        self._agenda = deque(level.agenda(loop.finished))
        if loop.finished or any(trial.warm_start for trial in self._agenda):
            # The random state of Optuna's samplers is not in the record. A new process starts from
            # the seed, and without this it would propose its first points again.
            level.sampler.reseed_rng()
        # Recipes are compared across levels and runs: a merge that was scored once is never
        # scored again.
        self._by_recipe: dict[str, Trial] = {}
        for trial in loop.finished:
            self._note_recipe(trial.recipe.key, trial)
        self._running: dict[int, _Running] = {}
        # The proposal that may end the search, while other trials run.
        self._held: _Running | None = None
        # What other processes are scoring: key of the recipe -> the trial that shows it.
        self._claims = claims
        self._shown: dict[str, optuna.Trial] = {}
        # Of the agenda: what others are scoring.
        self._blocked: list[Trial] = []
        # Trials that are done and not yet reported, with the seconds of their stages.
        self._done: list[tuple[Trial, Mapping[str, float]]] = []

    @property
    def _n_running(self) -> int:
        """The number of trials that run, or wait for the scores of one that runs."""
        return sum(1 + len(running.repeats) for running in self._running.values())

    def fill(self) -> End | None:
        """Submit trials until the executor takes no more.

        Returns:
            How the run ends, once nothing runs any more; None while it goes on.
        """
        while self._n_running < self._executor.capacity and not self._done:
            # What runs may still change whether the search ends.
            end = self._submit_next()
            if end:
                return None if self._running else end
        return None

    def collect(self) -> list[tuple[Trial, Mapping[str, float]]]:
        """Wait until a trial is done, and record it.

        Returns:
            The trials that are done, with the seconds of their stages.
        """
        if not self._done:
            self._finish(self._executor.next_done())
        done = self._done
        self._done = []
        return done

    def _submit_next(self) -> End | None:
        """Ask for the next trial and submit it.

        Returns:
            How the search ends, if nothing more is to be evaluated.
        """
        self._learn_from_others()
        while self._agenda and self._agenda[0].scores:
            self._take_over(self._agenda.popleft())
        start = self._agenda[0] if self._agenda else None
        # A start that the user added is tried even after the study stopped because little was to be
        # gained.
        heeded_end = None if start else self._last_end
        end = self._rule.before_asking(
            self._finished, heeded_end, self._begun, self._n_running
        )
        if end:
            return end
        running = self._held or self._ask(start)
        self._held = None
        end = self._rule.after_asking(
            running.asked.trial.gain, self._finished, self._last_end, self._level.number
        )
        if end:
            self._held = running
            return end
        self._begin(running)
        return None

    def _ask(self, start: Trial | None) -> _Running:
        if start is not None:
            self._agenda.popleft()
        seconds: dict[str, float] = {}
        with stopwatch(seconds, "ask"):
            asked = self._optimiser.ask(start)
        recipe = self._level.recipe(asked.trial.params)
        return _Running(asked, recipe, seconds, start)

    def _begin(self, running: _Running) -> None:
        """Evaluate a trial, or take the scores of one with the same recipe."""
        # Different parameters may give the same recipe: one may be inactive, or a weight may be 0.
        same = self._by_recipe.get(running.key)
        if same is not None:
            self._repeat(running, same)
            return
        for other in self._running.values():
            if other.key == running.key:
                other.repeats.append(running)
                return
        recipe = running.recipe
        trial = replace(running.asked.trial, recipe_yaml=recipe.to_yaml())
        self._claims.claim(running.key, trial.params, trial.level)
        if self._claims.is_contested(running.key, trial.level):
            # Another process has asked at the same moment.
            self._claims.release(running.key)
            self._shown[running.key] = running.asked.handle
            self._optimiser.withdraw()
            if running.start is not None:
                self._blocked.append(running.start)
            return
        self._executor.submit(Job(trial, recipe, self._level.pool, self._finished))
        self._running[trial.number] = running

    def _repeat(self, running: _Running, same: Trial) -> None:
        """Give a trial the scores of another one with the same recipe."""
        trial = replace(
            running.asked.trial,
            recipe_yaml=running.recipe.to_yaml(),
            scores=same.scores,
            constraints=same.constraints,
            same_as=same.number,
            final=same.final,
        )
        self._tell(running, trial)

    def _finish(self, trial: Trial) -> None:
        """Record a trial that is done, and those that waited for its scores."""
        running = self._running.pop(trial.number)
        recorded = self._tell(running, trial)
        waiting = deque(running.repeats)
        while waiting:
            repeat = waiting.popleft()
            if not recorded.failure:
                self._repeat(repeat, recorded)
                continue
            # A failed recipe is tried again: the cause may have gone.
            self._begin(repeat)

    def _tell(self, running: _Running, trial: Trial) -> Trial:
        running.seconds.update(trial.seconds)
        trial = replace(trial, seconds=running.seconds)
        # From here on the trial is on disk. A killed process loses at most the trials that it was
        # scoring.
        with stopwatch(running.seconds, "record"):
            trial = self._optimiser.tell(running.asked, trial)
            self._claims.release(running.key)
        self._finished.append(trial)
        self._note_recipe(running.key, trial)
        self._done.append((trial, running.seconds))
        return trial

    def _learn_from_others(self) -> None:
        """Take in what other processes that search this study have scored, and are scoring."""
        if not self._claims.shared:
            return
        if self._record.count() > len(self._finished):
            known = {trial.number for trial in self._finished}
            for trial in self._record.trials():
                if trial.number not in known:
                    key = trial.recipe.key
                    self._optimiser.add_other(trial, self._shown.pop(key, None))
                    self._finished.append(trial)
                    self._note_recipe(key, trial)
            self._finished.sort(key=lambda trial: trial.number)
        claimed = set()
        for claim in self._claims.others(self._level.number):
            claimed.add(claim.key)
            if claim.key not in self._shown and claim.key not in self._by_recipe:
                self._shown[claim.key] = self._optimiser.show_running(claim.params)
        self._order_agenda(claimed)

    def _order_agenda(self, claimed: Collection[str]) -> None:
        """Leave out what others have scored, and put off what they are scoring."""
        labels = {trial.label for trial in self._finished}
        starts = [*self._agenda, *self._blocked]
        self._agenda.clear()
        self._blocked.clear()
        for start in starts:
            if start.label and start.label in labels:
                continue
            key = self._level.recipe(start.params).key
            if key in claimed:
                self._blocked.append(start)
            else:
                self._agenda.append(start)

    def _note_recipe(self, key: str, trial: Trial) -> None:
        # A failed recipe is tried again when it is proposed again: the cause may have gone.
        if not trial.failure:
            self._by_recipe.setdefault(key, trial)

    def _take_over(self, start: Trial) -> None:
        """Add another study's trial, with those of its scores that this study needs."""
        # Violations are computed again: this study may have other bounds on the same scores.
        goals = self._goals
        scores = {name: start.scores[name] for name in goals.score_names}
        trial = replace(
            start,
            number=len(self._finished),
            scores=scores,
            constraints=goals.violations(scores),
            recipe_yaml=self._level.recipe(start.params).to_yaml(),
        )
        trial = self._optimiser.take_over(trial)
        held_out: dict[str, Score] = {}
        for name, score in (trial.held_out or {}).items():
            if name in scores:
                held_out[name] = score
        if held_out:
            self._record.add_held_out(trial.number, "objectives", held_out)
        self._finished.append(trial)
        self._note_recipe(trial.recipe.key, trial)


def _stop_if_all_fail(finished: Sequence[Trial]) -> None:
    latest = finished[-_MOST_FAILURES_IN_A_ROW:]
    if len(latest) < _MOST_FAILURES_IN_A_ROW:
        return
    if all(trial.failure for trial in latest):
        raise StudyError(
            f"the last {_MOST_FAILURES_IN_A_ROW} trials failed; the latest: {latest[-1].failure}"
        )
