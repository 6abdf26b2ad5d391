from types import SimpleNamespace

import pytest
import torch

from paretomerge.evaluate import speed
from paretomerge.evaluate.evaluator import Candidate
from paretomerge.evaluate.speed import SpeedEvaluator
from tests.studies import open_search
from tests.study.test_build import write


class Stepping(torch.nn.Module):
    """A model whose every step takes as long as a clock of ours says; the first ones longer."""

    device = torch.device("cpu")

    def __init__(self, clock):
        super().__init__()
        self.embedding, self.clock, self.calls = torch.nn.Embedding(7, 2), clock, []

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, tokens, past_key_values=None, use_cache=False):
        self.calls.append((tokens.shape[1], past_key_values))
        self.clock[0] += 100.0 if len(self.calls) < 5 else 0.25
        return SimpleNamespace(
            logits=torch.zeros(1, tokens.shape[1], 7), past_key_values=len(self.calls)
        )


def test_steps_are_timed_one_token_at_a_time_once_warm(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(speed, "_synchronized_time", lambda device: clock[0])
    model = Stepping(clock)
    score = SpeedEvaluator("pace").evaluate(Candidate(model, None, {}), "search")[
        "pace"
    ]
    assert score.value == 0.25 and score.stderr == 0 and score.n == 32
    assert model.calls[0] == (32, None) and all(
        length == 1 and past == i + 1
        for i, (length, past) in enumerate(model.calls[1:])
    )


def test_a_live_model_has_a_pace_that_is_better_the_smaller(tmp_path, pico):
    study = open_search(
        write(
            tmp_path,
            pico,
            objectives=[{"function": "mine:score"}, {"size": "seconds_per_token"}],
        )
    )
    assert [(o.name, o.maximise) for o in study.goals.objectives] == [
        ("score", True),
        ("seconds_per_token", False),
    ]
    study.run(2)
    score = study.trials()[1].scores["seconds_per_token"]
    assert score.value > 0 and score.n == 32


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.000423, "0.00042"), (0.0033, "0.003"), (0.0, "0.000"), (0.97, "0.970")],
)
def test_small_scores_can_be_told_apart(value, text):
    from paretomerge.evaluate.evaluator import Score

    assert Score(value, 0.001, 32).text == text
