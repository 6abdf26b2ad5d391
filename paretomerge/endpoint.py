"""A chat client for any server that speaks OpenAI's `POST <base URL>/chat/completions`: standard library only.

Everything is bounded: one answer takes `timeout` seconds at most, whatever the server does, and a reply has
`_MOST_BYTES` at most. The key appears in the one header that needs it and nowhere else.
"""

import json
import os
import queue
import re
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPMessage, HTTPResponse
from typing import Any
from urllib.parse import urlsplit

from paretomerge.errors import ConfigError, ParetoMergeError, shorten

BASE_URL = "OPENAI_BASE_URL"
MODELS = ("PARETOMERGE_LLM_MODEL", "OPENAI_MODEL")
KEY = "OPENAI_API_KEY"

Message = Mapping[str, str]

_MOST_BYTES = 1 << 20
_QUOTED = 200  # characters of a server's own words in an error
_SECRET = (
    8  # characters; shorter keys (`x`, `EMPTY`) only please a local server, and occur in any text
)
_LONGEST_ANSWER = 50_000  # characters that are looked through, from the end
_OBJECT = re.compile(r'\{\s*"')  # how an object begins that is not empty
_RETRIES = 2
_PAUSE = 0.5  # seconds before the first retry, doubled each time, where the server does not say


class EndpointError(ParetoMergeError):
    """A model's endpoint that cannot be reached, refuses, or answers with something that is no chat completion."""


class Endpoint:
    """An OpenAI-compatible server and a model on it.

    base_url: what `/chat/completions` is added to, http or https; by default OPENAI_BASE_URL. There is no default
        server: nobody is sent anything who was not named. model: by default PARETOMERGE_LLM_MODEL or OPENAI_MODEL.
    key: sent as a bearer token; by default OPENAI_API_KEY, but only to the base URL that the environment names too, so
        that a study.yaml from somebody else cannot send the key elsewhere. None or "": no key, as local servers like it.
    timeout: seconds that one answer may take, retries and waiting included.
    Redirects are not followed. Raises ConfigError for settings that are missing or cannot be.
    """

    def __init__(
        self,
        base_url: str | None = None,
        model: str | None = None,
        key: str | None = None,
        *,
        timeout: float = 60.0,
    ) -> None:
        self.base_url = (base_url or os.environ.get(BASE_URL, "")).strip().rstrip("/")
        self.model = model or next(
            (os.environ[name] for name in MODELS if os.environ.get(name)), ""
        )
        self._key = (self._key_of_the_environment() if key is None else key).strip()
        self.timeout = timeout
        self._refuses_json_object = False
        self._check()

    def __repr__(self) -> str:
        return f"Endpoint({self.base_url!r}, {self.model!r})"

    def __getstate__(self) -> dict[str, Any]:
        """Without the key, so that no pickled study holds it; a copy takes the environment's again."""
        return {name: value for name, value in self.__dict__.items() if name != "_key"}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__ |= state
        self._key = self._key_of_the_environment().strip()

    def chat(
        self, messages: Sequence[Message], *, json_object: bool = False, **options: Any
    ) -> str:
        """The model's reply to `messages` ({"role", "content"}); `options` (temperature, ...) are sent as they are.

        json_object: ask the server to make the reply a JSON object. Servers that refuse the field are asked without it.
        Raises EndpointError, after at most `timeout` seconds.
        """
        until = time.monotonic() + self.timeout
        body = {"model": self.model, "messages": list(messages), **options}
        if json_object and not self._refuses_json_object:
            status, reply = self._post(body | {"response_format": {"type": "json_object"}}, until)
            if status not in (400, 415, 422):
                return self._content(status, reply)
            text = self._content(*self._post(body, until))
            self._refuses_json_object = True  # it was the field: without it all is well
            return text
        return self._content(*self._post(body, until))

    def _key_of_the_environment(self) -> str:
        """For the server that the environment names, and no other."""
        named = os.environ.get(BASE_URL, "").strip().rstrip("/")
        return os.environ.get(KEY, "") if self.base_url == named else ""

    def _check(self) -> None:
        missing = [
            name
            for name, value in ((BASE_URL, self.base_url), (MODELS[1], self.model))
            if not value
        ]
        if missing:
            raise ConfigError(
                f"a language model was asked for, but {' and '.join(missing)} not set. Set {BASE_URL} (such as "
                f"https://api.openai.com/v1 or http://localhost:8000/v1), {MODELS[1]}, and {KEY} if the server wants a key"
            )
        try:
            parts = urlsplit(self.base_url)
            usable = (
                parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
            )
        except ValueError:
            usable = False
        if (
            not usable
            or not self.base_url.isascii()
            or not self.base_url.isprintable()
            or " " in self.base_url
        ):
            raise ConfigError(
                f"{BASE_URL}: expected http://... or https://..., got {shorten(self.base_url)}"
            )
        if parts.username is not None or parts.query or parts.fragment:
            raise ConfigError(
                f"{BASE_URL}: expected no name, password, query or fragment in it; a key goes into {KEY}"
            )
        if not (self._key.isascii() and self._key.isprintable()) or " " in self._key:
            raise ConfigError(
                f"{KEY}: expected printable ASCII without spaces, got something else (not shorten)"
            )
        if not 0 < self.timeout < threading.TIMEOUT_MAX:
            raise ConfigError(f"timeout: expected seconds above 0, got {shorten(self.timeout)}")

    def _post(self, body: Mapping[str, Any], until: float) -> tuple[int, bytes]:
        """Status and body; asked again while the server is busy and there is time."""
        for attempt in range(_RETRIES + 1):
            reply = self._once(body, until)
            busy = reply.status in (408, 429) or reply.status >= 500
            wait = _wait_of(reply.headers, _PAUSE * 2**attempt)
            if not busy or attempt == _RETRIES or time.monotonic() + wait >= until:
                break
            time.sleep(wait)
        return reply.status, reply.body

    def _once(self, body: Mapping[str, Any], until: float) -> "_Reply":
        headers = {
            "Content-Type": "application/json",
            "Accept": "application/json",
            "User-Agent": "paretomerge",
        }
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(
            f"{self.base_url}/chat/completions", json.dumps(body).encode(), headers
        )
        try:
            return _within(until, lambda: _send(request, until))
        except TimeoutError as error:
            raise EndpointError(
                f"{self.base_url}: no full answer within {self.timeout:g} s"
            ) from error
        except (OSError, HTTPException, ValueError) as error:
            raise EndpointError(
                f"{self.base_url}: {self._clean(f'{type(error).__name__}: {error}')}"
            ) from None  # may quote a header

    def _content(self, status: int, body: bytes) -> str:
        """The text of the first choice."""
        if not 200 <= status < 300:
            cures = {
                401: f"; check {KEY}",
                403: f"; check {KEY}",
                404: f"; check {BASE_URL} and {MODELS[1]}",
            }
            cure = (
                f"; a redirect is not followed, check {BASE_URL}"
                if 300 <= status < 400
                else cures.get(status, "")
            )
            raise EndpointError(f"{self.base_url}: status {status}, {self._quoted(body)}{cure}")
        try:
            content = json.loads(body)["choices"][0]["message"]["content"]
        except (ValueError, RecursionError, LookupError, TypeError):
            content = None
        if not isinstance(content, str):
            raise EndpointError(
                f"{self.base_url}: expected a chat completion with text, got {self._quoted(body)}; check {BASE_URL}"
            )
        return self._clean(content)

    def _quoted(self, body: bytes) -> str:
        text = self._clean(
            body.decode(errors="replace")
        )  # before it is cut: half a key is still a secret
        return ascii(text if len(text) <= _QUOTED else f"{text[:_QUOTED]}...")

    def _clean(self, text: str) -> str:
        """Without the key, should a server send it back."""
        return text.replace(self._key, "***") if len(self._key) >= _SECRET else text


@dataclass(frozen=True)
class _Reply:
    status: int
    headers: HTTPMessage
    body: bytes


class _AsItIs(urllib.request.HTTPErrorProcessor):
    """Every status is an answer like any other: nothing is raised, and no redirect is followed with the key."""

    def http_response(
        self, request: urllib.request.Request, response: HTTPResponse
    ) -> HTTPResponse:
        return response

    https_response = http_response


def _send(request: urllib.request.Request, until: float) -> _Reply:
    opener = urllib.request.build_opener(_AsItIs)
    with opener.open(request, timeout=max(until - time.monotonic(), 0.001)) as response:
        body = bytearray()
        while piece := response.read1(1 << 16):
            body += piece
            if len(body) > _MOST_BYTES:
                raise ValueError(f"an answer of more than {_MOST_BYTES} bytes")
            if time.monotonic() > until:
                raise TimeoutError
        return _Reply(response.status, response.headers, bytes(body))


def _within(until: float, call: Callable[[], _Reply]) -> _Reply:
    """`call()`, or TimeoutError at `until`: a socket's own timeout starts anew with every byte that trickles in."""
    results: queue.SimpleQueue[_Reply | Exception] = queue.SimpleQueue()

    def work() -> None:
        try:
            results.put(call())
        except Exception as error:  # carried over to the caller's thread
            results.put(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        result = results.get(timeout=max(until - time.monotonic(), 0.0))
    except queue.Empty:
        raise TimeoutError from None
    if isinstance(result, Exception):
        raise result
    return result


def _wait_of(headers: HTTPMessage, otherwise: float) -> float:
    """Seconds that `Retry-After` asks for, as a number or as a date (RFC 9110, sec. 10.2.3)."""
    told = headers.get("Retry-After", "").strip()
    try:
        wait = (
            float(told)
            if told[:1].isdigit()
            else (parsedate_to_datetime(told) - datetime.now(UTC)).total_seconds()
        )
    except (
        ValueError,
        TypeError,
    ):  # absent, or nonsense; a date without a zone cannot be subtracted from
        return otherwise
    return max(wait, 0.0)


def last_object(text: str) -> dict[str, Any] | None:
    """The last JSON object in a text that may have prose, thoughts or a code fence around it."""
    decoder, found, end = json.JSONDecoder(), None, 0
    text = text[-_LONGEST_ANSWER:]
    while start := _OBJECT.search(text, end):
        try:
            found, end = decoder.raw_decode(text, start.start())
        except RecursionError:
            break  # nothing that deep is an answer, and each level would be tried anew
        except ValueError:
            end = start.start() + 1
    return found
