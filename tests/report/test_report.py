import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from paretomerge.cli.progress import Progress
from paretomerge.decide.pick import Choice
from paretomerge.errors import ConfigError
from paretomerge.evaluate.evaluator import Objective, Score
from paretomerge.record.results import Results
from paretomerge.record.trial import Trial
from paretomerge.report.html import write_report
from paretomerge.report.plots import plot_front
from paretomerge.report.tables import best_first, rows, trials_table
from paretomerge.study.event import Event
from tests.study.test_search import make


def test_report_and_tables(pico, tmp_path):
    study = make(pico, tmp_path)
    with pytest.raises(ConfigError, match="search"):
        write_report(study.results(), tmp_path / "r.html")
    study.run(8)
    study.hold_out(study.trials()[:3], watched=True)
    page = write_report(
        study.results(), tmp_path / "r.html", Choice(trial=1)
    ).read_text()
    assert (
        "picked by its number, 1" in page
        and "bob ← picked" in page
        and "<script src" not in page
    )
    told = json.loads(json.dumps(rows(study.trials())))
    assert (
        told[0]["label"] == "ada"
        and told[0]["held_out"]["w"]["value"] == 1.0
        and told[5]["held_out"] is None
    )
    console = Console(width=120, record=True)
    console.print(trials_table(study.results(), study.trials(), "All", marked=2))
    shown = console.export_text()
    assert (
        "→ cyd" in shown and "mean" not in shown and ">mean<" not in page
    )  # one of the objectives is minimised


def scored(study, *values):
    """One trial per row, an objective per number."""
    return [
        Trial(
            i,
            {},
            {
                o.name: Score(v)
                for o, v in zip(study.goals.objectives, row, strict=True)
            },
        )
        for i, row in enumerate(values)
    ]


def test_the_best_are_the_best_in_the_objectives_own_directions_and_scales(
    pico, tmp_path
):
    study = make(pico, tmp_path)  # f/up is maximised, f/down minimised
    trials = scored(study, (0.0, 900.0), (1.0, 0.0), (0.5, 100.0))
    assert [t.number for t in best_first(study.results(), trials)] == [1, 2, 0]
    assert (
        best_first(study.results(), []) == []
        and study.results().mean(trials[0].scores) is None
    )
    up = Results((Objective("f/up"), Objective("f/down")), (), ())
    assert (
        up.mean({"f/up": Score(0.5, n=9), "f/down": Score(0.25, n=9)}) == 0.375
        and up.mean(trials[0].scores) is None  # no means over examples
        and up.mean({"f/up": Score(3.5, n=9), "f/down": Score(0.2, n=9)}) is None
        and up.mean({"f/up": Score(1.0)}) is None
        and up.mean(None) is None
    )


def test_labels_are_no_markup(pico, tmp_path):
    study = make(pico, tmp_path)
    trials = [replace(trial, label="./[a] [/b]") for trial in scored(study, (0.0, 1.0))]
    console = Console(width=120, record=True)
    console.print(trials_table(study.results(), trials, "All"))
    assert "./[a] [/b]" in console.export_text()


def results_of(objectives, rows):
    """Results with one trial per row, a number per objective."""
    trials = []
    for number, row in enumerate(rows):
        scores = {
            o.name: Score(value) for o, value in zip(objectives, row, strict=True)
        }
        trials.append(Trial(number, {}, scores))
    return Results(objectives, (), tuple(trials))


def test_a_narrow_terminal_shows_every_objective():
    objectives = tuple(Objective(f"skill_{i}") for i in range(6))
    results = results_of(objectives, [[-i / 7 for i in range(6)], [0.625] * 6])
    first, second = results.trials
    held_out = {o.name: Score(i / 9) for i, o in enumerate(objectives)}
    trials = [replace(first, held_out=held_out), second]
    shown = {}
    for width in (72, 120):
        console = Console(width=width, record=True)
        console.print(trials_table(results, trials, "All"))
        shown[width] = console.export_text()
        assert (
            max(map(len, shown[width].splitlines())) <= width
            and "…" not in shown[width]
        )
        assert all(
            text in shown[width] for text in ("skill_5", "0.111", "0.556", "0.625")
        )
    assert "-0.143 0.111" in shown[120] and "in brackets" not in shown[120]
    assert (
        "-0.143" not in shown[72]
        and "(0.625)" in shown[72]
        and "those of the search examples in brackets" in shown[72]
    )


@pytest.mark.parametrize("count", [1, 2, 4, 6])
def test_every_pair_of_objectives_has_a_panel_three_in_a_row(count):
    objectives = tuple(Objective(f"task {i}") for i in range(count))
    rows = [[(k + i) / 10 for i in range(count)] for k in range(3)]
    results = results_of(objectives, rows)
    figure = plot_front(results, results.trials[2])
    panels = [axis for axis in figure.to_dict()["layout"] if axis.startswith("xaxis")]
    assert len(panels) == max(1, count * (count - 1) // 2)
    assert len({axis.domain for axis in figure.select_xaxes()}) <= 3
    low, high = figure.layout.yaxis.domain
    assert 300 < (high - low) * (figure.layout.height - 100) < 340


SIX = ("order_sort", "reverse", "translate", "translate_reverse", "sparsity", "copy")


@pytest.mark.parametrize("width", [60, 80, 120])
def test_numbers_are_never_cut_off_on_a_narrow_terminal(width):
    values = (0.75, 0.5, 1.0, 0.125, -0.875, 0.25)
    scores = {name: Score(v, n=8) for name, v in zip(SIX, values, strict=True)}
    held_out = {name: Score(v / 2, n=8) for name, v in zip(SIX, values, strict=True)}
    trials = [Trial(0, {}, scores, label="ties at density 0.2", held_out=held_out)]
    trials.append(Trial(1, {}, scores | {"sparsity": Score(-1.0, n=8)}))
    results = Results(tuple(map(Objective, SIX)), (), tuple(trials))
    console = Console(width=width, record=True)
    console.print(trials_table(results, trials, "All"))
    shown = console.export_text()
    for number in ("0.375", "0.250", "0.500", "0.062", "-0.438", "0.125"):
        assert number in shown
    assert "…" not in shown and "-1.000" in shown


def test_a_live_table_never_cuts_numbers_off():
    values = (0.75, 0.5, 1.0, 0.125, -0.875, 0.25)
    scores = {name: Score(v, n=8) for name, v in zip(SIX, values, strict=True)}
    trial = Trial(0, {}, scores, label="ties at density 0.2")
    results = Results(tuple(map(Objective, SIX)), (), ())
    console = Console(width=80, record=True, force_terminal=True, file=io.StringIO())
    with Progress(results, console) as progress:
        progress.trial(Event(trial, 1, 9, 8.98765e-5, {"evaluate": 1.0}))
    shown = console.export_text()
    for number in ("0.750", "0.500", "1.000", "0.125", "-0.875", "0.250", "8.99e-05"):
        assert number in shown


def test_a_trial_is_one_short_line_in_a_notebook():
    score = Score.mean_of([1.0, 0.0] * 500)
    trial = Trial(3, {"weight/a": 0.5}, {"sort": score}, label="uniform soup")
    assert repr(trial) == "Trial(3, 'uniform soup', sort=0.500 ± 0.016)"
    assert len(repr(score)) < 60
    failed = Trial(4, {}, failure="x" * 5000)
    assert len(repr(failed)) < 120


def test_baselines_on_the_front_are_marked_and_empty_groups_left_out():
    objectives = (Objective("a"), Objective("b"))
    best = Trial(0, {}, {"a": Score(1.0), "b": Score(0.0)}, label="ada")
    worse = Trial(1, {}, {"a": Score(0.0), "b": Score(-1.0)}, label="bob")
    found = Trial(2, {}, {"a": Score(0.0), "b": Score(1.0)})
    figure = plot_front(Results(objectives, ("ada", "bob"), (best, worse, found)))
    shown = {trace.name: len(trace.x) for trace in figure.data}
    assert shown == {"baselines": 1, "front": 1, "front: baselines": 1}


def test_watched_tasks_have_columns_where_there_is_room():
    score = {"a": Score(0.5, n=8)}
    trial = Trial(0, {}, score, held_out=score | {"seen": Score(0.375, n=8)})
    results = Results((Objective("a"),), (), (trial,))
    for width, shown in ((100, True), (24, False)):
        console = Console(width=width, record=True)
        console.print(trials_table(results, [trial], "All"))
        text = console.export_text()
        assert ("0.375" in text) is shown
        assert ("1 watched task: in" in " ".join(text.split())) is not shown
