"""The private names of Optuna that the baselines use, in one place.

Optuna's own samplers use them as well, but they may change with any release. A test for each fails
when it does.
"""

import logging

import optuna
from optuna import Study
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial

from paretomerge.types import Params, ParamValue

_IN_MEMORY_LOGGER = "optuna.storages._in_memory"
_ENQUEUED_PARAMS = "fixed_params"


def set_system_attr(
    study: Study,
    trial: FrozenTrial,
    key: str,
    value: ParamValue,
) -> None:
    """Write a system attribute of a trial.

    Args:
        study: The trial's study.
        trial: A trial that is running.
        key: The attribute's name.
        value: Anything that can be written as JSON.
    """
    study._storage.set_trial_system_attr(trial._trial_id, key, value)


def enqueued_params(trial: FrozenTrial) -> Params:
    """Return the parameters that `Study.enqueue_trial` has fixed for a trial, often none."""
    params: Params = trial.system_attrs.get(_ENQUEUED_PARAMS, {})
    return params


def create_silent_study(sampler: BaseSampler) -> Study:
    """Create a study in memory that maximises one value, without Optuna's log message about it.

    Args:
        sampler: The study's sampler.

    Returns:
        The study.
    """
    logger = logging.getLogger(_IN_MEMORY_LOGGER)
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        return optuna.create_study(direction="maximize", sampler=sampler)
    finally:
        logger.setLevel(level)
