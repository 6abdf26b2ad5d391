"""The statistics of a study's models: made once, and kept beside the study."""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paretomerge.config.calibration import CalibrationData
from paretomerge.config.settings import StudySettings
from paretomerge.errors import CheckpointError, ConfigError
from paretomerge.evaluate.function_digest import file_digest
from paretomerge.evaluate.measures import Task
from paretomerge.merging.methods import METHODS
from paretomerge.merging.statistics import (
    MANIFEST_FILE,
    STATISTIC_KINDS,
    Manifest,
    StatisticKind,
)
from paretomerge.space.sources import model_path, neutral_path
from paretomerge.space.specs import WeightSpace
from paretomerge.study.parts import StudyParts

if TYPE_CHECKING:
    from paretomerge.calibration import Example

_DIGITS = 16

_FEW_EXAMPLES = 2
_SOME_EXAMPLES = 18
"""Examples of each model whose statistics are made to see what all of them take."""


def make_calibration(parts: StudyParts) -> None:
    """Make the statistics of a study in its folder, unless they are there.

    Args:
        parts: The study. Nothing is made if its statistics are a folder of the user's, or if its
            methods need none.

    Raises:
        ConfigError: The folder holds statistics that were made of other text, or the text of a
            model is missing.
        CheckpointError: A model cannot be read, or the folder cannot be written.
    """
    settings = parts.settings
    wanted = settings.calibration
    kinds = needed_kinds(settings)
    folder = settings.calibration_folder
    if not isinstance(wanted, CalibrationData) or not kinds:
        return
    assert folder is not None
    origin = calibration_digest(settings)
    if (folder / MANIFEST_FILE).is_file():
        _check_origin(folder, origin)
        return
    texts = calibration_texts(parts, wanted)
    try:
        _calibrate(parts, wanted, texts, folder, origin)
    except CheckpointError:
        # Another search of the same study may have made them meanwhile.
        if not (folder / MANIFEST_FILE).is_file():
            raise
        _check_origin(folder, origin)


def _calibrate(
    parts: StudyParts,
    wanted: CalibrationData,
    texts: "Mapping[str, Sequence[Example]]",
    folder: Path,
    origin: str = "",
) -> None:
    # Imported here: this runs the models, and needs torch and transformers.
    from paretomerge.calibration import calibrate

    settings = parts.settings
    calibrate(
        parts.pool.base,
        list(texts),
        texts,
        folder,
        kinds=needed_kinds(settings),
        examples=wanted.examples,
        max_tokens=wanted.max_tokens,
        batch_size=settings.evaluation.batch_size,
        alpha=wanted.alpha,
        add_bos_token=settings.evaluation.add_bos_token,
        device=settings.device,
        origin=origin,
    )


@dataclass(frozen=True)
class StatisticsPreview:
    """Statistics that a study makes before its first trial.

    Attributes:
        folder: Where they will be.
        models: Number of models that read text.
        examples: The most examples that they read in all; a short text has fewer.
        bytes: Size of the statistics, about.
        seconds: Estimated time; None where it was not measured.
    """

    folder: str
    models: int
    examples: int
    bytes: int
    seconds: float | None = None


def preview_statistics(
    settings: StudySettings, folder: Path, measure: bool
) -> tuple[StudySettings, StatisticsPreview | None]:
    """Stand in for the statistics of a study that has not made them yet.

    Args:
        settings: The study.
        folder: A temporary folder, not there yet. It gets statistics of a few examples, which have
            the shapes of all.
        measure: Whether the models also read some more examples, to measure the time.

    Returns:
        The settings with that folder as `calibration`, and what the study is going to make; the
        settings as they are and None where it makes nothing.
    """
    wanted = settings.calibration
    made = settings.calibration_folder
    if not isinstance(wanted, CalibrationData) or made is None:
        return settings, None
    if not needed_kinds(settings) or (made / MANIFEST_FILE).is_file():
        return settings, None
    parts = StudyParts(settings)
    texts = calibration_texts(parts, wanted)

    def count(most: int) -> int:
        return sum(_most_examples(text, most) for text in texts.values())

    def make(examples: int) -> float:
        """Replace what is in the folder; the seconds that it took."""
        shutil.rmtree(folder, ignore_errors=True)
        start = time.monotonic()
        _calibrate(parts, replace(wanted, examples=examples), texts, folder)
        return time.monotonic() - start

    seconds = None
    if measure:
        seconds = _make_and_estimate(make, count, wanted.examples)
    else:
        make(1)
    sizes = [file.stat().st_size for file in folder.iterdir()]
    preview = StatisticsPreview(
        folder=str(made),
        models=len(texts),
        examples=count(wanted.examples),
        bytes=sum(sizes),
        seconds=seconds,
    )
    return replace(settings, calibration=str(folder)), preview


def _most_examples(text: "Sequence[Example]", most: int) -> int:
    """How many examples a model reads of its text: a text without a prompt is cut into several."""
    if any(not (example.prompt or example.messages) for example in text):
        return most
    return min(len(text), most)


def _make_and_estimate(
    make: Callable[[int], float], count: Callable[[int], int], examples: int
) -> float:
    """Make statistics of a few examples, and estimate what those of all take.

    Args:
        make: Makes them of so many examples of each model, and gives the seconds that it took.
        count: Examples of each model -> examples that there are in all.
        examples: Examples of each model that are wanted.

    Returns:
        Seconds.
    """
    few = min(_FEW_EXAMPLES, examples)
    some = min(_SOME_EXAMPLES, examples)
    # The first call of anything is slow.
    make(few)
    fixed = make(few)
    seconds = make(some)
    more = count(some) - count(few)
    if not more:
        return seconds
    each = max(seconds - fixed, 0.0) / more
    return seconds + each * (count(examples) - count(some))


def _check_origin(folder: Path, origin: str) -> None:
    if Manifest.read(folder).origin != origin:
        raise ConfigError(
            f"calibration: {folder} holds statistics that were made of other text, or with other "
            "settings; remove it, or set another `out`"
        )


def needed_kinds(settings: StudySettings) -> tuple[StatisticKind, ...]:
    """The kinds of statistics that the methods of a study need."""
    if not isinstance(settings.space, WeightSpace):
        return ()
    needed = {METHODS[method].statistics for method in settings.space.methods}
    return tuple(kind for kind in STATISTIC_KINDS if kind in needed)


def calibration_digest(settings: StudySettings) -> str:
    """A digest of the text that the models of a study read, or of the statistics that it is given.

    Returns:
        16 hexadecimal digits; "" for a study without statistics, or if there are none yet.
    """
    wanted = settings.calibration
    if wanted is None:
        return ""
    if not isinstance(wanted, CalibrationData):
        assert settings.calibration_folder is not None
        return file_digest(settings.calibration_folder / MANIFEST_FILE)
    content: dict[str, Any] = {}
    content_as_written: dict[str, Any] = {}
    for model, text in wanted.data.items():
        described = _describe(settings, text)
        content[neutral_path(settings.root, model)] = described
        content_as_written[model] = described
    # Earlier versions took the models as they are written, and in that order. Statistics that they
    # made, and the record beside them, have that digest.
    earlier = _digest(settings, wanted, content_as_written, sort_keys=False)
    folder = settings.calibration_folder
    assert folder is not None
    if (folder / MANIFEST_FILE).is_file() and Manifest.read(folder).origin == earlier:
        return earlier
    return _digest(settings, wanted, content, sort_keys=True)


def _describe(
    settings: StudySettings, text: str | Mapping[str, str]
) -> str | dict[str, str]:
    """A digest of a file, or the task whose examples are the text."""
    if isinstance(text, str):
        return file_digest(settings.root / text)
    return dict(text)


def _digest(
    settings: StudySettings,
    wanted: CalibrationData,
    content: Mapping[str, Any],
    sort_keys: bool,
) -> str:
    described = [
        content,
        wanted.examples,
        wanted.max_tokens,
        wanted.alpha,
        needed_kinds(settings),
    ]
    text = json.dumps(described, sort_keys=sort_keys)
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]


def calibration_texts(
    parts: StudyParts, wanted: CalibrationData
) -> "dict[str, list[Example]]":
    """The examples that each model of a study reads.

    Args:
        parts: The study.
        wanted: Which they are.

    Returns:
        Path of a model -> its examples. Those of a task are its search examples.
    """
    from paretomerge.calibration import read_examples

    root = parts.settings.root
    texts: dict[str, list[Example]] = {}
    for model, text in wanted.data.items():
        path = model_path(root, model)
        if isinstance(text, str):
            texts[path] = read_examples(root / text)
        else:
            texts[path] = _examples_of(parts, text["task"])
    return texts


def task_examples(settings: StudySettings, task: str) -> "list[Example]":
    """The search examples of a task as calibration text, never its held-out ones.

    Args:
        settings: The study that says how the task's questions are put.
        task: The task.

    Returns:
        Its prompts with their right answers.

    Raises:
        EvaluationError: The task is missing, or its data cannot be loaded.
        ConfigError: The task has no written answers.
    """
    return _examples_of(StudyParts(settings), task)


def _examples_of(parts: StudyParts, task: str) -> "list[Example]":
    from paretomerge.calibration.text import examples_of_task

    measure = _task_of_study(parts.settings, task)
    return examples_of_task(parts.search_examples(measure))


def _task_of_study(settings: StudySettings, name: str) -> Task:
    """A task with the prompts that the study has for it."""
    for measure in settings.measures:
        if isinstance(measure, Task) and measure.task == name:
            return replace(measure, direction=None)
    return Task(name)
