"""The settings of a study as frozen objects, as `Study(...)` and study.yaml give them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from optuna.samplers import BaseSampler

from paretomerge.arguments import (
    Reader,
    describe,
    flag,
    instance_of,
    integer,
    label,
    mapping_of,
    model,
    number,
    optional,
    path,
    plain_data,
    read_fields,
    sequence_of,
    word,
)
from paretomerge.config.calibration import CalibrationData, as_calibration
from paretomerge.config.workers import RayWorkers, as_workers
from paretomerge.errors import ConfigError, ErrorCollector, unknown_name
from paretomerge.evaluate.measures import (
    PROMPT_READERS,
    Constraint,
    Measure,
    Perplexity,
    Size,
    Sparsity,
    Task,
    not_a_measure,
)
from paretomerge.pareto.preference import KNEE, MEAN, Preference, PreferSetting
from paretomerge.record.storage import DEFAULT_STUDY_NAME, Storage
from paretomerge.space.sources import model_path
from paretomerge.space.space import SearchSpace
from paretomerge.space.specs import LineageSpace, RouteSpace, WeightSpace
from paretomerge.space.weights.layers import SINGLE_GROUP, Grouping

DTYPES = ("float32", "float16", "bfloat16")
SourcesSetting = Literal["mmap", "device"]
"""Where the base and the sources stay."""

SOURCES: tuple[SourcesSetting, ...] = get_args(SourcesSetting)
SamplerSetting = str | Mapping[str, Any] | BaseSampler
"""A sampler's name, its name and options, or an Optuna sampler."""

_ABOVE_ZERO = (
    "search_items",
    "held_out_items",
    "selection_items",
    "selection_repeats",
    "batch_size",
    "time_limit",
)
_DEVICE = re.compile(r"cpu|cuda(:\d+)?")


@dataclass(frozen=True)
class Budget:
    """When a search ends.

    Attributes:
        trials: Evaluations of the first level. Trials from a warm start and repeated recipes do not
            count.
        until: End earlier, once the sampler expects each proposal to add less than this share of
            the hypervolume.
        patience: The number of proposals in a row for which `until` must hold.

    Raises:
        ConfigError: A number is out of range, or is no number.

    Example:
        >>> Budget(trials=100, until=0.01).patience
        5
    """

    trials: int = 60
    until: float | None = None
    patience: int = 5

    def __post_init__(self) -> None:
        read_fields(self, {"trials": integer(1)})
        read_fields(self, _BUDGET_READERS, "budget.")
        if self.until is not None and not 0 < self.until < 1:
            raise ConfigError(
                f"budget.until: a share above 0 and below 1, such as 0.01, not {self.until}"
            )


@dataclass(frozen=True)
class Evaluation:
    """How merges are scored.

    Attributes:
        include_path: A folder with task YAMLs of your own.
        data_root: The folder that relative `data_files` in them start from. By default the
            current folder; of a study.yaml, its folder.
        splits: The data set's splits to use: `{"search": ..., "held_out": ...}`.
        search_items: Examples of each task to search on; the rest are held out. By default half of
            them, at most 200. With `splits`: the most examples of the search split, by default all.
        held_out_items: The most held-out examples of each task; by default all.
        selection_items: Examples of each task that nothing else uses, by which a pick is made among
            the best trials. With `splits`: examples of the search split beyond `search_items`.
            By default none.
        selection_repeats: How often the best trials are scored again for a pick, by functions whose
            scores are random. By default never.
        batch_size: Sequences in one forward pass.
        cache: A file that keeps per-example scores across studies.
        backend: `vllm`, or another model of the harness, in place of the model in memory; or
            `{"name": ..., option: ...}`.
        race: The confidence, such as 0.95, at which a candidate is left before all its examples
            are scored; None to score all.
        time_limit: Seconds that scoring one candidate on the search examples may take.
        num_fewshot: Examples before each question of the harness's tasks, as `--num_fewshot`. By
            default each task's own number.
        apply_chat_template: Put questions as chats, with the base's chat template.
        fewshot_as_multiturn: Make examples turns of the chat. By default with a chat template.
        system_instruction: The chat's system message, or text before each question.
        gen_kwargs: Settings of generation, such as `{"max_gen_toks": 64}`.
        think_end_token: Where a model's thoughts end, such as `</think>`. Only what it writes
            behind it is its answer. A text, or the number of a token.
        add_bos_token: Whether prompts begin with the token that begins a sequence. By default as
            the base's tokenizer does it.

    Raises:
        ConfigError: Two settings exclude each other, a number is out of range, or an argument has
            a wrong type.

    Example:
        >>> Evaluation(search_items=200).batch_size
        16
    """

    include_path: str | None = None
    data_root: str | None = None
    splits: Mapping[str, str] | None = None
    search_items: int | None = None
    held_out_items: int | None = None
    selection_items: int | None = None
    selection_repeats: int | None = None
    batch_size: int = 16
    cache: str | None = None
    backend: str | Mapping[str, Any] | None = None
    race: float | None = None
    time_limit: float | None = None
    num_fewshot: int | None = None
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool | None = None
    system_instruction: str | None = None
    gen_kwargs: Mapping[str, Any] | None = None
    think_end_token: str | int | None = None
    add_bos_token: bool | None = None

    def __post_init__(self) -> None:
        read_fields(self, _EVALUATION_READERS, "evaluate.")
        if self.fewshot_as_multiturn and not self.apply_chat_template:
            raise ConfigError(
                "evaluate.fewshot_as_multiturn: needs `apply_chat_template`"
            )
        if self.splits is not None and set(self.splits) != {"search", "held_out"}:
            raise ConfigError(
                f"evaluate.splits: name `search` and `held_out`, not {', '.join(self.splits)}"
            )
        if self.race is not None and not 0.5 <= self.race < 1:
            raise ConfigError(
                f"evaluate.race: a confidence of 0.5 or more and below 1, not {self.race}"
            )
        loads_again = self.backend and self.backend_name != "vllm"
        if self.race is not None and loads_again:
            raise ConfigError(
                f"evaluate.race: does not work with the backend {self.backend_name}, which would "
                "load each merge again for every few examples"
            )
        for name in _ABOVE_ZERO:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"evaluate.{name}: must be above 0, not {value}")
        if self.selection_items and self.splits and self.search_items is None:
            raise ConfigError(
                "evaluate.selection_items: set `search_items`, too, so that examples of the search "
                "split are left over"
            )

    @property
    def measures_finalists(self) -> bool:
        """Whether a pick may score the best trials once more."""
        return bool(self.selection_items or self.selection_repeats)

    @property
    def backend_name(self) -> str | None:
        """The name of the backend, without its options."""
        if isinstance(self.backend, Mapping):
            return str(self.backend["name"])
        return self.backend

    def prompt_settings(self, task: Task) -> dict[str, Any]:
        """How a task's questions are put: its own settings, and the study's where it has none.

        Args:
            task: The task.

        Returns:
            Each name of `PROMPT_READERS` -> the value.

        Raises:
            ConfigError: The task has turns of a chat, and no chat.
        """
        settings = {}
        for key in PROMPT_READERS:
            own = getattr(task, key)
            settings[key] = getattr(self, key) if own is None else own
        if settings["fewshot_as_multiturn"] and not settings["apply_chat_template"]:
            if task.fewshot_as_multiturn:
                raise ConfigError(
                    f"{task.name}: fewshot_as_multiturn: needs `apply_chat_template`"
                )
            # The study's, which means its chats.
            settings["fewshot_as_multiturn"] = None
        return settings


@dataclass(frozen=True)
class SecondLevel:
    """A second search after the first (HM3, arXiv 2409.18893).

    It searches routes through the sources and the best merges of the first level.

    Attributes:
        routes: Its search space.
        trials: Evaluations of the second level.
        front: The most merges that it takes from the first level's front. It takes those that add
            most to the hypervolume. By default 4.
        prefer: Weights of the objectives, in place of `front`. The second level then takes only the
            merge that this preference picks.
        sampler: By default the first level's.

    Raises:
        ConfigError: Two settings exclude each other, a number is out of range, or an argument has
            a wrong type.

    Example:
        >>> SecondLevel(RouteSpace(blocks=4), trials=20).trials
        20
    """

    routes: RouteSpace = field(default_factory=RouteSpace)
    trials: int = 60
    front: int | None = None
    prefer: Mapping[str, float] | None = None
    sampler: SamplerSetting | None = None

    def __post_init__(self) -> None:
        read_fields(self, _SECOND_LEVEL_READERS, "then.")
        # Scales are matched on the files of models, and merges of the first level have none.
        if self.routes.match is not None:
            raise ConfigError(
                "then.routes.match: the second level has no hand-overs to begin with"
            )
        if self.front is not None and self.prefer is not None:
            raise ConfigError("then: set one of `front` and `prefer`, not both")
        if self.prefer is not None:
            weights = self.prefer.values()
            # `not >` and not `<=`: NaN fails every comparison, and so is refused here.
            if min(weights, default=0) < 0 or not sum(weights) > 0:
                raise ConfigError(
                    "then.prefer: weights of 0 or more, one of them above 0, not "
                    f"{dict(self.prefer)}"
                )
        front = 1 if self.front is None else self.front
        if self.trials < 1 or front < 1:
            raise ConfigError("then: `trials` and `front` must be 1 or more")


@dataclass(frozen=True)
class StudySettings:
    """Everything that a study.yaml can say.

    The fields take what `Study(...)` takes, and store it converted to their types.

    Attributes:
        base: The model that all others were fine-tuned from: a folder or a name on the Hugging
            Face Hub.
        models: The fine-tunes, two or more; `model+adapter` for a PEFT adapter.
        objectives: What to improve.
        constraints: Bounds that a merge must satisfy.
        watch: What is scored on held-out examples and never searched on; a name alone becomes a
            `Task`.
        space: What may vary.
        then: A second level.
        sampler: A name of docs/samplers.md, a mapping with `name` and options, or an Optuna
            sampler.
        prefer: What the user wants. The last trials improve it, and `pick` picks it by default. It
            may change while a study runs.
        budget: When the search ends.
        starts: Recipe files to evaluate right after the sources.
        warm_start: Earlier studies over the same models, whose trials are taken over.
        evaluation: How merges are scored.
        seed: The seed of the split into search and held-out examples, of random masks and of
            samplers.
        root: The folder that relative paths start from.
        out: The study's folder.
        storage_url: The database of its record, as Optuna takes it. By default a SQLite file in
            `out`.
        study_name: The study's name in that database.
        dtype: The dtype that merges are scored and written in. By default the base's.
        tokenizer_source: The vocabulary of merges: `union`, `base`, or one of the models. By
            default the base's, and models with another one are refused.
        chat_template: The chat template of merges: a template, its name, or `auto`. By default the
            tokenizer's own.
        calibration: Statistics of the models on text, for methods that need data: their folder, or
            the text of each model, from which they are made in `out` before the first trial.
        allow_mismatch: Whether models are merged that do not seem to belong together.
        device: `cpu`, `cuda` or `cuda:N`.
        sources: Where the base and the sources stay: `device`, or `mmap` for their files, which
            merges read block by block. None for `device` where it fits.
        threads: Threads of the command line's process; None to leave them alone.
        workers: How many trials are evaluated at a time, each in a process of its own; 1 for this
            process. `"ray"`, `RayWorkers(...)` or `{"ray": {...}}` for a cluster.

    Raises:
        ConfigError: Settings contradict each other, or an argument has a wrong type.
    """

    base: str
    models: tuple[str, ...]
    objectives: tuple[Measure, ...]
    constraints: tuple[Constraint, ...] = ()
    watch: tuple[Measure, ...] = ()
    space: WeightSpace | RouteSpace | LineageSpace | SearchSpace = field(
        default_factory=WeightSpace
    )
    then: SecondLevel | None = None
    sampler: SamplerSetting = "mmmo"
    prefer: PreferSetting | None = None
    budget: Budget = field(default_factory=Budget)
    starts: tuple[str, ...] = ()
    warm_start: tuple[str, ...] = ()
    evaluation: Evaluation = field(default_factory=Evaluation)
    seed: int = 0
    root: Path = field(default_factory=Path.cwd)
    out: Path = Path("runs/study")
    storage_url: str | None = None
    study_name: str = DEFAULT_STUDY_NAME
    dtype: str | None = None
    tokenizer_source: str | None = None
    chat_template: str | None = None
    allow_mismatch: bool = False
    device: str = "cpu"
    sources: SourcesSetting | None = None
    threads: int | None = None
    workers: int | RayWorkers = 1
    calibration: str | CalibrationData | None = None

    def __post_init__(self) -> None:
        # Types first: the checks below rest on them.
        read_fields(self, _STUDY_READERS)
        errors = ErrorCollector()
        for check in (
            self._check_counts,
            self._check_dtype,
            self._check_base,
            self._check_out,
            self._check_names,
            self._check_prompts,
            self._check_levels,
            self._check_preference,
            self._check_tokenizer,
            self._check_calibration,
        ):
            with errors.collect():
                check()
        errors.raise_if_any()

    @property
    def out_folder(self) -> Path:
        """The study's folder, absolute."""
        return (self.root / self.out).resolve()

    @property
    def calibration_folder(self) -> Path | None:
        """The folder of the statistics, absolute; None for a study without."""
        if self.calibration is None:
            return None
        if isinstance(self.calibration, CalibrationData):
            return self.out_folder / "calibration"
        return (self.root / self.calibration).resolve()

    @property
    def result_tokenizer_source(self) -> str | None:
        """The source of the tokenizer as recipes name it: local paths are absolute."""
        source = self.tokenizer_source
        if source in (None, "union", "base"):
            return source
        path = model_path(self.root, source)
        return "base" if path == model_path(self.root, self.base) else path

    @property
    def storage(self) -> Storage:
        """Where the record is."""
        if self.storage_url is None:
            storage = Storage.at(self.out_folder / "study.db", self.study_name)
        else:
            storage = Storage(self.storage_url, self.study_name).relative_to(self.root)
        return replace(storage, root=str(self.root.resolve()))

    @property
    def total_trials(self) -> int:
        """Evaluations of both levels."""
        if self.then is None:
            return self.budget.trials
        return self.budget.trials + self.then.trials

    @property
    def measures(self) -> tuple[Measure, ...]:
        """The objectives, then the measures that only constraints use."""
        # A bound on an objective's measure has the objective's name, and is scored once.
        measures = {measure.name: measure for measure in self.objectives}
        for constraint in self.constraints:
            if not isinstance(constraint.measure, str):
                measures.setdefault(constraint.score, constraint.measure)
        return tuple(measures.values())

    def _check_counts(self) -> None:
        if len(self.models) < 2:
            raise ConfigError(f"models: name two or more, not {len(self.models)}")
        if not self.objectives:
            raise ConfigError("objectives: name one or more")

    def _check_dtype(self) -> None:
        if self.dtype not in (None, *DTYPES):
            raise ConfigError(f"dtype: {unknown_name('dtype', self.dtype, DTYPES)}")

    def _check_base(self) -> None:
        # As paths, so that two spellings of one folder are equal; names on the Hub stay different.
        base = (self.root / self.base).resolve()
        for source in self.models:
            if (self.root / source).resolve() == base:
                raise ConfigError(
                    f"models: {source} is the base, and its delta is zero; list fine-tunes only"
                )

    def _check_out(self) -> None:
        """Refuse a folder that cannot be made, before hours of work are lost in it."""
        folder = self.out_folder
        for place in (folder, *folder.parents):
            try:
                is_other = place.exists() and not place.is_dir()
            except OSError as error:
                raise ConfigError(
                    f"out: {self.out} cannot be a folder: {error.strerror}; name another"
                ) from error
            if is_other:
                raise ConfigError(
                    f"out: {self.out} cannot be a folder, because {place} is a file; "
                    "name another"
                )

    def _check_names(self) -> None:
        names = [measure.name for measure in self.objectives]
        for constraint in self.constraints:
            if isinstance(constraint.measure, str) and constraint.measure not in names:
                raise ConfigError(
                    f"constraints: {unknown_name('objective', constraint.measure, names)}"
                )
        constraint_names = self._constraint_names()
        watched = [measure.name for measure in self.watch]
        all_names = [*names, *constraint_names, *watched]
        for name in all_names:
            if all_names.count(name) > 1:
                raise ConfigError(
                    f"objectives and watch: {name!r} is the name of two scores; set another "
                    "`name` for one of them"
                )
            # The column of its standard error in `Study.trials_dataframe`.
            if f"{name}_stderr" in all_names:
                raise ConfigError(
                    f"objectives and watch: the data frame's column {name}_stderr would hold the "
                    f"standard error of {name!r} and another score; set another `name` for one "
                    "of them"
                )

    def _check_prompts(self) -> None:
        for measure in (*self.measures, *self.watch):
            if isinstance(measure, Task):
                self.evaluation.prompt_settings(measure)

    def _check_preference(self) -> None:
        if self.prefer is None:
            return
        Preference.parse(self.prefer, [measure.name for measure in self.objectives])
        if self.prefer != MEAN:
            return
        for measure in self.objectives:
            has_other_unit = isinstance(measure, Sparsity | Size | Perplexity)
            if has_other_unit or measure.direction == "minimize":
                raise ConfigError(
                    f"prefer: mean: {measure.name!r} has another unit than a share of right "
                    "answers; write weights, as {gsm8k: 0.7, brevity: 0.3}"
                )

    def _constraint_names(self) -> list[str]:
        """Names of the scores that only constraints use, once for each measure."""
        # Compared without direction, since a bound has none. Two bounds on one measure are two
        # constraints but one score.
        scored = [replace(measure, direction=None) for measure in self.objectives]
        names = []
        for constraint in self.constraints:
            if isinstance(constraint.measure, str):
                continue
            measure = replace(constraint.measure, direction=None)
            if measure not in scored:
                scored.append(measure)
                names.append(measure.name)
        return names

    def _check_tokenizer(self) -> None:
        source = self.tokenizer_source
        if source is None:
            return
        known = ("union", "base", self.base, *self.models)
        if source not in known:
            problem = unknown_name("source", source, known)
            raise ConfigError(f"tokenizer_source: {problem}")
        # A route takes the embedding of one model as it is, and a step of a recipe keeps the
        # vocabulary of the base.
        if self.then is not None or isinstance(self.space, RouteSpace):
            place = "space.routes" if self.then is None else "then"
            raise ConfigError(
                f"tokenizer_source: routes (`{place}`) keep the tokenizer of their models; leave "
                "one of the two out"
            )
        if isinstance(self.space, LineageSpace):
            raise ConfigError(
                "tokenizer_source: does not work with `space.lineage`, whose merges are made in "
                "steps that keep the base's vocabulary; leave one of the two out"
            )
        if isinstance(self.space, WeightSpace):
            groups = Grouping.parse(self.space.method_groups)
            if groups != SINGLE_GROUP and len(self.space.methods) > 1:
                raise ConfigError(
                    "tokenizer_source: does not work with several `space.method_groups`, which "
                    "merge in steps that keep the base's vocabulary; leave one of the two out"
                )

    def _check_calibration(self) -> None:
        if not isinstance(self.calibration, CalibrationData):
            return
        paths = {model_path(self.root, source) for source in self.models}
        read = {model_path(self.root, source) for source in self.calibration.data}
        for source in self.calibration.data:
            if model_path(self.root, source) not in paths:
                raise ConfigError(
                    f"calibration.data: {unknown_name('model', source, self.models)}"
                )
        for source in self.models:
            if model_path(self.root, source) not in read:
                raise ConfigError(
                    f"calibration.data: {source} has no text; each of the models needs some"
                )

    def _check_levels(self) -> None:
        if self.then is None:
            return
        if isinstance(self.space, LineageSpace):
            raise ConfigError(
                "then: the first level must merge weights, but `space` is a lineage; leave `then` "
                "out"
            )
        if not isinstance(self.space, WeightSpace):
            raise ConfigError(
                "then: the first level must merge weights, but `space` has routes; leave `then` out"
            )
        # A route may have other layers than the base, so there is no distance to the base.
        for measure in self.measures:
            if isinstance(measure, Sparsity):
                raise ConfigError(
                    f"then: routes have no sparsity, which {measure.name!r} asks for; leave one "
                    "of the two out"
                )
        names = [measure.name for measure in self.objectives]
        for name in self.then.prefer or {}:
            if name not in names:
                raise ConfigError(
                    f"then.prefer: {unknown_name('objective', name, names)}"
                )


# Readers of single settings.


def as_budget(name: str, value: object) -> Budget:
    """Read a budget, or a number of evaluations.

    Args:
        name: The argument, for the message.
        value: A `Budget` or a whole number.

    Returns:
        The budget.

    Raises:
        ConfigError: It is neither.
    """
    if isinstance(value, Budget):
        return value
    try:
        return Budget(integer()(name, value))
    except ConfigError as error:
        raise ConfigError(
            f"{name}: expected Budget(trials=60) or a whole number of evaluations above 0, "
            f"got {describe(value)}"
        ) from error


def _fraction(what: str) -> Reader:
    """A reader of numbers for which a study.yaml has percentages."""

    def read_fraction(name: str, value: object) -> float:
        if isinstance(value, str):
            raise ConfigError(f"{name}: expected {what}, got {value!r}")
        return number(name, value)

    return read_fraction


def _named_options(value: object) -> dict[str, Any] | None:
    """`{"name": ..., option: ...}` as a study.yaml holds it; None for anything else."""
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        return None
    options: dict[str, Any] = plain_data(value)
    return options


def _backend(name: str, value: object) -> str | dict[str, Any]:
    if isinstance(value, str) and value:
        return value
    options = _named_options(value)
    if options is None:
        raise ConfigError(
            f"{name}: expected 'vllm', the name of another model of lm-evaluation-harness, or "
            f"{{'name': 'vllm', option: ...}}, got {describe(value)}"
        )
    if options["name"] == "vllm":
        for option, read in VLLM_OPTIONS.items():
            if option in options:
                options[option] = read(f"{name}.{option}", options[option])
    return options


def _above_zero(name: str, value: object) -> float:
    checked = number(name, value)
    if checked <= 0:
        raise ConfigError(f"{name}: must be above 0, not {checked}")
    return checked


VLLM_OPTIONS: Mapping[str, Reader] = {
    "python": path,
    "timeout": _above_zero,
    "tolerance": _above_zero,
}
"""Options of `backend: {name: vllm, ...}` that are not vLLM's arguments -> their readers."""


def _sampler(name: str, value: object) -> SamplerSetting:
    if isinstance(value, BaseSampler):
        return value
    if isinstance(value, str):
        _check_sampler_name(name, value)
        return value
    options = _named_options(value)
    if options is not None:
        _check_sampler_name(name, options["name"])
        return options
    raise ConfigError(
        f"{name}: a name such as 'nsga2', or `name` and options, or an Optuna sampler, "
        f"not {describe(value)}"
    )


def _check_sampler_name(name: str, sampler: str) -> None:
    # The table takes a second to import, which the default need not wait for.
    if sampler == "mmmo":
        return
    from paretomerge.search.registry import PRESETS

    # Classes of Optuna are checked by the table, when a search begins.
    if sampler not in PRESETS and not sampler.endswith("Sampler"):
        raise ConfigError(f"{name}: {unknown_name('name', sampler, PRESETS)}")


def _prefer(name: str, value: object) -> PreferSetting | None:
    if value == MEAN:
        return MEAN
    # The knee is what is picked without a preference.
    if value == KNEE:
        return None
    weights: dict[str, float] = mapping_of(number, "{'gsm8k': 0.7}, or 'mean'")(
        name, value
    )
    return weights


def _space(name: str, value: object) -> object:
    if isinstance(value, WeightSpace | RouteSpace | LineageSpace):
        return value
    # A space of the user's own is any object with the methods of `SearchSpace`.
    has_methods = hasattr(value, "recipe") and hasattr(value, "distributions")
    if has_methods and not isinstance(value, type):
        return value
    raise ConfigError(
        f"{name}: expected WeightSpace(...) or RouteSpace(...), got {describe(value)}"
    )


def _objective(name: str, value: object) -> object:
    if isinstance(value, Measure):
        return value
    raise ConfigError(f"{name}: {not_a_measure(value)}")


def _watched(name: str, value: object) -> Measure:
    if not isinstance(value, Measure):
        return Task(word(name, value))
    if value.direction is not None:
        raise ConfigError(
            f"{name}: {value.name}: what is watched is only reported; leave `direction` out"
        )
    return value


def _folder(name: str, value: object) -> Path:
    return Path(path(name, value))


def _database(name: str, value: object) -> str:
    if isinstance(value, Path):
        return f"sqlite:///{path('storage', value)}"
    if isinstance(value, str) and "://" in value:
        return value
    # The argument of `Study` and the key of a study.yaml, where the field is `storage_url`.
    raise ConfigError(
        "storage: expected the URL of a database, such as sqlite:///study.db, "
        f"got {describe(value)}"
    )


def check_device(name: str, value: object) -> str:
    """Check the form of a device's name.

    Args:
        name: The argument, for the message.
        value: The device.

    Returns:
        The device.

    Raises:
        ConfigError: It is not `cpu`, `cuda` or `cuda:N`.
    """
    if isinstance(value, str) and _DEVICE.fullmatch(value):
        return value
    raise ConfigError(
        f"{name}: expected cpu, cuda or cuda:N as text, got {describe(value)}"
    )


def _sources(name: str, value: object) -> str:
    setting = word(name, value)
    if setting not in SOURCES:
        raise ConfigError(f"{name}: {unknown_name('place', setting, SOURCES)}")
    return setting


_BUDGET_READERS: Mapping[str, Reader] = {
    "until": optional(_fraction("a share such as 0.01")),
    "patience": integer(1),
}
_EVALUATION_READERS: Mapping[str, Reader] = {
    "include_path": optional(path),
    "data_root": optional(path),
    "splits": optional(
        mapping_of(word, "{'search': 'train', 'held_out': 'test'}"),
    ),
    "search_items": optional(integer()),
    "held_out_items": optional(integer()),
    "selection_items": optional(integer()),
    "selection_repeats": optional(integer()),
    "batch_size": integer(),
    "cache": optional(path),
    "backend": optional(_backend),
    "race": optional(_fraction("a confidence such as 0.95")),
    "time_limit": optional(number),
    **PROMPT_READERS,
    "apply_chat_template": flag,
}
_SECOND_LEVEL_READERS: Mapping[str, Reader] = {
    "routes": instance_of(RouteSpace, "RouteSpace(...)"),
    "trials": integer(),
    "front": optional(integer()),
    "prefer": optional(mapping_of(number, "{'gsm8k': 0.7}")),
    "sampler": optional(_sampler),
}
_STUDY_READERS: Mapping[str, Reader] = {
    "base": model,
    "models": sequence_of(model, "['./math', './code']"),
    "objectives": sequence_of(_objective, "[Task('gsm8k'), Sparsity()]"),
    "constraints": sequence_of(
        instance_of(Constraint, "Constraint(Task('gsm8k'), at_least=0.5)"),
        "[Constraint(Task('gsm8k'), at_least=0.5)]",
    ),
    "watch": sequence_of(_watched, "['hellaswag']"),
    "space": _space,
    "then": optional(
        instance_of(SecondLevel, "SecondLevel(RouteSpace(...), trials=20)")
    ),
    "sampler": _sampler,
    "prefer": optional(_prefer),
    "budget": as_budget,
    "starts": sequence_of(path, "['recipe.yml']"),
    "warm_start": sequence_of(path, "['runs/first']"),
    "evaluation": instance_of(Evaluation, "Evaluation(...)"),
    "seed": integer(),
    "root": _folder,
    "out": _folder,
    "storage_url": optional(_database),
    "study_name": word,
    "dtype": optional(label),
    "tokenizer_source": optional(model),
    "chat_template": optional(word),
    "allow_mismatch": flag,
    "device": check_device,
    "sources": optional(_sources),
    "threads": optional(integer(1)),
    "workers": as_workers,
    "calibration": optional(as_calibration),
}
"""Field of `StudySettings` -> its reader."""
