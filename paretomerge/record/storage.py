"""Where studies' records are kept: a SQLite file, or any database that Optuna takes."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import optuna
import sqlalchemy.exc
from sqlalchemy.pool import NullPool

from paretomerge.errors import StudyError

NAME = "paretomerge"
_FILE = "sqlite:///"


@dataclass(frozen=True)
class Storage:
    """url: as SQLAlchemy takes it. name: of the study in it; a database can hold several."""

    url: str
    name: str = NAME

    @classmethod
    def at(cls, path: Path, name: str = NAME) -> "Storage":
        """A SQLite file."""
        return cls(f"{_FILE}{path}", name)

    @property
    def file(self) -> Path | None:
        """The file; None for a server, or SQLite in memory."""
        path = self.url.removeprefix(_FILE)
        return Path(path) if path and path != self.url and not path.startswith(":memory:") else None

    def located(self, folder: Path) -> "Storage":
        """A file's path starting from `folder`."""
        return replace(self, url=f"{_FILE}{folder / self.file}") if self.file else self

    @property
    def place(self) -> str:
        """The url without its password: messages are kept and passed on."""
        return re.sub(
            r"([?&]\w*passw\w*=)[^&]*", r"\1***", re.sub(r"(//[^:/]*):[^@]*@", r"\1:***@", self.url)
        )

    def __str__(self) -> str:
        return self.place + ("" if self.name == NAME else f", study {self.name!r}")

    @contextmanager
    def opened(self) -> Iterator[optuna.storages.RDBStorage]:
        """The database as Optuna's storage; what fails while it is used, in one sentence.

        Writers of one SQLite file wait for each other. To a server each use connects anew: an evaluation may take longer than
        an idle connection lives.
        """
        with self.legible():
            engine = (
                {"connect_args": {"timeout": 60}}
                if self.url.startswith("sqlite")
                else {"poolclass": NullPool}
            )
            yield optuna.storages.RDBStorage(self.url, engine_kwargs=engine)

    @contextmanager
    def legible(self) -> Iterator[None]:
        """A storage that fails, in one sentence: torn or foreign files, a full disk, a database that is away."""
        try:
            yield
        except (
            sqlalchemy.exc.SQLAlchemyError,
            optuna.exceptions.StorageInternalError,
            RuntimeError,
            ImportError,
        ) as error:
            told = str(error.__cause__ or error).splitlines()[0]
            raise StudyError(
                f"{self}: expected a study's record that can be read and written, got: {told}; {self._cure(error)}"
            ) from error

    def _cure(self, error: Exception) -> str:
        if "full" in str(error.__cause__ or error):
            return "free some space"
        if isinstance(error, ImportError):
            return "install the driver (for PostgreSQL: `pip install 'paretomerge[postgresql]'`)"
        return (
            "if the file is broken, move it away to start afresh"
            if self.file
            else "check the URL, and whether the database runs"
        )
