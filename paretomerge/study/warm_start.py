"""Warm starts: the user's recipes and earlier studies over the same models."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from paretomerge.errors import ConfigError, ErrorCollector, ParetoMergeError, StudyError
from paretomerge.pareto.front import nondominated, reference_point
from paretomerge.pareto.ranking import ranked
from paretomerge.recipe import Recipe
from paretomerge.record.moved import ROOT
from paretomerge.record.record import Record
from paretomerge.record.storage import Storage
from paretomerge.record.trial import Trial
from paretomerge.space.space import SearchSpace
from paretomerge.study.agenda import WarmStart
from paretomerge.types import Params

# From an earlier front. Each start costs an evaluation that the sampler could spend better.
_MOST_STARTS = 10
_MODELS = {"base": "another base", "models": "other models"}


@dataclass(frozen=True)
class Question:
    """What the scores of a study mean, independent of the file that describes it.

    Attributes:
        settings: The settings that decide all scores, with absolute paths; `base` and `models` are
            among them.
        scores: Name of each score -> what it measures.
    """

    settings: Mapping[str, Any]
    scores: Mapping[str, Any]

    def differences(self, other: "Question") -> str:
        """Name what gives the other study's scores another meaning; empty where nothing does."""
        changed = []
        for key, value in self.settings.items():
            if value != other.settings.get(key):
                changed.append(key)
        # Only this study's scores: the other one may have measured more.
        for name, measured in self.scores.items():
            if measured != other.scores.get(name):
                changed.append(f"score {name!r}")
        return ", ".join(changed)


@dataclass(frozen=True)
class EarlierStudies:
    """Reads earlier studies for a new one.

    Attributes:
        folder: The folder that relative paths start from.
        space: The new study's space.
        question: What the new study's scores mean.
        storage_of: A study.yaml -> where its record is.
        question_of: An earlier record's identity, and the folder that its paths start from -> what
            its scores mean.
    """

    folder: Path
    space: SearchSpace
    question: Question
    storage_of: Callable[[Path], Storage]
    question_of: Callable[[Mapping[str, Any], Path], Question]

    def read(self, starts: Sequence[str], studies: Sequence[str]) -> WarmStart:
        """Read what a search begins with, and report every error at once before anything is merged.

        Args:
            starts: Recipe files.
            studies: Folders, records (`study.db` or a URL) or study.yaml files of earlier studies.

        Returns:
            Points to evaluate and trials to take over.

        Raises:
            ConfigError: A recipe is outside the space, or a study merged other models.
        """
        errors = ErrorCollector()
        warm_start = WarmStart()
        for file in starts:
            with errors.collect():
                warm_start |= self._start(file)
        for name in studies:
            with errors.collect():
                try:
                    warm_start |= self._study(name)
                except ParetoMergeError as error:
                    raise ConfigError(f"warm_start: {name}: {error}") from error
        errors.raise_if_any()
        return warm_start

    def _start(self, file: str) -> WarmStart:
        try:
            written = Recipe.load(self.folder / file)
            recipe = written.resolve_paths(self.folder)
            return WarmStart({file: self.space.params_of(recipe)})
        except ParetoMergeError as error:
            raise ConfigError(f"starts: {file}: {error}") from error

    def _study(self, name: str) -> WarmStart:
        """Use an earlier study.

        Its trials are taken over where their scores mean the same; else the best of its front
        become points to evaluate.
        """
        storage, root = self._locate(name)
        try:
            record = Record.read(storage)
        except StudyError as error:
            raise ConfigError(
                f"{error} Name the folder, the study.db or the study.yaml of an earlier study."
            ) from error
        # A `Search` that was made without settings has no identity that can be compared.
        identity = record.note("identity") or {}
        root = root or record.note(ROOT)
        if not root or "base" not in identity:
            raise ConfigError(
                "its record does not say where its paths start; name its study.yaml instead"
            )
        theirs = self.question_of(identity, Path(root))
        # Other models: not even the parameters mean the same, so nothing can be used.
        for key, another in _MODELS.items():
            mine = self.question.settings[key]
            other = theirs.settings[key]
            if mine != other:
                raise ConfigError(
                    f"it is a study over {another}, {other}; this one has {mine}"
                )
        changed = self.question.differences(theirs)
        return known_from(name, record, self.space, changed)

    def _locate(self, name: str) -> tuple[Storage, str]:
        """The record, and the folder that a study.yaml's paths start from, if there is one."""
        if "://" in name:
            return Storage(name).relative_to(self.folder), ""
        path = self.folder / name
        if path.suffix in (".yaml", ".yml"):
            root = path.resolve().parent
            return self.storage_of(path), str(root)
        file = path / "study.db" if path.is_dir() else path
        return Storage.at(file.resolve()), ""


def known_from(
    name: str, record: Record, space: SearchSpace, changed: str
) -> WarmStart:
    """Use an earlier study's trials in a new space. Trials outside the space are left out.

    Args:
        name: The user's name for the earlier study.
        record: Its record.
        space: The new study's space.
        changed: What gives its scores another meaning. If empty, the scores are taken over. Else
            the best of its front are evaluated as starts.

    Returns:
        Trials to take over, or points to evaluate.
    """
    # Estimates of a race and trials of a second level have no meaning in another study.
    results = record.results()
    usable = []
    for trial in results.trials:
        if trial.final and not trial.failure and not trial.level:
            usable.append(trial)
    if changed:
        # The old scores only choose which merges are worth an evaluation. The sampler never sees
        # them, since they answer another question.
        feasible = [trial for trial in usable if trial.feasible]
        rows = [trial.values(results.objectives) for trial in feasible]
        values = np.array(rows)
        best = [feasible[i] for i in _best(values)]
        usable = best[:_MOST_STARTS]
    inside = []
    for trial in usable:
        try:
            params = space.params_of(trial.recipe)
        except ConfigError:
            continue  # outside the new space
        origin = f"{name} {trial.number}"
        inside.append(
            Trial(
                -1,
                params,
                trial.scores,
                f"warm: {origin}",
                held_out=trial.held_out,
                warm_start=origin,
            )
        )
    outside = len(usable) - len(inside)
    note_outside = f"; {outside} lie outside the space" if outside else ""
    if changed:
        starts: dict[str, Params] = {}
        for trial in inside:
            starts[trial.label] = trial.params
        note = (
            f"{name}: {changed} changed since: {len(starts)} merges of its front are evaluated "
            f"as starts{note_outside}"
        )
        return WarmStart(starts, (), (note,))
    note = (
        f"{name}: {len(inside)} of {len(usable)} trials taken over with their scores, "
        f"beside the budget{note_outside}"
    )
    return WarmStart({}, tuple(inside), (note,))


def _best(values: Any) -> list[int]:
    """Indices of the non-dominated values `(n, m)`, the greatest hypervolume contribution first."""
    if not len(values):
        return []
    # `ranked` puts the first front first, so cutting it there leaves exactly the front.
    order = ranked(values, reference_point(values))
    front_size = nondominated(values).sum()
    return [int(i) for i in order[:front_size]]
