"""What every upstream keeps to, whichever adapter reaches it: one suite, run on each of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest

from service.domain import Call, Operation
from service.errors import (
    StreamTruncated,
    UpstreamError,
    UpstreamMisconfigured,
    UpstreamProtocolError,
    UpstreamRateLimited,
    UpstreamRejected,
    UpstreamTimeout,
    UpstreamUnavailable,
    WeirError,
)
from service.metering import StreamMeter
from service.ports import StreamedAnswer, Upstream, WholeAnswer
from service.upstreams.direct import DirectUpstream
from service.upstreams.openai_sdk import OpenAISDKUpstream
from service.upstreams.simulator import SimulatorUpstream
from tests.fakes.upstream import CONTENT, HUGE_SIZE, MODELS, FakeUpstream, SeenCall
from tests.running import free_port

SECRET = "sk-upstream-secret"
Make = Callable[[str], Upstream]
"""From the server's origin to an upstream that asks it."""


def direct(origin: str) -> Upstream:
    return DirectUpstream("under-test", provider="fake", base_url=f"{origin}/v1", api_keys=[SECRET])


def openai_sdk(origin: str) -> Upstream:
    return OpenAISDKUpstream("under-test", provider="fake", base_url=f"{origin}/v1", api_key=SECRET)


def azure(origin: str) -> Upstream:
    return OpenAISDKUpstream(
        "under-test", provider="azure", base_url=origin, api_key=SECRET, api_version="2024-10-21"
    )


def simulator(origin: str) -> Upstream:
    return SimulatorUpstream("under-test", tokens_per_second=1e9)


OVER_HTTP = [direct, openai_sdk, azure]
BODIES: dict[Operation, dict[str, Any]] = {
    Operation.CHAT: {"messages": [{"role": "user", "content": "Hello!"}]},
    Operation.TEXT_COMPLETION: {"prompt": "Hello!"},
    Operation.EMBEDDINGS: {"input": "Hello!"},
    Operation.RESPONSES: {"input": "Hello!"},
}
STREAMING = [Operation.CHAT, Operation.TEXT_COMPLETION, Operation.RESPONSES]


def call(model: str, operation: Operation = Operation.CHAT, *, stream: bool = False, **more: Any) -> Call:
    body: dict[str, Any] = {"model": model, **BODIES[operation], **more}
    if stream:
        body["stream"] = True
    return Call(operation=operation, model=model, body=json.dumps(body).encode(), stream=stream)


@pytest.fixture(params=OVER_HTTP)
async def asked(request: pytest.FixtureRequest, upstream: FakeUpstream) -> AsyncIterator[Upstream]:
    """Each adapter that speaks HTTP, in front of the fake server."""
    made: Upstream = request.param(upstream.origin)
    yield made
    await made.close()


@pytest.fixture(params=[*OVER_HTTP, simulator])
async def every(request: pytest.FixtureRequest, upstream: FakeUpstream) -> AsyncIterator[Upstream]:
    """Those, and the simulator."""
    made: Upstream = request.param(upstream.origin)
    yield made
    await made.close()


async def whole(upstream: Upstream, asked_for: Call) -> WholeAnswer:
    answer = await upstream.send(asked_for)
    assert isinstance(answer, WholeAnswer)
    return answer


async def streamed(upstream: Upstream, asked_for: Call) -> StreamedAnswer:
    answer = await upstream.send(asked_for)
    assert not isinstance(answer, WholeAnswer)
    return answer


async def read_all(answer: StreamedAnswer) -> bytes:
    data = b""
    while more := await answer.read():
        data += more
    return data


async def cancelled(seen: SeenCall) -> bool:
    """Whether the server saw the call given up; this loop goes on meanwhile."""
    return await asyncio.to_thread(seen.cancelled.wait, 10)


async def begun(fake: FakeUpstream, number: int = 1) -> SeenCall:
    return await asyncio.to_thread(fake.wait_for_call, number)


@asynccontextmanager
async def server(
    answer: Callable[[asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[str]:
    """A server that reads one request's head and body and then does as it is told; gives its origin."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(head.partition(b"content-length:")[2].split(b"\r\n")[0] or 0)
            await reader.readexactly(length)
            await answer(writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with listening:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"


# -- good answers --------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", list(Operation))
async def test_a_whole_answer_passes_unchanged(
    asked: Upstream, upstream: FakeUpstream, operation: Operation
) -> None:
    answer = await whole(asked, call("gpt-4o-mini", operation))
    assert answer.body == upstream.calls[0].answer_body
    assert answer.upstream_request_id == f"req_fake_{upstream.calls[0].number}"


@pytest.mark.parametrize("operation", STREAMING)
async def test_a_stream_passes_unchanged(
    asked: Upstream, upstream: FakeUpstream, operation: Operation
) -> None:
    answer = await streamed(asked, call("gpt-4o-mini", operation, stream=True))
    assert await read_all(answer) == upstream.calls[0].answer_body
    assert answer.upstream_request_id == f"req_fake_{upstream.calls[0].number}"
    assert await answer.read() == b"", "the end stays the end"
    await answer.close()


@pytest.mark.parametrize("operation", list(Operation))
async def test_every_upstream_gives_whole_answers_of_every_operation(
    every: Upstream, operation: Operation
) -> None:
    answer = json.loads((await whole(every, call("gpt-4o-mini", operation))).body)
    assert answer["object"] in {"chat.completion", "text_completion", "list", "response"}
    assert answer["usage"]


@pytest.mark.parametrize("operation", STREAMING)
async def test_every_upstream_gives_streams_that_end_as_their_protocol_wants(
    every: Upstream, operation: Operation
) -> None:
    answer = await streamed(every, call("gpt-4o-mini", operation, stream=True))
    meter = StreamMeter(operation, keep_text=True)
    while data := await answer.read():
        meter.feed(data)
    await answer.close()
    assert meter.done
    assert meter.take_text()


async def test_odd_whitespace_and_unknown_fields_of_an_answer_stay(
    asked: Upstream, upstream: FakeUpstream
) -> None:
    answer = await whole(asked, call("echo"))
    assert b'"x_unknown" :  {"kept": [1, 2.50, 1e3]}' in answer.body
    assert answer.body == upstream.calls[0].answer_body


async def test_unknown_parameters_go_on_to_the_upstream(asked: Upstream, upstream: FakeUpstream) -> None:
    strange: dict[str, Any] = {"x_strange": {"deep": [1, None, "ä"]}, "logit_bias": {"50256": -100}}
    asked_for = call("gpt-4o-mini", **strange)
    await whole(asked, asked_for)
    assert upstream.requests[0].json == json.loads(asked_for.body)


async def test_decoded_parameters_are_sent_as_their_body(asked: Upstream, upstream: FakeUpstream) -> None:
    asked_for = call("gpt-4o-mini", seed=7)
    asked_for.parameters = json.loads(asked_for.body)
    await whole(asked, asked_for)
    assert upstream.requests[0].json == asked_for.parameters


async def test_the_upstream_gets_its_key_and_the_callers_headers(
    asked: Upstream, upstream: FakeUpstream
) -> None:
    asked_for = call("gpt-4o-mini")
    asked_for.headers = (("X-Forwarded-Thing", "thing"),)
    await whole(asked, asked_for)
    headers = upstream.requests[0].headers
    assert SECRET in (headers.get("api-key"), headers.get("authorization", "").removeprefix("Bearer "))
    assert headers["x-forwarded-thing"] == "thing"
    assert headers["accept-encoding"] == "identity"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_compressed_answer_is_unpacked_although_nobody_asked_for_it(
    asked: Upstream, stream: bool
) -> None:
    asked_for = call("gzip", stream=stream)
    if stream:
        body = await read_all(await streamed(asked, asked_for))
        assert body.endswith(b"data: [DONE]\n\n")
    else:
        body = (await whole(asked, asked_for)).body
        assert json.loads(body)["choices"][0]["message"]["content"] == CONTENT


async def test_an_answer_of_ten_megabytes_arrives_whole(asked: Upstream) -> None:
    answer = await whole(asked, call("huge"))
    assert len(json.loads(answer.body)["choices"][0]["message"]["content"]) == HUGE_SIZE


async def test_a_stream_of_ten_megabytes_arrives_whole(asked: Upstream, upstream: FakeUpstream) -> None:
    answer = await streamed(asked, call("huge", stream=True))
    assert await read_all(answer) == upstream.calls[0].answer_body


async def test_a_stream_arrives_as_it_comes(asked: Upstream, upstream: FakeUpstream) -> None:
    answer = await streamed(asked, call("gate-stream", stream=True))
    seen = b""
    while seen.count(b"\n\n") < 3:
        seen += await answer.read()
    assert not upstream.calls[0].finished.is_set(), "the rest waits behind the gate"
    upstream.calls[0].release()
    assert (seen + await read_all(answer)).endswith(b"data: [DONE]\n\n")


async def test_the_models_are_listed(every: Upstream) -> None:
    listed = await every.models()
    assert all(model["object"] == "model" and isinstance(model["id"], str) for model in listed)
    assert MODELS[0] in [m["id"] for m in listed] or "simulator" in [m["id"] for m in listed]


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "error", "answered", "retry"),
    [
        (400, UpstreamRejected, 400, False),
        (401, UpstreamMisconfigured, 502, False),
        (403, UpstreamMisconfigured, 502, False),
        (404, UpstreamRejected, 404, False),
        (408, UpstreamRejected, 408, True),
        (409, UpstreamRejected, 409, True),
        (413, UpstreamRejected, 413, False),
        (422, UpstreamRejected, 422, False),
        (429, UpstreamRateLimited, 429, True),
        (500, UpstreamError, 502, True),
        (502, UpstreamError, 502, True),
        (503, UpstreamUnavailable, 503, True),
        (504, UpstreamTimeout, 504, True),
        (529, UpstreamError, 502, True),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_each_status_becomes_one_error(
    asked: Upstream,
    upstream: FakeUpstream,
    status: int,
    error: type[UpstreamError],
    answered: int,
    retry: bool,
    stream: bool,
) -> None:
    with pytest.raises(UpstreamError) as caught:
        await asked.send(call(f"status-{status}", stream=stream))
    assert type(caught.value) is error
    assert (caught.value.status, caught.value.retry) == (answered, retry)
    assert caught.value.retry_after_seconds is None
    assert caught.value.upstream_request_id == f"req_fake_{upstream.calls[0].number}"
    assert SECRET not in str(caught.value.body())


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, UpstreamRejected),
        (401, UpstreamMisconfigured),
        (429, UpstreamRateLimited),
        (500, UpstreamError),
        (503, UpstreamUnavailable),
        (504, UpstreamTimeout),
    ],
)
async def test_the_simulator_fails_with_the_same_errors(status: int, error: type[UpstreamError]) -> None:
    with pytest.raises(UpstreamError) as caught:
        await simulator("").send(call(f"sim-{status}"))
    assert type(caught.value) is error


async def test_a_refusals_own_words_reach_the_caller(asked: Upstream) -> None:
    with pytest.raises(UpstreamRejected) as caught:
        await asked.send(call("status-400"))
    assert caught.value.body() == {
        "error": {
            "message": "Fake 400: This is what the test asked for.",
            "type": "fake_error",
            "param": None,
            "code": "fake_400",
        }
    }


@pytest.mark.parametrize("status", [429, 503, 409])
async def test_retry_after_is_passed_on(asked: Upstream, status: int) -> None:
    with pytest.raises(UpstreamError) as caught:
        await asked.send(call(f"status-{status}-after"))
    assert caught.value.retry_after_seconds == 7.0


@pytest.mark.parametrize("status", [404, 500, 503])
async def test_an_error_page_is_an_error_all_the_same(asked: Upstream, status: int) -> None:
    with pytest.raises(UpstreamError) as caught:
        await asked.send(call(f"status-{status}-html"))
    assert "<" not in caught.value.message


@pytest.mark.parametrize("make", OVER_HTTP)
async def test_an_error_in_several_packets_keeps_its_words_and_hides_the_key(make: Make) -> None:
    body = json.dumps({"error": {"message": f"the key {SECRET} cannot do that", "code": "no"}}).encode()
    first_seen = asyncio.Event()

    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(
            b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n" % len(body) + body[:20]
        )
        await writer.drain()
        # A turn for the reader: it is in the same loop, and gets these bytes apart from the next.
        for _ in range(20):
            await asyncio.sleep(0)
        first_seen.set()
        writer.write(body[20:])
        await writer.drain()

    async with server(answer) as origin:
        upstream = make(origin)
        with pytest.raises(UpstreamRejected) as caught:
            await upstream.send(call("gpt-4o-mini"))
        await upstream.close()
    assert first_seen.is_set()
    assert caught.value.message == "the key (hidden) cannot do that"


@pytest.mark.parametrize("make", OVER_HTTP)
async def test_an_error_that_breaks_off_still_has_its_status(make: Make) -> None:
    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 429 Slow\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n{")
        await writer.drain()

    async with server(answer) as origin:
        upstream = make(origin)
        with pytest.raises(UpstreamError) as caught:
            await upstream.send(call("gpt-4o-mini"))
        await upstream.close()
    assert type(caught.value) in {UpstreamRateLimited, UpstreamUnavailable}


# -- no answer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", OVER_HTTP)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_closed_port_is_an_unavailable_upstream(make: Make, stream: bool) -> None:
    upstream = make(f"http://127.0.0.1:{free_port()}")
    with pytest.raises(UpstreamUnavailable) as caught:
        await upstream.send(call("gpt-4o-mini", stream=stream))
    await upstream.close()
    assert "127.0.0.1" not in caught.value.message
    assert caught.value.retry


async def test_a_reset_is_an_unavailable_upstream_and_the_next_call_is_well(asked: Upstream) -> None:
    with pytest.raises(UpstreamUnavailable):
        await asked.send(call("flaky-reset-1"))
    assert json.loads((await whole(asked, call("flaky-reset-1"))).body)["usage"]


@pytest.mark.parametrize(
    ("model", "stream"), [("html", False), ("html", True), ("refuse-stream", True)], ids=str
)
async def test_an_answer_of_another_form_is_refused(asked: Upstream, model: str, stream: bool) -> None:
    with pytest.raises(UpstreamProtocolError):
        await asked.send(call(model, stream=stream))


@pytest.mark.parametrize("model", ["short-body", "drop"])
async def test_half_a_body_is_no_answer(asked: Upstream, model: str) -> None:
    with pytest.raises(UpstreamProtocolError):
        await asked.send(call(model))


@pytest.mark.parametrize("make", OVER_HTTP)
@pytest.mark.parametrize(
    ("stream", "kind", "error"),
    [
        (False, b"application/json", UpstreamProtocolError),
        (True, b"text/event-stream", StreamTruncated),
    ],
)
async def test_what_cannot_be_unpacked_is_no_answer(
    make: Make, stream: bool, kind: bytes, error: type[UpstreamError]
) -> None:
    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\ncontent-encoding: gzip\r\n"
            b"content-length: 16\r\n\r\nthis is not gzip" % kind
        )
        await writer.drain()

    async with server(answer) as origin:
        upstream = make(origin)
        with pytest.raises(error):
            answered = await upstream.send(call("gpt-4o-mini", stream=stream))
            if not isinstance(answered, WholeAnswer):
                await read_all(answered)
        await upstream.close()


@pytest.mark.parametrize("make", OVER_HTTP)
async def test_what_is_not_http_is_no_answer(make: Make) -> None:
    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH_9.6\r\n\r\n")
        await writer.drain()

    async with server(answer) as origin:
        upstream = make(origin)
        with pytest.raises(UpstreamError) as caught:
            await upstream.send(call("gpt-4o-mini"))
        await upstream.close()
    assert "SSH" not in caught.value.message


@pytest.mark.parametrize("model", ["drop", "abort-chunked"])
@pytest.mark.parametrize("operation", STREAMING)
async def test_a_stream_that_is_cut_says_so(asked: Upstream, model: str, operation: Operation) -> None:
    answer = await streamed(asked, call(model, operation, stream=True))
    seen = b""
    with pytest.raises(StreamTruncated):
        while data := await answer.read():
            seen += data
    await answer.close()
    assert b"Hello" in seen, "what came before is passed on"


async def test_the_simulators_stream_is_cut_alike() -> None:
    answer = await streamed(simulator(""), call("sim-drop", stream=True))
    with pytest.raises(StreamTruncated):
        await read_all(answer)


@pytest.mark.parametrize("make", OVER_HTTP)
@pytest.mark.parametrize("body", [b'{"data": 3}', b'{"data": [{}]}', b"[]", b"\xff", b"[" * 100_000])
async def test_a_list_of_models_that_is_none_is_an_error_of_ours(make: Make, body: bytes) -> None:
    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\n"
            b"content-length: %d\r\n\r\n" % len(body) + body
        )
        await writer.drain()

    async with server(answer) as origin:
        upstream = make(origin)
        with pytest.raises(WeirError):
            await upstream.models()
        await upstream.close()


@pytest.mark.parametrize("make", [openai_sdk, azure, simulator])
@pytest.mark.parametrize("body", [b'{"model":"m","x":"\xff"}', b'{"x":' + b"[" * 100_000])
async def test_a_body_that_must_be_decoded_and_cannot_be_is_the_callers_error(
    make: Make, body: bytes
) -> None:
    upstream = make("http://127.0.0.1:1")
    with pytest.raises(UpstreamRejected) as caught:
        await upstream.send(Call(operation=Operation.CHAT, model="m", body=body))
    await upstream.close()
    assert caught.value.status == 400


# -- connections ---------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["hang", "stall-first", "stall"])
async def test_a_cancelled_call_is_given_up_at_the_upstream(
    asked: Upstream, upstream: FakeUpstream, model: str
) -> None:
    asking = asyncio.create_task(asked.send(call(model)))
    seen = await begun(upstream)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert await cancelled(seen)


async def test_an_answer_of_another_form_is_given_up_at_the_upstream(
    asked: Upstream, upstream: FakeUpstream
) -> None:
    asked_for = call("stall-first")
    asked_for.stream = True  # its body asks for a whole answer, and that is what comes, without an end
    with pytest.raises(UpstreamProtocolError):
        await asked.send(asked_for)
    assert await cancelled(upstream.calls[0])


@pytest.mark.parametrize("model", ["stall", "endless", "gate-stream"])
async def test_a_stream_closed_early_is_given_up_at_the_upstream(
    asked: Upstream, upstream: FakeUpstream, model: str
) -> None:
    answer = await streamed(asked, call(model, stream=True))
    assert await answer.read()
    await answer.close()
    assert await cancelled(upstream.calls[0])


async def test_a_cancelled_read_is_given_up_at_the_upstream_by_close(
    asked: Upstream, upstream: FakeUpstream
) -> None:
    answer = await streamed(asked, call("stall-first", stream=True))
    reading = asyncio.create_task(answer.read())
    await asyncio.sleep(0)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    await answer.close()
    assert await cancelled(upstream.calls[0])


@pytest.mark.parametrize("make", OVER_HTTP)
@pytest.mark.parametrize("stream", [True, False])
async def test_the_connection_serves_again_after_an_answer_was_read_to_its_end(
    make: Make, stream: bool
) -> None:
    connections = 0
    body = b'data: {"choices":[]}\n\ndata: [DONE]\n\n' if stream else b'{"choices":[]}'
    kind = b"text/event-stream" if stream else b"application/json"

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                await reader.readexactly(int(head.partition(b"content-length:")[2].split(b"\r\n")[0]))
                writer.write(
                    b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\ntransfer-encoding: chunked\r\n\r\n" % kind
                    + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
                )
        except asyncio.IncompleteReadError:
            writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as listening:
        upstream = make(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}")
        for _ in range(3):
            answer = await upstream.send(call("gpt-4o-mini", stream=stream))
            if not isinstance(answer, WholeAnswer):
                assert await read_all(answer) == body
                await answer.close()
        await upstream.close()
    assert connections == 1


async def test_the_call_after_an_error_is_well(asked: Upstream) -> None:
    for _ in range(3):
        with pytest.raises(UpstreamRejected):
            await asked.send(call("status-400"))
    assert (await whole(asked, call("gpt-4o-mini"))).body


async def test_many_calls_at_once_keep_apart(asked: Upstream) -> None:
    answers = await asyncio.gather(*(whole(asked, call("echo", mark=f"<{n}>")) for n in range(20)))
    for number, answer in enumerate(answers):
        content = json.loads(answer.body)["choices"][0]["message"]["content"]
        assert f"<{number}>" in content


async def test_close_may_come_before_any_call_and_twice(every: Upstream) -> None:
    await every.close()
    await every.close()


def test_the_azure_adapter_names_deployment_and_version(upstream: FakeUpstream) -> None:
    async def ask() -> None:
        asked = azure(upstream.origin)
        await whole(asked, call("gpt-4o-mini"))
        await whole(asked, call("gpt-4o-mini", Operation.RESPONSES))
        await asked.close()

    asyncio.run(ask())
    chat, response = upstream.requests
    assert chat.path == "/openai/deployments/gpt-4o-mini/chat/completions"
    assert response.path == "/openai/responses"
    assert chat.query == response.query == {"api-version": "2024-10-21"}
    assert chat.headers["api-key"] == SECRET


def test_the_sdk_adapter_does_not_retry_by_itself(upstream: FakeUpstream) -> None:
    async def ask() -> None:
        asked = openai_sdk(upstream.origin)
        with pytest.raises(UpstreamUnavailable):
            await asked.send(call("flaky-1"))
        await asked.close()

    asyncio.run(ask())
    assert len(upstream.requests) == 1
    assert openai.DEFAULT_MAX_RETRIES > 0, "else this proves nothing"


async def test_the_look_up_of_a_name_is_within_the_time_to_connect(monkeypatch: pytest.MonkeyPatch) -> None:
    async def silent(*_: Any, **__: Any) -> Any:
        await asyncio.Event().wait()

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", silent)
    upstream = DirectUpstream(
        "under-test", provider="fake", base_url="http://name.invalid/v1", connect_timeout_seconds=0.05
    )
    try:
        async with asyncio.timeout(20):
            with pytest.raises(UpstreamTimeout):
                await upstream.send(call("good"))
    finally:
        await upstream.close()
