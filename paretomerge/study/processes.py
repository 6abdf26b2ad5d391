"""Evaluates trials in several processes of this machine, each with its own live model."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Self

from paretomerge.config.settings import StudySettings
from paretomerge.errors import StudyError
from paretomerge.record.trial import Trial
from paretomerge.study.dispatch import Dispatch
from paretomerge.study.trial_runner import Job
from paretomerge.study.worker import (
    GRACE,
    Done,
    Message,
    Raised,
    Ready,
    Scoring,
    pack_settings,
)

# Seconds for a worker without a job to end by itself, and to delete its temporary files.
_FAREWELL = 5.0
_WORKER = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from paretomerge.study.worker import main; main(int(sys.argv[2]))"
)


class RemoteError(Exception):
    """The traceback of another process, as the cause of its error in this one."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


@dataclass
class _Worker:
    """A process, and what it does.

    Attributes:
        index: Its place among the workers, which decides about its GPU.
        process: The process.
        connection: To it.
        ready: Whether it has built the study.
        job: What it evaluates; None where it waits.
        deadline: The `time.monotonic()` at which it is ended.
        known: Numbers of the finished trials that it knows.
    """

    index: int
    process: subprocess.Popen[bytes]
    connection: Connection
    ready: bool = False
    job: Job | None = None
    deadline: float | None = None
    known: set[int] = field(default_factory=set)


class Processes:
    """Worker processes of this machine; see `Executor`.

    A worker that dies costs its running trial, which is evaluated again once.

    Args:
        settings: The study's settings, which each worker builds its part of the study from.
        count: The number of workers.
        time_limit: Seconds that scoring a trial may take; None for no limit.
        races: Whether jobs need the finished trials.
    """

    def __init__(
        self,
        settings: StudySettings,
        count: int,
        time_limit: float | None = None,
        races: bool = False,
    ) -> None:
        self.capacity = count
        self._dispatch = Dispatch(
            "worker process", "worker processes", time_limit, races
        )
        self.notes = self._dispatch.notes
        self._packed_settings = pack_settings(settings)
        self._device = settings.device
        self._time_limit = time_limit
        self._workers: list[_Worker] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self._workers:
            worker.connection.close()
        deadline = time.monotonic() + _FAREWELL
        for worker in self._workers:
            # One that scores would go on for as long as that takes.
            if worker.job is not None:
                worker.process.kill()
        for worker in self._workers:
            try:
                worker.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
        self._workers.clear()

    def submit(self, job: Job) -> None:
        """Begin to evaluate a job; see `Executor.submit`."""
        self._dispatch.waiting.append(job)
        self._send_waiting()

    def next_done(self) -> Trial:
        """Wait for a job; see `Executor.next_done`."""
        while True:
            self._send_waiting()
            trial = self._end_overdue()
            if trial is not None:
                return trial
            connections = [worker.connection for worker in self._workers]
            readable = wait(connections, self._seconds_left())
            for worker in self._workers:
                if worker.connection in readable:
                    trial = self._receive(worker)
                    if trial is not None:
                        return trial
                    # The list of workers may have changed.
                    break

    def _send_waiting(self) -> None:
        """Give the jobs that wait to workers without one; start workers where there are too few."""
        while self._dispatch.waiting:
            idle = [worker for worker in self._workers if worker.job is None]
            if idle:
                worker = idle[0]
            elif len(self._workers) < self.capacity:
                worker = self._start()
            else:
                return
            worker.job = self._dispatch.waiting.popleft()
            if worker.ready:
                self._send(worker)

    def _start(self) -> _Worker:
        here, there = Pipe()
        descriptor = there.fileno()
        # That of a worker that died is free again, and so is its GPU.
        taken = {worker.index for worker in self._workers}
        index = min(set(range(self.capacity)) - taken)
        # Not by `multiprocessing`, which would run the user's script again in each worker.
        process = subprocess.Popen(
            [sys.executable, "-c", _WORKER, json.dumps(sys.path), str(descriptor)],
            pass_fds=[descriptor],
            env=worker_environment(index, self.capacity, self._device),
        )
        # The worker has its own copy; with this one open, its death would not be seen.
        there.close()
        worker = _Worker(index, process, here)
        self._workers.append(worker)
        # One that is dead already is found by `_receive`.
        with suppress(OSError):
            here.send_bytes(self._packed_settings)
        return worker

    def _send(self, worker: _Worker) -> None:
        assert worker.job is not None
        message = self._dispatch.message(worker.job, worker.known)
        # One that is dead is found by `_receive`, at the end of the connection.
        with suppress(OSError):
            worker.connection.send(message)

    def _receive(self, worker: _Worker) -> Trial | None:
        """Handle one message of a worker; return the trial that is done, if it is one."""
        try:
            message: Message = worker.connection.recv()
        except (EOFError, OSError):
            return self._bury(worker)
        match message:
            case Ready():
                worker.ready = True
                if worker.job is not None:
                    self._send(worker)
            case Scoring():
                if self._time_limit is not None:
                    worker.deadline = time.monotonic() + self._time_limit + GRACE
            case Raised():
                raise message.error from RemoteError(message.traceback)
            case Done():
                worker.job = worker.deadline = None
                return self._dispatch.done(message)
        return None

    def _bury(self, worker: _Worker) -> Trial | None:
        """Deal with the death of a worker: its job is evaluated again once."""
        self._workers.remove(worker)
        worker.connection.close()
        reason = how_it_ended(worker.process.wait())
        if not worker.ready:
            raise StudyError(
                f"workers: a worker process {reason} while it started. Its own messages are above. "
                "If the memory was exhausted, set fewer `workers`"
            )
        if worker.job is None:
            return None
        return self._dispatch.lost(worker.job, reason)

    def _end_overdue(self) -> Trial | None:
        """End one worker that has not kept the time limit; its trial has failed."""
        now = time.monotonic()
        for worker in self._workers:
            if worker.deadline is None or now < worker.deadline:
                continue
            # It may have answered at the last moment.
            if worker.connection.poll():
                continue
            worker.process.kill()
            worker.process.wait()
            worker.connection.close()
            self._workers.remove(worker)
            assert worker.job is not None
            return self._dispatch.overdue(worker.job)
        return None

    def _seconds_left(self) -> float | None:
        """Seconds until the next deadline; None where there is none."""
        deadlines = []
        for worker in self._workers:
            if worker.deadline is not None:
                deadlines.append(worker.deadline)
        if not deadlines:
            return None
        return max(0.0, min(deadlines) - time.monotonic())


def worker_environment(index: int, count: int, device: str) -> dict[str, str]:
    """The environment of a worker process.

    Args:
        index: The worker's number.
        count: The number of workers.
        device: The study's device. With `cuda`, workers are dealt to the visible GPUs in turn.

    Returns:
        The variables.
    """
    environment = dict(os.environ)
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    # As many threads on each of n workers as there are cores would slow all of them down.
    cores = os.cpu_count() or 1
    threads = max(1, cores // count)
    environment.setdefault("OMP_NUM_THREADS", str(threads))
    if device == "cuda":
        gpus = _visible_gpus()
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = gpus[index % len(gpus)]
    return environment


def _visible_gpus() -> list[str]:
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named:
        return named.split(",")
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def how_it_ended(status: int) -> str:
    """Describe the exit status of a process: `was killed by SIGKILL`, `ended with status 1`."""
    if status >= 0:
        return f"ended with status {status}"
    name = signal.Signals(-status).name
    text = f"was killed by {name}"
    if -status == signal.SIGKILL:
        # The kernel's way to free memory.
        text += " (the memory may have been exhausted)"
    return text
