"""The search benchmark: peers are repeatable, cells are resumed, tables say what was measured."""

import importlib.util
from dataclasses import replace

import numpy as np
import pytest
from botorch.acquisition.multi_objective import logei

from benchmarks import peers, search
from benchmarks.standings import Cell, ablation, results, row
from paretomerge import problems
from tests.conftest import REPOSITORY

needs_pymoo = (
    "needs pymoo, which only the benchmarks use: pip install 'paretomerge[bench]'"
)
FAST = [
    "random",
    "qmc",
    "nsga2",
    "nsga2 for 300",
    "tpe",
    "cma",
    "kinship",
    "evolver",
    "m2n2",
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(search, "RESULTS", tmp_path / "results")
    return search.RESULTS


# ----- peers


def _values(name, evaluations, problem="dtlz2-m2-d5", seed=3):
    meter = peers.run(name, problems.get(problem), seed, evaluations)
    assert (
        len(meter.seconds) == len(meter.observed) == evaluations
        and min(meter.seconds) >= 0
    )
    return meter.y


@pytest.mark.parametrize("name", [*FAST, "pymoo-nsga2", "pymoo-sms-emoa"])
def test_a_peer_is_seeded_and_does_not_know_its_budget(name):
    if name.startswith("pymoo"):
        pytest.importorskip("pymoo", reason=needs_pymoo)
    long = _values(name, 45)
    np.testing.assert_array_equal(_values(name, 30), long[:30])
    assert not np.array_equal(_values(name, 30, seed=4), long[:30])


@pytest.fixture(autouse=True)
def _interpreted_botorch(monkeypatch):
    """BoTorch's improvement in Python: its C++ kernel takes a minute to compile at first use."""
    monkeypatch.setattr(logei, "_load_attempted", True)
    monkeypatch.setattr(logei, "_C", None)


@pytest.mark.parametrize(
    "name", ["mmmo", "mmmo -weak_to_strong n_startup=11", "map", "gp", "mmmo-published"]
)
def test_model_based_peers_run(name):
    _values(name, 12, "zdt1-d5")


@pytest.mark.parametrize("name", ["mmmo", "mmmo-published"])
def test_noise_reaches_them(name):
    _values(name, 12, "dtlz2-m3-d5-noisy")


@pytest.mark.slow
@pytest.mark.parametrize("problem", ["zdt1-d5", "dtlz2-m3-d5-noisy"])
@pytest.mark.parametrize("name", ["ap-bmm", "botorch"])
def test_slow_peers_run(name, problem):
    _values(name, 13, problem)


@pytest.mark.slow
def test_botorch_beats_its_own_start():
    task = problems.get("zdt1-d5")
    meter = peers.run("botorch", task, 0, 14)
    y = meter.y
    assert task.hypervolume_share(y, y) > task.hypervolume_share(y[:12], y[:12])


def test_wrong_names_are_refused():
    for name in ("nothing", "nsga2 -part", "mmmo part"):
        with pytest.raises(SystemExit, match="expected"):
            peers.find(name)


def test_known_starts_come_first():
    plain = problems.get("zdt1-d5")
    start = dict.fromkeys(plain.space, 0.25)
    task = replace(plain, starts=(start,))
    names = ["mmmo", "random", "cma", "mmmo-published"]
    if importlib.util.find_spec("pymoo") is not None:
        names.append("pymoo-nsga2")
    for name in names:
        assert peers.run(name, task, 0, 2).params[0] == start, name


# ----- cells and tables


def test_cells_are_resumed(folder, capsys):
    cells = search.missing(["zdt1-d5"], ["random", "nsga2"], [0, 1], 20, again=False)
    assert len(cells) == 4 and [c[2] for c in cells] == [0, 0, 1, 1]
    assert search.run(cells[:3], 20, jobs=1) == 0
    path = folder / "zdt1-d5.jsonl"
    path.write_text(path.read_text() + '{"peer": "nsga2", "se')  # killed while it wrote
    assert search.missing(
        ["zdt1-d5"], ["random", "nsga2"], [0, 1], 20, again=False
    ) == [cells[3]]
    longer = search.missing(["zdt1-d5"], ["random"], [0, 1], 30, again=False)
    assert len(longer) == 2
    assert len(search.missing(["zdt1-d5"], ["random"], [0, 1], 20, again=True)) == 2
    assert "0.4" in capsys.readouterr().out
    assert search.run(cells[3:], 20, jobs=1) == 0  # begins on a line of its own
    assert not search.missing(["zdt1-d5"], ["random", "nsga2"], [0, 1], 20, again=False)


def test_a_cell_that_fails_does_not_stop_the_others(folder, capsys):
    assert (
        search.run([("nowhere", "random", 0), ("zdt1-d5", "random", 0)], 10, jobs=1)
        == 1
    )
    assert "FAILED" in capsys.readouterr().err and (folder / "zdt1-d5.jsonl").exists()


def _cells(**shares):
    """peer -> final share by seed, a straight line up to 100 evaluations."""
    curve = np.linspace(0.1, 1, 10)
    cells = {}
    for peer, values in shares.items():
        for seed, value in enumerate(values):
            cells[peer, seed] = Cell(peer, seed, tuple(curve * value), (0.1,) * 10)
    return cells


def test_ranks_and_ties():
    cells = _cells(
        mmmo=[0.9, 0.8, 0.7],
        nsga2=[0.91, 0.79, 0.715],
        random=[0.1, 0.11, 0.1],
        gp=[0.9, 0.8],
    )
    measured_row = row("p", cells, 100, ("mmmo", "nsga2", "random", "gp"))
    assert set(measured_row.shares) == {"mmmo", "nsga2", "random"}  # gp lacks a seed
    assert [measured_row.rank(p) for p in ("nsga2", "mmmo", "random")] == [1, 2, 3]
    assert measured_row.ties_with_best("mmmo") and not measured_row.ties_with_best(
        "random"
    )
    assert row("p", cells, 300, ("mmmo",)) is None


def test_tables():
    found = {
        "p": _cells(
            mmmo=[0.9, 0.8], nsga2=[0.7, 0.6], **{"mmmo -fisher_filter": [0.85, 0.75]}
        ),
        "q": _cells(mmmo=[0.1, 0.1], nsga2=[0.7, 0.6]),
    }
    text = results(found)
    assert "| 100 | 2 | 1 | 1 | 0 | 0 | 50% |" in text
    assert "**0.850 ± 0.071**" in text and "fisher" not in text
    listed = results(found, ["mmmo", "gp", "nsga2", "nsga2 for 300"])
    assert (
        "- at 100 evaluations: gp (2 of 2 rows)\n" in listed
    )  # settings of a peer are no peers
    assert "| mmmo -fisher_filter |" in ablation(found) and "+0.0500 (" in ablation(
        found
    )
    apart = found | {
        "r": _cells(mmmo=[0.9, 0.8], **{"mmmo -fisher_filter": [0.6, 0.7]})
    }
    assert results(apart) == text and ablation(apart).startswith(ablation(found))
    assert "no choice was made on: r." in ablation(apart) and "+0.2000 (" in ablation(
        apart
    )
    assert "Nothing measured yet" in results({})


def test_more_seeds_of_two_peers_leave_the_other_tables_as_they_are():
    five = {
        "mmmo": [0.5, 0.6, 0.7, 0.8, 0.9],
        "botorch": [0.52, 0.59, 0.72, 0.79, 0.92],
        "random": [0.1] * 5,
        "mmmo -fisher_filter": [0.4] * 5,
    }
    before = {"p": _cells(**five)}
    more = five | {"mmmo": [*five["mmmo"], 0.7, 0.6]}
    more["botorch"] = [*five["botorch"], 0.4, 0.3]
    after = {"p": _cells(**more)}
    assert ablation(after) == ablation(before)
    text = results(after)
    start = text.index("### mmmo and botorch at 60")
    end = text.index("### 100 evaluations")
    assert text[:start] + text[end:] == results(before)
    # Of the shares after 60 evaluations; t of 6 degrees of freedom at 97.5 % is 2.447.
    curve = before["p"]["mmmo", 0].share[5] / 0.5
    differences = curve * np.subtract(more["mmmo"], more["botorch"])
    width = 2.447 * differences.std(ddof=1) / np.sqrt(7)
    low, high = differences.mean() - width, differences.mean() + width
    assert f"| 7 | **{curve * np.mean(more['mmmo']):.3f} ± " in text
    assert f"| {low:+.3f} to {high:+.3f} |" in text


def test_the_page_is_written_between_its_markers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text((REPOSITORY / "docs" / "lab" / "search-benchmark.md").read_text())
    for section in ("results", "ablation", "speed"):
        search.write(section, f"figures of {section}", page)
        search.write(section, f"figures of {section}", page)  # twice is once
    text = page.read_text()
    assert "Nothing measured yet" not in text and text.count("figures of ") == 3
    with pytest.raises(SystemExit, match="expected the markers"):
        search.write("elsewhere", "", page)


def test_speed_prints_a_row_per_size():
    text = search.speed([12], [3], [2, 3])
    assert len(text.splitlines()) == 4 and text.splitlines()[-1].startswith(
        "| 3 | 3 | "
    )


def test_patterns():
    known = problems.names()
    assert search.matching(["zdt?-d10"], known) == ["zdt1-d10", "zdt2-d10", "zdt3-d10"]
    assert search.matching(["all"], known) == known
    with pytest.raises(SystemExit, match="got zzz"):
        search.matching(["re21", "zzz"], known)
