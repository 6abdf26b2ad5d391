"""A study.yaml as data. Keys and values are checked, and no other file is opened."""

import re
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    Discriminator,
    Field,
    StrictInt,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from paretomerge.arguments import path as read_path
from paretomerge.config.overrides import with_overrides
from paretomerge.config.space_schema import RoutesConfig, Section, SpaceConfig
from paretomerge.errors import ConfigError, RecipeError, unknown_name
from paretomerge.evaluate.measures import PROMPT_READERS
from paretomerge.recipe.text import check_data, parse
from paretomerge.record.storage import DEFAULT_STUDY_NAME

_KINDS = ("task", "function", "perplexity", "judge", "size")
# pydantic puts it into the places of errors, and `_keys_of` takes it out again.
_WATCHED_KEYS = "dict[watched]"
_CALIBRATION_KEYS = "dict[calibration]"
_PERCENTAGE = re.compile(r"\s*(\d+(\.\d+)?)\s*%\s*")


class JudgeConfig(Section):
    """A language model that grades answers to the prompts of a file.

    By default the environment names the endpoint.
    """

    prompts: str
    criteria: str = Field(min_length=1)
    base_url: str | None = None
    model: str | None = None
    max_tokens: int = Field(default=256, ge=1)


class TaskConfig(Section):
    """A task of lm-evaluation-harness. Most keys take the place of a key under `evaluate`."""

    task: str | None = None
    metric: str | None = None
    num_fewshot: int | None = Field(default=None, ge=0)
    search_items: int | None = Field(default=None, ge=1)
    apply_chat_template: bool | None = None
    fewshot_as_multiturn: bool | None = None
    system_instruction: str | None = None
    gen_kwargs: dict[str, Any] | None = None
    think_end_token: str | StrictInt | None = None
    add_bos_token: bool | None = None


class MeasureConfig(TaskConfig):
    """One of `task`, `function`, `perplexity`, `judge`, `sparsity` and `size`."""

    function: str | None = None
    perplexity: str | None = None
    judge: JudgeConfig | None = None
    sparsity: bool = False
    size: Literal["layers", "parameters", "seconds_per_token"] | None = None
    name: str | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> "MeasureConfig":
        # `sparsity` is counted apart: it is a flag, so "not set" is False and not None.
        kinds = [kind for kind in _KINDS if getattr(self, kind) is not None]
        if len(kinds) + self.sparsity != 1:
            names = ", ".join(f"`{kind}`" for kind in _KINDS)
            raise ValueError(f"set exactly one of {names} and `sparsity: true`")
        if self.task is None:
            self._check_keys_of_tasks()
        if self.perplexity and self.metric not in (None, "perplexity", "bits_per_byte"):
            raise ValueError(
                f"metric: use perplexity or bits_per_byte, not {self.metric!r}"
            )
        return self

    def _check_keys_of_tasks(self) -> None:
        if self.search_items is not None:
            raise ValueError("search_items: only a `task` has examples to choose from")
        for key in PROMPT_READERS:
            if getattr(self, key) is not None:
                raise ValueError(f"{key}: only a `task` takes this key")


class WatchConfig(MeasureConfig):
    """A score that is measured on held-out examples and never searched on."""


class ObjectiveConfig(MeasureConfig):
    """A score to improve. `direction` overrides the score's default direction."""

    direction: Literal["maximize", "minimize"] | None = None


class ConstraintConfig(MeasureConfig):
    """A score and its bound: one of `at_least` and `at_most`, in the score's units."""

    at_least: float | None = Field(default=None, allow_inf_nan=False)
    at_most: float | None = Field(default=None, allow_inf_nan=False)

    @model_validator(mode="after")
    def _one_bound(self) -> "ConstraintConfig":
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("set exactly one of `at_least` and `at_most`")
        return self


def _kind_of_watched(value: Any) -> str:
    return "str" if isinstance(value, str) else _WATCHED_KEYS


_Watched = Annotated[
    Annotated[str, Tag("str")] | Annotated[WatchConfig, Tag(_WATCHED_KEYS)],
    # Decided before validation, so that a wrong key is not reported of both.
    Discriminator(_kind_of_watched),
]
"""The name of a task, or its keys."""


class BudgetConfig(Section):
    """When to stop. `until` is a percentage of the hypervolume.

    `trials` may stand here or at the top of the file.
    """

    trials: int | None = None
    until: str | None = None
    patience: int = Field(default=5, ge=1)

    @field_validator("until", mode="before")
    @classmethod
    def _checked_until(cls, value: Any) -> Any:
        if value is None:
            return None
        return _checked_percentage(value, "of the hypervolume", "1%")


class ThenConfig(Section):
    """A second level of the search.

    It evaluates `trials` more merges: routes through the models and the best merges of the first
    level.
    """

    routes: RoutesConfig = RoutesConfig()
    trials: int = Field(default=60, ge=1)
    front: int | None = Field(default=None, ge=1)
    prefer: dict[str, float] | None = None
    sampler: str | dict[str, Any] | None = None


class EvaluateConfig(Section):
    """How merges are scored. `race` is true, or a confidence such as 95%."""

    include_path: str | None = None
    data_root: str | None = None
    splits: dict[str, str] | None = None
    search_items: int | None = Field(default=None, ge=1)
    held_out_items: int | None = Field(default=None, ge=1)
    selection_items: int | None = Field(default=None, ge=1)
    selection_repeats: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=16, ge=1)
    cache: str | None = None
    backend: str | dict[str, Any] | None = None
    race: bool | str = False
    time_limit: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    num_fewshot: int | None = Field(default=None, ge=0)
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool | None = None
    system_instruction: str | None = None
    gen_kwargs: dict[str, Any] | None = None
    think_end_token: str | StrictInt | None = None
    add_bos_token: bool | None = None

    @field_validator("race", mode="before")
    @classmethod
    def _checked_race(cls, value: Any) -> Any:
        if isinstance(value, bool):
            return value
        confidence = share(_checked_percentage(value, "of confidence", "95%"))
        # Below one half a candidate would be left although it is more likely not dominated.
        if confidence < 0.5:
            raise ValueError(f"a confidence of 50% or more, such as 95%, not {value}")
        return value

    @field_validator("backend")
    @classmethod
    def _checked_backend(cls, value: Any) -> Any:
        if isinstance(value, dict) and not isinstance(value.get("name"), str):
            raise ValueError(
                "name a model of lm-evaluation-harness, or set `name` and its arguments"
            )
        return value


class CalibrationConfig(Section):
    """The text of each model, for methods that need data: a file, or the name of a task."""

    data: dict[str, str | dict[Literal["task"], str]]
    examples: int = Field(default=256, ge=1)
    max_tokens: int = Field(default=512, ge=2)
    alpha: float = Field(default=0.9, ge=0, le=1)


def _kind_of_calibration(value: Any) -> str:
    return "str" if isinstance(value, str) else _CALIBRATION_KEYS


_Calibration = Annotated[
    Annotated[str, Tag("str")] | Annotated[CalibrationConfig, Tag(_CALIBRATION_KEYS)],
    Discriminator(_kind_of_calibration),
]
"""A folder of statistics, or what they are made of."""


class StudyConfig(Section):
    """The content of a study.yaml. Relative paths start from the file's folder.

    `load_config` reads a file, and `config_of` turns a study's settings into this content.
    docs/study.md explains every key.

    Raises:
        ConfigError: A key or a value is wrong. All of them are reported at once.

    Example:
        >>> config = StudyConfig(base="base", models=["a", "b"], objectives=[{"sparsity": True}])
        >>> config.trials
        60
    """

    base: str
    models: list[str] = Field(min_length=2)
    space: SpaceConfig = SpaceConfig()
    objectives: list[ObjectiveConfig] = Field(min_length=1)
    constraints: list[ConstraintConfig] = Field(default=[])
    watch: list[_Watched] = Field(default=[])
    starts: list[str] = Field(default=[])
    warm_start: list[str] = Field(default=[])
    evaluate: EvaluateConfig = EvaluateConfig()
    sampler: str | dict[str, Any] = "mmmo"
    prefer: Literal["mean", "knee"] | dict[str, float] | None = None
    trials: int = Field(default=60, ge=1)
    budget: BudgetConfig = BudgetConfig()
    then: ThenConfig | None = None
    seed: int = 0
    out: str | None = Field(default=None, min_length=1)
    storage: str | None = None
    study_name: str = Field(default=DEFAULT_STUDY_NAME, min_length=1)
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    tokenizer_source: str | None = Field(default=None, min_length=1)
    chat_template: str | None = Field(default=None, min_length=1)
    allow_mismatch: bool = False
    device: str = "cpu"
    sources: Literal["mmap", "device"] | None = None
    threads: int = Field(default=1, ge=1)
    workers: (
        int | Literal["ray"] | dict[Literal["ray"], dict[str, Any] | None] | None
    ) = None
    calibration: _Calibration | None = None

    def __init__(self, **content: Any) -> None:
        try:
            super().__init__(**content)
        except ValidationError as error:
            raise ConfigError(f"StudyConfig: {messages_of(error)}") from error

    # pydantic's mark for an `__init__` that only validates. Without it, `model_validate` would call
    # this one, and `load_config` would lose the single errors.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @field_validator("starts", "warm_start", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="before")
    @classmethod
    def _trials_once(cls, data: Any) -> Any:
        """Move `trials` from `budget` to the top, where the rest of the program reads it."""
        # Before validation: after it, the default of the top key looks like a number from the user.
        budget = data.get("budget") if isinstance(data, dict) else None
        if not isinstance(budget, dict) or budget.get("trials") is None:
            return data
        if "trials" in data:
            raise ValueError(
                "trials: is set at the top and under `budget`; keep one of them"
            )
        rest = budget | {"trials": None}
        return data | {"trials": budget["trials"], "budget": rest}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> StudyConfig:
    """Read and check a study.yaml.

    Args:
        path: The file, or a folder that holds a study.yaml.
        overrides: Keys to set in its content; see `with_overrides`.

    Returns:
        Its content.

    Raises:
        ConfigError: The file is missing, is not YAML, or has wrong keys or values. All wrong keys
            and values are reported at once.
    """
    path = config_file(path)
    data = read_content(path, overrides)
    try:
        return StudyConfig.model_validate(data)
    except ValidationError as error:
        parts = tuple(f"{path}: {message_of(detail)}" for detail in error.errors())
        raise ConfigError(f"{path}: {messages_of(error)}", parts) from error


def read_content(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a study.yaml without a look at its keys.

    Args:
        path: The file, or a folder that holds a study.yaml.
        overrides: Keys to set in its content; see `with_overrides`.

    Returns:
        Its content.

    Raises:
        ConfigError: The file is missing, is not YAML, or holds no keys.
    """
    path = config_file(path)
    try:
        text = path.read_text(encoding="utf-8")
        # Bounded in size, depth and aliases: the file may be someone else's.
        documents = parse(text, str(path))
        check_data(documents, str(path))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file; name a study.yaml") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from error
    except RecipeError as error:
        message = str(error).replace("YAML syntax error", "cannot be read as YAML")
        raise ConfigError(message) from error
    data, *others = documents
    if others:
        raise ConfigError(
            f"{path}: holds {len(documents)} documents; a study is one, without `---`"
        )
    if data is None:
        raise ConfigError(
            f"{path}: the file is empty; write a study, or let `paretomerge init` begin one"
        )
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise ConfigError(
            f"{path}: expected keys such as `base` and `models`, got {_brief(data)}"
        )
    return with_overrides(data, overrides)


def config_file(path: str | Path) -> Path:
    """Find the study.yaml that a path names.

    Args:
        path: The file, or a folder that holds a study.yaml. `~` becomes the home folder.

    Returns:
        The file; it may be missing.

    Raises:
        ConfigError: It is a folder without a study.yaml, or no path.
    """
    file = Path(read_path("study", path))
    if not file.is_dir():
        return file
    inner = file / "study.yaml"
    if not inner.is_file():
        raise ConfigError(
            f"{file}: is a folder without a study.yaml; name the study's YAML file"
        )
    return inner


def share(percentage: str) -> float:
    """Turn `1.5%` into 0.015."""
    # As decimals, so that `percentage_of` gives the same text again.
    return float(Decimal(percentage.strip().rstrip("% ")) / 100)


def percentage_of(fraction: float) -> str:
    """Turn 0.015 into `1.5%`."""
    # As decimals: `100 * 0.07` is 7.000000000000001, and a file must read back as the same text.
    percentage = Decimal(repr(fraction)) * 100
    # Without an exponent, which a study.yaml does not take.
    return f"{percentage.normalize():f}%"


def messages_of(error: ValidationError) -> str:
    """Write all of pydantic's errors as one sentence after another."""
    messages = [message_of(detail) for detail in error.errors()]
    return "; ".join(messages)


def message_of(detail: Any) -> str:
    """Write one of pydantic's error details as a sentence: the key, what is wrong, what was there.

    Args:
        detail: An entry of `ValidationError.errors()`.

    Returns:
        The sentence.
    """
    keys = _keys_of(detail["loc"])
    place = ".".join(keys) or "study"
    if detail["type"] == "extra_forbidden":
        section = ".".join(keys[:-1]) or "study"
        known = _known_keys(detail["loc"][:-1])
        problem = unknown_name("key", keys[-1], known)
        return f"{section}: {problem}"
    if detail["type"] == "missing":
        return f"{place}: required key is missing"
    if detail["type"] == "literal_error":
        return f"{place}: {_unknown_value(keys[-1], detail)}"
    message = detail["msg"].removeprefix("Value error, ")
    for pattern, replacement in _REWORDING:
        message = re.sub(pattern, replacement, message)
    value = _brief(detail["input"])
    # Our own validators raise `value_error` and quote the value where it helps. A long value would
    # hide the message.
    is_ours = detail["type"] == "value_error"
    if is_ours or value in message or len(value) >= 100:
        return f"{place}: {message}"
    return f"{place}: {message}, got {value}"


def _unknown_value(key: str, detail: Any) -> str:
    """What is wrong with a value that is none of the few that a key takes."""
    # pydantic gives them as "'a', 'b' or 'c'".
    known = re.findall(r"'([^']*)'", detail["ctx"]["expected"])
    value = detail["input"]
    if not known or not isinstance(value, str):
        return f"expected {detail['ctx']['expected']}, got {_brief(value)}"
    return unknown_name(key, value, known)


_REWORDING = (
    (r"^Input should be (a|an) valid", r"expected \1"),
    (r"^Input should be (greater|less)", r"expected a number \1"),
    (r"^Input should be", "expected"),
    (r"^List should have (.*) after validation, not \d+", r"expected \1"),
    (r", unable to (parse string as an? \w+|interpret input)", ""),
    (r"\b(expected) a (integer)", r"\1 an \2"),
)
"""Patterns in pydantic's messages -> our wording."""


def _checked_percentage(value: Any, what: str, example: str) -> Any:
    matches = isinstance(value, str) and _PERCENTAGE.fullmatch(value)
    if not matches or not 0 < share(value) < 1:
        raise ValueError(
            f"a percentage {what} above 0 and below 100, such as {example}"
        )
    return value


def _keys_of(location: Sequence[int | str]) -> list[str]:
    """The path of a key as the file has it."""
    # pydantic adds the alternative of a union that it tried, such as `dict[str,any]`, to the path.
    # The file has no such key.
    keys = []
    for part in location:
        key = str(part)
        if not re.fullmatch(r"str|bool|int|dict\[.*|list\[.*", key):
            keys.append(key)
    return keys


def _known_keys(location: Sequence[int | str]) -> list[str]:
    """The keys of the section at a place."""
    section: type[Section] = StudyConfig
    for part in location:
        # A number is the place in a list such as `objectives`, and a union's alternative is no key:
        # both stay in the same section.
        field = section.model_fields.get(part) if isinstance(part, str) else None
        if field is None:
            continue
        for kind in _kinds_of(field.annotation):
            if issubclass(kind, Section):
                section = kind
                break
    return list(section.model_fields)


def _kinds_of(annotation: Any) -> list[type]:
    """The classes of an annotation such as `list[ObjectiveConfig]` or `ThenConfig | None`."""
    if isinstance(annotation, type) and not get_args(annotation):
        return [annotation]
    kinds = []
    for argument in get_args(annotation):
        kinds += _kinds_of(argument)
    return kinds


def _brief(value: object) -> str:
    text = repr(value)
    if len(text) < 100:
        return text
    return f"{text[:97]}..."
