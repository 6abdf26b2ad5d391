"""A time limit: whatever hangs is a failed trial, and the search goes on."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from paretomerge.errors import EvaluationError


class _TimeUp(BaseException):
    """Raised wherever the program happens to be; no `except Exception` of a task or a user holds it up."""


@contextmanager
def within(seconds: float | None) -> Iterator[None]:
    """Raises EvaluationError once so many seconds have passed; None for no limit.

    It works by the alarm of Unix, in the main thread: code that sleeps, waits or computes in Python stops at once, a single call
    into a library when it returns.
    """
    if seconds is None:
        yield
        return
    if threading.current_thread() is not threading.main_thread() or not hasattr(
        signal, "setitimer"
    ):
        raise EvaluationError(
            "time_limit: expected to run in the main thread of a Unix process, got another; leave it out"
        )

    def ring(*_: object) -> None:
        raise _TimeUp

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except _TimeUp:
        raise EvaluationError(
            f"expected scores within {seconds:g} s (`evaluate.time_limit`), got none"
        ) from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
