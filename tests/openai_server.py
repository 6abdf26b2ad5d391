"""A small server that speaks `POST /v1/chat/completions`, as well or as badly as a test wants.

    with serve(says('{"w": 0.5}')) as server:
        Endpoint(server.url, "any")

Each request uses the next behaviour; the last one serves all requests that follow. A behaviour is a
function of the handler and the request.
"""

import contextlib
import json
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SOON = 20  # seconds: no busy machine takes so long, and whoever waits for what never comes does


class Handler(BaseHTTPRequestHandler):
    server: "Server"

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        number = len(self.server.requests)
        self.server.requests.append(request)
        self.server.headers.append(dict(self.headers))
        self.server.paths.append(self.path)
        self.server.behaviours[min(number, len(self.server.behaviours) - 1)](
            self, request
        )

    def do_GET(self) -> None:  # only a client that follows a redirect comes here
        self.server.paths.append(self.path)
        self.send_error(405)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(
        self, status: int, body: bytes, length: int | None = None, **headers: str
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def trickle(self, pieces: Iterator[bytes], pause: float = 0.0) -> None:
        """Bytes without an end, until the client has had enough or the server stops."""
        for piece in pieces:
            self.wfile.write(piece)
            if self.server.stopping.wait(pause):
                return


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, behaviours: tuple["Behaviour", ...]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.behaviours = behaviours
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.stopping = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(
            sys.exception(), ConnectionError
        ):  # a client that hangs up is what some tests are about
            super().handle_error(request, client_address)


Behaviour = Callable[[Handler, dict[str, Any]], None]


@contextlib.contextmanager
def serve(*behaviours: Behaviour) -> Iterator[Server]:
    with Server(behaviours) as server:
        thread = threading.Thread(
            target=server.serve_forever, kwargs={"poll_interval": 0.02}
        )
        thread.start()
        try:
            yield server
        finally:
            server.stopping.set()
            server.shutdown()
            thread.join()


def completion(content: Any) -> bytes:
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": content},
        "finish_reason": "stop",
    }
    return json.dumps(
        {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "model": "any",
            "choices": [choice],
        }
    ).encode()


def says(content: Any) -> Behaviour:
    """A correct answer; a function is given the request."""
    return lambda handler, request: handler.answer(
        200, completion(content(request) if callable(content) else content)
    )


def replies(
    status: int,
    body: bytes = b'{"error": {"message": "no"}}',
    length: int | None = None,
    **headers: str,
) -> Behaviour:
    """Any status, body, Content-Length (true unless told) and headers (`Retry_After="1"`)."""
    return lambda handler, request: handler.answer(status, body, length, **headers)


def refuses_response_format(then: Behaviour) -> Behaviour:
    def behave(handler: Handler, request: dict[str, Any]) -> None:
        if "response_format" in request:
            handler.answer(
                400, b'{"error": {"message": "unknown field response_format"}}'
            )
        else:
            then(handler, request)

    return behave


def is_slow(seconds: float, then: Behaviour) -> Behaviour:
    def behave(handler: Handler, request: dict[str, Any]) -> None:
        handler.server.stopping.wait(seconds)
        then(handler, request)

    return behave


def hangs_up(sent: bytes = b"") -> Behaviour:
    """Closes the connection after these bytes, which need not be HTTP."""

    def behave(handler: Handler, request: dict[str, Any]) -> None:
        handler.wfile.write(sent)
        handler.close_connection = True

    return behave


def never_ends(
    piece: bytes = b"x" * 65536,
    pause: float = 0.0,
    head: bytes = b"HTTP/1.0 200 OK\r\n\r\n",
) -> Behaviour:
    """A body, or with an unfinished `head` a heading, that goes on and on."""

    def behave(handler: Handler, request: dict[str, Any]) -> None:
        handler.wfile.write(head)
        handler.trickle(iter(lambda: piece, b""), pause)

    return behave
