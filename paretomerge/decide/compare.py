"""Two models on the same examples: the paired difference, and whether chance explains it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from paretomerge.errors import ConfigError, EvaluationError, unknown_name
from paretomerge.evaluate.evaluator import Score
from paretomerge.types import Array


@dataclass(frozen=True)
class Comparison:
    """`one` minus `other` on the n examples of one task.

    Attributes:
        task: The score's name.
        n: Examples.
        one: The first model's mean.
        other: The second model's mean.
        low: Lower end of the difference's 95 % interval: that of a paired mean (Student's t).
        high: Upper end.
        p: The probability of a difference at least as large if there is none. Where examples are
            right or wrong, of McNemar's exact test; else of the paired t-test.
        only_one: Examples that only the first gets right; None where examples are not right or
            wrong.
        only_other: Examples that only the second gets right.
    """

    task: str
    n: int
    one: float
    other: float
    low: float
    high: float
    p: float
    only_one: int | None = None
    only_other: int | None = None

    @property
    def difference(self) -> float:
        """The mean difference."""
        return self.one - self.other

    @classmethod
    def of(
        cls, task: str, one: Sequence[float], other: Sequence[float]
    ) -> "Comparison":
        """Compare per-example scores.

        Args:
            task: The score's name.
            one: The first model's, `(n,)`.
            other: The second model's on the same examples, in the same order.

        Returns:
            The comparison.

        Raises:
            EvaluationError: The examples differ in number, or there are fewer than two.
        """
        if len(one) != len(other):
            raise EvaluationError(
                f"{task}: the two were not scored on the same examples: {len(one)} and {len(other)}"
            )
        n = len(one)
        if n < 2:
            raise EvaluationError(f"{task}: two examples or more are needed, not {n}")
        first, second = np.asarray(one, dtype=float), np.asarray(other, dtype=float)
        differences = first - second
        mean = float(differences.mean())
        stderr = float(differences.std(ddof=1)) / math.sqrt(n)
        reach = float(stats.t.ppf(0.975, n - 1)) * stderr
        wins: int | None = None
        losses: int | None = None
        # Right-or-wrong examples have an exact test that needs no normal approximation.
        if set(one) | set(other) <= {0.0, 1.0}:
            wins, losses = int((differences > 0).sum()), int((differences < 0).sum())
            p = _mcnemar(wins, losses)
        else:
            p = _paired_t_test(differences, stderr)
        return cls(
            task,
            n,
            float(first.mean()),
            float(second.mean()),
            mean - reach,
            mean + reach,
            p,
            wins,
            losses,
        )


def compare_scores(
    one: Mapping[str, Score], other: Mapping[str, Score], tasks: Sequence[str] = ()
) -> list[Comparison]:
    """Compare two models, score by score.

    Args:
        one: The first model's scores.
        other: The second model's.
        tasks: Scores to compare; by default all that both have per-example scores of.

    Returns:
        One comparison for each score.

    Raises:
        ConfigError: A named score is not there.
        EvaluationError: A named score has no per-example scores, or none has.
    """
    common = [name for name in one if name in other]
    for task in tasks:
        if task not in common:
            raise ConfigError(f"--task: {unknown_name('score', task, common)}")
    comparisons = []
    for name in tasks or common:
        first, second = one[name].example_scores, other[name].example_scores
        if first is not None and second is not None:
            comparisons.append(Comparison.of(name, first, second))
        elif tasks:
            raise EvaluationError(
                f"{name}: this score has no per-example scores to compare"
            )
    if not comparisons:
        raise EvaluationError(
            f"no score has per-example scores to compare; both have {', '.join(common) or 'none'}"
        )
    return comparisons


def _mcnemar(wins: int, losses: int) -> float:
    return float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def _paired_t_test(differences: Array, stderr: float) -> float:
    # Equal differences everywhere: the t statistic is 0/0 or infinite.
    if not stderr:
        return float(not differences.any())
    statistic = abs(differences.mean()) / stderr
    return 2 * float(stats.t.sf(statistic, len(differences) - 1))
