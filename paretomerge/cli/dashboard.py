"""`paretomerge dashboard`: Optuna's dashboard of a copy of a study, for this machine alone."""

import sys
import time
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from threading import Lock
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer
from wsgiref.simple_server import make_server as make_wsgi_server

from paretomerge.cli.reader import RecordReader
from paretomerge.errors import ConfigError, ParetoMergeError, StudyError
from paretomerge.report.optuna_copy import OptunaCopy
from paretomerge.study.study import Study

# The loopback device: other machines cannot connect. The dashboard has no passwords.
_HOST = "127.0.0.1"
_EVERY = 2.0  # seconds between two looks at the record

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class _Server(ThreadingMixIn, WSGIServer):
    """Answers several requests at a time, as browsers send them."""

    daemon_threads = True


class _QuietHandler(WSGIRequestHandler):
    """Prints no line for each request."""

    def log_message(self, format: str, *args: object) -> None:
        """Do nothing."""


class _Following:
    """The dashboard of a copy that follows the record.

    Args:
        dashboard: Optuna's dashboard of the copy.
        reader: Reads the record.
        copy: The copy.
    """

    def __init__(
        self, dashboard: Application, reader: RecordReader, copy: OptunaCopy
    ) -> None:
        self._dashboard = dashboard
        self._reader = reader
        self._copy = copy
        self._lock = Lock()
        self._looked = time.monotonic()

    def __call__(
        self, environment: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        # The page asks again every few seconds, so no thread of its own is needed.
        with self._lock:
            if time.monotonic() - self._looked > _EVERY:
                self._look()
        return self._dashboard(environment, start_response)

    def _look(self) -> None:
        try:
            results = self._reader.results()
        except ParetoMergeError as error:
            # The trials so far are still worth a look; the database may come back.
            sys.stderr.write(f"note: {error}\n")
            results = None
        if results is not None:
            self._copy.update(results)
        self._looked = time.monotonic()


def make_server(study: Study, port: int) -> WSGIServer:
    """Make the server of a study's dashboard; it has not begun to serve.

    Args:
        study: The study.
        port: The port of this machine; 0 for any free one.

    Returns:
        The server.

    Raises:
        ConfigError: The extra is not installed, or the port is in use.
        StudyError: There is no record yet, or it cannot be read.
    """
    try:
        from optuna_dashboard import wsgi
    except ModuleNotFoundError as error:
        raise ConfigError(
            "The dashboard is not installed: pip install 'paretomerge[dashboard]'. "
            "`paretomerge status --watch` needs no more than is installed."
        ) from error
    reader = RecordReader(study)
    results = reader.results()
    if results is None:
        raise StudyError(
            f"{study.settings.storage}: there is no record here yet. Run the search first."
        )
    copy = OptunaCopy(study.settings.storage.study_name)
    copy.update(results)
    application = _Following(wsgi(copy.storage), reader, copy)
    try:
        return make_wsgi_server(_HOST, port, application, _Server, _QuietHandler)
    except OSError as error:
        raise ConfigError(
            f"--port: {port} cannot be used: {error.strerror}. Set another one, or 0 for any."
        ) from error
