"""Copy the shipped example into the user's folder."""

import os
import shutil
from pathlib import Path

from paretomerge.errors import ConfigError
from paretomerge.examples import SPECIALISTS

FOLDER = "paretomerge-quickstart"


def unpack_specialists(parent: Path) -> Path:
    """Copy the specialists, their tasks and their study.yaml, unless an earlier quickstart did.

    Args:
        parent: Where the folder `paretomerge-quickstart` is made.

    Returns:
        The study.yaml in it.

    Raises:
        ConfigError: The folder cannot be written, or is not the quickstart's.
    """
    folder = parent / FOLDER
    study_file = folder / "study.yaml"
    if study_file.is_file():
        return study_file
    if folder.exists():
        raise ConfigError(
            f"{folder} exists and has no study.yaml. Move it away, or go to another folder."
        )
    # Copied under another name and then renamed, so an interrupted copy never looks finished.
    unfinished = parent / f".{FOLDER}.{os.getpid()}"
    try:
        shutil.copytree(SPECIALISTS, unfinished, ignore=shutil.ignore_patterns("runs"))
        unfinished.rename(folder)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise ConfigError(
            f"{parent}: cannot write the quickstart's files here: {error}"
        ) from error
    return study_file
