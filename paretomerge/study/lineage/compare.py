"""How the trials of a lineage are compared: by all objectives, or, as in the papers, their mean."""

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from paretomerge.errors import ConfigError
from paretomerge.evaluate.evaluator import Objective
from paretomerge.record.trial import Trial
from paretomerge.search.point_sampler import crowding_order
from paretomerge.types import Array

Compare = Literal["dominance", "mean"]
"""`dominance` of the objectives, or the `mean` of them, which must all be maximised."""

# Below all scores; less what is broken.
_INFEASIBLE = -1e12


def check_compare(compare: str) -> None:
    """Check the option of a sampler.

    Args:
        compare: Its value.

    Raises:
        ConfigError: It is none of the two.
    """
    if compare not in get_args(Compare):
        raise ConfigError(f"sampler: compare: use dominance or mean, not {compare!r}")


def check_objectives(compare: Compare, objectives: Sequence[Objective]) -> None:
    """Check that objectives can be compared in this way.

    Args:
        compare: How.
        objectives: The study's objectives.

    Raises:
        ConfigError: A mean would mix directions.
    """
    for objective in objectives:
        if compare == "mean" and not objective.maximise:
            raise ConfigError(
                f"sampler: compare: mean: {objective.name!r} is minimised, so that a mean would "
                "have no unit; use dominance"
            )


def values_of(trial: Trial, objectives: Sequence[Objective]) -> Array:
    """The search scores of a trial as they are compared.

    Args:
        trial: A trial with scores.
        objectives: The study's m objectives.

    Returns:
        `(m,)`, all maximised. A trial that breaks a constraint is below all that break none, and
        below those that break less (Deb et al. 2002, sec. VI-A).
    """
    values = np.array(trial.values(objectives))
    if trial.feasible:
        return values
    broken = sum(max(0.0, violation) for violation in trial.constraints.values())
    return np.full_like(values, _INFEASIBLE * (1 + broken))


def best_first(
    trials: Sequence[Trial], objectives: Sequence[Objective], compare: Compare
) -> list[Trial]:
    """Order trials.

    Args:
        trials: Trials with scores.
        objectives: The study's objectives.
        compare: By `mean`, or by nondominated front and then crowding distance.

    Returns:
        The trials, the best first; of equal ones the earlier.
    """
    values = np.array([values_of(trial, objectives) for trial in trials])
    if compare == "mean":
        order = np.argsort(-values.mean(1), kind="stable")
    else:
        order = crowding_order(values)
    return [trials[i] for i in order.tolist()]
