"""A study: its spaces, its goals, its record; what has been found, and merges of it loaded and scored."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from optuna.distributions import distribution_to_json
from optuna.samplers import BaseSampler

from paretomerge.errors import StudyError
from paretomerge.evaluate.evaluator import Candidate, Score, Split
from paretomerge.merging.engine import usable_device
from paretomerge.merging.live.in_place import ResidentModel
from paretomerge.merging.live.routed import RoutedModel
from paretomerge.pareto.front import hypervolume, reference_point
from paretomerge.recipe import Recipe
from paretomerge.record.record import Record, Trial, on_front
from paretomerge.record.storage import Storage
from paretomerge.space.routes.space import RouteSearchSpace
from paretomerge.space.sources import digest
from paretomerge.space.space import SearchSpace
from paretomerge.study.budget import Budget, End
from paretomerge.study.goals import Goals
from paretomerge.study.hierarchy import POOL, Then, pool_name
from paretomerge.study.known import Known
from paretomerge.study.loop import Event, Loop


@dataclass(frozen=True)
class Placement:
    """How merges are held while they are scored. dtype: also of what is written; None for the base's."""

    dtype: str | None = None
    device: str = "cpu"


class Study:
    """A search over merges of one base's fine-tunes, and its record.

    space: what can be merged, and how. goals: what merges are scored on. sampler: any Optuna sampler. known: reads what is
    to be tried or taken over first; called once, when a search begins. folder: holds `study.db`, the default `storage`.
    identity: what makes trials comparable (see Record); by default the models, the parameters and the goals. then: a second level.
    """

    def __init__(
        self,
        folder: str | Path,
        space: SearchSpace,
        goals: Goals,
        sampler: BaseSampler,
        *,
        known: Callable[[], Known] = Known,
        storage: Storage | None = None,
        identity: Mapping[str, Any] | None = None,
        placement: Placement = Placement(),
        then: Then | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.space = space
        self.goals = goals
        self.evaluator = goals.evaluator
        self.watched = goals.watched
        self.objectives = goals.objectives
        self.sampler = sampler
        self.dtype = placement.dtype
        self.device = placement.device
        self.record = Record(
            storage or Storage.at(self.folder / "study.db"),
            self.objectives,
            identity or self._question,
        )
        self.then = then
        self._known = known
        self._reference: list[float] | None = None

    @property
    def _question(self) -> dict[str, Any]:
        distributions = json.dumps(
            {name: distribution_to_json(d) for name, d in self.space.distributions.items()},
            sort_keys=True,
        )
        return {
            "base": self.space.base,
            "sources": dict(self.space.sources),
            "distributions": hashlib.sha256(distributions.encode()).hexdigest()[:16],
            "objectives": [asdict(objective) for objective in self.objectives],
            "constraints": [constraint.text for constraint in self.goals.constraints],
            "dtype": self.dtype,
        }

    @cached_property
    def known(self) -> Known:
        """What is known before the search; read when it is first needed."""
        return self._known()

    @cached_property
    def _weights(self) -> str:
        """Which weights the names of models stand for."""
        found = [digest(model) for model in (self.space.base, *self.space.sources.values())]
        return hashlib.sha256(" ".join(found).encode()).hexdigest()[:16]

    @cached_property
    def resident(self) -> ResidentModel | RoutedModel:
        """The live model; loaded when it is first needed."""
        sources = tuple(self.space.sources.values())
        if self.space.routed:
            return RoutedModel(sources, self.dtype, self.device)
        return ResidentModel(self.space.base, sources, self.dtype, self.device)

    @cached_property
    def pool(self) -> dict[str, Recipe]:
        """The merges of the first level that the second takes from, by name; known once the first has ended."""
        numbers = self.record.noted(POOL)
        if numbers is None:
            raise StudyError(
                f"{self.folder}: expected a second level that has begun, got none yet; run `paretomerge search` on"
            )
        trials = self.trials
        return {pool_name(number): self.recipe(trials[number]) for number in numbers}

    @cached_property
    def routes(self) -> RouteSearchSpace:
        """The space of the second level."""
        assert self.then is not None
        return self.then.space(self.pool)

    @cached_property
    def routed(self) -> RoutedModel:
        """The live model of the second level; it shares the sources' tensors with the first one's."""
        sources = tuple(self.space.sources.values())
        return RoutedModel(sources, self.dtype, self.device, self.pool, self.resident.checkpoints)

    @property
    def trials(self) -> list[Trial]:
        return self.record.trials()

    @property
    def ended(self) -> str:
        """Why the latest run ended, where nothing has been added since; empty else."""
        end = End.read(self.record.noted("end"))
        return end.reason if end and end.total == len(self.trials) else ""

    @property
    def reference(self) -> list[float] | None:
        """The reference point of the hypervolume, inside directions: the worst of the sources less a margin."""
        if self._reference is not None:
            return self._reference
        sources = self.trials[: len(self.space.sources)]
        values = [t.values(self.objectives) for t in sources if not t.failure]
        reference: list[float] | None = reference_point(values).tolist() if values else None
        if len(sources) == len(
            self.space.sources
        ):  # finished trials never change, so the record need not be read again
            self._reference = reference
        return reference

    def recipe(self, trial: Trial) -> Recipe:
        """The recipe of a trial, in the dtype that was scored."""
        return self._recipe(trial.params, trial.level)

    def load(self, trial: Trial) -> Candidate:
        """The merge of a trial, loaded, as evaluators see it."""
        return self.live(self.recipe(trial), trial.level)

    def live(self, recipe: Recipe, level: int = 0) -> Candidate:
        """A recipe of either level, loaded, as evaluators see it."""
        holder = self.routed if level else self.resident
        merged = holder.load(recipe)
        return Candidate(
            merged.model, holder.tokenizer, merged.facts, f"{recipe.key} {self._weights}"
        )

    def starts(self) -> list[Trial]:
        """The known starts that could be scored, by number: sources first."""
        return [t for t in self.trials if t.is_start and not t.failure]

    def front(self) -> list[Trial]:
        """The feasible trials that no other dominates, by number; what was left half-scored is not among them."""
        return on_front([t for t in self.trials if t.feasible and t.final], self.objectives)

    def objectives_and_watched(self) -> list[str]:
        """Names of the objectives, then of whatever else was scored on held-out items."""
        seen = {name: None for t in self.trials if t.held_out for name in t.held_out}
        return list(dict.fromkeys([o.name for o in self.objectives] + list(seen)))

    def hypervolume(self, trials: Sequence[Trial]) -> float:
        """Of the feasible ones among `trials`, above the reference point; in units of the scores."""
        reference = self.reference
        values = [t.values(self.objectives) for t in trials if t.feasible and t.final]
        return hypervolume(values, reference) if values and reference else 0.0

    def run(self, budget: int | Budget, watch: Callable[[Event], None] = lambda event: None) -> str:
        """Search until the budget is spent; what the record holds already counts. Returns why it ended.

        Raises ConfigError where the device is not there, StudyError after ten failures in a row, with the last one's cause, and where
        another process searches in the same folder. Interrupt it whenever you like.
        """
        budget = Budget.of(budget)
        budget.check(self.sampler)
        if (
            self.then and budget.until is not None
        ):  # told now, not when the first level has been paid for
            budget.check(self.then.sampler(self.then.space({})))
        usable_device(self.device)
        with _alone(self.folder):
            end = Loop(self, budget, End.read(self.record.noted("end")), watch).run()
            self.record.note("end", asdict(end))
        return end.reason

    def hold_out(
        self,
        trials: Sequence[Trial],
        watch: Callable[[Trial], None] = lambda trial: None,
        *,
        watched: bool = False,
    ) -> None:
        """Score `trials` on the held-out items, with the watched tasks if `watched`; what is known is not scored again."""
        evaluators = {"objectives": self.evaluator} | (
            {"watched": self.watched} if watched and self.watched else {}
        )
        for trial in trials:
            known = self.record.held_out(trial.number)
            missing = [e for kind, e in evaluators.items() if kind not in known]
            if missing:
                live = self.load(trial)
                for kind, evaluator in evaluators.items():
                    if evaluator in missing:
                        self.record.add_held_out(
                            trial.number, kind, evaluator.evaluate(live, "held_out")
                        )
                scored = self.record.held_out(trial.number)
                watch(
                    replace(
                        trial,
                        held_out={
                            name: score
                            for scores in scored.values()
                            for name, score in scores.items()
                        },
                    )
                )

    def score(self, live: Candidate, split: Split) -> dict[str, Score]:
        """Objectives on the split, and on held-out items the watched tasks too."""
        scores = dict(self.evaluator.evaluate(live, split))
        if split == "held_out" and self.watched is not None:
            scores |= self.watched.evaluate(live, split)
        missing = [name for name in self.goals.scores if name not in scores]
        if missing:
            raise StudyError(
                f"expected a score named {missing[0]!r}, got {', '.join(scores) or 'none'}"
            )
        return {name: scores[name] for name in self.goals.scores} | scores

    def key(self, params: Mapping[str, Any]) -> str:
        """Which points of the first level's space are the same merge."""
        return self._recipe(params).key

    def _recipe(self, params: Mapping[str, Any], level: int = 0) -> Recipe:
        return replace((self.routes if level else self.space).recipe(params), dtype=self.dtype)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Two processes would number their trials alike, and each would search without what the other finds."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "study.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise StudyError(
            f"{folder}: expected to search here alone, got another process that does; wait for it or stop it"
        ) from error
    try:
        yield
    finally:
        lock.release()
