"""The processes that help with a merge. `processes` starts them, says what to do and ends them.

One fresh interpreter imports torch and reads the plan. It has no threads yet, so that it can fork
the other workers safely, whatever the process runs that merges: a notebook, a GPU, a study. No
worker imports the user's script. Paths, plans and numbers of tensors pass between processes, and
no weights.
"""

import gc
import os
import pickle
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from paretomerge.checkpoint.writer import BlockWriter, Destination
from paretomerge.errors import ParetoMergeError
from paretomerge.merging.job_io import cast_block
from paretomerge.merging.plan.plan import Plan, TensorJob
from paretomerge.merging.tasks import Task, merge_task, prepare_process


@dataclass(frozen=True)
class Work:
    """What every worker gets to know once.

    Attributes:
        plan: What to merge.
        destinations: Tensor name -> where it is written.
        cache_bytes: See `merge_task`.
    """

    plan: Plan
    destinations: dict[str, Destination]
    cache_bytes: int


@dataclass(frozen=True)
class Done:
    """The answer of a worker that has merged a task; the first one says that it is ready.

    Attributes:
        written: Tensor name -> bytes that were written.
    """

    written: dict[str, int]


@dataclass(frozen=True)
class Failed:
    """The answer of a worker that could not merge a task.

    Attributes:
        error: What happened.
    """

    error: BaseException


def main(descriptors: Sequence[int]) -> None:
    """Merge what is asked for through sockets, one process for each.

    Args:
        descriptors: The sockets. The plan comes through the standard input.
    """
    work: Work = pickle.load(sys.stdin.buffer)
    # What is there now stays, and forked processes share its memory as long as nobody touches it.
    gc.freeze()
    gc.enable()
    own, *others = descriptors
    children: list[int] = []
    for index, descriptor in enumerate(others):
        child = os.fork()
        if not child:
            # An open copy of a socket would hide the death of the worker that it belongs to.
            for foreign in (own, *others[index + 1 :]):
                os.close(foreign)
            own, children = descriptor, []
            break
        os.close(descriptor)
        children.append(child)
    _serve(Connection(own), work)
    for child in children:
        os.waitpid(child, 0)
    # Nothing is to be flushed or cleaned up, and what other libraries register may wait.
    os._exit(0)


def _serve(connection: Connection, work: Work) -> None:
    """Merge tasks until there are no more, or until the process that deals them has ended."""
    torch.set_num_threads(1)
    prepare_process()
    writer = BlockWriter(work.destinations)
    try:
        answer: Done | Failed = Done({})
        while isinstance(answer, Done):
            connection.send(answer)
            task: Task | None = connection.recv()
            if task is None:
                return
            answer = _merge(task, work, writer)
        connection.send(answer)
    except (EOFError, ConnectionError):
        return


def _merge(task: Task, work: Work, writer: BlockWriter) -> Done | Failed:
    written: dict[str, int] = {}

    def write_block(job: TensorJob, start: int, block: Tensor) -> None:
        result = cast_block(work.plan, job, block)
        n_bytes = writer.write(job.name, start, result)
        written[job.name] = written.get(job.name, 0) + n_bytes

    try:
        with torch.inference_mode():
            merge_task(work.plan, task, write_block, work.cache_bytes)
    # It is raised again in the process that deals the tasks.
    except BaseException as error:
        return Failed(_portable(error))
    return Done(written)


def _portable(error: BaseException) -> BaseException:
    """An exception that says the same in another process."""
    # The traceback does not travel. Bugs cannot be found without it.
    if not isinstance(error, (ParetoMergeError, OSError)):
        error.add_note(f"In a worker process:\n{traceback.format_exc()}")
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError("".join(traceback.format_exception(error)))
    return error
