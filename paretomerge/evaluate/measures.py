"""What a user can measure of a merge.

Plain descriptions, which load nothing until something is scored.

A *measure* becomes an evaluator when a search begins (`study/build.py`). Used as an objective, it
has a direction.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from paretomerge.errors import ConfigError, shorten

Direction = Literal["maximize", "minimize"]
SIZES = ("layers", "parameters", "seconds_per_token")
PERPLEXITY_METRICS = ("perplexity", "bits_per_byte")


@dataclass(frozen=True)
class Task:
    """A task of lm-evaluation-harness, built in or defined by a YAML file of yours.

    Attributes:
        task: The task's name in the harness.
        metric: One of the task's metrics, or `output_length`, the tokens of written answers. By
            default the task's first.
        name: What the score is called in tables and preferences. By default the task's name.
        direction: `maximize` or `minimize`. By default what the task says of the metric.

    Raises:
        ConfigError: The direction is not one of the two.

    Example:
        >>> Task("gsm8k", metric="exact_match").name
        'gsm8k'
    """

    task: str
    metric: str | None = None
    name: str = ""
    direction: Direction | None = None

    def __post_init__(self) -> None:
        _set_name(self, self.task)
        _check_direction(self.name, self.direction)

    @property
    def default_name(self) -> str:
        """The name where none is set."""
        return self.task


@dataclass(frozen=True)
class Function:
    """A Python function of yours that scores the loaded model.

    It is called as `function(model, tokenizer)`, and with `split="search"` or `split="held_out"`
    where it has an argument of that name. It returns a number, a `Score`, or a dict of either; a
    dict's keys are appended to the name: `name/key`.

    Attributes:
        function: The function, or `module:function`; a study.yaml can only name the latter.
        name: What the score is called. By default the function's name.
        direction: `maximize` or `minimize`. By default `maximize`.

    Raises:
        ConfigError: `function` is neither callable nor `module:function`, or the direction is
            unknown.

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
            module, _, attribute = self.function.partition(":")
            if not module or not attribute:
                raise ConfigError(
                    "function: write module:function, such as my_metrics:brevity, not "
                    f"{self.function!r}"
                )
        elif not callable(self.function):
            raise ConfigError(f"function: {shorten(self.function)} cannot be called")
        _set_name(self, self.default_name)
        _check_direction(self.name, self.direction)

    @property
    def default_name(self) -> str:
        """The name where none is set."""
        if isinstance(self.function, str):
            return self.function.partition(":")[2]
        return getattr(self.function, "__name__", type(self.function).__name__)

    @property
    def path(self) -> str:
        """`module:function`."""
        if isinstance(self.function, str):
            return self.function
        module = getattr(self.function, "__module__", type(self.function).__module__)
        qualified = getattr(
            self.function, "__qualname__", type(self.function).__qualname__
        )
        return f"{module}:{qualified}"


@dataclass(frozen=True)
class Perplexity:
    """The perplexity of a plain text.

    Every other window of it is searched on, the rest is held out.

    Attributes:
        path: A text file in UTF-8.
        metric: `perplexity`, or `bits_per_byte`, which compares models of different vocabularies.
        name: What the score is called. By default the metric.
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
        prompts: A file of prompts, see docs/evaluation.md.
        criteria: What a good answer is, in your words.
        base_url: An endpoint that speaks OpenAI's protocol. By default the environment's.
        model: The judge's name at that endpoint. By default the endpoint's only model.
        max_tokens: The longest answer of the merge, in tokens.
        name: What the score is called.
        direction: By default `maximize`.

    Raises:
        ConfigError: There are no criteria, `max_tokens` is below 1, or the direction is unknown.

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
        if not self.criteria:
            raise ConfigError("judge: say in `criteria` what a good answer is")
        if self.max_tokens < 1:
            raise ConfigError(
                f"judge: max_tokens must be 1 or more, not {self.max_tokens}"
            )
        _check_direction(self.name, self.direction)

    @property
    def default_name(self) -> str:
        """The name where none is set."""
        return "judge"


@dataclass(frozen=True)
class Sparsity:
    """How close the merge stays to the base: MM-MO's third objective (Li et al.

    2024, arXiv 2407.00487, sec. 3.4).

    The score is minus the L1 distance of the merge to the base, in units of the source that is
    farthest from it. It is 0 for the base and -1 for that source.

    Attributes:
        name: What the score is called.
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
        _check_direction(self.name, self.direction)

    @property
    def default_name(self) -> str:
        """The name where none is set."""
        return "sparsity"


@dataclass(frozen=True)
class Size:
    """How large or slow the merge is; useful where a search may drop or repeat layers.

    Attributes:
        kind: `layers`, `parameters` or `seconds_per_token` (measured on this machine, one
            sequence).
        name: What the score is called. By default the kind.
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
    """A bound that a merge must keep to be on the front.

    Attributes:
        measure: What is measured, or the name of one of the study's objectives.
        at_least: The score must not be below this. Exactly one of the two bounds is set.
        at_most: The score must not be above this.

    Raises:
        ConfigError: Neither bound is set, or both are.

    Example:
        >>> Constraint(Task("hellaswag"), at_least=0.7).text
        'hellaswag at least 0.7'
    """

    measure: Measure | str
    at_least: float | None = field(default=None, kw_only=True)
    at_most: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if (self.at_least is None) == (self.at_most is None):
            raise ConfigError(
                f"constraint on {self.score}: set one of `at_least` and `at_most`"
            )

    @property
    def score(self) -> str:
        """The name of the score that is bounded."""
        return self.measure if isinstance(self.measure, str) else self.measure.name

    @property
    def text(self) -> str:
        """The bound in words; it is also the constraint's name in the record."""
        if self.at_least is not None:
            return f"{self.score} at least {self.at_least:g}"
        return f"{self.score} at most {self.at_most:g}"

    def violation(self, value: float) -> float:
        """By how much a score breaks the bound: 0 or less where it is kept, as in Optuna.

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
    """Whether a measure is minimised by default; a task says so itself, once it is loaded."""
    return isinstance(measure, Size | Perplexity)


def _set_name(measure: Measure, default: str) -> None:
    if not measure.name:
        object.__setattr__(measure, "name", default)


def _check_direction(name: str, direction: str | None) -> None:
    if direction not in (None, "maximize", "minimize"):
        raise ConfigError(
            f"{name}: direction must be maximize or minimize, not {shorten(direction)}"
        )
