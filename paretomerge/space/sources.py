"""The sources of a space: short names for them, and whether their files are still the same."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from paretomerge.checkpoint.reference import is_folder
from paretomerge.errors import ConfigError

_BLOCK, _BLOCKS = 4096, 256  # bytes, and how many such blocks of a file are looked at


def named_sources(models: Sequence[str]) -> dict[str, str]:
    """Short names for paths: the last part, or the whole path where two would be alike. ConfigError: the same model twice."""
    short = [Path(model).name for model in models]
    named: dict[str, str] = {}
    for s, model in zip(short, models, strict=True):
        name = s if short.count(s) == 1 else model.replace("/", "_")
        if name in named:
            raise ConfigError(
                f"models: expected each once, under a name of its own, got {named[name]} and {model}, both {name}"
            )
        named[name] = model
    return named


def digest(model: str) -> str:
    """Of a local model's weights, its adapter's included, wherever they lie and whenever they were copied: of the sizes of the
    files and of blocks spread evenly over each, which no training leaves as they were. "" for what comes from the Hub.
    """
    parts = [
        Path(part).expanduser()
        for part in ([model] if is_folder(model) else model.split("+"))
        if is_folder(part)
    ]
    files = [file for part in parts for file in sorted(part.glob("*.safetensors"))]
    if not files:
        return ""
    found = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        found.update(f"{file.name} {size} ".encode())
        with file.open("rb") as opened:
            for start in range(0, size, max(_BLOCK, -(-size // _BLOCKS))):
                opened.seek(start)
                found.update(opened.read(_BLOCK))
    return found.hexdigest()[:16]
