import sqlite3
import time
from pathlib import Path

import pytest

from paretomerge.errors import StudyError
from paretomerge.record import storage as storage_module
from paretomerge.record.storage import Storage


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://ada:secret@host:5432/db", "postgresql://ada:***@host:5432/db"),
        ("mysql+pymysql://ada:se%40cret:x@host/db", "mysql+pymysql://ada:***@host/db"),
        ("postgresql://ada@host/db", "postgresql://ada@host/db"),
        ("postgresql://ada@home:secret@host/db", "postgresql://ada@home:***@host/db"),
        (
            "postgresql://host/db?user=ada&password=secret&x=1",
            "postgresql://host/db?user=ada&password=***&x=1",
        ),
        ("sqlite:////home/a:b@c/study.db", "sqlite:////home/a:b@c/study.db"),
    ],
)
def test_passwords_are_not_shown(url, shown):
    assert str(Storage(url)) == shown
    assert str(Storage(url, "mine")) == f"{shown}, study 'mine'"


@pytest.mark.parametrize(
    ("url", "located"),
    [
        ("sqlite:///x.db", "sqlite:////folder/x.db"),
        ("sqlite:////else/x.db", "sqlite:////else/x.db"),
        ("sqlite:///:memory:", "sqlite:///:memory:"),
        ("sqlite://", "sqlite://"),
        ("postgresql://host/x.db", "postgresql://host/x.db"),
    ],
)
def test_files_are_located_and_nothing_else(url, located):
    assert Storage(url, "mine").relative_to(Path("/folder")) == Storage(located, "mine")


@pytest.mark.parametrize(
    ("url", "told"),
    [
        (
            "postgresql://ada:secret@127.0.0.1:1/db",
            "failed.*Check the URL, and that the database is running",
        ),
        (
            "oracle+cx_oracle://ada:secret@host/db",
            "No module named 'cx_Oracle'. Install the database's driver",
        ),
        ("cellar://ada:secret@host/db", "Can't load plugin.*Check the URL"),
        ("no URL", "Could not parse SQLAlchemy URL.*Check the URL"),
    ],
)
def test_what_cannot_be_opened_is_told_without_the_password(url, told):
    with pytest.raises(StudyError, match=told) as raised, Storage(url).connect():
        pass
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("to_search", "limit"), [(False, "a minute"), (True, "10 minutes")]
)
def test_a_search_waits_longer_for_a_lock_than_a_look(
    tmp_path, monkeypatch, caplog, to_search, limit
):
    monkeypatch.setattr(storage_module, "_LOCK_TIMEOUT", 0.01)
    storage = Storage.at(tmp_path / "study.db")
    holder = sqlite3.connect(storage.file, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    monkeypatch.setattr(time, "sleep", lambda seconds: holder.close())

    def opened():
        with storage.connect():
            return "opened"

    assert storage.once_unlocked(opened, to_search) == "opened"
    (message,) = caplog.messages
    assert message.endswith(f"Close it. Trying again for up to {limit}.")
