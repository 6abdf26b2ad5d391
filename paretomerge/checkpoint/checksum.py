"""SHA-256 of shards while they are written.

Threads read the files in order and follow the tensors as they become complete, so that the
checksums are ready soon after the last write.
"""

import hashlib
import os
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

_CHUNK_BYTES = 1 << 20
# One hashes some two gigabytes per second. Several processes may write faster than that.
_MOST_THREADS = 4


@dataclass(frozen=True)
class ByteRange:
    """The bytes [start, end) of a file that hold one tensor or the header.

    Attributes:
        name: Name of the tensor; '' for the header.
        start: Position of the first byte.
        end: Position after the last byte.
    """

    name: str
    start: int
    end: int


_Place = tuple[int, Sequence[ByteRange]]
"""The descriptor of a file, and its byte ranges in order."""


class Checksums:
    """Computes SHA-256 of files while other threads write their tensors.

    Args:
        files: File name -> (descriptor, the byte ranges of the file in order). Headers must be
            written already.
    """

    def __init__(self, files: Mapping[str, _Place]) -> None:
        # Taking from a deque is safe in any thread.
        self._files = deque(files.items())
        self._missing_bytes: dict[str, int] = {}
        for _, ranges in files.values():
            for part in ranges:
                if part.name:
                    self._missing_bytes[part.name] = part.end - part.start
        self._digests: dict[str, str] = {}
        self._error: Exception | None = None
        self._stopped = False
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        for _ in range(min(_MOST_THREADS, len(files))):
            # A daemon: a merge that fails must not keep the process alive.
            thread = threading.Thread(
                target=self._follow, name="checksums", daemon=True
            )
            thread.start()
            self._threads.append(thread)

    def add_written(self, name: str, n_bytes: int) -> None:
        """Report that `n_bytes` more bytes of a tensor are in the file."""
        with self._changed:
            self._missing_bytes[name] -= n_bytes
            if self._missing_bytes[name] <= 0:
                self._changed.notify_all()

    def hex_digests(self) -> dict[str, str]:
        """Wait for the threads and return the digest of each file, as `sha256sum` prints it.

        Raises:
            RuntimeError: If a tensor has not been written: its file would be waited for forever.
            OSError: If a file could not be read.
        """
        with self._changed:
            for name, n_bytes in self._missing_bytes.items():
                if n_bytes > 0:
                    raise RuntimeError(f"{name}: {n_bytes} bytes have not been written")
        self._join()
        if self._error:
            raise self._error
        # In the order of the files, whichever was ready first.
        return dict(sorted(self._digests.items()))

    def stop(self) -> None:
        """End the threads; call this before the files are closed."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._join()

    def _join(self) -> None:
        for thread in self._threads:
            thread.join()

    def _follow(self) -> None:
        buffer = memoryview(bytearray(_CHUNK_BYTES))
        try:
            entry = self._next_file()
            while entry is not None:
                self._hash_file(*entry, buffer)
                entry = self._next_file()
        except (
            Exception
        ) as error:  # raised again by `hex_digests`, on the caller's thread
            self._error = error

    def _next_file(self) -> tuple[str, _Place] | None:
        try:
            return self._files.popleft()
        except IndexError:
            return None

    def _hash_file(
        self,
        file: str,
        place: _Place,
        buffer: memoryview,
    ) -> None:
        """Note the digest of a file; nothing if the threads have to stop."""
        descriptor, ranges = place
        digest = hashlib.sha256()
        for part in ranges:
            if not self._wait_until_written(part.name):
                return
            for chunk in _read_chunks(file, descriptor, part, buffer):
                digest.update(chunk)
        self._digests[file] = digest.hexdigest()

    def _wait_until_written(self, name: str) -> bool:
        """Wait for all bytes of a tensor; False if the threads have to stop."""

        def is_ready() -> bool:
            return self._stopped or self._missing_bytes.get(name, 0) <= 0

        with self._changed:
            self._changed.wait_for(is_ready)
            return not self._stopped


def _read_chunks(
    file: str,
    descriptor: int,
    part: ByteRange,
    buffer: memoryview,
) -> Iterator[memoryview]:
    """Read a byte range into `buffer`, which each chunk reuses."""
    position = part.start
    while position < part.end:
        wanted = buffer[: part.end - position]
        count = os.preadv(descriptor, [wanted], position)
        if not count:
            raise OSError(f"{file} shrank while it was written")
        yield buffer[:count]
        position += count
