"""Recipes of a study that was moved or copied: their paths begin where the study is now."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from paretomerge.recipe.text import dump, parse

ROOT = "root"
"""The note with the folder that relative paths of a study start from."""

_FORMER = "former roots"
# Nothing, a blank, a quote, or the plus of `base+adapter`.
_BEFORE_PATH = r"(?<![^\s'\"+])"
# Of paths that YAML writes as they are: without quotes, and in one line.
_PLAIN_PATH = re.compile(r"[\w./+-]*")


def root_notes(notes: Mapping[str, Any], root: str) -> dict[str, Any]:
    """The notes of a study whose paths start from a folder now.

    Args:
        notes: The notes before.
        root: The folder.

    Returns:
        The notes to write.
    """
    before = notes.get(ROOT)
    if before in (None, root):
        return {ROOT: root}
    former = [folder for folder in notes.get(_FORMER, ()) if folder != root]
    if before not in former:
        former.append(before)
    return {_FORMER: former, ROOT: root}


def moved_folders(notes: Mapping[str, Any], root: str) -> list[str]:
    """The folders whose paths in recorded recipes are to begin with another one now.

    These are the study's former places where nothing is left, or whose models are all at the same
    place below the new one, too. Names on the Hub and models elsewhere do not matter.

    Args:
        notes: The study's notes.
        root: Where relative paths start now; "" for a study that has none.

    Returns:
        The folders.
    """
    if not root:
        return []
    identity = notes.get("identity") or {}
    models = [str(identity.get("base", "")), *map(str, identity.get("models", ()))]
    moved = []
    for folder in (notes.get(ROOT), *notes.get(_FORMER, ())):
        if folder in (None, "/", root):
            continue
        if not exists(folder) or _are_at_both(models, folder, root):
            moved.append(folder)
    return moved


def with_new_paths(recipe_yaml: str, folders: Sequence[str], root: str) -> str:
    """A recipe whose paths below some folders begin with another one.

    Args:
        recipe_yaml: The recipe.
        folders: The folders.
        root: The other one. Paths below it stay, also where it is below one of the folders.

    Returns:
        The recipe.
    """
    places = sorted({*folders, root}, key=len, reverse=True)
    listed = "|".join(map(re.escape, places))
    # In one pass: a new path must not be taken for an old one.
    pattern = re.compile(f"{_BEFORE_PATH}(?:{listed})/")
    start = root.rstrip("/") + "/"

    def renamed(text: str) -> str:
        return pattern.sub(lambda match: start, text)

    if all(map(_PLAIN_PATH.fullmatch, places)):
        return renamed(recipe_yaml)
    # YAML breaks lines at blanks, and quotes other characters. Parsing takes much longer.
    documents = []
    for document in parse(recipe_yaml, "the recipe of a trial"):
        documents.append(dump(_map_texts(document, renamed)))
    return "---\n".join(documents)


def _map_texts(value: object, change: Callable[[str], str]) -> object:
    """A document with all its texts changed."""
    if isinstance(value, dict):
        return {key: _map_texts(entry, change) for key, entry in value.items()}
    if isinstance(value, list):
        return [_map_texts(entry, change) for entry in value]
    return change(value) if isinstance(value, str) else value


def exists(path: str | Path) -> bool:
    """Whether there is a file or a folder; False for what may not be looked at."""
    try:
        return Path(path).exists()
    except OSError:  # below a folder of another user, for example
        return False


def _are_at_both(models: Sequence[str], old: str, new: str) -> bool:
    """Whether a new folder has a model, and all models that an old folder has."""
    found = False
    for model in models:
        # A plus may also belong to a name.
        is_whole = _has(old, model) or _has(new, model)
        for part in [model] if is_whole else model.split("+"):
            is_in_new = _has(new, part)
            if _has(old, part) and not is_in_new:
                return False
            found = found or is_in_new
    return found


def _has(folder: str, model: str) -> bool:
    """Whether a model is below a folder."""
    # `/` keeps an absolute path as it is.
    path = Path(folder) / model
    return path.is_relative_to(folder) and exists(path)
