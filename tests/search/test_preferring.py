"""A sampler that leaves its last trials to one that improves a preference."""

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.samplers import RandomSampler

from paretomerge.search.preferring import PreferringSampler
from paretomerge.search.registry import PRESETS, SearchProblem, make, prefers

SPACE = {name: FloatDistribution(0, 1) for name in ("x", "y")}


class Constant(RandomSampler):
    def __init__(self, value: float) -> None:
        super().__init__(0)
        self.value = value

    def sample_independent(self, study, trial, name, distribution):
        return self.value


def test_the_last_trials_come_from_the_other_sampler() -> None:
    sampler = PreferringSampler(Constant(0.25), Constant(0.75), 2)
    study = optuna.create_study(sampler=sampler)
    proposed = []
    for _ in range(4):
        trial = study.ask(SPACE)
        proposed.append(trial.params["x"])
        study.tell(trial, 0.0)
    assert proposed == [0.25, 0.25, 0.75, 0.75]


def search(
    name: str, prefer, seed: int = 0, n: int = 30
) -> list[optuna.trial.FrozenTrial]:
    """Two objectives that pull apart: x and its opposite, both worse away from y = 0.3."""
    problem = SearchProblem(SPACE, 2, seed=seed, trials=n, prefer=prefer)
    study = optuna.create_study(
        directions=["maximize", "maximize"], sampler=make(name, problem)
    )
    for _ in range(n):
        trial = study.ask(dict(SPACE))
        x, y = trial.params["x"], trial.params["y"]
        loss = (y - 0.3) ** 2
        trial.set_user_attr("stderr", [0.01, 0.01])
        study.tell(trial, [1 - x**2 - loss, 1 - (1 - x) ** 2 - loss])
    return study.trials


@pytest.mark.parametrize("name", ["mmmo", "nsga2", "tpe"])
def test_a_preference_draws_proposals_to_its_part_of_the_front(name: str) -> None:
    # Of these weights the best point is at x = 0.25: 0.9 x^2 = 0.1 (1 - x)^2.
    trials = search(name, (0.9, 0.1))
    last = [trial.params for trial in trials[26:]]
    assert len(last) == 4
    for params in last[1:]:
        assert params["x"] == pytest.approx(0.25, abs=0.08)
        assert params["y"] == pytest.approx(0.3, abs=0.08)
    before = [trial.params for trial in search(name, None)[:26]]
    assert [trial.params for trial in trials[:26]] == before


def test_trials_that_were_taken_over_do_not_count() -> None:
    sampler = PreferringSampler(Constant(0.25), Constant(0.75), 2)
    study = optuna.create_study(sampler=sampler)
    for attributes in ({"warm": "other study"}, {"same_as": 0}, {}):
        study.add_trial(
            optuna.trial.create_trial(
                params={"x": 0.5, "y": 0.5},
                distributions=SPACE,
                value=0.0,
                user_attrs=attributes,
            )
        )
    proposed = []
    for _ in range(3):
        trial = study.ask(SPACE)
        proposed.append(trial.params["x"])
        study.tell(trial, 0.0)
    assert proposed == [0.25, 0.75, 0.75]


def test_the_mean_is_a_preference() -> None:
    trials = search("mmmo", "mean")
    best = max(trials, key=lambda trial: sum(trial.values))
    assert best.params["x"] == pytest.approx(0.5, abs=0.05)
    assert best.params["y"] == pytest.approx(0.3, abs=0.05)


def test_what_ignores_a_preference_proposes_the_same() -> None:
    for name, preset in PRESETS.items():
        assert prefers(name) == preset.prefers
    assert prefers("RandomSampler") == "ignored"
    assert prefers("TPESampler") == "shared"
    with_it, without = (search("random", prefer, n=4) for prefer in ("mean", None))
    assert [t.params for t in with_it] == [t.params for t in without]


def test_weights_must_fit_the_objectives() -> None:
    from paretomerge.errors import ConfigError

    with pytest.raises(ConfigError, match="expected 2 numbers"):
        search("mmmo", (1.0, 1.0, 1.0), n=12)
