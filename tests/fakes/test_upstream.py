"""The fake upstream, looked at with the real SDK and, where that sees too little, with a bare socket."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.fakes import upstream as fake
from tests.fakes.upstream import BEHAVIOURS, CONTENT, UNICODE_CONTENT, FakeUpstream

USER: list[Any] = [{"role": "user", "content": "Hi"}]
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
]


@pytest.fixture
def upstream() -> Iterator[FakeUpstream]:
    with FakeUpstream() as server:
        yield server
    assert server.errors == []


@pytest.fixture
def client(upstream: FakeUpstream) -> Iterator[OpenAI]:
    with OpenAI(base_url=upstream.base_url, api_key="sk-test", max_retries=0, timeout=30) as sdk:
        yield sdk


def stream_text(client: OpenAI, model: str, **options: Any) -> str:
    stream = client.chat.completions.create(model=model, messages=USER, stream=True, **options)
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


def raw_request(payload: Any, path: str = "/v1/chat/completions") -> bytes:
    body = json.dumps(payload).encode()
    return f"POST {path} HTTP/1.1\r\nhost: fake\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


def connect(upstream: FakeUpstream) -> socket.socket:
    return socket.create_connection((upstream.host, upstream.port), timeout=30)


def read_all(sock: socket.socket) -> bytes:
    """What comes until the peer closes; a reset counts as a close."""
    data = bytearray()
    try:
        while part := sock.recv(65536):
            data += part
    except ConnectionResetError:
        pass
    return bytes(data)


def test_a_chat_answer(upstream: FakeUpstream, client: OpenAI) -> None:
    answer = client.chat.completions.create(model="gpt-4o-mini", messages=USER, n=2, logprobs=True)
    assert [choice.message.content for choice in answer.choices] == [CONTENT, CONTENT]
    assert answer.choices[0].logprobs is not None
    assert answer.usage is not None
    assert answer.usage.total_tokens == 18
    assert answer._request_id == "req_fake_1"
    seen = upstream.requests[0]
    assert (seen.method, seen.path, seen.json["model"]) == ("POST", "/v1/chat/completions", "gpt-4o-mini")
    assert seen.headers["authorization"] == "Bearer sk-test"
    assert upstream.wait_for_call().finished.wait(10)


def test_a_chat_stream_with_usage(client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model="gpt-4o-mini", messages=USER, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == CONTENT
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    assert (usage.completion_tokens, usage.prompt_tokens_details.cached_tokens) == (6, 4)


def test_tool_calls(client: OpenAI) -> None:
    whole = client.chat.completions.create(model="gpt-4o-mini", messages=USER, tools=TOOLS)
    assert whole.choices[0].finish_reason == "tool_calls"
    with client.chat.completions.stream(model="gpt-4o-mini", messages=USER, tools=TOOLS) as stream:
        final = stream.get_final_completion()
    for answer in (whole.choices[0].message, final.choices[0].message):
        assert answer.tool_calls
        call: Any = answer.tool_calls[0]
        assert (call.function.name, call.function.arguments) == ("get_weather", fake.TOOL_ARGUMENTS)


def test_responses(client: OpenAI) -> None:
    whole = client.responses.create(model="gpt-4o-mini", input="Hi")
    with client.responses.stream(model="gpt-4o-mini", input="Hi") as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert [event.sequence_number for event in events if hasattr(event, "sequence_number")][:3] == [0, 1, 2]
    for answer in (whole, final):
        assert answer.output_text == CONTENT
        assert answer.usage is not None
        assert answer.usage.input_tokens_details.cached_tokens == 4
        assert answer.usage.output_tokens_details.reasoning_tokens == 2


def test_a_responses_tool_call_stream(client: OpenAI) -> None:
    tools: Any = [{"type": "function", "name": "get_weather", "parameters": {}, "strict": False}]
    with client.responses.stream(model="gpt-4o-mini", input="Hi", tools=tools) as stream:
        item: Any = stream.get_final_response().output[0]
    assert (item.type, item.name, item.arguments) == ("function_call", "get_weather", fake.TOOL_ARGUMENTS)


def test_responses_that_fail(client: OpenAI) -> None:
    failed = list(client.responses.create(model="failed", input="Hi", stream=True))
    assert failed[-1].type == "response.failed"
    numbers = [event.sequence_number for event in failed]
    assert numbers == list(range(len(failed)))
    assert client.responses.create(model="failed", input="Hi").status == "failed"
    error = list(client.responses.create(model="error-event", input="Hi", stream=True))[-1]
    assert (error.type, error.sequence_number) == ("error", 6)


def test_embeddings_completions_and_models(client: OpenAI) -> None:
    for encoding in ("float", "base64"):
        options: Any = {"encoding_format": encoding}
        answer = client.embeddings.create(model="text-embedding-3-small", input=["a", "b"], **options)
        assert len(answer.data) == 2
        assert answer.usage.prompt_tokens == 5
    assert client.embeddings.create(model="m", input="a").data[0].embedding == list(fake.VECTOR)
    text = client.completions.create(model="gpt-3.5-turbo-instruct", prompt="Hi", logprobs=1)
    assert text.choices[0].text == CONTENT
    pieces = client.completions.create(model="gpt-3.5-turbo-instruct", prompt="Hi", stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == CONTENT
    assert "gpt-4o-mini" in [model.id for model in client.models.list()]
    assert client.models.retrieve("my-model").id == "my-model"


def test_azure_paths(upstream: FakeUpstream) -> None:
    with openai.AzureOpenAI(
        azure_endpoint=upstream.origin, api_key="k", api_version="2024-10-21", max_retries=0
    ) as client:
        assert client.chat.completions.create(model="mine", messages=USER).model == "mine"
        with pytest.raises(openai.AuthenticationError, match="provided: k"):
            client.chat.completions.create(model="status-401", messages=USER)
    seen = upstream.requests[0]
    assert seen.path == "/openai/deployments/mine/chat/completions"
    assert seen.query == {"api-version": "2024-10-21"}


def test_statuses(upstream: FakeUpstream, client: OpenAI) -> None:
    with pytest.raises(openai.RateLimitError) as limited:
        client.chat.completions.create(model="status-429-after", messages=USER)
    assert limited.value.response.headers["retry-after"] == "7"
    assert limited.value.code == "fake_429"
    with pytest.raises(openai.AuthenticationError, match="sk-test"):
        client.chat.completions.create(model="status-401", messages=USER)
    with pytest.raises(openai.NotFoundError):
        client.get("/nowhere", cast_to=object)
    for _ in range(2):
        with pytest.raises(openai.InternalServerError):
            client.chat.completions.create(model="flaky-2", messages=USER)
    client.chat.completions.create(model="flaky-2", messages=USER)
    with pytest.raises(openai.APIConnectionError):
        client.chat.completions.create(model="flaky-reset-1", messages=USER)
    client.chat.completions.create(model="flaky-reset-1", messages=USER)


@pytest.mark.parametrize("model", ["drop", "abort-chunked", "error-event", "error-first"])
def test_streams_that_break(client: OpenAI, model: str) -> None:
    with pytest.raises(Exception, match=r"."):
        stream_text(client, model)


@pytest.mark.parametrize("model", ["drop", "short-body", "truncated-json"])
def test_whole_answers_that_break(client: OpenAI, model: str) -> None:
    with pytest.raises(Exception, match=r"."):
        client.chat.completions.create(model=model, messages=USER)


@pytest.mark.parametrize(
    ("model", "content"),
    [
        ("split-1", UNICODE_CONTENT),
        ("split-7", UNICODE_CONTENT),
        ("crlf", CONTENT),
        ("multi-data", CONTENT),
        ("one-packet", CONTENT),
        ("gzip", CONTENT),
        ("close-no-done", CONTENT),
        ("slow-head-20", CONTENT),
        ("usage-every-chunk", CONTENT),
        ("usage-in-finish", CONTENT),
        ("ticks-3-5", "tick0 tick1 tick2 "),
        ("empty-stream", ""),
        ("big-delta", "x" * fake.BIG_DELTA_SIZE),
        ("huge", "x" * fake.HUGE_SIZE),
    ],
)
def test_streams_that_are_odd_but_good(client: OpenAI, model: str, content: str) -> None:
    assert stream_text(client, model) == content


def test_odd_usage(client: OpenAI) -> None:
    def usages(model: str) -> list[Any]:
        stream = client.chat.completions.create(
            model=model, messages=USER, stream=True, stream_options={"include_usage": True}
        )
        return [chunk.usage for chunk in stream if chunk.usage is not None]

    assert usages("no-usage") == []
    assert usages("wrong-usage") == ["a lot"]
    assert len(usages("usage-twice")) == 2
    assert len(usages("usage-in-finish")) == 1
    assert [usage.completion_tokens for usage in usages("usage-every-chunk")] == [0, 1, 2, 3, 4, 5, 6, 6]


def test_echo_has_exact_bytes(upstream: FakeUpstream, client: OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(model="echo", messages=USER)
    assert raw.content == upstream.calls[0].answer_body
    assert b'"x_unknown" :  {"kept": [1, 2.50, 1e3]}' in raw.content
    content = raw.parse().choices[0].message.content
    assert content is not None
    assert json.loads(content) == upstream.requests[0].json


def test_the_wire_of_a_split_stream(upstream: FakeUpstream) -> None:
    with connect(upstream) as sock:
        sock.sendall(raw_request({"model": "split-1", "stream": True}))
        assert upstream.wait_for_call().finished.wait(30)
        sock.shutdown(socket.SHUT_WR)
        wire = read_all(sock)
    head, _, body = wire.partition(b"\r\n\r\n")
    assert b"transfer-encoding: chunked" in head
    chunks = [body[start : start + 6] for start in range(0, len(body) - 5, 6)]
    assert all(chunk.startswith(b"1\r\n") and chunk.endswith(b"\r\n") for chunk in chunks)
    assert b"".join(chunk[3:4] for chunk in chunks) == upstream.calls[0].answer_body
    assert upstream.calls[0].bytes_sent == len(wire)


@pytest.mark.parametrize("model", ["drop", "flaky-reset-1"])
def test_a_drop_is_a_reset(upstream: FakeUpstream, model: str) -> None:
    with connect(upstream) as sock:
        sock.sendall(raw_request({"model": model, "stream": True}))
        with pytest.raises(ConnectionResetError):
            while sock.recv(65536):
                pass
    assert upstream.wait_for_call().finished.wait(10)
    assert not upstream.calls[0].cancelled.is_set()


@pytest.mark.parametrize("model", ["hang", "stall", "stall-first", "stall-comments", "endless", "gate"])
@pytest.mark.parametrize("reset", [False, True])
def test_the_close_of_the_peer_is_noticed(upstream: FakeUpstream, model: str, reset: bool) -> None:
    with connect(upstream) as sock:
        sock.sendall(raw_request({"model": model, "stream": True}))
        call = upstream.wait_for_call()
        if reset:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert call.cancelled.wait(10)
    assert call.cancelled_at is not None
    assert not call.finished.is_set()


def test_a_slow_reader_holds_the_fake_back(upstream: FakeUpstream) -> None:
    with connect(upstream) as sock:
        sock.sendall(raw_request({"model": "huge"}))
        assert not upstream.wait_for_call().finished.wait(1)
        assert 0 < upstream.calls[0].bytes_sent < fake.HUGE_SIZE
        sock.shutdown(socket.SHUT_WR)
        read_all(sock)
    assert upstream.calls[0].cancelled.wait(10)


def test_the_gate(upstream: FakeUpstream, client: OpenAI) -> None:
    stream = client.chat.completions.create(model="gate-stream", messages=USER, stream=True)
    pieces = [next(stream).choices[0].delta.content for _ in range(3)]
    assert pieces == ["", "Hello", " from"]
    assert not upstream.wait_for_call().released.is_set()
    upstream.release()
    assert len(list(stream)) == 4
    assert upstream.calls[0].released.is_set()
    assert client.chat.completions.create(model="gate", messages=USER).choices[0].message.content == CONTENT
    upstream.hold()
    held = client.chat.completions.create(model="gate-stream", messages=USER, stream=True)
    assert not upstream.wait_for_call(3).released.is_set()
    upstream.calls[2].release()
    assert len(list(held)) == 7


@pytest.mark.parametrize(
    "payload",
    [
        {"model": "\ud800 \x00 ' \" \\ \U0001f30a"},
        {"model": "status-٤٠٤"},
        {"model": "status-999"},
        {"model": "flaky-99999999999999999999"},
        {"model": "ticks--1-", "stream": True},
        {"model": "x" * 100_000},
        {"model": "split-0", "stream": True},
        {"model": ["list"], "stream": "yes"},
        {"model": "m", "n": 10**30, "stream_options": 1, "tools": {}, "messages": 7, "logprobs": "x"},
        {"model": "m", "tools": [1, {"type": "function"}, {"type": "function", "function": 3}]},
        [],
        None,
    ],
)
@pytest.mark.parametrize(
    "path", ["/v1/chat/completions", "/v1/responses", "/v1/completions", "/v1/embeddings"]
)
def test_unlucky_requests_do_no_harm(upstream: FakeUpstream, payload: Any, path: str) -> None:
    with connect(upstream) as sock:
        sock.sendall(raw_request(payload, path))
        assert upstream.wait_for_call().finished.wait(30)
    assert upstream.calls[0].status in (200, 400)


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(
    "path", ["/v1/chat/completions", "/v1/responses", "/v1/completions", "/v1/embeddings"]
)
def test_every_behaviour_runs_on_every_path(upstream: FakeUpstream, path: str, streams: bool) -> None:
    for number, name in enumerate(BEHAVIOURS, 1):
        model = name.replace("NNN", "418").replace("MS", "2").replace("N", "3")
        with connect(upstream) as sock:
            sock.sendall(raw_request({"model": model, "stream": streams}, path))
            call = upstream.wait_for_call(number)
            assert call.model == model
            if model not in ("hang", "gate", "flaky-reset-3"):
                assert sock.recv(9) == b"HTTP/1.1 "
        assert call.ended.wait(10)
        assert call.finished.is_set() != call.cancelled.is_set()
    assert upstream.errors == []


def test_the_table_lists_every_behaviour() -> None:
    rows = [line.split()[0] for line in (fake.__doc__ or "").splitlines() if line[:1].isalpha()]
    assert set(BEHAVIOURS) <= set(rows)
