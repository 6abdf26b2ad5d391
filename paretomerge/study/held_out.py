"""Score trials on held-out examples where the record has no scores yet."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from paretomerge.config.settings import StudySettings
from paretomerge.evaluate.measures import Function
from paretomerge.record.record import WATCHED, Record
from paretomerge.record.trial import Trial
from paretomerge.study.event import HeldOutEvent
from paretomerge.study.measure_digest import measure_digest

if TYPE_CHECKING:
    from paretomerge.study.search import Search


def score_missing(
    settings: StudySettings,
    record: Record,
    search: Callable[[], "Search"],
    trials: Sequence[Trial],
    watched: Sequence[Trial] = (),
    watch: Callable[[HeldOutEvent], None] = lambda event: None,
) -> None:
    """Score trials on held-out examples; what is in the record is not scored again.

    Args:
        settings: The study.
        record: Its record.
        search: Loads the study, with its models; called only if a score is missing.
        trials: The trials.
        watched: Those of them that are scored on the watched measures, too.
        watch: Called after each trial that was scored.

    Raises:
        EvaluationError: A trial cannot be scored; the message names it.
    """
    numbers = set()
    if settings.watch:
        numbers = {trial.number for trial in watched}
    if numbers:
        now_watched = _watched_settings(settings, record.note(WATCHED))
        record.forget_other_watched(now_watched)
    missing = _missing(record, trials, numbers)
    if numbers & set(missing):
        record.set_note(WATCHED, now_watched)
    scored: list[Trial] = []

    def report(trial: Trial) -> None:
        scored.append(trial)
        watch(HeldOutEvent(trial, done=len(scored), total=len(missing)))

    for is_watched in (False, True):
        group = []
        for number, trial in missing.items():
            if (number in numbers) == is_watched:
                group.append(trial)
        # At once: several workers share the trials of a group.
        if group:
            search().hold_out(group, report, watched=is_watched)


def _missing(
    record: Record, trials: Sequence[Trial], watched: Collection[int]
) -> dict[int, Trial]:
    """Number -> trial of those that lack a held-out score."""
    missing: dict[int, Trial] = {}
    for trial in trials:
        kinds = {"objectives"}
        if trial.number in watched:
            kinds.add("watched")
        recorded = record.held_out(trial.number)
        if not kinds <= set(recorded):
            missing[trial.number] = trial
    return missing


def _watched_settings(
    settings: StudySettings, noted: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What is watched, as the record notes it: name of each score -> what is set of it.

    Args:
        settings: The study.
        noted: What the record has noted so far.
    """
    watched: dict[str, Any] = {}
    for measure in settings.watch:
        described = measure
        if isinstance(measure, Function):
            # The record is JSON, which has no place for a Python function.
            described = replace(measure, function=measure.path)
        is_set = {
            key: value for key, value in asdict(described).items() if value is not None
        }
        # The settings stay the same where a function, a task's files or a text are edited.
        files = measure_digest(settings, measure)
        # A study is also read where its tasks and functions are not: absent is not edited.
        if not files and noted is not None:
            files = noted.get(measure.name, {}).get("files", "")
        if files:
            is_set["files"] = files
        watched[measure.name] = is_set
    return watched
