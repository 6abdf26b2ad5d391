import contextlib
import signal
import threading
import time

import pytest

from paretomerge.errors import EvaluationError
from paretomerge.evaluate.evaluator import Candidate
from paretomerge.evaluate.function import FunctionEvaluator
from paretomerge.evaluate.time_limit import enforce_time_limit
from tests.studies import open_search
from tests.study.test_build import write


def stubborn(model, tokenizer, split):
    """Hangs, and catches every error that it is sent."""
    while split == "search":
        with contextlib.suppress(Exception):
            time.sleep(0.01)
    return 1.0


def test_what_hangs_is_stopped_and_the_alarm_is_put_back():
    def mine(*_):
        raise AssertionError

    before = signal.signal(signal.SIGALRM, mine)
    try:
        with (
            pytest.raises(
                EvaluationError, match=r"longer than 0\.1 s \(`evaluate.time_limit`\)"
            ),
            enforce_time_limit(0.1),
        ):
            FunctionEvaluator("f", stubborn).evaluate(
                Candidate(None, None, {}), "search"
            )
        assert signal.getsignal(signal.SIGALRM) is mine and signal.getitimer(
            signal.ITIMER_REAL
        ) == (0.0, 0.0)
    finally:
        signal.signal(signal.SIGALRM, before)


def test_what_is_done_in_time_is_left_alone():
    done = []
    for limit in (30, None):
        with enforce_time_limit(limit):
            done.append(limit)
    assert done == [30, None]


def test_elsewhere_than_in_the_main_thread_it_is_told():
    told = []

    def run():
        with pytest.raises(EvaluationError, match="main thread"), enforce_time_limit(1):
            told.append(False)
        told.append(True)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert told == [True]


def test_a_trial_that_hangs_has_failed_and_the_search_goes_on(tmp_path, pico):
    path = write(
        tmp_path,
        pico,
        evaluate={"time_limit": 0.5},
        objectives=[{"function": "hanging:score"}],
    )
    (tmp_path / "hanging.py").write_text(
        "import time\n\nseen = []\n\n\ndef score(model, tokenizer):\n    seen.append(1)\n"
        "    time.sleep(60 if len(seen) == 3 else 0)\n    return 1.0\n"
    )
    study = open_search(path)
    study.run(5)
    assert [bool(t.failure) for t in study.trials()] == [
        False,
        False,
        True,
        False,
        False,
    ]
    assert "time_limit" in study.trials()[2].failure
