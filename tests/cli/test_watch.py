"""Following a search: `status --watch`, `dashboard` and `search --log-json`."""

import io
import json
import subprocess
import sys
import threading
import time
import urllib.request
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
from filelock import FileLock
from rich.console import Console

import paretomerge as pm
from paretomerge.cli import status
from paretomerge.cli.dashboard import make_server
from paretomerge.cli.trial_log import TrialLog
from paretomerge.errors import ConfigError, StudyError
from paretomerge.record.folder import LOCK_FILE, is_searched, make_folder
from tests.cli.test_cli import ENVIRONMENT, paretomerge
from tests.conftest import REPOSITORY
from tests.study.test_build import write

# It imports parts of torch that warn of their own future.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import optuna_dashboard  # noqa: F401

SCORES = """
from paretomerge.evaluate.evaluator import Score

def up(model, tokenizer):
    weight = model.state_dict()["model.layers.0.mlp.up_proj.weight"].float()
    return Score(min(float(weight.norm()) / 10, 1), 0.01, 40)

def loss(model, tokenizer):
    weight = model.state_dict()["model.layers.0.mlp.up_proj.weight"].float()
    return float(weight.sum())
"""


@pytest.fixture
def study_file(tmp_path, pico):
    """A study of a score and a loss; six trials."""
    file = write(
        tmp_path,
        pico,
        objectives=[
            {"function": "watched_scores:up"},
            {"function": "watched_scores:loss", "direction": "minimize"},
        ],
        sampler="random",
        trials=6,
    )
    (tmp_path / "watched_scores.py").write_text(SCORES)
    return file


@pytest.fixture
def searched(study_file):
    paretomerge("search", study_file)
    return study_file


def shown(study, width=100):
    """What the view shows at its end."""
    text = io.StringIO()
    console = Console(
        file=text, width=width, force_terminal=True, markup=False, emoji=False
    )
    status.watch(study, console, 0.01)
    return text.getvalue()


@contextmanager
def locked(folder):
    """Another process that searches in the folder."""
    make_folder(folder)
    code = (
        "import sys, filelock\n"
        "with filelock.FileLock(sys.argv[1]):\n    print('held', flush=True)\n    input()"
    )
    command = [sys.executable, "-c", code, str(folder / LOCK_FILE)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    try:
        yield
    finally:
        process.communicate("\n")


def test_whether_a_folder_is_searched(tmp_path):
    assert not is_searched(tmp_path)
    # Looking leaves nothing behind.
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path):
        assert is_searched(tmp_path)
    assert not is_searched(tmp_path)
    # A search can begin after any look.
    FileLock(tmp_path / LOCK_FILE, timeout=0).acquire().lock.release()


def test_the_view_of_a_finished_search_is_shown_once(searched):
    text = shown(pm.load_study(searched))
    for part in ("6 of 6 trials, 0 failed", "hypervolume", "latest trials", "front:"):
        assert part in text
    assert "finished 6 trials" in text and "ada" in text
    # A narrow terminal keeps the numbers whole.
    trial = pm.load_study(searched).get_trials()[-1]
    assert trial.scores["loss"].text in shown(pm.load_study(searched), 40)


def test_the_view_waits_for_a_search_and_ends_with_it(study_file, monkeypatch):
    study = pm.load_study(study_file)
    views = status._views(study, 0.01)
    assert next(views).state == "no search runs in this folder"
    with locked(study.folder):
        assert "no trial has finished yet" in next(views).state
        assert next(views).results is None
    # The search was stopped before its first trial.
    last = list(views)
    assert len(last) == 1 and not last[0].is_searched


def test_the_view_follows_a_search(study_file):
    study = pm.load_study(study_file)
    views = status._views(study, 0.01)
    next(views)
    study.optimize(n_trials=2, show_progress_bar=False, held_out=False)
    with locked(study.folder):
        view = next(views)
        assert view.state == "searching" and view.results.evaluated == 2
        # Seen between two looks.
        assert view.seconds_since is not None
        assert "a trial, about" in view._speed(view.results)
    (last,) = list(views)
    assert "finished 2 trials" in last.state


def test_elsewhere_a_summary_is_printed_when_it_changes(searched):
    lines = paretomerge("status", searched, "--watch").stdout.splitlines()
    assert lines[0].startswith("6 of 6 trials, 0 failed, ")
    assert lines[-1] == "latest run: finished 6 trials" and len(lines) == 2


def test_ctrl_c_leaves_the_view_and_is_no_error(study_file, monkeypatch):
    def interrupted(study, console, every):
        raise KeyboardInterrupt

    monkeypatch.setattr(status, "watch", interrupted)
    assert paretomerge("status", study_file, "--watch").returncode == 0


def test_curves_are_drawn_from_the_least_to_the_greatest():
    assert status.sparkline([1, 2, 3, 8], 10) == "▁▂▃█"
    assert status.sparkline([5.0] * 4, 10) == status.sparkline([], 10) == ""
    long = status.sparkline(range(2000), 40)
    assert len(long) == 40 and long[-1] == "█"


def get(server, path):
    address = f"http://127.0.0.1:{server.server_port}{path}"
    with urllib.request.urlopen(address, timeout=20) as answer:
        return answer.read().decode()


@contextmanager
def served(study):
    with make_server(study, 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def test_the_dashboard_shows_names_and_directions_of_the_user(searched):
    study = pm.load_study(searched)
    with served(study) as server:
        assert server.server_address[0] == "127.0.0.1"
        assert "<title>Optuna Dashboard" in get(server, "/dashboard")
        (summary,) = json.loads(get(server, "/api/studies"))["study_summaries"]
        detail = json.loads(get(server, f"/api/studies/{summary['study_id']}"))
    assert summary["directions"] == ["maximize", "minimize"]
    assert detail["objective_names"] == ["up", "loss"]
    trials = study.get_trials()
    assert len(detail["trials"]) == len(trials) == 6
    for theirs, trial in zip(detail["trials"], trials, strict=True):
        values = [trial.scores["up"].value, trial.scores["loss"].value]
        assert theirs["values"] == pytest.approx(values)
        names = {parameter["name"] for parameter in theirs["params"]}
        assert names == set(trial.params)
    labels = {
        entry["key"]: entry["value"] for entry in detail["trials"][0]["user_attrs"]
    }
    assert labels["label"] == "ada" and "recipe" not in labels


def test_nothing_that_is_clicked_in_the_dashboard_changes_the_study(searched):
    study = pm.load_study(searched)
    with served(study) as server:
        address = f"http://127.0.0.1:{server.server_port}/api/studies/0"
        request = urllib.request.Request(
            address,
            method="DELETE",
            data=b"{}",
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=20) as answer:
            assert answer.status == 204
    assert len(study.get_trials()) == 6


def test_the_dashboard_follows_the_search(study_file, monkeypatch):
    monkeypatch.setattr("paretomerge.cli.dashboard._EVERY", 0.0)
    study = pm.load_study(study_file)
    study.optimize(n_trials=2, show_progress_bar=False, held_out=False)
    with make_server(pm.load_study(study_file), 0) as server:
        following = server.get_app()
        study.optimize(n_trials=2, show_progress_bar=False, held_out=False)
        time.sleep(0.01)
        following._look()
        assert following._copy.storage.get_n_trials(0) == 4


def test_the_dashboard_says_what_is_missing(study_file, searched, monkeypatch):
    study = pm.load_study(searched)
    with make_server(study, 0) as server:
        taken = server.server_port
        with pytest.raises(ConfigError, match=f"--port: {taken} cannot be used"):
            make_server(study, taken)
    elsewhere = pm.load_study(searched, ["out=elsewhere"])
    with pytest.raises(StudyError, match="Run the search first"):
        make_server(elsewhere, 0)
    monkeypatch.setitem(sys.modules, "optuna_dashboard", None)
    done = paretomerge("dashboard", searched, ok=False)
    assert done.returncode == 1
    assert "pip install 'paretomerge[dashboard]'" in done.stderr


@pytest.mark.usefixtures("hears_ctrl_c")
def test_the_dashboard_ends_with_ctrl_c(searched):
    command = [sys.executable, "-u", "-m", "paretomerge", "dashboard", str(searched)]
    command += ["--port", "0"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env=ENVIRONMENT,
    )
    assert "Open http://127.0.0.1:" in process.stdout.readline()
    process.send_signal(2)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0 and errors == ""


def test_the_log_has_one_object_a_line(study_file, tmp_path):
    log = tmp_path / "logs" / "trials.jsonl"
    paretomerge("search", study_file, "--trials", "3", "--log-json", log)
    paretomerge("search", study_file, "--log-json", log)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    trials = [line for line in lines if line["event"] == "trial"]
    recorded = pm.load_study(study_file).get_trials()
    # The second search has added to what the first wrote.
    assert [line["trial"] for line in trials] == list(range(6))
    volumes = [line["hypervolume"] for line in trials[2:]]
    assert volumes == sorted(volumes)
    for line, trial in zip(trials, recorded, strict=True):
        assert line["label"] == trial.label and line["failure"] is None
        assert line["params"] == trial.params
        score = trial.scores["loss"]
        assert line["scores"]["loss"] == {"value": score.value, "stderr": 0, "n": 1}
        assert set(line["seconds"]) == {"ask", "merge", "evaluate", "record"}
        assert line["total"] in (3, 6) and line["done"] == line["trial"] + 1
    assert [line["reason"] for line in lines if line["event"] == "end"] == [
        "finished 3 trials",
        "finished 6 trials",
    ]
    held_out = [line for line in lines if line["event"] == "held_out"]
    assert held_out and all("loss" in line["scores"] for line in held_out)
    assert all(line["time"].endswith("Z") for line in lines)


def test_a_failure_is_in_the_log(study_file, tmp_path):
    (tmp_path / "watched_scores.py").write_text(
        SCORES.replace(
            "return float", "raise ValueError('no [luck]')\n    return float"
        )
    )
    log = tmp_path / "trials.jsonl"
    paretomerge("search", study_file, "--trials", "1", "--log-json", log, ok=False)
    (line, *_) = [json.loads(line) for line in log.read_text().splitlines()]
    assert "no [luck]" in line["failure"] and line["scores"] == {}


def test_a_log_that_cannot_be_written_is_an_error_before_anything_is_loaded(
    study_file, tmp_path
):
    done = paretomerge("search", study_file, "--log-json", tmp_path, ok=False)
    assert done.returncode == 1
    assert "--log-json" in done.stderr and "name another file" in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_log_on_a_full_disk_does_not_end_the_search(caplog):
    log = TrialLog(Path("/dev/full"))
    log.end("one")
    log.end("two")
    log.close()
    (message,) = caplog.messages
    assert "--log-json: /dev/full: cannot be written: No space left" in message
