"""Ctrl-C ends a search as Ctrl-C, whatever the library that it hits makes of it."""

import os
import signal

import pytest
from optuna.samplers import RandomSampler

from tests.study.test_search import make

pytestmark = pytest.mark.usefixtures("hears_ctrl_c")


def pressed(times=1):
    """Ctrl-C inside a library that turns it into an error of its own, as BoTorch does."""
    try:
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(1000):  # the signal arrives between two instructions
                pass
    except KeyboardInterrupt:
        raise RuntimeError("optimisation failed") from None


class Interrupted(RandomSampler):
    """Is interrupted at its fifth point."""

    def __init__(self, presses):
        super().__init__(seed=0)
        self.presses = presses

    def after_trial(self, *arguments):
        super().after_trial(*arguments)
        _, trial, *_ = arguments
        if trial.number == 4:
            pressed(self.presses)


# The first press lets the trial be recorded; the second stops in the middle.
@pytest.mark.parametrize(("presses", "recorded"), [(1, 5), (2, 4)])
def test_while_the_sampler_works(pico, tmp_path, presses, recorded):
    study = make(pico, tmp_path, sampler=Interrupted(presses))
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        study.run(8)
    assert signal.getsignal(signal.SIGINT) is before
    assert len(study.trials()) == recorded
    assert not [trial for trial in study.trials() if trial.failure]


@pytest.mark.parametrize(("presses", "recorded"), [(1, 3), (2, 2)])
def test_while_a_merge_is_scored(pico, tmp_path, presses, recorded, caplog):
    calls = []

    def score(model, tokenizer):
        calls.append(1)
        if len(calls) == 3:
            pressed(presses)
        return {"up": 1.0, "down": 0.0}

    study = make(pico, tmp_path, score, sampler=RandomSampler(seed=0))
    with pytest.raises(KeyboardInterrupt):
        study.run(8)
    assert len(study.trials()) == recorded
    assert "press Ctrl-C again to stop at once" in caplog.text
    assert study.results().end_reason == ""
    study.run(4)
    assert [trial.failure for trial in study.trials()] == [""] * 4


def test_other_errors_stay_what_they_are(pico, tmp_path):
    def score(model, tokenizer):
        raise RuntimeError("not interrupted")

    study = make(pico, tmp_path, score, sampler=RandomSampler(seed=0))
    study.run(2)
    assert all("not interrupted" in trial.failure for trial in study.trials())
