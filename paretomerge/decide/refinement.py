"""Compare what was believed of new trials with what they scored."""

from collections.abc import Mapping
from dataclasses import dataclass

from paretomerge.decide.belief import Belief
from paretomerge.decide.decision import Expected, expected_score
from paretomerge.record.results import Results
from paretomerge.record.trial import Trial


@dataclass(frozen=True)
class Refinement:
    """A new trial, and what was believed of it before.

    Attributes:
        trial: The trial.
        believed: Objective -> the score that was expected on the search examples, from all earlier
            trials; empty for a trial that failed.
    """

    trial: Trial
    believed: Mapping[str, Expected]


def refinements(results: Results, n_before: int) -> list[Refinement]:
    """Compare the trials after the first `n_before` with what was believed of them.

    Args:
        results: The study's results.
        n_before: The number of trials that the beliefs rest on.

    Returns:
        One entry per new trial.
    """
    new = results.trials[n_before:]
    belief = Belief.of_search(results, hidden={trial.number for trial in new})
    numbers = [trial.number for trial in belief.trials]
    found = []
    for trial in new:
        believed: dict[str, Expected] = {}
        if trial.number in numbers:
            i = numbers.index(trial.number)
            for k, objective in enumerate(results.objectives):
                n_examples = trial.scores[objective.name].n
                believed[objective.name] = expected_score(
                    belief, objective, i, k, n_examples
                )
        found.append(Refinement(trial, believed))
    return found
