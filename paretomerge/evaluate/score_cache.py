"""ScoreCache of single items, kept in a file that studies can share: no item is asked twice of one merge."""

import contextlib
import json
import sqlite3
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from paretomerge.errors import EvaluationError


class ScoreCache:
    """A file of outcomes by merge, task and item, each named by a key of its content. Several processes may use it at once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._open() as database:
            database.execute(
                "CREATE TABLE IF NOT EXISTS outcomes (merge TEXT, task TEXT, items BLOB, PRIMARY KEY (merge, task))"
            )

    def of(self, merge: str, task: str) -> dict[str, Any]:
        """Item -> outcome, of whatever is known."""
        with self._open() as database:
            return self._read(database, merge, task)

    def add(self, merge: str, task: str, outcomes: Mapping[str, Any]) -> None:
        """Keep more; outcomes that are no numbers or lists of them are not kept."""
        try:
            plain = {
                item: json.loads(json.dumps(outcome, default=_number))
                for item, outcome in outcomes.items()
            }
        except TypeError:
            return
        with self._open() as database:
            database.execute("BEGIN IMMEDIATE")  # between reading and writing nobody else writes
            packed = zlib.compress(json.dumps(self._read(database, merge, task) | plain).encode())
            database.execute(
                "INSERT OR REPLACE INTO outcomes VALUES (?, ?, ?)", (merge, task, packed)
            )

    @staticmethod
    def _read(database: sqlite3.Connection, merge: str, task: str) -> dict[str, Any]:
        row = database.execute(
            "SELECT items FROM outcomes WHERE merge = ? AND task = ?", (merge, task)
        ).fetchone()
        return dict(json.loads(zlib.decompress(row[0]))) if row else {}

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            with contextlib.closing(sqlite3.connect(self._path, timeout=60)) as database, database:
                yield database
        except sqlite3.Error as error:
            raise EvaluationError(
                f"cache {self._path}: expected a file of outcomes, got: {error}; move it away to start afresh"
            ) from error


def _number(value: Any) -> Any:
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"no number: {type(value).__name__}")
