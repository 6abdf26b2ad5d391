import pickle
import re
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paretomerge.endpoint import (
    BASE_URL_VARIABLE,
    KEY_VARIABLE,
    MODEL_VARIABLES,
    Endpoint,
    EndpointError,
    _retry_after,
    last_json_object,
)
from paretomerge.errors import ConfigError
from tests.openai_server import (
    SOON,
    completion,
    hangs_up,
    is_slow,
    never_ends,
    refuses_response_format,
    replies,
    says,
    serve,
)

HELLO = [{"role": "user", "content": "hello"}]
SECRET = "sk-very-secret-0123"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in (BASE_URL_VARIABLE, *MODEL_VARIABLES, KEY_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "*")


def refusal(*behaviours, timeout=SOON, key=SECRET) -> str:
    """The error of an endpoint that behaves so; it comes in time and without the key."""
    with serve(*behaviours) as server:
        start = time.monotonic()
        with pytest.raises(EndpointError) as caught:
            Endpoint(server.url, "any", key, timeout=timeout).chat(HELLO)
        assert time.monotonic() - start < SOON
    assert key not in str(caught.value)
    return str(caught.value)


def test_a_reply_is_asked_for_as_the_protocol_says():
    with serve(says("hi")) as server:
        assert (
            Endpoint(server.url + "/", "any", SECRET).chat(
                HELLO, json_object=True, temperature=0
            )
            == "hi"
        )
        assert server.requests == [
            {
                "model": "any",
                "messages": HELLO,
                "temperature": 0,
                "response_format": {"type": "json_object"},
            }
        ]
        assert server.paths == ["/v1/chat/completions"]
        assert server.headers[0]["Authorization"] == f"Bearer {SECRET}"


def test_no_key_sends_no_authorization():
    with serve(says("hi")) as server:
        Endpoint(server.url, "any").chat(HELLO)
        assert (
            "Authorization" not in server.headers[0]
            and "response_format" not in server.requests[0]
        )


def test_the_environment_configures_it(monkeypatch):
    with serve(says("hi")) as server:
        monkeypatch.setenv(BASE_URL_VARIABLE, server.url)
        monkeypatch.setenv("OPENAI_MODEL", "general")
        monkeypatch.setenv(KEY_VARIABLE, f"{SECRET}\n")
        assert Endpoint().model == "general"
        monkeypatch.setenv("PARETOMERGE_LLM_MODEL", "special")
        assert Endpoint().chat(HELLO) == "hi"
        assert (
            server.requests[0]["model"] == "special"
            and server.headers[0]["Authorization"] == f"Bearer {SECRET}"
        )


def test_the_environments_key_does_not_go_to_another_server(monkeypatch):
    monkeypatch.setenv(BASE_URL_VARIABLE, "https://api.example.com/v1")
    monkeypatch.setenv(KEY_VARIABLE, SECRET)
    with serve(says("hi")) as server:
        Endpoint(server.url, "any").chat(HELLO)
        assert SECRET not in str(server.headers)


def test_a_pickled_endpoint_holds_no_key(monkeypatch):
    pickled = pickle.dumps(Endpoint("http://host/v1", "any", SECRET))
    assert b"sk-" not in pickled
    with serve(says("hi")) as server:
        monkeypatch.setenv(BASE_URL_VARIABLE, server.url)
        monkeypatch.setenv(KEY_VARIABLE, SECRET)
        assert pickle.loads(pickle.dumps(Endpoint(model="any"))).chat(HELLO) == "hi"
        assert server.headers[0]["Authorization"] == f"Bearer {SECRET}"


def test_what_is_missing_is_told_with_the_cure():
    with pytest.raises(
        ConfigError, match=r"OPENAI_BASE_URL and OPENAI_MODEL not set. Set .*https://"
    ):
        Endpoint()
    with pytest.raises(ConfigError, match="but OPENAI_MODEL not set"):
        Endpoint("http://localhost:1/v1")


URLS = [
    "file:///etc/passwd",
    "ftp://host/v1",
    "localhost:8000",
    "http://",
    "http://host:port/v1",
    "http://host:99999",
    "http://[::1/v1",
]


@pytest.mark.parametrize(
    "url", [*URLS, "http://a b/v1", "http://ho\nst/v1", "http://hôst/v1"]
)
def test_urls_that_cannot_be(url):
    with pytest.raises(ConfigError, match="expected http"):
        Endpoint(url, "any")


@pytest.mark.parametrize(
    "url",
    ["http://me:secret@host/v1", "http://host/v1?key=secret", "http://host/v1#secret"],
)
def test_urls_that_hold_secrets_are_refused_without_showing_them(url):
    with pytest.raises(ConfigError, match="a key goes into") as caught:
        Endpoint(url, "any")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("key", ["sk-a b", "sk-a\r\nX-Evil: 1", "sk-ключ"])
def test_keys_that_cannot_be_sent_are_refused_without_showing_them(key):
    with pytest.raises(ConfigError, match="not shown") as caught:
        Endpoint("http://host/v1", "any", key)
    assert "sk-" not in str(caught.value)


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf")])
def test_timeouts_that_cannot_be(timeout):
    with pytest.raises(ConfigError, match="timeout"):
        Endpoint("http://host/v1", "any", timeout=timeout)


def test_the_key_is_in_no_text_even_if_the_server_sends_it_back():
    assert "sk-" not in repr(Endpoint("http://host/v1", "any", SECRET))
    assert "***" in refusal(replies(401, f"Incorrect API key: {SECRET}".encode()))
    assert "sk-very" not in refusal(
        replies(401, b"x" * 190 + SECRET.encode())
    )  # cut in its middle
    with serve(says(f"your key is {SECRET}")) as server:
        assert Endpoint(server.url, "any", SECRET).chat(HELLO) == "your key is ***"
    with serve(says("x marks the spot")) as server:
        assert Endpoint(server.url, "any", "x").chat(HELLO) == "x marks the spot"


def test_a_server_that_refuses_the_json_field_is_asked_without_it_from_then_on():
    with serve(refuses_response_format(says("hi"))) as server:
        endpoint = Endpoint(server.url, "any")
        assert [endpoint.chat(HELLO, json_object=True) for _ in range(2)] == [
            "hi",
            "hi",
        ]
        assert ["response_format" in r for r in server.requests] == [True, False, False]


def test_a_request_that_is_bad_for_another_reason_is_no_proof_against_the_json_field():
    with serve(replies(400), replies(400), says("hi")) as server:
        endpoint = Endpoint(server.url, "any")
        with pytest.raises(EndpointError, match="status 400"):
            endpoint.chat(HELLO, json_object=True)
        assert endpoint.chat(HELLO, json_object=True) == "hi"
        assert "response_format" in server.requests[2]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(status):
    with serve(replies(status, Retry_After="0.1"), says("hi")) as server:
        start = time.monotonic()
        assert Endpoint(server.url, "any").chat(HELLO) == "hi"
        assert time.monotonic() - start >= 0.1


def test_retry_after_may_be_a_date_or_nonsense(monkeypatch):
    monkeypatch.setattr(
        "paretomerge.endpoint._INITIAL_PAUSE", 3600.0
    )  # there is no time for the usual one
    past = format_datetime(datetime.now(UTC) - timedelta(days=1), usegmt=True)
    with serve(replies(429, Retry_After=past), says("hi")) as server:
        assert Endpoint(server.url, "any").chat(HELLO) == "hi"
    for told in ("soon", "-1", "²", "Wed, 99 Nov", "1e999"):
        with (
            serve(replies(429, Retry_After=told), says("hi")) as server,
            pytest.raises(EndpointError, match="429"),
        ):
            Endpoint(server.url, "any").chat(HELLO)


@pytest.mark.parametrize(
    ("header", "date", "seconds"),
    [
        ("Wed, 21 Oct 2015 07:28:30 GMT", "Wed, 21 Oct 2015 07:28:00 GMT", 30.0),
        ("Wed, 21 Oct 2015 07:27:00 GMT", "Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
        ("7.5", "Wed, 21 Oct 2015 07:28:00 GMT", 7.5),
        # Without a date of the server, by our clock: long ago.
        ("Wed, 21 Oct 2015 07:28:30 GMT", "", 0.0),
        ("Wed, 21 Oct 2015 07:28:30 GMT", "today", 0.0),
        ("Wed, 21 Oct 2015 07:28:30", "Wed, 21 Oct 2015 07:28:00 GMT", None),
    ],
)
def test_a_date_of_the_server_counts_by_its_own_clock(header, date, seconds):
    assert _retry_after(header, date) == seconds


def test_nobody_waits_longer_than_the_timeout():
    later = format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)
    for told in ("3600", later):
        with serve(replies(429, Retry_After=told)) as server:
            start = time.monotonic()
            with pytest.raises(EndpointError, match="status 429"):
                Endpoint(server.url, "any", timeout=3 * SOON).chat(HELLO)
            assert time.monotonic() - start < SOON and len(server.requests) == 1


def test_retries_end():
    with serve(replies(500, Retry_After="0")) as server:
        with pytest.raises(EndpointError, match="status 500"):
            Endpoint(server.url, "any").chat(HELLO)
        assert len(server.requests) == 3


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_a_refusal_is_final_and_says_what_to_check(status):
    with serve(replies(status), says("hi")) as server:
        with pytest.raises(
            EndpointError,
            match=f"status {status}.*{'' if status == 400 else 'check OPENAI_'}",
        ):
            Endpoint(server.url, "any").chat(HELLO)
        assert len(server.requests) == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(status):
    with (
        serve(says("stolen")) as elsewhere,
        serve(replies(status, Location=f"{elsewhere.url}/chat/completions")) as server,
    ):
        with pytest.raises(EndpointError, match="a redirect is not followed"):
            Endpoint(server.url, "any", SECRET).chat(HELLO)
        assert elsewhere.paths == []


NO_COMPLETIONS = {
    "empty": b"",
    "cut": b"{",
    "null": b"null",
    "a list": b"[]",
    "no choices": b"{}",
    "empty choices": b'{"choices": []}',
    "null choices": b'{"choices": null}',
    "choices as text": b'{"choices": "text"}',
    "choices by name": b'{"choices": {"0": 1}}',
    "no message": b'{"choices": [{}]}',
    "null message": b'{"choices": [{"message": null}]}',
    "null text": completion(None),
    "parts": completion(["parts"]),
    "an error": b'{"error": "quota"}',
    "HTML": b"<html><body>Welcome</body></html>",
    "bytes": b"\xff\xfe\x00\x01",
    "deep": b"[" * 100_000,
    "a huge number": b'{"choices": ' + b"1" * 9_999 + b"}",
}


@pytest.mark.parametrize("body", NO_COMPLETIONS.values(), ids=NO_COMPLETIONS)
def test_what_is_no_chat_completion_is_told(body):
    message = refusal(replies(200, body))
    assert (
        "expected a chat completion" in message
        and len(message) < 1100
        and message.isprintable()
    )


@pytest.mark.parametrize(
    ("behaviour", "told"),
    [
        (is_slow(2 * SOON, says("hi")), "no full answer within 1 s|timed out"),
        (never_ends(b"x", 0.02), "no full answer within 1 s"),
        (
            never_ends(b"X", 0.02, head=b"HTTP/1.0 200 OK\r\nX-A: "),
            "no full answer within 1 s",
        ),
        (hangs_up(), "Server disconnected without sending a response"),
        (
            hangs_up(b"HTTP/1.0 200 OK\r\nContent-Length: 900\r\n\r\n{"),
            "expected a chat completion",
        ),
        (
            hangs_up(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"),
            "expected a chat completion",
        ),
        (hangs_up(b"SSH-2.0-OpenSSH_9.6\r\n\r\n"), "illegal status line"),
        (
            hangs_up(b"HTTP/1.0 200 OK\r\n" + b"X: " + b"y" * 200_000),
            "Receive buffer too long",
        ),
        (replies(200, completion("hi"), length=20), "expected a chat completion"),
    ],
)
def test_servers_that_misbehave_are_left_in_time(behaviour, told):
    assert re.search(
        told, refusal(behaviour, timeout=1 if "within 1 s" in told else SOON)
    )


def test_a_length_that_is_too_long_does_not_hide_a_whole_answer():
    with serve(replies(200, completion("hi"), length=9_999)) as server:
        assert Endpoint(server.url, "any", timeout=SOON).chat(HELLO) == "hi"


def test_a_length_that_is_no_length_is_an_error():
    """RFC 9112, sec. 6.3: a client treats it as an unrecoverable error."""
    assert "bad Content-Length" in refusal(replies(200, completion("hi"), length=-5))


def test_an_endless_body_is_cut():
    assert "more than 1048576 bytes" in refusal(never_ends(), timeout=SOON)


def test_nobody_listens():
    with serve(says("hi")) as server:
        url = server.url
    with pytest.raises(EndpointError, match=r"127.0.0.1.*refused"):
        Endpoint(url, "any").chat(HELLO)


def test_httpx_is_imported_with_the_first_request_only():
    program = (
        "import sys; from paretomerge.endpoint import Endpoint; "
        "Endpoint('http://host/v1', 'any'); sys.exit('httpx2' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@settings(deadline=None)  # a busy machine is no failure
@given(st.text(), st.text())
def test_the_last_object_is_found_whatever_stands_around_it(before, after):
    assert (
        last_json_object(f'{before} {{"w": 0.5}} {after.replace("{", "")}')
        == {"w": 0.5}
        or "{" in before
    )
    last_json_object(before)


@pytest.mark.parametrize(
    "text",
    [
        "{" * 10**6,
        '{"a":' * 10**5,
        '{"' * 10**5,
        '{"a":[' * 10**5,
        "{" + '"a":{},' * 10**5,
    ],
)
def test_a_long_answer_does_not_take_long(text):
    start = time.process_time()
    last_json_object(text)
    assert time.process_time() - start < 2
