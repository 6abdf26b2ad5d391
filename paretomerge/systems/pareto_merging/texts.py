"""Unlabelled texts of the sources' tasks, read from files."""

from collections.abc import Mapping
from pathlib import Path

from paretomerge.errors import ConfigError, unknown_name
from paretomerge.systems.line_texts import read_line_texts

_KEYS = ("text", "prompt")
_LEAST_TEXTS = 4  # of a source: some are split off to watch the training


def read_all(
    files: Mapping[str, str | Path], sources: tuple[str, ...]
) -> dict[str, list[str]]:
    """Read the texts of every source.

    Args:
        files: Source -> file.
        sources: Names of all sources.

    Returns:
        Source -> its texts, in the order of `sources`.

    Raises:
        ConfigError: If a source is unknown or has no file, or a file is of no use.
    """
    for name in files:
        if name not in sources:
            raise ConfigError(f"data: {unknown_name('source', name, sources)}")
    texts = {}
    for name in sources:
        if name not in files:
            raise ConfigError(
                f"data: {name} has no texts; give every source a file, as in {name}=FILE"
            )
        texts[name] = read_texts(Path(files[name]).expanduser())
    return texts


def read_texts(file: Path) -> list[str]:
    """Read texts: each line of a file, or `text` or `prompt` of each line of a JSONL file.

    Other keys of JSONL, such as answers, are not read.

    Raises:
        ConfigError: If the file cannot be read, or holds fewer than four texts.
    """
    texts = read_line_texts(file, _KEYS, f"data: {file}")
    if len(texts) < _LEAST_TEXTS:
        raise ConfigError(
            f"data: {file}: holds {len(texts)} texts; {_LEAST_TEXTS} are the least, and some "
            "hundred are better"
        )
    return texts
