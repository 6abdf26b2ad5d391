"""A study as one of Optuna's in memory, for Optuna's tools.

A record holds every objective maximised, whole recipes, and the scores of all examples. Optuna's
dashboard would show all this as it is, and its buttons rename and delete. So it gets a copy that
people can read, and nothing that is clicked changes the record.
"""

import warnings
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from paretomerge.record.results import Results
from paretomerge.record.trial import Scores, Trial

# Where Optuna's dashboard looks for constraints; it does not read `set_constraint` yet.
_CONSTRAINTS = "constraints"


class OptunaCopy:
    """A copy in memory that grows with a study.

    Objectives have the user's names and directions. The user attributes of a trial are its label,
    its failure, the standard errors, the seconds of its stages, and its held-out scores, if there
    were any when the trial was copied.

    Args:
        name: The name of the study.

    Attributes:
        storage: The copy, in an Optuna storage.
    """

    def __init__(self, name: str) -> None:
        self.storage = optuna.storages.InMemoryStorage()
        self._name = name
        self._study: optuna.Study | None = None
        self._n_trials = 0

    def update(self, results: Results) -> None:
        """Copy the trials that are new.

        Args:
            results: The study's results.
        """
        # A record without scores may be replaced when its study changes.
        if self._study is not None and len(results.trials) < self._n_trials:
            optuna.delete_study(study_name=self._name, storage=self.storage)
            self._study = None
        if self._study is None:
            self._study = self._begin(results)
            self._n_trials = 0
        for trial in results.trials[self._n_trials :]:
            self._study.add_trial(_frozen(trial, results))
        self._n_trials = len(results.trials)

    def _begin(self, results: Results) -> optuna.Study:
        directions = []
        for objective in results.objectives:
            maximise = objective.maximise
            direction = StudyDirection.MAXIMIZE if maximise else StudyDirection.MINIMIZE
            directions.append(direction)
        study = optuna.create_study(
            study_name=self._name, storage=self.storage, directions=directions
        )
        with warnings.catch_warnings():
            # `set_metric_names` is experimental in Optuna; the dashboard shows the names.
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names([objective.name for objective in results.objectives])
        return study


def _frozen(trial: Trial, results: Results) -> FrozenTrial:
    """A trial in Optuna's form, in the user's directions."""
    values = None
    if not trial.failure:
        values = [trial.scores[each.name].value for each in results.objectives]
    of_level = results.parameters[trial.level].distributions
    distributions: dict[str, BaseDistribution] = {}
    for name in trial.params:
        distributions[name] = of_level[name]
    system_attributes = {}
    if trial.constraints:
        # By name, as trials are compared by place.
        system_attributes[_CONSTRAINTS] = [
            trial.constraints[name] for name in sorted(trial.constraints)
        ]
    return optuna.trial.create_trial(
        state=TrialState.FAIL if trial.failure else TrialState.COMPLETE,
        values=values,
        params=dict(trial.params),
        distributions=distributions,
        user_attrs=_attributes(trial),
        system_attrs=system_attributes,
    )


def _attributes(trial: Trial) -> dict[str, Any]:
    attributes: dict[str, Any] = {}
    if trial.label:
        attributes["label"] = trial.label
    if trial.failure:
        attributes["failure"] = trial.failure
    if trial.violations:
        attributes["infeasible"] = trial.violations
    if trial.same_as is not None:
        attributes["same recipe as trial"] = trial.same_as
    if not trial.final:
        attributes["left early"] = True
    attributes |= _score_attributes(trial.scores, "")
    attributes |= _score_attributes(trial.held_out or {}, "held-out ")
    for stage, seconds in trial.seconds.items():
        attributes[f"seconds to {stage}"] = seconds
    return attributes


def _score_attributes(scores: Scores, prefix: str) -> dict[str, float]:
    attributes = {}
    for name, score in scores.items():
        if prefix:
            attributes[f"{prefix}{name}"] = score.value
        if score.stderr:
            attributes[f"{prefix}{name}: standard error"] = score.stderr
    return attributes
