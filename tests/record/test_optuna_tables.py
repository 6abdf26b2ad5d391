"""Plain queries give what Optuna reads through its mapper."""

import math

import optuna
import pytest
from optuna.distributions import (
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import TrialState, create_trial

from paretomerge.record._optuna_tables import TrialTable
from paretomerge.record.storage import Storage
from tests.postgresql import server

SPACE = {
    "z": FloatDistribution(1e-5, 1, log=True),
    "a": IntDistribution(1, 9, step=2),
    "method": CategoricalDistribution(("ties", None, True, 3)),
}


@pytest.fixture(scope="module")
def postgresql():
    with server() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request, tmp_path):
    storage = Storage.at(tmp_path / "study.db")
    if request.param == "postgresql":
        storage = Storage(request.getfixturevalue("postgresql"))
    with storage.connect() as database:
        yield database


def made(database, name):
    return optuna.create_study(
        study_name=name, storage=database, directions=["maximize"] * 2
    )


def add(study, z, values=(1.0, 2.0), **more):
    trial = create_trial(
        state=TrialState.COMPLETE if values else TrialState.FAIL,
        values=values,
        params={"z": z, "a": 3, "method": None},
        distributions=SPACE,
        user_attrs={"label": "é", "scores": {"sort": [0.1 + 0.2, None, 3, "101"]}},
        **more,
    )
    trial.set_constraint("size", -1.5)
    study.add_trial(trial)


def test_trials_are_those_that_optuna_reads(database):
    # Another study in the same database, whose trials stand between those of the first.
    one, other = made(database, "one"), made(database, "other")
    table = TrialTable(database, "one")
    assert table.read() == [] and table.count() == 0
    for i in range(4):
        add(one, 0.1 + 0.2 * i, system_attrs={"nsga2:generation": i})
        add(other, 0.5)
    add(one, 0.9, values=None)
    add(one, 0.9, values=(math.inf, -math.inf))
    for study, trials in ((one, table), (other, TrialTable(database, "other"))):
        theirs = study.get_trials()
        ours = trials.read()
        assert ours == theirs and trials.count() == len(theirs)
        for mine, optunas in zip(ours, theirs, strict=True):
            # The order of the parameters too, and their types.
            assert list(mine.params) == list(optunas.params)
            assert mine.constraints == optunas.constraints == {"size": -1.5}
            assert mine.state is optunas.state


def test_a_second_look_fetches_what_is_new(database):
    study = made(database, "growing")
    table = TrialTable(database, "growing")
    add(study, 0.25)
    (first,) = table.read()
    add(study, 0.5)
    again = table.read()
    assert again[0] is first and [trial.number for trial in again] == [0, 1]
    again.clear()
    assert len(table.read()) == 2
