"""Whether a record is that of a study, as far as can be said without loading anything."""

from collections.abc import Sequence
from pathlib import Path

from paretomerge.config.settings import StudySettings
from paretomerge.errors import StudyError
from paretomerge.record.changes import describe_changes
from paretomerge.record.moved import ROOT
from paretomerge.record.record import Record
from paretomerge.space.sources import model_path, neutral_path


def check_same_study(settings: StudySettings, record: Record) -> None:
    """Refuse the record of a study with other models or objectives.

    A search compares more, such as the files of models and tasks (`Record.check`).

    Args:
        settings: The study.
        record: The record.

    Raises:
        StudyError: The record is another study's.
    """
    identity = record.note("identity") or {}
    root = record.note(ROOT)
    if root is None or "models" not in identity:
        return  # a `Search` that was made without settings
    mine = [model_path(settings.root, model) for model in settings.models]
    theirs = [model_path(Path(root), model) for model in identity["models"]]
    recorded: dict[str, object] = {}
    now: dict[str, object] = {}
    # A study that was moved or copied with its models still has them at the same places below it.
    below = [neutral_path(settings.root, model) for model in settings.models]
    is_same = sorted(below) == sorted(identity["models"])
    is_same = is_same or sorted(mine) == sorted(theirs) or _have_moved(mine, theirs)
    if not is_same:
        recorded["models"], now["models"] = theirs, mine
    names = [measure.name for measure in settings.objectives]
    recorded_names = [objective.name for objective in record.objectives]
    if names != recorded_names:
        recorded["objectives"], now["objectives"] = recorded_names, names
    # Not strict: with other objectives there may be fewer.
    for measure, objective in zip(settings.objectives, record.objectives, strict=False):
        maximise = measure.direction == "maximize"
        # Without a direction it is the task's own, which only the harness knows.
        if measure.direction is not None and maximise != objective.maximise:
            key = f"the direction of {measure.name}"
            recorded[key] = "maximize" if objective.maximise else "minimize"
            now[key] = measure.direction
    if now:
        raise StudyError(
            f"{record.storage}: holds trials of another study: {describe_changes(recorded, now)}. "
            "Set another `out`, or put the old settings back."
        )


def _have_moved(mine: Sequence[str], theirs: Sequence[str]) -> bool:
    """Whether the record's models have gone, and models of the same names are named now."""
    gone = [path for path in theirs if not Path(path.partition("+")[0]).exists()]
    return bool(gone) and _names(mine) == _names(theirs)


def _names(paths: Sequence[str]) -> list[str]:
    return sorted(Path(path).name for path in paths)
