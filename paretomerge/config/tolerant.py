"""Read what is right in a study.yaml with wrong keys, so that the rest can be checked, too."""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from paretomerge.config.schema import StudyConfig, read_content

_Location = tuple[int | str, ...]


def load_right_keys(
    path: str | Path, overrides: Sequence[str] = ()
) -> StudyConfig | None:
    """Read a study.yaml without the keys that are wrong.

    Args:
        path: The file, or a folder that holds a study.yaml.
        overrides: Keys to set in its content.

    Returns:
        The content, in which defaults stand for what is wrong; None where a required key is
        missing or wrong.

    Raises:
        ConfigError: The file cannot be read.
    """
    content = deepcopy(read_content(path, overrides))
    try:
        return StudyConfig.model_validate(content)
    except ValidationError as error:
        places = [_place(content, detail["loc"]) for detail in error.errors()]
    # From the end, so that the places in a list stay what they are.
    for place in sorted(set(places), key=_order, reverse=True):
        _delete(content, place)
    try:
        return StudyConfig.model_validate(content)
    except ValidationError:
        return None


def _place(content: Any, location: _Location) -> _Location:
    """The part of an error's location that leads to a key or an entry of the content."""
    place: list[int | str] = []
    for part in location:
        is_key = isinstance(content, dict) and part in content
        is_entry = (
            isinstance(content, list) and isinstance(part, int) and part < len(content)
        )
        # pydantic adds the alternatives of a union that it tried.
        if not is_key and not is_entry:
            break
        content = content[part]
        place.append(part)
        # An objective without its wrong key would be another one, so all of it goes.
        if is_entry:
            break
    return tuple(place)


def _order(place: _Location) -> list[tuple[str, int]]:
    """A key to sort by: names by the alphabet, and numbers by size."""
    return [("", part) if isinstance(part, int) else (part, 0) for part in place]


def _delete(content: Any, place: _Location) -> None:
    if not place:
        return
    *parents, last = place
    for parent in parents:
        content = content[parent]
    del content[last]
