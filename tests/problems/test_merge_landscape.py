"""The merge landscape: what the file holds, and what the surrogate says of the merges."""

import re

import numpy as np
import optuna
import pytest

from paretomerge import problems
from paretomerge.errors import ConfigError
from paretomerge.evaluate.evaluator import Score
from paretomerge.pareto.front import hypervolume, nondominated, reference_point
from paretomerge.problems import MergeLandscape
from paretomerge.problems.merge_landscape import SURROGATE_FILE
from paretomerge.problems.scored_merges import MERGES_FILE
from paretomerge.problems.surrogate import features
from paretomerge.search.encoding import Encoding
from tests.conftest import REPOSITORY


@pytest.fixture(scope="module")
def landscape():
    return MergeLandscape.load()


@pytest.fixture
def merges(landscape):
    return landscape.merges


@pytest.fixture(scope="module")
def problem():
    return problems.landscape()


def middling(space, method):
    """The middle of the space, under a method."""
    numbers = {name: (low + high) / 2 for name, (low, high) in space.numbers.items()}
    methods, rows = space.rows([{"method": method} | numbers])
    return space.point(methods[0], rows[0])


# ----- the file


def test_the_files_are_small_and_hold_no_pickle():
    assert MERGES_FILE.stat().st_size + SURROGATE_FILE.stat().st_size < 1_000_000
    for file in (MERGES_FILE, SURROGATE_FILE):
        with np.load(file, allow_pickle=False) as data:
            assert all(data[name].dtype != object for name in data.files)


def test_scores_and_standard_errors_are_those_of_the_examples(merges):
    for i in (0, 5, len(merges) - 1):
        for j in range(len(merges.tasks)):
            score = Score.mean_of(merges.correct[i, j].astype(float).tolist())
            assert merges.scores[i, j] == pytest.approx(score.value)
            assert merges.stderr[i, j] == pytest.approx(score.stderr)


def test_parameters_lie_in_the_space_and_densities_are_there_only_where_they_are_read(
    merges,
):
    low, high = merges.space.bounds
    missing = np.isnan(merges.numbers)
    assert (missing | ((merges.numbers >= low) & (merges.numbers <= high))).all()
    dense = [
        merges.space.methods.index(method) for method in merges.space.density_methods
    ]
    assert (
        missing == np.outer(~np.isin(merges.method, dense), merges.space.is_density)
    ).all()


# ----- the surrogate


def test_it_knows_the_sources(landscape, merges):
    for label in ("order", "mirror", "scribe"):
        measured = merges.scores[merges.labels.index(label)]
        scores = landscape.evaluate(landscape.baselines[label])[0]
        np.testing.assert_allclose(scores, measured, atol=0.06)


def test_the_same_point_gives_the_same_scores(landscape):
    """However it is asked for: alone, among others, from a file that is loaded again, with
    inactive densities or without."""
    points = [*landscape.baselines.values(), *landscape.front[:20]]
    together = landscape.scores(points)
    alone = [landscape.evaluate(p)[0] for p in points]
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-9)
    again = MergeLandscape.load().scores(points)
    np.testing.assert_allclose(together, again, rtol=0, atol=1e-12)
    inactive = landscape.baselines["order"] | dict.fromkeys(landscape.conditions, 0.3)
    np.testing.assert_array_equal(
        landscape.evaluate(inactive)[0],
        landscape.evaluate(landscape.baselines["order"])[0],
    )


def test_noise_is_binomial_and_seeded(landscape):
    point = landscape.baselines["uniform soup"]
    truth, nothing = landscape.evaluate(point)
    assert not nothing.any() and ((truth > 0) & (truth < 1)).all()
    rng = np.random.default_rng(0)
    pairs = [landscape.evaluate(point, 100, rng) for _ in range(2000)]
    values, errors = map(np.array, zip(*pairs, strict=True))
    spread = np.sqrt(truth * (1 - truth) / 100)
    assert (np.abs(values.mean(0) - truth) < 4 * spread / np.sqrt(2000)).all()
    np.testing.assert_allclose(values.std(0), spread, rtol=0.08)
    np.testing.assert_allclose(errors.mean(0), spread, rtol=0.05)
    n_correct = round(values[0, 0] * 100)
    examples = [1.0] * n_correct + [0.0] * (100 - n_correct)
    assert errors[0, 0] == pytest.approx(Score.mean_of(examples).stderr)
    twice = [
        landscape.evaluate(point, 100, np.random.default_rng(7))[0] for _ in range(2)
    ]
    assert np.array_equal(*twice)


def test_the_front_is_one_and_covers_its_hypervolume(landscape, merges, problem):
    def share(points):
        return problem.hypervolume_share(landscape.scores(points))

    scores = landscape.scores(landscape.front)
    assert nondominated(scores).all() and (scores > landscape.reference_point).all()
    assert 0.95 < share(landscape.front) <= 1
    predicted = landscape.predict(merges.method, merges.numbers)
    volume = hypervolume(predicted, landscape.reference_point)
    assert volume <= landscape.front_hypervolume * (1 + 1e-9)
    assert share([]) == 0 and share(list(landscape.baselines.values())) < 0.8
    sources = [
        merges.scores[merges.labels.index(name)]
        for name in ("order", "mirror", "scribe")
    ]
    np.testing.assert_allclose(landscape.reference_point, reference_point(sources))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "slerp"}, "method"),
        (
            {"weight/order/0": 1.6},
            "weight/order/0: expected a number from -0.5 to 1.5, got 1.6",
        ),
        ({"weight/order/0": float("nan")}, "got nan"),
        ({"weight/order/0": None}, "got None"),
        ({"density/order": 0.0}, "density/order"),
        ({"wieght/order/0": 1.0}, "wieght"),
    ],
)
def test_points_outside_the_space_are_refused(landscape, change, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        landscape.evaluate(middling(landscape.merges.space, "ties") | change)


@pytest.mark.parametrize(
    ("n_examples", "rng"),
    [(100, None), (1, np.random.default_rng(0)), (0, np.random.default_rng(0))],
)
def test_noise_needs_examples_and_a_generator(landscape, n_examples, rng):
    with pytest.raises(ConfigError, match="n_examples"):
        landscape.evaluate(landscape.baselines["order"], n_examples, rng)


def test_features_are_scaled_and_inactive_densities_are_one(merges):
    x = features(merges.space, merges.method, merges.numbers)
    assert x.min() >= 0 and x.max() <= 1
    task_arithmetic = merges.method == merges.space.methods.index("task_arithmetic")
    assert (x[task_arithmetic][:, 3:][:, merges.space.is_density] == 1).all()


# ----- for optimisers


def test_optuna_and_our_encoding_take_the_space(landscape):
    encoding = Encoding(landscape.space, landscape.conditions)
    x = encoding.encode(landscape.front[:5])
    np.testing.assert_allclose(
        landscape.scores([encoding.decode(row) for row in x]),
        landscape.scores(landscape.front[:5]),
        atol=1e-9,
    )
    problem = problems.landscape(noise=True, n_examples=50, seed=1)
    sampler = optuna.samplers.RandomSampler(seed=0)
    study = optuna.create_study(directions=problem.directions, sampler=sampler)
    study.optimize(problem, n_trials=12)
    for trial in study.trials:
        assert len(trial.user_attrs["stderr"]) == 3
        assert ("density/order" in trial.params) == (
            trial.params["method"] != "task_arithmetic"
        )


def test_the_docs_run():
    page = (REPOSITORY / "docs" / "lab" / "landscape.md").read_text()
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL).group(1)
    names = {}
    exec(code, names)
    assert len(names["study"].trials) == 300 and 0.2 < names["share"] <= 1
