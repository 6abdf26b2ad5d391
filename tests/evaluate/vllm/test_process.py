"""The process beside ours: what it answers, how it fails, and that nothing of it is left."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from paretomerge.errors import EvaluationError
from paretomerge.evaluate.vllm.process import Worker, WorkerError, find_interpreter
from tests.conftest import REPOSITORY
from tests.evaluate.vllm.engines import FILE


@pytest.fixture
def start(tmp_path):
    """Starts echo workers, and ends them."""
    with contextlib.ExitStack() as stack:

        def start_worker(timeout: float = 30) -> Worker:
            folder = tmp_path / "shared"
            folder.mkdir(exist_ok=True)
            command = [sys.executable, str(FILE), str(folder), "echo"]
            worker = Worker(command, timeout)
            stack.callback(worker.close)
            return worker

        yield start_worker


def is_gone(pid: int) -> bool:
    for _ in range(600):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().split()[2]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


def child_of(worker: Worker, **fault) -> int:
    arguments = {"fault": fault} if fault else {}
    return worker.call("start", model="m", arguments=arguments)["child"]


def test_calls_are_answered_in_their_order(start):
    worker = start()
    assert worker.call("check", arguments={"depth": 1})["unknown"] == ["depth"]
    # More than a pipe holds, both ways.
    prompts = [list(range(2000)) for _ in range(100)]
    answers = worker.call("log_likelihoods", prompts=prompts, starts=[1] * 100)
    assert [answer[0] for answer in answers] == prompts


def test_an_end_leaves_neither_processes_nor_files(start, tmp_path):
    worker = start()
    child = child_of(worker)
    worker.close()
    assert not worker.is_running
    assert is_gone(worker.pid) and is_gone(child)
    assert not (tmp_path / "shared").exists()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "die",
            r"ended during `log_likelihoods` \(SIGKILL, which often means that memory",
        ),
        ("rubbish", "sent 'INFO 12-01 loading the model', which is no answer"),
        ("raise", "failed at `log_likelihoods`: RuntimeError: out of cheese"),
        ("hang", "did not answer `log_likelihoods` within 2 s"),
    ],
)
def test_a_fault_is_a_sentence_and_the_end_of_the_process(start, kind, message):
    worker = start(timeout=2 if kind == "hang" else 30)
    child = child_of(worker, kind=kind, method="log_likelihoods")
    with pytest.raises(WorkerError, match=message) as error:
        worker.call("log_likelihoods", prompts=[[1]], starts=[1])
    assert not worker.is_running
    assert is_gone(worker.pid) and is_gone(child)
    log = Path(str(error.value).rpartition("Its log is ")[2])
    assert log.exists()
    log.unlink()


def test_a_call_that_makes_no_sense_does_no_harm(start):
    worker = start()
    with pytest.raises(EvaluationError, match="refused `shutdown`: there is no method"):
        worker.call("shutdown")
    assert worker.call("check", arguments={})["version"] == "1"


def test_an_interrupt_ends_the_process(start):
    worker = start()
    child = child_of(worker, kind="hang", method="log_likelihoods")
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        with pytest.raises(KeyboardInterrupt):
            worker.call("log_likelihoods", prompts=[[1]], starts=[1])
    finally:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    assert not worker.is_running and is_gone(child)


DRIVER = """
import json, sys
from paretomerge.evaluate.vllm.process import Worker
worker = Worker([sys.executable, sys.argv[1], sys.argv[2], "echo"], 60)
fault = {"kind": "hang", "method": "log_likelihoods"}
child = worker.call("start", model="m", arguments={"fault": fault})["child"]
print(json.dumps([worker.pid, child]), flush=True)
if sys.argv[3] == "busy":
    worker.call("log_likelihoods", prompts=[[1]], starts=[1])
sys.stdin.read()
"""


@pytest.mark.usefixtures("hears_ctrl_c")
@pytest.mark.parametrize(
    ("end", "state"),
    [
        (None, "idle"),
        (signal.SIGINT, "busy"),
        (signal.SIGTERM, "busy"),
        (signal.SIGKILL, "busy"),
        (signal.SIGKILL, "idle"),
    ],
)
def test_nothing_is_left_when_the_driver_ends(tmp_path, end, state):
    shared = tmp_path / "shared"
    shared.mkdir()
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(FILE), str(shared), state],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "TMPDIR": str(tmp_path)},
        text=True,
    )
    with driver:
        pids = json.loads(driver.stdout.readline())
        if end is None:
            driver.stdin.close()
        else:
            driver.send_signal(end)
        driver.wait(30)
        assert all(is_gone(pid) for pid in pids)
    assert not shared.exists()


def test_an_interpreter_that_cannot_run(tmp_path):
    with pytest.raises(
        EvaluationError, match=r"cannot run .*nowhere: No such file.*pip"
    ):
        Worker([str(tmp_path / "nowhere")], 5)


def test_where_the_interpreter_is(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    # The link, and not what it points to.
    expected = str(tmp_path / "bin" / "python")
    assert find_interpreter("bin/python", tmp_path) == expected
    assert find_interpreter("./bin/python", tmp_path) == expected
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_interpreter("~/bin/python", Path("elsewhere")) == expected
    assert find_interpreter("sh", tmp_path) == shutil.which("sh")
