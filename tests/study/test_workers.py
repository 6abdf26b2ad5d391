"""Trials in worker processes: the same scores, no barrier, and no trial lost with a worker."""

import functools
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import paretomerge as pm
from paretomerge.errors import ConfigError, StudyError
from paretomerge.record.record import Record
from paretomerge.record.results import reference_of
from paretomerge.record.storage import Storage
from paretomerge.study import processes
from paretomerge.study.processes import Processes, worker_environment
from paretomerge.study.worker import pack_settings


def norm(model, tokenizer):
    return model.state_dict()["model.layers.0.mlp.up_proj.weight"].float().norm().item()


def total(model, tokenizer):
    return model.state_dict()["model.layers.1.mlp.up_proj.weight"].float().sum().item()


def eventful(model, tokenizer):
    """Dies at the first evaluation of `bob` and at each of `cyd`.

    The uniform soup hangs, and is deaf to the alarm of the time limit.
    """
    name = name_of(model)
    if name == "cyd":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "bob" and not Path("died").exists():
        Path("died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "soup":
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
        time.sleep(600)
    return norm(model, tokenizer)


def slow_bob(model, tokenizer):
    if name_of(model) == "bob":
        Path("scoring-bob").touch()
        time.sleep(4)
    return norm(model, tokenizer)


def fails(model, tokenizer):
    raise ValueError("no score today")


NORMS = "NORMS_OF_MERGES"


def name_of(model):
    """Which of the merges that are known beforehand this is; empty for any other."""
    for name, value in json.loads(os.environ[NORMS]).items():
        if norm(model, None) == pytest.approx(value, abs=1e-4):
            return name
    return ""


def norms(pico):
    """The norms of the sources and of their mean, computed apart."""
    weight = "model.layers.0.mlp.up_proj.weight"
    sources = {}
    for name in ("ada", "bob", "cyd"):
        sources[name] = pm_state(pico / name)[weight].float()
    mean = sum(sources.values()) / 3
    tensors = {**sources, "soup": mean.bfloat16().float()}
    return {name: tensor.norm().item() for name, tensor in tensors.items()}


def pm_state(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


@pytest.fixture(scope="module")
def environment(pico):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(NORMS, json.dumps(norms(pico)))
        yield


@pytest.fixture
def make(pico, tmp_path, monkeypatch, environment):
    monkeypatch.chdir(tmp_path)
    return functools.partial(study_of, pico)


def study_of(pico, function=norm, workers=2, names=("ada", "bob"), **settings):
    defaults = {
        "objectives": [
            pm.Function(function, name="norm"),
            pm.Function(total, direction="minimize"),
        ],
        "sampler": "random",
        "out": "runs/first",
    }
    models = [pico / name for name in names]
    return pm.Study(pico / "base", models, workers=workers, **defaults | settings)


def run(study, n_trials=7, held_out=False):
    study.optimize(n_trials=n_trials, held_out=held_out, show_progress_bar=False)
    return study.get_trials()


@pytest.fixture(scope="module")
def eventful_study(pico, tmp_path_factory, environment):
    """A study in which much happens to its two workers; tests read it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("eventful"))
        patch.setattr(processes, "GRACE", 0.2)
        study = study_of(
            pico,
            eventful,
            names=("ada", "bob", "cyd"),
            evaluation=pm.Evaluation(time_limit=3),
            budget=12,
        )
        study.optimize(show_progress_bar=False)
        alone = study_of(pico, workers=1, names=("ada", "bob", "cyd"), out="runs/alone")
        run(alone, 10, held_out=True)
        yield study, alone


def labelled(study):
    return {trial.label: trial for trial in study.get_trials() if trial.label}


def test_the_scores_are_those_of_one_process(eventful_study):
    study, alone = eventful_study
    here, there = labelled(alone), labelled(study)
    assert here.keys() == there.keys()
    scored = [name for name, trial in there.items() if not trial.failure]
    assert len(scored) == len(here) - 2
    for name in scored:
        assert there[name].scores == here[name].scores
        assert there[name].held_out == here[name].held_out
        assert there[name].recipe_yaml == here[name].recipe_yaml
    numbers = [trial.number for trial in study.get_trials()]
    assert numbers == list(range(12))


def test_what_a_worker_lost_is_evaluated_again_and_the_reason_kept(eventful_study):
    trial = labelled(eventful_study[0])["bob"]
    assert not trial.failure
    assert "the worker process was killed by SIGKILL" in trial.retried


def test_a_merge_that_kills_two_workers_is_a_failed_trial(eventful_study):
    trial = labelled(eventful_study[0])["cyd"]
    assert trial.failure.startswith("WorkerDied: two worker processes")


def test_a_worker_that_hangs_is_ended_at_the_time_limit(eventful_study):
    trial = labelled(eventful_study[0])["uniform soup"]
    assert "scoring took longer than 3 s" in trial.failure


def test_the_hypervolume_refers_to_the_sources_whenever_they_were_done(eventful_study):
    results = eventful_study[0].results()
    sources = [labelled(eventful_study[0])[name] for name in ("ada", "bob")]
    expected = reference_of(sources, results.objectives)
    assert results.reference == expected


def test_an_error_of_a_function_is_the_reason_of_a_failed_trial(make):
    with pytest.raises(StudyError, match=r"10 trials failed.*ValueError: no score"):
        run(make(fails), 12)


def test_a_function_that_cannot_be_sent_is_refused_before_anything_runs(make):
    lock = threading.Lock()

    def locked(model, tokenizer):
        with lock:
            return 1.0

    study = make(locked)
    with pytest.raises(StudyError, match=r"workers: a function .* cannot be sent"):
        run(study)
    assert not study.get_trials()


def test_a_closure_can_be_sent(make):
    factor = 2.0
    study = make(lambda model, tokenizer: factor)
    there = pickle.loads(pack_settings(study.settings))
    assert there.objectives[0].function(None, None) == 2.0


def test_a_second_level_a_warm_start_and_another_number_of_workers(make):
    settings = {
        "then": pm.SecondLevel(pm.RouteSpace(blocks=2), trials=3),
        "budget": 7,
        "warm_start": ["runs/earlier"],
        "out": "runs/both",
    }
    run(make(workers=1, out="runs/earlier"), 3)
    run(make(workers=1, **settings), 1)
    study = make(workers=2, **settings)
    study.optimize(show_progress_bar=False)
    trials = study.get_trials()
    labels = [trial.label for trial in trials if trial.label and not trial.level]
    assert len(labels) == len(set(labels))
    assert not [trial for trial in trials if trial.failure]
    assert len([trial for trial in trials if trial.level]) == 3
    assert [trial for trial in trials if trial.warm_start]
    assert all(trial.held_out for trial in study.front())


def test_a_time_is_not_measured_beside_other_workers(make):
    objectives = [pm.Function(norm), pm.Size("seconds_per_token")]
    with pytest.raises(ConfigError, match="measures time"):
        make(objectives=objectives).check()


@pytest.mark.parametrize(
    "workers", [0, -1, "many", 1.5, {"slurm": {}}, {"ray": {"n": 1}}]
)
def test_workers_that_are_no_workers(make, workers):
    with pytest.raises(ConfigError, match=r"workers"):
        make(workers=workers)


def test_threads_and_gpus_are_shared_out(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    environments = [worker_environment(i, 4, "cuda") for i in range(3)]
    assert [e["CUDA_VISIBLE_DEVICES"] for e in environments] == ["4", "6", "4"]
    assert environments[0]["OMP_NUM_THREADS"] == "2"
    assert worker_environment(1, 4, "cuda:1")["CUDA_VISIBLE_DEVICES"] == "4,6"


def test_a_worker_takes_the_place_and_the_gpu_of_one_that_died(make, monkeypatch):
    places = []

    def environment(index, count, device):
        places.append(index)
        return worker_environment(index, count, device)

    monkeypatch.setattr(processes, "worker_environment", environment)
    monkeypatch.setattr(processes, "_WORKER", "pass")
    with Processes(make().settings, 3) as executor:
        workers = [executor._start() for _ in range(3)]
        executor._workers.remove(workers[1])
        executor._start()
        workers[1].connection.close()
        workers[1].process.wait()
    assert places == [0, 1, 2, 1]


STUDY = """
import sys
sys.path.insert(0, {tests!r})
import paretomerge as pm
from tests.study.test_workers import slow_bob, total

study = pm.Study(
    {base!r},
    [{ada!r}, {bob!r}],
    [
        pm.Function(slow_bob, name="norm"),
        pm.Function(total, direction="minimize"),
    ],
    sampler="random",
    workers=2,
    out="runs/script",
)
study.optimize(n_trials=30, show_progress_bar=False)
"""


@pytest.fixture
def script(pico, tmp_path, make):
    """A script without a guard for its main module, as a user writes it."""
    code = STUDY.format(
        tests=str(Path(__file__).parents[2]),
        base=str(pico / "base"),
        ada=str(pico / "ada"),
        bob=str(pico / "bob"),
    )
    file = tmp_path / "script.py"
    file.write_text(code)
    return [sys.executable, str(file)]


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def children_of(pid):
    listed = subprocess.run(
        ["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False
    )
    return [int(child) for child in listed.stdout.split()]


def is_running(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def recorded():
    try:
        return Record.read(Storage.at(Path("runs/script/study.db"))).trials()
    except StudyError:
        return []


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc")
def test_workers_end_with_a_driver_that_is_killed(make, script):
    with subprocess.Popen(script) as driver:
        wait_for(Path("scoring-bob").exists)
        time.sleep(1)
        workers = children_of(driver.pid)
        driver.kill()
    assert workers
    wait_for(lambda: not any(is_running(worker) for worker in workers), 20)
    before = recorded()
    study = make(slow_bob, out="runs/script", workers=1)
    trials = run(study, 2)
    assert trials[: len(before)] == before
    assert len(trials) == len(before) + 2


@pytest.mark.usefixtures("hears_ctrl_c")
@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_once_finishes_what_runs_and_twice_stops(script, presses):
    with subprocess.Popen(script, stderr=subprocess.PIPE, text=True) as driver:
        wait_for(Path("scoring-bob").exists)
        workers = children_of(driver.pid)
        for _ in range(presses):
            driver.send_signal(signal.SIGINT)
            time.sleep(0.3)
        _, errors = driver.communicate(timeout=60)
    assert "KeyboardInterrupt" in errors and "press Ctrl-C again" in errors
    wait_for(lambda: not any(is_running(worker) for worker in workers), 20)
    trials = recorded()
    assert not [trial for trial in trials if trial.failure]
    # The slow one was running.
    has_bob = any(trial.label == "bob" for trial in trials)
    assert has_bob == (presses == 1)


def test_baselines_are_listed_in_one_order_whenever_they_were_done(eventful_study):
    study, alone = eventful_study
    listed = [trial.label for trial in study.results().baselines]
    expected = [trial.label for trial in alone.results().baselines]
    failed = {"cyd", "uniform soup"}
    assert listed[:2] == ["ada", "bob"]
    assert set(listed) == set(expected) - failed
