"""JSON objects in files: config.json, the index of shards, tokenizer files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paretomerge.errors import CheckpointError

# Any: what a JSON file holds is checked where each key is read.
JsonObject = dict[str, Any]
"""A JSON object, as `json` reads it."""

ReadOnlyJson = Mapping[str, Any]
"""A JSON object that is only read."""


def read_json(path: Path, label: str | None = None) -> JsonObject:
    """Read a JSON object from a file.

    Args:
        path: The file.
        label: Name of the file in error messages; its path by default.

    Raises:
        CheckpointError: If the file is missing or does not hold a JSON object.
    """
    label = label or str(path)
    data = _load(path, label)
    if data is None:
        raise CheckpointError(
            f"{label}: not found in {path.parent}; is this a Hugging Face model folder?"
        )
    return data


def read_optional_json(path: Path) -> JsonObject:
    """Read a JSON object from a file; return `{}` if there is no file.

    Raises:
        CheckpointError: If the file does not hold a JSON object.
    """
    return _load(path, str(path)) or {}


def _load(path: Path, label: str) -> JsonObject | None:
    # RecursionError: a file of nothing but opening brackets nests too deeply for the parser.
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{label}: not valid JSON: {error}; download the model again"
        ) from error
    if not isinstance(data, dict):
        raise CheckpointError(
            f"{label}: expected a JSON object, got {type(data).__name__}; download the model again"
        )
    return data


def write_json(path: Path, data: ReadOnlyJson) -> None:
    """Write a JSON object with an indentation of two spaces."""
    text = json.dumps(data, indent=2, ensure_ascii=False)
    path.write_text(f"{text}\n", encoding="utf-8")
