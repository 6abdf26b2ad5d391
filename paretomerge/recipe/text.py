"""From a text to plain data of a size, depth and kind that the rest of the package can work on, whatever the text is."""

import math
import re
from collections.abc import Mapping
from typing import Any

import yaml

from paretomerge.errors import RecipeError, shorten

LARGEST = 1_000_000  # characters: real recipes have thousands
_MOST_VALUES = 100_000  # aliases can make a small text mean a huge recipe
_DEEPEST = 50  # the grammar needs ten
_MOST_MERGED = 1_000  # entries that `<<` may bring into one mapping
_GREATEST = 1 << 63
_BREAKS = re.compile("[\x85\u2028\u2029]")


class _Loader(yaml.SafeLoader):
    """Safe YAML, in which `1e-5` is a number, as in YAML 1.2, and `<<` cannot multiply entries without bound."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        for key, value in node.value:
            merged = key.tag == "tag:yaml.org,2002:merge" and isinstance(value, yaml.SequenceNode)
            if merged and len(value.value) > _MOST_MERGED:
                raise yaml.constructor.ConstructorError(
                    None, None, f"more than {_MOST_MERGED} mappings in `<<`", value.start_mark
                )
        super().flatten_mapping(node)
        if len(node.value) > _MOST_VALUES:
            raise yaml.constructor.ConstructorError(
                None, None, f"more than {_MOST_VALUES:,} entries in a mapping", node.start_mark
            )


class _Dumper(yaml.SafeDumper):
    """Puts quotes around a text that `_Loader` would take for a number, and double ones around Unicode's line breaks, which
    PyYAML would fold into blanks."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        return self.represent_scalar(
            "tag:yaml.org,2002:str", data, style='"' if _BREAKS.search(data) else None
        )


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
        list("-+0123456789"),
    )
_Dumper.add_representer(str, _Dumper.represent_str)


def dump(data: Any) -> str:
    """YAML that `parse` and any other reader take for `data`."""
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


def parse(text: str, where: str) -> list[Any]:
    """The documents of a text, those that are empty left out; one None if all are."""
    if len(text) > LARGEST:
        raise RecipeError(
            f"{where}: expected a recipe of at most {LARGEST:,} characters, got {len(text):,}; is this the right file?"
        )
    try:
        documents = [d for d in yaml.load_all(text, _Loader) if d is not None] or [None]
    except (yaml.YAMLError, RecursionError, ValueError, TypeError, OverflowError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise RecipeError(f"{where}: expected YAML, got a syntax error: {reason}") from error
    return documents


def check_data(data: Any, where: str) -> None:
    """Refuse what no recipe can hold: endless or huge structures, keys that are no texts, numbers and texts that cannot be written."""
    stack = [(data, 0)]
    met = 0
    while stack:
        entry, depth = stack.pop()
        met += 1
        if depth > _DEEPEST:
            raise RecipeError(
                f"{where}: expected values nested at most {_DEEPEST} deep, got more; does an alias contain itself?"
            )
        inner: list[Any] = []
        if isinstance(entry, Mapping):
            for key in entry:
                if not isinstance(key, str):
                    raise RecipeError(
                        f"{where}: expected keys that are texts, got {_told(key)}; put it in quotes"
                    )
                _check_text(key, where)
            inner = list(entry.values())
        elif isinstance(entry, (list, tuple, set, frozenset)):
            inner = list(entry)
        else:
            _check_value(entry, where)
        if met + len(stack) + len(inner) > _MOST_VALUES:
            raise RecipeError(
                f"{where}: expected at most {_MOST_VALUES:,} values in a recipe, got more; do aliases multiply each other?"
            )
        stack += [(value, depth + 1) for value in inner]


def _check_value(value: Any, where: str) -> None:
    if isinstance(value, str):
        _check_text(value, where)
    elif isinstance(value, float) and not math.isfinite(value):
        raise RecipeError(f"{where}: expected finite numbers, got {value}")
    elif isinstance(value, int) and not -_GREATEST <= value < _GREATEST:
        raise RecipeError(f"{where}: expected numbers of at most 64 bits, got {_told(value)}")


def _check_text(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RecipeError(
            f"{where}: expected texts that UTF-8 can write, got {shorten(text)}"
        ) from error


def _told(value: Any) -> str:
    return (
        f"one of {value.bit_length()} bits"
        if isinstance(value, int) and value.bit_length() > 64
        else shorten(value)
    )
