"""Evaluates trials in actors of a Ray cluster, each with its own live model."""

import logging
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from paretomerge.config.settings import StudySettings
from paretomerge.config.workers import RayWorkers
from paretomerge.errors import ConfigError, StudyError
from paretomerge.record.trial import Trial
from paretomerge.study.dispatch import Dispatch
from paretomerge.study.trial_runner import Job
from paretomerge.study.worker import GRACE, Done, TrialWorker, pack_settings

if TYPE_CHECKING:
    from ray import ObjectRef

_log = logging.getLogger(__name__)

_LOOK_INTERVAL = 5.0  # seconds between two looks at a cluster without a ready actor
_PATIENCE = 600.0  # seconds that a cluster may have no room for an actor
_MOST_FAILED_STARTS = (
    3  # so many actors in a row that die while they start have one cause
)


@dataclass
class _Actor:
    """An actor, and what it does.

    Attributes:
        handle: Ray's handle.
        ready: Whether it has built the study. Before that it may wait for a node with room.
        job: What it evaluates; None where it waits.
        known: Numbers of the finished trials that it knows.
        started: The `time.monotonic()` at which it got the job.
    """

    handle: Any
    ready: bool = False
    job: Job | None = None
    known: set[int] = field(default_factory=set)
    started: float = 0.0


class RayActors:
    """Actors of a Ray cluster; see `Executor`.

    An actor that dies costs its running trial, which is evaluated again once. Where a node is lost,
    the actors on the other nodes go on, and a new actor waits until there is room for it. Paths are
    sent to the actors and no tensors: every node needs the models, from a shared folder or from the
    Hub.

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
        self._pending: dict[ObjectRef[Any], _Actor] = {}
        self._failed_starts = 0
        # The `time.monotonic()` since when no actor is ready and no node has room for one.
        self._no_room_since: float | None = None
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
        room = self._room()
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
            pending = list(self._pending)
            finished, _ = ray.wait(pending, num_returns=1, timeout=_LOOK_INTERVAL)
            if not finished:
                self._check_room()
                continue
            actor = self._pending.pop(finished[0])
            try:
                answer = ray.get(finished[0])
            # The second one: an answer may be lost with its node after the job was done.
            except (
                ray.exceptions.RayActorError,
                ray.exceptions.ObjectLostError,
            ) as error:
                trial = self._bury(actor, error)
                if trial is not None:
                    return trial
                continue
            if not actor.ready:
                actor.ready = True
                self._failed_starts = 0
                continue
            actor.job = None
            done: Done = answer
            return self._dispatch.done(done)

    @property
    def _num_gpus(self) -> float:
        if self._cluster.num_gpus is not None:
            return self._cluster.num_gpus
        return 0.0 if self._device == "cpu" else 1.0

    def _room(self) -> int:
        """The number of actors that the cluster has room for.

        Raises:
            ConfigError: No node has room for one.
        """
        needs = {"CPU": self._cluster.num_cpus, "GPU": self._num_gpus}
        needs = {name: needed for name, needed in needs.items() if needed > 0}
        if not needs:
            if self._cluster.count:
                return self._cluster.count
            raise ConfigError(
                "workers.ray: set `count`, since actors without `num_cpus` and `num_gpus` have no "
                "limit"
            )
        nodes = _live_nodes()
        room = sum(_room_on(node, needs) for node in nodes)
        if room:
            return room
        for name, needed in needs.items():
            most = max((node.get(name, 0.0) for node in nodes), default=0.0)
            if most < needed:
                raise ConfigError(
                    f"workers.ray: an actor needs {needed:g} {name}, and the largest node of the "
                    f"cluster has {most:g}; set `num_{name.lower()}s`"
                )
        raise ConfigError(
            "workers.ray: no node of the cluster has both the CPUs and the GPUs that an actor "
            "needs; set `num_cpus` or `num_gpus`"
        )

    def _check_room(self) -> None:
        """Wait for a lost node, and give up after a while.

        Raises:
            StudyError: There is no actor, and for ten minutes there was no room for one.
        """
        if any(actor.ready for actor in self._actors):
            self._no_room_since = None
            return
        try:
            self._room()
        except ConfigError as error:
            now = time.monotonic()
            minutes = round(_PATIENCE / 60)
            if self._no_room_since is None:
                self._no_room_since = now
                _log.warning(
                    "%s. A node may have died. Waiting up to %d minutes for one.",
                    error,
                    minutes,
                )
            if now - self._no_room_since >= _PATIENCE:
                raise StudyError(
                    f"{error}. A node may have died, and none came back for {minutes} minutes. "
                    "Every finished trial is in the record: start a node, and search again"
                ) from error
        else:
            self._no_room_since = None

    def _send_waiting(self) -> None:
        """Give the jobs that wait to actors without one; start actors where there are too few."""
        for actor in self._actors:
            if not self._dispatch.waiting:
                return
            # One that is not ready may wait for a node for ever, and the job with it.
            if actor.ready and actor.job is None:
                self._send(actor, self._dispatch.waiting.popleft())
        starting = sum(not actor.ready for actor in self._actors)
        wanted = len(self._dispatch.waiting) - starting
        room = self.capacity - len(self._actors)
        for _ in range(min(wanted, room)):
            self._start()

    def _start(self) -> None:
        import ray

        make = ray.remote(TrialWorker).options(
            num_cpus=self._cluster.num_cpus, num_gpus=self._num_gpus, max_restarts=0
        )
        actor = _Actor(make.remote(self._packed_settings, paths=sys.path))
        self._actors.append(actor)
        self._pending[actor.handle.__ray_ready__.remote()] = actor

    def _send(self, actor: _Actor, job: Job) -> None:
        actor.job = job
        actor.started = time.monotonic()
        message = self._dispatch.message(job, actor.known)
        self._pending[actor.handle.run.remote(*message)] = actor

    def _bury(self, actor: _Actor, error: Exception) -> Trial | None:
        """Deal with the death of an actor: its job is evaluated again once."""
        import ray

        self._actors.remove(actor)
        # One that cannot be reached may live, and would keep its place on the node.
        ray.kill(actor.handle)
        reason = _reason(error)
        job = actor.job
        if job is None:
            self._check_start(error, reason)
            return None
        elapsed = time.monotonic() - actor.started
        # The actor ends itself when it does not keep the limit.
        if self._time_limit is not None and elapsed > self._time_limit + GRACE:
            return self._dispatch.overdue(job)
        return self._dispatch.lost(job, f"died: {reason}")

    def _check_start(self, error: Exception, reason: str) -> None:
        """Deal with an actor that died before it was ready.

        Raises:
            StudyError: The next one would die, too.
        """
        if getattr(error, "actor_init_failed", False):
            raise StudyError(
                f"workers: an actor cannot be made: {_last_line(error)}. Every node needs the "
                "models, the tasks and the modules of the study's functions"
            ) from error
        # Its node may have died. Another one is started where a job waits.
        self._failed_starts += 1
        if self._failed_starts >= _MOST_FAILED_STARTS:
            raise StudyError(
                f"workers: {_MOST_FAILED_STARTS} Ray actors died while they started; the latest: "
                f"{reason}. If the memory was exhausted, set fewer actors (`workers.ray.count`)"
            ) from error


def _live_nodes() -> list[dict[str, float]]:
    """The resources of each node of the cluster that is alive."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _room_on(node: Mapping[str, float], needs: Mapping[str, float]) -> int:
    """The number of actors that a node has room for."""
    rooms = []
    for name, needed in needs.items():
        # Not of the numbers themselves: 1.0 // 0.1 is 9. Ray counts in ten-thousandths.
        units = max(round(needed * 10_000), 1)
        rooms.append(round(node.get(name, 0.0) * 10_000) // units)
    return min(rooms)


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            "workers: ray is not installed; run `pip install 'paretomerge[ray]'`"
        ) from error
    return ray


def _reason(error: Exception) -> str:
    """Why an actor died, in a line.

    Ray's message begins with a general line, then lists what belongs to the actor, each in an
    indented line, and then comes the reason.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    reasons = [line for line in lines[1:] if line and not line[0].isspace()]
    return (reasons or lines)[0].strip().rstrip(".")


def _last_line(error: Exception) -> str:
    """The last line of a message with a traceback: the error itself."""
    return str(error).strip().splitlines()[-1]
