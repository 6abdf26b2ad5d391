import numpy as np
import pytest
from optuna.samplers import RandomSampler

from paretomerge.decide.optimism import optimism
from paretomerge.evaluate.evaluator import Objective, Score
from paretomerge.report.html import write_report
from paretomerge.study.goals import Goals
from tests.study.test_search import make

N = 100


class Coins:
    """Merges that are all alike: whatever is best among them is lucky."""

    def __init__(self):
        self.rng = np.random.default_rng(0)

    def evaluate(self, live, split):
        flips = {
            name: (self.rng.random(N) < 0.5).astype(float) for name in ("a", "wrong")
        }
        return {name: Score.mean_of(items.tolist()) for name, items in flips.items()}


@pytest.fixture
def study(pico, tmp_path):
    made = make(pico, tmp_path, sampler=RandomSampler(seed=0))
    objectives = (Objective("a"), Objective("wrong", maximise=False))
    made.goals = Goals(Coins(), objectives)
    made.record.objectives = objectives
    return made


def test_the_luckiest_of_equals_are_expected_to_look_better_than_they_are(study):
    assert optimism(study.results()) == []
    study.run(30)
    assert optimism(study.results()) == []
    study.hold_out(study.front())
    for found, sign in zip(optimism(study.results()), (1, -1), strict=True):
        assert found.measured == pytest.approx(sign * (found.search - found.held_out))
        assert (
            found.measured > 0.02 and found.expected > 0.02
        )  # of 30 coins, the front is a standard error or more above
        assert abs(found.corrected - 0.5) < abs(found.search - 0.5)
        assert found.corrected == pytest.approx(found.search - sign * found.expected)
        assert 0 < found.stderr < 0.1


def test_one_candidate_has_nothing_to_be_chosen_from(study):
    study.run(1)
    study.hold_out(study.trials())
    assert all(abs(found.expected) < 0.01 for found in optimism(study.results()))


def test_the_report_tells(study, tmp_path):
    study.run(12)
    study.hold_out(study.front())
    page = write_report(study.results(), tmp_path / "r.html").read_text()
    assert "Optimism of the search scores" in page and "<td>wrong</td>" in page
