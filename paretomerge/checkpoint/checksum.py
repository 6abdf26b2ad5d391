"""SHA-256 of shards while they are written: a thread follows the tensors as they become whole, in the order of the file."""

import hashlib
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Extent:
    """The bytes [start, end) of an open file that hold one tensor, or its header, whose name is ''."""

    name: str
    start: int
    end: int


class Checksums:
    """Reads what `wrote` says is complete; `sums` waits for the rest. files: name -> (descriptor, extents in order)."""

    def __init__(self, files: Mapping[str, tuple[int, Sequence[Extent]]]) -> None:
        self._files = files
        self._missing = {
            e.name: e.end - e.start for _, extents in files.values() for e in extents if e.name
        }
        self._sums: dict[str, str] = {}
        self._error: Exception | None = None
        self._stopped = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._follow, name="checksums", daemon=True)
        self._thread.start()

    def wrote(self, name: str, size: int) -> None:
        """`size` more bytes of a tensor are there."""
        with self._changed:
            self._missing[name] -= size
            if self._missing[name] <= 0:
                self._changed.notify()

    def sums(self) -> dict[str, str]:
        """SHA-256 by file, as `sha256sum` prints it; every tensor must have been written."""
        self._thread.join()
        if self._error:
            raise self._error
        return self._sums

    def stop(self) -> None:
        """End the thread, before its files are closed."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()

    def _follow(self) -> None:
        buffer = memoryview(bytearray(_CHUNK))
        try:
            for file, (descriptor, extents) in self._files.items():
                digest = hashlib.sha256()
                for extent in extents:
                    if not self._whole(extent.name):
                        return
                    at = extent.start
                    while at < extent.end:
                        got = os.preadv(descriptor, [buffer[: extent.end - at]], at)
                        if not got:
                            raise OSError(f"{file} shrank while it was written")
                        digest.update(buffer[:got])
                        at += got
                self._sums[file] = digest.hexdigest()
        except Exception as error:  # told by `sums`, on the thread that asks
            self._error = error

    def _whole(self, name: str) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._missing.get(name, 0) <= 0)
            return not self._stopped
