"""Starts and ends the workers of a merge. `processes` gives them work, `worker` is what they run.

This module does not import torch: who starts workers before importing it does not wait for theirs.
"""

import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path

_log = logging.getLogger(__name__)

# Workers must load the package that this process has, wherever it was found. One thread each, also
# for the libraries that read these variables when they are imported. Without the collector of
# garbage, torch is imported in five sixths of the time.
_BOOT = (
    "import gc, sys; gc.disable(); sys.path[:] = sys.argv[2:]; "
    "from paretomerge.merging.worker import main; "
    "main([int(number) for number in sys.argv[1].split(',')])"
)
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class Workers:
    """Workers that were started, and wait for their work.

    Args:
        process: The process that is or has forked the workers, and leads their process group.
        connections: A connection to each worker.
    """

    def __init__(
        self, process: "subprocess.Popen[bytes]", connections: Sequence[Connection]
    ) -> None:
        self.process = process
        self.connections = connections

    def send(self, content: bytes) -> None:
        """Send what all workers get to know once; nothing if they have ended."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError), self.process.stdin as stdin:
            stdin.write(content)

    def kill(self) -> None:
        """End the workers; each connection then comes to its end."""
        # They are gone where all work is done.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def close(self) -> None:
        """End the workers and free what they have here; may be called again."""
        if self.process.returncode is None:
            self.kill()
            self.process.wait()
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        for connection in self.connections:
            connection.close()


@contextmanager
def started_workers(count: int) -> Iterator[Workers | None]:
    """Start workers, and end them at the end of the block.

    Args:
        count: How many.

    Yields:
        The workers; None if `count` is 0, or if none could be started, which is logged.
    """
    workers = None
    if count > 0:
        try:
            workers = _start(count)
        except OSError as error:
            _log.warning("No worker process could be started: %s", error)
    try:
        yield workers
    finally:
        if workers is not None:
            workers.close()


def _start(count: int) -> Workers:
    mine: list[socket.socket] = []
    theirs: list[socket.socket] = []
    try:
        for _ in range(count):
            own, other = socket.socketpair()
            mine.append(own)
            theirs.append(other)
        descriptors = [end.fileno() for end in theirs]
        numbers = ",".join(map(str, descriptors))
        # An empty entry stands for the current folder.
        folders = [folder or str(Path.cwd()) for folder in sys.path]
        process = subprocess.Popen(
            [sys.executable, "-c", _BOOT, numbers, *folders],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=descriptors,
            env=os.environ | dict.fromkeys(_THREAD_VARIABLES, "1"),
            # Ctrl-C reaches this process alone, which then ends the workers.
            process_group=0,
        )
        return Workers(process, [Connection(end.detach()) for end in mine])
    finally:
        # Those that were handed on have no descriptor any more.
        for end in (*mine, *theirs):
            end.close()
