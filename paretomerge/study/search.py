"""A study with everything loaded: its record, its goals and its levels."""

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from optuna.distributions import distribution_to_json
from optuna.samplers import BaseSampler

from paretomerge.checkpoint.operand import read_tensor
from paretomerge.config.settings import SourcesSetting
from paretomerge.errors import (
    ErrorCollector,
    EvaluationError,
    StudyError,
)
from paretomerge.evaluate.evaluator import Candidate, Score, Split
from paretomerge.merging.engine import usable_device
from paretomerge.merging.plan.make import open_weights
from paretomerge.merging.plan.plan import Weights
from paretomerge.recipe import Recipe
from paretomerge.record.folder import LOCK_FILE, folder_error, make_folder
from paretomerge.record.record import Header, Record
from paretomerge.record.results import Results
from paretomerge.record.storage import Storage
from paretomerge.record.trial import Trial, count_evaluated
from paretomerge.space.space import SearchSpace
from paretomerge.study.agenda import WarmStart, first_agenda
from paretomerge.study.event import Event
from paretomerge.study.executor import Executor, InProcess, executed
from paretomerge.study.goals import Goals
from paretomerge.study.interrupt import Interrupts
from paretomerge.study.level import Level
from paretomerge.study.live_models import LiveModels
from paretomerge.study.loop import Loop
from paretomerge.study.memory import (
    MemoryPlan,
    models_of,
    plan_memory,
    this_machine,
)
from paretomerge.study.model_check import check_models, model_kind
from paretomerge.study.placement import DEFAULT_PLACEMENT, Placement
from paretomerge.study.second_level import (
    POOL,
    SecondLevelPlan,
    already_scored,
    pool_name,
    second_agenda,
)
from paretomerge.study.stopping import End, StoppingRule
from paretomerge.study.trial_runner import HeldOutKind, Job, TrialRunner


class Search:
    """A study at work: its record, its goals and its levels.

    Args:
        folder: Holds `study.db`, the default record, and the lock.
        space: The first level's search space.
        goals: What merges are scored on.
        sampler: Any Optuna sampler for that space.
        warm_start: Reads the points to try and the trials to take over first. It is called once,
            when a search begins.
        storage: Where the record is. It is created when it is first needed.
        identity: What makes trials comparable; by default the models, the parameters and the goals.
        placement: The dtype, the device and the tokenizer of merges.
        then: A second level.
        rule: When the search ends by default.
        executor: Makes what evaluates trials, given where models stay between merges; by default
            this process does.
        workers: The number of live models on this machine.

    Attributes:
        notes: What the user should know about how merges were scored elsewhere.

    Raises:
        StudyError: The record holds trials of another study, or cannot be read or written.
    """

    def __init__(  # noqa: PLR0913 - the parts of a study, which build.py makes
        self,
        folder: str | Path,
        space: SearchSpace,
        goals: Goals,
        sampler: BaseSampler,
        *,
        warm_start: Callable[[], WarmStart] = WarmStart,
        storage: Storage | None = None,
        identity: Mapping[str, Any] | None = None,
        placement: Placement = DEFAULT_PLACEMENT,
        then: SecondLevelPlan | None = None,
        rule: StoppingRule | None = None,
        executor: Callable[[SourcesSetting], Executor] | None = None,
        workers: int = 1,
    ) -> None:
        self.folder = Path(folder)
        # A merge is written into the one live model, so a thread that scores holds it until then.
        self.live = threading.RLock()
        self._interrupts = Interrupts()
        self.notes: list[str] = []
        self.space = space
        self.goals = goals
        self.sampler = sampler
        self.placement = placement
        self.models = LiveModels(space, placement, lambda: self.sources)
        self.then = then
        self.rule = rule or StoppingRule(60)
        self.workers = workers
        self._executor_elsewhere = executor
        self._executor: Executor | None = None
        self._read_warm_start = warm_start
        self._header = Header(
            goals.objectives,
            tuple(space.sources),
            identity or _default_identity(space, goals, placement),
        )
        self._storage = storage or Storage.at(self.folder / "study.db")
        # Before any model is loaded.
        Record.check(self._storage, self._header)

    @property
    def has_record(self) -> bool:
        """Whether the record has been opened or created by this search."""
        # A cached property is in `__dict__` once it has been computed.
        return "record" in self.__dict__

    @cached_property
    def record(self) -> Record:
        """The record; it is created where there is none."""
        record = Record.begin(self._storage, self._header)
        record.note_root()
        if self.placement.allow_mismatch:
            record.allow_mismatch()
        return record

    @cached_property
    def warm_start(self) -> WarmStart:
        """Points and trials from outside the study; read when they are first needed."""
        return self._read_warm_start()

    @cached_property
    def first_level(self) -> Level:
        """The level that the study begins with."""
        return Level(
            0,
            self.space,
            self.sampler,
            self.models,
            self.placement,
            agenda=self._first_agenda,
        )

    @cached_property
    def sources(self) -> SourcesSetting:
        """Where the base and the sources stay: as the settings say, or where they fit."""
        if self.placement.sources is not None:
            return self.placement.sources
        return self.memory_plan().sources

    def memory_plan(
        self, batch_size: int = 1, workers: int | None = None
    ) -> MemoryPlan:
        """Plan the peak memory on this machine, from the headers of the models.

        Args:
            batch_size: Sequences of one forward pass.
            workers: Number of live models; by default the study's.

        Returns:
            The plan, with what does not fit.

        Raises:
            ParetoMergeError: The models cannot be read or merged.
        """
        pool = 0
        if self.then is not None:
            pool = 1 if self.then.prefer else self.then.front
        device = self.placement.device
        models = models_of(self.space, self.placement, batch_size, pool)
        machine = this_machine(self.folder, device)
        return plan_memory(
            models, machine, device, self.placement.sources, workers or self.workers
        )

    @cached_property
    def pool(self) -> dict[str, Recipe]:
        """Name -> recipe of the first level's merges that the second takes from.

        Raises:
            StudyError: The second level has not begun.
        """
        numbers = self.record.note(POOL)
        if numbers is None:
            raise StudyError(
                f"{self.folder}: the second level has not begun; continue the search"
            )
        trials = self.record.trials()
        recipes: dict[str, Recipe] = {}
        for number in numbers:
            recipe = self.first_level.recipe(trials[number].params)
            # It becomes a step of other recipes, and only a result has a chat template.
            recipes[pool_name(number)] = replace(recipe, chat_template=None)
        return recipes

    @cached_property
    def second_level(self) -> Level:
        """The level of routes, once the first has ended."""
        assert self.then is not None
        # Sources and pool members have scores from the first level. The sampler sees these, and
        # nothing is scored twice.
        space = self.then.space(self.pool)
        scored = already_scored(space, self.record.trials())

        def agenda(finished: list[Trial]) -> list[Trial]:
            return second_agenda(
                space, self.pool, finished, scored, self.goals.includes_size
            )

        return Level(
            1,
            space,
            self.then.sampler(space),
            self.models,
            self.placement,
            self.pool,
            agenda,
            tuple(scored.values()),
        )

    def level_of(self, trial: Trial) -> Level:
        """The level that a trial belongs to."""
        return self.second_level if trial.level else self.first_level

    def results(self) -> Results:
        """Read the record."""
        return self.record.results()

    def trials(self) -> list[Trial]:
        """Read every finished trial, in the order of their numbers."""
        return self.record.trials()

    def front(self) -> list[Trial]:
        """Read the trials that no other dominates."""
        return self.results().front

    def check_models(self) -> list[str]:
        """Check the device, and that the models can be merged, from their headers alone.

        Returns:
            Notes on what does not fit, such as tensors that a model lacks, and what becomes of it.

        Raises:
            ParetoMergeError: The device is not there, models are missing, cannot be read, or do
                not belong together, or they lack a score.
        """
        notes = check_models(self.space, self.placement)
        self.goals.check_model_kind(model_kind(self.space))
        return notes

    def check_weights(self) -> None:
        """Read every tensor, unless the record holds a score of these models already.

        What a live model in this process keeps in memory or maps is not read again.

        Raises:
            CheckpointError: A file is damaged, or holds NaN. One error reports all such models.
        """
        if self._has_scores():
            return
        problems = ErrorCollector()
        checkpoints: Mapping[str, Weights]
        if self._executor_elsewhere is None:
            checkpoints = self.first_level.model.checkpoints
        else:
            models = (self.space.base, *self.space.sources.values())
            checkpoints = open_weights(models)
        for weights in checkpoints.values():
            with problems.collect():
                for name in weights.headers:
                    # What is computed at each merge is computed here once more.
                    read_tensor(weights.operand(name))
        problems.raise_if_any()

    def recipe(self, trial: Trial) -> Recipe:
        """The recipe of a trial, in the dtype that is scored."""
        return self.level_of(trial).recipe(trial.params)

    def load(self, trial: Trial) -> Candidate:
        """Merge a trial into the live model of its level."""
        return self.level_of(trial).load(self.recipe(trial))

    def score(self, candidate: Candidate, split: Split) -> dict[str, Score]:
        """Score a candidate; see `Goals.score`."""
        return self.goals.score(candidate, split)

    def run(
        self,
        rule: int | StoppingRule | None = None,
        watch: Callable[[Event], None] = lambda event: None,
    ) -> str:
        """Search until the rule ends it; what the record holds already counts.

        Interrupt it whenever you like.

        Args:
            rule: When to stop, or a number of evaluations; by default the search's own rule.
            watch: Called after each trial that the run made.

        Returns:
            Why it ended.

        Raises:
            ConfigError: The device is not there, or a sampler does not suit the rule.
            StudyError: Ten trials failed in a row, or another process searches in the same folder.
        """
        if rule is None:
            rule = self.rule
        elif isinstance(rule, int):
            rule = StoppingRule(rule)
        rule.check_sampler(self.sampler)
        if self.then and rule.until is not None:
            # Checked now: an error after the first level would waste hours of evaluations.
            sources_alone = self.then.space({})
            rule.check_sampler(self.then.sampler(sources_alone))
        # Checked before the first trial: a missing device must not fill the record with failures.
        usable_device(self.placement.device)
        requested = rule.requested
        rule = replace(rule, requested=lambda: requested() or self._interrupts.pressed)
        with self._alone(), self._interrupts.watched():
            end = self._explore(rule, watch)
            # An interrupted search has not come to its end.
            if not self._interrupts.pressed:
                self.record.set_note("end", asdict(end))
        return end.reason

    @contextmanager
    def executing(self) -> Iterator[Executor]:
        """Start what evaluates trials, such as worker processes, and stop it at the end.

        Inside, `run` and `hold_out` share it: workers load their models once.

        Yields:
            The executor; inside another `with`, that one's.
        """
        if self._executor is not None:
            yield self._executor
            return
        with self._make_executor() as executor:
            self._executor = executor
            try:
                yield executor
            finally:
                self._executor = None
                self.notes += executor.notes

    def hold_out(
        self,
        trials: Sequence[Trial],
        watch: Callable[[Trial], None] = lambda trial: None,
        *,
        watched: bool = False,
    ) -> None:
        """Score trials on the held-out examples; what is in the record is not scored again.

        Args:
            trials: Trials without failures.
            watch: Called with each trial that was scored.
            watched: Also score what is only watched.

        Raises:
            EvaluationError: A trial cannot be scored; the message names it.
        """
        kinds: list[HeldOutKind] = ["objectives"]
        if watched and self.goals.watched is not None:
            kinds.append("watched")
        by_number = {trial.number: trial for trial in trials}
        # A trial is reported when all of it is scored.
        parts_left: Counter[int] = Counter()

        def missing() -> Iterator[Job]:
            # Read when a job is due: another process may score the same study.
            for trial in by_number.values():
                recorded = self.record.held_out(trial.number)
                unscored = [kind for kind in kinds if kind not in recorded]
                parts_left[trial.number] += len(unscored)
                for kind in unscored:
                    yield self._held_out_job(trial, kind)

        with self.executing() as executor:
            for job, done in executed(executor, missing()):
                number = done.number
                if done.failure:
                    name = by_number[number].name
                    reason = done.failure.removeprefix("EvaluationError: ")
                    raise EvaluationError(f"{name}, on held-out examples: {reason}")
                # Each kind is written at once: an interrupted run loses what is being scored.
                self.record.add_held_out(number, job.held_out, done.held_out or {})
                parts_left[number] -= 1
                if not parts_left[number]:
                    held_out: dict[str, Score] = {}
                    for scores in self.record.held_out(number).values():
                        held_out |= scores
                    watch(replace(by_number[number], held_out=held_out))

    def _held_out_job(self, trial: Trial, kind: HeldOutKind) -> Job:
        level = self.level_of(trial)
        # Scores of thousands of examples need not be sent to a worker and back.
        bare = Trial(trial.number, trial.params, level=trial.level)
        return Job(bare, self.recipe(trial), level.pool, held_out=kind)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other processes out, unless they can cooperate through the database."""
        if self._storage.file is None:
            make_folder(self.folder)
            yield
            return
        with _locked(self.folder):
            yield

    def _has_scores(self) -> bool:
        """Whether the record holds a trial that did not fail."""
        try:
            trials = Record.read(self._storage, to_search=True).trials()
        except StudyError:  # there is no record yet
            return False
        return any(not trial.failure for trial in trials)

    def _explore(self, rule: StoppingRule, watch: Callable[[Event], None]) -> End:
        # A study that stopped because little was to be gained must not go on with the same budget.
        last_end = End.from_note(self.record.note("end"))
        with self.executing() as executor:
            loop = Loop(self.record, executor, self.goals, rule.trials, watch)
            return self._explore_levels(loop, rule, last_end)

    def _explore_levels(
        self, loop: Loop, rule: StoppingRule, last_end: End | None
    ) -> End:
        if self.then is None:
            return loop.explore(self.first_level, rule, last_end)
        if self.record.note(POOL) is None:
            # The pool is chosen once and written down: a resumed study, or one with a larger
            # budget, keeps its models.
            first_total = min(self.then.after, rule.trials)
            first_rule = replace(rule, trials=first_total)
            end = loop.explore(self.first_level, first_rule, last_end)
            # A timeout or a callback may have ended the first level early. Then the next run
            # continues it.
            evaluated = count_evaluated(loop.finished)
            first_level_done = evaluated >= self.then.after or end.stopped
            if evaluated >= rule.trials or not first_level_done:
                return end
            self._choose_pool(loop.finished)
        return loop.explore(self.second_level, rule, last_end)

    def _make_executor(self) -> Executor:
        if self._executor_elsewhere is not None:
            return self._executor_elsewhere(self.sources)
        runner = TrialRunner(
            self.goals,
            self.models,
            list(self.space.sources),
            self.live,
            on_error=self._interrupts.raise_if_insisted,
        )
        return InProcess(runner)

    def _choose_pool(self, finished: Sequence[Trial]) -> None:
        assert self.then is not None
        feasible = [trial for trial in finished if trial.can_be_on_front]
        reference = self.results().reference
        pool = self.then.choose_pool(
            feasible, self.goals.objectives, reference, self.space.sources
        )
        self.record.set_note(POOL, pool)

    def _first_agenda(self, finished: list[Trial]) -> list[Trial]:
        return first_agenda(
            self.space.baselines(),
            len(self.space.sources),
            self.warm_start,
            finished,
            lambda params: self.first_level.recipe(params).key,
        )


def _default_identity(
    space: SearchSpace, goals: Goals, placement: Placement
) -> dict[str, Any]:
    distributions: dict[str, str] = {}
    for name, distribution in space.distributions.items():
        distributions[name] = distribution_to_json(distribution)
    # Wide spaces have hundreds of parameters; a digest keeps the record short.
    text = json.dumps(distributions, sort_keys=True)
    text_digest = hashlib.sha256(text.encode()).hexdigest()
    return {
        "base": space.base,
        "sources": dict(space.sources),
        "distributions": text_digest[:16],
        "objectives": [asdict(objective) for objective in goals.objectives],
        "constraints": [constraint.text for constraint in goals.constraints],
        "dtype": placement.dtype,
        "tokenizer_source": placement.tokenizer_source,
        "chat_template": placement.chat_template,
    }


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes out while this one searches.

    Two processes would give their trials the same numbers, and neither sampler would see the
    other's trials.
    """
    make_folder(folder)
    # The operating system frees the lock of a killed process, so no stale file blocks a resume.
    # No long wait: the other search may take hours, and the user should hear of it now. A second,
    # for `is_searched` holds the lock for an instant.
    lock = FileLock(folder / LOCK_FILE, timeout=1)
    try:
        lock.acquire()
    except Timeout as error:
        raise StudyError(
            f"Another process is already searching in {folder}. Stop it, or set another `out`. "
            "To score several merges at a time, set `workers`"
        ) from error
    except OSError as error:
        raise folder_error(folder, error) from error
    try:
        yield
    finally:
        lock.release()
