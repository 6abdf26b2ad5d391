import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from optuna.distributions import FloatDistribution

from paretomerge.search.baselines.m2n2 import (
    M2N2Proposer,
    attraction,
    example_scores,
    fitness,
    survivors,
)
from paretomerge.search.encoding import Encoding
from paretomerge.search.observations import Observations
from paretomerge.search.point_sampler import Archive, PointSampler

SPACE = {f"w{i}": FloatDistribution(0, 1) for i in range(4)}
ONES = np.ones(4)


def archive_of(*trials):
    """Archive of (values, items per objective or None) pairs; objectives maximised."""
    study = optuna.create_study(directions=["maximize"] * len(trials[0][0]))
    rng = np.random.default_rng(0)
    for values, items in trials:
        scores = (
            {}
            if items is None
            else {f"t{k}": [values[k], 0.0, 4, kept] for k, kept in enumerate(items)}
        )
        params = dict(zip(SPACE, rng.random(4), strict=True))
        study.add_trial(
            optuna.trial.create_trial(
                values=values,
                params=params,
                distributions=SPACE,
                user_attrs={"scores": scores},
            )
        )
    return Archive.of(Observations.of(study), Encoding(SPACE), len(study.trials))


def test_who_solves_what_nobody_else_solves_is_fit():
    outcomes = np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1]], dtype=float)
    assert fitness(outcomes, ONES) == pytest.approx([1.0, 1.0, 2.0])
    assert survivors(outcomes, ONES, 2) in ([0, 2], [1, 2])


@given(arrays(float, (5, 7), elements=st.floats(0, 1)))
@settings(max_examples=50, deadline=None)
def test_what_is_shared_is_what_there_is(outcomes):
    solved = outcomes.sum(0) > 1e-3
    total = fitness(outcomes[:, solved], np.ones(int(solved.sum()))).sum()
    assert total == pytest.approx(solved.sum(), abs=1e-2)


def test_a_mate_is_strong_where_the_first_is_weak():
    outcomes = np.array([[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 1, 1]], dtype=float)
    drawn = attraction(outcomes, ONES, 0)
    assert drawn[2] > drawn[1] > drawn[0] == 0
    assert attraction(np.ones((3, 4)), ONES, 1).tolist() == [1, 0, 1]


def test_examples_are_read_and_objectives_count_alike():
    table, capacity = example_scores(
        archive_of(
            ([0.5, 0.25], ["1100", [0.5, 0.0, 0.5]]),
            ([0.75, 0.5], ["0111", [0.5, 1.0, 0.5]]),
        )
    )
    assert table[:, :4].tolist() == [[1, 1, 0, 0], [0, 1, 1, 1]]
    assert table[:, 4:].tolist() == [[0.5, 0.0, 0.5], [0.5, 1.0, 0.5]]
    assert capacity == pytest.approx([0.25] * 4 + [1 / 3] * 3)


def test_examples_of_a_minimised_objective_are_turned():
    """Values are maximised; per-example scores stay as the evaluator gave them, here errors."""
    table, _ = example_scores(
        archive_of(([-0.75], ["1110"]), ([-0.25], ["0001"]), ([-0.5], ["0011"]))
    )
    assert table[0].tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("items", [None, [None], [""]])
def test_an_objective_without_examples_is_one_example(items):
    table, capacity = example_scores(
        archive_of(([2.0], items), ([4.0], items), ([3.0], items))
    )
    assert table.tolist() == [[0.0], [1.0], [0.5]] and capacity.tolist() == [1.0]


def test_a_trial_that_lacks_its_examples_has_its_mean_in_each():
    """A race leaves it before all were asked."""
    table, capacity = example_scores(
        archive_of(([0.25], ["0001"]), ([0.75], ["0111"]), ([0.5], None))
    )
    assert table.tolist() == [
        [0, 0, 0, 1],
        [0, 1, 1, 1],
        [0.5] * 4,
    ] and capacity == pytest.approx([0.25] * 4)
    table, _ = example_scores(
        archive_of(([-0.25], ["0001"]), ([-0.75], ["0111"]), ([-0.75], None))
    )  # errors
    assert table.tolist() == [[1, 1, 1, 0], [1, 0, 0, 0], [0.25] * 4]


def test_examples_that_do_not_fit_together_are_left_aside():
    table, _ = example_scores(archive_of(([1.0], ["11"]), ([2.0], ["111"])))
    assert table.shape == (2, 1)
    table, _ = example_scores(
        archive_of(([1.0], [[float("nan"), 1.0]]), ([2.0], [[0.0, 1.0]]))
    )
    assert table.tolist() == [[0.0], [1.0]]


def test_a_child_lies_between_its_parents_on_both_sides_of_the_split():
    archive = archive_of(([1.0], None), ([2.0], None))
    low, high = np.minimum(*archive.x), np.maximum(*archive.x)
    children = M2N2Proposer(mutation_scale=0.0).propose(
        archive, np.random.default_rng(0)
    )
    assert (children >= low - 1e-12).all() and (children <= high + 1e-12).all()
    shares = (children - archive.x[1]) / (archive.x[0] - archive.x[1])
    mixed = [row for row in shares if not np.allclose(row, row[0])]
    assert mixed and all(
        np.allclose(row, row[0]) or np.isclose(row[0] + row[-1], 1) for row in shares
    )


def test_it_composes_specialists():
    """Example j is solved where w_j > 0.45: solving all takes the strengths of all four starts."""
    study = optuna.create_study(
        directions=["maximize"],
        sampler=PointSampler(M2N2Proposer(8), space=SPACE, n_startup=5),
    )
    for start in np.eye(4) * 0.7 + 0.1:
        study.enqueue_trial(dict(zip(SPACE, start.tolist(), strict=True)))
    for _ in range(60):
        trial = study.ask(SPACE)
        right = [float(w > 0.45) for w in trial.params.values()]
        trial.set_user_attr(
            "scores",
            {"t": [np.mean(right), 0.0, 4, "".join(str(int(r)) for r in right)]},
        )
        study.tell(trial, float(np.mean(right)))
    assert study.best_value >= 0.75
