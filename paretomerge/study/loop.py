"""The loop: ask, merge, evaluate, tell, level after level. Finished trials are on disk before the next is asked for."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from optuna.samplers import BaseSampler

from paretomerge.errors import ParetoMergeError, StudyError
from paretomerge.evaluate.evaluator import Candidate, Score
from paretomerge.evaluate.time_limit import enforce_time_limit
from paretomerge.record.record import Trial
from paretomerge.space.routes.space import hand_over, without_middle
from paretomerge.space.space import SearchSpace
from paretomerge.study.budget import Budget, End, evaluated
from paretomerge.study.hierarchy import POOL, scored_already
from paretomerge.study.known import agenda
from paretomerge.study.optimiser import Optimiser
from paretomerge.study.racing import Race

if TYPE_CHECKING:
    from paretomerge.study.study import Study

_FAILURES_IN_A_ROW = 10  # then the cause is not the candidate


@dataclass(frozen=True)
class Event:
    """What the loop tells whoever watches, once per trial that it made. `seconds` includes the writing of the record.

    done, total: trials that count towards the budget.
    """

    trial: Trial
    done: int
    total: int
    hypervolume: float
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class Level:
    """Where a study searches for a while. beforehand: start's name -> trial that its sampler is shown first."""

    number: int
    space: SearchSpace
    sampler: BaseSampler
    beforehand: Mapping[str, Trial] = field(default_factory=dict)


class Loop:
    """One run of a study, from what its record holds. last: how the latest one ended."""

    def __init__(
        self, study: "Study", budget: Budget, last: End | None, watch: Callable[[Event], None]
    ) -> None:
        self.study = study
        self.budget = budget
        self.last = last
        self.watch = watch
        self.finished = study.trials
        self.race = Race(study, study.goals.racing) if study.goals.racing else None

    def run(self) -> End:
        """Both levels, or the one that there is."""
        study, first = self.study, Level(0, self.study.space, self.study.sampler)
        if study.then is None:
            return self._explore(first, self.budget)
        if study.record.noted(POOL) is None:
            end = self._explore(
                first, replace(self.budget, trials=min(study.then.after, self.budget.trials))
            )
            if evaluated(self.finished) >= self.budget.trials:
                return end
            feasible = [t for t in self.finished if t.feasible and t.final]
            study.record.note(
                POOL,
                study.then.chosen(feasible, study.objectives, study.reference, study.space.sources),
            )
        second = Level(
            1,
            study.routes,
            study.then.sampler(study.routes),
            scored_already(study.routes, self.finished),
        )
        return self._explore(second, self.budget)

    def _explore(self, level: Level, budget: Budget) -> End:
        """One level, to its end."""
        study, finished = self.study, self.finished
        optimiser = Optimiser(
            level.sampler,
            study.record,
            level.space.distributions,
            level.number,
            tuple(level.beforehand.values()),
        )
        if finished or study.known.scored:
            # Optuna's samplers keep their random state to themselves: seeded anew, they would draw the first points again
            level.sampler.reseed_rng()
        scored = {study.recipe(t).key: t for t in reversed(finished) if not t.failure}
        coming, begun = deque(self._coming(level)), len(finished)
        while True:
            seconds: dict[str, float] = {}
            start = coming.popleft() if coming else None
            if start and start.scores:
                trial = self._take(start, len(finished), optimiser)
            elif end := budget.spent(finished, None if start else self.last, begun):
                return end
            else:
                with _clock(seconds, "ask"):
                    asked = optimiser.ask(start)
                if end := budget.gainless(asked.gain, finished, self.last, level.number):
                    return end
                trial = self._try(replace(asked, seconds=seconds), seconds, scored)
                with _clock(seconds, "record"):
                    optimiser.tell(trial)
            finished.append(trial)
            if not trial.failure:
                scored.setdefault(study.recipe(trial).key, trial)
            if not trial.warm:
                self.watch(
                    Event(
                        trial,
                        evaluated(finished),
                        self.budget.trials,
                        study.hypervolume(finished),
                        seconds,
                    )
                )
            _stop_if_hopeless(finished)

    def _coming(self, level: Level) -> list[Trial]:
        """What comes before the sampler's own proposals. In the second level: sources that the first could not score, then hand-overs
        from each member of the pool to the next, which are near each other; and where size matters, the members without their
        middle blocks: all that came before are equally deep, and say nothing of what a layer is worth.
        """
        study = self.study
        if not level.number:
            return agenda(
                level.space.starts(),
                len(level.space.sources),
                study.known,
                self.finished,
                study.key,
            )
        told = {*level.beforehand, *(t.label for t in self.finished if t.level)}
        members = list(study.pool)
        near = [
            hand_over(one, other)
            for one, other in zip(members, members[1:] + members[:1], strict=True)
        ]
        known = level.space.starts()
        starts = {name: known[name] for name in (*level.space.sources, *near) if name in known}
        if study.goals.sized:
            starts |= {
                without_middle(name): point
                for name in members
                if (point := study.routes.shorter(name))
            }
        return [
            Trial(-1, point, label=name, level=1)
            for name, point in starts.items()
            if name not in told
        ]

    def _take(self, trial: Trial, number: int, optimiser: Optimiser) -> Trial:
        """Another study's trial, with the scores on both splits that this one needs."""
        goals = self.study.goals
        scores = {name: trial.scores[name] for name in goals.scores}
        taken = replace(trial, number=number, scores=scores, constraints=goals.excesses(scores))
        optimiser.take(taken)
        if held_out := {
            name: score for name, score in (trial.held_out or {}).items() if name in scores
        }:
            self.study.record.add_held_out(number, "objectives", held_out)
        return taken

    def _try(self, asked: Trial, seconds: dict[str, float], scored: Mapping[str, Trial]) -> Trial:
        same = scored.get(self.study.recipe(asked).key)
        if same is not None:
            return replace(
                asked,
                scores=same.scores,
                constraints=same.constraints,
                same_as=same.number,
                final=same.final,
            )
        try:
            with _clock(seconds, "merge"):
                live = self.study.load(asked)
            with _clock(seconds, "evaluate"), enforce_time_limit(self.study.goals.time_limit):
                scores, final = self._score(asked, live)
        except (
            ParetoMergeError,
            RuntimeError,
            MemoryError,
        ) as error:  # torch tells of full memory by RuntimeError
            return replace(asked, failure=f"{type(error).__name__}: {error}")
        return replace(
            asked, scores=scores, constraints=self.study.goals.excesses(scores), final=final
        )

    def _score(self, asked: Trial, live: Candidate) -> tuple[dict[str, Score], bool]:
        """Scores, and whether of all items: known starts are never left."""
        if self.race is None or asked.label:
            return self.study.score(live, "search"), True
        return self.race.score(live, self.finished)


@contextmanager
def _clock(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 4)


def _stop_if_hopeless(finished: Sequence[Trial]) -> None:
    last = finished[-_FAILURES_IN_A_ROW:]
    if len(last) == _FAILURES_IN_A_ROW and all(t.failure for t in last):
        raise StudyError(
            f"the last {_FAILURES_IN_A_ROW} trials failed; the latest with: {last[-1].failure}"
        )
