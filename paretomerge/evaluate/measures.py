"""Plain descriptions of what a user can measure of a merge.

They load nothing. A *measure* becomes an evaluator when a search begins (`study/parts.py`). Used as
an objective, it has a direction.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from paretomerge.arguments import (
    Reader,
    as_integer,
    describe,
    flag,
    integer,
    label,
    mapping_of,
    number,
    optional,
    path,
    plain_data,
    read_fields,
    word,
)
from paretomerge.errors import ConfigError, shorten

# American spelling and whole words, as in Optuna's `direction`.
Direction = Literal["maximize", "minimize"]
SIZES = ("layers", "parameters", "seconds_per_token")
PERPLEXITY_METRICS = ("perplexity", "bits_per_byte")


def _token(name: str, value: object) -> str | int:
    number = as_integer(value)
    if number is not None and number >= 0:
        return number
    if isinstance(value, str) and value:
        return value
    raise ConfigError(
        f"{name}: expected a text such as '</think>', or the number of a token, got "
        f"{describe(value)}"
    )


def _generation_setting(name: str, value: object) -> object:
    """Read one setting of generation: whatever a YAML file can hold."""
    return plain_data(value)


PROMPT_READERS: Mapping[str, Reader] = {
    "num_fewshot": optional(integer(least=0)),
    "apply_chat_template": optional(flag),
    "fewshot_as_multiturn": optional(flag),
    "system_instruction": optional(word),
    "gen_kwargs": optional(mapping_of(_generation_setting, "{'temperature': 0.7}")),
    "think_end_token": optional(_token),
    "add_bos_token": optional(flag),
}
"""How questions are put, and where answers begin: of a study, or of one task; and their readers.

The names are those of lm-evaluation-harness's command line. A `Task`, an `Evaluation` and their
sections of a study.yaml have a field of each name.
"""


@dataclass(frozen=True)
class Task:
    """A task of lm-evaluation-harness, built in or defined by a YAML file of yours.

    Attributes:
        task: The task's name in the harness.
        metric: One of the task's metrics, or `output_length`, the number of tokens in the model's
            answers. By default the task's first metric. Where a task has several filters, name one:
            `exact_match,flexible-extract`.
        name: The name of the score in tables and preferences. By default the task's name.
        direction: `maximize` or `minimize`. By default the task's direction for the metric.
        num_fewshot: Examples before each question. By default the study's number
            (`Evaluation.num_fewshot`), or the task's own.
        search_items: Examples to search on. By default the study's number
            (`Evaluation.search_items`).
        apply_chat_template: Whether questions are put as chats. By default the study's setting, as
            of all settings below.
        fewshot_as_multiturn: Whether examples are turns of the chat.
        system_instruction: The chat's system message, or text before each question.
        gen_kwargs: Settings of generation, in place of all of the study's.
        think_end_token: Where a model's thoughts end; a text, or the number of a token.
        add_bos_token: Whether prompts begin with the token that begins a sequence.

    Raises:
        ConfigError: The direction is not one of the two, or another argument has a wrong type.

    Example:
        >>> Task("gsm8k", metric="exact_match,flexible-extract").name
        'gsm8k'
        >>> Task("gsm8k", name="gsm8k_chat", apply_chat_template=True, num_fewshot=8).name
        'gsm8k_chat'
    """

    task: str
    metric: str | None = None
    name: str = ""
    direction: Direction | None = None
    num_fewshot: int | None = None
    search_items: int | None = None
    apply_chat_template: bool | None = None
    fewshot_as_multiturn: bool | None = None
    system_instruction: str | None = None
    gen_kwargs: Mapping[str, Any] | None = None
    think_end_token: str | int | None = None
    add_bos_token: bool | None = None

    def __post_init__(self) -> None:
        readers = {
            "task": word,
            "metric": optional(word),
            "search_items": optional(integer(least=1)),
            **PROMPT_READERS,
        }
        _read_arguments(self, readers)
        _set_name(self, self.task)
        _check_direction(self.name, self.direction)

    @property
    def default_name(self) -> str:
        """The name where none is set."""
        return self.task


@dataclass(frozen=True)
class Function:
    """A Python function of yours that scores the loaded model.

    It is called as `function(model, tokenizer)`, with None where the base has no tokenizer. If it
    has an argument `split`, it also gets `split="search"` or `split="held_out"`. It returns a
    number or a `Score`. A number counts as exact. For a mean over examples return
    `Score.mean_of(values)`, whose standard error the search and the comparisons use.

    Attributes:
        function: The function, or `module:function`. A study.yaml can hold only the second form.
        name: The name of the score. By default the function's name.
        direction: `maximize` or `minimize`. By default `maximize`.

    Raises:
        ConfigError: `function` is neither callable nor `module:function`, it is built into Python
            without a signature, or the direction is unknown.

    Example:
        >>> def brevity(model, tokenizer):
        ...     return 1.0
        >>> Function(brevity, direction="minimize").name
        'brevity'
    """

    function: str | Callable[..., object]
    name: str = ""
    direction: Direction | None = None

    def __post_init__(self) -> None:
        if isinstance(self.function, str):
            # Only the form is checked: importing the module may take seconds.
            module, _, attribute = self.function.partition(":")
            if not module or not attribute:
                raise ConfigError(
                    "function: write module:function, such as my_metrics:brevity, not "
                    f"{self.function!r}"
                )
        elif not callable(self.function):
            raise ConfigError(f"function: {shorten(self.function)} cannot be called")
        elif not has_signature(self.function):
            raise ConfigError(f"function: {no_signature(self.function)}")
        _read_arguments(self, {})
        _set_name(self, self.default_name)
        _check_direction(self.name, self.direction)

    @property
    def default_name(self) -> str:
        """The name where none is set."""
        if isinstance(self.function, str):
            return self.function.partition(":")[2]
        # A callable object has no `__name__`, so its class names the score.
        return getattr(self.function, "__name__", type(self.function).__name__)

    @property
    def path(self) -> str:
        """The function as `module:function`."""
        if isinstance(self.function, str):
            return self.function
        kind = type(self.function)
        module = getattr(self.function, "__module__", kind.__module__)
        # The qualified name shows a nested function by its dots, which a file cannot name
        # (`check_functions`).
        qualified = getattr(self.function, "__qualname__", kind.__qualname__)
        return f"{module}:{qualified}"


@dataclass(frozen=True)
class Perplexity:
    """The perplexity of a plain text.

    The text is cut into windows. Every other window is used to search, and the rest is held out.

    Attributes:
        path: A text file in UTF-8.
        metric: `perplexity`, or `bits_per_byte`, which compares models of different vocabularies.
        name: The name of the score. By default the metric.
        direction: By default `minimize`.

    Raises:
        ConfigError: The metric or the direction is unknown.

    Example:
        >>> Perplexity("corpus.txt", metric="bits_per_byte").name
        'bits_per_byte'
    """

    path: str | Path
    metric: Literal["perplexity", "bits_per_byte"] = "perplexity"
    name: str = ""
    direction: Direction | None = None

    def __post_init__(self) -> None:
        if self.metric not in PERPLEXITY_METRICS:
            raise ConfigError(
                f"metric: use perplexity or bits_per_byte, not {shorten(self.metric)}"
            )
        _read_arguments(self, {"path": path})
        _set_name(self, self.metric)
        _check_direction(self.name, self.direction)

    @property
    def default_name(self) -> str:
        """The name where none is set."""
        return self.metric


@dataclass(frozen=True)
class Judge:
    """A language model that grades the merge's answers to your prompts, from 0 to 1.

    Attributes:
        prompts: A file of JSON lines, each with a `prompt` and optionally a `reference`, an answer
            that is known to be good. Every other line is held out.
        criteria: What a good answer is, in your words.
        base_url: An endpoint that speaks OpenAI's protocol. By default the environment names it.
        model: The judge's name at that endpoint. By default `PARETOMERGE_LLM_MODEL` in the
            environment, else `OPENAI_MODEL`.
        max_tokens: The longest answer of the merge, in tokens.
        name: The name of the score.
        direction: By default `maximize`.

    Raises:
        ConfigError: There are no criteria, `max_tokens` is below 1, the direction is unknown, or
            another argument has a wrong type.

    Example:
        >>> Judge("prompts.jsonl", criteria="The answer is polite.").name
        'judge'
    """

    prompts: str | Path
    criteria: str
    base_url: str | None = None
    model: str | None = None
    max_tokens: int = 256
    name: str = "judge"
    direction: Direction | None = None

    def __post_init__(self) -> None:
        # Without criteria the judge would grade by a standard that no one wrote down.
        if not self.criteria:
            raise ConfigError("judge: say in `criteria` what a good answer is")
        readers = {
            "prompts": path,
            "criteria": word,
            "base_url": optional(word),
            "model": optional(word),
            "max_tokens": integer(),
        }
        _read_arguments(self, readers)
        if self.max_tokens < 1:
            raise ConfigError(
                f"judge: max_tokens must be 1 or more, not {self.max_tokens}"
            )
        _set_name(self, self.default_name)
        _check_direction(self.name, self.direction)

    @property
    def default_name(self) -> str:
        """The name where none is set."""
        return "judge"


@dataclass(frozen=True)
class Sparsity:
    """How close the merge stays to the base.

    This is MM-MO's third objective (Li et al. 2024, arXiv 2407.00487, sec. 3.4). The score is minus
    the L1 distance of the merge to the base, divided by the distance of the farthest source. It is
    0 for the base and -1 for that source.

    Attributes:
        name: The name of the score.
        direction: By default `maximize`.

    Raises:
        ConfigError: The direction is unknown.

    Example:
        >>> Sparsity().name
        'sparsity'
    """

    name: str = "sparsity"
    direction: Direction | None = None

    def __post_init__(self) -> None:
        _read_arguments(self, {})
        _set_name(self, self.default_name)
        _check_direction(self.name, self.direction)

    @property
    def default_name(self) -> str:
        """The name where none is set."""
        return "sparsity"


@dataclass(frozen=True)
class Size:
    """How large or slow the merge is, for searches that may drop or repeat layers.

    Attributes:
        kind: `layers`, `parameters` or `seconds_per_token` (measured on this machine, one
            sequence).
        name: The name of the score. By default the kind.
        direction: By default `minimize`.

    Raises:
        ConfigError: The kind or the direction is unknown.

    Example:
        >>> Size("layers").name
        'layers'
    """

    kind: Literal["layers", "parameters", "seconds_per_token"]
    name: str = ""
    direction: Direction | None = None

    def __post_init__(self) -> None:
        if self.kind not in SIZES:
            raise ConfigError(
                f"size: use one of {', '.join(SIZES)}, not {shorten(self.kind)}"
            )
        _read_arguments(self, {})
        _set_name(self, self.kind)
        _check_direction(self.name, self.direction)

    @property
    def default_name(self) -> str:
        """The name where none is set."""
        return self.kind


Measure = Task | Function | Perplexity | Judge | Sparsity | Size
"""Anything that scores a merge; a study maximises or minimises some of them."""


@dataclass(frozen=True)
class Constraint:
    """A bound that a merge must satisfy to be on the front.

    Attributes:
        measure: A measure, or the name of one of the study's objectives.
        at_least: The score must not be below this. Exactly one of the two bounds is set.
        at_most: The score must not be above this.

    Raises:
        ConfigError: Neither bound is set, or both are; a bound is no finite number; or `measure` is
            neither a measure nor a name.

    Example:
        >>> Constraint(Task("hellaswag"), at_least=0.7).text
        'hellaswag at least 0.7'
    """

    measure: Measure | str
    # By keyword only: `Constraint(measure, 0.7)` would not say which bound is meant.
    at_least: float | None = field(default=None, kw_only=True)
    at_most: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        is_name = isinstance(self.measure, str) and self.measure
        if not is_name and not isinstance(self.measure, Measure):
            raise ConfigError(f"constraint: {not_a_measure(self.measure)}")
        readers = {"at_least": optional(number), "at_most": optional(number)}
        read_fields(self, readers, f"constraint on {self.score}: ")
        if (self.at_least is None) == (self.at_most is None):
            raise ConfigError(
                f"constraint on {self.score}: set one of `at_least` and `at_most`"
            )

    @property
    def score(self) -> str:
        """The name of the score that is bounded."""
        if isinstance(self.measure, str):
            return self.measure
        return self.measure.name

    @property
    def text(self) -> str:
        """The bound in words, which is also the constraint's name in the record."""
        # Do not reword it: recorded violations are stored under this text.
        if self.at_least is not None:
            return f"{self.score} at least {self.at_least:.12g}"
        return f"{self.score} at most {self.at_most:.12g}"

    def violation(self, value: float) -> float:
        """Measure by how much a score breaks the bound.

        As in Optuna, 0 or less means that the bound is satisfied.

        Args:
            value: The score, in its own units.

        Returns:
            The violation, in the score's units.
        """
        if self.at_least is not None:
            return self.at_least - value
        assert self.at_most is not None
        return value - self.at_most


def lower_is_better(measure: Measure) -> bool:
    """Whether a measure is minimised by default. A task has its own default, once it is loaded."""
    return isinstance(measure, Size | Perplexity)


def not_a_measure(value: object) -> str:
    """Say what to write in place of a value that should be a measure.

    Args:
        value: The value.

    Returns:
        A sentence for an error message.
    """
    if isinstance(value, str):
        return f"a name alone is no objective; write Task({value!r})"
    # A class can be called, too, but it is no function that scores.
    if callable(value) and not isinstance(value, type):
        return f"write Function({shorten(value)}), not the function alone"
    return f"use Task, Function, Perplexity, Judge, Sparsity or Size, not {describe(value)}"


def has_signature(function: Callable[..., object]) -> bool:
    """Whether Python knows the parameters of a function; some of its own, like `max`, have none."""
    try:
        inspect.signature(function)
    except (TypeError, ValueError):
        return False
    return True


def no_signature(function: object) -> str:
    """Say what to do with a function without a signature."""
    name = getattr(function, "__name__", shorten(function))
    return (
        f"{name} has no signature that Python can read; call it in a function of yours, "
        "def score(model, tokenizer)"
    )


def _read_arguments(measure: Any, readers: Mapping[str, Reader]) -> None:
    """Read a measure's own arguments, and its name."""
    kind = type(measure).__name__
    read_fields(measure, {**readers, "name": label}, f"{kind}: ")
    if measure.name in ("maximize", "minimize"):
        raise ConfigError(
            f"{kind}: a score cannot be named {measure.name!r}; for its direction write "
            f"direction={measure.name!r}, or set another `name`"
        )


def _set_name(measure: Measure, default: str) -> None:
    # The measures are frozen, so only `object.__setattr__` can fill a default in.
    if not measure.name:
        object.__setattr__(measure, "name", default)


def _check_direction(name: str, direction: str | None) -> None:
    # `Literal` is not checked at run time, and a study would take "max" for "minimize".
    if direction not in (None, "maximize", "minimize"):
        raise ConfigError(
            f"{name}: direction must be maximize or minimize, not {shorten(direction)}"
        )
