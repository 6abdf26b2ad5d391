import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from paretomerge.pareto.front import (
    RunningHypervolume,
    hypervolume,
    hypervolume_contributions,
    nondominated,
    reference_point,
)
from paretomerge.pareto.preference import Preference, Scale
from paretomerge.pareto.ranking import best_points, knee, normalised, representative

POINTS = arrays(
    float,
    st.tuples(st.integers(1, 12), st.integers(2, 3)),
    elements=st.integers(0, 6).map(float),
)


@given(POINTS)
@settings(max_examples=60, deadline=None)
def test_nondominated_is_brute_force(points):
    distinct = np.unique(points, axis=0)
    mask = nondominated(distinct)
    for i, p in enumerate(distinct):
        dominated = any((q >= p).all() and (q > p).any() for q in distinct)
        assert mask[i] == (not dominated)


def test_of_equal_points_one_counts():
    assert nondominated([[1, 1], [1, 1], [0, 2]]).tolist() == [True, False, True]
    assert nondominated([]).tolist() == []


@given(POINTS)
@settings(max_examples=40, deadline=None)
def test_hypervolume_counts_unit_cells(points):
    m = points.shape[1]
    covered = sum(
        any((p >= np.array(c) + 1).all() for p in points)
        for c in itertools.product(range(6), repeat=m)
    )
    assert hypervolume(points, np.zeros(m)) == pytest.approx(covered)


def test_points_behind_the_reference_add_nothing():
    assert hypervolume([[2, 2], [-1, 9]], [0, 0]) == 4
    assert hypervolume([[-1, -1]], [0, 0]) == 0


def test_contributions_are_what_would_be_lost():
    points = np.array([[3.0, 1.0], [2.0, 2.0], [1.0, 3.0], [1.0, 1.0]])
    lost = [
        hypervolume(points, [0, 0]) - hypervolume(np.delete(points, i, 0), [0, 0])
        for i in range(4)
    ]
    assert hypervolume_contributions(points, [0, 0]).tolist() == pytest.approx(lost)


def test_reference_point_is_the_worst_less_a_margin():
    assert reference_point([[1, 5], [3, 5]], 0.1).tolist() == pytest.approx([0.8, 4.9])


def test_knee_and_preferences():
    front = np.array([[1.0, 0.0], [0.8, 0.8], [0.0, 1.0]])
    assert knee(front) == 1
    scale = Scale.of(front)
    assert Preference((1, 0)).values(front, scale).argmax() == 0
    assert Preference((0, 1)).values(front, scale).argmax() == 2
    assert Preference((1, 1)).values(front, scale).argmax() == 1
    assert Preference.knee(2).values(front, scale).argmax() == 1
    assert Preference.mean(2).values([[0.2, 0.6]], scale) == pytest.approx(0.4)


@given(POINTS, st.floats(0.1, 10), st.floats(-5, 5))
@settings(max_examples=40, deadline=None)
def test_picks_do_not_depend_on_units(points, scale, shift):
    assert knee(points) == knee(points * scale + shift) or np.isclose(
        *(
            np.linalg.norm(1 - normalised(points), axis=1)[
                [knee(points), knee(points * scale + shift)]
            ]
        )
    )


@given(POINTS)
@settings(max_examples=40, deadline=None)
def test_a_preferred_point_is_on_the_front(points):
    weights = np.ones(points.shape[1])
    value = Preference(tuple(weights)).values(points, Scale.of(points))
    chosen = points[value.argmax()]
    assert not any((q >= chosen).all() and (q > chosen).any() for q in points)


@given(POINTS)
@settings(max_examples=40, deadline=None)
def test_a_running_hypervolume_is_that_of_all_points(points):
    running = RunningHypervolume([1.0] * points.shape[1])
    for i, point in enumerate(points):
        expected = hypervolume(points[: i + 1], [1.0] * points.shape[1])
        assert running.add(point) == pytest.approx(expected)


@given(POINTS, st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_the_best_points_come_front_after_front(points, most):
    best = best_points(points, most)
    assert len(set(best.tolist())) == len(best) == min(most, len(points))
    others = np.setdiff1d(np.arange(len(points)), best)
    for i in best:
        # No point that was left out is better than one that was taken.
        better = (points[others] >= points[i]).all(1) & (
            points[others] > points[i]
        ).any(1)
        assert not better.any()


def test_representative_points_are_the_best_and_some_of_the_others():
    values = np.arange(100.0)[:, None]
    chosen = representative(values, 20).tolist()
    assert len(chosen) == 20 and chosen == sorted(chosen)
    assert set(range(90, 100)) <= set(chosen)
    # From the worst on, evenly.
    assert chosen[:10] == [0, 10, 20, 30, 40, 49, 59, 69, 79, 89]
    assert representative(values, 100).tolist() == list(range(100))
