"""What merges are asked for: scores to improve, scores to keep within bounds, scores that are only looked at."""

from collections.abc import Mapping
from dataclasses import dataclass

from paretomerge.evaluate.evaluator import Evaluator, MergeFact, Objective, Score, evaluators_in
from paretomerge.evaluate.speed import SpeedEvaluator
from paretomerge.study.racing import Racing


@dataclass(frozen=True)
class Constraint:
    """A bound on the score named `score`, in the user's own direction: one of `at_least` and `at_most`."""

    score: str
    at_least: float | None = None
    at_most: float | None = None

    @property
    def text(self) -> str:
        """What it says, which is also its name in the record: `sort at least 0.8`."""
        if self.at_least is not None:
            return f"{self.score} at least {self.at_least:g}"
        return f"{self.score} at most {self.at_most:g}"

    def excess(self, value: float) -> float:
        """By how much a score breaks the bound: Optuna's sense of a constraint, kept where this is 0 or less."""
        if self.at_least is not None:
            return self.at_least - value
        assert self.at_most is not None
        return value - self.at_most


@dataclass(frozen=True)
class Goals:
    """evaluator: its scores include those of every objective and constraint. watched: scored on held-out items only.

    time_limit: seconds that scoring a candidate on the search items may take. racing: whether, and how, it may be left half-scored.
    """

    evaluator: Evaluator
    objectives: tuple[Objective, ...]
    constraints: tuple[Constraint, ...] = ()
    watched: Evaluator | None = None
    time_limit: float | None = None
    racing: Racing | None = None

    @property
    def notes(self) -> list[str]:
        """What users should know of how their merges are scored."""
        return [
            note
            for evaluator in (self.evaluator, self.watched)
            for note in getattr(evaluator, "notes", ())
        ]

    @property
    def scores(self) -> tuple[str, ...]:
        """Names of the scores that every trial needs, the objectives' first."""
        return tuple(
            dict.fromkeys(
                [*(o.name for o in self.objectives), *(c.score for c in self.constraints)]
            )
        )

    @property
    def sized(self) -> bool:
        """Whether a score is about how large a merge is."""
        parts = evaluators_in(self.evaluator)
        sizes = {
            p.name or p.fact for p in parts if isinstance(p, MergeFact) and p.fact != "sparsity"
        }
        sizes |= {p.name for p in parts if isinstance(p, SpeedEvaluator)}
        return not sizes.isdisjoint(self.scores)

    @property
    def averaged(self) -> bool:
        """Whether a mean of the objectives' scores says how good they are: not where one of them is minimised."""
        return all(o.maximise for o in self.objectives)

    def mean(self, scores: Mapping[str, Score] | None) -> float | None:
        """The plain mean of the objectives' scores; None where one is missing, or where it would mislead."""
        if not self.averaged or not scores or any(o.name not in scores for o in self.objectives):
            return None
        return sum(scores[o.name].value for o in self.objectives) / len(self.objectives)

    def excesses(self, scores: Mapping[str, Score]) -> dict[str, float]:
        """Each constraint's name -> by how much it is broken (kept where 0 or less)."""
        return {c.text: c.excess(scores[c.score].value) for c in self.constraints}
