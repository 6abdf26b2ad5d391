"""Trials in the actors of a Ray cluster; skipped where Ray is not installed."""

import os
import signal
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

import paretomerge as pm
from paretomerge.config.workers import RayWorkers
from paretomerge.errors import ConfigError, StudyError
from paretomerge.record.trial import Trial
from paretomerge.study import ray_actors
from paretomerge.study.executor import executed
from paretomerge.study.ray_actors import RayActors
from paretomerge.study.trial_runner import Job
from tests.study.test_workers import is_running, norm, total, wait_for

ray = pytest.importorskip("ray")

STORE = 80 * 2**20  # bytes of a node's object store

# Which of them Ray says is a matter of moments.
NODE_DIED = ("node has died", "is unavailable")


@pytest.fixture(scope="module")
def cluster():
    """Two nodes on this machine; the last test ends one of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ray.cluster_utils import Cluster

        cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 1,
                "include_dashboard": False,
                "object_store_memory": STORE,
            },
        )
        cluster.add_node(num_cpus=1, object_store_memory=STORE)
        yield cluster
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture
def make(pico, tmp_path, monkeypatch, cluster):
    monkeypatch.chdir(tmp_path)

    def make(first=norm, **workers):
        if not isinstance(first, pm.Perplexity):
            first = pm.Function(first, name="norm")
        return pm.Study(
            pico / "base",
            [pico / "ada", pico / "bob"],
            [first, pm.Function(total)],
            sampler="random",
            out="runs/ray",
            workers={"ray": {"address": cluster.address, **workers}},
        )

    return make


@pytest.mark.filterwarnings("ignore")
def test_a_study_on_two_nodes(make, pico, tmp_path):
    marker = str(tmp_path / "died")

    def dies_once(model, tokenizer):
        try:
            Path(marker).touch(exist_ok=False)
        except FileExistsError:
            pass
        else:
            os.kill(os.getpid(), signal.SIGKILL)
        return norm(model, tokenizer)

    study = make(dies_once)
    study.optimize(n_trials=7, show_progress_bar=False)
    trials = study.get_trials()
    assert len(trials) == 7 and not [trial for trial in trials if trial.failure]
    retried = [trial for trial in trials if trial.retried]
    assert len(retried) == 1 and "Ray actor died" in retried[0].retried
    assert all(trial.held_out for trial in study.front())
    alone = pm.Study(
        pico / "base",
        [pico / "ada", pico / "bob"],
        [pm.Function(norm, name="norm"), pm.Function(total)],
        sampler="random",
        out="runs/alone",
    )
    alone.optimize(n_trials=4, show_progress_bar=False, held_out=False)
    expected = {trial.label: trial.scores for trial in alone.get_trials()}
    for trial in trials:
        if trial.label in expected:
            assert trial.scores == expected[trial.label]


@pytest.mark.filterwarnings("ignore")
def test_an_actor_that_cannot_be_made_ends_the_search(make, tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("a b c")
    study = make(pm.Perplexity(str(corpus)))
    study.check()
    corpus.unlink()
    with pytest.raises(StudyError, match=r"an actor cannot be made: .*corpus"):
        study.optimize(n_trials=2, show_progress_bar=False)
    assert not study.get_trials()


@pytest.mark.filterwarnings("ignore")
def test_a_cluster_without_room_is_refused_before_the_first_trial(make):
    study = make(num_gpus=1)
    with pytest.raises(
        ConfigError, match=r"an actor needs 1 GPU, and the largest node .* has 0;"
    ):
        study.optimize(n_trials=2, show_progress_bar=False)
    assert not study.get_trials()


def worker_class(log):
    """A worker without a study: it notes its node, and takes a moment for each job.

    Made in a function, so that it is sent to the actors itself and not by the name of its module.
    """

    class Worker:
        def __init__(self, packed_settings, paths=()):
            pass

        def run(self, job, new_finished):
            import os
            import time
            from dataclasses import replace
            from pathlib import Path

            import ray

            from paretomerge.study.worker import Done

            node = ray.get_runtime_context().get_node_id()
            with Path(log).open("a") as file:
                file.write(f"{node} {job.trial.number} {os.getpid()}\n")
            time.sleep(0.3)
            return Done(replace(job.trial, label=node), ())

    return Worker


@pytest.fixture
def log(tmp_path):
    """A line for each job that began: node, number, process."""
    file = tmp_path / "log"
    file.touch()
    return file


@pytest.fixture
def actors(cluster, log, monkeypatch):
    monkeypatch.setattr(ray_actors, "TrialWorker", worker_class(str(log)))
    monkeypatch.setattr(ray_actors, "pack_settings", lambda settings: b"")
    monkeypatch.setattr(ray_actors, "_LOOK_INTERVAL", 0.2)

    def make(**options):
        workers = RayWorkers(address=cluster.address, **options)
        return RayActors(SimpleNamespace(device="cpu"), workers)

    return make


def jobs(n):
    return [Job(Trial(number, {}), None) for number in range(n)]


@pytest.mark.filterwarnings("ignore")
def test_the_others_go_on_when_a_node_dies_and_one_that_comes_is_used(
    cluster, actors, log
):
    (node,) = cluster.worker_nodes
    with actors() as executor:
        assert executor.capacity == 2
        done = executed(executor, jobs(200))
        finished = []
        while node.node_id not in log.read_text():
            finished.append(next(done)[1])
        cluster.remove_node(node, allow_graceful=False)
        while not any(trial.retried for trial in finished):
            finished.append(next(done)[1])
        # With one node for two actors, all jobs are done all the same.
        finished += [next(done)[1] for _ in range(5)]
        new = cluster.add_node(num_cpus=1, object_store_memory=STORE)
        while finished[-1].label != new.node_id:
            finished.append(next(done)[1])
    numbers = [trial.number for trial in finished]
    assert len(numbers) == len(set(numbers))
    assert not [trial for trial in finished if trial.failure]
    (lost,) = [trial for trial in finished if trial.retried]
    begun = log.read_text().splitlines()
    on_node = [line for line in begun if line.startswith(node.node_id)]
    assert on_node[-1].split()[1] == str(lost.number)
    assert lost.label != node.node_id
    assert any(reason in lost.retried for reason in NODE_DIED)


@pytest.mark.filterwarnings("ignore")
def test_a_cluster_that_lost_its_last_room_is_waited_for_and_then_an_error(
    actors, monkeypatch, caplog
):
    with actors(num_cpus=1) as executor:
        # A node with so many CPUs was there a moment ago.
        executor._cluster = RayWorkers(num_cpus=64, count=1)
        executor.submit(jobs(1)[0])
        monkeypatch.setattr(ray_actors, "_PATIENCE", 0.5)
        with pytest.raises(StudyError, match=r"needs 64 CPU.*in the record: start a"):
            executor.next_done()
    assert caplog.text.count("Waiting up to 0 minutes for one") == 1


@pytest.mark.filterwarnings("ignore")
def test_actors_that_die_while_they_start_end_the_search(actors, monkeypatch):
    class Dies:
        def __init__(self, packed_settings, paths=()):
            import os

            os._exit(1)

    monkeypatch.setattr(ray_actors, "TrialWorker", Dies)
    with actors(count=1) as executor:
        executor.submit(jobs(1)[0])
        with pytest.raises(
            StudyError, match=r"3 Ray actors died while they started; the latest: .*"
        ):
            executor.next_done()


@pytest.mark.parametrize(
    ("nodes", "needs", "room"),
    [
        ([{"CPU": 4.0}, {"CPU": 3.0}], {"num_cpus": 2}, 3),
        ([{"CPU": 4.0}, {"CPU": 3.0}], {"num_cpus": 0.5}, 14),
        ([{"CPU": 8.0, "GPU": 1.0}, {"CPU": 1.0, "GPU": 4.0}], {"num_gpus": 1}, 2),
        ([{"CPU": 1.0}], {"num_cpus": 0.1}, 10),
        # Without needs, only `count` limits the actors.
        ([{"CPU": 1.0}], {"num_cpus": 0, "count": 3}, 3),
        ([{"CPU": 1.0}], {"num_cpus": 0}, "set `count`"),
        # Together they would have room.
        ([{"CPU": 1.0}, {"CPU": 1.0}], {"num_cpus": 2}, "largest node .* has 1;"),
        ([{"CPU": 8.0}, {"GPU": 1.0}], {"num_gpus": 1}, "both the CPUs and the GPUs"),
        ([], {}, "needs 1 CPU, and the largest node of the cluster has 0;"),
    ],
)
def test_an_actor_needs_room_on_one_node(monkeypatch, nodes, needs, room):
    monkeypatch.setattr(ray_actors, "_live_nodes", lambda: nodes)
    monkeypatch.setattr(ray_actors, "pack_settings", lambda settings: b"")
    executor = RayActors(SimpleNamespace(device="cpu"), RayWorkers(**needs))
    if isinstance(room, int):
        assert executor._room() == room
        return
    with pytest.raises(ConfigError, match=room):
        executor._room()


DRIVER = """
import sys
from types import SimpleNamespace
from paretomerge.config.workers import RayWorkers
from paretomerge.study import ray_actors
from tests.study.test_ray import jobs, worker_class

ray_actors.TrialWorker = worker_class(sys.argv[2])
ray_actors.pack_settings = lambda settings: b""
workers = RayWorkers(address=sys.argv[1] or None)
with ray_actors.RayActors(SimpleNamespace(device="cpu"), workers) as executor:
    for job in jobs(10000):
        executor.submit(job)
        executor.next_done()
"""


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc")
@pytest.mark.filterwarnings("ignore")
def test_no_actor_is_left_behind_when_the_driver_is_killed(cluster, log):
    root = str(Path(__file__).parents[2])
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER, cluster.address, str(log)],
        env={**os.environ, "PYTHONPATH": root},
    ) as driver:
        wait_for(log.read_text)
        driver.kill()
    pids = {int(line.split()[2]) for line in log.read_text().splitlines()}
    wait_for(lambda: not any(is_running(pid) for pid in pids), 20)


@pytest.mark.filterwarnings("ignore")
def test_a_study_goes_on_when_the_node_of_a_trial_dies(make, cluster, tmp_path):
    (node,) = cluster.worker_nodes
    doomed, marker = node.node_id, tmp_path / "scoring"

    def waits_for_the_end(model, tokenizer):
        if ray.get_runtime_context().get_node_id() == doomed:
            marker.touch()
            time.sleep(600)
        return norm(model, tokenizer)

    def end_the_node():
        wait_for(marker.exists)
        cluster.remove_node(node, allow_graceful=False)

    study = make(waits_for_the_end)
    with ThreadPoolExecutor() as beside:
        ended = beside.submit(end_the_node)
        study.optimize(n_trials=7, show_progress_bar=False)
        ended.result()
    trials = study.get_trials()
    assert [trial.number for trial in trials] == list(range(7))
    assert not [trial for trial in trials if trial.failure]
    (lost,) = [trial for trial in trials if trial.retried]
    assert any(reason in lost.retried for reason in NODE_DIED)
    assert all(trial.held_out for trial in study.front())
