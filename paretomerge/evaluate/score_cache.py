"""A file of per-example scores that studies share, so that no score is computed twice."""

import contextlib
import json
import logging
import sqlite3
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from paretomerge.errors import EvaluationError
from paretomerge.evaluate.evaluator import MetricValue, MetricValues

_log = logging.getLogger(__name__)

# "outcomes" and "items" are names in files that users have; they stay
_CREATE = (
    "CREATE TABLE IF NOT EXISTS outcomes "
    "(merge TEXT, task TEXT, items BLOB, PRIMARY KEY (merge, task))"
)
_READ = "SELECT items FROM outcomes WHERE merge = ? AND task = ?"
_WRITE = "INSERT OR REPLACE INTO outcomes VALUES (?, ?, ?)"
_LOCK_TIMEOUT = 60  # seconds to wait for another process to finish writing


class ScoreCache:
    """Per-example scores by merge, task and example. Several processes may use the file at once.

    Merges, tasks and examples are identified by digests of their contents: `Candidate.key`,
    `Examples.scoring_digest` and `Examples.request_digests`.

    Where the file cannot be read or written for a reason that may pass, such as a full disk or a
    lock, scores are computed without it, and one warning says so.

    Args:
        path: The SQLite file; it and its folder are created when a score is added.

    Raises:
        EvaluationError: The file is something else. Every method raises it too.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._usable = True
        # Not created yet: a study that is only checked must leave nothing behind.
        if path.exists():
            with self._open() as database:
                database.execute(_CREATE)

    def get(self, merge: str, task: str) -> MetricValues:
        """All cached scores of a merge on a task: example -> score."""
        if not self._path.exists():
            return {}
        try:
            with self._open() as database:
                scores = self._read(database, merge, task)
        except EvaluationError as error:
            self._go_on_without(error)
            return {}
        self._usable = True
        return scores

    def add(
        self, merge: str, task: str, example_scores: Mapping[str, MetricValue]
    ) -> None:
        """Cache more scores of a merge on a task.

        Args:
            merge: Digest of the merge.
            task: Digest of how the task scores.
            example_scores: Digest of the example -> score. Scores that are neither numbers nor
                lists of numbers cannot be stored; where there is one, nothing is added.
        """
        try:
            text = json.dumps(dict(example_scores), default=_to_number)
        except TypeError:
            return
        try:
            self._write(merge, task, text)
        except EvaluationError as error:
            self._go_on_without(error)
        else:
            self._usable = True

    def _write(self, merge: str, task: str, text: str) -> None:
        with self._open() as database:
            database.execute(_CREATE)
            # takes the write lock now, so that no other process writes between read and write
            database.execute("BEGIN IMMEDIATE")
            scores = self._read(database, merge, task)
            scores |= json.loads(text)
            every_score = json.dumps(scores)
            packed = zlib.compress(every_score.encode())
            database.execute(_WRITE, (merge, task, packed))

    @staticmethod
    def _read(database: sqlite3.Connection, merge: str, task: str) -> MetricValues:
        cursor = database.execute(_READ, (merge, task))
        row = cursor.fetchone()
        if row is None:
            return {}
        text = zlib.decompress(row[0])
        return dict(json.loads(text))

    def _go_on_without(self, error: EvaluationError) -> None:
        """Warn once; a merge has not failed because its scores cannot be stored."""
        cause = error.__cause__
        if not isinstance(cause, sqlite3.OperationalError | OSError):
            raise error
        if self._usable:
            _log.warning(
                "cache %s: %s. Scores are computed without it while that lasts.",
                self._path,
                cause,
            )
        self._usable = False

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # Whoever has held the lock for a minute must not cost a minute at each merge.
            timeout = _LOCK_TIMEOUT if self._usable else 0
            connection = sqlite3.connect(self._path, timeout=timeout)
            with contextlib.closing(connection) as database, database:
                yield database
        except (sqlite3.Error, OSError) as error:
            raise EvaluationError(
                f"cache {self._path} cannot be used as a file of scores: {error}. "
                "Move it away to start a new one"
            ) from error


def _to_number(value: MetricValue) -> MetricValue:
    """The Python number in a numpy or torch scalar."""
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} is not a number")
