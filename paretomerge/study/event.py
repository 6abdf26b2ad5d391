"""What a running search reports to whoever shows its progress; importing it loads no model."""

from collections.abc import Mapping
from dataclasses import dataclass

from paretomerge.record.trial import Trial


@dataclass(frozen=True)
class Event:
    """What a run reports of each trial that it made.

    Attributes:
        trial: The trial.
        done: Trials so far that count towards the budget.
        total: The budget.
        hypervolume: The hypervolume of all trials so far.
        seconds: Wall-clock seconds by stage, the writing of the record included.
    """

    trial: Trial
    done: int
    total: int
    hypervolume: float
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class HeldOutEvent:
    """What is reported of each trial that was scored on held-out examples.

    Attributes:
        trial: The trial, with its held-out scores.
        done: Trials of this pass that are scored.
        total: Trials that this pass scores.
    """

    trial: Trial
    done: int
    total: int
