"""The simulation of a study against times that can be worked out by hand."""

import pytest

from paretomerge.errors import ConfigError
from paretomerge.study.forecast import TrialCosts, forecast, shared


def test_one_worker_does_one_thing_after_another():
    costs = TrialCosts(merge=2, evaluate=7, ask=0.5, record=0.5, start=3)
    result = forecast(costs, trials=10)
    assert result.wall == pytest.approx(3 + 10 * 10)
    assert result.busy == pytest.approx(90)
    assert result.idle == pytest.approx(1 - 90 / 103)
    assert result.driver == pytest.approx(10 / 103)


def test_a_driver_without_cost_keeps_all_workers_busy():
    costs = TrialCosts(merge=1, evaluate=9, ask=0, record=0)
    result = forecast(costs, trials=32, workers=8)
    assert result.wall == pytest.approx(40)
    assert result.idle == pytest.approx(0)


def test_the_driver_limits_the_speed():
    costs = TrialCosts(merge=0, evaluate=10, ask=0.6, record=0.4)
    # A trial takes ten seconds of a worker and one of the driver.
    assert costs.most_workers == 11
    few = forecast(costs, trials=400, workers=4)
    many = forecast(costs, trials=400, workers=64)
    assert few.wall == pytest.approx(400 / 4 * 11, rel=0.02)
    assert many.wall == pytest.approx(400, rel=0.03)
    assert many.driver > 0.95 and many.idle > 0.8


def test_generations_wait_for_their_slowest_trial():
    costs = TrialCosts(merge=0, evaluate=10, ask=0, record=0, spread=0.5)
    together = forecast(costs, trials=160, workers=8, generation=8)
    one_by_one = forecast(costs, trials=160, workers=8)
    assert one_by_one.busy == pytest.approx(together.busy)
    assert together.idle > 0.25 > 0.1 > one_by_one.idle
    # Trials of equal length lose nothing.
    equal = TrialCosts(merge=0, evaluate=10, ask=0, record=0)
    assert forecast(equal, 160, 8, generation=8).idle == pytest.approx(0)


def test_slow_workers_get_fewer_trials():
    costs = TrialCosts(merge=0, evaluate=12, ask=0, record=0)
    result = forecast(costs, trials=120, workers=2, speeds=[1, 3])
    assert result.wall == pytest.approx(120 / 4 * 12, rel=0.02)
    synchronous = forecast(costs, 120, 2, speeds=[1, 3], generation=2)
    assert synchronous.wall == pytest.approx(120 / 2 * 12)


def test_times_of_trials_have_the_mean_and_the_spread():
    costs = TrialCosts(merge=1, evaluate=9, ask=0, record=0, spread=0.3)
    result = forecast(costs, trials=20_000)
    assert result.wall / 20_000 == pytest.approx(10, rel=0.02)
    assert forecast(costs, 50, seed=1) == forecast(costs, 50, seed=1)
    assert forecast(costs, 50, seed=1) != forecast(costs, 50, seed=2)


def test_workers_that_share_cores_are_slower():
    costs = TrialCosts(merge=1, evaluate=9, ask=0.1)
    crowded = shared(costs, workers=8, places=2)
    assert (crowded.merge, crowded.evaluate, crowded.ask) == (4, 36, 0.1)
    assert shared(costs, workers=2, places=4) == costs


def test_nothing_to_do_and_wrong_numbers():
    costs = TrialCosts(merge=1, evaluate=1)
    assert forecast(costs, trials=0).wall == 0
    with pytest.raises(ConfigError, match="workers"):
        forecast(costs, trials=1, workers=0)
