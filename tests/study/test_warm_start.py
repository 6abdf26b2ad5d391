"""Starts and warm starts as a study.yaml asks for them, on the pico models."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
import yaml

from paretomerge.cli.progress import tally
from paretomerge.decide.pick import Choice, choose
from paretomerge.errors import ConfigError
from paretomerge.record.trial import count_evaluated
from paretomerge.report.html import write_report
from tests.conftest import REPOSITORY
from tests.studies import open_search

FUNCTIONS = """
import os, time

def up(model, tokenizer):
    time.sleep(float(os.environ.get("SLOW", 0)))
    with open(os.path.join(os.path.dirname(__file__), "calls"), "a") as calls:
        calls.write("x")
    return model.state_dict()["model.layers.0.mlp.up_proj.weight"].float().norm().item()

def down(model, tokenizer):
    return model.state_dict()["model.layers.1.mlp.up_proj.weight"].float().sum().item()
"""


def write(pico, folder, name="study", **changes):
    """A study.yaml over ada and bob, beside the functions that score them."""
    folder.mkdir(exist_ok=True)
    (folder / "norms_of_tensors.py").write_text(FUNCTIONS)
    data = {
        "base": str(pico / "base"),
        "models": [str(pico / "ada"), str(pico / "bob")],
        "space": {"methods": ["task_arithmetic", "ties"]},
        "objectives": [
            {"function": "norms_of_tensors:up"},
            {"function": "norms_of_tensors:down", "direction": "minimize"},
        ],
        "sampler": {"name": "RandomSampler"},
        "trials": 9,
    } | changes
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def calls(folder):
    return len((folder / "calls").read_text()) if (folder / "calls").exists() else 0


def run(path):
    study = open_search(path)
    study.run()
    return study


@pytest.fixture(scope="module")
def first(pico, tmp_path_factory):
    """A finished study of 9 trials; its front is held out. Do not search in it."""
    folder = tmp_path_factory.mktemp("first")
    study = run(write(pico, folder, "first"))
    study.hold_out(study.front())
    return folder


def told(study):
    return [
        (t.number, dict(t.params), t.scores, t.label, t.warm_start)
        for t in study.trials()
    ]


def test_trials_of_the_same_question_are_taken_over_and_not_evaluated(pico, first):
    before = calls(first)
    path = write(pico, first, "second", warm_start="runs/first", trials=3, seed=0)
    study = open_search(path)
    old = open_search(first / "first.yaml")
    assert study.run() == "finished 3 trials"
    assert calls(first) - before == 3
    trials = study.trials()
    assert (
        count_evaluated(trials) == 3
        and len(trials) == 12
        and tally(trials).endswith("9 taken over")
    )
    assert [t.label for t in trials[:2]] == ["ada", "bob"] and trials[
        0
    ].warm_start == "runs/first 0"
    by_warm = {t.warm_start: t for t in trials if t.warm_start}
    for t in old.trials():
        taken = by_warm[f"runs/first {t.number}"]
        assert taken.scores == t.scores and dict(taken.params) == pytest.approx(
            dict(t.params)
        )
        assert (taken.held_out or {}) == (t.held_out or {})
        assert taken.label == (t.label or f"warm: runs/first {t.number}")
    assert study.results().reference == old.results().reference
    assert {t.scores["up"].value for t in old.front()} - {
        t.scores["up"].value for t in study.front()
    } <= {t.scores["up"].value for t in old.trials()}
    choose(study.results(), Choice())
    report = write_report(study.results(), first / "r.html").read_text()
    on_front = [trial for trial in study.front() if trial.label.startswith("warm: ")]
    assert all(trial.label in report for trial in on_front)
    again = run(path)
    assert told(again) == told(study) and calls(first) - before == 3


def test_other_bounds_keep_what_lies_inside(pico, first):
    path = write(
        pico,
        first,
        "narrow",
        space={
            "methods": ["task_arithmetic", "ties"],
            "weight": {"bounds": [0.0, 1.0]},
        },
        trials=1,
    )
    path.write_text(path.read_text() + "warm_start: [first.yaml]\n")
    study = open_search(path)
    (note,) = study.warm_start.notes
    kept = len(study.warm_start.scored)
    assert (
        0 < kept < 9
        and f"{kept} of 9 trials taken over" in note
        and f"{9 - kept} lie outside the space" in note
    )
    study.run()
    assert all(
        0 <= value <= 1
        for t in study.trials()
        for name, value in t.params.items()
        if name.startswith("weight")
    )


def test_studies_of_several_names_share_a_database(pico, tmp_path):
    shared = {"storage": "sqlite:///both.db", "trials": 2}
    run(write(pico, tmp_path, "one", study_name="one", **shared))
    study = run(
        write(
            pico,
            tmp_path,
            "two",
            study_name="two",
            warm_start="one.yaml",
            **shared | {"trials": 1},
        )
    )
    assert [t.warm_start for t in study.trials() if t.warm_start] == [
        "one.yaml 0",
        "one.yaml 1",
    ] and len(study.trials()) == 3
    lost = open_search(write(pico, tmp_path, "three", warm_start="sqlite:///both.db"))
    with pytest.raises(
        ConfigError,
        match=r"both.db: there is no study named 'paretomerge'. It holds one, two. Name .* the "
        r"study.yaml",
    ):
        lost.run(1)
    write(pico, tmp_path, "gone", study_name="gone", **shared)
    lost = open_search(write(pico, tmp_path, "four", warm_start="gone.yaml"))
    with pytest.raises(
        ConfigError, match=r"both.db: there is no study named 'gone'. It holds one, two"
    ):
        lost.run(1)


def test_under_another_question_the_front_is_evaluated_again(pico, first):
    before = calls(first)
    path = write(
        pico, first, "other", warm_start="runs/first/study.db", trials=20, seed=1
    )
    study = open_search(path)
    front = {t.number for t in open_search(first / "first.yaml").front()}
    (note,) = study.warm_start.notes
    assert "seed changed since" in note and not study.warm_start.scored
    study.run()
    assert {int(label.split()[-1]) for label in study.warm_start.starts} == front
    assert calls(first) - before == count_evaluated(study.trials()) == 20
    labels = [t.label for t in study.trials()]
    fresh = [label for label in labels if label.startswith("warm: runs/first/study.db")]
    assert fresh and labels[2 : 2 + len(fresh)] == fresh  # right after the sources


def test_scores_serve_fewer_objectives_and_other_bounds_but_no_new_score(pico, first):
    before = calls(first)
    up = {"function": "norms_of_tensors:up"}
    one = write(
        pico,
        first,
        "one",
        objectives=[up],
        constraints=[up | {"at_least": 0}],
        warm_start="runs/first",
        trials=2,
    )
    study = run(one)
    study.hold_out(study.front())
    assert (
        len(study.trials()) == 11
        and set(study.trials()[0].scores) == {"up"}
        and study.results().score_names == ["up"]
    )
    assert len(study.front()) == 1 and calls(first) - before in (
        2,
        3,
    )  # the best may be new, then it was held out
    new = write(
        pico,
        first,
        "new",
        constraints=[{"sparsity": True, "at_least": -1}],
        warm_start=["runs/first", "runs/one"],
    )
    known = open_search(new).warm_start
    assert not known.scored and all("score 'sparsity'" in note for note in known.notes)
    assert "score 'down', score 'sparsity'" in known.notes[1]


@pytest.mark.parametrize(
    ("changes", "cure"),
    [
        ({"models": ["PICO/ada", "PICO/cyd"]}, "over other models"),
        ({"base": "PICO/cyd"}, "over another base"),
        (
            {"warm_start": "runs/frist"},
            "Name the folder, the study.db or the study.yaml",
        ),
        ({"warm_start": "absent.yaml"}, "no such file"),
        ({"starts": ["r.yml"]}, "r.yml"),
    ],
)
def test_what_cannot_be_used_is_refused_with_the_reason(pico, first, changes, cure):
    changes = yaml.safe_load(
        yaml.safe_dump({"warm_start": "runs/first"} | changes).replace(
            "PICO", str(pico)
        )
    )
    study = open_search(
        write(pico, first, "refused" + re.sub(r"\W", "", cure), **changes)
    )
    before = calls(first)
    with pytest.raises(ConfigError, match=cure):
        study.run()
    assert calls(first) == before and not study.trials()


def test_a_record_without_its_study_yaml_says_so(pico, first, tmp_path):
    from tests.study.test_search import make

    make(pico, tmp_path / "bare").run(1)
    study = open_search(write(pico, tmp_path, warm_start="bare"))
    with pytest.raises(ConfigError, match=r"warm_start: bare: .*study.yaml"):
        study.run()


RECIPE = """
merge_method: ties
base_model: {base}
models:
  - {{model: {pico}/bob, parameters: {{weight: {weight}, density: 0.5}}}}
  - {{model: {pico}/ada, parameters: {{weight: 0.25, density: 0.75}}}}
parameters: {{normalize: false}}
"""


def test_recipes_of_the_user_come_right_after_the_sources(pico, tmp_path):
    path = write(pico, tmp_path, starts=["mine.yml", "same.yml"], trials=4)
    for name in ("mine", "same"):
        (tmp_path / f"{name}.yml").write_text(
            RECIPE.format(base=pico / "base", pico=pico, weight=0.5)
        )
    study = run(path)
    assert [t.label for t in study.trials()] == [
        "ada",
        "bob",
        "mine.yml",
        "uniform soup",
    ]  # the second says the same again
    assert (
        study.trials()[2].params["density/ada"] == 0.75
        and study.trials()[2].params["weight/bob"] == 0.5
    )
    (tmp_path / "late.yml").write_text(
        RECIPE.format(base=pico / "base", pico=pico, weight=0.9)
    )
    later = run(
        write(pico, tmp_path, starts=["mine.yml", "late.yml"], trials=6)
    )  # starts may be added while a study goes on
    assert [t.label for t in later.trials()][4:] == [
        "late.yml",
        "task arithmetic 0.7",
    ]  # 0.5 of each is the soup of two


def test_every_bad_start_is_told_before_anything_is_merged(pico, tmp_path):
    (tmp_path / "far.yml").write_text(
        RECIPE.format(base=pico / "base", pico=pico, weight=7)
    )
    (tmp_path / "based.yml").write_text(
        RECIPE.format(base=pico / "cyd", pico=pico, weight=0.5)
    )
    (tmp_path / "torn.yml").write_text("merge_method: [")
    study = open_search(
        write(
            pico,
            tmp_path,
            starts=["far.yml", "based.yml", "torn.yml", "none.yml"],
            warm_start="nowhere",
        )
    )
    with pytest.raises(ConfigError) as error:
        study.run()
    message = str(error.value)
    assert "5 problems" in message and all(
        f"{name}.yml" in message for name in ("far", "based", "torn", "none")
    )
    assert "weight/bob" in message and "nowhere" in message and calls(tmp_path) == 0


@pytest.mark.slow
def test_kill_9_while_scores_are_taken_over_and_later(pico, first):
    """A study that is killed goes on to the trials of one that never was.

    Another process reads it all the while.
    """
    settings = {"warm_start": "runs/first", "trials": 6, "sampler": {"name": "mmmo"}}
    path = write(pico, first, "killed", **settings)
    beside = open_search(path)
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "SLOW": "0.3",
    }
    for enough in (
        lambda: len(beside.trials()) >= 3,
        lambda: count_evaluated(beside.trials()) >= 2,
    ):
        command = [
            sys.executable,
            "-m",
            "paretomerge.cli.main",
            "search",
            "--quiet",
            str(path),
        ]
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, env=environment, cwd=REPOSITORY
        )
        while not enough() and process.poll() is None:
            # Reading the record takes the processor that the search needs.
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert 2 <= count_evaluated(open_search(path).trials()) < 6
    assert told(run(path)) == told(run(write(pico, first, "whole", **settings)))


def test_the_command_line_says_what_was_known_and_why_it_ended(
    pico, first, monkeypatch
):
    from typer.testing import CliRunner

    from paretomerge.cli.main import app

    monkeypatch.setenv("COLUMNS", "160")
    constraint = {"function": "norms_of_tensors:up", "at_least": 0}
    path = write(
        pico,
        first,
        "told",
        warm_start="runs/first",
        budget={"trials": 2},
        trials=None,
        constraints=[constraint],
    )
    path.write_text(path.read_text().replace("trials: null\n", ""))
    found = CliRunner().invoke(app, ["search", str(path)], catch_exceptions=False)
    assert (
        "note: runs/first: 9 of 9 trials taken over with their scores, beside the budget"
        in found.stderr
    )
    assert (
        "finished 2 trials (0 failed, 9 taken over)" in found.stdout
        and "Pareto front" in found.stdout
    )
    told = CliRunner().invoke(app, ["status", str(path)]).stdout
    assert told.startswith("2 of 2 trials, 0 failed, 9 taken over, ") and told.endswith(
        "finished 2 trials\n"
    )
    more = CliRunner().invoke(app, ["search", "--trials", "3", str(path)]).stdout
    assert "   3/3  " in more and "   2/" not in more
    path.write_text(path.read_text().replace("at_least: 0", "at_least: 99"))
    refused = CliRunner().invoke(app, ["search", str(path)])
    assert "constraints changed since" in str(refused.exception)
