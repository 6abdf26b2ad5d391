"""`paretomerge search --log-json FILE`: one JSON object a line, for programs that follow a search.

docs/search.md lists the fields.
"""

import json
import logging
import time
from pathlib import Path
from typing import Any, TextIO

from paretomerge.errors import ConfigError
from paretomerge.report.tables import plain_scores
from paretomerge.study.event import Event, HeldOutEvent

_log = logging.getLogger(__name__)


class TrialLog:
    """Adds lines to a file.

    Each line is complete when the next trial begins, so that `tail -f` and a crash lose nothing.

    Args:
        path: The file. What is in it stays: a search that continues adds to it. None to write
            nothing.

    Raises:
        ConfigError: It cannot be written.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._file: TextIO | None = None
        self._has_warned = False
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Buffered by line.
            self._file = path.open("a", buffering=1, encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"--log-json: {path}: cannot be written: {error.strerror}; name another file"
            ) from error

    def close(self) -> None:
        """Close the file."""
        if self._file is None:
            return
        try:
            self._file.close()
        except OSError as error:
            self._warn(error)

    def trial(self, event: Event) -> None:
        """Write a finished trial of the search.

        Args:
            event: What the loop reports of it.
        """
        trial = event.trial
        self._write(
            "trial",
            {
                "trial": trial.number,
                "label": trial.label,
                "level": trial.level,
                "scores": plain_scores(trial.scores),
                "constraints": dict(trial.constraints),
                "failure": trial.failure or None,
                "same_as": trial.same_as,
                "final": trial.final,
                "params": dict(trial.params),
                "seconds": dict(event.seconds),
                "hypervolume": event.hypervolume,
                "done": event.done,
                "total": event.total,
            },
        )

    def held_out(self, event: HeldOutEvent) -> None:
        """Write what a trial scored on held-out examples.

        Args:
            event: Which trial, and how many are left.
        """
        self._write(
            "held_out",
            {
                "trial": event.trial.number,
                "label": event.trial.label,
                "scores": plain_scores(event.trial.held_out or {}),
                "done": event.done,
                "total": event.total,
            },
        )

    def end(self, reason: str) -> None:
        """Write why the search ended."""
        self._write("end", {"reason": reason})

    def _write(self, event: str, fields: dict[str, Any]) -> None:
        if self._file is None:
            return
        line = {"event": event, "time": _now(), **fields}
        # NaN is no JSON; a score is always finite.
        try:
            # What a full disk does not take is written before the next line.
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
        except OSError as error:
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        """Warn once: a search must not end because its log cannot be written."""
        if not self._has_warned:
            _log.warning(
                "--log-json: %s: cannot be written: %s. Lines may be missing; the record has all.",
                self._path,
                error.strerror,
            )
        self._has_warned = True


def _now() -> str:
    """The time in UTC, as ISO 8601 writes it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
