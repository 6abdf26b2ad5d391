"""`Study`: a search over merges, from its settings to the picked checkpoint."""

import gc
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from paretomerge.arguments import (
    function,
    integer,
    optional,
    seconds,
    sequence_of,
)
from paretomerge.config.calibration import CalibrationData
from paretomerge.config.convert import check_functions, config_of, settings_of
from paretomerge.config.schema import StudyConfig, config_file, load_config
from paretomerge.config.settings import (
    Budget,
    Evaluation,
    SamplerSetting,
    SecondLevel,
    StudySettings,
)
from paretomerge.config.workers import RayWorkers
from paretomerge.decide.compare import Comparison, compare_scores
from paretomerge.decide.decision import ENOUGH, Decision
from paretomerge.decide.pick import (
    Choice,
    check_out,
    choose,
    decide_for,
    write_pick,
)
from paretomerge.decide.refinement import Refinement, refinements
from paretomerge.errors import ConfigError
from paretomerge.evaluate.evaluator import Score, Split
from paretomerge.evaluate.measures import Constraint, Measure, Task
from paretomerge.pareto.preference import PreferSetting
from paretomerge.record.record import Record
from paretomerge.record.results import Results
from paretomerge.record.storage import DEFAULT_STUDY_NAME
from paretomerge.record.trial import Trial, count_evaluated
from paretomerge.space.space import SearchSpace
from paretomerge.space.specs import LineageSpace, RouteSpace, WeightSpace
from paretomerge.study.held_out import score_missing
from paretomerge.study.preferring import preference_notes, refining_settings
from paretomerge.study.same_study import check_same_study, check_same_weights
from paretomerge.study.stopping import End
from paretomerge.study.trial_number import choice_of, number_of

if TYPE_CHECKING:
    import pandas
    from plotly.graph_objects import Figure

    from paretomerge.study.event import Event, HeldOutEvent
    from paretomerge.study.preview import StudyPreview
    from paretomerge.study.search import Search

Callback = Callable[["Study", Trial], None]

_PICK = "pick"
"""The record's note of what `pick` picks by default."""

_N_TRIALS = optional(integer(least=0))
_N_REFINED = integer(least=1)
_TIMEOUT = optional(seconds)
_CALLBACKS = sequence_of(function, "[my_callback]")


class Study:
    """A search over merges of fine-tuned models, with several objectives.

    Nothing is loaded until something must be evaluated. A finished study is read from its record
    alone.

    Args:
        base: The model that all others were fine-tuned from: a folder, or a name on the Hugging
            Face Hub.
        models: Two or more fine-tunes of it; `model+adapter` for a PEFT adapter.
        objectives: What to improve: `Task`, `Function`, `Perplexity`, `Judge`, `Sparsity`, `Size`.
        constraints: Bounds that a merge must satisfy to be on the front.
        watch: lm-evaluation-harness tasks that are scored on held-out examples only: names, or
            `Task` objects with settings of their own.
        space: What may vary: a `WeightSpace`, a `RouteSpace` or a `LineageSpace`.
        then: A second level, which searches routes through the models and the best merges.
        sampler: A name of docs/samplers.md, a mapping with `name` and options, or an Optuna
            sampler such as `MMMOSampler`.
        prefer: What you want: objective -> weight, or `mean`. The last 10 % of the trials improve
            it, and `pick` picks it by default. It may change while a study runs.
        budget: When the search ends, or a number of evaluations.
        starts: Recipe files to evaluate right after the sources.
        warm_start: Earlier studies over the same models (folder, study.yaml or database URL),
            whose trials are taken over.
        evaluation: How merges are scored.
        seed: The seed of the split into search and held-out examples, of random masks, and of
            samplers that are given by name.
        out: The study's folder. A study that is already there is continued.
        storage: An Optuna storage URL for the record, or the path of a SQLite file. By default a
            SQLite file in `out`.
        study_name: The study's name in that storage.
        dtype: The dtype that merges are scored and written in: `float32`, `float16` or
            `bfloat16`. By default the base's.
        tokenizer_source: The vocabulary of merges: `union`, `base`, or one of the models. By
            default the base's, and models with another one are refused.
        chat_template: The chat template of merges: a template, its name, or `auto`.
        allow_mismatch: Merge models that do not seem to belong together.
        device: `cpu`, `cuda` or `cuda:N`.
        sources: Where the base and the sources stay: `device`, or `mmap` for their files, which
            merges read block by block. By default on the device where they fit.
        workers: How many merges are evaluated at a time, each in a process of its own; with
            `device="cuda"` the processes are dealt to the visible GPUs. `"ray"` or
            `RayWorkers(...)` for a cluster.
        calibration: Statistics of the models on text, for the methods `regmean`, `regmean_pp` and
            `fisher`: their folder, or `{"data": {model: file or {"task": name}}}`, from which they
            are made in `out` before the first trial.

    Raises:
        ConfigError: Settings contradict each other, or an argument has a wrong type.

    Example:
        >>> import paretomerge as pm
        >>> study = pm.Study(
        ...     base="Qwen/Qwen2.5-0.5B",
        ...     models=["./math", "./code", "./chat"],
        ...     objectives=[pm.Task("arc_easy"), pm.Sparsity()],
        ...     space=pm.WeightSpace(methods=["task_arithmetic", "ties"], groups=2),
        ...     sampler=pm.MMMOSampler(seed=0),
        ...     out="runs/first",
        ... )
        >>> study.optimize(n_trials=60)  # doctest: +SKIP
        >>> trial = study.pick(prefer={"arc_easy": 0.7})  # doctest: +SKIP
        >>> study.save(trial, "merged")  # doctest: +SKIP
    """

    def __init__(  # noqa: PLR0913 - the keys of a study.yaml
        self,
        base: str | Path,
        models: Sequence[str | Path],
        objectives: Sequence[Measure],
        *,
        constraints: Sequence[Constraint] = (),
        watch: Sequence[str | Task] = (),
        space: WeightSpace | RouteSpace | LineageSpace | SearchSpace | None = None,
        then: SecondLevel | None = None,
        sampler: SamplerSetting = "mmmo",
        prefer: PreferSetting | None = None,
        budget: Budget | int = 60,
        starts: Sequence[str | Path] = (),
        warm_start: Sequence[str | Path] = (),
        evaluation: Evaluation | None = None,
        seed: int = 0,
        out: str | Path = "runs/study",
        storage: str | Path | None = None,
        study_name: str = DEFAULT_STUDY_NAME,
        dtype: str | None = None,
        tokenizer_source: str | Path | None = None,
        chat_template: str | None = None,
        allow_mismatch: bool = False,
        device: str = "cpu",
        sources: str | None = None,
        workers: int | str | RayWorkers = 1,
        calibration: str | Path | Mapping[str, Any] | CalibrationData | None = None,
    ) -> None:
        # Unconverted: the settings check and convert what they are given.
        arguments: dict[str, Any] = {
            "base": base,
            "models": models,
            "objectives": objectives,
            "constraints": constraints,
            "watch": watch,
            "space": WeightSpace() if space is None else space,
            "then": then,
            "sampler": sampler,
            "prefer": prefer,
            "budget": budget,
            "starts": starts,
            "warm_start": warm_start,
            "evaluation": Evaluation() if evaluation is None else evaluation,
            "seed": seed,
            "root": Path.cwd(),
            "out": out,
            "storage_url": storage,
            "study_name": study_name,
            "dtype": dtype,
            "tokenizer_source": tokenizer_source,
            "chat_template": chat_template,
            "allow_mismatch": allow_mismatch,
            "device": device,
            "sources": sources,
            "workers": workers,
            "calibration": calibration,
        }
        self.settings = StudySettings(**arguments)
        # Set by `stop` in a callback, and read between trials: a running trial is never cut off.
        self._stop_requested = False

    @classmethod
    def from_settings(cls, settings: StudySettings) -> "Study":
        """Make a study from settings.

        Args:
            settings: The settings.

        Returns:
            The study.
        """
        # `__init__` takes a user's arguments and would turn paths into text and back.
        study = cls.__new__(cls)
        study.settings = settings
        study._stop_requested = False
        return study

    @classmethod
    def from_config(cls, config: StudyConfig, folder: str | Path = ".") -> "Study":
        """Make a study from a study.yaml's content.

        Args:
            config: The content.
            folder: Where its relative paths start.

        Returns:
            The study.

        Raises:
            ConfigError: Settings contradict each other.
        """
        return cls.from_settings(settings_of(config, Path(folder)))

    def __getstate__(self) -> dict[str, object]:
        # The loaded search holds a model, a database and locks; a copy loads its own.
        return {"settings": self.settings, "_stop_requested": False}

    def __repr__(self) -> str:
        settings = self.settings
        names = ", ".join(measure.name for measure in settings.objectives)
        models = f"{len(settings.models)} models of {settings.base}"
        return f"Study({models}, objectives {names}, in {settings.out_folder})"

    @property
    def folder(self) -> Path:
        """The study's folder, absolute."""
        return self.settings.out_folder

    @cached_property
    def _search(self) -> "Search":
        # Imported here: `build` brings torch and the harness, which `status`, `front` and `report`
        # do without.
        from paretomerge.study.build import build_search

        return build_search(self.settings)

    def search(self) -> "Search":
        """Load the study: its evaluators, its levels and their models.

        Returns:
            The search.

        Raises:
            ParetoMergeError: As for `check`.
        """
        return self._search

    def close(self) -> None:
        """Let go of what is loaded: the models, the tasks, and an engine of another backend.

        The study can be used on; what is needed is then loaded again. `with pm.Study(...) as study`
        closes it at the end.
        """
        if "_search" in self.__dict__:
            del self.__dict__["_search"]
            # The parts of a search refer to each other. An engine's process ends with its object.
            gc.collect()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def evaluation_notes(self) -> list[str]:
        """What users should know about how merges were scored, once something was scored."""
        # Asking for notes must not load a study that has scored nothing in this process.
        if "_search" not in self.__dict__:
            return []
        notes = [*self._search.goals.notes, *self._search.notes]
        # Each worker notes the same.
        return list(dict.fromkeys(notes))

    def check(self) -> list[str]:
        """Check everything that can be checked without merging.

        This covers models, tasks, functions, the space and the record.

        Returns:
            Notes for the user, such as a source that is left out.

        Raises:
            ParetoMergeError: Something is missing or does not fit.
        """
        if "_search" not in self.__dict__:
            from paretomerge.study.build import build_search

            # With the models, so that their errors are reported with all others.
            self.__dict__["_search"] = build_search(self.settings, with_models=True)
        search = self._search
        notes = search.check_models()
        notes += [*search.space.notes, *search.warm_start.notes]
        if search.then is not None:
            notes += search.then.notes
        batch_size = self.settings.evaluation.batch_size
        # A plan is an estimate: it warns, and refuses nothing.
        notes += search.memory_plan(batch_size).problems
        return [*notes, *preference_notes(self.settings)]

    def preview(
        self, *, measure: bool = True, workers: int | None = None
    ) -> "StudyPreview":
        """Check the study as a search does before its first trial, and estimate its time.

        Nothing is recorded, and nothing is left behind.

        Args:
            measure: Whether a study without trials is measured on one merge in memory, which loads
                its models.
            workers: Number of live models that memory and time are planned for; by default the
                study's.

        Returns:
            The models, the scores, the trials, the memory, the disk space and the estimated times.

        Raises:
            ParetoMergeError: Something is missing or does not fit. All problems are reported at
                once.
        """
        from paretomerge.study.preview import preview_study

        workers = optional(integer(1))("workers", workers)
        return preview_study(self.settings, measure, workers)

    def optimize(
        self,
        n_trials: int | None = None,
        timeout: float | None = None,
        callbacks: Iterable[Callback] | None = None,
        *,
        show_progress_bar: bool = True,
        held_out: bool = True,
    ) -> None:
        """Search, continuing what is in the study's folder.

        Then the front is scored on held-out examples. You may interrupt the search at any time:
        every finished trial is on disk, and the next call continues as if never stopped.

        Args:
            n_trials: Evaluate this many more merges, as in Optuna. The baselines (each source, the
                uniform soup, ...) come first and count too. By default the search runs until the
                study's budget is spent.
            timeout: Stop after this many seconds; the running trial is finished first.
            callbacks: Functions that are called with the study and each finished trial.
                `study.stop()` in a callback ends the search.
            show_progress_bar: Show a progress bar, in terminals and notebooks.
            held_out: Score the baselines, the front and the watched tasks on held-out examples at
                the end.

        Raises:
            ConfigError: A setting cannot be applied.
            StudyError: Ten trials failed in a row, another process searches here, or the record
                belongs to another study.
        """
        from paretomerge.study.progress_bar import ProgressBar

        n_trials = _N_TRIALS("n_trials", n_trials)
        timeout = _TIMEOUT("timeout", timeout)
        # Before the first trial, which would use up an iterator.
        to_call = _CALLBACKS("callbacks", () if callbacks is None else callbacks)
        # A `stop` in an earlier call must not end this one.
        self._stop_requested = False
        self.check()
        self._search.check_weights()
        with (
            ProgressBar(show_progress_bar) as progress,
            self._search.executing(),
        ):

            def watch(event: "Event") -> None:
                progress.trial(event)
                for callback in to_call:
                    callback(self, event.trial)

            self.run(watch, n_trials, timeout)
            if held_out:
                self.score_held_out(progress.held_out)

    def run(
        self,
        watch: Callable[["Event"], None],
        n_trials: int | None = None,
        timeout: float | None = None,
    ) -> str:
        """Search and report progress to a callback; see `optimize`.

        Args:
            watch: Called after each trial.
            n_trials: As in `optimize`.
            timeout: As in `optimize`.

        Returns:
            Why the search ended.
        """
        search = self._search
        rule = replace(search.rule, requested=lambda: self._stop_requested)
        if n_trials is not None:
            # The rule counts all trials of the record; Optuna's `n_trials` means so many more.
            evaluated = count_evaluated(search.trials())
            rule = replace(rule, trials=evaluated + n_trials, overrules_stop=True)
            last_end = End.from_note(search.record.note("end"))
            if last_end is not None and last_end.stopped:
                # The search has stopped by `until`, and the user asks for more all the same.
                rule = replace(rule, until=None)
        if timeout is not None:
            rule = replace(rule, deadline=time.monotonic() + timeout)
        return search.run(rule, watch)

    def stop(self) -> None:
        """End the running search after the current trial; for callbacks, as in Optuna."""
        self._stop_requested = True

    def score_held_out(
        self, watch: Callable[["HeldOutEvent"], None] = lambda event: None
    ) -> None:
        """Score the baselines and the front on held-out examples.

        The sources and the knee are scored on the watched tasks too. Scores that are in the record
        are not measured again.

        Args:
            watch: Called after each trial that was scored.
        """
        results = self.results()
        if not results.front:
            return
        sources = []
        for trial in results.baselines:
            if trial.label in results.sources:
                sources.append(trial)
        # Watched tasks are expensive and only reported, so they are run on what the report shows:
        # the sources, and the trial that `pick` takes by default.
        picked = self.decide().trial
        compared = [*results.baselines, *results.front, picked]
        watched = [*sources, picked]
        self._hold_out(compared, watched, watch)
        self._note_pick(picked)

    def results(self) -> Results:
        """Read the record.

        Returns:
            A snapshot of what has finished.

        Raises:
            StudyError: There is no record yet, it cannot be read, or it is another study's.
        """
        record = self._record()
        check_same_study(self.settings, record)
        return record.results()

    def get_trials(self) -> list[Trial]:
        """Read every finished trial, in the order of their numbers.

        Returns:
            The trials; none before the search has begun.
        """
        if not self._has_record():
            return []
        return list(self.results().trials)

    def front(self) -> list[Trial]:
        """Read the Pareto front: the trials that no other dominates on the search examples.

        Returns:
            The trials, with held-out scores where they are measured.

        Raises:
            StudyError: There is no record yet, or it cannot be read.
        """
        return self.results().front

    def trials_dataframe(self) -> "pandas.DataFrame":
        """Read the trials as a pandas data frame.

        Returns:
            One row for each trial: number, label, state, search and held-out scores with standard
            errors, parameters, seconds. Column names are like `search_gsm8k`,
            `held_out_gsm8k_stderr` and `params_weight/math`.
        """
        import pandas

        from paretomerge.report.frames import dataframe_row

        rows = [dataframe_row(trial) for trial in self.get_trials()]
        return pandas.DataFrame(rows)

    def pick(
        self, prefer: PreferSetting | None = None, *, trial: int | None = None
    ) -> Trial:
        """Choose one trial; `decide` also says how sure the choice is.

        Args:
            prefer: See `decide`.
            trial: A trial's number, in place of a preference.

        Returns:
            The trial.

        Raises:
            ConfigError: There is no such trial or objective.
            StudyError: There is no record yet.
        """
        if trial is None:
            return self.decide(prefer).trial
        results = self.results()
        return choose(results, choice_of(results, prefer, trial))

    @property
    def default_choice(self) -> Choice:
        """How `pick` picks where nothing is said: by the study's `prefer`, or at the knee."""
        return Choice(self.settings.prefer)

    def decide(
        self,
        prefer: PreferSetting | None = None,
        watch: Callable[[Trial], None] = lambda trial: None,
    ) -> Decision:
        """Choose the trial that is best for a preference, and say how sure the choice is.

        Noisy scores are not taken at their word: the choice rests on what is believed of all trials
        (`Belief`). With `selection_items`, the trials that may be the best are scored on these
        examples first, until one of them is the best with a probability of 90 %; with
        `selection_repeats`, functions score them again. Held-out scores are never used.

        Args:
            prefer: Objective -> weight: the trial with the least weighted shortfall from the best
                of each objective (augmented Tchebycheff). Or `mean`: the best mean of the
                objectives. Or `knee`: the trial nearest to the best of all objectives. By default
                the study's own `prefer`, or else the knee.
            watch: Called with each trial that was scored on selection examples.

        Returns:
            The decision.

        Raises:
            ConfigError: There is no such objective, or no feasible trial has finished.
            StudyError: There is no record yet.
        """
        choice = self.default_choice if prefer is None else Choice(prefer)
        results = self.results()
        # First of all: an error of the choice must not cost an evaluation.
        decision = decide_for(results, choice)
        if not self.settings.evaluation.measures_finalists:
            return decision
        if decision.probability < ENOUGH:
            from paretomerge.study.selection import select

            evaluation = self.settings.evaluation
            select(
                self._search,
                choice.preference(results),
                watch,
                examples=evaluation.selection_items is not None,
                repeats=evaluation.selection_repeats or 0,
            )
            results = self.results()
            decision = decide_for(results, choice)
            if choice != self.default_choice:
                # What was measured may change the default pick, too.
                self._note_pick(decide_for(results, self.default_choice).trial)
            else:
                self._note_pick(decision.trial)
        return decision

    def refine(
        self,
        prefer: PreferSetting | None = None,
        n_trials: int = 4,
        watch: Callable[["Event"], None] = lambda event: None,
    ) -> list[Refinement]:
        """Evaluate recipes between the points of the front that a preference may prefer.

        The surrogate proposes each where the preference is expected to improve most.

        Args:
            prefer: As for `decide`. Without a preference, all objectives count alike.
            n_trials: The number of merges to evaluate.
            watch: Called after each trial.

        Returns:
            For each new trial, what was believed of it before it was scored, and the trial.

        Raises:
            ConfigError: There is no such objective.
            StudyError: There is no record yet.
        """
        n_trials = _N_REFINED("n_trials", n_trials)
        n_before = len(self.results().trials)
        refining = Study.from_settings(refining_settings(self.settings, prefer))
        refining.check()
        refining.run(watch, n_trials)
        # The record has grown behind the back of a search that was loaded before.
        self.__dict__.pop("_search", None)
        results = self.results()
        self._note_pick(decide_for(results, self.default_choice).trial)
        return refinements(results, n_before)

    def picked(self, choice: Choice | None = None) -> Trial:
        """The trial that a choice picks, by what the record holds: nothing is scored.

        Args:
            choice: How to pick; by default as `pick`.

        Returns:
            The trial.

        Raises:
            ConfigError: There is no such trial, or no feasible trial has finished.
        """
        choice = choice or self.default_choice
        results = self.results()
        noted = self._noted(results, choice)
        return choose(results, choice) if noted is None else noted

    def noted_pick(self, results: Results) -> Trial | None:
        """The trial that `pick` takes by default, without deciding anew.

        Args:
            results: The study's results.

        Returns:
            The trial; None where the record does not say, since trials have been added since.
        """
        return self._noted(results, self.default_choice)

    def _noted(self, results: Results, choice: Choice) -> Trial | None:
        note = self._record().note(_PICK) or {}
        is_current = note.get("trials") == len(results.trials)
        if not is_current or note.get("by") != choice.text:
            return None
        return choose(results, Choice(trial=note["picked"]))

    def _note_pick(self, trial: Trial) -> None:
        """Note the default pick: `front` and `report` then need no belief, which takes seconds."""
        n_trials = len(self.results().trials)
        note = {
            "by": self.default_choice.text,
            "trials": n_trials,
            "picked": trial.number,
        }
        self._record().set_note(_PICK, note)

    def save(
        self,
        trial: Trial | int,
        out: str | Path,
        *,
        overwrite: bool = False,
        picked_by: str = "",
    ) -> Path:
        """Write a trial's merge as a Hugging Face checkpoint, with its recipe and a model card.

        Held-out scores that are missing are measured first.

        Args:
            trial: The trial, or its number.
            out: A new folder.
            overwrite: Replace the folder if it exists.
            picked_by: How the trial was picked, for the model card, such as "the preference
                sort=0.7".

        Returns:
            The folder.

        Raises:
            CheckpointError: The folder exists, or cannot be written.
            StudyError: The models have other weights than when the trial was scored.
        """
        results = self.results()
        check_same_weights(self.settings, self._record())
        number = number_of(trial, results.trials)
        # Checked first: a folder that cannot be written must not cost a held-out evaluation.
        out = Path(out).expanduser()
        check_out(out, overwrite)
        chosen = choose(results, Choice(trial=number))
        self._hold_out([chosen], [chosen])
        # Trials are frozen: the new held-out scores are in the record, so it is read again.
        results = self.results()
        chosen = choose(results, Choice(trial=number))
        allow_mismatch = (
            self.settings.allow_mismatch or self._record().allows_mismatch()
        )
        return write_pick(results, chosen, out, picked_by, overwrite, allow_mismatch)

    def evaluate(
        self, model: str | Path | Trial | int, split: Split = "held_out"
    ) -> dict[str, Score]:
        """Score a checkpoint or a trial with the study's tasks.

        Args:
            model: A checkpoint's folder or Hub name, a trial or its number, or a baseline's name.
            split: `search` or `held_out`. On held-out examples the watched tasks are scored too.

        Returns:
            Name -> score. A trial's recorded scores are not measured again.

        Raises:
            ConfigError: There is no such trial.
            EvaluationError: The checkpoint cannot be scored.
        """
        return self._scores(model, split, watched=True)

    def compare(
        self,
        one: str | Path | Trial | int,
        other: str | Path | Trial | int,
        tasks: Sequence[str] = (),
        split: Split = "held_out",
    ) -> list[Comparison]:
        """Compare two models on the same examples.

        Args:
            one: A trial, its number, a baseline's name, or a checkpoint.
            other: The same.
            tasks: Scores to compare; by default all with per-example scores.
            split: `search` or `held_out`.

        Returns:
            For each score the paired difference, its 95 % interval and a p-value.

        Raises:
            ConfigError: There is no such trial or score.
        """
        measured = [measure.name for measure in self.settings.measures]
        # Watched tasks are run only where one of them is asked for by name.
        watched = any(task not in measured for task in tasks)
        first = self._scores(one, split, watched)
        second = self._scores(other, split, watched)
        return compare_scores(first, second, tasks)

    def report(
        self,
        path: str | Path | None = None,
        prefer: PreferSetting | None = None,
        *,
        trial: int | None = None,
    ) -> Path:
        """Write the study as one HTML file that opens without a network.

        Args:
            path: The file; by default `report.html` in the study's folder.
            prefer: Which trial to show as picked; see `pick`.
            trial: The same, by number.

        Returns:
            The file.
        """
        from paretomerge.report.html import write_report

        out = self.folder / "report.html"
        if path is not None:
            out = Path(path).expanduser()
        results = self.results()
        choice = choice_of(results, prefer, trial)
        if choice == Choice():
            choice = self.default_choice
        return write_report(results, out, choice, self.picked(choice))

    def plot_front(self, picked: Trial | int | None = None) -> "Figure":
        """Plot every pair of objectives on the search examples.

        Args:
            picked: A trial to mark, or its number.

        Returns:
            A plotly figure.
        """
        from paretomerge.report.plots import plot_front

        results = self.results()
        marked = None
        if picked is not None:
            number = number_of(picked, results.trials)
            marked = choose(results, Choice(trial=number))
        return plot_front(results, marked)

    def plot_hypervolume(self) -> "Figure":
        """Plot the hypervolume after each trial.

        Returns:
            A plotly figure.
        """
        from paretomerge.report.plots import plot_hypervolume

        return plot_hypervolume(self.results())

    def to_config(self) -> StudyConfig:
        """Describe the study as a study.yaml's content.

        Returns:
            The content.

        Raises:
            ConfigError: A file cannot describe it: a function is in no module, or the sampler or
                the space is an object of yours.
        """
        check_functions(self.settings)
        return config_of(self.settings)

    def to_yaml(self, path: str | Path | None = None) -> str:
        """Write the study as a study.yaml.

        Args:
            path: The file to write, in the folder that the study's relative paths start from. By
                default no file is written.

        Returns:
            The file's text.

        Raises:
            ConfigError: A file cannot describe the study, or it would be in another folder.
        """
        from paretomerge.config.dump import dump_config, write_config

        text = dump_config(self.to_config())
        if path is not None:
            write_config(text, Path(path).expanduser(), self.settings.root)
        return text

    def _record(self) -> Record:
        # `_search` is a cached property, which is in `__dict__` once it has been built. Reading a
        # record must not build it.
        if self._has_begun():
            return self._search.record
        return Record.read(self.settings.storage)

    def _has_record(self) -> bool:
        # A database server has no file to look for; reading it says whether the study is there.
        file = self.settings.storage.file
        if file is None or self._has_begun():
            return True
        return file.is_file()

    def _has_begun(self) -> bool:
        return "_search" in self.__dict__ and self._search.has_record

    def _hold_out(
        self,
        trials: Sequence[Trial],
        watched: Sequence[Trial],
        watch: Callable[["HeldOutEvent"], None] = lambda event: None,
    ) -> None:
        """Score trials on held-out examples; see `score_missing`."""
        record = self._record()
        score_missing(self.settings, record, self.search, trials, watched, watch)

    def _scores(
        self, model: str | Path | Trial | int, split: Split, watched: bool
    ) -> dict[str, Score]:
        if split not in ("search", "held_out"):
            raise ConfigError(f"split: use search or held_out, not {split!r}")
        trial = self._trial_of(model)
        if trial is None:
            from paretomerge.study.checkpoint_scores import score_checkpoint

            with self._search.live:
                return dict(score_checkpoint(self._search, str(model), split))
        if split == "search":
            return dict(trial.scores)
        self._hold_out([trial], [trial] if watched else [])
        trial = self.results().trial(trial.number)
        assert trial is not None
        return dict(trial.held_out or {})

    def _trial_of(self, model: str | Path | Trial | int) -> Trial | None:
        """The trial of a number or a baseline's name; None for what can only be a checkpoint."""
        trials = self.get_trials()
        if not isinstance(model, str | Path):
            model = str(number_of(model, trials))
        name = str(model)
        for trial in trials:
            # Digits are a number, also where a model's folder is named by a number.
            is_named = trial.is_baseline and trial.label == name and not name.isdigit()
            if is_named or str(trial.number) == name:
                if trial.failure:
                    raise ConfigError(f"{name}: this trial failed: {trial.failure}")
                return trial
        # A number is never a checkpoint, and a word without a slash is no name on the Hub: the user
        # most likely mistyped a baseline.
        may_be_checkpoint = Path(name).exists() or "/" in name
        if name.isdigit() or not may_be_checkpoint:
            labels = [trial.label for trial in trials if trial.is_baseline]
            if not trials:
                raise ConfigError(
                    f"{name}: there is no such checkpoint, and no trial has finished; run the "
                    "search first"
                )
            raise ConfigError(
                f"{name}: name a trial below {len(trials)}, a checkpoint, or one of: "
                f"{', '.join(labels)}"
            )
        return None


def load_study(path: str | Path, overrides: Sequence[str] = ()) -> Study:
    """Read a study from a study.yaml. Nothing is loaded yet.

    Args:
        path: The file, or a folder that holds a study.yaml. Relative paths in it start from the
            file's folder.
        overrides: Keys to set in place of the file's, such as `evaluate.batch_size=32`.

    Returns:
        The study.

    Raises:
        ConfigError: The file cannot be read, or has a wrong key or value.

    Example:
        >>> load_study("study.yaml").optimize()  # doctest: +SKIP
    """
    path = config_file(path)
    config = load_config(path, overrides)
    try:
        settings = settings_of(config, path.resolve().parent, path.stem)
    except ConfigError as error:
        parts = tuple(f"{path}: {part}" for part in error.parts)
        raise ConfigError(f"{path}: {error}", parts) from error
    return Study.from_settings(settings)
