import json
from dataclasses import replace

import pytest
from rich.console import Console

from paretomerge.decide.pick import Choice
from paretomerge.errors import ConfigError
from paretomerge.evaluate.evaluator import Objective, Score
from paretomerge.record.record import Trial
from paretomerge.report.html import _scatter, write_report
from paretomerge.report.tables import best_first, rows, terminal_table
from paretomerge.study.goals import Goals
from tests.study.test_study import make


def test_report_and_tables(pico, tmp_path):
    study = make(pico, tmp_path)
    with pytest.raises(ConfigError, match="search"):
        write_report(study, tmp_path / "r.html")
    study.run(8)
    study.hold_out(study.trials[:3], watched=True)
    page = write_report(study, tmp_path / "r.html", Choice(trial=1)).read_text()
    assert "--trial 1" in page and "bob ← picked" in page and "<script src" not in page
    told = json.loads(json.dumps(rows(study.trials)))
    assert (
        told[0]["label"] == "ada"
        and told[0]["held_out"]["w"]["value"] == 1.0
        and told[5]["held_out"] is None
    )
    console = Console(width=120, record=True)
    console.print(terminal_table(study, study.trials, "All", marked=2))
    shown = console.export_text()
    assert (
        "→ cyd" in shown and "mean" not in shown and ">mean<" not in page
    )  # one of the objectives is minimised


def scored(study, *values):
    """One trial per row, an objective per number."""
    return [
        Trial(i, {}, {o.name: Score(v) for o, v in zip(study.objectives, row, strict=True)})
        for i, row in enumerate(values)
    ]


def test_the_best_are_the_best_in_the_objectives_own_directions_and_scales(pico, tmp_path):
    study = make(pico, tmp_path)  # f/up is maximised, f/down minimised
    trials = scored(study, (0.0, 900.0), (1.0, 0.0), (0.5, 100.0))
    assert [t.number for t in best_first(study, trials)] == [1, 2, 0]
    assert best_first(study, []) == [] and study.goals.mean(trials[0].scores) is None
    up = Goals(study.evaluator, (Objective("f/up"), Objective("f/down")))
    assert (
        up.mean(trials[0].scores) == 450.0
        and up.mean({"f/up": Score(1.0)}) is None
        and up.mean(None) is None
    )


def test_labels_are_no_markup(pico, tmp_path):
    study = make(pico, tmp_path)
    console = Console(width=120, record=True)
    console.print(
        terminal_table(
            study, [replace(t, label="./[a] [/b]") for t in scored(study, (0.0, 1.0))], "All"
        )
    )
    assert "./[a] [/b]" in console.export_text()


def test_a_narrow_terminal_shows_every_objective(pico, tmp_path):
    study = make(pico, tmp_path)
    study.objectives = tuple(Objective(f"skill_{i}") for i in range(6))
    known, unknown = scored(study, [-i / 7 for i in range(6)], [0.625] * 6)
    trials = [
        replace(known, held_out={o.name: Score(i / 9) for i, o in enumerate(study.objectives)}),
        unknown,
    ]
    shown = {}
    for width in (72, 120):
        console = Console(width=width, record=True)
        console.print(terminal_table(study, trials, "All"))
        shown[width] = console.export_text()
        assert max(map(len, shown[width].splitlines())) <= width and "…" not in shown[width]
        assert all(text in shown[width] for text in ("skill_5", "0.111", "0.556", "0.625"))
    assert "-0.143 0.111" in shown[120] and "in brackets" not in shown[120]
    assert (
        "-0.143" not in shown[72]
        and "(0.625)" in shown[72]
        and "in brackets those of the search items" in shown[72]
    )


@pytest.mark.parametrize("count", [1, 2, 4, 6])
def test_every_pair_of_objectives_has_a_panel_three_in_a_row(pico, tmp_path, count):
    study = make(pico, tmp_path)
    study.objectives = tuple(Objective(f"task {i}") for i in range(count))
    trials = scored(study, *(((k + i) / 10 for i in range(count)) for k in range(3)))
    figure = _scatter(study, trials, trials[2:], trials[2])
    panels = [axis for axis in figure.to_dict()["layout"] if axis.startswith("xaxis")]
    assert len(panels) == max(1, count * (count - 1) // 2)
    assert len({axis.domain for axis in figure.select_xaxes()}) <= 3
    low, high = figure.layout.yaxis.domain
    assert 300 < (high - low) * (figure.layout.height - 100) < 340
