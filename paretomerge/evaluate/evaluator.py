"""The seam between weights and numbers: Score, Objective, Evaluator."""

import math
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from paretomerge.errors import EvaluationError

Split = Literal["search", "held_out"]


@dataclass(frozen=True)
class Score:
    """One measured number in the user's own direction.

    stderr: its standard error (0 where it is exact). n: examples it was measured on. example_scores: the outcome of each.
    """

    value: float
    stderr: float = 0.0
    n: int = 1
    example_scores: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise EvaluationError(f"expected a finite score, got {self.value}")
        if not 0 <= self.stderr < math.inf:
            raise EvaluationError(f"expected a standard error of 0 or more, got {self.stderr}")

    @property
    def text(self) -> str:
        """For people: three decimals, but counts (of layers, of parameters) as they are, and what is smaller with two digits."""
        counted = self.n == 1 and self.stderr == 0 and self.value == int(self.value)
        if counted:
            return f"{int(self.value):,}"
        return f"{self.value:.2g}" if 0 < abs(self.value) < 0.001 else f"{self.value:.3f}"

    @classmethod
    def mean_of(cls, example_scores: Sequence[float]) -> "Score":
        """The mean of per-example scores with the standard error of a mean."""
        n = len(example_scores)
        mean = sum(example_scores) / n
        variance = sum((x - mean) ** 2 for x in example_scores) / (n - 1) if n > 1 else 0.0
        return cls(mean, math.sqrt(variance / n), n, tuple(float(x) for x in example_scores))


@dataclass(frozen=True)
class Objective:
    """A score that the search improves; the only place that knows which way is up for the user."""

    name: str
    maximise: bool = True

    def inside(self, value: float) -> float:
        """The user's number -> the number that the search maximises (and back: it is its own inverse)."""
        return value if self.maximise else -value


@dataclass(frozen=True)
class Candidate:
    """What is scored: a loaded model and its tokenizer. `facts` came with the merge (see `MergeFact`).

    key: the same for merges that are the same, in any study; "" where that is not known.
    """

    model: Any
    tokenizer: Any
    facts: Mapping[str, float]
    key: str = ""


class Evaluator(Protocol):
    """Turns the live model into scores by name. Must not change the model."""

    def evaluate(self, live: Candidate, split: Split) -> Mapping[str, Score]:
        """Score on the examples that are searched on, or on those that are held out."""


@runtime_checkable
class PerExample(Evaluator, Protocol):
    """An evaluator whose scores are made of items that can be had a few at a time."""

    def items(self, split: Split) -> Mapping[str, Sized]:
        """Score's name -> its items."""

    def outcomes(
        self, live: Candidate, split: Split, wanted: Mapping[str, Sequence[int]]
    ) -> Mapping[str, list[Any]]:
        """Score's name -> the outcome of each wanted item, by its place."""

    def score(self, split: Split, name: str, outcomes: Sequence[Any]) -> Score:
        """What outcomes make together."""


@dataclass(frozen=True)
class MergeFact:
    """What a merge tells of itself as a score: `sparsity` (MM-MO's third objective: minus the L1 distance to the base, in
    units of the farthest source), `layers` or `parameters`. name: of the score, by default the fact's.
    """

    fact: str
    name: str = ""

    def evaluate(self, live: Candidate, split: Split) -> Mapping[str, Score]:
        if self.fact not in live.facts:
            raise EvaluationError(
                f"expected a merge that has {self.fact}, got a route through layers, which has none"
            )
        return {self.name or self.fact: Score(live.facts[self.fact])}


@dataclass(frozen=True)
class All:
    """Several evaluators as one."""

    parts: tuple[Evaluator, ...]

    @property
    def notes(self) -> list[str]:
        """What users should know of how their merges are scored."""
        return [note for part in self.parts for note in getattr(part, "notes", ())]

    def evaluate(self, live: Candidate, split: Split) -> Mapping[str, Score]:
        return {
            name: score for part in self.parts for name, score in part.evaluate(live, split).items()
        }


def parts_of(evaluator: Evaluator) -> tuple[Evaluator, ...]:
    """The evaluators that it is made of; itself, where it is one."""
    return evaluator.parts if isinstance(evaluator, All) else (evaluator,)
