"""The tables in the documentation are those that the scripts print from the stored results."""

import pytest

from benchmarks import (
    asynchronous,
    candidate,
    dataflow,
    emr,
    extract_lora,
    family,
    kills,
    lineages,
    locks,
    long_picks,
    long_study,
    merge,
    pareto_families,
    peers,
    picks,
    racing,
    regmean_texts,
    scaling,
    search,
    smollm,
    smollm_composed,
    specialists,
    standings,
    suggest,
    systems,
    twin,
    vllm_backend,
    workers,
)
from benchmarks.reporting import append_entry, read_entries, rounded
from tests.conftest import REPOSITORY


def published():
    pages = [REPOSITORY / "README.md", *(REPOSITORY / "docs").rglob("*.md")]
    return "\n".join(page.read_text() for page in pages)


SCRIPTS = {
    "search": lambda: standings.results(search.measured_problems(), peers.names()),
    "ablation": lambda: standings.ablation(search.measured_problems()),
    "specialists": lambda: family.table(specialists.FAMILY),
    "lineages": lineages.table,
    "racing": lambda: racing.table(read_entries(racing.FILE)),
    "dataflow": lambda: dataflow.tables(read_entries(dataflow.FILE)),
    "long_study": lambda: long_study.tables(read_entries(long_study.FILE)),
    "long_picks": lambda: long_picks.table(read_entries(long_picks.FILE)),
    "emr": emr.tables,
    "extract_lora": extract_lora.table,
    "candidate": lambda: candidate.tables(read_entries(candidate.FILE)[-1]),
    "smollm": lambda: family.table(smollm.FAMILY),
    "smollm_composed": lambda: family.table(smollm_composed.FAMILY),
    "pareto_families": pareto_families.table,
    "picks": picks.tables,
    "regmean_texts": regmean_texts.table,
    "vllm": vllm_backend.tables,
    "scaling": scaling.tables,
    "asynchronous": asynchronous.table,
    "workers": workers.table,
    "suggest": suggest.table,
    "kills": kills.table,
    "locks": locks.table,
    "systems": systems.table,
    "twin": twin.tables,
    "merge": lambda: merge.report(read_entries(merge.FILE)),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_published_table_is_that_of_the_results(name):
    pages = published()
    tables = [block for block in SCRIPTS[name]().split("\n\n") if block.startswith("|")]
    assert tables
    for table in tables:
        assert table in pages


def test_the_published_plot_is_that_of_the_results():
    assert pareto_families.PLOT.read_text() == pareto_families.plot()


def test_result_files_hold_one_line_per_entry(tmp_path):
    file = tmp_path / "results" / "some.jsonl"
    append_entry(file, {"name": "a", "share": [1 / 3, 2], "deep": {"x": (1e-7 / 3,)}})
    with file.open("a") as lines:
        lines.write('{"name": "cut sh')
    append_entry(file, {"name": "b"})
    assert read_entries(file) == [
        {"name": "a", "share": [0.333333, 2], "deep": {"x": [3.33333e-08]}},
        {"name": "b"},
    ]
    assert read_entries(tmp_path / "nowhere.jsonl") == []
    assert rounded(True) is True and rounded(12345678) == 12345678
