"""What a record must do, in a file and in PostgreSQL."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.samplers import RandomSampler

from paretomerge.errors import StudyError
from paretomerge.evaluate.evaluator import Objective, Score
from paretomerge.record.record import Header, Record
from paretomerge.record.storage import Storage
from paretomerge.record.trial import Trial
from paretomerge.study.level import Level
from paretomerge.study.optimiser import Optimiser
from tests.postgresql import server

OBJECTIVES = (Objective("sort"), Objective("size", maximise=False))
SPACE = {
    "w": FloatDistribution(-0.5, 1.5),
    "method": CategoricalDistribution(("ties", "dare_ties")),
}
SOURCES = ("ada", "bob")
IDENTITY = {"models": ["ada", "bob"], "seed": 0}
SCORES = {
    "sort": Score(0.75, 0.1, 4, (1.0, 1.0, 1.0, 0.0)),
    "size": Score(1e200, 0.0, 2, (0.5, 0.25)),
    "copy": Score(-3.0),
}
TRIALS = (
    Trial(
        0,
        {"w": 0.1 + 0.2, "method": "ties"},
        SCORES,
        label="ada",
        seconds={"ask": 0.25},
        constraints={"size": -1.0},
        gain=0.125,
    ),
    Trial(
        1,
        {"w": -0.5, "method": "dare_ties"},
        failure="MergeError: \x00 is no name, nor is '\N{SNOWMAN}'",
    ),
    Trial(
        2,
        {"w": 1.5, "method": "ties"},
        SCORES,
        warm_start="other 3",
        same_as=0,
        level=1,
        final=False,
    ),
)
_names = map("study {}".format, itertools.count())


@pytest.fixture(scope="module")
def postgresql():
    with server() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def storage(request, tmp_path):
    """Nothing is kept there under its name yet."""
    name = next(_names)
    return (
        Storage.at(tmp_path / "new" / "study.db", name)
        if request.param == "sqlite"
        else Storage(request.getfixturevalue("postgresql"), name)
    )


def filled(storage):
    record = Record.begin(storage, Header(OBJECTIVES, SOURCES, IDENTITY))
    for trial in TRIALS:
        record.add(record.freeze(trial, SPACE))
    return record


def test_what_is_written_is_read_again(storage):
    record = filled(storage)
    record.add_held_out(0, "objectives", {"sort": SCORES["sort"]})
    record.add_held_out(0, "watched", {"copy": SCORES["copy"]})
    record.set_note("end", {"reason": "spent", "total": 3})
    again = Record.begin(storage, Header(OBJECTIVES, SOURCES, IDENTITY))
    first, *others = again.trials()
    assert first.held_out == {"sort": SCORES["sort"], "copy": SCORES["copy"]}
    assert [first, *others] == record.trials()
    assert (
        [*others] == [*TRIALS[1:]]
        and first.scores == TRIALS[0].scores
        and first.params == TRIALS[0].params
    )
    assert (
        again.note("end") == {"reason": "spent", "total": 3}
        and again.note("nothing") is None
    )
    assert (
        again.held_out(0)["watched"] == {"copy": SCORES["copy"]}
        and again.held_out(1) == {}
    )


def test_another_question_is_refused_and_has_room_under_another_name(storage):
    filled(storage)
    with pytest.raises(
        StudyError, match=r"seed changed since.*another `study_name`"
    ) as raised:
        Record.begin(storage, Header(OBJECTIVES, SOURCES, IDENTITY | {"seed": 1}))
    assert "secret" not in str(raised.value)
    other = Record.begin(
        Storage(storage.url, f"{storage.study_name}, again"),
        Header(OBJECTIVES[:1], SOURCES, IDENTITY | {"seed": 1}),
    )
    assert (
        not other.trials()
        and len(Record.begin(storage, Header(OBJECTIVES, SOURCES, IDENTITY)).trials())
        == 3
    )


def test_a_record_without_trials_begins_anew(storage):
    Record.begin(storage, Header(OBJECTIVES, SOURCES, IDENTITY)).set_note(
        "root", "elsewhere"
    )
    one = Record.begin(storage, Header(OBJECTIVES[:1], SOURCES, {"objectives": 1}))
    assert one.note("root") is None and one.note("identity") == {"objectives": 1}
    one.add(one.freeze(Trial(0, TRIALS[0].params, SCORES), SPACE))
    assert len(one.frozen_trials()[0].values) == 1


def level(seed):
    space = SimpleNamespace(distributions=SPACE)
    return Level(0, space, RandomSampler(seed=seed), models=None)


def test_two_that_search_at_once_lose_nothing(storage):
    one, two = (
        Optimiser(
            level(seed), Record.begin(storage, Header(OBJECTIVES, SOURCES, IDENTITY))
        )
        for seed in (0, 1)
    )
    first, second = one.ask(), two.ask()
    recorded = [
        optimiser.tell(asked, replace(asked.trial, scores=SCORES))
        for optimiser, asked in ((one, first), (two, second))
    ]
    assert [trial.number for trial in recorded] == [0, 1]
    again = Record.begin(storage, Header(OBJECTIVES, SOURCES, IDENTITY)).trials()
    assert [t.params for t in again] == [first.trial.params, second.trial.params]
