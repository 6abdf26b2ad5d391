"""A study.yaml as data: unknown_name keys are refused, with the nearest known one; values are checked; nothing else is opened."""

import re
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from paretomerge.errors import ConfigError, unknown_name
from paretomerge.record.storage import NAME
from paretomerge.space.build import RoutesConfig, SpaceConfig, Strict
from paretomerge.study.budget import Budget


class JudgeConfig(Strict):
    """A language model that grades answers to the prompts of a file; the endpoint's defaults are the environment's."""

    prompts: str
    criteria: str = Field(min_length=1)
    base_url: str | None = None
    model: str | None = None
    max_tokens: int = Field(default=256, ge=1)


class ObjectiveConfig(Strict):
    """One of `task`, `function`, `perplexity`, `judge`, `sparsity` and `size`. `direction` overrides what the score says of itself."""

    task: str | None = None
    metric: str | None = None
    function: str | None = None
    perplexity: str | None = None
    judge: JudgeConfig | None = None
    sparsity: bool = False
    size: Literal["layers", "parameters", "seconds_per_token"] | None = None
    name: str | None = None
    direction: str | None = Field(default=None, pattern="^(maximize|minimize)$")

    @model_validator(mode="after")
    def _one_kind(self) -> "ObjectiveConfig":
        kinds = {
            "task": self.task,
            "function": self.function,
            "perplexity": self.perplexity,
            "judge": self.judge,
            "size": self.size,
        }
        if sum(kind is not None for kind in kinds.values()) + self.sparsity != 1:
            raise ValueError(
                f"expected one of {', '.join(f'`{kind}`' for kind in kinds)} and `sparsity: true`"
            )
        if self.perplexity and self.metric not in (None, "perplexity", "bits_per_byte"):
            raise ValueError("metric: expected perplexity or bits_per_byte")
        return self

    @property
    def title(self) -> str:
        if self.name:
            return self.name
        kinds = {
            "sparsity": self.sparsity,
            "judge": self.judge,
            self.metric or "perplexity": self.perplexity,
        }
        of_kind = next((title for title, used in kinds.items() if used), None)
        return self.task or self.size or of_kind or str(self.function).partition(":")[2]

    @property
    def lower_is_better(self) -> bool:
        """Of the kinds that know it without being loaded."""
        return bool(self.size or self.perplexity)


class ConstraintConfig(ObjectiveConfig):
    """A score, named like an objective, and the bound that it must keep: one of `at_least` and `at_most`."""

    at_least: float | None = Field(default=None, allow_inf_nan=False)
    at_most: float | None = Field(default=None, allow_inf_nan=False)

    @model_validator(mode="after")
    def _one_bound(self) -> "ConstraintConfig":
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("expected one of `at_least` and `at_most`")
        if self.direction is not None:
            raise ValueError("direction: expected none, for a bound is in the score's own units")
        return self

    @property
    def scored(self) -> ObjectiveConfig:
        """What is scored, without the bound."""
        return ObjectiveConfig(**self.model_dump(exclude={"at_least", "at_most", "direction"}))


class BudgetConfig(Strict):
    """When to stop. `until`: a percentage of the hypervolume. `trials` may stand here or at the top of the file."""

    trials: int | None = None
    until: str | None = None
    patience: int = Field(default=5, ge=1)

    @field_validator("until", mode="before")
    @classmethod
    def _until(cls, value: Any) -> Any:
        return value if value is None else _percentage(value, "of the hypervolume", "1%")

    @property
    def share(self) -> float | None:
        """`until` as a fraction."""
        return None if self.until is None else _share(self.until)


def _percentage(value: Any, what: str, example: str) -> Any:
    if not (
        isinstance(value, str)
        and re.fullmatch(r"\d+(\.\d+)?\s*%", value.strip())
        and 0 < _share(value) < 1
    ):
        raise ValueError(f"expected a percentage {what} above 0 and below 100, such as {example}")
    return value


def _share(percentage: str) -> float:
    return float(percentage.strip().rstrip("% ")) / 100


class ThenConfig(Strict):
    """A second level: `trials` more, on routes through the models and `front` merges of the first level's front, or the one that a
    preference picks. sampler: the first level's unless another is named.
    """

    routes: RoutesConfig = RoutesConfig()
    trials: int = Field(default=60, ge=1)
    front: int | None = Field(default=None, ge=1)
    prefer: dict[str, float] | None = None
    sampler: str | dict[str, Any] | None = None

    @model_validator(mode="after")
    def _one_pool(self) -> "ThenConfig":
        if self.routes.match is not None:
            raise ValueError(
                "routes.match: expected none, for the second level does not begin with hand-overs"
            )
        if self.front is not None and self.prefer is not None:
            raise ValueError("expected one of `front` and `prefer`, got both")
        if self.prefer is not None and (
            min(self.prefer.values(), default=0) < 0 or not sum(self.prefer.values()) > 0
        ):
            raise ValueError(
                f"prefer: expected weights of 0 or more, one of them above 0, got {self.prefer}"
            )
        return self


class EvaluateConfig(Strict):
    """How lm-evaluation-harness runs."""

    include_path: str | None = None
    data_root: str | None = None
    splits: dict[str, str] | None = None
    search_items: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=16, ge=1)
    cache: str | None = None
    backend: str | dict[str, Any] | None = None
    race: bool | str = False
    time_limit: float | None = Field(default=None, gt=0, allow_inf_nan=False)

    @field_validator("race", mode="before")
    @classmethod
    def _sure(cls, value: Any) -> Any:
        if not isinstance(value, bool) and _share(_percentage(value, "of confidence", "95%")) < 0.5:
            raise ValueError(f"expected a confidence of 50% or more, such as 95%, got {value}")
        return value

    @field_validator("backend")
    @classmethod
    def _named(cls, value: Any) -> Any:
        if isinstance(value, dict) and not isinstance(value.get("name"), str):
            raise ValueError(
                "expected the name of a model of lm-evaluation-harness, or `name` and its arguments"
            )
        return value

    @property
    def confidence(self) -> float | None:
        """`race` as a probability; None where it is off or has no figure."""
        return _share(self.race) if isinstance(self.race, str) else None

    @model_validator(mode="after")
    def _race_with_the_live_model(self) -> "EvaluateConfig":
        if self.race and self.backend:
            raise ValueError(
                "race: expected the live model, got a `backend`, which would load each merge again for every few items"
            )
        return self

    @model_validator(mode="after")
    def _both_splits(self) -> "EvaluateConfig":
        if self.splits is not None and set(self.splits) != {"search", "held_out"}:
            raise ValueError(
                f"splits: expected `search` and `held_out`, got {', '.join(self.splits)}"
            )
        return self


class StudyConfig(Strict):
    """A whole study.yaml. Paths start from the file's folder."""

    base: str
    models: list[str] = Field(min_length=2)
    space: SpaceConfig = SpaceConfig()
    objectives: list[ObjectiveConfig] = Field(min_length=1)
    constraints: list[ConstraintConfig] = Field(default=[])
    watch: list[str] = Field(default=[])
    starts: list[str] = Field(default=[])
    warm_start: list[str] = Field(default=[])
    evaluate: EvaluateConfig = EvaluateConfig()
    sampler: str | dict[str, Any] = "mmmo"
    trials: int = Field(default=60, ge=1)
    budget: BudgetConfig = BudgetConfig()
    then: ThenConfig | None = None
    seed: int = 0
    out: str | None = None
    storage: str | None = None
    study_name: str = Field(default=NAME, min_length=1)
    dtype: str | None = Field(default=None, pattern="^(float32|float16|bfloat16)$")
    device: str = "cpu"
    threads: int = Field(default=1, ge=1)

    @field_validator("starts", "warm_start", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="before")
    @classmethod
    def _trials_once(cls, data: Any) -> Any:
        """`budget: {trials: 60}` means `trials: 60`."""
        budget = data.get("budget") if isinstance(data, dict) else None
        if not isinstance(budget, dict) or budget.get("trials") is None:
            return data
        if "trials" in data:
            raise ValueError(
                "trials: expected it once, got it at the top and under `budget`; keep one of them"
            )
        return data | {"trials": budget["trials"], "budget": budget | {"trials": None}}

    @property
    def limit(self) -> Budget:
        """The budget as `Study.run` takes it."""
        return Budget(
            self.trials + (self.then.trials if self.then else 0),
            self.budget.share,
            self.budget.patience,
        )

    @property
    def bounds(self) -> list[ConstraintConfig]:
        """The constraints; one without a name has that of the objective with the same score."""
        named = {
            o.model_copy(update={"name": None, "direction": None}): o.title
            for o in reversed(self.objectives)
        }
        return [
            c if c.name else c.model_copy(update={"name": named.get(c.scored)})
            for c in self.constraints
        ]

    @property
    def scored(self) -> list[ObjectiveConfig]:
        """Objectives, and what only constraints ask for."""
        plain = {o.model_copy(update={"name": o.title, "direction": None}) for o in self.objectives}
        return [
            *self.objectives,
            *dict.fromkeys(c.scored for c in self.bounds if c.scored not in plain),
        ]

    @model_validator(mode="after")
    def _levels_fit(self) -> "StudyConfig":
        if self.then is None:
            return self
        if self.space.routes is not None:
            raise ValueError(
                "then: expected a first level that merges in place, got `space.routes`; leave `then` out"
            )
        if sparse := [o.title for o in self.scored if o.sparsity]:
            raise ValueError(
                f"then: expected scores that routes have, got {sparse[0]!r}, a sparsity"
            )
        names = [o.title for o in self.objectives]
        if strange := [name for name in self.then.prefer or {} if name not in names]:
            raise ValueError(f"then.prefer: {unknown_name('objective', strange[0], names)}")
        return self

    @model_validator(mode="after")
    def _distinct_names(self) -> "StudyConfig":
        titles = [o.title for o in self.scored] + self.watch
        double = sorted({t for t in titles if titles.count(t) > 1})
        if double:
            raise ValueError(
                f"objectives and watch: expected different names, got {double[0]!r} twice; set `name`"
            )
        return self


def load_config(path: str | Path) -> StudyConfig:
    """Read and check a study.yaml."""
    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: expected a study.yaml, got no such file") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: expected YAML, got {error}") from error
    try:
        return StudyConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{path}: " + "; ".join(told(e) for e in error.errors())) from error


_WORDS = (
    (r"^Input should be (a|an) valid", r"expected \1"),
    (r"^Input should be (greater|less)", r"expected a number \1"),
    (r"^Input should be", "expected"),
    (r"^List should have (.*) after validation, not \d+", r"expected \1"),
    (r", unable to parse string as an? \w+", ""),
    (r"\b(expected) a (integer)", r"\1 an \2"),
)
"""pydantic's way to say it, and ours."""


def told(error: Any) -> str:
    """One of pydantic's errors as a sentence: the key, what was expected, what was there."""
    where = ".".join(
        str(part)
        for part in error["loc"]
        if not re.fullmatch(r"str|bool|int|dict\[.*|list\[.*", str(part))
    )
    if error["type"] == "extra_forbidden":
        fields: Any = StudyConfig.model_fields
        for part in error["loc"][:-1]:
            kind = fields[part].annotation if isinstance(part, str) and part in fields else None
            kind = {"objectives": ObjectiveConfig, "constraints": ConstraintConfig}.get(part, kind)
            kind = next(
                (one for one in get_args(kind) if hasattr(one, "model_fields")), kind
            )  # of `RoutesConfig | None`
            fields = getattr(kind, "model_fields", fields)
        return f"{'.'.join(str(p) for p in error['loc'][:-1]) or 'study'}: {unknown_name('key', error['loc'][-1], fields)}"
    if error["type"] == "missing":
        return f"{where or 'study'}: expected it, got none"
    message = error["msg"].removeprefix("Value error, ")
    for theirs, ours in _WORDS:
        message = re.sub(theirs, ours, message)
    got = "" if ", got " in message or "; got " in message else f", got {error['input']!r}"
    return f"{where or 'study'}: {message}{got if len(got) < 100 else ''}"
