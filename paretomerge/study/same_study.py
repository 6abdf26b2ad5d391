"""Whether a record is that of a study, as far as can be said without loading anything."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from paretomerge.config.settings import StudySettings
from paretomerge.errors import StudyError
from paretomerge.record.changes import describe_changes
from paretomerge.record.moved import ROOT, exists
from paretomerge.record.record import Record
from paretomerge.space.sources import digest, model_path, neutral_path


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
    is_same = sorted(mine) == sorted(theirs) or _have_moved(mine, theirs)
    if not is_same and sorted(below) == sorted(identity["models"]):
        # Another study in the same database may have models of the same names.
        check_same_weights(settings, record)
    elif not is_same:
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


def check_same_weights(settings: StudySettings, record: Record) -> None:
    """Refuse models whose weights are not those that the trials of a record were scored with.

    Models that are not on this machine are not compared.

    Args:
        settings: The study.
        record: Its record.

    Raises:
        StudyError: A model has other weights.
    """
    identity = record.note("identity") or {}
    if "files of base" not in identity or "files of models" not in identity:
        return  # a `Search` that was made without settings
    of_base = _weights(settings, [settings.base])
    of_models = _weights(settings, settings.models)
    recorded = {*identity["files of models"], identity["files of base"]}
    changed = []
    for model, weights in (of_base | of_models).items():
        if weights not in recorded:
            changed.append(model)
    if not changed:
        # The right ones, but one of them twice, or in place of the base.
        surplus = Counter(of_models.values()) - Counter(identity["files of models"])
        surplus += Counter(of_base.values()) - Counter([identity["files of base"]])
        changed = [*of_base, *of_models] if surplus else []
    if changed:
        raise StudyError(
            f"{record.storage}: its trials were scored with other weights of {', '.join(changed)}. "
            "Set another `out` (another `study_name` where `storage` is set), or put the old "
            "weights back."
        )


def _weights(settings: StudySettings, models: Sequence[str]) -> dict[str, str]:
    """Model -> digest of its weights, of the models that are on this machine."""
    digests = {}
    for model in models:
        of_model = digest(model_path(settings.root, model))
        if of_model:
            digests[model] = of_model
    return digests


def _have_moved(mine: Sequence[str], theirs: Sequence[str]) -> bool:
    """Whether the record's models have gone, and models of the same names are named now."""
    gone = [path for path in theirs if not exists(path.partition("+")[0])]
    return bool(gone) and _names(mine) == _names(theirs)


def _names(paths: Sequence[str]) -> list[str]:
    return sorted(Path(path).name for path in paths)
