"""The simulator answers by fixed rules, says what it is, and counts honestly."""

from __future__ import annotations

import asyncio
import base64
import json
import math
import struct
from typing import Any

import msgspec
import openai.types.responses as response_types
import pytest
from openai.types import Completion, CreateEmbeddingResponse
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import TypeAdapter

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
)
from service.metering import StreamMeter
from service.ports import WholeAnswer
from service.upstreams.simulator import MODELS, SimulatorUpstream

HELLO = {"messages": [{"role": "user", "content": "Tell me of the sea."}]}
BODIES: dict[Operation, dict[str, Any]] = {
    Operation.CHAT: HELLO,
    Operation.TEXT_COMPLETION: {"prompt": "Tell me of the sea."},
    Operation.RESPONSES: {"input": "Tell me of the sea."},
}
STREAMING = list(BODIES)


@pytest.fixture
def simulator() -> SimulatorUpstream:
    return SimulatorUpstream(tokens_per_second=1e9)


def call(
    model: str = "simulator", operation: Operation = Operation.CHAT, *, stream: bool = False, **body: Any
) -> Call:
    body = BODIES.get(operation, {}) | {"model": model} | body | ({"stream": True} if stream else {})
    return Call(operation, model, msgspec.json.encode(body), stream=stream)


async def whole(simulator: SimulatorUpstream, asked: Call) -> dict[str, Any]:
    answer = await simulator.send(asked)
    assert isinstance(answer, WholeAnswer)
    decoded: dict[str, Any] = json.loads(answer.body)
    return decoded


async def events(simulator: SimulatorUpstream, asked: Call) -> list[dict[str, Any]]:
    """All events of a stream, the end mark left out."""
    stream = await read_all(simulator, asked)
    data = [line.removeprefix("data: ") for line in stream.decode().splitlines() if line.startswith("data: ")]
    return [json.loads(each) for each in data if each != "[DONE]"]


async def read_all(simulator: SimulatorUpstream, asked: Call) -> bytes:
    answer = await simulator.send(asked)
    assert not isinstance(answer, WholeAnswer)
    data = b""
    while more := await answer.read():
        data += more
    await answer.close()
    return data


@pytest.mark.parametrize("operation", STREAMING)
@pytest.mark.parametrize("stream", [False, True])
async def test_the_same_question_gets_the_same_bytes(
    simulator: SimulatorUpstream, operation: Operation, stream: bool
) -> None:
    asked = call(operation=operation, stream=stream)
    if stream:
        assert await read_all(simulator, asked) == await read_all(simulator, asked)
    else:
        assert await whole(simulator, asked) == await whole(simulator, asked)


async def test_it_says_that_it_is_no_model_and_quotes_the_question(simulator: SimulatorUpstream) -> None:
    text = (await whole(simulator, call()))["choices"][0]["message"]["content"]
    assert text == "I am Weir's simulator, not a model. You wrote: Tell me of the sea."


@pytest.mark.parametrize(
    ("body", "quoted"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "In parts."}]}]}, "In parts."),
        ({"messages": [{"role": "user", "content": "x" * 500}]}, "x" * 200 + " ..."),
        ({"messages": [{"role": "assistant", "content": None}]}, ""),
        ({"messages": []}, ""),
        ({"messages": 7}, ""),
    ],
)
async def test_it_quotes_what_it_can(simulator: SimulatorUpstream, body: Any, quoted: str) -> None:
    text: str = (await whole(simulator, call(**body)))["choices"][0]["message"]["content"]
    assert text.removeprefix("I am Weir's simulator, not a model. You wrote:").strip() == quoted


@pytest.mark.parametrize("operation", STREAMING)
async def test_streamed_words_are_the_counted_tokens_and_the_whole_text(
    simulator: SimulatorUpstream, operation: Operation
) -> None:
    meter = StreamMeter(operation, keep_text=True)
    asked = call(operation=operation, stream=True, stream_options={"include_usage": True})
    words = 0
    text = ""
    answer = await simulator.send(asked)
    assert not isinstance(answer, WholeAnswer)
    while data := await answer.read():
        meter.feed(data)
        piece = meter.take_text()
        words += bool(piece)
        text += piece
    assert meter.done
    assert meter.usage is not None
    assert meter.usage.output_tokens == words == len(text.split())
    plain = await whole(simulator, call(operation=operation))
    assert text in json.dumps(plain)
    counts = list(plain["usage"].values())
    assert plain["usage"]["total_tokens"] == meter.usage.total_tokens
    assert words in counts


async def test_usage_comes_in_a_stream_only_if_asked_for(simulator: SimulatorUpstream) -> None:
    plain = await events(simulator, call(stream=True))
    assert all("usage" not in event for event in plain)
    asked = await events(simulator, call(stream=True, stream_options={"include_usage": True}))
    assert [e["usage"] is None for e in asked] == [True] * (len(asked) - 1) + [False]
    assert asked[-1]["choices"] == []


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
async def test_the_token_limit_cuts_the_answer_and_says_so(simulator: SimulatorUpstream, name: str) -> None:
    limit: dict[str, Any] = {name: 3}
    answer = await whole(simulator, call(**limit))
    choice = answer["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("I am Weir's", "length")
    assert answer["usage"]["completion_tokens"] == 3
    streamed = await events(simulator, call(stream=True, **limit))
    assert [c["finish_reason"] for e in streamed for c in e["choices"]][-1] == "length"


async def test_a_response_that_was_cut_is_incomplete(simulator: SimulatorUpstream) -> None:
    asked = call(operation=Operation.RESPONSES, max_output_tokens=2)
    answer = await whole(simulator, asked)
    assert (answer["status"], answer["incomplete_details"]) == (
        "incomplete",
        {"reason": "max_output_tokens"},
    )
    last = (await events(simulator, call(operation=Operation.RESPONSES, stream=True, max_output_tokens=2)))[
        -1
    ]
    assert (last["type"], last["response"]["status"]) == ("response.incomplete", "incomplete")


async def test_a_long_answer_has_as_many_words_as_asked_for(simulator: SimulatorUpstream) -> None:
    answer = await whole(simulator, call("sim-long", max_tokens=2_345))
    assert answer["usage"]["completion_tokens"] == 2_345
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert (await whole(simulator, call("sim-long")))["usage"]["completion_tokens"] == 1_000


# -- the SDK understands it ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operation", "shape"),
    [
        (Operation.CHAT, ChatCompletion),
        (Operation.TEXT_COMPLETION, Completion),
        (Operation.RESPONSES, response_types.Response),
    ],
)
async def test_whole_answers_have_the_sdks_types(
    simulator: SimulatorUpstream, operation: Operation, shape: type[Any]
) -> None:
    TypeAdapter(shape).validate_python(await whole(simulator, call(operation=operation)))


async def test_chunks_have_the_sdks_type(simulator: SimulatorUpstream) -> None:
    for event in await events(simulator, call(stream=True, stream_options={"include_usage": True})):
        ChatCompletionChunk.model_validate(event)


@pytest.mark.parametrize("limit", [{}, {"max_output_tokens": 2}])
async def test_the_events_of_a_response_have_the_sdks_types_and_count_up(
    simulator: SimulatorUpstream, limit: dict[str, Any]
) -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(response_types.ResponseStreamEvent)
    found = await events(simulator, call(operation=Operation.RESPONSES, stream=True, **limit))
    kinds = [adapter.validate_python(event).type for event in found]
    assert kinds[0] == "response.created"
    assert kinds[-1] == ("response.incomplete" if limit else "response.completed")
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    deltas = "".join(e["delta"] for e in found if e["type"] == "response.output_text.delta")
    assert found[-1]["response"]["output"][0]["content"][0]["text"] == deltas


# -- embeddings ----------------------------------------------------------------------------------


async def vectors(simulator: SimulatorUpstream, **body: Any) -> list[list[float]]:
    answer = await whole(simulator, call(operation=Operation.EMBEDDINGS, **body))
    return [item.embedding for item in CreateEmbeddingResponse.model_validate(answer).data]


async def test_embeddings_have_unit_length_and_the_size_asked_for(simulator: SimulatorUpstream) -> None:
    for wanted, size in ((None, 256), (7, 7), (1_000_000, 4_096)):
        body = {} if wanted is None else {"dimensions": wanted}
        (vector,) = await vectors(simulator, input="sea", **body)
        assert len(vector) == size
        assert math.sqrt(sum(x * x for x in vector)) == pytest.approx(1.0)


async def test_equal_texts_have_equal_vectors_and_others_do_not(simulator: SimulatorUpstream) -> None:
    first, second, third = await vectors(simulator, input=["sea", "land", "sea"])
    assert first == third != second


async def test_token_ids_are_one_input_and_lists_of_them_many(simulator: SimulatorUpstream) -> None:
    assert len(await vectors(simulator, input=[1, 2, 3])) == 1
    assert len(await vectors(simulator, input=[[1, 2], [3]])) == 2


async def test_base64_holds_the_same_numbers(simulator: SimulatorUpstream) -> None:
    (plain,) = await vectors(simulator, input="sea")
    answer = await whole(
        simulator, call(operation=Operation.EMBEDDINGS, input="sea", encoding_format="base64")
    )
    packed = base64.b64decode(answer["data"][0]["embedding"])
    assert struct.unpack(f"<{len(plain)}f", packed) == pytest.approx(plain)


# -- misbehaviour on demand ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "error", "retry_after"),
    [
        (400, UpstreamRejected, None),
        (401, UpstreamMisconfigured, None),
        (429, UpstreamRateLimited, 1.0),
        (500, UpstreamError, None),
        (503, UpstreamUnavailable, 1.0),
        (504, UpstreamTimeout, None),
    ],
)
@pytest.mark.parametrize("operation", list(Operation))
async def test_a_status_is_failed_with(
    simulator: SimulatorUpstream,
    status: int,
    error: type[UpstreamError],
    retry_after: float | None,
    operation: Operation,
) -> None:
    with pytest.raises(UpstreamError) as caught:
        await simulator.send(call(f"sim-{status}", operation, input="x"))
    assert type(caught.value) is error
    assert caught.value.retry_after_seconds == retry_after


@pytest.mark.parametrize("operation", STREAMING)
async def test_a_dropped_stream_breaks_after_two_words(
    simulator: SimulatorUpstream, operation: Operation
) -> None:
    answer = await simulator.send(call("sim-drop", operation, stream=True))
    assert not isinstance(answer, WholeAnswer)
    meter = StreamMeter(operation, keep_text=True)
    with pytest.raises(StreamTruncated):
        while data := await answer.read():
            meter.feed(data)
    assert meter.take_text() == "I am"


async def test_a_dropped_answer_is_broken(simulator: SimulatorUpstream) -> None:
    with pytest.raises(UpstreamProtocolError):
        await simulator.send(call("sim-drop"))


@pytest.mark.parametrize("operation", STREAMING)
async def test_an_error_event_comes_after_two_words(
    simulator: SimulatorUpstream, operation: Operation
) -> None:
    meter = StreamMeter(operation, keep_text=True)
    meter.feed(await read_all(simulator, call("sim-error", operation, stream=True)))
    assert meter.take_text() == "I am"
    assert meter.error is not None
    assert not meter.done


@pytest.mark.parametrize("operation", STREAMING)
async def test_a_stream_without_its_end_mark_has_all_its_words(
    simulator: SimulatorUpstream, operation: Operation
) -> None:
    meter = StreamMeter(operation, keep_text=True)
    meter.feed(await read_all(simulator, call("sim-no-done", operation, stream=True)))
    assert meter.take_text().endswith("sea.")
    with pytest.raises(StreamTruncated):
        meter.finish()


async def test_a_stalled_stream_is_silent_after_two_words(simulator: SimulatorUpstream) -> None:
    answer = await simulator.send(call("sim-stall", stream=True))
    assert not isinstance(answer, WholeAnswer)
    meter = StreamMeter(Operation.CHAT, keep_text=True)
    text = ""
    while text != "I am":
        meter.feed(await answer.read())
        text += meter.take_text()
    waiting = asyncio.create_task(answer.read())
    for _ in range(100):
        await asyncio.sleep(0)
    assert not waiting.done()
    waiting.cancel()


async def test_the_speed_is_kept_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    loop = asyncio.get_running_loop()
    now = loop.time()

    async def sleep(seconds: float) -> None:
        nonlocal now
        pauses.append(seconds)
        now += seconds

    monkeypatch.setattr(loop, "time", lambda: now)
    monkeypatch.setattr("service.upstreams.simulator.asyncio.sleep", sleep)
    await read_all(SimulatorUpstream(tokens_per_second=10), call(stream=True, max_tokens=8))
    assert pauses == pytest.approx([0.1] * 8)
    pauses.clear()
    await read_all(SimulatorUpstream(tokens_per_second=10), call("sim-slow", stream=True, max_tokens=2))
    assert pauses == pytest.approx([3.0, 1.0])


# -- the rest ------------------------------------------------------------------------------------


async def test_its_models_are_listed_and_others_answer_as_the_simulator(simulator: SimulatorUpstream) -> None:
    assert tuple(m["id"] for m in await simulator.models()) == MODELS
    assert (await whole(simulator, call("gpt-4o")))["model"] == "simulator"
    assert (await whole(simulator, call("sim-long", max_tokens=1)))["model"] == "sim-long"


@pytest.mark.parametrize("body", [b"", b"[]", b"null", b"\xff", b'{"a":"\xff"}'])
async def test_a_body_that_is_no_object_is_the_callers_error(
    simulator: SimulatorUpstream, body: bytes
) -> None:
    with pytest.raises(UpstreamRejected) as caught:
        await simulator.send(Call(Operation.CHAT, "simulator", body))
    assert caught.value.status == 400


@pytest.mark.parametrize("options", [None, {}, {"include_usage": None}, {"other": 1}])
async def test_odd_stream_options_do_no_harm(simulator: SimulatorUpstream, options: Any) -> None:
    assert await events(simulator, call(stream=True, stream_options=options))
