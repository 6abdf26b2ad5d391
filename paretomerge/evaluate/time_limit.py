"""A time limit for scoring: a candidate that hangs is a failed trial, and the search goes on."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from paretomerge.errors import EvaluationError


class _TimeLimitReached(BaseException):
    """Not an Exception, so that no `except Exception` of a task or a user swallows it."""


@contextmanager
def enforce_time_limit(seconds: float | None) -> Iterator[None]:
    """Interrupt the body after some seconds.

    The limit uses the alarm of Unix. Code that sleeps, waits or computes in Python stops at once;
    a single call into a C library stops when it returns.

    Args:
        seconds: The limit; None for no limit.

    Raises:
        EvaluationError: The time is up, or the limit cannot be set: alarms need the main thread
            of a Unix process.

    Example:
        >>> with enforce_time_limit(30):
        ...     total = sum(range(10))
    """
    if seconds is None:
        yield
        return
    # Python refuses to set signal handlers elsewhere, and Windows has no `setitimer`.
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or not hasattr(signal, "setitimer"):
        raise EvaluationError(
            "`evaluate.time_limit` works only in the main thread of a Unix process. Remove it"
        )

    def interrupt(*_: object) -> None:
        raise _TimeLimitReached

    previous_handler = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except _TimeLimitReached:
        raise EvaluationError(
            f"scoring took longer than {seconds:g} s (`evaluate.time_limit`)"
        ) from None
    finally:
        # The alarm first: it must not reach the previous handler.
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous_handler)


@contextmanager
def suspended_time_limit() -> Iterator[None]:
    """Stop the clock of `enforce_time_limit` for the body; without a limit nothing happens."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or not hasattr(signal, "setitimer"):
        yield
        return
    remaining, _ = signal.setitimer(signal.ITIMER_REAL, 0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, remaining)
