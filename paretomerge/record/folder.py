"""The folder of a study: whether it can be written, and making it."""

from pathlib import Path
from tempfile import TemporaryDirectory

from paretomerge.errors import StudyError


def check_writable(folder: Path) -> None:
    """Check that a folder can be made and written. Nothing is left behind.

    Args:
        folder: The folder, which need not exist.

    Raises:
        StudyError: It cannot.
    """
    place = folder
    try:
        while not place.exists():
            place = place.parent
        # Tried and not asked for: rights, quotas and kinds of file systems all play a part.
        with TemporaryDirectory(dir=place, prefix=".paretomerge-"):
            pass
    except OSError as error:
        raise _error(folder, place, error) from error


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, unless they are there.

    Args:
        folder: The folder.

    Raises:
        StudyError: It cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _error(folder, folder, error) from error


def _error(folder: Path, place: Path, error: OSError) -> StudyError:
    reason = error.strerror or str(error)
    where = "" if place == folder else f" in {place}"
    return StudyError(
        f"out: {folder}: cannot write{where}: {reason}. Set another `out`, or change the rights."
    )
