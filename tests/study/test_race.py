import numpy as np
import pytest
from scipy.special import expit

from paretomerge.errors import ConfigError
from paretomerge.evaluate.evaluator import (
    CombinedEvaluator,
    MergeFact,
    Objective,
    Score,
)
from paretomerge.search.mmmo.sampler import MMMOSampler
from paretomerge.study.goals import Goals
from paretomerge.study.race import (
    RaceSettings,
    drawn_gaps,
    least_decided,
    stratified_order,
)
from paretomerge.study.search import Search
from tests.studies import open_search
from tests.study.test_build import write
from tests.study.test_search import make

ITEMS = {"one": 200, "two": 300}


RACING = RaceSettings(first=10)


class Quiz:
    """Two scores of many items, whose chances are smooth functions of a merge's weights.

    `asked` counts the items.
    """

    def __init__(self):
        self.asked = 0

    def examples(self, split):
        return {name: range(n) for name, n in ITEMS.items()}

    def example_scores(self, live, split, wanted):
        found = {}
        state = live.model.state_dict()
        for which, (name, places) in enumerate(
            wanted.items()
            if len(wanted) == 2
            else [(n, wanted.get(n, ())) for n in ITEMS]
        ):
            weight = state["model.layers.0.mlp.up_proj.weight"].detach().float().numpy()
            skill = 40 * float(weight[: 16 * (1 + which)].mean()) * (1 - 2 * which)
            hard = np.random.default_rng(which).normal(size=ITEMS[name]) * 2
            luck = np.random.default_rng([which, int(abs(skill) * 1e6)]).random(
                ITEMS[name]
            )
            right = luck < expit(skill - hard)
            self.asked += len(places) * (name in wanted)
            if name in wanted:
                found[name] = [float(right[i]) for i in places]
        return found

    def aggregate(self, split, name, outcomes):
        return Score.mean_of(outcomes)

    def evaluate(self, live, split):
        everything = {name: range(n) for name, n in ITEMS.items()}
        return {
            name: self.aggregate(split, name, found)
            for name, found in self.example_scores(live, split, everything).items()
        }


def raced(
    pico, folder, race=RACING, more=(), names=("one", "two"), maximise=True
) -> tuple[Search, Quiz]:
    plain, quiz = make(pico, folder / "unused"), Quiz()
    sampler = MMMOSampler(
        seed=0,
        space=plain.space.distributions,
        conditions=plain.space.conditions,
        n_startup=9,
    )
    goals = Goals(
        CombinedEvaluator((quiz, *more)),
        tuple(Objective(name, maximise) for name in names),
        race=race,
    )
    return Search(folder, plain.space, goals, sampler), quiz


@pytest.fixture(scope="module")
def race(pico, tmp_path_factory):
    """A race of 24 trials; tests read it and leave it as it is."""
    study, quiz = raced(pico, tmp_path_factory.mktemp("race"))
    study.run(24)
    return study, quiz, quiz.asked


def told(study):
    return [(t.number, dict(t.params), t.scores, t.final) for t in study.trials()]


def test_dominated_candidates_are_left_and_the_front_is_scored_on_everything(race):
    study, _, asked = race
    trials = study.trials()
    left = [t for t in trials if not t.final]
    assert left and all(not t.label for t in left)
    assert asked < 0.9 * 500 * len([t for t in trials if t.same_as is None])
    for t in left:
        n = [t.scores[name].n for name in ITEMS]
        assert (
            all(10 <= k <= ITEMS[name] for k, name in zip(n, ITEMS, strict=True))
            and sum(n) < 500
        )
        assert all(
            t.scores[name].example_scores is None and t.scores[name].stderr > 0
            for name in ITEMS
        )
    front = study.front()
    assert front and all(
        t.final
        and t.scores["one"].n == 200
        and len(t.scores["two"].example_scores) == 300
        for t in front
    )


def test_who_was_left_is_dominated_on_all_items(race):
    study, quiz, _ = race
    left = [t for t in study.trials() if not t.final]
    whole = [quiz.evaluate(study.load(t), "search") for t in left]
    front = [[t.scores[name].value for name in ITEMS] for t in study.front()]
    beaten = [
        any(
            all(f[k] >= scores[name].value for k, name in enumerate(ITEMS))
            for f in front
        )
        for scores in whole
    ]
    assert len(left) >= 4 and sum(beaten) >= len(left) - 1


def test_fewer_is_better_where_the_user_says_so(pico, tmp_path):
    """The same race with both scores turned round leaves others."""
    study, quiz = raced(pico, tmp_path, maximise=False)
    study.run(18)
    left = [t for t in study.trials() if not t.final]
    front = [[t.scores[name].value for name in ITEMS] for t in study.front()]
    beaten = [
        any(
            all(
                f[k] <= quiz.evaluate(study.load(t), "search")[name].value
                for k, name in enumerate(ITEMS)
            )
            for f in front
        )
        for t in left
    ]
    assert left and sum(beaten) >= len(left) - 1


@pytest.mark.parametrize("n", [20, 100, 190])
def test_gaps_on_all_items_lie_within_what_some_say(n):
    """The probability that is stated of a sign is how often it comes true."""
    rng = np.random.default_rng(n)
    stated, came = [], []
    for _ in range(300):
        right = rng.random((2, 200)) < expit(
            rng.normal(size=200) + np.array([[rng.normal(0, 0.6)], [0.0]])
        )
        gaps = (right[0].astype(float) - right[1])[:, None]
        stated.append((drawn_gaps(gaps[:n], 200, 1.0, rng) > 0).mean())
        came.append(gaps.mean() > 0)
    stated, came = np.array(stated), np.array(came)
    for low, high in ((0.0, 0.2), (0.2, 0.8), (0.8, 1.01)):
        there = (stated >= low) & (stated < high)
        assert (
            there.sum() > 10 and abs(stated[there].mean() - came[there].mean()) < 0.12
        )


def test_gaps_to_rivals_are_drawn_together_and_few_equal_items_are_no_certainty():
    rng = np.random.default_rng(0)
    one = rng.integers(-1, 2, (30, 1)).astype(float)
    drawn = drawn_gaps(np.hstack([one, one + 0.1]), 100, 1.0, rng)
    assert np.allclose(drawn[:, 1] - drawn[:, 0], 0.1, atol=0.03)
    assert 0.3 < (drawn_gaps(np.zeros((24, 1)), 600, 1.0, rng) > 0).mean() < 0.7
    assert (drawn_gaps(one, 30, 1.0, rng) == one.mean()).all()


def test_the_first_to_solve_anything_is_not_left(pico, tmp_path):
    """As long as nobody solves an item, items without gaps say nothing of the next ones."""

    class Hard(Quiz):
        def example_scores(self, live, split, wanted):
            found = super().example_scores(live, split, wanted)
            late = self.asked > 500 * 9
            return {
                n: [
                    x if late and at >= 100 else 0.0
                    for x, at in zip(found[n], wanted[n], strict=True)
                ]
                for n in found
            }

    plain, quiz = make(pico, tmp_path / "unused"), Hard()
    sampler = MMMOSampler(
        seed=0,
        space=plain.space.distributions,
        conditions=plain.space.conditions,
        n_startup=9,
    )
    study = Search(
        tmp_path,
        plain.space,
        Goals(
            CombinedEvaluator((quiz,)),
            (Objective("one"), Objective("two")),
            race=RACING,
        ),
        sampler,
    )
    study.run(12)
    assert (
        sum(t.scores["one"].value > 0 for t in study.trials()) >= 2
        and len(study.front()) >= 1
    )
    assert next(t for t in study.trials() if not t.label).final


def test_items_go_to_the_score_that_decides():
    sure, even = np.ones((10, 2), dtype=bool), np.tile([[True], [False]], (5, 2))
    assert least_decided({"a": sure, "b": even}, ["a", "b"]) == "b"
    assert least_decided({"a": even, "b": even}, ["b"]) == "b"
    assert (
        least_decided({"a": sure, "b": even}, ["watched", "a"]) == "a"
    )  # a bound alone decides nothing
    behind = ~sure
    beaten = {
        "a": np.hstack([even[:, :1], sure[:, :1]]),
        "b": np.hstack([behind[:, :1], even[:, :1]]),
    }
    assert (
        least_decided(beaten, ["a", "b"]) == "b"
    )  # even odds in `a` are against one who is behind in `b`


def test_estimates_are_near_what_all_items_say(race):
    study, quiz, _ = race
    misses = []
    for t in study.trials():
        if not t.final:
            whole = quiz.evaluate(study.load(t), "search")
            misses += [
                (t.scores[name].value - whole[name].value) / t.scores[name].stderr
                for name in ITEMS
            ]
    assert len(misses) >= 4 and np.sqrt(np.mean(np.square(misses))) < 2


def test_a_killed_race_goes_on_as_if_never_stopped(pico, tmp_path):
    whole, _ = raced(pico, tmp_path / "whole")
    whole.run(14)

    class StopError(BaseException):
        pass

    def stop(event):
        if event.done == 12:
            raise StopError

    part, _ = raced(pico, tmp_path / "part")
    with pytest.raises(StopError):
        part.run(14, stop)
    again, _ = raced(pico, tmp_path / "part")
    again.run(14)
    assert told(again) == told(whole)


def test_scores_that_have_no_items_are_had_at_once(pico, tmp_path):
    study, _ = raced(
        pico, tmp_path, more=(MergeFact("sparsity"),), names=("one", "two", "sparsity")
    )
    study.run(11)
    assert all(
        t.scores["sparsity"].n == 1 and t.scores["sparsity"].stderr == 0
        for t in study.trials()
    )


def test_where_nothing_is_sure_enough_nobody_is_left(pico, tmp_path):
    study, quiz = raced(pico, tmp_path, RaceSettings(confidence=1.0))
    study.run(12)
    assert all(t.final for t in study.trials()) and quiz.asked == 500 * 12


def test_every_beginning_of_the_order_has_the_strata_in_proportion():
    correct = np.random.default_rng(0).integers(0, 4, 600)
    order = stratified_order(correct, 1)
    assert (
        sorted(order) == list(range(600))
        and (order != stratified_order(correct, 2)).any()
    )
    for n in (20, 100, 300):
        shares = np.bincount(correct[order[:n]], minlength=4) / n
        assert np.abs(shares - np.bincount(correct) / 600).max() <= 1.01 / n


def test_study_yaml_says_whether_and_how(tmp_path, pico):
    assert open_search(write(tmp_path, pico)).goals.race is None
    raced_study = open_search(write(tmp_path, pico, evaluate={"race": True}, seed=3))
    assert raced_study.goals.race == RaceSettings(seed=3)
    assert open_search(
        write(tmp_path, pico, evaluate={"race": "90%"})
    ).goals.race == RaceSettings(0.9)
    with pytest.raises(
        ConfigError, match="race: does not work with the backend sglang"
    ):
        open_search(write(tmp_path, pico, evaluate={"race": True, "backend": "sglang"}))
    with pytest.raises(
        ConfigError, match="a confidence of 50% or more, such as 95%, not 2%"
    ):
        open_search(write(tmp_path, pico, evaluate={"race": "2%"}))
    with pytest.raises(ConfigError, match="a percentage of confidence"):
        open_search(write(tmp_path, pico, evaluate={"race": "2"}))
