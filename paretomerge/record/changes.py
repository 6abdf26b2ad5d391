"""What changed between the study of a record and the one at hand, in words."""

from collections.abc import Iterator, Mapping
from typing import Any

from paretomerge.errors import shorten

_MOST_LISTED = 5
# Digests, of which a user learns nothing.
_DIGESTS = ("files of ", "distributions")


def describe_changes(recorded: Mapping[str, Any], identity: Mapping[str, Any]) -> str:
    """Say which keys changed, from what to what.

    Args:
        recorded: The identity in the record.
        identity: The identity now. At least one key differs.

    Returns:
        Such as "space changed since (space.subset: false, now true)".
    """
    keys = sorted({*recorded, *identity})
    changed = [key for key in keys if recorded.get(key) != identity.get(key)]
    details: list[str] = []
    for key in changed:
        if not key.startswith(_DIGESTS):
            details += _differences(key, recorded.get(key), identity.get(key))
    shown = details[:_MOST_LISTED]
    if len(details) > len(shown):
        shown.append(f"and {len(details) - len(shown)} more")
    text = f"{', '.join(changed)} changed since"
    return f"{text} ({'; '.join(shown)})" if shown else text


def _differences(place: str, before: Any, now: Any) -> Iterator[str]:
    """One sentence for each value that differs, the innermost ones."""
    if before == now:
        return
    both_mappings = isinstance(before, Mapping) and isinstance(now, Mapping)
    if both_mappings:
        for key in sorted({*before, *now}):
            yield from _differences(f"{place}.{key}", before.get(key), now.get(key))
        return
    both_lists = isinstance(before, list) and isinstance(now, list)
    # Numbers of a list, such as bounds, say more together than one by one.
    if both_lists and len(before) == len(now) and _holds_mappings(before):
        for i, (old, new) in enumerate(zip(before, now, strict=True)):
            yield from _differences(f"{place}.{i}", old, new)
        return
    yield f"{place}: {_text(before)}, now {_text(now)}"


def _holds_mappings(values: list[Any]) -> bool:
    return any(isinstance(value, Mapping) for value in values)


def _text(value: object) -> str:
    # As YAML spells them.
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return shorten([_as_written(entry) for entry in value])
    return shorten(_as_written(value))


def _as_written(value: object) -> object:
    """A section as a user would write it: without what is not set."""
    if not isinstance(value, Mapping):
        return value
    return {key: entry for key, entry in value.items() if entry is not False}
