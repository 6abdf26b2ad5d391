"""A study's content as the text of a study.yaml."""

from pathlib import Path

import yaml

from paretomerge.config.schema import StudyConfig
from paretomerge.errors import ConfigError


def dump_config(config: StudyConfig) -> str:
    """Write a study.yaml.

    Args:
        config: The content.

    Returns:
        YAML with every key that differs from its default.
    """
    # Keys at their default are left out, as in a file that a user writes by hand.
    content = config.model_dump(mode="json", exclude_defaults=True, exclude_none=True)
    # In the order of the schema and not of the alphabet, as a user would write it.
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100)


def write_config(text: str, path: Path, root: Path) -> None:
    """Write the text of a study.yaml to a file.

    Args:
        text: The text.
        path: The file.
        root: The folder that the study's relative paths start from.

    Raises:
        ConfigError: The file would be in another folder, or cannot be written.
    """
    # A study.yaml's relative paths start from its own folder, so elsewhere the same text would
    # name other files.
    if path.resolve().parent != root.resolve():
        raise ConfigError(
            f"{path}: the study's paths start from {root}; write the file there"
        )
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from error
