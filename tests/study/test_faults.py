"""Faults from outside in the middle of a search: locks, full disks, moved files, wrong clocks."""

import errno
import os
import re
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from datetime import datetime
from io import StringIO
from types import SimpleNamespace

import optuna
import pytest
import sqlalchemy
from filelock import FileLock
from rich.console import Console

from paretomerge.cli.status import View
from paretomerge.errors import StudyError
from paretomerge.record import storage as storage_module
from paretomerge.record.record import Record
from paretomerge.record.storage import Storage
from paretomerge.study.stopping import StoppingRule
from tests.conftest import REPOSITORY
from tests.study.test_search import make, norms, told


@pytest.fixture
def impatient(monkeypatch):
    """Attempts fail at once, and between them no time passes."""
    monkeypatch.setattr(storage_module, "_LOCK_TIMEOUT", 0.01)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


@pytest.fixture
def undisturbed(pico, tmp_path):
    """What the search finds where nothing happens."""
    study = make(pico, tmp_path / "undisturbed")
    study.run(5)
    return told(study)


class Lock:
    """A lock of another connection on a SQLite file; it is freed at the so many-th `sleep`."""

    def __init__(self, file, kind, monkeypatch, sleeps=3):
        self.connection = sqlite3.connect(file, isolation_level=None)
        self.connection.execute(f"BEGIN {kind}")
        self.sleeps = sleeps
        monkeypatch.setattr(time, "sleep", self.sleep)

    def sleep(self, seconds):
        self.sleeps -= 1
        if self.sleeps == 0:
            self.connection.close()


# With IMMEDIATE others may read, and with EXCLUSIVE nothing.
@pytest.mark.parametrize("kind", ["IMMEDIATE", "EXCLUSIVE"])
def test_a_search_waits_for_a_lock_on_its_record(
    pico, tmp_path, monkeypatch, impatient, undisturbed, caplog, kind
):
    file = tmp_path / "study.db"
    locks = []

    def lock(event):
        if event.trial.number == 1:
            locks.append(Lock(file, kind, monkeypatch, sleeps=7))

    study = make(pico, tmp_path)
    study.run(5, lock)
    assert locks[0].sleeps <= 0
    assert told(study) == undisturbed
    (message,) = caplog.messages
    assert str(file) in message and "database is locked" in message
    assert message.endswith("Close it. Trying again for up to 10 minutes.")


def test_a_search_waits_for_a_lock_when_it_opens_its_record(
    pico, tmp_path, monkeypatch, impatient, undisturbed, caplog
):
    file = tmp_path / "study.db"
    make(pico, tmp_path).run(2)
    lock = Lock(file, "EXCLUSIVE", monkeypatch)
    study = make(pico, tmp_path)
    assert lock.sleeps <= 0
    lock = Lock(file, "EXCLUSIVE", monkeypatch)
    study.run(5)
    assert lock.sleeps <= 0
    assert told(study) == undisturbed
    assert "Trying again for up to a minute" not in caplog.text


def test_held_out_scores_wait_for_a_lock(pico, tmp_path, monkeypatch, impatient):
    study = make(pico, tmp_path)
    study.run(2)
    lock = Lock(tmp_path / "study.db", "EXCLUSIVE", monkeypatch)
    study.hold_out(study.trials()[:1])
    assert lock.sleeps <= 0
    assert study.record.held_out(0)


HOLDER = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN EXCLUSIVE")
print("locked", flush=True)
sys.stdin.read()
"""


def test_a_search_that_gives_up_names_the_file_and_its_users_and_can_be_resumed(
    pico, tmp_path, monkeypatch, impatient, undisturbed
):
    monkeypatch.setattr(storage_module, "_PATIENCE", 0)
    monkeypatch.setattr(storage_module, "_READER_PATIENCE", 0)
    file = tmp_path / "study.db"
    study = make(pico, tmp_path)
    study.run(2)
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(file)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        holder.stdout.readline()
        with pytest.raises(StudyError, match="database is locked") as raised:
            study.run(5)
        with pytest.raises(StudyError, match="database is locked"):
            Record.read(Storage.at(file))
        with pytest.raises(StudyError, match="database is locked"):
            make(pico, tmp_path)
        holder.stdin.close()
    message = str(raised.value)
    assert str(file) in message and f"pid {holder.pid})" in message
    assert "damaged" not in message
    study = make(pico, tmp_path)
    study.run(5)
    assert told(study) == undisturbed


def test_a_record_that_is_moved_away_is_waited_for(
    pico, tmp_path, monkeypatch, undisturbed, caplog
):
    """SQLite would go on writing to a file that nobody finds again."""
    file = tmp_path / "study.db"
    elsewhere = tmp_path / "elsewhere.db"

    def move(event):
        if event.trial.number == 1:
            file.rename(elsewhere)

    sleeps = []

    def put_back(seconds):
        sleeps.append(seconds)
        if len(sleeps) == 6:
            elsewhere.rename(file)

    monkeypatch.setattr(time, "sleep", put_back)
    study = make(pico, tmp_path)
    study.run(5, move)
    assert told(make(pico, tmp_path)) == undisturbed
    assert "The file was moved or deleted; put it back." in caplog.text


class Pragma:
    """A command to SQLite that every connection of a search gives before it is used."""

    def __init__(self, study, command):
        self.command = command
        engine = study.record._database.engine
        sqlalchemy.event.listen(engine, "checkout", self.give)

    def give(self, connection, *_):
        connection.execute(f"PRAGMA {self.command}")


def many_examples(model, tokenizer):
    """Scores of so many examples that each trial makes the file grow."""
    scores = norms(model, tokenizer)
    examples = tuple(0.001 * number for number in range(3000))
    return {**scores, "down": replace(scores["down"], example_scores=examples)}


# What SQLite itself says of a full disk, and of a file that it must not write.
@pytest.mark.parametrize(
    ("fault", "mended", "cure"),
    [
        ("max_page_count = 1", "max_page_count = 100000", "Free some disk space."),
        ("query_only = 1", "query_only = 0", "Make the file and its folder writable."),
    ],
)
def test_a_full_disk_or_a_read_only_record_loses_nothing(
    pico, tmp_path, monkeypatch, caplog, fault, mended, cure
):
    study = make(pico, tmp_path, many_examples)
    pragma = Pragma(study, mended)
    sleeps = []

    def inject(event):
        if event.trial.number == 1:
            pragma.command = fault

    def mend(seconds):
        sleeps.append(seconds)
        if len(sleeps) == 6:
            pragma.command = mended

    monkeypatch.setattr(time, "sleep", mend)
    study.run(4, inject)
    assert len(sleeps) == 6
    (message,) = caplog.messages
    assert cure in message and str(tmp_path / "study.db") in message
    # And where nobody mends it.
    before = told(make(pico, tmp_path, many_examples))
    monkeypatch.setattr(storage_module, "_PATIENCE", 0)
    pragma.command = fault
    with pytest.raises(StudyError, match=cure):
        study.run(9)
    after = told(make(pico, tmp_path, many_examples))
    assert after == before
    study = make(pico, tmp_path, many_examples)
    study.run(9)
    whole = make(pico, tmp_path / "whole", many_examples)
    whole.run(9)
    assert told(study) == told(whole)


class Clock:
    """The wall clock, as Python's modules read it; it can be set."""

    def __init__(self, monkeypatch):
        self.ahead = 0.0
        real = time.time
        clock = self

        class Jumping(datetime):
            @classmethod
            def now(cls, tz=None):
                return cls.fromtimestamp(real() + clock.ahead, tz)

        monkeypatch.setattr(time, "time", lambda: real() + self.ahead)
        monkeypatch.setattr(optuna.storages._rdb.storage, "datetime", Jumping)
        monkeypatch.setattr(optuna.storages._in_memory, "datetime", Jumping)
        module = SimpleNamespace(datetime=Jumping)
        monkeypatch.setattr(optuna.trial._frozen, "datetime", module)


HOUR = 3600.0


@pytest.mark.parametrize("ahead", [HOUR, -HOUR])
def test_a_clock_that_is_set_changes_nothing(
    pico, tmp_path, monkeypatch, undisturbed, ahead
):
    clock = Clock(monkeypatch)

    def score(model, tokenizer):
        # In the middle of a trial, forth and back.
        clock.ahead = ahead - clock.ahead
        return norms(model, tokenizer)

    events = []
    study = make(pico, tmp_path, score)
    # A budget of half an hour, which the wall clock would spend at once.
    rule = StoppingRule(3, deadline=time.monotonic() + HOUR / 2)
    assert study.run(rule, events.append) == "finished 3 trials"
    # Resumed in another hour.
    clock.ahead = -ahead
    study = make(pico, tmp_path, score)
    study.run(5, events.append)
    assert told(study) == undisturbed
    for event in events:
        assert all(0 <= seconds < 60 for seconds in event.seconds.values())
    view = View("title", study.results(), 8, True, None)
    console = Console(width=200, file=StringIO())
    console.print(view)
    shown = console.file.getvalue()
    assert "left, then the held-out" in shown
    assert "-" not in shown.partition("a trial, about ")[2].partition(" left")[0]
    for frozen in study.record.frozen_trials():
        # `optuna-dashboard` shows the difference.
        assert 0 <= frozen.duration.total_seconds() < 60


def test_only_a_log_and_a_header_read_the_wall_clock():
    """Durations, deadlines and signs of life must not: it may be set at any time."""
    readers = set()
    for file in (REPOSITORY / "paretomerge").rglob("*.py"):
        text = file.read_text()
        if re.search(
            r"time\.time\(|gmtime|localtime|datetime\.(now|utcnow|today)", text
        ):
            readers.add(file.name)
    # The time of a line of --log-json; a `Retry-After` whose server sends no date.
    assert readers == {"trial_log.py", "endpoint.py"}


def test_no_trial_is_judged_by_signs_of_life(pico, tmp_path):
    """Only finished trials are in the record, so Optuna's heartbeat has nothing to watch."""
    study = make(pico, tmp_path)
    study.run(1)
    assert study.record._database.get_heartbeat_interval() is None


def test_a_lock_file_that_cannot_be_made_is_one_sentence(pico, tmp_path, monkeypatch):
    study = make(pico, tmp_path)
    study.run(1)

    def acquire(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "study.lock")

    monkeypatch.setattr(FileLock, "acquire", acquire)
    with pytest.raises(StudyError, match=r"cannot write: Read-only file system\. Set"):
        study.run(2)
    assert len(study.trials()) == 1
