"""Files with a text in each line."""

from collections.abc import Sequence
from pathlib import Path

from paretomerge.calibration.text_files import (
    numbered_lines,
    parse_json_line,
    read_text,
)
from paretomerge.errors import ConfigError, shorten


def read_line_texts(file: Path, keys: Sequence[str], where: str) -> list[str]:
    """Read a text from each line of a file; empty lines are left out.

    Args:
        file: Text, or `.jsonl` with an object or a string in each line. Other keys of an object,
            such as answers, are not read.
        keys: The keys of an object that may hold the text; the first one that does counts.
        where: The file, as messages name it.

    Returns:
        The texts, in their order.

    Raises:
        ConfigError: The file cannot be read, or a line has no text.
    """
    texts = []
    for number, line in numbered_lines(read_text(file, where)):
        text = line
        if file.suffix == ".jsonl":
            text = _text_of(line, keys, f"{where}, line {number}")
        texts.append(text)
    return texts


def _text_of(line: str, keys: Sequence[str], where: str) -> str:
    content = parse_json_line(line, where)
    values = [content]
    if isinstance(content, dict):
        values = [content.get(key) for key in keys]
    for value in values:
        if isinstance(value, str) and value.strip():
            return value
    named = " nor ".join(f"`{key}`" for key in keys)
    raise ConfigError(
        f"{where}: has neither {named} with a text; got {shorten(content)}"
    )
