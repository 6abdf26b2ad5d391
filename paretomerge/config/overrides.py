"""Keys of a study.yaml that the command line sets, such as `evaluate.batch_size=32`."""

from collections.abc import Sequence
from typing import Any

import yaml

from paretomerge.errors import ConfigError


def with_overrides(content: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Set keys of a file's content.

    Args:
        content: The content; it is left as it is.
        overrides: `key=value`, with dots between nested keys. Values are read as YAML.

    Returns:
        The content with these keys. Whether they exist is checked with all others.

    Raises:
        ConfigError: An entry has another form, or a dot leads into something that has no keys.
    """
    for override in overrides:
        name, equals, text = override.partition("=")
        keys = name.strip().split(".")
        if not equals or not all(keys):
            raise ConfigError(f"override {override!r}: write key=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(
                f"override of {name}: cannot be read as YAML: {error}"
            ) from error
        content = _with_key(content, keys, value, name)
    return content


def _with_key(content: Any, keys: list[str], value: Any, name: str) -> dict[str, Any]:
    """A copy of nested mappings in which one key is set."""
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise ConfigError(
            f"override of {name}: the file has no keys there, but {content!r}"
        )
    first, *others = keys
    if others:
        value = _with_key(content.get(first), others, value, name)
    return {**content, first: value}
