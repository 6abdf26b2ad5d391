import numpy as np
import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState, create_trial

from paretomerge.errors import ConfigError
from paretomerge.search.observations import Observations, reported_stderr

SPACE = {"a": FloatDistribution(0, 1)}


def a_study() -> optuna.Study:
    study = optuna.create_study(directions=["maximize", "minimize"])
    study.add_trial(
        create_trial(
            params={"a": 0.1},
            distributions=SPACE,
            values=[1.0, 2.0],
            user_attrs={"stderr": [0.1, 0.2]},
        )
    )
    study.add_trial(
        create_trial(params={"a": 0.2}, distributions=SPACE, state=TrialState.FAIL)
    )
    study.add_trial(
        create_trial(
            params={"a": 0.3},
            distributions=SPACE,
            values=[3.0, 4.0],
            constraints={"size": 0.5},
        )
    )
    study.add_trial(
        create_trial(
            params={"a": 0.4},
            distributions=SPACE,
            values=[5.0, 6.0],
            user_attrs={
                "stderr": [0.3, 0.4],
                "scores": {"x": [5.0, 0.3, 3, "101"], "y": [6.0, 0.4, 2, [0.5, 1.5]]},
            },
            constraints={"size": -0.5},
        )
    )
    study.add_trial(create_trial(params={}, distributions={}, state=TrialState.FAIL))
    return study


def test_values_are_maximised_and_failures_have_none():
    seen = Observations.of(a_study())
    assert len(seen) == 4 and seen.complete.tolist() == [True, False, True, True]
    np.testing.assert_array_equal(seen.y, [[1, -2], [np.nan, np.nan], [3, -4], [5, -6]])
    assert [p["a"] for p in seen.params] == [0.1, 0.2, 0.3, 0.4]


def test_a_standard_error_that_is_not_told_is_the_median_of_the_others():
    seen = Observations.of(a_study())
    np.testing.assert_allclose(
        seen.stderr[[0, 2, 3]], [[0.1, 0.2], [0.2, 0.3], [0.3, 0.4]]
    )
    study = optuna.create_study(directions=["maximize"] * 2)
    study.add_trial(
        create_trial(params={"a": 0.1}, distributions=SPACE, values=[1.0, 2.0])
    )
    assert Observations.of(study).stderr is None


def test_constraints_decide_what_is_feasible():
    seen = Observations.of(a_study())
    np.testing.assert_array_equal(seen.constraints[:, 0], [np.nan, np.nan, 0.5, -0.5])
    assert seen.feasible.tolist() == [True, False, False, True]


def test_items_are_outcomes_per_example():
    items = Observations.of(a_study()).example_scores
    assert items[0] == [None, None]
    assert [i.tolist() for i in items[3]] == [[1.0, 0.0, 1.0], [0.5, 1.5]]


def test_running_trials_are_known_but_not_the_one_that_asks():
    study = optuna.create_study(directions=["maximize"])
    for _ in range(2):
        study.ask(SPACE)
    asking = study.trials[-1]
    assert [t.number for t in Observations.of(study, asking).running] == [0]
    assert len(Observations.of(study)) == 0 and Observations.of(study).y.shape == (0, 1)


def two(values, state=TrialState.COMPLETE, **more):
    return create_trial(
        params={"a": 0.5}, distributions=SPACE, state=state, values=values, **more
    )


def test_pruned_trials_count_as_tried_in_vain():
    study = optuna.create_study()
    study.add_trial(
        create_trial(
            params={"a": 0.5}, distributions=SPACE, state=TrialState.PRUNED, value=3.0
        )
    )
    seen = Observations.of(study)
    assert (
        seen.params == [{"a": 0.5}]
        and seen.complete.tolist() == [False]
        and np.isnan(seen.y).all()
    )


def test_a_value_whose_square_is_infinite_is_as_good_as_infinite():
    study = optuna.create_study(directions=["maximize"] * 2)
    study.add_trials([two([1.0, 1e99]), two([-1e200, 2.0]), two([1.0, float("inf")])])
    assert Observations.of(study).complete.tolist() == [True, False, False]


def test_each_objective_may_tell_its_standard_error_or_not():
    study = optuna.create_study(directions=["maximize"] * 2)
    study.add_trials(
        [
            two([1.0, 2.0], user_attrs={"stderr": [0.1, None]}),
            two([1.0, 2.0], user_attrs={"stderr": [1e200, float("nan")]}),
        ]
    )
    np.testing.assert_array_equal(
        Observations.of(study).stderr, [[0.1, np.nan], [0.1, np.nan]]
    )


@pytest.mark.parametrize(
    "wrong", ["abc", {"a": 1}, 0.1, [0.1], [0.1, -0.2], [[0.1, 0.2]]]
)
def test_standard_errors_that_mean_nothing_are_told_of_and_do_not_count(wrong):
    study = optuna.create_study(directions=["maximize"] * 2)
    study.add_trials(
        [
            two([1.0, 2.0], user_attrs={"stderr": wrong}),
            two([1.0, 2.0], user_attrs={"stderr": [0.1, 0.2]}),
        ]
    )
    with pytest.raises(
        ConfigError,
        match=r"trial 0: user attribute 'stderr': expected 2 numbers of 0 or more",
    ):
        reported_stderr(study.trials[0], 2)
    np.testing.assert_array_equal(Observations.of(study).stderr, [[0.1, 0.2]] * 2)


def test_an_infinite_constraint_is_as_far_off_as_the_farthest():
    study = optuna.create_study(directions=["maximize"] * 2)
    for told in (float("inf"), -3.0, float("-inf"), 1.0, 1e200):
        study.add_trial(
            two([1.0, 2.0], constraints={"size": told, "other": float("inf")})
        )
    study.add_trial(two([1.0, 2.0]))
    seen = Observations.of(study)
    np.testing.assert_array_equal(
        seen.constraints[:, 1], [3.0, -3.0, -3.0, 1.0, 3.0, np.nan]
    )
    np.testing.assert_allclose(seen.violation, [2, 1, 1, 4 / 3, 2, np.inf])


def test_constraints_are_in_one_order_whatever_the_storages_is():
    """Else a resumed study fits the same processes in another order, and its points differ in
    the eighth decimal.
    """
    seen = []
    for names in ("ab", "ba"):
        study = optuna.create_study(directions=["maximize"] * 2)
        study.add_trial(
            two([1.0, 2.0], constraints={name: float(ord(name)) for name in names})
        )
        seen.append(Observations.of(study).constraints)
    np.testing.assert_array_equal(*seen)
