import itertools

import numpy as np
import torch
from optuna.distributions import (
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from paretomerge.search.encoding import Encoding
from paretomerge.search.mmmo.candidates import climb, cross, recombine, redraw, switch
from tests.search.test_encoding import CONDITIONS, SPACE


def test_a_climb_is_not_steered_by_what_does_not_count():
    """The valley along w + 2 density is followed where density counts.

    Where it does not, w alone is climbed to its best.
    """
    encoding = Encoding(SPACE, CONDITIONS)
    w, density = encoding.columns["w"].start, encoding.columns["density"].start

    def acquisition(x: torch.Tensor) -> torch.Tensor:
        return (
            -((x[:, 0, w] + 2 * x[:, 0, density] - 1.5) ** 2)
            - 1e-3 * (x[:, 0, w] - 0.9) ** 2
        )

    point = {"w": 0.15, "density": 0.3, "rank": 8, "step": 0.5}
    start = encoding.encode([point | {"method": "plain"}, point | {"method": "sparse"}])
    plain, sparse = climb(encoding, acquisition, start, 50)
    assert np.isclose(plain[w], 0.5, atol=1e-2) and plain[density] == start[0, density]
    assert sparse[density] != start[1, density] and np.isclose(
        sparse[w] + 2 * sparse[density], 1.5, atol=1e-2
    )
    still = np.flatnonzero(encoding.discrete)
    assert np.array_equal(plain[still], start[0, still]) and np.array_equal(
        sparse[still], start[1, still]
    )


def test_weak_to_strong_takes_coordinates_from_elites():
    """v = a + F (b - d) in at least one coordinate, the candidate in the others."""
    elites = np.array([[0.1] * 4, [0.4] * 4, [0.9] * 4])
    children = cross(
        np.full((200, 4), 0.77), elites, 0.5, 0.5, np.random.default_rng(0)
    )
    possible = {
        a + 0.5 * (b - d) for a, b, d in itertools.permutations((0.1, 0.4, 0.9), 3)
    }
    taken = ~np.isclose(children, 0.77)
    assert taken.any(1).all() and not taken.all(1).all()
    assert (
        0.5 < taken.mean() < 0.7
    )  # CR = 0.5, at least one: (4 * 0.5 + 0.5) / 4 of them
    assert all(min(abs(v - p) for p in possible) < 1e-9 for v in children[taken])
    assert (
        len(
            cross(np.full((2, 4), 0.77), elites[:2], 0.5, 0.5, np.random.default_rng(0))
        )
        == 0
    )


def test_choices_are_drawn_anew_and_taken_from_other_elites():
    space = {
        "a": CategoricalDistribution(("x", "y", "z")),
        "n": IntDistribution(0, 9),
        "w": FloatDistribution(0, 1),
    }
    encoding, rng = Encoding(space), np.random.default_rng(0)
    elites = encoding.encode(
        [{"a": "x", "n": 2, "w": 0.1}, {"a": "y", "n": 7, "w": 0.9}]
    )
    points = np.repeat(elites[:1], 400, 0)
    new = encoding.project(redraw(encoding, points, rng))
    kept = (new[:, encoding.columns["a"]] == elites[0, encoding.columns["a"]]).all(1)
    assert (
        0.5 < kept.mean() < 0.9
        and (new[:, encoding.columns["w"]] == elites[0, -1]).all()
    )
    assert {encoding.decode(row)["a"] for row in new} == {"x", "y", "z"} and (
        points == elites[0]
    ).all()
    children = [
        encoding.decode(row) for row in recombine(encoding, points, elites[1:], rng)
    ]
    assert {(c["a"], c["n"]) for c in children} == {
        ("x", 2),
        ("x", 7),
        ("y", 2),
        ("y", 7),
    }


def test_several_choices_are_switched_one_after_the_other():
    """Only all three together are best, and each alone helps."""
    space = {name: CategoricalDistribution(("no", "yes")) for name in "abc"}
    encoding = Encoding(space)
    wanted = torch.from_numpy(encoding.encode([dict.fromkeys("abc", "yes")]))
    start = encoding.encode([dict.fromkeys("abc", "no")])
    found = switch(
        encoding,
        lambda x: -(x[:, 0] - wanted).pow(2).sum(1),
        start,
        np.random.default_rng(0),
    )
    assert [encoding.decode(row) for row in found] == [dict.fromkeys("abc", "yes")]


def test_a_choice_that_begins_to_count_is_had_with_every_value():
    space = {
        "on": CategoricalDistribution((False, True)),
        "who": CategoricalDistribution(("a", "b", "c")),
    }
    encoding, rng = Encoding(space, {"who": [("on", [True])]}), np.random.default_rng(0)
    off = encoding.encode([{"on": False}])
    found = [encoding.decode(row) for row in encoding.neighbours(off[0], rng)]
    assert sorted(point["who"] for point in found) == ["a", "b", "c"] and all(
        point["on"] for point in found
    )
    drawn = encoding.project(redraw(encoding, np.repeat(off, 200, 0), rng))
    woken = [point["who"] for point in map(encoding.decode, drawn) if point["on"]]
    assert set(woken) == {"a", "b", "c"} and (drawn[drawn[:, 0] == 1] == off).all()
