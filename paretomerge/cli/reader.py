"""Read the record of a study again and again while another process searches."""

from paretomerge.errors import StudyError
from paretomerge.record.folder import is_searched
from paretomerge.record.record import Record
from paretomerge.record.results import Results
from paretomerge.study.same_study import check_same_study
from paretomerge.study.study import Study


class RecordReader:
    """Reads a study's record; the record stays open, so that only new trials are fetched.

    Args:
        study: The study.
    """

    def __init__(self, study: Study) -> None:
        self._settings = study.settings
        self._record: Record | None = None

    def results(self) -> Results | None:
        """What the record holds now; None before there is one.

        Raises:
            StudyError: It cannot be read, or is another study's.
        """
        file = self._settings.storage.file
        if file is not None and not file.is_file():
            return None
        try:
            record = self._record or Record.read(self._settings.storage)
        except StudyError:
            # A search that begins makes the file first, and its tables a moment later.
            if is_searched(self._settings.out_folder):
                return None
            raise
        try:
            check_same_study(self._settings, record)
            results = record.results()
        except KeyError:
            # A search has replaced a record without scores by that of the study as it is now.
            self._record = None
            return None
        self._record = record
        return results
