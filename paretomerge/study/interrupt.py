"""Ctrl-C is always Ctrl-C, whatever a library makes of it.

Optimisers call back into Python from compiled code. Some turn the KeyboardInterrupt that is raised
there into an error of their own, which would count as a failed trial or as a bug.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupts:
    """Remembers that Ctrl-C was pressed: `with interrupts.watched(): ...`."""

    def __init__(self) -> None:
        self._pressed = False

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Raise KeyboardInterrupt for whatever error comes after Ctrl-C.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed.
        """
        self._pressed = False
        is_main = threading.current_thread() is threading.main_thread()
        previous = signal.getsignal(signal.SIGINT)
        # Only the main thread gets signals, and a handler of the user's must stay in force.
        if not is_main or previous is not signal.default_int_handler:
            yield
            return
        signal.signal(signal.SIGINT, self._handle)
        try:
            yield
        except Exception as error:
            if self._pressed:
                raise KeyboardInterrupt from error
            raise
        finally:
            signal.signal(signal.SIGINT, previous)

    def raise_if_pressed(self) -> None:
        """Raise KeyboardInterrupt if Ctrl-C was pressed, before an error is taken for a failure.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed.
        """
        if self._pressed:
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._pressed = True
        signal.default_int_handler(number, frame)
