"""Stopping for want of gain."""

import optuna
import pytest

from paretomerge.errors import ConfigError
from paretomerge.record.trial import Trial
from paretomerge.study.agenda import WarmStart
from paretomerge.study.stopping import End, StoppingRule
from tests.study.test_search import make, told


class Fading(optuna.samplers.RandomSampler):
    """Expects half as much gain with every trial, in a way that a resumed study repeats."""

    def infer_relative_search_space(self, study, trial):
        return {}

    def sample_independent(self, study, trial, name, distribution):
        self._rng.rng.seed(1000 * trial.number + sum(name.encode()))
        return super().sample_independent(study, trial, name, distribution)

    def expected_gain(self, study):
        n = len(study.get_trials(deepcopy=False)) - 8  # the starts
        return None if n < 3 else 0.5**n


def test_stops_when_little_is_expected_and_goes_on_with_a_greater_budget(
    pico, tmp_path
):
    budget = StoppingRule(40, until=0.03, patience=3)
    study = make(pico, tmp_path, sampler=Fading(seed=0))
    reason = study.run(budget)
    low = [t.number for t in study.trials() if t.gain is not None and t.gain < 0.03]
    n = len(study.trials())
    assert low == [n - 2, n - 1]  # the third was asked for, and not count_evaluated
    assert reason == f"stopped after {n} trials: expected gain below 3 % for 3 asks"
    again = make(pico, tmp_path, sampler=Fading(seed=0))
    assert (
        again.results().end_reason == reason
        and again.run(budget) == reason
        and len(again.trials()) == n
    )
    assert again.run(StoppingRule(n - 3)) == f"finished {n} trials"
    more = make(pico, tmp_path, sampler=Fading(seed=0))
    assert more.run(StoppingRule(n + 1)) == f"finished {n + 1} trials"
    assert (
        make(pico, tmp_path, sampler=Fading(seed=0)).results().end_reason
        == f"finished {n + 1} trials"
    )


def test_a_new_start_is_tried_after_a_stop(pico, tmp_path):
    budget = StoppingRule(40, until=0.03, patience=3)
    stopped = make(pico, tmp_path, sampler=Fading(seed=0))
    stopped.run(budget)
    n = len(stopped.trials())
    mine = stopped.space.uniform_params("ties", {"ada": 0.1, "bob": 0.2, "cyd": 0.3})
    study = make(
        pico,
        tmp_path,
        sampler=Fading(seed=0),
        warm_start=lambda: WarmStart({"mine.yml": mine}),
    )
    study.run(budget)
    assert study.trials()[n].label == "mine.yml"


def test_a_stop_counts_anew_after_the_budget_was_raised(pico, tmp_path):
    study = make(pico, tmp_path, sampler=Fading(seed=0))
    study.run(StoppingRule(40, until=0.03, patience=3))
    n = len(study.trials())
    assert study.run(StoppingRule(50, until=0.03, patience=3)).startswith(
        f"stopped after {n + 2} trials"
    )
    assert (
        study.run(StoppingRule(50, until=0.03, patience=3)).startswith(
            f"stopped after {n + 2} trials"
        )
        and len(study.trials()) == n + 2
    )


def test_an_interrupted_study_stops_where_the_whole_one_does(pico, tmp_path):
    budget = StoppingRule(40, until=0.03, patience=4)
    whole = make(pico, tmp_path / "whole", sampler=Fading(seed=0))
    reason = whole.run(budget)
    n = len(whole.trials())
    for k in (9, n - 2, n - 1):
        make(pico, tmp_path / "parts", sampler=Fading(seed=0)).run(
            StoppingRule(k, until=0.03, patience=4)
        )
    parts = make(pico, tmp_path / "parts", sampler=Fading(seed=0))
    assert parts.run(budget) == reason and told(parts) == told(whole)


def test_a_sampler_that_expects_nothing_is_refused_with_the_cure(pico, tmp_path):
    study = make(pico, tmp_path, sampler=optuna.samplers.RandomSampler(seed=0))
    with pytest.raises(
        ConfigError,
        match=r"RandomSampler does not estimate the gain of its proposals\. Use MMMOSampler",
    ):
        study.run(StoppingRule(9, until=0.01))
    assert not study.trials()


@pytest.mark.parametrize("gain", [None, 0.01, 1.0])
def test_unknown_and_sufficient_gains_break_the_row(gain):
    finished = [Trial(i, {}, gain=g) for i, g in enumerate([0.0, 0.0, gain, 0.0])]
    assert StoppingRule(9, 0.01, 3).after_asking(0.0, finished, None) is None
    assert StoppingRule(9, 0.01, 2).after_asking(0.0, finished, None) is not None
    assert StoppingRule(9, None, 1).after_asking(0.0, finished, None) is None
    stopped = End("", 4, True, {"trials": 9, "until": 0.01, "patience": 3})
    assert StoppingRule(9, 0.01, 2).after_asking(0.0, finished, stopped) is None


def test_known_merges_in_a_row_end_a_run_until_its_budget_grows():
    finished = [Trial(n, {}, same_as=0) for n in range(100)]
    end = StoppingRule(60).before_asking(finished, None)
    assert (
        end is not None
        and end.stopped
        and end.reason.startswith("finished 0 trials: the last 100 proposals")
    )
    assert StoppingRule(60).before_asking(finished, end, begun=100) == end
    assert StoppingRule(61).before_asking(finished, end, begun=100) is None
    assert (
        StoppingRule(60).before_asking(finished, None, begun=100) is None
    )  # the second level has made none of them
    assert StoppingRule(60).before_asking([*finished[1:], Trial(100, {})], None) is None
