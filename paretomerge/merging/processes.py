"""Merging with several processes, for merges to disk.

Threads would wait for each other: each operation on a block takes Python's lock. The process that
asks for the merge deals out tasks (`tasks`) and merges some of them itself. Workers (`worker`)
read their inputs and write into the files of the result themselves. Which process merges a task
depends on chance; the bytes do not.
"""

import io
import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paretomerge.checkpoint.writer import WeightsWriter
from paretomerge.errors import CheckpointError
from paretomerge.merging.job_io import cast_block
from paretomerge.merging.methods.table import METHODS
from paretomerge.merging.plan.cost import processor_seconds, worker_bytes
from paretomerge.merging.plan.plan import INPUT_CACHE_BYTES, Plan, TensorJob
from paretomerge.merging.plan.steps import RecipeStep
from paretomerge.merging.tasks import Task, cut_into_tasks, merge_task, prepare_process
from paretomerge.merging.worker import Done, Failed, Work

_log = logging.getLogger(__name__)

# Measured: a worker needs 1.5 s to start, in which the process that started it merges.
_SECONDS_PER_WORKER = 2.0
_METHODS_OF_PACKAGE = dict(METHODS)

# Workers must load the package that this process has, wherever it was found. One thread each, also
# for the libraries that read these variables when they are imported. Without the collector of
# garbage, torch is imported in five sixths of the time.
_BOOT = (
    "import gc, sys; gc.disable(); sys.path[:] = sys.argv[2:]; "
    "from paretomerge.merging.worker import main; "
    "main([int(number) for number in sys.argv[1].split(',')])"
)
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def default_workers(plan: Plan, processors: int) -> int:
    """The number of processes that suits a plan and this machine.

    Args:
        plan: The plan.
        processors: How many may be busy: as many as torch would use threads, which the user sets
            by `OMP_NUM_THREADS`.

    Returns:
        As many as there are processors, but each with two seconds of work or more, and with half
        of the memory of the machine in all.
    """
    seconds = processor_seconds(plan)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    workers = min(
        processors,
        int(seconds / _SECONDS_PER_WORKER),
        int(memory / 2 / worker_bytes(plan)),
    )
    return max(1, workers)


def merge_with_processes(plan: Plan, writer: WeightsWriter, workers: int) -> None:
    """Merge every tensor of a plan into its file, on the CPU.

    A plan that other processes cannot have is merged by this process alone: with a method that is
    not of the package, or with models in memory.

    Args:
        plan: What to merge.
        writer: The files.
        workers: The number of processes, this one included.

    Raises:
        CheckpointError: If a model cannot be read, or a worker was killed.
        OSError: If the files cannot be written.
    """
    prepare_process()
    tasks = cut_into_tasks(plan, workers)
    cache_bytes = INPUT_CACHE_BYTES // workers
    team = _Team(plan, writer, tasks, cache_bytes)
    # A worker without a task would start in vain.
    helpers = min(workers, len(tasks)) - 1
    content = None
    if helpers > 0:
        content = _pickled_work(plan, writer, cache_bytes)
    try:
        if content is not None:
            team.start(content, helpers)
        team.merge_here()
        team.wait()
    finally:
        team.stop()


class _Team:
    """The processes that merge a plan: this one, and the workers that it starts."""

    def __init__(
        self,
        plan: Plan,
        writer: WeightsWriter,
        tasks: Sequence[Task],
        cache_bytes: int,
    ) -> None:
        self._plan = plan
        self._writer = writer
        # Taking from a deque is safe in any thread.
        self._tasks = deque(tasks)
        self._cache_bytes = cache_bytes
        self._error: BaseException | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._connections: list[Connection] = []
        self._busy: set[Connection] = set()
        self._dealer: threading.Thread | None = None

    def start(self, content: bytes, helpers: int) -> None:
        """Start workers; a merge goes on without those that do not start.

        Args:
            content: The `Work`, pickled.
            helpers: The number of workers.
        """
        try:
            self._start_process(helpers)
        except OSError as error:
            _log.warning("No worker process could be started: %s", error)
            return
        self._dealer = threading.Thread(
            target=self._deal, args=(content,), name="merge workers", daemon=True
        )
        self._dealer.start()

    def _start_process(self, helpers: int) -> None:
        theirs: list[socket.socket] = []
        try:
            for _ in range(helpers):
                mine, other = socket.socketpair()
                theirs.append(other)
                self._connections.append(Connection(mine.detach()))
            descriptors = [end.fileno() for end in theirs]
            numbers = ",".join(map(str, descriptors))
            # An empty entry stands for the current folder.
            folders = [folder or str(Path.cwd()) for folder in sys.path]
            self._process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, numbers, *folders],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                pass_fds=descriptors,
                env=os.environ | dict.fromkeys(_THREAD_VARIABLES, "1"),
                # Ctrl-C reaches this process alone, which then ends the workers.
                process_group=0,
            )
        finally:
            for end in theirs:
                end.close()

    def merge_here(self) -> None:
        """Merge tasks in this process until none is left."""

        def write_block(job: TensorJob, start: int, block: Tensor) -> None:
            self._raise_error()
            result = cast_block(self._plan, job, block)
            self._writer.write(job.name, start, result)

        with torch.inference_mode():
            task = self._next_task()
            while task is not None:
                merge_task(self._plan, task, write_block, self._cache_bytes)
                task = self._next_task()

    def _next_task(self) -> Task | None:
        """Take a task; None if none is left."""
        try:
            return self._tasks.popleft()
        except IndexError:
            return None

    def wait(self) -> None:
        """Wait for the workers' last tasks.

        Raises:
            Exception: What a worker could not do.
        """
        if self._dealer is not None:
            self._dealer.join()
        self._raise_error()

    def stop(self) -> None:
        """End the workers. After this, none of them writes any more."""
        self._tasks.clear()
        self._kill()
        if self._dealer is not None:
            self._dealer.join()
        for connection in self._connections:
            connection.close()
        if self._process is not None:
            self._process.wait()

    def _kill(self) -> None:
        if self._process is not None:
            # They are gone where all tasks are done.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _deal(self, content: bytes) -> None:
        """Deal out tasks until every worker has ended; runs in a thread."""
        try:
            self._send_work(content)
            self._answer_workers()
        # The merge would wait forever for tasks that nobody does.
        except BaseException as error:
            self._fail(error)

    def _send_work(self, content: bytes) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        with suppress(BrokenPipeError), self._process.stdin as stdin:
            stdin.write(content)

    def _answer_workers(self) -> None:
        open_connections = list(self._connections)
        while open_connections:
            for connection in wait(open_connections):
                assert isinstance(connection, Connection)
                if not self._answer(connection):
                    open_connections.remove(connection)

    def _answer(self, connection: Connection) -> bool:
        """Take a worker's answer and give it more to do; False if it has ended."""
        try:
            answer = connection.recv()
            if isinstance(answer, Failed):
                self._fail(answer.error)
                return True
            assert isinstance(answer, Done)
            self._busy.discard(connection)
            for name, n_bytes in answer.written.items():
                self._writer.add_written(name, n_bytes)
            self._give_task(connection)
        except (EOFError, ConnectionError):
            if connection in self._busy:
                self._fail(_killed_error())
            elif self._tasks and self._error is None:
                _log.warning(
                    "A worker process did not start; the merge goes on without it"
                )
            return False
        return True

    def _give_task(self, connection: Connection) -> None:
        task = self._next_task()
        if task is not None:
            self._busy.add(connection)
        connection.send(task)

    def _fail(self, error: BaseException) -> None:
        """Note the first error, and end all workers."""
        if self._error is None:
            self._error = error
        self._tasks.clear()
        self._kill()


def _killed_error() -> CheckpointError:
    return CheckpointError(
        "a worker process was killed while it merged, perhaps because memory ran out; merge with "
        "fewer processes (--workers 1, in Python: workers=1)"
    )


def _pickled_work(plan: Plan, writer: WeightsWriter, cache_bytes: int) -> bytes | None:
    """The work as bytes; None if other processes could not do it in the same way."""
    if not _is_of_package(plan):
        return None
    buffer = io.BytesIO()
    try:
        work = Work(plan, writer.destinations, cache_bytes)
        _Pickler(buffer).dump(work)
    # Objects of other libraries raise exceptions of any class.
    except Exception as error:
        _log.info("The merge runs in one process: %s", error)
        return None
    return buffer.getvalue()


def _is_of_package(plan: Plan) -> bool:
    """Whether the functions of a plan's methods are those that a fresh process has."""
    method = plan.method
    if _METHODS_OF_PACKAGE.get(method.name) is not method:
        return False
    function = method.function
    if function.__module__ != f"paretomerge.merging.methods.{method.family}":
        return False
    for weights in plan.weights.values():
        if isinstance(weights, RecipeStep) and not _is_of_package(weights.plan):
            return False
    return True


class _Pickler(pickle.Pickler):
    """Refuses weights, which do not pass between processes."""

    def reducer_override(self, obj: Any) -> Any:
        """Pickle as usual, but no tensor that has memory."""
        if isinstance(obj, Tensor) and obj.device.type != "meta":
            raise pickle.PicklingError("a model of the plan is in memory")
        return NotImplemented
