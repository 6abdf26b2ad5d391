"""Measure and estimate by how much search scores are too good.

The measurement compares them with held-out scores. The estimate says what choosing the best of many
trials brings on average.
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

_DRAWS = 200  # bootstrap samples


@dataclass(frozen=True)
class Optimism:
    """The optimism of one objective: means over the front, in the objective's units.

    Values above 0 mean that the search scores are too good.

    Attributes:
        objective: Its name.
        search: The mean search score.
        held_out: The mean held-out score.
        measured: Search score minus held-out score, with the sign turned for minimised objectives.
        stderr: The standard error of `measured`, since both means are over finitely many examples.
        expected: What choosing the front by these search examples brings on average. The examples
            are resampled and the front is chosen again (the bootstrap's optimism; Efron and Gong
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
        if self.maximise:
            return self.search - self.expected
        return self.search + self.expected


def optimism(results: Results) -> list[Optimism]:
    """Measure and estimate the optimism of the front's search scores.

    Args:
        results: The study's results.

    Returns:
        One entry for each objective with per-example scores on both splits; none before the front
        is scored on held-out examples.
    """
    # A study that was interrupted may have scored a part of its front only.
    front = [trial for trial in results.front if trial.held_out]
    trials = [trial for trial in results.trials if trial.can_be_on_front]
    per_example = []
    for objective in results.objectives:
        if _has_examples(trials, front, objective.name):
            per_example.append(objective)
    if not front or not per_example:
        return []
    expected = _expected(results.objectives, trials, per_example)
    entries = []
    for objective in per_example:
        entry = _of_objective(objective, front, expected[objective.name])
        entries.append(entry)
    return entries


def _of_objective(
    objective: Objective, front: Sequence[Trial], expected: float
) -> Optimism:
    name = objective.name
    search_rows = []
    held_out_rows = []
    for trial in front:
        held_out_scores = trial.held_out or {}
        search_rows.append(trial.scores[name].example_scores or ())
        held_out_rows.append(held_out_scores[name].example_scores or ())
    # The mean over the front for each example. The trials of a front share their examples, so their
    # errors are not independent: only the examples are a sample.
    search = np.mean(search_rows, 0)
    held_out = np.mean(held_out_rows, 0)
    variances = []
    for means in (search, held_out):
        variance = float(np.var(means, ddof=1))
        variances.append(variance / len(means))
    search_mean = float(search.mean())
    held_out_mean = float(held_out.mean())
    difference = search_mean - held_out_mean
    return Optimism(
        name,
        search_mean,
        held_out_mean,
        difference if objective.maximise else -difference,
        math.sqrt(sum(variances)),
        expected,
        objective.maximise,
    )


def _has_examples(trials: Sequence[Trial], front: Sequence[Trial], name: str) -> bool:
    """Whether all trials have per-example scores, and the same number of them.

    Otherwise their examples cannot be resampled together.
    """
    searched = set()
    for trial in trials:
        example_scores = trial.scores[name].example_scores or ()
        searched.add(len(example_scores))
    held_out = set()
    for trial in front:
        score = (trial.held_out or {}).get(name)
        n_examples = len(score.example_scores or ()) if score else 0
        held_out.add(n_examples)
    same_number = len(searched) == len(held_out) == 1
    # A variance needs two examples.
    return same_number and min(searched | held_out) > 1


def _expected(
    objectives: Sequence[Objective],
    trials: Sequence[Trial],
    per_example: Sequence[Objective],
) -> dict[str, float]:
    """By how much a front's scores on drawn examples exceed those on all examples."""
    # A fixed seed, so that the report of a record is always the same.
    rng = np.random.default_rng(0)
    value_rows = [trial.values(objectives) for trial in trials]
    values = np.array(value_rows)
    tables: dict[int, Array] = {}
    for k, objective in enumerate(objectives):
        if objective in per_example:
            rows = [trial.scores[objective.name].example_scores for trial in trials]
            sign = 1 if objective.maximise else -1
            table = np.array(rows, dtype=float)
            tables[k] = table * sign
    gains = np.zeros(values.shape[1])
    # Each draw resamples the examples with replacement, scores all trials on them and chooses a
    # front by these scores. The scores on all examples stand for the true ones.
    for _ in range(_DRAWS):
        drawn = values.copy()
        for k, table in tables.items():
            n = table.shape[1]
            # Counts and not indices: a table of hundreds of trials is then one matrix product.
            equal_chances = np.full(n, 1 / n)
            counts = rng.multinomial(n, equal_chances)
            drawn[:, k] = table @ counts / n
        chosen = nondominated(drawn)
        gain = (drawn - values)[chosen].mean(0)
        gains += gain / _DRAWS
    expected: dict[str, float] = {}
    for k in tables:
        expected[objectives[k].name] = float(gains[k])
    return expected
