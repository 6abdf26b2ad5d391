"""The private parts of Optuna that samplers need, in one place.

Each function has a test that fails when Optuna changes what it wraps.
"""

from collections.abc import Callable, Sequence

from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.samplers._base import _process_constraints_after_trial
from optuna.trial import FrozenTrial, TrialState

from paretomerge.types import ParamValue

ConstraintsFunction = Callable[[FrozenTrial], Sequence[float]]


def store_constraints(
    constraints_func: ConstraintsFunction,
    study: Study,
    trial: FrozenTrial,
    state: TrialState,
) -> None:
    """Evaluate `constraints_func` for a finished trial and store the values with it.

    Optuna's own samplers do this in `after_trial`; there is no public function for it.
    """
    _process_constraints_after_trial(constraints_func, study, trial, state)


def contains(distribution: BaseDistribution, value: ParamValue) -> bool:
    """Whether a value lies inside a distribution: its range, its steps, its choices."""
    return distribution._contains(distribution.to_internal_repr(value))
