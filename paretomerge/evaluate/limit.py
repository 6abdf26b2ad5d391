"""A time limit: whatever hangs is a failed trial, and the search goes on."""

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from paretomerge.errors import EvaluationError
from paretomerge.evaluate.evaluator import Evaluator, Live, Score, Split


class _TimeUp(BaseException):
    """Raised wherever the program happens to be; no `except Exception` of a task or a user holds it up."""


@dataclass(frozen=True)
class Limited:
    """`inner`, stopped after so many seconds where merges are searched among; held-out items may take their time.

    It works by the alarm of Unix, in the main thread: code that sleeps, waits or computes in Python stops at once, a single call
    into a library when it returns.
    """

    inner: Evaluator
    seconds: float

    @property
    def notes(self) -> list[str]:
        return list(getattr(self.inner, "notes", ()))

    def evaluate(self, live: Live, split: Split) -> Mapping[str, Score]:
        if split != "search":
            return self.inner.evaluate(live, split)
        with _within(self.seconds):
            return self.inner.evaluate(live, split)


@contextmanager
def _within(seconds: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        raise EvaluationError("time_limit: expected to run in the main thread of a Unix process, got another; leave it out")

    def ring(*_: object) -> None:
        raise _TimeUp

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except _TimeUp:
        raise EvaluationError(f"expected scores within {seconds:g} s (`evaluate.time_limit`), got none") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
