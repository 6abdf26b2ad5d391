"""A chat client for OpenAI-compatible servers: `POST <base URL>/chat/completions`.

Every request is bounded: it takes `timeout` seconds at most, whatever the server does, and a reply
has at most `_MAX_BYTES` bytes. The API key is sent in the `Authorization` header and appears
nowhere else: not in errors, not in `repr`, not in a pickled endpoint.

`httpx2` is imported when the first request is sent, so that importing this module stays cheap.
"""

import json
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cached_property
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from paretomerge.errors import ConfigError, ParetoMergeError, shorten

if TYPE_CHECKING:
    import httpx2

BASE_URL_VARIABLE = "OPENAI_BASE_URL"
"""Environment variable: the default base URL."""

MODEL_VARIABLES = ("PARETOMERGE_LLM_MODEL", "OPENAI_MODEL")
"""Environment variables: the default model; the first one that is set counts."""

KEY_VARIABLE = "OPENAI_API_KEY"
"""Environment variable: the default API key."""

Message = Mapping[str, str]
"""One message of a chat, with the keys `role` and `content`."""

_MAX_BYTES = 1 << 20
_MAX_QUOTED = 200  # characters of a server's reply in an error message
_MAX_RETRIES = 2
_INITIAL_PAUSE = (
    0.5  # seconds; doubles with each retry unless the server sends Retry-After
)
_MAX_SEARCHED = 50_000  # characters at the end of a reply that are searched for JSON
# Shorter keys (`x`, `EMPTY`) are placeholders for local servers and occur in any text.
_MIN_SECRET_LENGTH = 8
_OBJECT_START = re.compile(r'\{\s*"')
_HINTS = {
    401: f"; check {KEY_VARIABLE}",
    403: f"; check {KEY_VARIABLE}",
    404: f"; check {BASE_URL_VARIABLE} and {MODEL_VARIABLES[1]}",
}
_UNPROCESSABLE = (
    400,
    415,
    422,
)  # how servers answer a request field that they do not support


class EndpointError(ParetoMergeError):
    """A model's server that cannot be reached, refuses, or sends no chat completion.

    Where `Endpoint` raises it, the message starts with the server's base URL.
    """


class Endpoint:
    """An OpenAI-compatible server and a model on it.

    There is no default server: data goes only to a server that the user or the environment names.
    Redirects are not followed.

    Args:
        base_url: The http or https URL that `/chat/completions` is appended to. Defaults to
            OPENAI_BASE_URL.
        model: The model's name on the server. Defaults to PARETOMERGE_LLM_MODEL, then OPENAI_MODEL.
        key: The API key, sent as a bearer token. Defaults to OPENAI_API_KEY, but only where
            `base_url` is the one in OPENAI_BASE_URL: a study.yaml from someone else must not send
            the key to another server. An empty string sends no key.
        timeout: Seconds that one call of `chat` may take, retries and pauses included.

    Raises:
        ConfigError: A setting is missing or invalid.
    """

    def __init__(
        self,
        base_url: str | None = None,
        model: str | None = None,
        key: str | None = None,
        *,
        timeout: float = 60.0,
    ) -> None:
        self.base_url = _clean_url(base_url or os.environ.get(BASE_URL_VARIABLE, ""))
        self.model = model or _default_model()
        self._key = (self._environment_key() if key is None else key).strip()
        self.timeout = timeout
        self._json_object_unsupported = False
        self._check_complete()
        self._check_url()
        self._check_key()
        if not 0 < timeout < threading.TIMEOUT_MAX:
            raise ConfigError(
                f"timeout: expected seconds above 0, got {shorten(timeout)}"
            )

    def __repr__(self) -> str:
        return f"Endpoint({self.base_url!r}, {self.model!r})"

    def __getstate__(self) -> dict[str, object]:
        """Drop the key, so that no pickled study holds it.

        A copy reads the key from the environment again.
        """
        state = dict(self.__dict__)
        state.pop("_key")
        # A client holds locks and an SSL context, which cannot be pickled.
        state.pop("_client", None)
        return state

    def __setstate__(self, state: Mapping[str, object]) -> None:
        self.__dict__ |= state
        self._key = self._environment_key().strip()

    def chat(
        self,
        messages: Sequence[Message],
        *,
        json_object: bool = False,
        **options: object,
    ) -> str:
        """Send a chat and return the model's reply.

        Args:
            messages: The chat so far.
            json_object: Ask the server for a reply that is a JSON object. The request is repeated
                without this field if the server refuses it.
            **options: Further fields of the request, such as `temperature`.

        Returns:
            The text of the first choice, with the API key masked.

        Raises:
            EndpointError: There is no valid reply within `timeout` seconds.
        """
        deadline = time.monotonic() + self.timeout
        body = {"model": self.model, "messages": list(messages), **options}
        if not json_object or self._json_object_unsupported:
            return self._content(self._post(body, deadline))
        reply = self._post(
            body | {"response_format": {"type": "json_object"}}, deadline
        )
        if reply.status not in _UNPROCESSABLE:
            return self._content(reply)
        text = self._content(self._post(body, deadline))
        # Only now is it known that the field was at fault and not the rest of the request.
        self._json_object_unsupported = True
        return text

    def _environment_key(self) -> str:
        """The environment's key, if the environment also names this server."""
        environment_url = _clean_url(os.environ.get(BASE_URL_VARIABLE, ""))
        if self.base_url != environment_url:
            return ""
        return os.environ.get(KEY_VARIABLE, "")

    def _check_complete(self) -> None:
        required = {BASE_URL_VARIABLE: self.base_url, MODEL_VARIABLES[1]: self.model}
        missing = [name for name, value in required.items() if not value]
        if missing:
            raise ConfigError(
                f"A language model is needed, but {' and '.join(missing)} not set. "
                f"Set {BASE_URL_VARIABLE} (such as https://api.openai.com/v1 or "
                f"http://localhost:8000/v1), {MODEL_VARIABLES[1]}, and {KEY_VARIABLE} if the "
                f"server needs a key."
            )

    def _check_url(self) -> None:
        url = self.base_url
        if not _is_http_url(url):
            raise ConfigError(
                f"{BASE_URL_VARIABLE}: expected http://... or https://..., got {shorten(url)}"
            )
        parts = urlsplit(url)
        if parts.username is not None or parts.query or parts.fragment:
            # The message does not quote the URL, which may contain a password.
            raise ConfigError(
                f"{BASE_URL_VARIABLE} must not contain a user name, password, query or fragment; "
                f"a key goes into {KEY_VARIABLE}"
            )

    def _check_key(self) -> None:
        if not _is_printable_ascii(self._key):
            raise ConfigError(
                f"{KEY_VARIABLE} must be printable ASCII without spaces; its value is not shown"
            )

    @cached_property
    def _client(self) -> "httpx2.Client":
        import httpx2

        # A connection that stays open between requests may be closed by the server just when the
        # next request uses it. One connection per request avoids that race.
        return httpx2.Client(
            headers={"User-Agent": "paretomerge", "Accept": "application/json"},
            limits=httpx2.Limits(max_keepalive_connections=0),
            follow_redirects=False,
        )

    def _post(self, body: Mapping[str, object], deadline: float) -> "_Reply":
        """Send one request; repeat it while the server is busy and time is left."""
        for attempt in range(_MAX_RETRIES + 1):
            reply = self._post_once(body, deadline)
            pause = _retry_after(reply.retry_after, reply.date)
            if pause is None:
                pause = _INITIAL_PAUSE * 2**attempt
            is_last = attempt == _MAX_RETRIES or time.monotonic() + pause >= deadline
            if not reply.is_busy or is_last:
                break
            time.sleep(pause)
        return reply

    def _post_once(self, body: Mapping[str, object], deadline: float) -> "_Reply":
        import httpx2

        try:
            return _call_before(deadline, lambda: self._send(body, deadline))
        except (TimeoutError, httpx2.TimeoutException) as error:
            raise EndpointError(
                f"{self.base_url}: no full answer within {self.timeout:g} s"
            ) from error
        except (
            httpx2.HTTPError,
            httpx2.InvalidURL,
            OSError,
            ValueError,
            ImportError,
        ) as error:
            reason = self._masked(f"{type(error).__name__}: {error}")
            # `from None`: the original error may quote the header with the key.
            raise EndpointError(f"{self.base_url}: {reason}") from None

    def _send(self, body: Mapping[str, object], deadline: float) -> "_Reply":
        import httpx2

        content = bytearray()
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        with self._client.stream(
            "POST",
            f"{self.base_url}/chat/completions",
            json=body,
            headers=headers,
            timeout=max(deadline - time.monotonic(), 0.001),
        ) as response:
            try:
                for chunk in response.iter_bytes():
                    content += chunk
                    if len(content) > _MAX_BYTES:
                        raise ValueError(f"the reply has more than {_MAX_BYTES} bytes")
                    if time.monotonic() > deadline:
                        raise TimeoutError
            except httpx2.RemoteProtocolError:
                # The connection ended before Content-Length bytes came. Some servers send a wrong
                # length with a complete reply, so the JSON parser decides whether this is one.
                pass
            retry_after = response.headers.get("Retry-After", "").strip()
            date = response.headers.get("Date", "")
            return _Reply(response.status_code, retry_after, date, bytes(content))

    def _content(self, reply: "_Reply") -> str:
        """The text of the first choice."""
        if not reply.is_success:
            hint = _HINTS.get(reply.status, "")
            if reply.is_redirect:
                hint = f"; a redirect is not followed, check {BASE_URL_VARIABLE}"
            raise EndpointError(
                f"{self.base_url}: status {reply.status}, {self._quoted(reply.body)}{hint}"
            )
        try:
            content = json.loads(reply.body)["choices"][0]["message"]["content"]
        except (ValueError, RecursionError, LookupError, TypeError):
            content = None
        if not isinstance(content, str):
            raise EndpointError(
                f"{self.base_url}: expected a chat completion with text, "
                f"got {self._quoted(reply.body)}; check {BASE_URL_VARIABLE}"
            )
        return self._masked(content)

    def _quoted(self, body: bytes) -> str:
        # The key is masked before the text is cut: half a key is still a secret.
        text = self._masked(body.decode(errors="replace"))
        if len(text) > _MAX_QUOTED:
            text = f"{text[:_MAX_QUOTED]}..."
        return ascii(text)

    def _masked(self, text: str) -> str:
        """`text` without the key, in case a server sends it back."""
        if len(self._key) < _MIN_SECRET_LENGTH:
            return text
        return text.replace(self._key, "***")


def last_json_object(text: str) -> dict[str, object] | None:
    """Return the last JSON object in a text that may have prose or a code fence around it.

    Args:
        text: A model's reply. Only its last 50,000 characters are searched.

    Returns:
        The object, or None where there is none that has a key.
    """
    decoder = json.JSONDecoder()
    text = text[-_MAX_SEARCHED:]
    last: dict[str, object] | None = None
    position = 0
    while start := _OBJECT_START.search(text, position):
        try:
            last, position = decoder.raw_decode(text, start.start())
        except RecursionError:
            # Each level of the nesting would be tried anew, which takes quadratic time.
            break
        except ValueError:
            position = start.start() + 1
    return last


@dataclass(frozen=True)
class _Reply:
    """A server's answer; `retry_after` and `date` are the headers of these names."""

    status: int
    retry_after: str
    date: str
    body: bytes

    @property
    def is_success(self) -> bool:
        return 200 <= self.status < 300

    @property
    def is_redirect(self) -> bool:
        return 300 <= self.status < 400

    @property
    def is_busy(self) -> bool:
        return self.status in (408, 429) or self.status >= 500


def _default_model() -> str:
    for variable in MODEL_VARIABLES:
        if os.environ.get(variable):
            return os.environ[variable]
    return ""


def _clean_url(url: str) -> str:
    return url.strip().rstrip("/")


def _is_printable_ascii(text: str) -> bool:
    return text.isascii() and text.isprintable() and " " not in text


def _is_http_url(url: str) -> bool:
    if not _is_printable_ascii(url):
        return False
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return False
    if parts.scheme not in ("http", "https"):
        return False
    return bool(parts.hostname) and port != 0


def _call_before(deadline: float, call: Callable[[], _Reply]) -> _Reply:
    """Return `call()`, or raise TimeoutError at `deadline`.

    The timeouts of httpx2 hold for each read, so a server that sends a byte now and then would
    never hit them. A daemon thread can be abandoned.
    """
    results: queue.SimpleQueue[_Reply | Exception] = queue.SimpleQueue()

    def work() -> None:
        try:
            results.put(call())
        except Exception as error:  # raised again in the caller's thread
            results.put(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        result = results.get(timeout=max(deadline - time.monotonic(), 0.0))
    except queue.Empty:
        raise TimeoutError from None
    if isinstance(result, Exception):
        raise result
    return result


def _retry_after(header: str, date: str) -> float | None:
    """Seconds to wait by a `Retry-After` header, a number or a date (RFC 9110, sec. 10.2.3).

    A date counts from the server's `Date`: our clock may be an hour away from its clock.

    Returns None where the header is absent or invalid.
    """
    try:
        if header[:1].isdigit():
            return max(float(header), 0.0)
        retry_at = parsedate_to_datetime(header)
        wait = retry_at - (_parsed_date(date) or datetime.now(UTC))
    except (ValueError, TypeError):  # TypeError: a date without a time zone
        return None
    return max(wait.total_seconds(), 0.0)


def _parsed_date(header: str) -> datetime | None:
    try:
        return parsedate_to_datetime(header)
    except (ValueError, TypeError):
        return None
