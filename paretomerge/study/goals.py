"""What a study asks of merges.

Some scores are improved, some must stay within bounds, and some are only watched.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from paretomerge.errors import StudyError
from paretomerge.evaluate.evaluator import (
    Candidate,
    CombinedEvaluator,
    Evaluator,
    MergeFact,
    Objective,
    Score,
    Split,
    evaluators_in,
)
from paretomerge.evaluate.measures import Constraint
from paretomerge.evaluate.model_kind import ModelKind
from paretomerge.evaluate.speed import SpeedEvaluator


@dataclass(frozen=True)
class RaceSettings:
    """When a candidate may be left before all its examples are scored.

    Attributes:
        confidence: The probability of being dominated above which a candidate is left. It is
            checked several times. At 0.95, more than 5 % of the candidates that nearly tie with
            the front are therefore left by mistake.
        first: Examples of each score to begin with.
        growth: The factor by which the number of examples of the least decided score then grows.
        seed: The seed of the order of the examples.
    """

    confidence: float = 0.95
    first: int = 24
    growth: float = 1.5
    seed: int = 0


@dataclass(frozen=True)
class Goals:
    """What a study scores, and for what purpose.

    Attributes:
        evaluator: Scores a candidate; its scores include those of every objective and constraint.
        objectives: What to improve.
        constraints: Bounds that a merge must keep.
        watched: Scores on held-out examples that the search never uses.
        time_limit: Seconds that scoring a candidate on the search examples may take.
        race: Whether, and how, a candidate may be left early.
    """

    evaluator: Evaluator
    objectives: tuple[Objective, ...]
    constraints: tuple[Constraint, ...] = ()
    watched: Evaluator | None = None
    time_limit: float | None = None
    race: RaceSettings | None = None

    @property
    def notes(self) -> list[str]:
        """What users should know about how their merges are scored."""
        notes: list[str] = []
        for evaluator in (self.evaluator, self.watched):
            notes += getattr(evaluator, "notes", ())
        return notes

    @property
    def score_names(self) -> tuple[str, ...]:
        """Names of the scores that every trial needs, the objectives' first."""
        names = [objective.name for objective in self.objectives]
        names += [constraint.score for constraint in self.constraints]
        return tuple(dict.fromkeys(names))

    @property
    def includes_size(self) -> bool:
        """Whether a score measures how large or slow a merge is."""
        # The second level then also tries its models without their middle blocks.
        sizes = set()
        for part in evaluators_in(self.evaluator):
            # Sparsity is a fact of a merge too, but a distance and not a size.
            if isinstance(part, MergeFact) and part.fact != "sparsity":
                sizes.add(part.name or part.fact)
            elif isinstance(part, SpeedEvaluator):
                sizes.add(part.name)
        return not sizes.isdisjoint(self.score_names)

    def check_model_kind(self, kind: ModelKind) -> None:
        """Check that models of a kind have all scores.

        Args:
            kind: The class of the merges.

        Raises:
            EvaluationError: They lack one of them.
        """
        evaluators = [self.evaluator]
        if self.watched is not None:
            evaluators.append(self.watched)
        CombinedEvaluator(tuple(evaluators)).check_model_kind(kind)

    def violations(self, scores: Mapping[str, Score]) -> dict[str, float]:
        """Measure by how much scores break the constraints.

        Args:
            scores: The scores of one trial.

        Returns:
            Each constraint's text -> its violation; 0 or less where the constraint is satisfied.
        """
        violations = {}
        for constraint in self.constraints:
            score = scores[constraint.score]
            violations[constraint.text] = constraint.violation(score.value)
        return violations

    def score(self, candidate: Candidate, split: Split) -> dict[str, Score]:
        """Score a candidate.

        Held-out examples are also scored on what is only watched.

        Args:
            candidate: The loaded merge.
            split: `search` or `held_out`.

        Returns:
            Name -> score, the objectives first.

        Raises:
            EvaluationError: Scoring failed.
            StudyError: An evaluator does not give a score that an objective or a constraint names.
        """
        scores = dict(self.evaluator.evaluate(candidate, split))
        if split == "held_out" and self.watched is not None:
            scores |= self.watched.evaluate(candidate, split)
        for name in self.score_names:
            if name not in scores:
                given = ", ".join(scores) or "none"
                raise StudyError(
                    f"no score is named {name!r}; the evaluators gave {given}"
                )
        return self.in_order(scores)

    def in_order(self, scores: Mapping[str, Score]) -> dict[str, Score]:
        """Put the needed scores first, in the order of `score_names`."""
        needed_first: dict[str, Score] = {}
        for name in self.score_names:
            needed_first[name] = scores[name]
        # A merge of dicts keeps the places of keys that are there already.
        return needed_first | dict(scores)
