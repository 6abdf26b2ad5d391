"""Finalists are scored on examples of their own, until it is clear which one is picked."""

import json
import random
import shutil
from dataclasses import replace

import numpy as np
import pytest

import paretomerge as pm
from paretomerge.decide.belief import Belief
from paretomerge.decide.pick import Choice, decide_for
from paretomerge.errors import ConfigError, EvaluationError
from paretomerge.evaluate.evaluator import CombinedEvaluator, Score
from paretomerge.evaluate.function import FunctionEvaluator
from paretomerge.pareto.preference import Preference
from paretomerge.study.identity import study_identity
from paretomerge.study.parts import study_pool
from paretomerge.study.selection import _digest, _finalists, _sources, select
from paretomerge.study.study import load_study
from tests.evaluate.test_tasks import HarnessTask, loader
from tests.study.test_build import write
from tests.study.test_race import ITEMS, Quiz, raced

MEAN = Preference.mean(2)


@pytest.mark.parametrize("splits", [None, {"search": "train", "held_out": "train"}])
def test_selection_examples_are_apart_from_all_others(tmp_path, splits) -> None:
    tasks = loader(
        tmp_path, 20, search_items=5, selection_items=6, held_out_items=7, splits=splits
    )
    spec = HarnessTask("letters")
    contents = {}
    for split in ("search", "selection", "held_out"):
        contents[split] = set(tasks.load("mine", spec, split).content_digests)
    assert [len(found) for found in contents.values()] == [5, 6, 7]
    assert not contents["search"] & contents["selection"]
    if splits is None:
        assert not contents["held_out"] & (contents["search"] | contents["selection"])


def test_without_a_spare_example_nothing_begins(tmp_path) -> None:
    splits = {"search": "train", "held_out": "train"}
    tasks = loader(tmp_path, 5, search_items=5, selection_items=2, splits=splits)
    with pytest.raises(EvaluationError, match="set a smaller `search_items`"):
        tasks.load("mine", HarnessTask("letters"), "selection")
    tasks = loader(tmp_path, 5, search_items=3, selection_items=2)
    with pytest.raises(EvaluationError, match="between 1 and 2 beside 2 selection_"):
        tasks.load("mine", HarnessTask("letters"), "search")


@pytest.fixture(scope="module")
def searched_folder(pico, tmp_path_factory):
    folder = tmp_path_factory.mktemp("selection") / "s"
    search, _ = raced(pico, folder, race=None)
    search.run(16)
    return folder


@pytest.fixture
def searched(searched_folder, pico, tmp_path):
    """A search of 16 trials, in a folder of the test's own."""
    shutil.copytree(searched_folder, tmp_path / "s")
    return raced(pico, tmp_path / "s", race=None)


def test_finalists_are_scored_and_the_leader_stays_or_changes(searched) -> None:
    search, _ = searched
    scored = []
    select(search, MEAN, scored.append)
    finalists = {trial.number for trial in scored}
    trials = search.trials()
    assert len(finalists) >= 2
    for trial in trials:
        assert (trial.selection is not None) == (trial.number in finalists)
    decision = decide_for(search.results(), Choice("mean"))
    left = _finalists(Belief.of(search.results()), MEAN)
    spent = all(trial.selection["two"].n == ITEMS["two"] for trial in left)
    assert decision.probability >= 0.9 or spent
    # `Quiz` gives the same answers for every split: the scores in the shuffled order are known.
    for number in finalists:
        for name, score in trials[number].selection.items():
            order = list(range(ITEMS[name]))
            random.Random(0).shuffle(order)
            answers = trials[number].scores[name].example_scores
            expected = tuple(answers[i] for i in order[: score.n])
            assert score.example_scores == expected


class Unlike(Quiz):
    """The second score is no mean over examples."""

    def aggregate(self, split, name, outcomes):
        score = Score.mean_of(outcomes)
        if name == "one":
            return score
        return Score(score.value**2, score.stderr, score.n)


def test_scores_that_are_no_means_do_not_keep_it_busy(pico, tmp_path) -> None:
    search, _ = raced(pico, tmp_path / "s", race=None)
    search.goals = replace(search.goals, evaluator=Unlike())
    search.run(12)
    scored = []
    select(search, MEAN, scored.append)
    for trial in search.trials():
        assert set(trial.selection or {}) <= {"one"}
    assert len(scored) <= 4 * 12


def test_many_equal_trials_are_measured_too(searched) -> None:
    search, _ = searched
    belief = Belief.of(search.results())
    n = 150
    equal = replace(
        belief,
        trials=belief.trials[:1] * n,
        mean=np.full((n, 2), 0.5),
        covariance=np.tile(0.01 * np.eye(n), (2, 1, 1)),
    )
    assert len(_finalists(equal, MEAN)) >= 4


def test_scores_on_other_selection_examples_are_forgotten(searched) -> None:
    search, quiz = searched
    select(search, MEAN)
    search.record.forget_other_selection("other")
    assert all(trial.selection is None for trial in search.trials())
    quiz.asked = 0
    select(search, MEAN)
    assert quiz.asked


class Dice:
    """A function whose score is random, as that of an agent in a simulator is."""

    def __init__(self) -> None:
        self.rng = random.Random(0)
        self.thrown: list[tuple[float, float]] = []

    def __call__(self, model, tokenizer):
        weights = model.get_input_embeddings().weight
        value = float(weights.abs().mean())
        self.thrown.append((value, self.rng.gauss(0, 0.02)))
        noisy = sum(self.thrown[-1])
        return {"noisy": Score(noisy, 0.02, n=5), "exact": Score(value)}


def test_random_functions_are_called_again_for_the_finalists(pico, tmp_path) -> None:
    dice = Dice()
    search, _ = raced(pico, tmp_path / "s", race=None, names=("dice/noisy", "one"))
    quiz = search.goals.evaluator.evaluators[0]
    evaluator = CombinedEvaluator((FunctionEvaluator("dice", dice), quiz))
    search.goals = replace(search.goals, evaluator=evaluator)
    search.run(12)
    asked = quiz.asked
    dice.thrown.clear()
    alone = Preference((1.0, 0.0), "tchebycheff")
    select(search, alone, examples=False, repeats=8)
    assert quiz.asked == asked
    measured = [t.selection for t in search.trials() if t.selection]
    assert len(measured) >= 2
    thrown = [sum(pair) for pair in dice.thrown]
    for scores in measured:
        assert scores.keys() == {"dice/noisy"}
        score = scores["dice/noisy"]
        repeats = score.example_scores
        assert set(repeats) <= set(thrown)
        # Each call is the mean of 5 games, by its own word.
        assert score.n == 5 * len(repeats)
        assert score.value == pytest.approx(sum(repeats) / len(repeats))
    assert sum(len(s["dice/noisy"].example_scores) for s in measured) == len(thrown)
    n = len(dice.thrown)
    # With more calls allowed, those that were made count.
    select(search, alone, examples=False, repeats=8)
    assert len(dice.thrown) == n


def test_repeats_of_a_function_that_is_not_random_do_not_count(
    pico, tmp_path, caplog
) -> None:
    def same(model, tokenizer):
        # As of questions that are the same at each call.
        value = float(model.get_input_embeddings().weight.abs().mean())
        return Score(value, 0.02, n=5)

    search, _ = raced(pico, tmp_path / "s", race=None, names=("same", "one"))
    quiz = search.goals.evaluator.evaluators[0]
    evaluator = CombinedEvaluator((FunctionEvaluator("same", same), quiz))
    search.goals = replace(search.goals, evaluator=evaluator)
    search.run(12)
    alone = Preference((1.0, 0.0), "tchebycheff")
    before = decide_for(search.results(), Choice({"same": 1.0}))
    called = []
    select(search, alone, called.append, examples=False, repeats=8)
    # Two of eight calls for each finalist, in the first of four rounds.
    assert 2 <= len(called) == len({trial.number for trial in called})
    assert all(trial.selection is None for trial in search.trials())
    after = decide_for(search.results(), Choice({"same": 1.0}))
    assert after.probability == before.probability < 0.9
    assert "same gave each merge the same score again" in caplog.text
    # What tasks were asked stays.
    select(search, MEAN, repeats=8)
    measured = [trial.selection for trial in search.trials() if trial.selection]
    assert measured and {name for scores in measured for name in scores} == {"one"}


def test_functions_that_give_no_error_are_not_called_again(pico, tmp_path) -> None:
    path = write(tmp_path, pico, trials=6, evaluate={"selection_repeats": 3})
    study = load_study(path)
    study.optimize(show_progress_bar=False)
    study.decide()
    assert all(trial.selection is None for trial in study.get_trials())


def test_the_default_pick_is_noted_anew(searched, tmp_path, pico) -> None:
    study = load_study(write(tmp_path, pico, trials=6))
    study.optimize(show_progress_bar=False)
    study.refine(n_trials=1)
    assert study.picked().number == study.decide().trial.number


def test_equal_splits_keep_the_selection_in_the_identity(tmp_path, pico) -> None:
    tasks = {"search_items": 2, "selection_items": 2}
    same = {"search": "train", "held_out": "train"}
    other = {"search": "train", "held_out": "test"}
    for splits, is_part in ((same, True), (other, False), (None, True)):
        path = write(tmp_path, pico, evaluate={"splits": splits, **tasks})
        settings = load_study(path).settings
        identity = study_identity(settings, study_pool(settings))
        assert (identity["evaluate"]["selection_items"] == 2) is is_part


def test_nothing_is_measured_twice(searched) -> None:
    search, quiz = searched
    select(search, MEAN)
    first = [trial.selection for trial in search.trials()]
    asked = quiz.asked
    assert asked
    select(search, MEAN)
    assert quiz.asked == asked
    assert [trial.selection for trial in search.trials()] == first


def test_a_clear_pick_costs_nothing(searched) -> None:
    search, quiz = searched
    search.record.forget_other_selection(_digest(_sources(search, True, 0)))
    for trial in search.trials():
        right = float(trial.number == 3)
        scores = {name: Score.mean_of([right] * 2000) for name in ITEMS}
        search.record.add_selection(trial.number, scores)
    decision = decide_for(search.results(), Choice("mean"))
    assert (decision.trial.number, decision.probability > 0.9) == (3, True)
    select(search, MEAN)
    assert not quiz.asked


def test_selection_items_need_spare_examples() -> None:
    with pytest.raises(ConfigError, match="set `search_items`, too"):
        pm.Evaluation(splits={"search": "a", "held_out": "b"}, selection_items=5)


def test_refining_adds_trials_and_says_what_was_believed(tmp_path, pico) -> None:
    study = load_study(write(tmp_path, pico, trials=8))
    with pytest.raises(pm.StudyError):
        study.refine(n_trials=2)
    study.optimize(show_progress_bar=False, held_out=False)
    with pytest.raises(ConfigError, match="'scoer'"):
        study.refine({"scoer": 1.0}, 2)
    found = study.refine({"score": 1.0}, 2)
    assert [entry.trial.number for entry in found] == [8, 9]
    assert len(study.get_trials()) == 10
    # Both functions are constant, so nothing else can be believed.
    for entry in found:
        assert entry.believed["score"].value == pytest.approx(1.0, abs=1e-3)
        assert entry.believed["other"].value == pytest.approx(2.0, abs=1e-3)


def test_a_preference_is_a_setting_that_may_change(tmp_path, pico) -> None:
    path = write(tmp_path, pico, trials=6, prefer={"score": 1.0})
    study = load_study(path)
    assert study.default_choice.text == "the preference score=1"
    study.optimize(show_progress_bar=False)
    again = load_study(path, ["prefer={other: 2}", "trials=7"])
    again.optimize(show_progress_bar=False)
    assert len(again.get_trials()) == 7
    assert again.to_config().prefer == {"other": 2.0}
    with pytest.raises(ConfigError, match="another unit"):
        load_study(path, ["prefer=mean"])
    with pytest.raises(ConfigError, match="'scorr'"):
        load_study(path, ["prefer={scorr: 1}"])
    random = load_study(path, ["sampler=random", "prefer={score: 1}"])
    assert any("ignores `prefer`" in note for note in random.check())


def test_the_front_is_shown_without_a_new_belief(tmp_path, pico, monkeypatch) -> None:
    study = load_study(write(tmp_path, pico, trials=6))
    study.optimize(show_progress_bar=False)
    number = study.decide().trial.number
    forbidden = "paretomerge.decide.pick.Belief.of"
    monkeypatch.setattr(forbidden, lambda results: pytest.fail("a belief was formed"))
    assert study.picked().number == number
    report = study.report(tmp_path / "report.html").read_text()
    assert f"trial {number}" in report or json.dumps(number) in report
