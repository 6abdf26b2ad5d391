"""What made the merge landscape: the design, the fit, the generator that is interrupted."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.landscape import nsga2, verify
from benchmarks.landscape.check import near_front
from benchmarks.landscape.design import N_SOBOL, Design
from benchmarks.landscape.evaluator import SpecialistEvaluator, check_provenance
from benchmarks.landscape.files import save_merges
from benchmarks.landscape.fit import solve_all, solve_left_out
from benchmarks.landscape.gaussian_process import (
    covariance,
    leave_one_out,
    logits,
    solve,
)
from benchmarks.landscape.make import make
from benchmarks.landscape.probe import promising
from paretomerge.errors import ConfigError, StudyError
from paretomerge.problems import MergeLandscape, MergeSpace, ScoredMerges
from paretomerge.problems.scored_merges import DESIGN
from paretomerge.problems.surrogate import LogitProcess
from tests.conftest import REPOSITORY


@pytest.fixture(scope="module")
def landscape():
    return MergeLandscape.load()


@pytest.fixture
def merges(landscape):
    return landscape.merges


# ----- the file


def test_the_file_holds_what_the_design_proposes(merges):
    """Every proposal drawn again from the seeds and the scores alone."""
    of_design, design = merges.stage == DESIGN, Design(merges.space)
    method, numbers = design.rows(design.replay(merges.scores[of_design]))
    assert of_design.sum() > 1000 and np.array_equal(method, merges.method[of_design])
    np.testing.assert_allclose(numbers, merges.numbers[of_design], rtol=0, atol=1e-9)


def test_a_file_survives_saving_and_loading(merges, tmp_path):
    save_merges(merges, tmp_path / "again.npz")
    again = ScoredMerges.load(tmp_path / "again.npz")
    assert again.space == merges.space and again.baselines == merges.baselines
    assert again.provenance == merges.provenance
    assert np.array_equal(again.correct, merges.correct)
    assert np.array_equal(again.numbers, merges.numbers, equal_nan=True)


def test_a_surrogate_of_other_merges_is_refused(merges, tmp_path):
    shorter = replace(
        merges,
        stage=merges.stage[:-1],
        method=merges.method[:-1],
        numbers=merges.numbers[:-1],
        correct=merges.correct[:-1],
    )
    save_merges(shorter, tmp_path / "shorter.npz")
    with pytest.raises(ConfigError, match="run `fit`"):
        MergeLandscape.load(tmp_path / "shorter.npz")


# ----- the surrogate


def test_it_gives_the_measured_scores_within_its_stated_error(landscape, merges):
    """In sample the error is no larger than the one left out, and near the front no larger than a
    few binomial ones."""
    error = landscape.predict(merges.method, merges.numbers) - merges.scores
    assert (np.sqrt((error**2).mean(0)) <= landscape.error).all()
    assert (landscape.error < 0.05).all()
    front = near_front(merges)
    binomial = np.sqrt((merges.stderr[front] ** 2).mean(0))
    assert (np.sqrt((error[front] ** 2).mean(0)) < 1.2 * binomial).all()


def test_what_is_shipped_is_the_solution_for_what_is_shipped(landscape):
    coefficients, left_out = solve_left_out(landscape.processes, landscape.merges)
    np.testing.assert_allclose(
        coefficients, landscape.coefficients, rtol=1e-5, atol=1e-6
    )
    error = np.sqrt(((left_out - landscape.merges.scores) ** 2).mean(0))
    np.testing.assert_allclose(error, landscape.error, rtol=1e-6)


def test_left_out_predictions_are_those_of_a_process_without_the_point():
    rng = np.random.default_rng(0)
    x, v = rng.random((30, 4)), rng.uniform(0.01, 0.1, 30)
    z = np.sin(3 * x[:, 0]) + x[:, 1]
    process = LogitProcess(rng.standard_normal((4, 4)), 1.0, 0.5, 0.8, 0.01)
    coefficients, predicted = leave_one_out(process, x, z, v)
    np.testing.assert_array_equal(coefficients, solve(process, x, z, v))
    for i in (0, 17):
        rest = np.arange(30) != i
        without = solve(process, x[rest], z[rest], v[rest])
        alone = covariance(process, x[i : i + 1], x[rest]) @ without
        assert predicted[i] == pytest.approx(alone[0], abs=1e-8)


def test_all_merges_are_solved_with_and_without_leaving_one_out(landscape):
    few = {"stage": 40, "method": 40, "numbers": 40, "correct": 40}
    merges = replace(
        landscape.merges,
        **{name: getattr(landscape.merges, name)[:n] for name, n in few.items()},
    )
    np.testing.assert_array_equal(
        solve_all(landscape.processes, merges),
        solve_left_out(landscape.processes, merges)[0],
    )


def test_logits_are_symmetric_and_finite():
    z, v = logits(np.array([0.0, 300.0, 600.0]), 600)
    assert z[1] == 0 and z[0] == -z[2] and np.isfinite(v).all()


# ----- the front


def test_thinning_keeps_the_best_of_each_and_no_point_twice():
    points = np.random.default_rng(0).random((50, 3))
    chosen = nsga2.thinned(points, 10)
    assert len(set(chosen.tolist())) == 10 and set(points.argmax(0)) <= set(
        chosen.tolist()
    )
    assert sorted(nsga2.thinned(points, 99).tolist()) == list(range(50))


def test_probes_go_where_most_is_promised():
    scores = np.array([[0.5, 0.5], [0.2, 0.2]])
    front = np.array([[0.5, 0.51], [0.9, 0.4], [0.4, 0.6], [0.9, 0.399]])
    # The fourth adds much too, but not beside the second.
    assert promising(front, scores, np.zeros(2), 2).tolist() == [1, 2]


def test_the_published_verification_is_that_of_the_results(landscape):
    page = (REPOSITORY / "docs" / "lab" / "landscape.md").read_text()
    table, *_ = verify.report(landscape).split("\nbias")
    assert table in page


# ----- the generator


class FormulaEvaluator:
    """Answers its tasks by a formula, in milliseconds."""

    tasks = ("up", "down")

    def __init__(self):
        numbers = {"weight/a": (-1.0, 1.0), "density/a": (0.1, 1.0)}
        self.space = MergeSpace(("plain", "thinned"), numbers, ("thinned",))
        self.count = 0

    def baselines(self):
        return {"a": {"method": "plain", "weight/a": 1.0}}

    def measure(self, params):
        self.count += 1
        height = params["weight/a"] * params.get("density/a", 1.0)
        difficulty = np.linspace(-1, 1, 40)
        return np.stack([difficulty < height, difficulty > height])

    def provenance(self, n_sobol):
        return {"models": {}, "items": {}, "design": n_sobol}


def test_a_file_cut_short_is_continued_as_if_it_never_had_been(tmp_path):
    evaluator = FormulaEvaluator()
    whole = make(40, tmp_path / "whole.npz", evaluator, n_sobol=16)
    assert evaluator.count == 41  # with the one baseline recipe
    make(9, tmp_path / "cut.npz", evaluator, n_sobol=16)
    make(25, tmp_path / "cut.npz", evaluator, n_sobol=16)
    cut = make(40, tmp_path / "cut.npz", evaluator, n_sobol=16)
    assert evaluator.count == 82
    assert np.array_equal(cut.numbers, whole.numbers, equal_nan=True)
    assert np.array_equal(cut.method, whole.method)
    assert np.array_equal(
        ScoredMerges.load(tmp_path / "cut.npz").correct, whole.correct
    )
    make(40, tmp_path / "cut.npz", evaluator, n_sobol=16)
    assert evaluator.count == 82


def test_a_file_of_another_design_is_refused(tmp_path):
    evaluator = FormulaEvaluator()
    file = tmp_path / "file.npz"
    merges = make(20, file, evaluator, n_sobol=16)
    with pytest.raises(StudyError, match="design"):
        make(30, file, evaluator, n_sobol=8)
    numbers = merges.numbers.copy()
    numbers[5, 0] += 0.01
    save_merges(replace(merges, numbers=numbers), file)
    with pytest.raises(StudyError, match="got others"):
        make(30, file, evaluator, n_sobol=16)


def test_a_stored_merge_measured_again_gives_its_answers(merges):
    """The real engine on the real models; another machine may see a tie the other way, no more."""
    evaluator = SpecialistEvaluator()
    check_provenance(merges, evaluator, N_SOBOL)
    for i in (merges.labels.index("uniform soup"), len(merges.labels) + 2):
        again = evaluator.measure(
            merges.space.point(merges.method[i], merges.numbers[i])
        )
        assert (again == merges.correct[i]).mean() > 0.995
