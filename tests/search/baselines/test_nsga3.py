import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import (
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from paretomerge.pareto.front import nondominated
from paretomerge.search.baselines.nsga3 import (
    pareto_front,
    reference_directions,
    select,
)
from paretomerge.search.encoding import Encoding


@pytest.mark.parametrize("m", range(1, 7))
def test_directions_lie_evenly_on_the_simplex(m):
    directions = reference_directions(m, 60)
    assert directions.shape[1] == m and 1 <= len(directions) <= 60
    assert np.allclose(directions.sum(1), 1) and (directions >= 0).all()
    assert len(np.unique(directions.round(9), axis=0)) == len(directions)
    if m > 1:
        assert {tuple(row) for row in np.eye(m)} <= {tuple(row) for row in directions}


@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 30))
@settings(max_examples=40, deadline=None)
def test_selection_keeps_the_best_fronts_and_no_member_twice(seed, m, size):
    rng = np.random.default_rng(seed)
    y = rng.random((30, m)).round(1)
    kept = select(y, size, reference_directions(m, 60), rng)
    assert len(kept) == len(set(kept.tolist())) == size
    front = set(np.flatnonzero(nondominated(y)))
    if size >= 30:
        assert set(kept.tolist()) == set(range(30))
    elif len(front) >= size:  # of equal points `nondominated` counts the first only
        assert all(any((y[i] == y[j]).all() for j in front) for i in kept)


def test_niches_keep_the_front_wide():
    angles = np.concatenate([np.linspace(0.7, 0.8, 50), [0.0, np.pi / 2]])
    y = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    kept = select(y, 6, reference_directions(2, 6), np.random.default_rng(0))
    assert {50, 51} <= set(kept.tolist())


def test_it_finds_a_known_front():
    encoding = Encoding({f"x{i}": FloatDistribution(0, 1) for i in range(6)})

    def objectives(x):
        cost = ((x[:, 1:] - 0.5) ** 2).sum(1)
        return np.stack([x[:, 0] - cost, 1 - x[:, 0] ** 2 - cost], axis=1)

    fronts = []
    # Rounding differs between processors, and with it each run; the mean holds on all of them.
    for seed in range(8):
        rng = np.random.default_rng(seed)
        fronts.append(pareto_front(objectives, encoding, rng.random((5, 6)), rng))
    assert min(map(len, fronts)) > 20
    assert (
        np.mean([np.abs(front[:, 1:] - 0.5).mean() for front in fronts]) < 0.035
    )  # of random points it is 0.25
    assert (
        np.mean([front[:, 0].min() for front in fronts]) < 0.05
        and np.mean([front[:, 0].max() for front in fronts]) > 0.95
    )


def test_choices_and_steps_are_searched_too():
    encoding = Encoding(
        {
            "c": CategoricalDistribution(("a", "b", "c")),
            "i": IntDistribution(0, 9),
            "x": FloatDistribution(0, 1),
        }
    )

    def objective(x):
        return (x[:, 1] - np.abs(x[:, 3] - 4 / 9) - (x[:, 4] - 0.3) ** 2)[:, None]

    rng = np.random.default_rng(0)
    best = encoding.decode(
        pareto_front(objective, encoding, encoding.project(rng.random((3, 5))), rng)[0]
    )
    assert best["c"] == "b" and best["i"] == 4 and abs(best["x"] - 0.3) < 0.1
