"""The settings of a study as frozen objects, as `Study(...)` and study.yaml give them."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from optuna.samplers import BaseSampler

from paretomerge.errors import ConfigError, shorten, unknown_name
from paretomerge.evaluate.measures import Constraint, Measure, Sparsity
from paretomerge.record.storage import DEFAULT_STUDY_NAME, Storage
from paretomerge.space.space import SearchSpace
from paretomerge.space.specs import RouteSpace, WeightSpace

DTYPES = ("float32", "float16", "bfloat16")
SamplerSetting = str | Mapping[str, Any] | BaseSampler
"""A sampler's name, its name and options, or an Optuna sampler."""


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
        ConfigError: A number is out of range.

    Example:
        >>> Budget(trials=100, until=0.01).patience
        5
    """

    trials: int = 60
    until: float | None = None
    patience: int = 5

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise ConfigError(f"trials: must be 1 or more, not {self.trials}")
        if self.until is not None and not 0 < self.until < 1:
            raise ConfigError(
                f"budget.until: a share above 0 and below 1, such as 0.01, not {self.until}"
            )
        if self.patience < 1:
            raise ConfigError(
                f"budget.patience: must be 1 or more, not {self.patience}"
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
        batch_size: Sequences in one forward pass.
        cache: A file that keeps per-example scores across studies.
        backend: Another model of the harness (`vllm`, ...) in place of the model in memory, or
            `{"name": ..., option: ...}`.
        race: The confidence, such as 0.95, at which a candidate is left before all its examples
            are scored; None to score all.
        time_limit: Seconds that scoring one candidate on the search examples may take.

    Raises:
        ConfigError: Two settings exclude each other, or a number is out of range.

    Example:
        >>> Evaluation(search_items=200).batch_size
        16
    """

    include_path: str | None = None
    data_root: str | None = None
    splits: Mapping[str, str] | None = None
    search_items: int | None = None
    batch_size: int = 16
    cache: str | None = None
    backend: str | Mapping[str, Any] | None = None
    race: float | None = None
    time_limit: float | None = None

    def __post_init__(self) -> None:
        if self.splits is not None and set(self.splits) != {"search", "held_out"}:
            raise ConfigError(
                f"evaluate.splits: name `search` and `held_out`, not {', '.join(self.splits)}"
            )
        if self.race is not None and not 0.5 <= self.race < 1:
            raise ConfigError(
                f"evaluate.race: a confidence of 0.5 or more and below 1, not {self.race}"
            )
        if self.race is not None and self.backend:
            raise ConfigError(
                "evaluate.race: does not work with a `backend`, which would load each merge "
                "again for every few examples"
            )
        for name in ("search_items", "batch_size", "time_limit"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"evaluate.{name}: must be above 0, not {value}")


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
        ConfigError: Two settings exclude each other, or a number is out of range.

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


def _not_a_measure(value: object) -> str:
    if isinstance(value, str):
        return f"a name alone is no objective; write Task({value!r})"
    if callable(value):
        return f"write Function({shorten(value)}), not the function alone"
    return (
        f"use Task, Function, Perplexity, Judge, Sparsity or Size, not {shorten(value)}"
    )


@dataclass(frozen=True)
class StudySettings:
    """Everything that a study.yaml can say.

    Attributes:
        base: The model that all others were fine-tuned from: a folder or a name on the Hugging
            Face Hub.
        models: The fine-tunes, two or more; `model+adapter` for a PEFT adapter.
        objectives: What to improve.
        constraints: Bounds that a merge must satisfy.
        watch: Tasks that are scored on held-out examples and never searched on.
        space: What may vary.
        then: A second level.
        sampler: A name of docs/samplers.md, a mapping with `name` and options, or an Optuna
            sampler.
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
        device: `cpu`, `cuda` or `cuda:N`.
        threads: Threads of the command line's process; None to leave them alone.

    Raises:
        ConfigError: Settings contradict each other.
    """

    base: str
    models: tuple[str, ...]
    objectives: tuple[Measure, ...]
    constraints: tuple[Constraint, ...] = ()
    watch: tuple[str, ...] = ()
    space: WeightSpace | RouteSpace | SearchSpace = field(default_factory=WeightSpace)
    then: SecondLevel | None = None
    sampler: SamplerSetting = "mmmo"
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
    device: str = "cpu"
    threads: int | None = None

    def __post_init__(self) -> None:
        if len(self.models) < 2:
            raise ConfigError(f"models: name two or more, not {len(self.models)}")
        if not self.objectives:
            raise ConfigError("objectives: name one or more")
        for measure in self.objectives:
            if not isinstance(measure, Measure):
                raise ConfigError(f"objectives: {_not_a_measure(measure)}")
        if self.dtype not in (None, *DTYPES):
            raise ConfigError(f"dtype: {unknown_name('dtype', self.dtype, DTYPES)}")
        self._check_names()
        self._check_levels()

    @property
    def out_folder(self) -> Path:
        """The study's folder, absolute."""
        return (self.root / self.out).resolve()

    @property
    def storage(self) -> Storage:
        """Where the record is."""
        if self.storage_url is None:
            return Storage.at(self.out_folder / "study.db", self.study_name)
        return Storage(self.storage_url, self.study_name).relative_to(self.root)

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

    def _check_names(self) -> None:
        names = [measure.name for measure in self.objectives]
        for constraint in self.constraints:
            if isinstance(constraint.measure, str) and constraint.measure not in names:
                raise ConfigError(
                    f"constraints: {unknown_name('objective', constraint.measure, names)}"
                )
        constraint_names = self._constraint_names()
        all_names = [*names, *constraint_names, *self.watch]
        for name in all_names:
            if all_names.count(name) > 1:
                raise ConfigError(
                    f"objectives and watch: {name!r} is the name of two scores; set another "
                    "`name` for one of them"
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

    def _check_levels(self) -> None:
        if self.then is None:
            return
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
