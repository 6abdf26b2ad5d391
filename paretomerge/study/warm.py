"""Warm starts: the user's recipes and earlier studies over the same sources, as what a new study knows beforehand."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paretomerge.errors import ConfigError, ErrorCollector, ParetoMergeError
from paretomerge.recipe import Recipe
from paretomerge.record.storage import Storage
from paretomerge.space.space import SearchSpace
from paretomerge.study.earlier import Earlier
from paretomerge.study.known import Known

_SOURCES = ("base", "models")


@dataclass(frozen=True)
class Asked:
    """A study from outside. folder: where its paths start. question: what decides all its scores, key by key, paths resolved
    (`base` and `models` among them). scores: each one's name -> what it measures. space: makes its space.
    """

    folder: Path
    question: Mapping[str, Any]
    scores: Mapping[str, Any]
    space: Callable[[], SearchSpace]


def known_points(
    mine: Asked,
    starts: Sequence[str],
    studies: Sequence[str],
    earlier: Callable[[Mapping[str, Any], Path], Asked],
    record_of: Callable[[Path], Storage],
) -> Known:
    """What a search begins with; every error at once, before anything is merged.

    starts: files of recipes. studies: folders, records (`study.db` or a URL) or study.yaml files of earlier studies, whose
    record `record_of` finds in a study.yaml. earlier: an identity that a record kept, and its folder -> what it asked.
    """
    problems, known, space = ErrorCollector(), Known(), mine.space()
    for file in starts:
        with problems.collect():
            known |= _start(file, mine.folder, space)
    for name in studies:
        with problems.collect():
            try:
                known |= _warm(name, mine, space, earlier, record_of)
            except ParetoMergeError as error:
                raise ConfigError(f"warm_start: {name}: {error}") from error
    problems.raise_if_any()
    return known


def _start(file: str, folder: Path, space: SearchSpace) -> Known:
    try:
        return Known({file: space.warm(Recipe.load(folder / file).resolve_paths(folder))})
    except ParetoMergeError as error:
        raise ConfigError(f"starts: {file}: {error}") from error


def _warm(
    name: str,
    mine: Asked,
    space: SearchSpace,
    earlier: Callable[[Mapping[str, Any], Path], Asked],
    record_of: Callable[[Path], Storage],
) -> Known:
    """Scores where the earlier study measured all that this one needs, in the same way; else points to be evaluated. Refused
    where it merged other models.
    """
    path = mine.folder / name
    from_yaml = "://" not in name and path.suffix in (".yaml", ".yml")
    if "://" in name:
        storage = Storage(name).located(mine.folder)
    else:
        storage = (
            record_of(path)
            if from_yaml
            else Storage.at((path / "study.db" if path.is_dir() else path).resolve())
        )
    study = Earlier.read(name, storage)
    home = str(path.resolve().parent) if from_yaml else study.home
    if not home or not study.identity:
        raise ConfigError(
            "expected a study made from a study.yaml, got a record that names none; give that file in its place"
        )
    theirs = earlier(study.identity, Path(home))
    for key in _SOURCES:
        if mine.question[key] != theirs.question[key]:
            raise ConfigError(
                f"expected a study over the same {key}, {mine.question[key]}, got {theirs.question[key]}"
            )
    changed = [key for key in mine.question if mine.question[key] != theirs.question[key]]
    changed += [
        f"score {name!r}" for name in mine.scores if mine.scores[name] != theirs.scores.get(name)
    ]
    return study.known(space, theirs.space().recipe, ", ".join(changed))
