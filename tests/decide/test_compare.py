import numpy as np
import pytest
from scipy import stats

from paretomerge.decide.compare import Comparison
from paretomerge.errors import ConfigError, EvaluationError
from paretomerge.evaluate.evaluator import Score
from paretomerge.study.study import load_study
from tests.study.test_build import write

MODULE = """
from paretomerge.evaluate.evaluator import Score


def score(model, tokenizer, split):
    projection = model.model.layers[0].self_attn.q_proj.weight.detach()
    weight = float(projection.float().abs().sum()) * 1000
    n = 40 if split == "search" else 60
    return Score.mean_of([int(weight * (i + 3)) % 2 for i in range(n)])


def other(model, tokenizer):
    return 2.0
"""


def test_right_and_wrong_items_by_mcnemar():
    rng = np.random.default_rng(0)
    one, other = (
        (rng.random(200) < 0.7).astype(float),
        (rng.random(200) < 0.55).astype(float),
    )
    found = Comparison.of("t", one.tolist(), other.tolist())
    wins, losses = (
        int(((one == 1) & (other == 0)).sum()),
        int(((one == 0) & (other == 1)).sum()),
    )
    assert (found.only_one, found.only_other, found.n) == (wins, losses, 200)
    smaller = min(wins, losses)
    assert found.p == pytest.approx(
        min(1.0, 2 * stats.binom.cdf(smaller, wins + losses, 0.5))
    )  # both tails of a fair coin
    paired = stats.ttest_rel(one, other).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((paired.low, paired.high))
    assert found.difference == pytest.approx(one.mean() - other.mean())


def test_other_items_by_the_paired_t_test():
    rng = np.random.default_rng(1)
    one = rng.random(50)
    other = one + 0.02 * rng.standard_normal(50) + 0.01
    found = Comparison.of("t", one.tolist(), other.tolist())
    assert (
        found.p == pytest.approx(stats.ttest_rel(one, other).pvalue)
        and found.only_one is None
    )


def test_equal_models_do_not_differ():
    assert Comparison.of("t", [1.0, 0.0, 1.0], [1.0, 0.0, 1.0]).p == 1.0
    assert Comparison.of("t", [0.5, 0.2], [0.5, 0.2]).p == 1.0
    assert (
        Comparison.of("t", [0.5, 0.25], [0.25, 0.0]).p == 0.0
    )  # the same difference on every item


@pytest.mark.parametrize(
    ("one", "other", "told"),
    [([1.0], [1.0], "two examples or more"), ([1.0, 0.0], [1.0], "the same examples")],
)
def test_items_that_cannot_be_paired_are_refused(one, other, told):
    with pytest.raises(EvaluationError, match=told):
        Comparison.of("t", one, other)


@pytest.fixture
def study(tmp_path, pico):
    path = write(
        tmp_path,
        pico,
        objectives=[
            {"function": "by_item:score"},
            {"function": "by_item:other", "direction": "minimize"},
        ],
    )
    (tmp_path / "by_item.py").write_text(MODULE)
    study = load_study(path)
    study.optimize(4, show_progress_bar=False, held_out=False)
    return study


def test_trials_starts_and_checkpoints_are_compared(study, pico):
    (found,) = study.compare("ada", "3")
    assert found.task == "score" and found.n == 60
    trials = study.get_trials()
    assert (
        trials[0].held_out["score"].example_scores is not None
        and trials[3].held_out is not None
    )  # kept for the next time
    assert study.compare("0", "3") == [found]
    (searched,) = study.compare("0", "3", ["score"], "search")
    assert searched.n == 40 and searched.one == trials[0].scores["score"].value
    (itself,) = study.compare(str(pico / "ada"), "ada")
    assert itself.n == 60


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("adda", "3"), "name a trial below 4, a checkpoint, or one of: ada, bob"),
        (("99", "3"), "name a trial below 4"),
        (("0", "3", ["skore"]), "did you mean 'score'"),
    ],
)
def test_what_is_not_there_is_told(study, arguments, told):
    with pytest.raises(ConfigError, match=told):
        study.compare(*arguments)


def test_a_score_without_items_is_told(study):
    with pytest.raises(
        EvaluationError, match="other: this score has no per-example scores"
    ):
        study.compare("0", "3", ["other"])
    assert Score(2.0).example_scores is None
