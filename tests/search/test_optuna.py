"""The adapter to Optuna's private names: each test fails when Optuna changes one."""

import optuna
import pytest
from optuna.distributions import (
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import TrialState

from paretomerge.search._optuna import contains, store_constraints


def test_constraints_are_stored_where_optuna_reads_them():
    study = optuna.create_study()
    trial = study.ask()
    trial.set_user_attr("size", 3.0)
    frozen = study.get_trials(deepcopy=False)[0]
    store_constraints(
        lambda t: [t.user_attrs["size"] - 2.0], study, frozen, TrialState.COMPLETE
    )
    study.tell(trial, 0.0)
    assert list(study.trials[0].constraints.values()) == [1.0]


@pytest.mark.parametrize(
    ("distribution", "inside", "outside"),
    [
        (FloatDistribution(0, 1), 1.0, 1.5),
        (FloatDistribution(0, 1, step=0.25), 0.75, 0.8),
        (IntDistribution(1, 8, log=True), 8, 9),
        (CategoricalDistribution(("a", "b")), "a", None),
    ],
)
def test_a_distribution_contains_its_values(distribution, inside, outside):
    assert contains(distribution, inside)
    if outside is not None:
        assert not contains(distribution, outside)
