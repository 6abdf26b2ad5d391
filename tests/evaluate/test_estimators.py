import numpy as np
import pytest
from scipy.special import expit

from paretomerge.evaluate.estimators import (
    ItemResponseModel,
    difference_estimator,
    difficulty_corrected,
    sample_mean,
    stratified_mean,
)

N, KNOWN, NEW = 400, 30, 60
EXACT = {
    "plain": sample_mean,
    "stratified": stratified_mean,
    "by difficulty": difficulty_corrected,
    "p-IRT": lambda known: ItemResponseModel(known).p_irt,
    "corrected": lambda known: ItemResponseModel(known).corrected,
    "gp-IRT": lambda known: ItemResponseModel(known).gp_irt,
}


@pytest.fixture(scope="module")
def world():
    """Items of many difficulties that ask for two skills, merges between and beyond what is
    known.
    """
    rng = np.random.default_rng(0)
    skills = rng.normal(size=(N, 2)) ** 2 * 2
    chance = expit(
        rng.normal(size=(KNOWN + NEW, 2)) @ skills.T
        - skills.sum(1) / 2
        + rng.normal(size=N) * 2
    )
    outcomes = (rng.random(chance.shape) < chance).astype(float)
    return outcomes[:KNOWN], outcomes[KNOWN:]


def errors(estimator, new, n, draws=6):
    found = []
    for draw in range(draws):
        for j, y in enumerate(new):
            seen = np.random.default_rng([draw, j]).permutation(N)[:n]
            found.append((estimator(seen, y[seen]), y.mean()))
    return np.array([e.value - truth for e, truth in found]), np.array(
        [e.stderr for e, _ in found]
    )


@pytest.mark.parametrize("name", EXACT)
def test_who_has_seen_everything_knows_it(world, name):
    known, new = world
    estimate = EXACT[name](known)(np.arange(N), new[0])
    assert estimate.value == pytest.approx(
        new[0].mean(), abs=1e-9 if name != "gp-IRT" else 1e-3
    ) and estimate.stderr == pytest.approx(0)


@pytest.mark.parametrize("name", ["plain", "by difficulty", "corrected"])
def test_the_stated_error_is_the_true_one_and_there_is_no_bias(world, name):
    known, new = world
    error, stated = errors(EXACT[name](known), new, 60)
    assert abs(error.mean()) < 0.01
    assert np.sqrt((stated**2).mean()) == pytest.approx(
        np.sqrt((error**2).mean()), rel=0.15
    )


def test_what_is_known_of_the_items_saves_items(world):
    known, new = world
    spread = {
        name: np.sqrt((errors(build(known), new, 40)[0] ** 2).mean())
        for name, build in EXACT.items()
    }
    assert (
        spread["corrected"] < 0.85 * spread["plain"]
        and spread["by difficulty"] < 0.95 * spread["plain"]
    )
    assert spread["corrected"] < 1.15 * min(spread.values())


def test_a_correction_needs_no_good_expectation(world):
    new = world[1]
    error, _ = errors(difference_estimator(np.random.default_rng(1).random(N)), new, 60)
    assert abs(error.mean()) < 0.01


def test_the_same_items_all_right_or_all_wrong_are_no_certainty(world):
    known, _ = world
    for outcome in (0.0, 1.0):
        assert EXACT["plain"](known)(np.arange(10), np.full(10, outcome)).stderr > 0.02


def test_few_merges_and_equal_ones_are_no_trouble():
    for known in (np.ones((1, 20)), np.zeros((5, 20)), np.eye(3, 20)):
        estimate = ItemResponseModel(known).corrected(np.arange(5), np.ones(5))
        assert np.isfinite(estimate.value) and estimate.stderr > 0
