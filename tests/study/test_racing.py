import numpy as np
import pytest
from scipy.special import expit

from paretomerge.config import load_study
from paretomerge.errors import ConfigError
from paretomerge.evaluate.evaluator import All, Fact, Objective, Score
from paretomerge.pareto.front import hypervolume
from paretomerge.search.mmmo import MMMOSampler
from paretomerge.study.goals import Goals
from paretomerge.study.racing import Racing, expected_gain, stratified_order
from paretomerge.study.study import Study
from tests.study.test_study import make
from tests.test_config import write

ITEMS = {"one": 200, "two": 300}


RACING = Racing(first=10)


class Quiz:
    """Two scores of many items, whose chances are smooth functions of a merge's weights. `asked` counts the items."""

    def __init__(self):
        self.asked = 0

    def items(self, split):
        return {name: range(n) for name, n in ITEMS.items()}

    def outcomes(self, live, split, wanted):
        found = {}
        state = live.model.state_dict()
        for which, (name, places) in enumerate(wanted.items() if len(wanted) == 2 else [(n, wanted.get(n, ())) for n in ITEMS]):
            weight = state["model.layers.0.mlp.up_proj.weight"].detach().float().numpy()
            skill = 40 * float(weight[: 16 * (1 + which)].mean()) * (1 - 2 * which)
            hard = np.random.default_rng(which).normal(size=ITEMS[name]) * 2
            luck = np.random.default_rng([which, int(abs(skill) * 1e6)]).random(ITEMS[name])
            right = luck < expit(skill - hard)
            self.asked += len(places) * (name in wanted)
            if name in wanted:
                found[name] = [float(right[i]) for i in places]
        return found

    def score(self, split, name, outcomes):
        return Score.mean_of(outcomes)

    def evaluate(self, live, split):
        everything = {name: range(n) for name, n in ITEMS.items()}
        return {name: self.score(split, name, found) for name, found in self.outcomes(live, split, everything).items()}


def raced(pico, folder, racing=RACING, more=(), names=("one", "two")) -> tuple[Study, Quiz]:
    plain, quiz = make(pico, folder / "unused"), Quiz()
    sampler = MMMOSampler(seed=0, space=plain.space.distributions, conditions=plain.space.conditions, n_startup=9)
    goals = Goals(All((quiz, *more)), tuple(Objective(name) for name in names), racing=racing)
    return Study(folder, plain.space, goals, sampler), quiz


def told(study):
    return [(t.number, dict(t.params), t.scores, t.final) for t in study.trials]


def test_hopeless_candidates_are_left_and_the_front_is_scored_on_everything(pico, tmp_path):
    study, quiz = raced(pico, tmp_path)
    study.run(20)
    trials = study.trials
    left = [t for t in trials if not t.final]
    assert left and all(not t.label for t in left)
    assert quiz.asked < 0.9 * 500 * len([t for t in trials if t.same_as is None])
    for t in left:
        n = [t.scores[name].n for name in ITEMS]
        assert all(10 <= k <= ITEMS[name] for k, name in zip(n, ITEMS, strict=True)) and sum(n) < 500
        assert all(t.scores[name].items is None and t.scores[name].stderr > 0 for name in ITEMS)
    front = study.front()
    assert front and all(t.final and t.scores["one"].n == 200 and len(t.scores["two"].items) == 300 for t in front)
    values, worst = np.array([t.values(study.objectives) for t in front]), np.array(study.reference)
    for t in left:  # nobody who was left is expected to add much
        assert expected_gain(np.array(t.values(study.objectives)), np.zeros(2), values, worst) < 0.005


def test_gains_are_those_of_drawing():
    front, worst = np.array([[1.0, 0.2], [0.5, 0.6]]), np.zeros(2)
    mean, error = np.array([0.7, 0.5]), np.array([0.1, 0.2])
    draws = mean + error * np.random.default_rng(0).standard_normal((4000, 2))
    now = hypervolume(front, worst)
    plain = np.mean([hypervolume(np.vstack([front, v.clip(0)]), worst) - now for v in draws]) / now
    assert expected_gain(mean, error, front, worst) == pytest.approx(plain, rel=0.1)
    assert expected_gain(np.array([0.4, 0.5]), np.zeros(2), front, worst) == 0


def test_estimates_are_near_what_all_items_say(pico, tmp_path):
    study, quiz = raced(pico, tmp_path)
    study.run(20)
    misses = []
    for t in study.trials:
        if not t.final:
            whole = quiz.evaluate(study.load(t), "search")
            misses += [(t.scores[name].value - whole[name].value) / t.scores[name].stderr for name in ITEMS]
    assert len(misses) >= 4 and np.sqrt(np.mean(np.square(misses))) < 2


def test_a_killed_race_goes_on_as_if_never_stopped(pico, tmp_path):
    whole, _ = raced(pico, tmp_path / "whole")
    whole.run(16)

    class StopError(BaseException):
        pass

    def stop(event):
        if event.done == 13:
            raise StopError

    part, _ = raced(pico, tmp_path / "part")
    with pytest.raises(StopError):
        part.run(16, stop)
    again, _ = raced(pico, tmp_path / "part")
    again.run(16)
    assert told(again) == told(whole)


def test_scores_that_have_no_items_are_had_at_once(pico, tmp_path):
    study, _ = raced(pico, tmp_path, more=(Fact("sparsity"),), names=("one", "two", "sparsity"))
    study.run(14)
    assert all(t.scores["sparsity"].n == 1 and t.scores["sparsity"].stderr == 0 for t in study.trials)


def test_without_tolerance_nothing_is_left(pico, tmp_path):
    study, quiz = raced(pico, tmp_path, Racing(tolerance=-1.0))
    study.run(12)
    assert all(t.final for t in study.trials) and quiz.asked == 500 * 12


def test_every_beginning_of_the_order_has_the_strata_in_proportion():
    correct = np.random.default_rng(0).integers(0, 4, 600)
    order = stratified_order(correct, 1)
    assert sorted(order) == list(range(600)) and (order != stratified_order(correct, 2)).any()
    for n in (20, 100, 300):
        shares = np.bincount(correct[order[:n]], minlength=4) / n
        assert np.abs(shares - np.bincount(correct) / 600).max() <= 1.01 / n


def test_study_yaml_says_whether_and_how(tmp_path, pico):
    assert load_study(write(tmp_path, pico))[0].goals.racing is None
    assert load_study(write(tmp_path, pico, evaluate={"race": True}, seed=3))[0].goals.racing == Racing(seed=3)
    assert load_study(write(tmp_path, pico, evaluate={"race": "2%"}))[0].goals.racing == Racing(0.02)
    with pytest.raises(ConfigError, match="race: expected the live model"):
        load_study(write(tmp_path, pico, evaluate={"race": True, "backend": "vllm"}))
    with pytest.raises(ConfigError, match="expected a percentage of the hypervolume"):
        load_study(write(tmp_path, pico, evaluate={"race": "2"}))
