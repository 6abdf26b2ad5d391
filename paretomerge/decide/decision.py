"""Decide for one trial, and say how sure the decision is."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from paretomerge.decide.belief import Belief
from paretomerge.evaluate.evaluator import Objective
from paretomerge.pareto.preference import Preference
from paretomerge.record.results import Results
from paretomerge.record.trial import Trial
from paretomerge.types import Array

ENOUGH = 0.9
"""The probability of being the best at which a pick counts as sure."""

# Standard deviations on either side of the mean that hold 90 % of a normal distribution.
_REACH = 1.6449


@dataclass(frozen=True)
class Expected:
    """The score that held-out examples are expected to give, in the user's direction.

    Attributes:
        value: The expectation.
        low: Lower end of the interval that holds the held-out score with a probability of 90 %.
        high: Its upper end.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Decision:
    """A pick, and how sure it is.

    Attributes:
        trial: The pick: the trial with the greatest expected value for the preference.
        probability: The probability that no other trial is better for it.
        expected: Objective -> its expected held-out score.
        runner_up: The trial that is most probably the best of the others; None if there is none.
        change: Objective -> what the runner-up is expected to score more, in the user's direction.
    """

    trial: Trial
    probability: float
    expected: Mapping[str, Expected]
    runner_up: Trial | None = None
    change: Mapping[str, float] = field(default_factory=dict)


def decide(results: Results, preference: Preference, belief: Belief) -> Decision:
    """Pick the trial that is best for a preference, by what is believed of all trials.

    Args:
        results: The study's results.
        preference: What the user wants.
        belief: What is believed of the trials.

    Returns:
        The decision.
    """
    values = belief.values(preference)
    chances = best_chances(values)
    order = np.argsort(-values.mean(0), kind="stable")
    best = int(order[0])
    runner_up = None
    change: dict[str, float] = {}
    if len(order) > 1:
        others = chances.copy()
        others[best] = -1.0
        second = int(others.argmax())
        runner_up = belief.trials[second]
        for k, objective in enumerate(results.objectives):
            difference = float(belief.mean[second, k] - belief.mean[best, k])
            change[objective.name] = objective.inside(difference)
    expected = {}
    for k, objective in enumerate(results.objectives):
        n_examples = _held_out_examples(results, objective.name, belief.trials[best])
        expected[objective.name] = expected_score(
            belief, objective, best, k, n_examples
        )
    return Decision(
        belief.trials[best], float(chances[best]), expected, runner_up, change
    )


def expected_score(
    belief: Belief, objective: Objective, i: int, k: int, n_examples: int
) -> Expected:
    """The score that a trial is expected to have on new examples.

    Args:
        belief: What is believed of the trials.
        objective: The objective.
        i: The trial's index in the belief.
        k: The objective's index.
        n_examples: The number of new examples.

    Returns:
        The expectation and its interval.
    """
    mean = float(belief.mean[i, k])
    reach = _REACH * belief.stderr_on(i, k, n_examples)
    low, high = mean - reach, mean + reach
    if belief.noise[k].is_share:
        # In the objective's own direction both ends of [0, 1] may have changed their signs.
        least, most = sorted((objective.inside(0.0), objective.inside(1.0)))
        low, high = max(low, least), min(high, most)
    ends = [objective.inside(low), objective.inside(high)]
    return Expected(objective.inside(mean), min(ends), max(ends))


def best_chances(values: Array) -> Array:
    """The probability `(n,)` that each trial is the best, from draws `(draws, n)` of values."""
    winners = values.argmax(1)
    counts = np.bincount(winners, minlength=values.shape[1])
    chances: Array = counts / len(values)
    return chances


def _held_out_examples(results: Results, name: str, picked: Trial) -> int:
    """How many held-out examples an objective has; before any was asked, those of the search."""
    for trial in results.trials:
        score = (trial.held_out or {}).get(name)
        if score is not None:
            return score.n
    return picked.scores[name].n
