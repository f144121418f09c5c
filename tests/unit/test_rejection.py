"""Error answers of upstreams, in whatever form they come."""

from __future__ import annotations

import json

import pytest

from service.errors import UpstreamProtocolError, UpstreamRateLimited, UpstreamRejected
from service.upstreams.rejection import MAX_MESSAGE_LETTERS, check_content_type, rejection


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
        ("Fri, 31 Dec 1999 23:59:59 GMT", None),
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


def test_the_key_is_taken_out_of_every_message() -> None:
    body = json.dumps({"error": {"message": "key sk-1 is bad, sk-1!"}}).encode()
    assert of(400, body, secret="sk-1").body()["error"]["message"] == "key (hidden) is bad, (hidden)!"


def test_a_message_without_end_is_cut() -> None:
    body = json.dumps({"error": {"message": "x" * 50_000}}).encode()
    assert len(of(400, body).message) == MAX_MESSAGE_LETTERS


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
