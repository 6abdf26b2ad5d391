"""What all executors with workers share: the jobs that wait, and those whose worker died."""

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from paretomerge.record.trial import Trial
from paretomerge.study.trial_runner import Job
from paretomerge.study.worker import Done


class Dispatch:
    """Jobs that are due, and the outcomes of those that workers had.

    A job whose worker died is evaluated again once.

    Args:
        worker: What a worker is called in messages, such as `worker process`.
        workers: The same for several.
        time_limit: Seconds that scoring a trial may take; None for no limit.
        races: Whether jobs need the finished trials.

    Attributes:
        waiting: Jobs that no worker has.
        notes: What users should know about how merges were scored.
    """

    def __init__(
        self, worker: str, workers: str, time_limit: float | None, races: bool
    ) -> None:
        self.waiting: deque[Job] = deque()
        self.notes: list[str] = []
        self._worker = worker
        self._workers = workers
        self._time_limit = time_limit
        self._races = races
        # Number of a trial -> how the worker that had it first came to its end.
        self._lost: dict[int, str] = {}

    def message(self, job: Job, known: set[int]) -> tuple[Job, Sequence[Trial]]:
        """What is sent to a worker: the job, and the finished trials that it has not been sent yet.

        Args:
            job: The job.
            known: Numbers of the finished trials that the worker has; the others are added.

        Returns:
            The arguments of `TrialWorker.run`.
        """
        new: list[Trial] = []
        if self._races:
            for trial in job.finished:
                if trial.number not in known:
                    new.append(trial)
            known.update(trial.number for trial in new)
        return replace(job, finished=()), tuple(new)

    def done(self, done: Done) -> Trial:
        """The trial of a job that a worker has evaluated."""
        for note in done.notes:
            if note not in self.notes:
                self.notes.append(note)
        reason = self._lost.pop(done.trial.number, "")
        return replace(done.trial, retried=reason)

    def lost(self, job: Job, reason: str) -> Trial | None:
        """Deal with a job whose worker died.

        Args:
            job: The job.
            reason: How the worker came to its end, such as `was killed by SIGKILL`.

        Returns:
            The failed trial; None where the job is evaluated again.
        """
        number = job.trial.number
        if number not in self._lost:
            self._lost[number] = f"the {self._worker} {reason}"
            self.waiting.appendleft(job)
            return None
        del self._lost[number]
        failure = (
            f"WorkerDied: two {self._workers} ended while they evaluated this merge; the latter "
            f"{reason}"
        )
        return replace(job.trial, failure=failure)

    def overdue(self, job: Job) -> Trial:
        """The failed trial of a job whose worker was ended at the time limit."""
        self._lost.pop(job.trial.number, None)
        failure = (
            f"EvaluationError: scoring took longer than {self._time_limit:g} s "
            f"(`evaluate.time_limit`), and its {self._worker} was ended"
        )
        return replace(job.trial, failure=failure)
