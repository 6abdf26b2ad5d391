"""Merging with several processes, for merges to disk.

Threads would wait for each other: each operation on a block takes Python's lock. The process that
asks for the merge deals out tasks (`tasks`) and merges some of them itself. Workers (`worker`)
read their inputs and write into the files of the result themselves. Which process merges a task
depends on chance; the bytes do not.
"""

import io
import logging
import pickle
import threading
from collections import deque
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from torch import Tensor

from paretomerge.checkpoint.writer import WeightsWriter
from paretomerge.errors import CheckpointError
from paretomerge.merging.job_io import cast_block
from paretomerge.merging.methods.table import METHODS
from paretomerge.merging.plan.plan import INPUT_CACHE_BYTES, Plan, TensorJob
from paretomerge.merging.plan.steps import RecipeStep
from paretomerge.merging.tasks import Task, cut_into_tasks, merge_task, prepare_process
from paretomerge.merging.worker import Done, Failed, Work
from paretomerge.merging.worker_start import Workers, started_workers

_log = logging.getLogger(__name__)

_METHODS_OF_PACKAGE = dict(METHODS)


def merge_with_processes(
    plan: Plan,
    writer: WeightsWriter,
    workers: int,
    started: Workers | None = None,
) -> None:
    """Merge every tensor of a plan into its file, on the CPU.

    A plan that other processes cannot have is merged by this process alone: with a method that is
    not of the package, or with models in memory.

    Args:
        plan: What to merge.
        writer: The files.
        workers: The number of processes, this one included.
        started: Workers that have been started, one fewer than `workers`; else they are started.

    Raises:
        CheckpointError: If a model cannot be read, or a worker was killed.
        OSError: If the files cannot be written.
    """
    prepare_process()
    tasks = cut_into_tasks(plan, workers)
    cache_bytes = INPUT_CACHE_BYTES // workers
    # A worker without a task would start in vain.
    helpers = min(workers, len(tasks)) - 1
    content = None
    if helpers > 0:
        content = _pickled_work(plan, writer, cache_bytes)
    team = _Team(plan, writer, tasks, cache_bytes)
    if content is None:
        team.merge_here()
        return
    missing = 0 if started else helpers
    with started_workers(missing) as new_workers:
        team.merge_with(started or new_workers, content)


class _Team:
    """The processes that merge a plan: this one, and its workers."""

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
        self._workers: Workers | None = None
        self._busy: set[Connection] = set()

    def merge_with(self, workers: Workers | None, content: bytes) -> None:
        """Merge everything, with workers that have started or will.

        Args:
            workers: The workers; None: there are none.
            content: The `Work`, pickled.

        Raises:
            Exception: What this process or a worker could not do. No worker writes any more.
        """
        if workers is None:
            self.merge_here()
            return
        self._workers = workers
        dealer = threading.Thread(
            target=self._deal,
            args=(workers, content),
            name="merge workers",
            daemon=True,
        )
        dealer.start()
        try:
            self.merge_here()
            # Their last tasks
            dealer.join()
            self._raise_error()
            workers.process.wait()
        except BaseException:
            self._tasks.clear()
            workers.kill()
            dealer.join()
            raise

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

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _deal(self, workers: Workers, content: bytes) -> None:
        """Deal out tasks until every worker has ended; runs in a thread."""
        try:
            workers.send(content)
            self._answer_all(workers.connections)
        # The merge would wait forever for tasks that nobody does.
        except BaseException as error:
            self._fail(error)

    def _answer_all(self, connections: Sequence[Connection]) -> None:
        open_connections = list(connections)
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
        if self._workers is not None:
            self._workers.kill()


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
