"""What several processes that search one study tell each other: which merges they are scoring.

Processes cooperate through the study's database, on one machine or several. Each notes the merges
that it scores. The others do not score them, and show them to their samplers as running trials.
Without that, samplers of the same seed would propose the same merges.
"""

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from uuid import uuid4

import psutil

from paretomerge.record.record import Record
from paretomerge.types import Params

PREFIX = "running/"
"""Prefix of the study's attributes that hold claims, one for each process."""


@dataclass(frozen=True)
class Claim:
    """A merge that another process is scoring.

    Attributes:
        key: The key of its recipe.
        params: Its parameters.
        level: Its level.
        owner: The process.
    """

    key: str
    params: Params
    level: int
    owner: str


class Claims:
    """The merges that this process scores, and those of the others.

    In a SQLite file one process searches at a time, so nothing is read or written.

    Args:
        record: The study's record.
    """

    def __init__(self, record: Record) -> None:
        self._record = record
        self.shared = record.storage.file is None
        self._host = socket.gethostname()
        self.owner = f"{self._host}/{os.getpid()}/{uuid4().hex[:8]}"
        self._own: dict[str, tuple[Params, int]] = {}

    def claim(self, key: str, params: Params, level: int) -> None:
        """Note that this process begins to score a merge."""
        self._own[key] = (dict(params), level)
        self._write()

    def release(self, key: str) -> None:
        """Note that a merge is scored."""
        # A repeated merge was never claimed.
        if self._own.pop(key, None) is not None:
            self._write()

    def is_contested(self, key: str, level: int) -> bool:
        """Whether another process has claimed the same merge."""
        # Whoever sees the other's claim gives way. If both do, the merge is proposed again or stays
        # lined up. A rule of precedence would need to know who has looked already.
        return any(claim.key == key for claim in self.others(level))

    def close(self) -> None:
        """Note that this process scores nothing any more."""
        if self._own:
            self._own.clear()
            self._write()

    def others(self, level: int) -> list[Claim]:
        """Read what other processes are scoring.

        What a killed process of this machine has noted is forgotten. That of another machine stays
        until its merges are scored, and does no harm but that samplers avoid its surroundings.

        Args:
            level: The level of the merges.

        Returns:
            The claims, in a fixed order.
        """
        if not self.shared:
            return []
        claims = []
        for note, noted in sorted(self._record.notes(PREFIX).items()):
            owner = note.removeprefix(PREFIX)
            if owner == self.owner or not noted:
                continue
            if self._is_dead(owner):
                self._record.set_note(note, None)
                continue
            for key, (params, of_level) in noted.items():
                if of_level == level:
                    claims.append(Claim(key, params, of_level, owner))
        return claims

    def _is_dead(self, owner: str) -> bool:
        host, pid, _ = owner.rsplit("/", 2)
        return host == self._host and not psutil.pid_exists(int(pid))

    def _write(self) -> None:
        if self.shared:
            noted: Mapping[str, object] = {
                key: list(claim) for key, claim in self._own.items()
            }
            self._record.set_note(f"{PREFIX}{self.owner}", noted or None)
