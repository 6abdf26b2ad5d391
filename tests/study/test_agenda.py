"""The order of what comes before the sampler's proposals."""

from hypothesis import given
from hypothesis import strategies as st

from paretomerge.evaluate.evaluator import Score
from paretomerge.record.trial import Trial
from paretomerge.study.agenda import WarmStart, first_agenda

points = st.integers(0, 12)


def scored(x, number):
    return Trial(
        -1,
        {"x": x},
        {"a": Score(float(x))},
        f"warm: old {number}",
        warm_start=f"old {number}",
    )


def plan(starts, known, finished, sources=2):
    return first_agenda(
        starts, sources, known, finished, lambda params: str(params["x"])
    )


def test_sources_then_scores_then_the_users_then_the_rest():
    starts = {label: {"x": x} for x, label in enumerate(("ada", "bob", "soup", "ties"))}
    known = WarmStart(
        {"mine.yml": {"x": 7}, "soup again": {"x": 2}},
        (scored(9, 0), scored(1, 1), scored(3, 2), scored(9, 3)),
    )
    told = [(t.label, t.warm_start) for t in plan(starts, known, [])]
    assert told == [
        ("ada", ""),
        ("bob", "old 1"),
        ("ties", "old 2"),
        ("warm: old 0", "old 0"),
        ("mine.yml", ""),
        ("soup again", ""),
    ]


@given(
    st.lists(points, min_size=2, max_size=6, unique=True),
    st.lists(points, max_size=4),
    st.lists(points, max_size=5),
    st.integers(0, 12),
)
def test_every_point_once_the_sources_first_and_a_resume_changes_nothing(
    own, mine, old, done
):
    starts = {f"start {i}": {"x": x} for i, x in enumerate(own)}
    known = WarmStart(
        {f"{i}.yml": {"x": x} for i, x in enumerate(mine)},
        tuple(scored(x, i) for i, x in enumerate(old)),
    )
    whole = plan(starts, known, [])
    assert [t.label for t in whole[:2]] == ["start 0", "start 1"]
    assert sorted(t.params["x"] for t in whole) == sorted({*own, *mine, *old})
    assert all(bool(t.scores) == (t.params["x"] in old) for t in whole)
    assert plan(starts, known, whole[:done]) == whole[done:]
