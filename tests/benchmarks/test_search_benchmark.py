"""The proof's own proof: formulas against other people's, volumes against dense fronts, and a run that is interrupted."""

import json

import numpy as np
import pytest
import torch

from paretomerge.pareto.front import hypervolume

needs_pymoo = "needs pymoo, which only the benchmarks use: pip install 'paretomerge[bench]'"
FAST = ["random", "qmc", "nsga2", "nsga2 for 300", "tpe", "cma", "kinship", "evolver", "m2n2"]


@pytest.fixture
def problems():
    import problems

    return problems


@pytest.fixture
def peers():
    import peers

    return peers


@pytest.fixture
def search(tmp_path, monkeypatch):
    import search

    monkeypatch.setattr(search, "RESULTS", tmp_path / "results")
    return search


def cube(d, n=64, seed=0):
    return np.random.default_rng(seed).random((n, d))


# ----- problems


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("re32", "WeldedBeam"),
        ("re33", "DiscBrake"),
        ("re34", "VehicleSafety"),
        ("re41", "CarSideImpact"),
    ],
)
def test_engineering_formulas_are_those_of_botorch(name, theirs):
    from botorch.test_functions import multi_objective
    from engineering import ENGINEERING

    task, other = ENGINEERING[name], getattr(multi_objective, theirs)()
    x = cube(len(task.low))
    low, high = np.array(task.low), np.array(task.high)
    expected = other._evaluate_true(torch.from_numpy(low + x * (high - low))).numpy()
    found = 10 ** task(x) - 1 if task.logarithmic else task(x)
    np.testing.assert_allclose(found[:, : expected.shape[1]], expected, rtol=1e-9)
    if name == "re41":  # BoTorch has the tenth beyond the nadir from the same fronts
        np.testing.assert_allclose(
            task.nadir + 0.1 * (task.nadir - task.ideal), other._ref_point, rtol=1e-4
        )


def test_engineering_ideal_points_are_lower_bounds():
    from engineering import ENGINEERING

    for name, task in ENGINEERING.items():
        f = task(cube(len(task.low), 20_000))
        assert (
            np.isfinite(f).all()
            and (f >= task.ideal - 1e-3 * np.abs(task.nadir - task.ideal)).all()
        ), name
        assert (task.nadir > task.ideal).all()


def test_four_bar_truss_by_hand():
    """At the thinnest bars the volume is least: 200 (2 + 2 + 2^(1/4) + 1), the published ideal."""
    from engineering import ENGINEERING

    f = ENGINEERING["re21"](np.zeros((1, 4)))[0]
    assert f[0] == pytest.approx(200 * (5 + 2**0.25)) and f[0] == pytest.approx(1237.8414230005742)


def test_synthetic_functions_are_those_of_pymoo(problems):
    pymoo = pytest.importorskip("pymoo.problems", reason=needs_pymoo)
    x = cube(10)
    for kind in (1, 2, 3):
        np.testing.assert_allclose(
            problems.zdt(kind, x), pymoo.get_problem(f"zdt{kind}", n_var=10).evaluate(x)
        )
    for m in (2, 3, 4):
        np.testing.assert_allclose(
            problems.dtlz2(m, x), pymoo.get_problem("dtlz2", n_var=10, n_obj=m).evaluate(x)
        )
        np.testing.assert_allclose(
            problems.dtlz7(m, x), pymoo.get_problem("dtlz7", n_var=10, n_obj=m).evaluate(x)
        )


def test_volumes_are_those_of_dense_fronts(problems):
    """A sampled front lies inside the true one, and nearly fills it."""
    grid = np.linspace(0, 1, 3001)
    for kind in (1, 2, 3):
        points = problems.zdt(kind, np.column_stack([grid, np.zeros((3001, 4))]))
        assert _filled(points, problems.zdt_front(kind), np.array([1.3, 1.2])) == pytest.approx(
            1, abs=2e-3
        )
    angles = np.stack(np.meshgrid(grid[::50], grid[::50]), -1).reshape(-1, 2)
    sphere = problems.dtlz2(3, np.column_stack([angles, np.full((len(angles), 3), 0.5)]))
    assert 0.97 < _filled(sphere, problems.dtlz2_front(3), np.full(3, 1.1)) <= 1
    pieces = problems.dtlz7(3, np.column_stack([angles, np.zeros((len(angles), 3))]))
    assert 0.97 < _filled(pieces, problems.dtlz7_front(3), np.array([0.95, 0.95, 8.0])) <= 1
    assert problems.zdt_front(1).volume(np.array([2.0, 2.0])) == pytest.approx(4 - 1 / 3, rel=1e-6)


def _filled(points, front, reference):
    assert (points >= front.ideal - 1e-9).all()
    return hypervolume(-points, -reference) / front.volume(reference)


def test_every_problem_has_a_reference_within_reach(problems):
    known = json.loads(problems.REFERENCES.read_text())
    assert set(known) == set(problems.families())
    for name in known:
        task = problems.problem(name)
        assert task.m == len(task.reference) and (task.ideal > task.reference).all()
        assert 0 < task.volume <= np.prod(task.ideal - task.reference) * (1 + 1e-6), name


def test_the_published_volume_of_the_car(problems):
    """BoTorch's maximum, of the published front above the same reference point: NSGA-II comes within 4 % in four objectives."""
    from botorch.test_functions.multi_objective import CarSideImpact

    assert problems.problem("re41").volume == pytest.approx(CarSideImpact._max_hv, rel=0.05)


def test_share_is_of_true_values_of_what_looks_best(problems):
    task = problems.problem("zdt1-d5")
    good, bad = task.evaluate(
        [dict.fromkeys(task.distributions, 0.0), dict.fromkeys(task.distributions, 1.0)]
    )
    lucky = np.stack([good, good + 1])  # the bad point is seen above the good one
    assert task.share(np.stack([good, bad]), np.stack([good, bad])) > 0
    assert task.share(np.stack([good, bad]), lucky) == task.share(bad[None], bad[None]) == 0


def test_accuracies(problems):
    exact, noisy = problems.problem("zdt1-d5"), problems.problem("zdt1-d5-noisy")
    params = [dict(zip(exact.distributions, row, strict=True)) for row in cube(5, 200) ** 3]
    p, f = noisy.evaluate(params), exact.evaluate(params)
    assert ((p >= 0) & (p <= 1)).all()
    assert noisy.share(p, p) == pytest.approx(exact.share(f, f))
    seen, stderr = problems.binomial(np.full(1000, 0.3), np.random.default_rng(0))
    assert seen.std() == pytest.approx(stderr.mean(), rel=0.1) and seen.mean() == pytest.approx(
        0.3, abs=0.01
    )
    again = problems.binomial(np.full(1000, 0.3), np.random.default_rng(0))[0]
    assert (seen == again).all() and np.allclose(seen * 200, np.round(seen * 200))


# ----- peers


def _values(peers, problems, name, evaluations, problem="dtlz2-m2-d5", seed=3):
    meter = peers.run(name, problems.problem(problem), seed, evaluations)
    assert len(meter.seconds) == len(meter.seen) == evaluations and min(meter.seconds) >= 0
    return np.asarray(meter.seen)


@pytest.mark.parametrize("name", [*FAST, "pymoo-nsga2", "pymoo-sms-emoa"])
def test_a_peer_is_seeded_and_does_not_know_its_budget(peers, problems, name):
    if name.startswith("pymoo"):
        pytest.importorskip("pymoo", reason=needs_pymoo)
    long = _values(peers, problems, name, 45)
    np.testing.assert_array_equal(_values(peers, problems, name, 30), long[:30])
    assert not np.array_equal(_values(peers, problems, name, 30, seed=4), long[:30])


@pytest.mark.parametrize(
    "name", ["mmmo", "mmmo -weak_to_strong n_startup=11", "map", "gp", "mmmo-published"]
)
def test_model_based_peers_run(peers, problems, name):
    _values(peers, problems, name, 12, "zdt1-d5")


@pytest.mark.parametrize("name", ["mmmo", "mmmo-published"])
def test_noise_reaches_them(peers, problems, name):
    _values(peers, problems, name, 12, "dtlz2-m3-d5-noisy")


@pytest.mark.slow
@pytest.mark.parametrize("problem", ["zdt1-d5", "dtlz2-m3-d5-noisy"])
@pytest.mark.parametrize("name", ["ap-bmm", "botorch"])
def test_slow_peers_run(peers, problems, name, problem):
    _values(peers, problems, name, 14, problem)


@pytest.mark.slow
def test_botorch_beats_its_own_start(peers, problems):
    task = problems.problem("zdt1-d5")
    meter = peers.run("botorch", task, 0, 14)
    y = np.asarray(meter.seen)
    assert task.share(y, y) > task.share(y[:12], y[:12])


def test_wrong_names_are_refused(peers):
    for name in ("nothing", "nsga2 -part", "mmmo part"):
        with pytest.raises(SystemExit, match="expected"):
            peers.find(name)


def test_known_starts_come_first(peers, problems):
    from dataclasses import replace

    plain = problems.problem("zdt1-d5")
    start = dict.fromkeys(plain.distributions, 0.25)
    task = replace(plain, starts=(start,))
    for name in (
        "mmmo",
        "random",
        "cma",
        "mmmo-published",
        *(["pymoo-nsga2"] if _has_pymoo() else []),
    ):
        assert peers.run(name, task, 0, 2).params[0] == start, name


def _has_pymoo():
    import importlib.util

    return importlib.util.find_spec("pymoo") is not None


# ----- cells and tables


def test_cells_are_resumed(search, problems, capsys):
    cells = search.missing(["zdt1-d5"], ["random", "nsga2"], [0, 1], 20, again=False)
    assert len(cells) == 4 and [c[2] for c in cells] == [0, 0, 1, 1]
    assert search.run(cells[:3], 20, jobs=1) == 0
    path = search.RESULTS / "zdt1-d5.jsonl"
    path.write_text(path.read_text() + '{"peer": "nsga2", "se')  # killed while it wrote
    assert search.missing(["zdt1-d5"], ["random", "nsga2"], [0, 1], 20, again=False) == [cells[3]]
    assert (
        len(search.missing(["zdt1-d5"], ["random"], [0, 1], 30, again=False)) == 2
    )  # longer than what is there
    assert len(search.missing(["zdt1-d5"], ["random"], [0, 1], 20, again=True)) == 2
    assert "0.4" in capsys.readouterr().out


def test_a_cell_that_fails_does_not_stop_the_others(search, capsys):
    assert search.run([("nowhere", "random", 0), ("zdt1-d5", "random", 0)], 10, jobs=1) == 1
    assert "FAILED" in capsys.readouterr().err and (search.RESULTS / "zdt1-d5.jsonl").exists()


def _cells(**shares):
    """peer -> final share by seed, a straight line up to 100 evaluations."""
    from standings import Cell

    curve = np.linspace(0.1, 1, 10)
    return {
        (p, s): Cell(p, s, tuple(curve * v), (0.1,) * 10)
        for p, values in shares.items()
        for s, v in enumerate(values)
    }


def test_ranks_and_ties():
    from standings import row

    cells = _cells(
        mmmo=[0.9, 0.8, 0.7], nsga2=[0.91, 0.79, 0.715], random=[0.1, 0.11, 0.1], gp=[0.9, 0.8]
    )
    found = row("p", cells, 100, ("mmmo", "nsga2", "random", "gp"))
    assert set(found.shares) == {"mmmo", "nsga2", "random"}  # gp lacks a seed
    assert [found.rank(p) for p in ("nsga2", "mmmo", "random")] == [1, 2, 3]
    assert found.tied("mmmo") and not found.tied("random")
    assert row("p", cells, 300, ("mmmo",)) is None


def test_tables():
    from standings import ablation, results

    found = {
        "p": _cells(mmmo=[0.9, 0.8], nsga2=[0.7, 0.6], **{"mmmo -fisher_filter": [0.85, 0.75]}),
        "q": _cells(mmmo=[0.1, 0.1], nsga2=[0.7, 0.6]),
    }
    text = results(found)
    assert (
        "| 100 | 2 | 1 | 1 | 0 | 0 | 50% |" in text
        and "**0.850 ± 0.071**" in text
        and "fisher" not in text
    )
    listed = results(found, ["mmmo", "gp", "nsga2", "nsga2 for 300"])
    assert "- at 100 evaluations: gp (2 of 2 rows)\n" in listed  # settings of a peer are no peers
    assert "| mmmo -fisher_filter |" in ablation(found) and "+0.0500 (" in ablation(found)
    apart = found | {"r": _cells(mmmo=[0.9, 0.8], **{"mmmo -fisher_filter": [0.6, 0.7]})}
    assert results(apart) == text and ablation(apart).startswith(ablation(found))
    assert "served for nothing else: r." in ablation(apart) and "+0.2000 (" in ablation(apart)
    assert "Nothing measured yet" in results({})


def test_the_page_is_written_between_its_markers(search, tmp_path):
    from tests.conftest import REPOSITORY

    page = tmp_path / "page.md"
    page.write_text((REPOSITORY / "docs" / "search-benchmark.md").read_text())
    for section in ("results", "ablation", "speed"):
        search.write(section, f"figures of {section}", page)
        search.write(section, f"figures of {section}", page)  # twice is once
    text = page.read_text()
    assert "Nothing measured yet" not in text and text.count("figures of ") == 3
    with pytest.raises(SystemExit, match="expected the markers"):
        search.write("elsewhere", "", page)


def test_speed_prints_a_row_per_size(search):
    text = search.speed([12], [3], [2, 3])
    assert len(text.splitlines()) == 4 and text.splitlines()[-1].startswith("| 3 | 3 | ")


def test_patterns(search, problems):
    known = problems.names()
    assert search._matching(["zdt?-d10"], known) == ["zdt1-d10", "zdt2-d10", "zdt3-d10"]
    assert search._matching(["all"], known) == known
    with pytest.raises(SystemExit, match="got zzz"):
        search._matching(["re21", "zzz"], known)
