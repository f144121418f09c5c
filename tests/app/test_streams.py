"""Streams done right: each over real sockets, with an upstream that misbehaves."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

import httpx2
import openai
import pytest

from service.api.caller import PATIENCE_SECONDS
from service.deadlines import Sweep
from service.domain import Outcome, UsageSource
from tests.fakes.upstream import BIG_DELTA_SIZE, CONTENT, UNICODE_CONTENT, FakeUpstream
from tests.running import RunningWeir

HELLO: Any = [{"role": "user", "content": "Hello!"}]


def text_of(weir: RunningWeir, model: str) -> str:
    chunks = weir.sdk().chat.completions.create(model=model, messages=HELLO, stream=True)
    return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)


def raw_stream(weir: RunningWeir, model: str, path: str = "/v1/chat/completions") -> httpx2.Response:
    body = {"model": model, "messages": HELLO, "stream": True, "input": "Hello!"}
    return httpx2.post(weir.url + path, json=body, timeout=20)


def events_of(response: httpx2.Response) -> list[str]:
    return [e for e in response.text.split("\n\n") if e and not e.startswith(":")]


@pytest.mark.parametrize("model", ["split-1", "split-2", "split-3", "split-7"])
def test_letters_split_over_packets_arrive_whole(weir: RunningWeir, model: str) -> None:
    assert text_of(weir, model) == UNICODE_CONTENT


@pytest.mark.parametrize("model", ["crlf", "multi-data", "one-packet", "gzip"])
def test_every_lawful_framing_is_understood(weir: RunningWeir, model: str) -> None:
    assert text_of(weir, model) == CONTENT
    record = weir.records()[0]
    assert record.outcome is Outcome.SUCCESS
    assert record.usage is not None
    assert record.usage.source is UsageSource.PROVIDER


def test_a_delta_of_one_megabyte_arrives_whole(weir: RunningWeir) -> None:
    assert len(text_of(weir, "big-delta")) >= BIG_DELTA_SIZE


@pytest.mark.parametrize(
    ("model", "outcome", "code"),
    [
        ("stall", Outcome.TIMEOUT, "api_timeout"),
        ("drop", Outcome.STREAM_TRUNCATED, "stream_truncated"),
        ("drop-mid-event", Outcome.STREAM_TRUNCATED, "stream_truncated"),
        ("abort-chunked", Outcome.STREAM_TRUNCATED, "stream_truncated"),
        ("close-no-done", Outcome.STREAM_TRUNCATED, "stream_truncated"),
        ("error-event", Outcome.UPSTREAM_ERROR, "openai_service_error"),
    ],
)
@pytest.mark.parametrize("operation", ["chat", "completions", "responses"])
def test_a_stream_that_goes_wrong_ends_with_an_error_that_the_sdk_raises(
    weir: RunningWeir, model: str, outcome: Outcome, code: str, operation: str
) -> None:
    client = weir.sdk()
    stream: Any
    if operation == "chat":
        stream = client.chat.completions.create(model=model, messages=HELLO, stream=True)
    elif operation == "completions":
        stream = client.completions.create(model=model, prompt="Hello!", stream=True)
    else:
        stream = client.responses.create(model=model, input="Hello!", stream=True)
    pieces = 0
    with pytest.raises(openai.APIError) as caught:
        for _ in stream:
            pieces += 1
    assert pieces >= 2, "what came before the fault is passed on"
    assert caught.value.code == code
    record = weir.records()[0]
    assert record.outcome is outcome
    assert record.usage is not None
    assert record.usage.output_tokens > 0
    if model != "close-no-done" or operation == "responses":
        assert record.usage.source is UsageSource.ESTIMATED


def test_the_error_event_is_the_last_and_the_answer_ends_properly(weir: RunningWeir) -> None:
    response = raw_stream(weir, "drop")  # raises if the chunked body has no end
    events = events_of(response)
    last = json.loads(events[-1].removeprefix("data: "))
    assert set(last["error"]) == {"message", "type", "param", "code"}
    assert "[DONE]" not in response.text


def test_half_an_event_is_never_passed_on(weir: RunningWeir) -> None:
    for event in events_of(raw_stream(weir, "drop-mid-event")):
        json.loads(event.removeprefix("data: "))


@pytest.mark.parametrize(
    ("model", "status"),
    [
        ("error-first", 502),
        ("empty-stream", 502),
        ("stall-first", 504),
        ("refuse-stream", 502),
        ("html", 502),
    ],
)
def test_nothing_is_sent_before_the_first_event_so_its_failure_is_a_status(
    upstream: FakeUpstream, weir: RunningWeir, model: str, status: int
) -> None:
    weir.parts.service.limits = type(weir.parts.service.limits)(0.5, 0.5, 0)
    response = raw_stream(weir, model)
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    assert response.json()["error"]["message"]


def test_comments_alone_are_no_first_event(weir: RunningWeir) -> None:
    weir.parts.service.limits = type(weir.parts.service.limits)(0.5, 0.5, 0)
    assert raw_stream(weir, "stall-comments").status_code == 504


def test_the_status_line_waits_for_the_first_event(weir: RunningWeir, upstream: FakeUpstream) -> None:
    with socket.create_connection(("127.0.0.1", weir.port), timeout=20) as caller:
        send_request(caller, "gate")
        upstream.wait_for_call()
        caller.setblocking(False)
        with pytest.raises(BlockingIOError):
            caller.recv(1)
        upstream.release()
        caller.setblocking(True)
        assert caller.recv(12) == b"HTTP/1.1 200"


def test_a_failed_response_ends_as_the_protocol_wants(weir: RunningWeir) -> None:
    events = list(weir.sdk().responses.create(model="failed", input="Hello!", stream=True))
    assert events[-1].type == "response.failed"


@pytest.mark.parametrize("stream", [True, False])
def test_when_the_caller_leaves_the_upstream_is_cancelled_and_the_call_accounted(
    weir: RunningWeir, upstream: FakeUpstream, stream: bool
) -> None:
    with socket.create_connection(("127.0.0.1", weir.port), timeout=20) as caller:
        send_request(caller, "endless" if stream else "hang", stream=stream)
        call = upstream.wait_for_call()
        if stream:
            assert caller.recv(1000)
    assert call.cancelled.wait(10)
    record = weir.records()[0]
    assert record.outcome is Outcome.CLIENT_DISCONNECTED
    assert record.usage is not None
    assert record.usage.source is UsageSource.ESTIMATED
    assert record.usage.input_tokens > 0
    assert (record.usage.output_tokens > 0) is stream


def test_nothing_in_the_design_delays_a_cancellation_by_a_quarter_second() -> None:
    """How long it takes is measured by `python -m tests.performance.leaving`."""
    assert PATIENCE_SECONDS + 2 * Sweep.PERIOD_SECONDS < 0.25


def test_a_slow_reader_holds_back_the_upstream(weir: RunningWeir, upstream: FakeUpstream) -> None:
    with socket.socket() as caller:
        caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        caller.connect(("127.0.0.1", weir.port))
        send_request(caller, "endless")
        call = upstream.wait_for_call()
        assert caller.recv(1000)
        sent = -1
        while call.bytes_sent != sent:  # until what lies between is full
            sent = call.bytes_sent
            time.sleep(0.3)
        assert sent < 16 * 1024 * 1024
        assert not call.cancelled.is_set(), "waiting for a reader is no stalled upstream"


def test_long_silence_is_filled_with_comments(weir: RunningWeir) -> None:
    response = raw_stream(weir, "ticks-3-350")
    assert response.text.count(": keep-alive\n\n") >= 2
    assert response.text.endswith("data: [DONE]\n\n")


def test_the_sdk_passes_over_the_comments(weir: RunningWeir) -> None:
    chunks = weir.sdk().chat.completions.create(model="ticks-3-250", messages=HELLO, stream=True)
    assert len(list(chunks)) >= 3


def test_headers_keep_proxies_from_buffering(weir: RunningWeir) -> None:
    response = raw_stream(weir, "gpt-4o-mini")
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["cache-control"] == "no-cache, no-transform"
    assert response.headers["transfer-encoding"] == "chunked"


def test_events_are_passed_on_one_by_one_as_they_come(weir: RunningWeir, upstream: FakeUpstream) -> None:
    stream = weir.sdk().chat.completions.create(model="gate-stream", messages=HELLO, stream=True)
    first = [next(stream) for _ in range(2)]
    assert first
    assert not upstream.calls[0].finished.is_set()
    upstream.release()
    assert list(stream)[-1].choices[0].finish_reason == "stop"


def test_a_stream_leaves_its_upstream_connection_for_the_next(
    weir: RunningWeir, upstream: FakeUpstream
) -> None:
    for _ in range(5):
        assert text_of(weir, "gpt-4o-mini") == CONTENT
    assert upstream.connections == 1


def test_time_to_first_token_and_pace_are_recorded(weir: RunningWeir) -> None:
    text_of(weir, "ticks-5-20")
    record = weir.records()[0]
    assert record.time_to_first_token_seconds is not None
    assert 0 < record.time_to_first_token_seconds < record.duration_seconds
    assert record.time_per_output_token_seconds is not None


def send_request(caller: socket.socket, model: str, *, stream: bool = True) -> None:
    body = json.dumps({"model": model, "messages": HELLO, "stream": stream}).encode()
    caller.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: weir\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    )
