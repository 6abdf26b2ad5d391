"""Recipes of a study that was moved or copied: their paths begin where the study is now."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = "root"
"""The note with the folder that relative paths of a study start from."""

_FORMER = "former roots"


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

    These are the study's former places where its models are at the same place below the new one,
    or where nothing is left.

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
    has_models = all(_is_below(root, model) for model in models)
    moved = []
    for folder in (notes.get(ROOT), *notes.get(_FORMER, ())):
        if folder in (None, "/", root):
            continue
        if has_models or not Path(folder).exists():
            moved.append(str(folder))
    return moved


def with_new_paths(recipe_yaml: str, folders: Sequence[str], root: str) -> str:
    """A recipe whose paths below some folders begin with another one."""
    start = root.rstrip("/")
    for folder in folders:
        recipe_yaml = recipe_yaml.replace(f"{folder}/", f"{start}/")
    return recipe_yaml


def _is_below(root: str, model: str) -> bool:
    """Whether all parts of a model, such as `base+adapter`, are relative paths that exist."""
    for part in model.split("+"):
        if not part or Path(part).is_absolute() or not (Path(root) / part).exists():
            return False
    return True
