"""Ctrl-C once ends a search when the running trials are done, twice at once.

Optimisers call back into Python from compiled code. Some turn the KeyboardInterrupt that is raised
there into an error of their own, which would count as a failed trial or as a bug.
"""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_log = logging.getLogger(__name__)


class Interrupts:
    """Remembers how often Ctrl-C was pressed: `with interrupts.watched(): ...`."""

    def __init__(self) -> None:
        self._presses = 0

    @property
    def pressed(self) -> bool:
        """Whether Ctrl-C was pressed: nothing new should begin."""
        return self._presses > 0

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Count Ctrl-C; raise KeyboardInterrupt for the second one.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed, and the body has ended.
        """
        self._presses = 0
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
            # Whatever a library made of the KeyboardInterrupt.
            if self.pressed:
                raise KeyboardInterrupt from error
            raise
        finally:
            signal.signal(signal.SIGINT, previous)
        if self.pressed:
            raise KeyboardInterrupt

    def raise_if_insisted(self) -> None:
        """Raise KeyboardInterrupt if Ctrl-C was pressed twice, before an error counts as a failure.

        Raises:
            KeyboardInterrupt: It was pressed twice.
        """
        if self._presses > 1:
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._presses += 1
        if self._presses == 1:
            _log.warning(
                "Finishing what runs; press Ctrl-C again to stop at once and lose it."
            )
            return
        signal.default_int_handler(number, frame)
