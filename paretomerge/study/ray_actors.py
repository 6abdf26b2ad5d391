"""Evaluates trials in actors of a Ray cluster, each with its own live model."""

import math
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from paretomerge.config.settings import StudySettings
from paretomerge.config.workers import RayWorkers
from paretomerge.errors import ConfigError, StudyError
from paretomerge.record.trial import Trial
from paretomerge.study.dispatch import Dispatch
from paretomerge.study.trial_runner import Job
from paretomerge.study.worker import Done, TrialWorker, pack_settings

if TYPE_CHECKING:
    from ray import ObjectRef


@dataclass
class _Actor:
    """An actor, and what it does.

    Attributes:
        handle: Ray's handle.
        job: What it evaluates; None where it waits.
        known: Numbers of the finished trials that it knows.
        started: The `time.monotonic()` at which it got the job.
    """

    handle: Any
    job: Job | None = None
    known: set[int] = field(default_factory=set)
    started: float = 0.0


class RayActors:
    """Actors of a Ray cluster; see `Executor`.

    An actor that dies costs its running trial, which is evaluated again once. Paths are sent to the
    actors and no tensors: every node needs the models, from a shared folder or from the Hub.

    Args:
        settings: The study's settings.
        cluster: The cluster, and what an actor takes of it.
        time_limit: Seconds that scoring a trial may take; None for no limit.
        races: Whether jobs need the finished trials.

    Raises:
        ConfigError: Ray is not installed, or the cluster has no room for an actor.
    """

    def __init__(
        self,
        settings: StudySettings,
        cluster: RayWorkers,
        time_limit: float | None = None,
        races: bool = False,
    ) -> None:
        self.capacity = cluster.count or 1
        self._dispatch = Dispatch("Ray actor", "Ray actors", time_limit, races)
        self.notes = self._dispatch.notes
        self._device = settings.device
        self._packed_settings = pack_settings(settings)
        self._cluster = cluster
        self._time_limit = time_limit
        self._actors: list[_Actor] = []
        self._pending: dict[ObjectRef[Done], _Actor] = {}
        self._started_ray = False

    def __enter__(self) -> Self:
        ray = _import_ray()
        if not ray.is_initialized():
            self._started_ray = True
            try:
                ray.init(address=self._cluster.address, include_dashboard=False)
            except ConnectionError as error:
                raise StudyError(
                    f"workers: there is no Ray cluster at {self._cluster.address!r}: {error}. "
                    "Start one with `ray start --head`, or leave `address` out"
                ) from error
        room = self._room(ray.cluster_resources())
        self.capacity = self._cluster.count or room
        return self

    def __exit__(self, *error: object) -> None:
        import ray

        for actor in self._actors:
            ray.kill(actor.handle)
        self._actors.clear()
        self._pending.clear()
        # A cluster that the user's program has joined goes on.
        if self._started_ray:
            ray.shutdown()

    def submit(self, job: Job) -> None:
        """Begin to evaluate a job; see `Executor.submit`."""
        self._dispatch.waiting.append(job)
        self._send_waiting()

    def next_done(self) -> Trial:
        """Wait for a job; see `Executor.next_done`."""
        import ray

        while True:
            self._send_waiting()
            ready, _ = ray.wait(list(self._pending), num_returns=1)
            actor = self._pending.pop(ready[0])
            try:
                done: Done = ray.get(ready[0])
            except ray.exceptions.RayActorError as error:
                trial = self._bury(actor, error)
                if trial is not None:
                    return trial
            else:
                actor.job = None
                return self._dispatch.done(done)

    @property
    def _num_gpus(self) -> float:
        if self._cluster.num_gpus is not None:
            return self._cluster.num_gpus
        return 0.0 if self._device == "cpu" else 1.0

    def _room(self, resources: dict[str, float]) -> int:
        """The number of actors that the cluster has room for."""
        room = math.inf
        for name, needed in (("CPU", self._cluster.num_cpus), ("GPU", self._num_gpus)):
            if needed <= 0:
                continue
            there = resources.get(name, 0.0)
            room = min(room, there // needed)
            if there < needed:
                raise ConfigError(
                    f"workers.ray: an actor needs {needed:g} {name}, and the cluster has "
                    f"{there:g}; set `num_{name.lower()}s`"
                )
        if math.isinf(room):
            raise ConfigError(
                "workers.ray: set `count`, since actors without `num_cpus` and `num_gpus` have no "
                "limit"
            )
        return int(room)

    def _send_waiting(self) -> None:
        """Give the jobs that wait to actors without one; start actors where there are too few."""
        while self._dispatch.waiting:
            idle = [actor for actor in self._actors if actor.job is None]
            if idle:
                actor = idle[0]
            elif len(self._actors) < self.capacity:
                actor = self._start()
            else:
                return
            self._send(actor, self._dispatch.waiting.popleft())

    def _start(self) -> _Actor:
        import ray

        make = ray.remote(TrialWorker).options(
            num_cpus=self._cluster.num_cpus, num_gpus=self._num_gpus, max_restarts=0
        )
        actor = _Actor(make.remote(self._packed_settings, paths=sys.path))
        self._actors.append(actor)
        return actor

    def _send(self, actor: _Actor, job: Job) -> None:
        actor.job = job
        actor.started = time.monotonic()
        message = self._dispatch.message(job, actor.known)
        self._pending[actor.handle.run.remote(*message)] = actor

    def _bury(self, actor: _Actor, error: Exception) -> Trial | None:
        """Deal with the death of an actor: its job is evaluated again once."""
        self._actors.remove(actor)
        job = actor.job
        assert job is not None
        # Ray has no class of its own for an error in the making of an actor.
        if "creation task" in str(error):
            raise StudyError(
                f"workers: an actor cannot be made: {_last_line(error)}. Every node needs the "
                "models, the tasks and the modules of the study's functions"
            ) from error
        elapsed = time.monotonic() - actor.started
        # The actor ends itself when it does not keep the limit.
        if self._time_limit is not None and elapsed > self._time_limit:
            return self._dispatch.overdue(job)
        return self._dispatch.lost(job, f"died: {_first_line(error)}")


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            "workers: ray is not installed; run `pip install 'paretomerge[ray]'`"
        ) from error
    return ray


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _last_line(error: Exception) -> str:
    """The last line of a message with a traceback: the error itself."""
    return str(error).strip().splitlines()[-1]
