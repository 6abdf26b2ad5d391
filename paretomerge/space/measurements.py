"""Files with what was measured of models, so that it is measured once."""

import os
from contextlib import suppress
from pathlib import Path


class Measurements:
    """Texts in files of a folder. New ones are written together, once everything was checked.

    Args:
        folder: The folder. It is created when a file is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._new: dict[str, str] = {}

    def path(self, name: str) -> Path:
        """The file of a measurement."""
        return self.folder / name

    def read(self, name: str) -> str | None:
        """Read a measurement.

        Args:
            name: The name of the file.

        Returns:
            Its text; None where nothing was measured yet.

        Raises:
            OSError: The file cannot be read.
            UnicodeDecodeError: It is no text.
        """
        if name in self._new:
            return self._new[name]
        file = self.path(name)
        if not file.is_file():
            return None
        return file.read_text(encoding="utf-8")

    def add(self, name: str, text: str) -> None:
        """Add a measurement, which `write` writes."""
        self._new[name] = text

    def write(self) -> None:
        """Write what was added; each file appears whole or not at all.

        What cannot be written is left out, and measured again the next time.
        """
        for name, text in self._new.items():
            file = self.path(name)
            # Named by process: two studies over the same models may measure the same at once.
            unfinished = file.with_suffix(f".{os.getpid()}")
            with suppress(OSError):
                self.folder.mkdir(parents=True, exist_ok=True)
                unfinished.write_text(text, encoding="utf-8")
                unfinished.replace(file)
        self._new.clear()
