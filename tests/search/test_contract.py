"""The contract of a sampler finds what it is for: each of these samplers breaks one law."""

import numpy as np
import optuna
import pytest

from paretomerge.search.point_sampler import PointSampler
from paretomerge.testing import CONDITIONS, SPACE, check_define_by_run, check_sampler


class Broken(PointSampler):
    def __init__(self, seed):
        super().__init__(None, seed=seed, space=SPACE, conditions=CONDITIONS)


class Repeating(Broken):
    def sample_relative(self, study, trial, search_space):
        point = super().sample_relative(study, trial, search_space)
        return point if trial.number < 9 else study.trials[-2].params


class Seedless(Broken):
    def __init__(self, seed):
        super().__init__(0)


class Unpredictable(Broken):
    def __init__(self, seed):
        super().__init__(int(np.random.default_rng().integers(2**31)))


class Forgetful(Broken):
    """Counts its own asks, which a new process does not know of."""

    asked = 0

    def sample_relative(self, study, trial, search_space):
        self.asked += 1
        copy = optuna.trial.create_trial(params={}, distributions={}, values=[0.0])
        copy.number = self.asked
        return super().sample_relative(study, copy, search_space)


class OneWay(Broken):
    """Takes every objective as maximised."""

    def sample_relative(self, study, trial, search_space):
        point = super().sample_relative(study, trial, search_space)
        values = [t.values[0] for t in study.trials if t.values]
        return point | {"weight/a": 0.2} if values and values[-1] > -0.5 else point


class Blind(Broken):
    """Does not see the trials that still run."""

    def sample_relative(self, study, trial, search_space):
        copy = optuna.trial.create_trial(params={}, distributions={}, values=[0.0])
        copy.number = sum(t.state.is_finished() for t in study.trials)
        point = super().sample_relative(study, copy, search_space)
        return (
            point | {"weight/a": 0.01 + copy.number / 100, "rank": 3}
            if copy.number > 12
            else point
        )


class Cornered(Broken):
    def sample_relative(self, study, trial, search_space):
        return {
            "method": "plain",
            "weight/a": 1.5,
            "weight/b": 1.5 - trial.number / 1e5,
            "density": 1.0,
            "rank": 64,
            "step": 1.0,
            "one": 2,
        }


@pytest.mark.parametrize(
    ("sampler", "law"),
    [
        (Repeating, "expected a new point"),
        (Seedless, "another seed gives the same"),
        (Unpredictable, "the same seed gives the same trials"),
        (Forgetful, "continues as if it had not stopped"),
        (OneWay, "maximising the negative"),
        (Cornered, "another seed|corner"),
    ],
)
def test_a_law_that_is_broken_is_named(sampler, law):
    check_sampler(Broken)
    with pytest.raises(AssertionError, match=law):
        check_sampler(sampler)


def test_running_trials_are_seen():
    with pytest.raises(AssertionError, match="run at the same time"):
        check_sampler(Blind, exact=False, repeats=True)


def test_values_outside_are_found():
    class Outside(optuna.samplers.RandomSampler):
        def sample_independent(self, study, trial, name, distribution):
            return (
                9
                if name == "extra"
                else super().sample_independent(study, trial, name, distribution)
            )

    with pytest.raises(AssertionError, match="expected extra inside"):
        check_define_by_run(lambda seed: Outside(seed=seed))
