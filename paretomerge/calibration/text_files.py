"""Files with texts, and with JSON in each line, read in one way for all commands."""

import json
from pathlib import Path
from typing import Any

from paretomerge.errors import ConfigError


def read_text(file: Path, where: str) -> str:
    """Read a text file in UTF-8.

    Args:
        file: The file. A mark at its beginning that says UTF-8, as Windows writes it, is left out.
        where: The file, as messages name it.

    Raises:
        ConfigError: The file cannot be read, or is in another encoding.
    """
    try:
        return file.expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{where}: cannot be read as a text file in UTF-8: {error}"
        ) from error


def numbered_lines(content: str) -> list[tuple[int, str]]:
    """Return the lines of a text that are not blank, each with its number from 1 on."""
    numbered = []
    # Not `splitlines`, which also breaks at characters that JSON strings and prompts may hold, such
    # as U+2028 and form feeds.
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            numbered.append((number, line))
    return numbered


# Any: the caller checks what the line holds.
def parse_json_line(line: str, where: str) -> Any:
    """Parse a line of a JSONL file.

    Args:
        line: The line.
        where: The file and the line, as messages name them.

    Raises:
        ConfigError: The line is not JSON, or holds half of a character.
    """
    try:
        content = json.loads(line)
    # RecursionError: a line of nothing but opening brackets
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: is not JSON: {error}") from error
    try:
        # A lone surrogate, which tokenizers fail on. JSON can hold it as an escape.
        json.dumps(content, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{where}: holds half of a character (a lone surrogate such as \\ud83d); remove it"
        ) from error
    return content
