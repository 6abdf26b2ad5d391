import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import (
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import TrialState, create_trial

from paretomerge.search.baselines.llm_answers import AnswerChecker

SPACE = {
    "method": CategoricalDistribution(("plain", "sparse")),
    "weight/ada": FloatDistribution(0.0, 1.5),
    "density/ada": FloatDistribution(0.1, 1.0),
    "rank": IntDistribution(1, 64, log=True),
    "step": FloatDistribution(0.0, 1.0, step=0.25),
    "flag": CategoricalDistribution((True, False, None, 1.5)),
}
CONDITIONS = {"density/ada": [("method", ("sparse",))]}
GOOD = {
    "method": "sparse",
    "weight/ada": 0.5,
    "density/ada": 0.2,
    "rank": 8,
    "step": 0.75,
    "flag": True,
}


@pytest.mark.parametrize(
    "state",
    [TrialState.COMPLETE, TrialState.FAIL, TrialState.RUNNING, TrialState.WAITING],
)
def test_points_are_known_in_every_state(state):
    values = [0, 0] if state == TrialState.COMPLETE else None
    if state == TrialState.WAITING:
        trial = create_trial(state=state, system_attrs={"fixed_params": GOOD})
    else:
        trial = create_trial(
            state=state, params=GOOD, distributions=SPACE, values=values
        )
    answers = AnswerChecker(
        SPACE, CONDITIONS, [trial, create_trial(state=TrialState.RUNNING)]
    )
    assert "known already" in answers.check(json.dumps(GOOD))[1][0]
    assert (
        "known already"
        in answers.check(json.dumps(GOOD | {"weight/ada": 0.5004}))[1][0]
    )  # as near as the log is rounded
    assert not answers.check(json.dumps(GOOD | {"weight/ada": 0.51}))[1]


def test_points_of_another_space_are_not_in_the_way():
    other = create_trial(
        params={"w": 7.0, "v": 0.1},
        distributions={n: FloatDistribution(0, 9) for n in "wv"},
        values=[0],
    )
    less = create_trial(
        params={"v": 0.1}, distributions={"v": FloatDistribution(0, 9)}, values=[0]
    )
    answers = AnswerChecker(
        {n: FloatDistribution(0, 1) for n in "wv"}, None, [other, less]
    )
    assert (
        not answers.check('{"w": 1, "v": 0.1}')[1]
        and not answers.check('{"w": 0.5, "v": 0.1}')[1]
    )


def test_what_does_not_count_may_be_missing_or_nonsense():
    rest = {k: v for k, v in GOOD.items() if k != "density/ada"} | {"method": "plain"}
    answers = AnswerChecker(SPACE, CONDITIONS, [])
    for density in ({}, {"density/ada": 7}, {"density/ada": 0.3}):
        point, faults = answers.check(json.dumps(rest | density))
        assert not faults and point == rest | {"density/ada": point["density/ada"]}
        assert 0.1 <= point["density/ada"] <= 1
    done = create_trial(
        params=rest | {"density/ada": 0.2}, distributions=SPACE, values=[0, 0]
    )
    answers = AnswerChecker(SPACE, CONDITIONS, [done])
    assert (
        "known already" in answers.check(json.dumps(rest | {"density/ada": 0.9}))[1][0]
    )
    assert not answers.check(json.dumps(GOOD))[1]


def test_a_child_of_a_parent_that_is_wrong_is_not_called_missing():
    _, faults = AnswerChecker(SPACE, CONDITIONS, []).check(
        json.dumps(
            {k: v for k, v in GOOD.items() if k != "density/ada"} | {"method": 3}
        )
    )
    assert len(faults) == 1 and '"method"' in faults[0]


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(list(GOOD.values())),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


@settings(deadline=None)  # a busy machine is no failure
@given(
    st.dictionaries(st.sampled_from(list(SPACE)), JSON)
    | st.fixed_dictionaries(dict.fromkeys(SPACE, JSON))
)
def test_whatever_passes_is_in_the_space(changes):
    point, faults = AnswerChecker(SPACE, CONDITIONS, []).check(
        json.dumps(GOOD | changes)
    )
    assert bool(point) != bool(faults)
    for name, value in point.items():
        assert SPACE[name]._contains(SPACE[name].to_internal_repr(value))
        assert (
            type(value)
            in ((float,), (int,), (str, bool, type(None), float))[
                (name in ("rank",)) + 2 * (name in ("method", "flag"))
            ]
        )
