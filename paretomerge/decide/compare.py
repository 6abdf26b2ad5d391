"""Compare two models on the same examples: the paired difference, and whether it is significant."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from paretomerge.errors import ConfigError, EvaluationError, unknown_name
from paretomerge.evaluate.evaluator import Score
from paretomerge.types import Array


@dataclass(frozen=True)
class Comparison:
    """`one` minus `other` on the n examples of one task.

    Attributes:
        task: The score's name.
        n: Number of examples.
        one: The first model's mean.
        other: The second model's mean.
        low: Lower end of the 95 % interval of the mean difference (paired, Student's t).
        high: Upper end of that interval.
        p: The p-value of McNemar's exact test where examples are right or wrong, else of the paired
            t-test.
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
        from scipy import stats  # a second of imports, for this alone

        if len(one) != len(other):
            raise EvaluationError(
                f"{task}: the two were not scored on the same examples: {len(one)} and {len(other)}"
            )
        n = len(one)
        # One example has no variance, so neither an interval nor a t-test.
        if n < 2:
            raise EvaluationError(f"{task}: two examples or more are needed, not {n}")
        first = np.asarray(one, dtype=float)
        second = np.asarray(other, dtype=float)
        # Paired: both models find the same examples hard, and that part cancels.
        differences = first - second
        mean = float(differences.mean())
        deviation = float(differences.std(ddof=1))
        stderr = deviation / math.sqrt(n)
        degrees_of_freedom = n - 1
        quantile = float(stats.t.ppf(0.975, degrees_of_freedom))
        reach = quantile * stderr
        wins: int | None = None
        losses: int | None = None
        # For right and wrong answers there is an exact test, which needs no normal approximation.
        if set(one) | set(other) <= {0.0, 1.0}:
            wins = int((differences > 0).sum())
            losses = int((differences < 0).sum())
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
        first = one[name].example_scores
        second = other[name].example_scores
        # By default a score without examples, such as sparsity, is skipped. Asked for by name, it
        # is an error.
        if first is not None and second is not None:
            comparisons.append(Comparison.of(name, first, second))
        elif tasks:
            raise EvaluationError(
                f"{name}: this score has no per-example scores to compare"
            )
    if not comparisons:
        names = ", ".join(common) or "none"
        raise EvaluationError(
            f"no score has per-example scores to compare; both have {names}"
        )
    return comparisons


def _mcnemar(wins: int, losses: int) -> float:
    from scipy import stats  # a second of imports, for this alone

    # Under the null hypothesis each example on which the two differ is a fair coin.
    discordant = wins + losses
    if not discordant:
        return 1.0
    test = stats.binomtest(wins, discordant)
    return float(test.pvalue)


def _paired_t_test(differences: Array, stderr: float) -> float:
    from scipy import stats  # a second of imports, for this alone

    # Where all differences are equal, the t statistic is 0/0 or infinite.
    if not stderr:
        return float(not differences.any())
    statistic = abs(differences.mean()) / stderr
    degrees_of_freedom = len(differences) - 1
    return 2 * float(stats.t.sf(statistic, degrees_of_freedom))
