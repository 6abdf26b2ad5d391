"""The progress bar of `Study.optimize`, in terminals and notebooks."""

import sys
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm

    from paretomerge.study.event import Event, HeldOutEvent


class ProgressBar:
    """Shows the trials of a run: `with ProgressBar() as progress: study.run(progress.trial)`."""

    def __init__(self, shown: bool = True) -> None:
        self._shown = shown
        self._bar: tqdm[None] | None = None

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def trial(self, event: "Event") -> None:
        """Show a finished trial.

        Args:
            event: What the loop reports of it.
        """
        if not self._shown:
            return
        if self._bar is None:
            self._bar = _make_bar(event.total, event.done - 1, "trial")
        text = f"hypervolume {event.hypervolume:.3g}"
        self._bar.set_postfix_str(text, refresh=False)
        # Set and not advanced by one: repeated recipes do not count towards the budget.
        self._bar.n = event.done
        self._bar.refresh()

    def held_out(self, event: "HeldOutEvent") -> None:
        """Show that a trial was scored on held-out examples.

        Args:
            event: Which trial, and how many are left.
        """
        if not self._shown:
            return
        if event.done == 1:
            # A bar of its own: the rate and the time that is left are those of this pass.
            if self._bar is not None:
                self._bar.close()
            self._bar = _make_bar(event.total, 0, "held-out model")
        if self._bar is not None:
            self._bar.set_postfix_str(event.trial.name, refresh=False)
            self._bar.n = event.done
            self._bar.refresh()


def _make_bar(total: int, done: int, unit: str) -> "tqdm[None]":
    if "ipykernel" in sys.modules:
        from tqdm.auto import tqdm
    else:
        from tqdm import tqdm
    return tqdm(total=total, initial=done, unit=unit, dynamic_ncols=True)
