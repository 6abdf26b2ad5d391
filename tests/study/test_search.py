import os
import signal
import sqlite3
import subprocess
import sys
import time
import warnings
from dataclasses import replace

import optuna
import pytest
import sqlalchemy.exc
import torch
from rich.console import Console

from paretomerge.checkpoint.reader import Checkpoint
from paretomerge.cli.progress import Progress, tally, volume_text
from paretomerge.errors import ConfigError, StudyError
from paretomerge.evaluate.evaluator import Objective, Score
from paretomerge.evaluate.function import FunctionEvaluator
from paretomerge.evaluate.measures import Constraint
from paretomerge.record.record import Header, Record
from paretomerge.record.trial import count_evaluated
from paretomerge.search.mmmo.sampler import MMMOSampler
from paretomerge.space.sources import named_sources
from paretomerge.space.weights.layout import Granularity
from paretomerge.space.weights.space import WeightSearchSpace
from paretomerge.study.agenda import WarmStart
from paretomerge.study.event import HeldOutEvent
from paretomerge.study.goals import Goals
from paretomerge.study.placement import Placement
from paretomerge.study.search import Search


def norms(model, tokenizer):
    """Two objectives that pull apart: how far two tensors are from zero, one up and one down."""
    state = model.state_dict()
    return {
        "up": Score(
            state["model.layers.0.mlp.up_proj.weight"].float().norm().item(), 0.001
        ),
        "down": Score(
            state["model.layers.0.mlp.up_proj.weight"].float().sum().item(),
            0.001,
            2,
            (1.0, 0.0),
        ),
    }


def make(
    pico,
    folder,
    function=norms,
    sampler=None,
    constraints=(),
    warm_start=WarmStart,
    **more,
) -> Search:
    sources = named_sources([str(pico / e) for e in ("ada", "bob", "cyd")])
    space = WeightSearchSpace(
        str(pico / "base"), sources, Checkpoint(str(pico / "base")).architecture
    )
    sampler = sampler or MMMOSampler(
        seed=0, space=space.distributions, conditions=space.conditions, n_startup=9
    )
    objectives = (Objective("f/up"), Objective("f/down", maximise=False))
    goals = Goals(
        FunctionEvaluator("f", function),
        objectives,
        tuple(constraints),
        FunctionEvaluator("w", lambda m, t: 1.0),
    )
    return Search(folder, space, goals, sampler, warm_start=warm_start, **more)


def told(study: Search) -> list:
    return [(t.number, dict(t.params), t.scores, t.label) for t in study.trials()]


def test_starts_with_what_is_known_and_ends_with_a_front(pico, tmp_path):
    study = make(pico, tmp_path)
    events = []
    study.run(11, events.append)
    trials = study.trials()
    assert [t.label for t in trials[:4]] == ["ada", "bob", "cyd", "uniform soup"]
    assert [t.number for t in trials] == list(range(11)) and not any(
        t.failure for t in trials
    )
    assert {"ask", "merge", "evaluate", "record"} <= set(events[-1].seconds)
    volumes = [
        e.hypervolume for e in events[2:]
    ]  # the reference stands once the sources are scored
    assert volumes == sorted(volumes)
    front = study.front()
    for trial in trials:
        better = [
            f for f in front if f.scores["f/up"].value >= trial.scores["f/up"].value
        ]
        assert any(
            f.scores["f/down"].value <= trial.scores["f/down"].value for f in better
        )


def test_resuming_goes_on_as_if_never_stopped(pico, tmp_path):
    whole = make(pico, tmp_path / "whole")
    whole.run(12)
    for n in (2, 5, 10, 12):
        make(pico, tmp_path / "parts").run(n)
    assert told(make(pico, tmp_path / "parts")) == told(whole)


def test_optuna_reads_the_record(pico, tmp_path):
    make(pico, tmp_path).run(4)
    loaded = optuna.load_study(
        study_name="paretomerge", storage=f"sqlite:///{tmp_path}/study.db"
    )
    assert (
        len(loaded.trials) == 4
        and loaded.trials[1].values[1]
        == -loaded.trials[1].user_attrs["scores"]["f/down"][0]
    )
    assert loaded.trials[0].user_attrs["stderr"] == [0.001, 0.001]


KILLED = """
import sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from tests.study.test_search import make, norms
def slow(model, tokenizer):
    time.sleep(0.15)
    return norms(model, tokenizer)
make(Path({pico!r}), {folder!r}, slow).run(10, lambda event: print(event.done, flush=True))
"""


def test_kill_9_loses_no_finished_trial(pico, tmp_path):
    from tests.conftest import REPOSITORY

    code = KILLED.format(
        root=str(REPOSITORY), pico=str(pico), folder=str(tmp_path / "killed")
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == "3":
            break
    time.sleep(0.1)  # in the middle of the next one
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    kept = make(pico, tmp_path / "killed")
    # This process may hear of the third late.
    assert 3 <= len(kept.trials()) < 10
    kept.run(11)
    whole = make(pico, tmp_path / "whole")
    whole.run(11)
    assert told(kept) == told(whole)


def test_a_failing_candidate_is_a_failed_trial_with_its_reason(pico, tmp_path):
    calls = []

    def sometimes(model, tokenizer):
        calls.append(1)
        if len(calls) in (3, 10):
            raise ValueError("no luck")
        return norms(model, tokenizer)

    study = make(pico, tmp_path, sometimes)
    study.run(11)
    assert [t.number for t in study.trials() if t.failure] == [2, 9]
    assert "no luck" in study.trials()[2].failure
    assert all(not t.failure for t in study.front())
    assert [t.failure for t in make(pico, tmp_path).trials()] == [
        t.failure for t in study.trials()
    ]


def test_ten_failures_in_a_row_stop_the_search_with_the_cause(pico, tmp_path):
    def never(model, tokenizer):
        raise ValueError("broken task")

    with pytest.raises(StudyError, match=r"last 10 trials failed.*broken task"):
        make(pico, tmp_path, never).run(20)


def test_a_number_that_is_not_finite_is_a_failure(pico, tmp_path):
    study = make(pico, tmp_path, lambda m, t: {"up": float("nan"), "down": 1.0})
    with pytest.raises(StudyError, match="finite"):
        study.run(10)


class Stubborn(optuna.samplers.RandomSampler):
    """Proposes the middle of every range, again and again."""

    def sample_independent(self, study, trial, name, distribution):
        return 0.5 if hasattr(distribution, "low") else distribution.choices[0]


def test_the_same_recipe_is_not_scored_twice_and_that_shows(pico, tmp_path):
    calls = []

    def counted(model, tokenizer):
        calls.append(1)
        return norms(model, tokenizer)

    begun = make(pico, tmp_path, counted)
    n = len(begun.space.baselines())
    study = make(pico, tmp_path, counted, sampler=Stubborn(seed=0))
    told = study.run(n + 3)
    again = [t for t in study.trials() if t.same_as is not None]
    assert (
        len(calls)
        == count_evaluated(study.trials())
        == len(study.trials()) - len(again)
        < n + 3
    )
    assert (
        told.endswith("the last 100 proposals were merges that had been scored")
        and len(again) >= 100
    )
    assert make(pico, tmp_path, counted, sampler=Stubborn(seed=0)).run(
        n + 3
    ) == told and len(study.trials()) == len(calls) + len(again)
    assert all(t.scores == study.trials()[t.same_as].scores for t in again)
    assert f"{len(again)} reused" in tally(study.trials())


def test_held_out_scores_are_kept_and_watched_ones_added(pico, tmp_path):
    study = make(pico, tmp_path)
    study.run(3)
    seen = []
    study.hold_out(study.trials()[:2], seen.append)
    study.hold_out(study.trials(), seen.append, watched=True)
    study.hold_out(study.trials(), seen.append, watched=True)
    assert [t.number for t in seen] == [0, 1, 0, 1, 2]
    assert set(make(pico, tmp_path).trials()[2].held_out) == {"f/up", "f/down", "w"}
    assert study.results().score_names == ["f/up", "f/down", "w"]


def test_what_is_shown_as_held_out_was_measured_there(pico, tmp_path, capsys):
    study = make(
        pico,
        tmp_path,
        lambda model, tokenizer, split: {
            "up": 0.25 if split == "search" else 0.75,
            "down": 0.0,
        },
    )
    study.run(1)
    with Progress(study.results(), Console(width=120)) as progress:
        scored = []
        study.hold_out(study.trials(), scored.append)
        progress.held_out(HeldOutEvent(scored[0], done=1, total=1))
    assert "0.750" in capsys.readouterr().out


def test_trials_of_another_question_are_refused(pico, tmp_path):
    make(pico, tmp_path, identity={"seed": 0, "space": [1, 2]}).run(1)
    make(pico, tmp_path, identity={"space": [1, 2], "seed": 0})
    with pytest.raises(StudyError, match="space changed since"):
        make(pico, tmp_path, identity={"seed": 0, "space": [1, 3]})


def test_a_record_without_trials_begins_anew(pico, tmp_path):
    make(pico, tmp_path, identity={"space": [1, 2]}).record.set_note(
        "root", "elsewhere"
    )
    study = make(pico, tmp_path, identity={"space": [1, 3]})
    assert (
        study.record.note("identity") == {"space": [1, 3]}
        and study.record.note("root") is None
    )
    header = Header(study.goals.objectives[:1], (), {"objectives": 1})
    one = Record.begin(
        study.record.storage, header
    )  # another number of objectives, too
    assert len(one._study.directions) == 1
    make(pico, tmp_path, identity={"space": [1, 3]}).run(1)
    with pytest.raises(StudyError, match="another `study_name` where `storage` is set"):
        make(pico, tmp_path, identity={"space": [1, 2]})


def test_without_an_identity_the_question_is_compared(pico, tmp_path):
    make(pico, tmp_path).run(1)
    make(pico, tmp_path)
    with pytest.raises(StudyError, match="constraints changed since"):
        make(pico, tmp_path, constraints=[Constraint("f/up", at_least=0)])
    study = make(pico, tmp_path)
    narrow = replace(study.space, weight=Granularity((0.0, 1.0)))
    with pytest.raises(StudyError, match="distributions changed since"):
        Search(tmp_path, narrow, study.goals, study.sampler)
    renamed = replace(
        study.space,
        sources={
            "ada": str(pico / "cyd"),
            "bob": str(pico / "bob"),
            "cyd": str(pico / "ada"),
        },
    )
    with pytest.raises(
        StudyError, match="holds trials of another study: sources changed since"
    ):
        Search(tmp_path, renamed, study.goals, study.sampler)


def test_a_device_that_is_not_there_costs_no_trial(pico, tmp_path):
    study = make(pico, tmp_path, placement=Placement(device="tpu"))
    with pytest.raises(
        ConfigError,
        match="device: expected cpu, cuda or cuda:N with such a GPU in this machine, got 'tpu'",
    ):
        study.run(2)
    assert not study.trials()


def test_a_score_beyond_all_measure_stops_nothing(pico, tmp_path):
    """Of a perplexity, say: the square of the value is infinite."""

    def wild(model, tokenizer):
        scores = norms(model, tokenizer)
        return (
            scores | {"down": Score(1e200)}
            if scores["up"].value > scores["down"].value
            else scores
        )

    study = make(pico, tmp_path, wild)
    study.run(12)
    assert len(study.trials()) == 12 and any(
        t.scores["f/down"].value == 1e200 for t in study.trials()
    )
    assert volume_text(1e200) == "1.00e+200" and volume_text(12.5) == "12.5000"


def test_a_broken_record_is_told(pico, tmp_path):
    (tmp_path / "study.db").write_bytes(
        b"this is no database, not even a little one" * 100
    )
    with pytest.raises(StudyError, match="move it away"):
        make(pico, tmp_path)


@pytest.fixture
def failing_writes(monkeypatch):
    """Makes so many attempts to write a trial fail, before or after it is written."""
    attempts = []

    def begin(study, n, message="database or disk is full", written=False):
        database = study.record._database
        write = database.create_new_trial

        def create(*arguments):
            attempts.append(1)
            if len(attempts) > n:
                return write(*arguments)
            if written:
                write(*arguments)
            raise sqlalchemy.exc.OperationalError(
                "insert", {}, sqlite3.OperationalError(message)
            )

        monkeypatch.setattr(database, "create_new_trial", create)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        return attempts

    return begin


def test_a_full_disk_is_told_and_finished_trials_stay(
    pico, tmp_path, monkeypatch, failing_writes
):
    study = make(pico, tmp_path)
    study.run(2)
    failing_writes(study, 10**6)
    monkeypatch.setattr("paretomerge.record.storage._PATIENCE", 0)
    with pytest.raises(StudyError, match="Free some disk space"):
        study.run(3)
    assert len(make(pico, tmp_path).trials()) == 2


@pytest.mark.parametrize("written", [False, True])
def test_a_database_that_is_away_for_a_while_is_waited_for(
    pico, tmp_path, failing_writes, caplog, written
):
    study = make(pico, tmp_path)
    study.run(2)
    attempts = failing_writes(study, 3 if not written else 1, written=written)
    study.run(4)
    trials = make(pico, tmp_path).trials()
    # None is lost, and none is counted twice where only the answer was lost.
    assert [trial.number for trial in trials] == [0, 1, 2, 3]
    assert len(attempts) == (5 if not written else 2)
    assert "Trying again for up to 10 minutes" in caplog.text
    whole = make(pico, tmp_path / "whole")
    whole.run(4)
    assert told(whole) == told(study)


def test_an_error_that_does_not_pass_is_not_waited_for(pico, tmp_path, monkeypatch):
    study = make(pico, tmp_path)
    study.run(2)

    def broken(*_):
        raise sqlalchemy.exc.DatabaseError(
            "insert", {}, sqlite3.DatabaseError("database disk image is malformed")
        )

    monkeypatch.setattr(study.record._database, "create_new_trial", broken)
    with pytest.raises(StudyError, match="malformed"):
        study.run(3)


@pytest.mark.parametrize(
    "name", ["RandomSampler", "NSGAIISampler", "TPESampler", "QMCSampler"]
)
def test_any_optuna_sampler_works_and_resumes(pico, tmp_path, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = getattr(optuna.samplers, name)(seed=0)
    study = make(pico, tmp_path, sampler=sampler)
    study.run(10)
    make(pico, tmp_path, sampler=optuna.samplers.RandomSampler(seed=0)).run(12)
    make(pico, tmp_path, sampler=optuna.samplers.RandomSampler(seed=0)).run(13)
    assert (
        len({str(t.params) for t in study.trials()}) == 13
    )  # a sampler that is seeded alike again repeats nothing


def test_the_live_model_is_in_the_dtype_that_will_be_written(pico, tmp_path):
    study = make(pico, tmp_path, placement=Placement("float32"))
    assert study.first_level.model.model.dtype == torch.float32
    study.run(1)
    assert study.recipe(study.trials()[0]).dtype == "float32"


@pytest.mark.parametrize("terminal", [False, True])
def test_what_a_failure_says_is_shown_as_it_is(pico, tmp_path, capsys, terminal):
    """Square brackets are no markup, colons no emoji."""

    told = "[/a] [enforce fail] :key:"
    study = make(pico, tmp_path)
    with Progress(
        study.results(), Console(width=300, force_terminal=terminal)
    ) as progress:
        study.run(
            1,
            lambda event: progress.trial(
                replace(event, trial=replace(event.trial, label="", failure=told))
            ),
        )
    assert told in capsys.readouterr().out


def test_progress_on_terminals_and_elsewhere(pico, tmp_path, capsys):
    plain, terminal = Console(width=120), Console(width=120, force_terminal=True)
    with Progress(make(pico, tmp_path / "a").results(), plain) as progress:
        make(pico, tmp_path / "a").run(2, progress.trial)
    lines = capsys.readouterr().out.splitlines()
    assert (
        len(lines) == 2
        and "1/2" in lines[0]
        and "f/up" in lines[0]
        and "ada" in lines[0]
    )
    study = make(pico, tmp_path / "b")
    with Progress(study.results(), terminal) as progress:
        study.run(3, progress.trial)
    shown = capsys.readouterr().out
    assert (
        "3/3 trials" in shown and "mean" not in shown
    )  # one of its objectives is minimised
    with Progress(study.results(), plain, quiet=True) as progress:
        study.run(4, progress.trial)
    assert capsys.readouterr().out == ""


def test_two_processes_do_not_search_in_one_folder(pico, tmp_path):
    first, second = make(pico, tmp_path / "s"), make(pico, tmp_path / "s")

    def meanwhile(event):
        with pytest.raises(StudyError, match="Another process is already searching in"):
            second.run(6)

    first.run(4, meanwhile)
    assert len(second.trials()) == 4
    second.run(5)
    assert len(first.trials()) == 5


def test_a_sampler_is_told_what_the_objectives_are_called(pico, tmp_path):
    class Curious(optuna.samplers.RandomSampler):
        def after_trial(self, study, *rest):
            assert study.metric_names == ["f/up", "f/down"]

    make(pico, tmp_path / "s", sampler=Curious(seed=0)).run(4)


def test_a_record_outlives_settings_that_nobody_sets(pico, tmp_path):
    """A later version has more of them; what is set counts as ever."""
    make(pico, tmp_path, identity={"space": {"groups": 1}, "seed": 0}).run(1)
    make(
        pico,
        tmp_path,
        identity={"space": {"groups": 1, "new": None}, "seed": 0, "newer": None},
    )
    with pytest.raises(StudyError, match="space changed"):
        make(pico, tmp_path, identity={"space": {"groups": 1, "new": 2}, "seed": 0})


def test_the_hypervolume_of_many_objectives_is_no_row_of_zeros():
    assert [volume_text(v) for v in (0.0, 0.5, 0.001, 8e-12)] == [
        "0.0000",
        "0.5000",
        "0.0010",
        "8.00e-12",
    ]
