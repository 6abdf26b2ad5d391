"""The interface between weights and numbers: an `Evaluator` turns a `Candidate` into `Score`s."""

import math
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, runtime_checkable

from paretomerge.arguments import as_float, as_integer
from paretomerge.errors import EvaluationError, shorten
from paretomerge.evaluate.model_kind import ModelKind

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Split = Literal["search", "held_out", "selection"]
"""Which examples.

`search`: those that the search looks at. `held_out`: those that only the report looks at.
`selection`: those by which a pick is made among the best trials.
"""

MetricValue: TypeAlias = Any
"""One example's value of a metric: a number, or whatever the metric's aggregation takes (pairs)."""


MetricValues: TypeAlias = dict[str, MetricValue]
"""Request digest of an example -> its value of the metric."""

ExampleIndices: TypeAlias = Mapping[str, Sequence[int]]
"""Name of a score -> some of its examples, by their place in the data."""


@dataclass(frozen=True)
class Score:
    """One measured number, in the user's own direction.

    Numbers of numpy and torch become Python's, since the record is JSON.

    Attributes:
        value: The number.
        stderr: Its standard error; 0 where the number is exact.
        n: How many examples (or repeated measurements) it comes from.
        example_scores: The score of each example, in the order of the data; None where the number
            is not a mean over examples.

    Raises:
        EvaluationError: The value or the standard error is not a finite number, or the latter is
            negative; `n` is not a whole number above 0; an example's score is no number.

    Example:
        >>> Score.mean_of([1, 0, 1, 1])
        Score(value=0.75, stderr=0.25, n=4)
        >>> Score(-0.25).text
        '-0.250'
    """

    value: float
    stderr: float = 0.0
    n: int = 1
    # Not in the repr: thousands of numbers would hide the score.
    example_scores: tuple[float, ...] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        value = _as_number("a score", self.value)
        stderr = _as_number("a standard error", self.stderr)
        if not math.isfinite(value):
            raise EvaluationError(f"a score must be finite, got {shorten(self.value)}")
        # NaN fails this comparison, too.
        if not 0 <= stderr < math.inf:
            raise EvaluationError(
                "a standard error must be finite and at least 0, "
                f"got {shorten(self.stderr)}"
            )
        # The class is frozen, so its fields cannot be assigned.
        object.__setattr__(self, "value", value)
        object.__setattr__(self, "stderr", stderr)
        object.__setattr__(self, "n", _as_count(self.n))
        if self.example_scores is not None:
            scores = _as_numbers(self.example_scores)
            object.__setattr__(self, "example_scores", scores)

    @property
    def text(self) -> str:
        """The value for people: integers for counts, three decimals or two digits for all else."""
        if self.is_count:
            return f"{int(self.value):,}"
        return self.decimal_text

    @property
    def is_count(self) -> bool:
        """Whether it is a whole number without an error, such as the number of layers."""
        # A mean over examples that is whole is still a mean.
        is_exact = self.n == 1 and self.stderr == 0
        return is_exact and self.value == int(self.value)

    @property
    def decimal_text(self) -> str:
        """The value with three decimals, or two digits where it is tiny."""
        if 0 < abs(self.value) < 0.001:
            return f"{self.value:.2g}"
        return f"{self.value:.3f}"

    @classmethod
    def mean_of(cls, example_scores: Iterable[float]) -> "Score":
        """The mean of per-example scores, with the standard error of a mean.

        Args:
            example_scores: At least one number.

        Returns:
            The mean; its standard error is 0 for a single example.

        Raises:
            EvaluationError: There are no examples, or a score is not a finite number.
        """
        scores = _as_numbers(example_scores)
        n = len(scores)
        if not n:
            raise EvaluationError("a mean over examples needs at least one, got none")
        mean = sum(scores) / n
        variance = 0.0
        if n > 1:
            try:
                squares = sum((score - mean) ** 2 for score in scores)
            except OverflowError as error:
                raise EvaluationError(
                    "the scores of examples are too large for a standard error"
                ) from error
            variance = squares / (n - 1)
        stderr = math.sqrt(variance / n)
        return cls(mean, stderr, n, scores)


_SHARED = {0.0: 0.0, 1.0: 1.0}
"""One object for each of the two commonest scores: a search keeps millions of them in memory."""


def _as_number(what: str, value: object) -> float:
    number = as_float(value)
    if number is None:
        raise EvaluationError(f"{what} must be a number, got {shorten(value)}")
    return number


def _as_numbers(values: object) -> tuple[float, ...]:
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise EvaluationError(
            f"the scores of examples must be a list of numbers, got {shorten(values)}"
        )
    # Read from a record, or checked before: a study of thousands of trials has millions.
    if type(values) is tuple and set(map(type, values)) <= {float}:
        return values
    numbers = []
    for value in values:
        number = _as_number("the score of an example", value)
        numbers.append(_SHARED.get(number, number))
    return tuple(numbers)


def _as_count(n: object) -> int:
    count = as_integer(n)
    if count is None or count < 1:
        raise EvaluationError(
            f"the number of examples, n, must be a whole number above 0, got {shorten(n)}"
        )
    return count


Scores: TypeAlias = Mapping[str, Score]
"""Name of a score -> the score."""


@dataclass(frozen=True)
class Objective:
    """A score that the search improves. Nothing else knows the user's direction.

    Attributes:
        name: The score's name.
        maximise: Whether higher is better for the user.
    """

    name: str
    maximise: bool = True

    def inside(self, value: float) -> float:
        """Convert between the user's number and the one that the search maximises, either way."""
        if self.maximise:
            return value
        return -value


@dataclass(frozen=True)
class Candidate:
    """A merged model, loaded and ready to be scored.

    Attributes:
        model: The model, of the class that the base's config names. Evaluators must not change
            it.
        tokenizer: Its tokenizer; None for models that read no text.
        facts: Numbers that the merge itself measured, by name (see `MergeFact`).
        key: Identifies the merge in every study, for a `ScoreCache`; "" where it is unknown.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase | None"
    facts: Mapping[str, float]
    key: str = ""

    @property
    def text_tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer, for evaluators that need one."""
        # A search has checked it before its first trial; a single checkpoint may lack one.
        if self.tokenizer is None:
            raise EvaluationError(
                "the model has no tokenizer; copy the files of a tokenizer, such as "
                "tokenizer.json, into its folder"
            )
        return self.tokenizer


class Evaluator(Protocol):
    """Turns a candidate into scores by name. It must not change the model.

    An evaluator with a list of strings `notes` reports them to the user. One with a method
    `check_model_kind(kind)` may refuse a `ModelKind` before the first trial.

    Example:
        >>> class LayerCount:
        ...     def evaluate(self, candidate, split):
        ...         return {"layers": Score(candidate.model.config.num_hidden_layers)}
        >>> from types import SimpleNamespace
        >>> model = SimpleNamespace(config=SimpleNamespace(num_hidden_layers=24))
        >>> LayerCount().evaluate(Candidate(model, None, {}), "search")["layers"].text
        '24'
    """

    def evaluate(self, candidate: Candidate, split: Split) -> Scores:
        """Score a candidate.

        Args:
            candidate: The model, its tokenizer and its facts.
            split: Which examples to score on.

        Returns:
            Name -> score.

        Raises:
            EvaluationError: The candidate cannot be scored; the trial fails, the search goes on.
        """


@runtime_checkable
class PerExample(Evaluator, Protocol):
    """An evaluator that can score a few examples at a time, as racing does."""

    def examples(self, split: Split) -> Mapping[str, Sized]:
        """Name of the score -> its examples, in the order of the data."""

    def example_scores(
        self, candidate: Candidate, split: Split, indices: ExampleIndices
    ) -> Mapping[str, list[MetricValue]]:
        """Score some examples.

        Args:
            candidate: The model to score.
            split: The split that `indices` refers to.
            indices: Which examples of which score.

        Returns:
            Name of the score -> the per-example scores, in the order of its indices.
        """

    def aggregate(
        self, split: Split, name: str, example_scores: Sequence[MetricValue]
    ) -> Score:
        """Combine per-example scores of one name into its score."""


@dataclass(frozen=True)
class MergeFact:
    """Reports as a score what the merge itself measured.

    Attributes:
        fact: `sparsity` (the third objective of MM-MO: minus the L1 distance to the base model, in
            units of the most distant source), `layers` or `parameters`.
        name: The score's name. Defaults to the name of the fact.
    """

    fact: str
    name: str = ""

    def evaluate(self, candidate: Candidate, split: Split) -> Scores:
        """Look the fact up; see `Evaluator.evaluate`."""
        if self.fact not in candidate.facts:
            raise EvaluationError(
                f"this merge has no {self.fact}: routes through layers do not measure it"
            )
        name = self.name or self.fact
        return {name: Score(candidate.facts[self.fact])}


@dataclass(frozen=True)
class CombinedEvaluator:
    """Several evaluators as one.

    Attributes:
        evaluators: They run in this order, and their scores come in the same order.
    """

    evaluators: tuple[Evaluator, ...]

    @property
    def notes(self) -> list[str]:
        """What users should know about how their merges are scored."""
        notes: list[str] = []
        for evaluator in self.evaluators:
            # Notes are optional, so they are no part of the protocol.
            notes += getattr(evaluator, "notes", ())
        return notes

    def check_model_kind(self, kind: ModelKind) -> None:
        """Check that models of a kind have all scores; see `Evaluator`."""
        for evaluator in self.evaluators:
            # Checks are optional, so they are no part of the protocol.
            check = getattr(evaluator, "check_model_kind", None)
            if check is not None:
                check(kind)

    def evaluate(self, candidate: Candidate, split: Split) -> Scores:
        """Score with each evaluator in turn; see `Evaluator.evaluate`."""
        scores: dict[str, Score] = {}
        for evaluator in self.evaluators:
            scores |= evaluator.evaluate(candidate, split)
        return scores


def evaluators_in(evaluator: Evaluator) -> tuple[Evaluator, ...]:
    """The parts of a `CombinedEvaluator`; any other evaluator is its only part."""
    if isinstance(evaluator, CombinedEvaluator):
        return evaluator.evaluators
    return (evaluator,)
