"""YAML text to plain data that is safe to work on: bounded in size and depth, with known types.

A recipe or a study.yaml may come from anywhere. YAML aliases let a small text expand to a huge
structure, or to one that contains itself, so every structure is checked before it is read further.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import yaml

from paretomerge.arguments import plain_scalar
from paretomerge.errors import RecipeError, shorten

MAX_CHARACTERS = 1_000_000
"""Longest YAML that is read; real recipes and studies have thousands of characters."""

_MAX_VALUES = 100_000
_MAX_DEPTH = 50  # the grammar itself needs ten levels
_MAX_MERGE_KEYS = 1_000  # mappings that one `<<` may list
_INT64_LIMIT = 1 << 63
_UNICODE_LINE_BREAKS = re.compile("[\x85\u2028\u2029]")
_MERGE_TAG = "tag:yaml.org,2002:merge"
_FLOAT_TAG = "tag:yaml.org,2002:float"
_STRING_TAG = "tag:yaml.org,2002:str"
_EXPONENT_WITHOUT_POINT = re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")


class UniqueKeyLoader(yaml.SafeLoader):
    """Safe YAML that refuses a key that is there twice, of which PyYAML would take the last."""

    # Any: the published type of `anchor` is wrong, it is the anchor's name or None.
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Check the keys as they are written, before `<<` adds those of others."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE_TAG:
                continue
            if key.value in seen:
                message = f"the key {key.value!r} is there twice; remove one"
                raise yaml.constructor.ConstructorError(
                    None, None, message, key.start_mark
                )
            seen.add(key.value)
        return node


class _Loader(UniqueKeyLoader):
    """Safe YAML that reads `1e-5` as a number, as YAML 1.2 does, and bounds the work of `<<`."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        for key, value in node.value:
            is_merge_list = key.tag == _MERGE_TAG and isinstance(
                value, yaml.SequenceNode
            )
            if is_merge_list and len(value.value) > _MAX_MERGE_KEYS:
                message = f"more than {_MAX_MERGE_KEYS} mappings in `<<`"
                raise yaml.constructor.ConstructorError(
                    None, None, message, value.start_mark
                )
        super().flatten_mapping(node)
        # Nested `<<` can multiply the entries, so the flattened mapping is checked as well.
        if len(node.value) > _MAX_VALUES:
            message = f"more than {_MAX_VALUES:,} entries in a mapping"
            raise yaml.constructor.ConstructorError(
                None, None, message, node.start_mark
            )


class _Dumper(yaml.SafeDumper):
    """Quotes strings that `_Loader` would read as numbers, and those with Unicode line breaks."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # PyYAML folds Unicode line breaks into blanks unless the string has double quotes.
        style = '"' if _UNICODE_LINE_BREAKS.search(data) else None
        return self.represent_scalar(_STRING_TAG, data, style=style)


for _yaml_class in (_Loader, _Dumper):
    _yaml_class.add_implicit_resolver(
        _FLOAT_TAG, _EXPONENT_WITHOUT_POINT, list("-+0123456789")
    )
_Dumper.add_representer(str, _Dumper.represent_str)


def dump(data: object) -> str:
    """Write `data` as YAML that `parse` and other YAML readers read back as the same data."""
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


def parse(text: str, where: str) -> list[object]:
    """Parse the YAML documents of a text.

    Args:
        text: One YAML document or several.
        where: Name of the text in error messages.

    Returns:
        The documents without empty ones; `[None]` if all are empty.

    Raises:
        RecipeError: If the text is too long or is not YAML.
    """
    if len(text) > MAX_CHARACTERS:
        raise RecipeError(
            f"{where}: a file may have at most {MAX_CHARACTERS:,} characters, this text has "
            f"{len(text):,}; is this the right file?"
        )
    # Dates, numbers and nesting can make PyYAML raise more than its own errors.
    try:
        documents = list(yaml.load_all(text, _Loader))
    except (
        yaml.YAMLError,
        RecursionError,
        ValueError,
        TypeError,
        OverflowError,
    ) as error:
        reason = str(error)
        if isinstance(error, RecursionError):
            # Its own message speaks of Python's stack, not of the file.
            reason = "nested too deeply"
        raise RecipeError(f"{where}: YAML syntax error: {reason}") from error
    non_empty = [document for document in documents if document is not None]
    return non_empty or [None]


def check_data(data: object, where: str) -> None:
    """Check that parsed YAML is bounded in size and depth and has only types a recipe may hold.

    Args:
        data: What `parse` returned.
        where: Name of the text in error messages.

    Raises:
        RecipeError: If the data is too large, too deep or contains itself, if a key is not a
            string, or if a number or string cannot be written back.
    """
    # A stack and not recursion: the data may be deeper than Python's own limit.
    stack = [(data, 0)]
    n_visited = 0
    while stack:
        entry, depth = stack.pop()
        n_visited += 1
        if depth > _MAX_DEPTH:
            raise RecipeError(
                f"{where}: values are nested more than {_MAX_DEPTH} levels deep; "
                "does an alias contain itself?"
            )
        # An array of numpy's becomes a list, whose numbers are checked like others.
        children = _children(plain_scalar(entry), where)
        # Checked before the children go on the stack: aliases can make them many at each level.
        if n_visited + len(stack) + len(children) > _MAX_VALUES:
            raise RecipeError(
                f"{where}: a file may have at most {_MAX_VALUES:,} values; "
                "do aliases multiply each other?"
            )
        stack += [(child, depth + 1) for child in children]


def _children(entry: object, where: str) -> list[object]:
    """The values inside a container, its keys checked; nothing for a checked scalar."""
    if isinstance(entry, Mapping):
        for key in entry:
            _check_key(key, where)
        return list(entry.values())
    if isinstance(entry, (list, tuple, set, frozenset)):
        return list(entry)
    _check_scalar(entry, where)
    return []


def _check_key(key: object, where: str) -> None:
    if not isinstance(key, str):
        raise RecipeError(
            f"{where}: keys must be strings, got {_shorten_number(key)}; put it in quotes"
        )
    _check_encodable(key, where)


def _check_scalar(value: object, where: str) -> None:
    if isinstance(value, str):
        _check_encodable(value, where)
    elif isinstance(value, float) and not math.isfinite(value):
        raise RecipeError(f"{where}: numbers must be finite, got {value}")
    elif isinstance(value, int) and not -_INT64_LIMIT <= value < _INT64_LIMIT:
        raise RecipeError(
            f"{where}: numbers must fit 64 bits, got {_shorten_number(value)}"
        )


def _check_encodable(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RecipeError(
            f"{where}: strings must be encodable as UTF-8, got {shorten(text)}"
        ) from error


def _shorten_number(value: object) -> str:
    # Python refuses to print very long integers, so their length is given instead.
    if isinstance(value, int):
        n_bits = value.bit_length()
        if n_bits > 64:
            return f"a number of {n_bits} bits"
    return shorten(value)
