"""Error answers of upstreams, in whatever form they come."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from service.errors import (
    WORDS_MOST_LETTERS,
    UpstreamProtocolError,
    UpstreamRateLimited,
    UpstreamRejected,
    without_secrets,
)
from service.upstreams.rejection import check_content_type, rejection


def of(
    status: int, body: bytes = b"{}", retry_after: str | None = None, secret: str | None = None
) -> UpstreamRejected:
    error = rejection(status, body, retry_after=retry_after, request_id="req-1", secret=secret)
    assert isinstance(error, UpstreamRejected)
    return error


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("", None),
        ("0", 0.0),
        ("7", 7.0),
        ("1.5", 1.5),
        (" 2 ", 2.0),
        ("-1", None),
        ("soon", None),
        ("nan", None),
        ("Fri, 31 Dec 1999 23:59:59 GMT", 0.0),
        ("999999", 3_600.0),
        ("inf", 3_600.0),
    ],
)
def test_retry_after_is_read_in_seconds_within_reason(header: str | None, seconds: float | None) -> None:
    error = rejection(429, b"", retry_after=header, request_id=None, secret=None)
    assert isinstance(error, UpstreamRateLimited)
    assert error.retry_after_seconds == seconds


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error":{"message":"No such field."}}', "No such field."),
        (b'{"error":"No such field."}', "No such field."),
        (b'{"detail":"No such field."}', "No such field."),
        (b'{"error":null}', "The upstream answered 400."),
        (b'{"error":[1]}', "[1]"),
        (b'{"detail":[{"msg":"x"}]}', '[{"msg":"x"}]'),
        (b'{"object":"error","message":"No such field.","code":400}', "No such field."),
        (b'["error"]', "The upstream answered 400."),
        (b"<html>", "The upstream answered 400."),
        (b"", "The upstream answered 400."),
        (b'{"error":"\xff"}', "The upstream answered 400."),
        (b"[" * 60_000, "The upstream answered 400."),
    ],
)
def test_the_message_is_found_where_servers_put_it(body: bytes, message: str) -> None:
    assert of(400, body).message == message


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 504, 529])
def test_the_time_that_an_upstream_asks_for_is_known_whatever_its_status(status: int) -> None:
    error = rejection(status, b"", retry_after="7", request_id=None, secret=None)
    assert error.retry_after_seconds == 7.0
    assert error.retry


def test_the_key_is_taken_out_of_every_message() -> None:
    body = json.dumps({"error": {"message": "key sk-1 is bad, sk-1!"}}).encode()
    assert of(400, body, secret="sk-1").body()["error"]["message"] == "key (hidden) is bad, (hidden)!"


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("Incorrect API key provided: sk-abcde***xyz9.", "Incorrect API key provided: (hidden)."),
        ("'Bearer abc.def' is refused", "'(hidden)' is refused"),
        ("gsk_abcdefghijklmnop1234, xai-abcdefghijklmnop1234", "(hidden), (hidden)"),
        ("AIza" + "x" * 35 + " or api_key=abcdefgh is bad", "(hidden) or (hidden) is bad"),
        ("Cannot connect to http://10.0.3.7:8000/v1/chat.", "Cannot connect to (hidden)"),
        ("dial tcp 192.168.1.20:443: refused", "dial tcp (hidden): refused"),
        ("no route to 172.20.0.5, nor to 127.0.0.1", "no route to (hidden), nor to (hidden)"),
        ("vllm-0.vllm.models.svc.cluster.local:8000 is down", "(hidden) is down"),
        ("see vllm.models.svc and localhost:8000", "see (hidden) and (hidden)"),
        (
            "See https://platform.openai.com/account/api-keys.",
            "See https://platform.openai.com/account/api-keys.",
        ),
        ("Cannot connect to host vllm:8000 ssl:default", "Cannot connect to host (hidden) ssl:default"),
        ("POST http://ollama/v1/chat fails. Ask http://llm.", "POST (hidden) fails. Ask (hidden)."),
        ("at HTTP://GPU-1.Models.SVC/v1 or Localhost:80", "at (hidden) or (hidden)"),
        ("gpu.models:443, http://gpu.models:80/v1", "(hidden), (hidden)"),
        ("lost [::1]:8000, http://[fd00::2]:80/v1, fe80::1%eth0", "lost (hidden), (hidden) (hidden)"),
        ("100.64.3.7:8000, 0.0.0.0:80, 100.128.0.1", "(hidden), (hidden), 100.128.0.1"),
        ("http://me:word@example.com/v1 says no", "(hidden) says no"),
        ("dial tcp gpu:80; connecting to gpu.models:80", "dial tcp (hidden); connecting to (hidden)"),
        ("upstream llm-1:8000/v1 and 93.184.216.34:8000", "upstream (hidden) and (hidden)"),
        ("tcp://vllm:8000 or redis://redis-master:6379/0", "tcp://(hidden) or redis://(hidden)"),
        ("server \"vllm:8000\", host='gpu-1:8000'", "server \"(hidden)\", host='(hidden)'"),
        (
            "refused: vllm:8000 (upstream (llm:8000), addr=llm:8001)",
            "refused: (hidden) (upstream ((hidden)), addr=(hidden))",
        ),
        ("dial vllm:8000: connect ECONNREFUSED vllm:8000", "dial (hidden): connect ECONNREFUSED (hidden)"),
        *(
            (words, words)
            for words in (
                "line:42, gpt-4:0613, max_tokens:4096",
                "tokens:4096, line:1234, gemma2:2024",
                "messages.0.content:10 and input.text:25 are bad",
                "file.py:12, us.anthropic.claude-3:20",
                "Error code:40001, upstream status:502, host temperature:10",
                "Invalid token: endfor expected, secret: required",
                "Missing authorization: you did not send a key. Ask for one.",
                "Send a Bearer token to https://api.example.com/v1 or 93.184.216.34",
            )
        ),
        (
            '[{"loc":["a"],"ctx":{"le":4096}}], a[0:2], 12:30:15',
            '[{"loc":["a"],"ctx":{"le":4096}}], a[0:2], 12:30:15',
        ),
        ("at most 10.5 of 172.15.0.1", "at most 10.5 of 172.15.0.1"),
        ("a locally-internalized localhosts task-force", "a locally-internalized localhosts task-force"),
    ],
)
def test_an_upstreams_words_are_shown_without_keys_and_addresses_of_the_inside(
    words: str, shown: str
) -> None:
    assert without_secrets(words) == shown
    body = json.dumps({"error": {"message": words}}).encode()
    assert of(400, body).message == shown


def test_words_made_to_be_slow_are_read_quickly() -> None:
    for piece in ("a.", "a", "sk-", "10.", "http://", "host a.", "connect to a:80", "://a", 'addr="'):
        words = piece * 100_000
        began = time.process_time()
        without_secrets(words)
        assert time.process_time() - began < 1.0


def test_a_message_without_end_is_cut() -> None:
    body = json.dumps({"error": {"message": "x" * 50_000}}).encode()
    assert len(of(400, body).message) == WORDS_MOST_LETTERS


def test_a_key_at_the_cut_is_hidden() -> None:
    words = "-" * (WORDS_MOST_LETTERS - 10) + " AIza" + "x" * 35
    assert without_secrets(words).endswith(" (hidden)")


@pytest.mark.parametrize(
    ("content_type", "stream", "good"),
    [
        ("application/json", False, True),
        ("Application/JSON; charset=utf-8", False, True),
        ("text/event-stream", True, True),
        ("TEXT/EVENT-STREAM;charset=UTF-8", True, True),
        ("application/json", True, False),
        ("text/event-stream", False, False),
        ("text/html", False, False),
        ("", False, False),
        ("", True, False),
    ],
)
def test_an_answer_must_have_the_form_that_was_asked_for(content_type: str, stream: bool, good: bool) -> None:
    if good:
        check_content_type(content_type, stream=stream, status=200)
        return
    with pytest.raises(UpstreamProtocolError) as caught:
        check_content_type(content_type, stream=stream, status=200)
    assert (content_type or "no content type") in caught.value.message


@pytest.mark.parametrize("name", ["message", "type", "param", "code"])
def test_no_key_and_no_inside_address_is_in_any_part_of_an_upstreams_words(name: str) -> None:
    said = "it is sk-abcdefghij at http://vllm.prod.svc.cluster.local:8000/v1"
    body = json.dumps({"error": {"message": "No.", name: said}}).encode()
    shown = json.dumps(of(400, body).body())
    assert "sk-abcdefghij" not in shown
    assert "svc.cluster" not in shown


def test_retry_after_may_be_a_date() -> None:
    soon = format_datetime(datetime.now(tz=UTC) + timedelta(seconds=30), usegmt=True)
    error = rejection(429, b"", retry_after=soon, request_id=None, secret=None)
    assert error.retry_after_seconds is not None
    assert 20 < error.retry_after_seconds <= 30
    gone = format_datetime(datetime(2020, 1, 1, tzinfo=UTC), usegmt=True)
    assert rejection(429, b"", retry_after=gone, request_id=None, secret=None).retry_after_seconds == 0
    odd = rejection(429, b"", retry_after="Sat, 99", request_id=None, secret=None)
    assert odd.retry_after_seconds is None
