"""SIGTERM, by which clusters and containers end a job, is taken as Ctrl-C.

By default it ends a process on the spot: the files of a merge that is being written would stay.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def taken_as_ctrl_c() -> Iterator[None]:
    """Take SIGTERM as Ctrl-C while the body runs, unless something handles it already."""
    # Only the main thread may set what a signal does.
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _handle(number: int, frame: FrameType | None) -> None:
    on_ctrl_c = signal.getsignal(signal.SIGINT)
    # A job in the background is started deaf to Ctrl-C. SIGTERM ends it all the same.
    if not callable(on_ctrl_c):
        raise KeyboardInterrupt
    on_ctrl_c(signal.SIGINT, frame)
