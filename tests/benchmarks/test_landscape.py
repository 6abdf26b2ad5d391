"""The merge landscape: the file says what was merged, the surrogate says what the merges say, and the docs run."""

import re
from dataclasses import replace

import numpy as np
import optuna
import pytest

from benchmarks.landscape import Landscape, Merges
from benchmarks.landscape.bench import Bench, check_made
from benchmarks.landscape.check import near_front
from benchmarks.landscape.design import SPREAD, Design
from benchmarks.landscape.fit import solved
from benchmarks.landscape.landscape import SURROGATE
from benchmarks.landscape.make import make
from benchmarks.landscape.merges import DESIGN, FILE, Space
from benchmarks.landscape.nsga2 import thinned
from benchmarks.landscape.probe import promising
from benchmarks.landscape.process import Process, features, logits
from paretomerge.errors import ConfigError, StudyError
from paretomerge.evaluate.evaluator import Score
from paretomerge.pareto.front import hypervolume, nondominated, reference_point
from paretomerge.search.encoding import Encoding
from tests.conftest import REPOSITORY


@pytest.fixture(scope="module")
def landscape():
    return Landscape.load()


@pytest.fixture
def merges(landscape):
    return landscape.merges


def middling(space, method):
    """The middle of the space, under a method."""
    return space.point(
        *(
            part[0]
            for part in space.rows(
                [{"method": method} | {n: (a + b) / 2 for n, (a, b) in space.numbers.items()}]
            )
        )
    )


# ----- the file


def test_the_files_are_small_and_hold_no_pickle():
    assert FILE.stat().st_size + SURROGATE.stat().st_size < 1_000_000
    for file in (FILE, SURROGATE):
        with np.load(file, allow_pickle=False) as data:
            assert all(data[name].dtype != object for name in data.files)


def test_the_file_holds_what_the_design_proposes(merges):
    """Every proposal drawn again from the seeds and the scores alone."""
    mine, design = merges.stage == DESIGN, Design(merges.space)
    method, numbers = design.rows(design.replay(merges.scores[mine]))
    assert mine.sum() > 1000 and np.array_equal(method, merges.method[mine])
    np.testing.assert_allclose(numbers, merges.numbers[mine], rtol=0, atol=1e-9)


def test_scores_and_standard_errors_are_those_of_the_items(merges):
    for i in (0, 5, len(merges) - 1):
        for j in range(len(merges.tasks)):
            score = Score.mean_of(merges.correct[i, j].astype(float).tolist())
            assert merges.scores[i, j] == pytest.approx(score.value) and merges.stderr[
                i, j
            ] == pytest.approx(score.stderr)


def test_parameters_lie_in_the_space_and_densities_count_only_where_they_are_read(merges):
    low, high = merges.space.bounds
    known = np.isnan(merges.numbers) | ((merges.numbers >= low) & (merges.numbers <= high))
    assert known.all()
    missing = np.isnan(merges.numbers)
    assert (
        missing == np.outer(~merges.space.reads_density(merges.method), merges.space.conditional)
    ).all()


def test_a_file_survives_saving_and_loading(merges, tmp_path):
    merges.save(tmp_path / "again.npz")
    again = Merges.load(tmp_path / "again.npz")
    assert (
        again.space == merges.space and again.starts == merges.starts and again.made == merges.made
    )
    assert np.array_equal(again.correct, merges.correct) and np.array_equal(
        again.numbers, merges.numbers, equal_nan=True
    )


def test_a_surrogate_of_other_merges_is_refused(merges, tmp_path):
    shorter = replace(
        merges,
        stage=merges.stage[:-1],
        method=merges.method[:-1],
        numbers=merges.numbers[:-1],
        correct=merges.correct[:-1],
    )
    shorter.save(tmp_path / "shorter.npz")
    with pytest.raises(ConfigError, match="run `fit`"):
        Landscape.load(tmp_path / "shorter.npz")


# ----- the surrogate


def test_it_gives_the_measured_scores_within_its_stated_error(landscape, merges):
    """In sample the error is no larger than the one left out, and near the front no larger than a few binomial ones."""
    error = landscape.predict(merges.method, merges.numbers) - merges.scores
    assert (np.sqrt((error**2).mean(0)) <= landscape.error).all()
    assert (landscape.error < 0.05).all()
    front = near_front(merges)
    assert (
        np.sqrt((error[front] ** 2).mean(0)) < 1.2 * np.sqrt((merges.stderr[front] ** 2).mean(0))
    ).all()


def test_it_knows_the_sources(landscape, merges):
    for label in ("order", "mirror", "scribe"):
        measured = merges.scores[merges.labels.index(label)]
        np.testing.assert_allclose(
            landscape.evaluate(landscape.starts[label])[0], measured, atol=0.06
        )


def test_the_same_point_gives_the_same_scores(landscape):
    """However it is asked for: alone, among others, in another process that loads the file, with idle densities or without."""
    points = [*landscape.starts.values(), *landscape.front[:20]]
    together = landscape.scores(points)
    np.testing.assert_allclose(
        together, [landscape.evaluate(p)[0] for p in points], rtol=0, atol=1e-9
    )
    np.testing.assert_allclose(together, Landscape.load().scores(points), rtol=0, atol=1e-12)
    idle = landscape.starts["order"] | dict.fromkeys(landscape.conditions, 0.3)
    np.testing.assert_array_equal(
        landscape.evaluate(idle)[0], landscape.evaluate(landscape.starts["order"])[0]
    )


def test_noise_is_binomial_and_seeded(landscape):
    point = landscape.starts["uniform soup"]
    truth, nothing = landscape.evaluate(point)
    assert not nothing.any() and ((truth > 0) & (truth < 1)).all()
    rng = np.random.default_rng(0)
    values, errors = map(
        np.array, zip(*(landscape.evaluate(point, 100, rng) for _ in range(2000)), strict=True)
    )
    spread = np.sqrt(truth * (1 - truth) / 100)
    assert (np.abs(values.mean(0) - truth) < 4 * spread / np.sqrt(2000)).all()
    np.testing.assert_allclose(values.std(0), spread, rtol=0.08)
    np.testing.assert_allclose(errors.mean(0), spread, rtol=0.05)
    items = [1.0] * round(values[0, 0] * 100) + [0.0] * round(100 - values[0, 0] * 100)
    assert errors[0, 0] == pytest.approx(Score.mean_of(items).stderr)
    twice = [landscape.evaluate(point, 100, np.random.default_rng(7))[0] for _ in range(2)]
    assert np.array_equal(*twice)


def test_the_front_is_one_and_covers_its_hypervolume(landscape, merges):
    scores = landscape.scores(landscape.front)
    assert nondominated(scores).all() and (scores > landscape.reference).all()
    assert 0.95 < landscape.share(landscape.front) <= 1
    known = landscape.predict(merges.method, merges.numbers)
    assert hypervolume(known, landscape.reference) <= landscape.hypervolume * (1 + 1e-9)
    assert landscape.share([]) == 0 and landscape.share(list(landscape.starts.values())) < 0.8
    sources = [merges.scores[merges.labels.index(name)] for name in ("order", "mirror", "scribe")]
    np.testing.assert_allclose(landscape.reference, reference_point(sources))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"method": "slerp"}, "method"),
        ({"weight/order/0": 1.6}, "weight/order/0: expected a number from -0.5 to 1.5, got 1.6"),
        ({"weight/order/0": float("nan")}, "got nan"),
        ({"weight/order/0": None}, "got None"),
        ({"density/order": 0.0}, "density/order"),
        ({"wieght/order/0": 1.0}, "wieght"),
    ],
)
def test_points_outside_the_space_are_refused(landscape, change, told):
    with pytest.raises(ConfigError, match=re.escape(told)):
        landscape.evaluate(middling(landscape.merges.space, "ties") | change)


@pytest.mark.parametrize(
    ("items", "rng"), [(100, None), (1, np.random.default_rng(0)), (0, np.random.default_rng(0))]
)
def test_noise_needs_items_and_a_generator(landscape, items, rng):
    with pytest.raises(ConfigError, match="items"):
        landscape.evaluate(landscape.starts["order"], items, rng)


def test_optuna_and_our_encoding_take_the_space(landscape):
    encoding = Encoding(landscape.distributions, landscape.conditions)
    x = encoding.encode(landscape.front[:5])
    np.testing.assert_allclose(
        landscape.scores([encoding.decode(row) for row in x]),
        landscape.scores(landscape.front[:5]),
        atol=1e-9,
    )
    study = optuna.create_study(
        directions=["maximize"] * 3, sampler=optuna.samplers.RandomSampler(seed=0)
    )
    study.optimize(landscape.objective(items=50, seed=1), n_trials=12)
    for trial in study.trials:
        assert len(trial.user_attrs["stderr"]) == 3
        assert ("density/order" in trial.params) == (trial.params["method"] != "task_arithmetic")


def test_the_docs_run():
    code = re.search(
        r"```python\n(.*?)```", (REPOSITORY / "docs" / "landscape.md").read_text(), re.DOTALL
    ).group(1)
    names = {}
    exec(code, names)
    assert len(names["study"].trials) == 300 and 0.2 < names["share"] <= 1


# ----- what made it


def test_what_is_shipped_is_the_solution_for_what_is_shipped(landscape):
    coefficients, left_out = solved(landscape.processes, landscape.merges, left_out=True)
    np.testing.assert_allclose(coefficients, landscape.coefficients, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        np.sqrt(((left_out - landscape.merges.scores) ** 2).mean(0)), landscape.error, rtol=1e-6
    )


def test_left_out_predictions_are_those_of_a_process_without_the_point():
    rng = np.random.default_rng(0)
    x, v = rng.random((30, 4)), rng.uniform(0.01, 0.1, 30)
    z = np.sin(3 * x[:, 0]) + x[:, 1]
    process = Process(rng.standard_normal((4, 4)), 1.0, 0.5, 0.8, 0.01)
    _, predicted = process.solve(x, z, v, left_out=True)
    for i in (0, 17):
        rest = np.arange(30) != i
        alone = (
            process.covariance(x[i : i + 1], x[rest]) @ process.solve(x[rest], z[rest], v[rest])[0]
        )
        assert predicted[i] == pytest.approx(alone[0], abs=1e-8)


def test_features_are_scaled_and_idle_densities_rest_at_one(merges):
    x = features(merges.space, merges.method, merges.numbers)
    assert x.min() >= 0 and x.max() <= 1
    task_arithmetic = merges.method == merges.space.methods.index("task_arithmetic")
    assert (x[task_arithmetic][:, 3:][:, merges.space.conditional] == 1).all()
    z, v = logits(np.array([0.0, 300.0, 600.0]), 600)
    assert z[1] == 0 and z[0] == -z[2] and np.isfinite(v).all()


def test_thinning_keeps_the_best_of_each_and_no_point_twice():
    points = np.random.default_rng(0).random((50, 3))
    chosen = thinned(points, 10)
    assert len(set(chosen.tolist())) == 10 and set(points.argmax(0)) <= set(chosen.tolist())
    assert sorted(thinned(points, 99).tolist()) == list(range(50))


def test_probes_go_where_most_is_promised():
    known = np.array([[0.5, 0.5], [0.2, 0.2]])
    front = np.array([[0.5, 0.51], [0.9, 0.4], [0.4, 0.6], [0.9, 0.399]])
    assert promising(front, known, np.zeros(2), 2).tolist() == [
        1,
        2,
    ]  # the fourth adds much too, but not beside the second


class Toy:
    """A bench whose tasks are answered by a formula: what `make` does with a bench is the same, in milliseconds."""

    tasks = ("up", "down")

    def __init__(self):
        self.space = Space(
            ("plain", "thinned"), {"weight/a": (-1.0, 1.0), "density/a": (0.1, 1.0)}, ("thinned",)
        )
        self.count = 0

    def starts(self):
        return {"a": {"method": "plain", "weight/a": 1.0}}

    def measure(self, params):
        self.count += 1
        height = params["weight/a"] * params.get("density/a", 1.0)
        difficulty = np.linspace(-1, 1, 40)
        return np.stack([difficulty < height, difficulty > height])

    def made(self, spread):
        return {"models": {}, "items": {}, "design": spread}


def test_a_file_cut_short_is_continued_as_if_it_never_had_been(tmp_path):
    bench = Toy()
    whole = make(40, tmp_path / "whole.npz", bench, spread=16)
    assert bench.count == 41  # with the one known start
    make(9, tmp_path / "cut.npz", bench, spread=16)
    make(25, tmp_path / "cut.npz", bench, spread=16)
    cut = make(40, tmp_path / "cut.npz", bench, spread=16)
    assert bench.count == 82
    assert np.array_equal(cut.numbers, whole.numbers, equal_nan=True) and np.array_equal(
        cut.method, whole.method
    )
    assert np.array_equal(Merges.load(tmp_path / "cut.npz").correct, whole.correct)
    make(40, tmp_path / "cut.npz", bench, spread=16)
    assert bench.count == 82


def test_a_file_of_another_design_is_refused(tmp_path):
    bench = Toy()
    made = make(20, tmp_path / "file.npz", bench, spread=16)
    with pytest.raises(StudyError, match="design"):
        make(30, tmp_path / "file.npz", bench, spread=8)
    numbers = made.numbers.copy()
    numbers[5, 0] += 0.01
    replace(made, numbers=numbers).save(tmp_path / "file.npz")
    with pytest.raises(StudyError, match="got others"):
        make(30, tmp_path / "file.npz", bench, spread=16)


def test_a_stored_merge_measured_again_gives_its_items(merges):
    """The real engine on the real models; another machine may see a tie the other way, but no more."""
    bench = Bench()
    check_made(merges, bench, SPREAD)
    for i in (merges.labels.index("uniform soup"), len(merges.labels) + 2):
        again = bench.measure(merges.space.point(merges.method[i], merges.numbers[i]))
        assert (again == merges.correct[i]).mean() > 0.995
