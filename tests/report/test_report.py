import json

import pytest
from rich.console import Console

from paretomerge.decide.pick import Choice
from paretomerge.errors import ConfigError
from paretomerge.report.html import write_report
from paretomerge.report.tables import mean, rows, terminal_table
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
    assert told[0]["label"] == "ada" and told[0]["held_out"]["w"]["value"] == 1.0 and told[5]["held_out"] is None
    scores = study.trials[0].scores
    assert mean(study, scores) == pytest.approx((scores["f/up"].value + scores["f/down"].value) / 2)
    assert mean(study, {}) is None
    console = Console(width=120, record=True)
    console.print(terminal_table(study, study.trials, "All", marked=2))
    assert "→ cyd" in console.export_text()
