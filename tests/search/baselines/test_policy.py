import numpy as np
import optuna
import pytest
import torch
from optuna.distributions import (
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from paretomerge.errors import ConfigError
from paretomerge.search.baselines.policy import PolicyProposer, advantages, scalarise
from paretomerge.search.baselines.policy_network import DecisionSequence, PolicyNetwork
from paretomerge.search.encoding import Encoding
from paretomerge.search.point_sampler import PointSampler

BLOCKS = 6
SPACE = {
    f"from/{b}": CategoricalDistribution(("a", "b", "c")) for b in range(BLOCKS)
} | {"scale": FloatDistribution(0, 1)}
EVERY = {
    "scale": FloatDistribution(0.5, 2.0, log=True),
    "kind": CategoricalDistribution(("x", "y")),
    "times": IntDistribution(0, 2),
    "many": IntDistribution(1, 100),
}
CONDITIONS = {"scale": [("times", (1, 2))], "many": [("kind", ("x",)), ("times", (2,))]}


def score(params) -> list[float]:
    """Two skills: blocks from `a` teach one, blocks from `b` the other; `c` breaks the model."""
    blocks = [params[f"from/{b}"] for b in range(BLOCKS)]
    broken = 0.3 * blocks.count("c") + (params["scale"] - 0.7) ** 2
    return [blocks.count("a") / BLOCKS - broken, blocks.count("b") / BLOCKS - broken]


def searched(trials: int, seed: int = 0, **options) -> optuna.Study:
    sampler = PointSampler(
        PolicyProposer(n_startup=6, seed=seed, **options),
        space=SPACE,
        seed=seed,
        n_startup=6,
    )
    study = optuna.create_study(directions=["maximize", "maximize"], sampler=sampler)
    for _ in range(trials):
        trial = study.ask(SPACE)
        study.tell(trial, score(trial.params))
    return study


def test_samples_are_valid_points_whose_probability_can_be_evaluated():
    encoding = Encoding(EVERY, CONDITIONS)
    decisions = DecisionSequence(encoding)
    assert decisions.names == [
        "times",
        "scale",
        "kind",
        "many",
    ]  # a parent before what it makes count
    torch.manual_seed(0)
    network, preferences = PolicyNetwork(decisions, 2), np.tile([0.3, 0.7], (400, 1))
    with torch.no_grad():
        x = network.sample(preferences, np.random.default_rng(0))
        evaluation = network.evaluate(
            decisions.trajectories(x), torch.as_tensor(preferences)
        )
    assert np.array_equal(x, encoding.project(x.copy()))
    counting = encoding.active_mask(x)[
        :, [encoding.columns[name].start for name in decisions.names]
    ]
    assert (
        np.array_equal(evaluation.active.numpy(), counting)
        and not counting.all()
        and counting.any(0).all()
    )
    assert (evaluation.log_prob.numpy()[~counting] == 0).all()
    times = encoding.decode(x[0])["times"]
    same = [encoding.decode(row)["times"] == times for row in x]
    assert (
        abs(np.mean(same) - float(evaluation.log_prob[0, 0].exp())) < 0.08
    )  # as often as it says


def test_sampling_and_evaluating_agree_at_every_decision():
    """The states of sampling, step by step, are those of the whole trajectory at once."""
    encoding = Encoding(EVERY, CONDITIONS)
    decisions = DecisionSequence(encoding)
    torch.manual_seed(1)
    network = PolicyNetwork(decisions, 2)
    with torch.no_grad():
        network.heads.weight.mul_(50.0)  # decisions that depend on those before
        x = network.sample(np.tile([0.5, 0.5], (3000, 1)), np.random.default_rng(1))
        evaluation = network.evaluate(
            decisions.trajectories(x), torch.full((3000, 2), 0.5, dtype=torch.float64)
        )
    trajectories = decisions.trajectories(x)
    for first in range(3):
        of = trajectories.choices[:, 0] == first
        if of.sum() > 200:
            share = (trajectories.choices[of, 2] == 1).double().mean()
            said = torch.where(
                trajectories.choices[of, 2] == 1,
                evaluation.log_prob[of, 2].exp(),
                1 - evaluation.log_prob[of, 2].exp(),
            ).mean()
            assert abs(share - said) < 0.06


def test_advantages_are_those_of_the_recursion():
    values = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    active = torch.tensor([[True, False, True, False]])
    got = advantages(values, torch.tensor([1.0]), active, discount=0.9, gae_lambda=0.5)
    last = 1.0 - 0.3
    first = 0.9 * 0.3 - 0.1 + 0.9 * 0.5 * last
    assert torch.allclose(got, torch.tensor([[first, 0.0, last, 0.0]]))


def test_with_full_traces_and_no_decay_an_advantage_is_what_the_reward_exceeds_the_value_by():
    values = torch.rand(3, 5, generator=torch.Generator().manual_seed(0))
    reward = torch.tensor([1.0, 0.0, -1.0])
    got = advantages(
        values, reward, torch.ones(3, 5, dtype=torch.bool), discount=1.0, gae_lambda=1.0
    )
    assert torch.allclose(got, reward[:, None] - values, atol=1e-6)


def test_each_preference_has_its_own_best():
    y = np.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.6], [0.0, 0.0]])
    assert (
        scalarise(y, [0.95, 0.05]).argmax() == 0
        and scalarise(y, [0.05, 0.95]).argmax() == 1
        and scalarise(y, [0.5, 0.5]).argmax() == 2
    )
    assert (
        scalarise(y, [0.5, 0.5]).max() <= 0 and (scalarise(y, [0.5, 0.5]) >= -2).all()
    )


@pytest.fixture(scope="module")
def study() -> optuna.Study:
    return searched(50)


def test_it_learns_what_breaks_a_model_and_what_each_preference_wants(study):
    early, late = study.trials[:20], study.trials[-20:]
    broken = [
        np.mean([list(t.params.values()).count("c") for t in part])
        for part in (early, late)
    ]
    assert broken[1] < broken[0]
    front = np.array([t.values for t in study.best_trials])
    assert (
        front[:, 0].max() > 0.6 and front[:, 1].max() > 0.6
    )  # one training, both ends


def test_samples_follow_the_preference(study):
    policy = study.sampler.proposer
    network, decisions = policy._learner.network, policy._learner.decisions
    with torch.no_grad():
        ends = [
            network.sample(np.tile(p, (100, 1)), np.random.default_rng(0))
            for p in ([0.95, 0.05], [0.05, 0.95])
        ]
    shares = [
        np.mean(
            [
                [
                    v == "a"
                    for k, v in decisions.encoding.decode(row).items()
                    if k != "scale"
                ]
                for row in x
            ]
        )
        for x in ends
    ]
    assert shares[0] > shares[1] + 0.2


def test_a_trial_that_comes_in_late_is_learnt_from_in_its_place():
    study = searched(12)
    again = optuna.create_study(directions=["maximize"] * 2, sampler=study.sampler)
    again.add_trials([study.trials[i] for i in (0, 1, 2, 3, 4, 5, 7, 6, 8)])
    fresh = PointSampler(PolicyProposer(n_startup=6), space=SPACE, n_startup=6)
    other = optuna.create_study(directions=["maximize"] * 2, sampler=fresh)
    other.add_trials(again.trials)
    assert again.ask(SPACE).params == other.ask(SPACE).params


def test_the_number_of_threads_changes_nothing():
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append([t.params for t in searched(9).trials])
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"updates": 0}, "updates of 1 or more"),
        ({"random_decisions": -1}, "random_decisions of 0 or more"),
        ({"discount": 0.0}, "0 < discount"),
    ],
)
def test_settings_that_cannot_be(wrong, told):
    with pytest.raises(ConfigError, match=told):
        PolicyProposer(**wrong)
