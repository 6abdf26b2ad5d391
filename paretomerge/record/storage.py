"""Where the records of studies are stored: a SQLite file, or any database that Optuna supports."""

import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import optuna
import psutil
import sqlalchemy.exc
from sqlalchemy.pool import NullPool

from paretomerge.errors import StudyError

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")

DEFAULT_STUDY_NAME = "paretomerge"
_SQLITE = "sqlite:///"
# Seconds that one attempt waits for a lock on a SQLite file. SQLite does not hear Ctrl-C meanwhile,
# and nothing is said before the first attempt has failed.
_LOCK_TIMEOUT = 5
_PATIENCE = (
    600  # seconds that a database may be away, its disk full, or its file locked
)
_READER_PATIENCE = 60  # seconds that a command which only reads waits for a locked file
_LONGEST_PAUSE = 15  # seconds between two attempts
_DATABASE_ERRORS = (
    sqlalchemy.exc.SQLAlchemyError,
    optuna.exceptions.StorageInternalError,
    RuntimeError,  # Optuna raises it where another version made the schema
    ImportError,  # the database's driver is not installed
)


@dataclass(frozen=True)
class Storage:
    """One study's place in a database.

    Attributes:
        url: The database, as SQLAlchemy writes it.
        study_name: The study's name in it: one database holds several studies.
        root: The folder that relative paths of the study start from; "" where it has none. Recipes
            of a study that was moved are read with paths below it.
    """

    url: str
    study_name: str = DEFAULT_STUDY_NAME
    root: str = ""

    @classmethod
    def at(cls, path: Path, study_name: str = DEFAULT_STUDY_NAME) -> "Storage":
        """Use a SQLite file.

        Args:
            path: The file; it is created when a study begins.
            study_name: The study's name in it.

        Returns:
            The storage.
        """
        return cls(f"{_SQLITE}{path}", study_name)

    @property
    def file(self) -> Path | None:
        """The SQLite file; None for a server, or a SQLite database in memory."""
        # `sqlite://` without a third slash is a database in memory, and has nothing to remove.
        path = self.url.removeprefix(_SQLITE)
        is_sqlite = path != self.url
        if not is_sqlite or not path or path.startswith(":memory:"):
            return None
        return Path(path)

    def relative_to(self, folder: Path) -> "Storage":
        """Resolve the path of a SQLite file against a folder.

        Args:
            folder: Where a relative path starts.

        Returns:
            The storage at that place; a server's is returned unchanged.
        """
        if self.file is None:
            return self
        # `/` keeps an absolute path as it is.
        path = folder / self.file
        return replace(self, url=f"{_SQLITE}{path}")

    @property
    def redacted_url(self) -> str:
        """The URL without its password, since messages end up in logs."""
        # A password stands before the host, or is an argument of the driver.
        url = re.sub(r"(//[^:/]*):[^@]*@", r"\1:***@", self.url)
        secrets = "passw|secret|token|key"
        return re.sub(rf"([?&]\w*(?:{secrets})\w*=)[^&]*", r"\1***", url, flags=re.I)

    def __str__(self) -> str:
        if self.study_name == DEFAULT_STUDY_NAME:
            return self.redacted_url
        return f"{self.redacted_url}, study {self.study_name!r}"

    @contextmanager
    def connect(self) -> Iterator[optuna.storages.RDBStorage]:
        """Open the database.

        Yields:
            Optuna's storage.

        Raises:
            StudyError: The database cannot be opened, read or written.
        """
        with self.readable_errors():
            yield optuna.storages.RDBStorage(
                self.url, engine_kwargs=self._engine_options()
            )

    @contextmanager
    def readable_errors(self) -> Iterator[None]:
        """Turn errors of the database into a `StudyError` that says what to do.

        Raises:
            StudyError: A file is damaged or of another kind, the disk is full, the server does not
                answer, or the driver is missing.
        """
        try:
            yield
        except _DATABASE_ERRORS as error:
            # SQLAlchemy wraps the driver's message, which says what happened.
            cause = str(error.__cause__ or error)
            # Later lines hold the SQL statement, which a user can do nothing with.
            summary = cause.splitlines()[0]
            raise StudyError(
                f"{self}: cannot read or write the study's record: {summary}. "
                f"{self._cure(error, cause)}"
            ) from error

    def patiently(self, action: Callable[[int], _Result]) -> _Result:
        """Read or write the database; wait while it is away, locked, or its disk is full.

        A search of hours must not end because a server is started anew.

        Args:
            action: Called with the number of failed attempts. It must not repeat what an earlier
                attempt has done.

        Returns:
            What the action returns.

        Raises:
            StudyError: It has failed for ten minutes, or for a reason that does not pass.
        """
        return self._retry(action, _PATIENCE, _may_pass)

    def once_unlocked(
        self, action: Callable[[], _Result], to_search: bool = False
    ) -> _Result:
        """Read or write the database; wait while another process holds a lock on its file.

        What else may be wrong, such as the URL, is an error at once: the user is still there.

        Args:
            action: What to do. It may be repeated.
            to_search: Whether to wait as long as `patiently` does, and not for a minute.

        Returns:
            What the action returns.

        Raises:
            StudyError: The file stays locked, or something else is wrong.
        """
        seconds = _PATIENCE if to_search else _READER_PATIENCE
        return self._retry(lambda attempt: action(), seconds, _is_locked)

    def _retry(
        self,
        action: Callable[[int], _Result],
        seconds: float,
        may_pass: Callable[[BaseException | None], bool],
    ) -> _Result:
        deadline = time.monotonic() + seconds
        attempt = 0
        while True:
            try:
                with self.readable_errors():
                    return action(attempt)
            except StudyError as error:
                pause = min(2.0**attempt, _LONGEST_PAUSE)
                too_late = time.monotonic() + pause > deadline
                if too_late or not may_pass(error.__cause__):
                    raise
                if not attempt:
                    limit = _described(seconds)
                    _log.warning("%s Trying again for up to %s.", error, limit)
                time.sleep(pause)
                attempt += 1

    def _engine_options(self) -> dict[str, object]:
        if self.url.startswith("sqlite"):
            return {"connect_args": {"timeout": _LOCK_TIMEOUT}}
        # An evaluation may last longer than a server keeps an idle connection, so each use opens a
        # new one.
        return {"poolclass": NullPool}

    def _cure(self, error: Exception, cause: str) -> str:
        if "full" in cause:
            return "Free some disk space."
        if isinstance(error, ImportError):
            install = "pip install 'paretomerge[postgresql]'"
            return f"Install the database's driver; for PostgreSQL, `{install}`."
        if self.file is None:
            return "Check the URL, and that the database is running."
        if "locked" in cause:
            return (
                "Another process holds a lock on the file, such as a database browser or a script "
                f"with an open transaction, or a backup{_users_of(self.file)}. Close it."
            )
        # SQLite calls a file read-only, too, when it is no longer where it was opened.
        if "readonly" in cause and not self.file.exists():
            return "The file was moved or deleted; put it back."
        if "readonly" in cause or "unable to open" in cause:
            return "Make the file and its folder writable."
        if "disk I/O" in cause:
            return "Check the disk and its mount."
        return "If the file is damaged, move it away to start again."


def _users_of(file: Path) -> str:
    """The processes of this user that have a file open, as a part of a message."""
    path = str(file.resolve())
    users = []
    for process in psutil.process_iter(["pid", "name", "open_files"]):
        # None where the system does not let us look.
        opened = process.info["open_files"] or ()
        is_other = process.info["pid"] != os.getpid()
        if is_other and any(entry.path == path for entry in opened):
            users.append(f"{process.info['name']}, pid {process.info['pid']}")
    return f" (it is open in {'; '.join(users)})" if users else ""


def _described(seconds: float) -> str:
    minutes = round(seconds / 60)
    return "a minute" if minutes == 1 else f"{minutes} minutes"


def _may_pass(error: BaseException | None) -> bool:
    """Whether an error of the database may be gone in a while."""
    return _operational(error) is not None


def _is_locked(error: BaseException | None) -> bool:
    """Whether an error says that another process holds a lock on a SQLite file."""
    found = _operational(error)
    return found is not None and "is locked" in str(found)


def _operational(
    error: BaseException | None,
) -> sqlalchemy.exc.OperationalError | None:
    """The error of the driver in a chain of causes, since Optuna wraps what SQLAlchemy raises."""
    while error is not None:
        if isinstance(error, sqlalchemy.exc.OperationalError):
            return error
        error = error.__cause__
    return None
