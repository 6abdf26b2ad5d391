"""By how much search scores are too good.

Measured on held-out examples, and expected from choosing the best of many.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from paretomerge.evaluate.evaluator import Objective
from paretomerge.pareto.front import nondominated
from paretomerge.record.results import Results
from paretomerge.record.trial import Trial
from paretomerge.types import Array

_DRAWS = 200


@dataclass(frozen=True)
class Optimism:
    """One objective's optimism: means over the front, in the objective's units.

    Above 0, the search scores are too good.

    Attributes:
        objective: Its name.
        search: The mean search score.
        held_out: The mean held-out score.
        measured: Search less held-out, turned so that above 0 is too good.
        stderr: Its standard error: both means are of finitely many examples.
        expected: What choosing the front by these search examples brings on average: the examples
            are drawn anew and the front is chosen again (the bootstrap's optimism; Efron and Gong
            1983, sec. 7).
        maximise: The objective's direction.
    """

    objective: str
    search: float
    held_out: float
    measured: float
    stderr: float
    expected: float
    maximise: bool = True

    @property
    def corrected(self) -> float:
        """The search score without the expected optimism."""
        return (
            self.search - self.expected
            if self.maximise
            else self.search + self.expected
        )


def optimism(results: Results) -> list[Optimism]:
    """Measure and estimate the optimism of the front's search scores.

    Args:
        results: The study's results.

    Returns:
        One entry for each objective with per-example scores on both splits; none before the front
        is scored on held-out examples.
    """
    front = [trial for trial in results.front if trial.held_out]
    trials = [trial for trial in results.trials if trial.can_be_on_front]
    per_example = [
        o for o in results.objectives if _has_examples(trials, front, o.name)
    ]
    if not front or not per_example:
        return []
    expected = _expected(results.objectives, trials, per_example)
    return [
        _of_objective(objective, front, expected[objective.name])
        for objective in per_example
    ]


def _of_objective(
    objective: Objective, front: Sequence[Trial], expected: float
) -> Optimism:
    name = objective.name
    search_rows = [trial.scores[name].example_scores or () for trial in front]
    held_out_rows = [
        (trial.held_out or {})[name].example_scores or () for trial in front
    ]
    # The mean over the front for each example.
    search, held_out = np.mean(search_rows, 0), np.mean(held_out_rows, 0)
    variances = [
        float(np.var(means, ddof=1)) / len(means) for means in (search, held_out)
    ]
    difference = float(search.mean()) - float(held_out.mean())
    return Optimism(
        name,
        float(search.mean()),
        float(held_out.mean()),
        difference if objective.maximise else -difference,
        math.sqrt(sum(variances)),
        expected,
        objective.maximise,
    )


def _has_examples(trials: Sequence[Trial], front: Sequence[Trial], name: str) -> bool:
    """Whether all trials have per-example scores, and equally many.

    Else they cannot be drawn anew together.
    """
    searched = {len(trial.scores[name].example_scores or ()) for trial in trials}
    held_out = set()
    for trial in front:
        score = (trial.held_out or {}).get(name)
        held_out.add(len(score.example_scores or ()) if score else 0)
    return len(searched) == len(held_out) == 1 and min(searched | held_out) > 1


def _expected(
    objectives: Sequence[Objective],
    trials: Sequence[Trial],
    per_example: Sequence[Objective],
) -> dict[str, float]:
    """By how much a front's scores on drawn examples exceed those on all examples."""
    rng = np.random.default_rng(0)  # fixed: the report of a record is always the same
    values = np.array([trial.values(objectives) for trial in trials])
    tables: dict[int, Array] = {}
    for k, objective in enumerate(objectives):
        if objective in per_example:
            rows = [trial.scores[objective.name].example_scores for trial in trials]
            sign = 1 if objective.maximise else -1
            tables[k] = np.array(rows, dtype=float) * sign
    gains = np.zeros(values.shape[1])
    # Each draw resamples the examples with replacement, rescores all trials on them and chooses a
    # front by these scores.
    for _ in range(_DRAWS):
        drawn = values.copy()
        for k, table in tables.items():
            n = table.shape[1]
            counts = rng.multinomial(n, np.full(n, 1 / n))
            drawn[:, k] = table @ counts / n
        chosen = nondominated(drawn)
        gains += (drawn - values)[chosen].mean(0) / _DRAWS
    return {objectives[k].name: float(gains[k]) for k in tables}
