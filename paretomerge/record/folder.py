"""The folder of a study: whether it can be written, and making it."""

from pathlib import Path
from tempfile import TemporaryDirectory

from filelock import FileLock, Timeout

from paretomerge.errors import StudyError

LOCK_FILE = "study.lock"
"""Held in a study's folder by the process that searches."""


def check_writable(folder: Path, key: str = "out") -> None:
    """Check that a folder can be made and written. Nothing is left behind.

    Args:
        folder: The folder, which need not exist.
        key: The key of a study.yaml that names it, for the message.

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
        raise _error(key, folder, place, error) from error


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
        raise folder_error(folder, error) from error


def is_searched(folder: Path) -> bool:
    """Whether a process of this machine searches in a folder at this moment.

    Args:
        folder: The study's folder.

    Returns:
        False also where it cannot be known, since the lock belongs to another user.
    """
    file = folder / LOCK_FILE
    # A search leaves the file behind when it ends. Looking must not create it.
    if not file.is_file():
        return False
    lock = FileLock(file)
    try:
        # Taken for an instant: a search that begins just now waits longer than that.
        lock.acquire(blocking=False)
    except Timeout:
        return True
    except OSError:
        return False
    lock.release()
    return False


def folder_error(folder: Path, error: OSError) -> StudyError:
    """The error for a study's folder that cannot be written.

    Args:
        folder: The folder.
        error: What the system says.

    Returns:
        The error, with the cure.
    """
    return _error("out", folder, folder, error)


def _error(key: str, folder: Path, place: Path, error: OSError) -> StudyError:
    reason = error.strerror or str(error)
    where = "" if place == folder else f" in {place}"
    return StudyError(
        f"{key}: {folder}: cannot write{where}: {reason}. "
        f"Set another `{key}`, or change the rights."
    )
