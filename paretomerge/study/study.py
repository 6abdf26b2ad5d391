"""The loop: ask, merge, evaluate, tell. Finished trials are on disk before the next is asked for."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import BaseSampler
from optuna.trial import TrialState

from paretomerge.errors import ParetoMergeError, StudyError
from paretomerge.evaluate.evaluator import Evaluator, Live, Objective, Score, Split
from paretomerge.merge.resident import ResidentModel
from paretomerge.pareto.front import hypervolume, nondominated, reference_point
from paretomerge.recipe import Recipe
from paretomerge.space.weights import WeightSpace
from paretomerge.study.record import Record, Trial

_FAILURES_IN_A_ROW = 5  # then the cause is not the candidate


@dataclass(frozen=True)
class Event:
    """What the loop tells whoever watches, once per finished trial. `seconds` includes the writing of the record."""

    trial: Trial
    done: int
    total: int
    hypervolume: float
    seconds: Mapping[str, float]


class Study:
    """A search over merges of one base's fine-tunes, and its record.

    space: what can be merged, and how. evaluator: its scores include every objective's name. watched: scores that are
    only looked at, on held-out items. sampler: any Optuna sampler. folder: holds `study.db` unless `storage` says else.
    """

    def __init__(
        self,
        folder: str | Path,
        space: WeightSpace,
        evaluator: Evaluator,
        objectives: Sequence[Objective],
        sampler: BaseSampler,
        *,
        watched: Evaluator | None = None,
        storage: str | None = None,
        identity: Mapping[str, Any] | None = None,
        dtype: str | None = None,
        device: str = "cpu",
    ) -> None:
        self.folder = Path(folder)
        self.space = space
        self.evaluator = evaluator
        self.watched = watched
        self.objectives = tuple(objectives)
        self.sampler = sampler
        self.dtype = dtype
        self.device = device
        where = storage or f"sqlite:///{self.folder / 'study.db'}"
        self.record = Record(where, "paretomerge", self.objectives, identity or {})
        self._reference: list[float] | None = None

    @cached_property
    def resident(self) -> ResidentModel:
        """The live model; loaded when it is first needed."""
        return ResidentModel(self.space.base, tuple(self.space.sources.values()), self.dtype, self.device)

    @property
    def trials(self) -> list[Trial]:
        return self.record.trials()

    @property
    def reference(self) -> list[float] | None:
        """The reference point of the hypervolume, inside directions: the worst of the sources less a margin."""
        if self._reference is not None:
            return self._reference
        sources = self.trials[: len(self.space.sources)]
        values = [t.values(self.objectives) for t in sources if not t.failure]
        reference: list[float] | None = reference_point(values).tolist() if values else None
        if len(sources) == len(self.space.sources):  # finished trials never change, so the record need not be read again
            self._reference = reference
        return reference

    def recipe(self, trial: Trial) -> Recipe:
        """The recipe of a trial, in the dtype that was scored."""
        return self._recipe(trial.params)

    def front(self) -> list[Trial]:
        """The trials that no other dominates, by number."""
        done = [t for t in self.trials if not t.failure]
        mask = nondominated([t.values(self.objectives) for t in done])
        return [t for t, on_front in zip(done, mask, strict=True) if on_front]

    def objectives_and_watched(self) -> list[str]:
        """Names of the objectives, then of whatever else was scored on held-out items."""
        seen = {name: None for t in self.trials if t.held_out for name in t.held_out}
        return list(dict.fromkeys([o.name for o in self.objectives] + list(seen)))

    def hypervolume(self, trials: Sequence[Trial]) -> float:
        reference = self.reference
        values = [t.values(self.objectives) for t in trials if not t.failure]
        return hypervolume(values, reference) if values and reference else 0.0

    def run(self, trials: int, watch: Callable[[Event], None] = lambda event: None) -> None:
        """Search until the record holds `trials` trials; what is there already counts.

        Raises StudyError after five failures in a row, with the last one's cause. Interrupt it whenever you like.
        """
        finished = self.trials
        if finished:
            # Optuna's samplers keep their random state to themselves: seeded anew, they would draw the first points again
            self.sampler.reseed_rng()
        memory = self._memory(finished)
        distributions = self.space.distributions
        known = {self.recipe(t).key: t for t in finished if not t.failure}
        for number in range(len(finished), trials):
            seconds: dict[str, float] = {}
            with _clock(seconds, "ask"):
                asked = memory.ask(distributions)
            trial = self._try(asked.number, asked.params, asked.user_attrs.get("label", ""), seconds, known)
            with _clock(seconds, "record"):
                asked.set_user_attr("stderr", self._stderr(trial))
                told = memory.tell(asked, *self._told(trial))
                self.record.add(trial, distributions, told.system_attrs)
            finished.append(trial)
            if not trial.failure:
                known.setdefault(self.recipe(trial).key, trial)
            watch(Event(trial, number + 1, trials, self.hypervolume(finished), seconds))
            _stop_if_hopeless(finished)

    def hold_out(self, trials: Sequence[Trial], watch: Callable[[Trial], None] = lambda trial: None, *, watched: bool = False) -> None:
        """Score `trials` on the held-out items, with the watched tasks if `watched`; what is known is not scored again."""
        evaluators = {"objectives": self.evaluator} | ({"watched": self.watched} if watched and self.watched else {})
        for trial in trials:
            known = self.record.held_out(trial.number)
            missing = [e for kind, e in evaluators.items() if kind not in known]
            if missing:
                live = self.live(self.resident.load(self.recipe(trial)).l1)
                for kind, evaluator in evaluators.items():
                    if evaluator in missing:
                        self.record.add_held_out(trial.number, kind, evaluator.evaluate(live, "held_out"))
                watch(trial)

    def live(self, l1: float) -> Live:
        """The resident model as evaluators see it."""
        return Live(self.resident.model, self.resident.tokenizer, {"sparsity": -l1})

    def score(self, live: Live, split: Split) -> dict[str, Score]:
        """Objectives on the split, and on held-out items the watched tasks too."""
        scores = dict(self.evaluator.evaluate(live, split))
        if split == "held_out" and self.watched is not None:
            scores |= self.watched.evaluate(live, split)
        missing = [o.name for o in self.objectives if o.name not in scores]
        if missing:
            raise StudyError(f"expected a score named {missing[0]!r}, got {', '.join(scores) or 'none'}")
        return scores

    def _try(self, number: int, params: Mapping[str, Any], label: str, seconds: dict[str, float], known: Mapping[str, Trial]) -> Trial:
        recipe = self._recipe(params)
        same = known.get(recipe.key)
        if same is not None:
            return Trial(number, params, same.scores, label, seconds=seconds)
        try:
            with _clock(seconds, "merge"):
                merged = self.resident.load(recipe)
            with _clock(seconds, "evaluate"):
                scores = self.score(self.live(merged.l1), "search")
        except (ParetoMergeError, RuntimeError, MemoryError) as error:  # torch tells of full memory by RuntimeError
            return Trial(number, params, label=label, failure=f"{type(error).__name__}: {error}", seconds=seconds)
        return Trial(number, params, scores, label, seconds=seconds)

    def _recipe(self, params: Mapping[str, Any]) -> Recipe:
        return replace(self.space.recipe(params), dtype=self.dtype)

    def _stderr(self, trial: Trial) -> list[float]:
        return [0.0 if trial.failure else trial.scores[o.name].stderr for o in self.objectives]

    def _told(self, trial: Trial) -> tuple[list[float] | None, TrialState]:
        if trial.failure:
            return None, TrialState.FAIL
        return trial.values(self.objectives), TrialState.COMPLETE

    def _memory(self, finished: Sequence[Trial]) -> optuna.Study:
        """A study in memory with the trials so far and the known starts that are still to come."""
        study = optuna.create_study(directions=["maximize"] * len(self.objectives), sampler=self.sampler)
        study.add_trials(self.record.frozen())
        for label, params in list(self.space.starts().items())[len(finished) :]:
            study.enqueue_trial(params, user_attrs={"label": label})
        return study


@contextmanager
def _clock(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 4)


def _stop_if_hopeless(finished: Sequence[Trial]) -> None:
    last = finished[-_FAILURES_IN_A_ROW:]
    if len(last) == _FAILURES_IN_A_ROW and all(t.failure for t in last):
        raise StudyError(f"the last {_FAILURES_IN_A_ROW} trials failed; the latest with: {last[-1].failure}")
