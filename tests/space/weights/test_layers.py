from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paretomerge.errors import ConfigError
from paretomerge.space.weights.layers import Grouping, blocks_of_equal_mass, group_of


@given(
    st.lists(st.one_of(st.just(0.0), st.floats(0, 1e6)), min_size=1, max_size=9),
    st.integers(1, 9),
)
@settings(max_examples=150, deadline=None)
def test_blocks_are_as_equal_as_any(mass, k):
    k = min(k, len(mass))
    starts = blocks_of_equal_mass(mass, k)
    assert (
        len(starts) == k and starts[0] == 0 and all(a < b for a, b in pairwise(starts))
    )

    def squares(starts):
        return sum(
            (sum(mass[a:b]) / (sum(mass) or 1)) ** 2
            for a, b in pairwise((*starts, len(mass)))
        )

    assert squares(starts) == pytest.approx(
        min(squares((0, *c)) for c in combinations(range(1, len(mass)), k - 1)),
        abs=1e-12,
    )


def test_a_heavy_layer_gets_a_block_of_its_own():
    assert blocks_of_equal_mass([1, 1, 1, 9, 1, 1, 1], 3) == (0, 3, 4)


@given(st.integers(1, 100), st.integers(1, 100))
def test_groups_of_equal_depth(depth, count):
    count = min(count, depth)
    starts = Grouping(count).starts(depth)
    assert [group_of(starts, layer) for layer in range(depth)] == [
        layer * count // depth for layer in range(depth)
    ]


def test_the_grammar():
    assert Grouping.parse(4) == Grouping.parse({"count": 4}) == Grouping(4)
    assert Grouping.parse({"by": "profile", "count": 2}).starts(4, [5, 1, 1, 1]) == (
        0,
        1,
    )
    assert Grouping.parse([[0, 3], [3, 4]]).starts(4) == (0, 3)
    assert Grouping(1).starts(0) == (0,)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (0, "1 or more"),
        (True, "expected a number"),
        ("4", "expected a number"),
        ([], "expected a number"),
        (None, "expected a number"),
        ([[0, 1], 2], r"ranges \[first, end\)"),
        ([[0, 1.5]], r"ranges \[first, end\)"),
        ({"by": "profil", "count": 2}, "did you mean 'profile'"),
        ({"by": "depth"}, "1 or more"),
        ({"cuont": 2}, "did you mean 'count'"),
        ({"by": "depth", "count": 10**9}, "1 to 4"),
        (5, "1 to 4"),
        ([[0, 2], [3, 4]], "follow one another"),
        ([[0, 2], [2, 5]], "from 0 to 4"),
        ([[0, 2], [2, 2], [2, 4]], "follow one another"),
        ({"by": "profile", "count": 2}, "expected a profile"),
    ],
)
def test_what_is_refused(data, told):
    with pytest.raises(ConfigError, match=told):
        Grouping.parse(data).starts(4)
