"""Where trials are evaluated: in this process, in processes of this machine, or on a cluster."""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Protocol, Self

from paretomerge.record.trial import Trial
from paretomerge.study.trial_runner import Job, TrialRunner


class Executor(Protocol):
    """Evaluates jobs. As a context, it frees at the end what it has started.

    Attributes:
        capacity: The number of jobs that may be submitted and not yet returned.
        notes: What users should know about how merges were scored.
    """

    capacity: int
    notes: list[str]

    def submit(self, job: Job) -> None:
        """Begin to evaluate a job.

        Args:
            job: The job. No other one that is not yet returned has its trial's number.

        Raises:
            ParetoMergeError: Nothing can be evaluated.
        """

    def next_done(self) -> Trial:
        """Wait for a submitted job.

        Returns:
            The trial of the first one that is done, with its scores or the reason for its failure.

        Raises:
            ParetoMergeError: The job cannot be evaluated, and no other one could be.
        """

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...


def executed(executor: Executor, jobs: Iterable[Job]) -> Iterator[tuple[Job, Trial]]:
    """Evaluate jobs that are known beforehand.

    Args:
        executor: Evaluates them.
        jobs: The jobs.

    Yields:
        Each job and its trial, in the order in which they are done.
    """
    # A number of its own for each: several jobs may be of one trial.
    waiting = enumerate(jobs)
    running: dict[int, Job] = {}
    while True:
        room = executor.capacity - len(running)
        for place, job in islice(waiting, room):
            running[place] = job
            executor.submit(replace(job, trial=replace(job.trial, number=place)))
        if not running:
            return
        done = executor.next_done()
        job = running.pop(done.number)
        yield job, replace(done, number=job.trial.number)


class InProcess:
    """Evaluates one trial at a time, in this process."""

    capacity = 1

    def __init__(self, runner: TrialRunner) -> None:
        self.notes: list[str] = []
        self._runner = runner
        self._jobs: deque[Job] = deque()

    def submit(self, job: Job) -> None:
        """Note a job; see `Executor.submit`."""
        self._jobs.append(job)

    def next_done(self) -> Trial:
        """Evaluate it; see `Executor.next_done`."""
        return self._runner.run(self._jobs.popleft())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._jobs.clear()
