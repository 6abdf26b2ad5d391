"""The sources of a space: short names for them."""

from collections.abc import Sequence
from pathlib import Path


def named_sources(models: Sequence[str]) -> dict[str, str]:
    """Short names for paths: the last part, or the whole path where two would be alike."""
    short = [Path(model).name for model in models]
    return {(s if short.count(s) == 1 else m.replace("/", "_")): m for s, m in zip(short, models, strict=True)}
