"""A process that evaluates trials for a search in another process, one at a time.

It gets a study's settings once, and then jobs. It reads the models itself: no tensor passes between
processes, and on one machine all of them share one copy of the files in the page cache.
"""

import faulthandler
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import TypeAlias

import cloudpickle

from paretomerge.config.settings import StudySettings
from paretomerge.errors import StudyError
from paretomerge.record.trial import Trial
from paretomerge.study.trial_runner import Job

GRACE = 10.0
"""Seconds after the time limit at which a worker that does not keep it is ended."""

_WATCH_INTERVAL = 1.0  # seconds between two looks at the parent


@dataclass(frozen=True)
class Ready:
    """The worker has built the study and takes jobs."""


@dataclass(frozen=True)
class Scoring:
    """The merge of the running job is made; its scoring begins."""


@dataclass(frozen=True)
class Done:
    """A job is done.

    Attributes:
        trial: The trial, with scores or a failure.
        notes: What users should know about how it was scored.
    """

    trial: Trial
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Raised:
    """An error that no failed trial stands for.

    Attributes:
        error: The error.
        traceback: Where it was raised, as text.
    """

    error: BaseException
    traceback: str


Message: TypeAlias = Ready | Scoring | Done | Raised


class TrialWorker:
    """Evaluates jobs of one study; a process or an actor of a cluster holds one.

    Args:
        packed_settings: The study's settings, by cloudpickle: they may hold functions of a
            notebook.
        connection: Gets a message when scoring begins; None where nobody listens.
        paths: Folders with modules that the study's functions may need, as in `sys.path`.
    """

    def __init__(
        self,
        packed_settings: bytes,
        connection: Connection | None = None,
        paths: Sequence[str] = (),
    ) -> None:
        sys.path += [path for path in paths if path not in sys.path]
        # Imported here, because torch and the harness take seconds, and the parent only needs the
        # messages.
        from paretomerge.study.parts import build_runner

        settings: StudySettings = pickle.loads(packed_settings)
        _set_up_process(settings)

        def on_scoring() -> None:
            if connection is not None:
                connection.send(Scoring())
            elif time_limit is not None:
                # Nobody can end an actor of a cluster from outside. This thread is no thread of
                # Python, so a library that holds Python's lock cannot stop it.
                faulthandler.dump_traceback_later(time_limit + GRACE, exit=True)

        time_limit = settings.evaluation.time_limit
        self._runner, self._goals = build_runner(settings, nullcontext(), on_scoring)
        self._finished: list[Trial] = []

    def run(self, job: Job, new_finished: Sequence[Trial] = ()) -> Done:
        """Evaluate a job.

        Args:
            job: The job, without the finished trials.
            new_finished: Trials that finished since this worker's last job.

        Returns:
            The trial, and notes.
        """
        self._finished += new_finished
        try:
            trial = self._runner.run(replace(job, finished=self._finished))
        finally:
            faulthandler.cancel_dump_traceback_later()
        return Done(trial, tuple(self._goals.notes))


def pack_settings(settings: StudySettings) -> bytes:
    """Settings as bytes for a worker.

    Args:
        settings: The settings.

    Returns:
        The bytes.

    Raises:
        StudyError: They hold something that cannot leave this process.
    """
    try:
        return bytes(cloudpickle.dumps(settings))
    except (TypeError, pickle.PicklingError, AttributeError) as error:
        raise StudyError(
            f"workers: a function or an object of the study cannot be sent to another process: "
            f"{error}. Define it in a module, or set `workers: 1`"
        ) from error


def main(descriptor: int) -> None:
    """Serve the parent until it closes the connection.

    Args:
        descriptor: The file descriptor of the connection.
    """
    # The parent decides what Ctrl-C means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _end_with_parent()
    with Connection(descriptor) as connection:
        try:
            worker = TrialWorker(connection.recv_bytes(), connection)
            connection.send(Ready())
            while True:
                job, new_finished = connection.recv()
                connection.send(worker.run(job, new_finished))
        except EOFError:
            return
        except Exception as error:
            _send_error(connection, error)


def _send_error(connection: Connection, error: Exception) -> None:
    text = traceback.format_exc()
    try:
        message = pickle.dumps(Raised(error, text))
    except Exception:
        # Errors of libraries may hold what cannot be pickled; their text always can.
        error = RuntimeError(f"{type(error).__name__}: {error}")
        message = pickle.dumps(Raised(error, text))
    connection.send_bytes(message)


def _set_up_process(settings: StudySettings) -> None:
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)


def _end_with_parent() -> None:
    """End this process soon after its parent, even in the middle of a trial."""
    parent = os.getppid()

    def watch() -> None:
        # A parent that is killed has no chance to say so.
        while os.getppid() == parent:
            time.sleep(_WATCH_INTERVAL)
        sys.stderr.flush()
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="parent watch").start()
