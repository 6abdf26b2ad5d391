"""The private names of Optuna in `_optuna.py` still do what we need."""

import optuna
from optuna.distributions import FloatDistribution
from optuna.samplers import RandomSampler

from paretomerge.search.baselines._optuna import (
    create_silent_study,
    enqueued_params,
    set_system_attr,
)


def test_a_system_attribute_is_stored_with_the_trial():
    study = optuna.create_study()
    trial = study.ask()
    set_system_attr(study, study.trials[0], "key", "value")
    study.tell(trial, 0.0)
    assert study.trials[0].system_attrs["key"] == "value"


def test_enqueued_parameters_are_found():
    study = optuna.create_study()
    study.enqueue_trial({"x": 0.25})
    assert enqueued_params(study.trials[0]) == {"x": 0.25}
    study.ask({"x": FloatDistribution(0, 1)})
    study.ask({"x": FloatDistribution(0, 1)})
    assert enqueued_params(study.trials[0]) == {"x": 0.25}
    assert enqueued_params(study.trials[1]) == {}


def test_a_silent_study_is_created_without_a_message(caplog):
    with caplog.at_level("INFO", logger="optuna"):
        study = create_silent_study(RandomSampler(seed=0))
        assert not caplog.records
        optuna.create_study()
        assert caplog.records
    assert study.direction == optuna.study.StudyDirection.MAXIMIZE
