"""Constraints: scored with the others, told to the sampler in Optuna's way, kept in the record."""

import json
import warnings

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from paretomerge.cli.progress import Progress, tally
from paretomerge.decide.pick import Choice, choose
from paretomerge.errors import ConfigError
from paretomerge.evaluate.measures import Constraint
from paretomerge.pareto.front import nondominated
from paretomerge.report.html import write_report
from paretomerge.report.tables import rows, trials_table
from tests.study.test_search import make, told

numbers = st.floats(-1e6, 1e6)


@given(numbers, numbers)
def test_a_bound_is_kept_where_its_excess_is_not_above_zero(value, bound):
    assert (Constraint("a", at_least=bound).violation(value) <= 0) == (value >= bound)
    assert (Constraint("a", at_most=bound).violation(value) <= 0) == (value <= bound)


def median_bound(pico, folder):
    """A bound on f/up that some of ten trials keep and some break."""
    study = make(pico, folder)
    study.run(10)
    return sorted(t.scores["f/up"].value for t in study.trials())[5]


@pytest.fixture(scope="module")
def bound(pico, tmp_path_factory):
    return median_bound(pico, tmp_path_factory.mktemp("free"))


def test_infeasible_trials_are_never_on_the_front_nor_picked_but_shown(
    pico, tmp_path, bound, capsys
):
    study = make(pico, tmp_path, constraints=[Constraint("f/up", at_least=bound)])
    with Progress(study.results(), Console(width=200)) as progress:
        study.run(11, progress.trial)
    assert "infeasible: f/up at least" in capsys.readouterr().out
    trials = study.trials()
    broken = [t for t in trials if t.scores["f/up"].value < bound]
    assert 0 < len(broken) < 11 and [t.number for t in broken] == [
        t.number for t in trials if not t.feasible
    ]
    kept = [t for t in trials if t.feasible]
    mask = nondominated([t.values(study.goals.objectives) for t in kept])
    assert [t.number for t in study.front()] == [
        t.number for t, on in zip(kept, mask, strict=True) if on
    ]
    assert study.results().hypervolume(trials) == study.results().hypervolume(kept) >= 0
    assert choose(study.results(), Choice()).feasible
    with pytest.raises(ConfigError, match=r"breaks f/up at least .* \(by "):
        choose(study.results(), Choice(trial=broken[0].number))
    assert f"{len(broken)} infeasible" in tally(trials)
    assert (
        "Infeasible trials"
        in write_report(study.results(), tmp_path / "r.html").read_text()
    )
    assert json.loads(json.dumps(rows(trials)))[broken[0].number]["constraints"]
    console = Console(width=200, record=True)
    console.print(trials_table(study.results(), trials, "All"))
    assert "infeasible: f/up at least" in console.export_text()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = optuna.load_study(
            study_name="paretomerge", storage=f"sqlite:///{tmp_path}/study.db"
        )
    assert {t.number for t in loaded.best_trials} == {
        t.number for t in study.front()
    }  # Optuna reads the same


def test_a_resumed_study_knows_its_constraints(pico, tmp_path, bound):
    constraints = [
        Constraint("f/up", at_least=bound),
        Constraint("f/down", at_most=1e9),
    ]
    whole = make(pico, tmp_path / "whole", constraints=constraints)
    whole.run(10)
    for n in (2, 9, 10):
        make(pico, tmp_path / "parts", constraints=constraints).run(n)
    parts = make(pico, tmp_path / "parts", constraints=constraints)
    assert told(parts) == told(whole)
    assert [t.constraints for t in parts.trials()] == [
        t.constraints for t in whole.trials()
    ]
    assert set(whole.trials()[0].constraints) == {c.text for c in constraints}


@pytest.mark.parametrize("name", ["NSGAIISampler", "TPESampler"])
def test_samplers_see_in_memory_what_the_record_holds(pico, tmp_path, bound, name):
    seen = []

    class Watching(getattr(optuna.samplers, name)):
        def sample_relative(self, study, trial, space):
            seen.append(
                [
                    (t.constraints, t.user_attrs)
                    for t in study.get_trials(deepcopy=False)
                    if t.number != trial.number
                ]
            )
            return super().sample_relative(study, trial, space)

    study = make(
        pico,
        tmp_path,
        sampler=Watching(seed=0),
        constraints=[Constraint("f/up", at_least=bound)],
    )
    study.run(10)
    assert seen[-1] == [
        (t.constraints, t.user_attrs) for t in study.record.frozen_trials()[:-1]
    ]
    assert all(
        constraints and user["scores"]["f/down"][3] == "10"
        for constraints, user in seen[-1]
    )


def test_a_constraint_that_nothing_keeps(pico, tmp_path):
    study = make(pico, tmp_path, constraints=[Constraint("f/up", at_least=1e6)])
    study.run(11)
    assert (
        not study.front()
        and study.results().hypervolume(study.trials()) == 0
        and study.results().reference is not None
    )
    near = min(study.trials(), key=lambda t: -t.scores["f/up"].value)
    nearest = rf"The nearest, trial {near.number}, breaks f/up at least 1000000"
    with pytest.raises(
        ConfigError, match=rf"none of 11 trials keeps the constraints\. {nearest}"
    ):
        choose(study.results(), Choice())


def test_a_constraint_without_its_score_and_failures_among_constraints(pico, tmp_path):
    from paretomerge.errors import StudyError

    study = make(pico, tmp_path, constraints=[Constraint("g", at_least=0)])
    with pytest.raises(
        StudyError, match=r"last 10 trials failed.*no score is named 'g'"
    ):
        study.run(12)
    assert all(
        t.failure and not t.constraints and not t.feasible for t in study.trials()
    )
