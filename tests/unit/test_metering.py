"""Reading answers: whatever way a stream is cut and written, the same is read and passed on."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service import metering
from service.domain import Operation, Usage, UsageSource
from service.errors import (
    StreamTruncated,
    UpstreamError,
    UpstreamMisconfigured,
    UpstreamProtocolError,
    UpstreamRateLimited,
    UpstreamRejected,
    UpstreamUnavailable,
)
from service.metering import StreamMeter, estimate_answer, read_answer, read_usage

END_MARK = "data: [DONE]"
USAGE = {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}


def dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def delta(text: str, **more: Any) -> dict[str, Any]:
    return {
        "id": "c-1",
        "model": "m-1",
        "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}],
        **more,
    }


def sse(*events: Any, eol: str = "\n") -> bytes:
    return "".join(f"data: {e if isinstance(e, str) else dumps(e)}{eol}{eol}" for e in events).encode()


def meter_of(*packets: bytes, operation: Operation = Operation.CHAT, **options: Any) -> StreamMeter:
    meter = StreamMeter(operation, keep_text=True, **options)
    for packet in packets:
        meter.feed(packet)
    return meter


# -- streams in any form, cut anywhere -----------------------------------------------------------


@st.composite
def streams(draw: st.DrawFn) -> bytes:
    """A lawful chat stream, in one of the many forms that servers give it."""
    eol = draw(st.sampled_from(["\n", "\r\n", "\r"]))
    lines: list[str] = []
    for number in range(draw(st.integers(0, 5))):
        if draw(st.booleans()):
            lines += [": a comment" + draw(st.sampled_from(["", " {", " [DONE]", " ü"])), ""]
        if draw(st.booleans()):
            lines += [draw(st.sampled_from(["event: chunk", "id: 7", "retry: 10", "unknown"]))]
        usage: dict[str, Any] = draw(
            st.sampled_from([{}, {"usage": None}, {"usage": {**USAGE, "completion_tokens": number}}])
        )
        data = dumps(delta(draw(st.text(max_size=8)), **usage))
        space = draw(st.sampled_from([" ", ""]))
        # The first '",' ends the first field, which has no such thing inside.
        parts = data.replace('",', '",\n', 1).split("\n") if draw(st.booleans()) else [data]
        lines += [f"data:{space}{part}" for part in parts]
        lines += [""] * draw(st.integers(1, 2))
    if draw(st.booleans()):
        lines += [f"data: {dumps({'id': 'c-1', 'choices': [], 'usage': USAGE})}", ""]
    lines += [END_MARK, ""]
    if draw(st.booleans()):
        lines += [": thank you", "", "data: what follows is ignored", ""]
    return "".join(line + eol for line in lines).encode()


@st.composite
def cut_streams(draw: st.DrawFn) -> tuple[bytes, list[bytes]]:
    whole = draw(streams())
    cuts = sorted(draw(st.lists(st.integers(0, len(whole)), max_size=12)))
    return whole, [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]


def parsed(stream: bytes) -> list[str]:
    """The data of each event, by the letter of the SSE specification."""
    found: list[str] = []
    data: list[str] = []
    for line in re.split(r"\r\n|\n|\r", stream.decode()):
        if not line:
            if data:
                found.append("\n".join(data))
            data = []
        elif line.startswith("data:"):
            data.append(line[5:].removeprefix(" "))
    return found


def up_to_the_end_mark(stream: bytes) -> bytes:
    found = re.search(rb"(?:^|[\r\n])data: \[DONE\]", stream)
    assert found is not None
    return stream[: found.end()]


def read_whole(packets: list[bytes], *, hide: bool) -> tuple[StreamMeter, bytes, str]:
    meter = StreamMeter(Operation.CHAT, hide_usage=hide, keep_text=True)
    output, text = b"", ""
    for packet in packets:
        output += meter.feed(packet)
        text += meter.take_text()
    return meter, output, text


@given(cut_streams())
def test_a_stream_passes_to_the_byte_up_to_its_end_mark(stream: tuple[bytes, list[bytes]]) -> None:
    whole, packets = stream
    meter, output, _ = read_whole(packets, hide=False)
    assert meter.done
    assert output.rstrip(b"\r\n") == up_to_the_end_mark(whole)
    assert parsed(output)[-1] == "[DONE]", "the end mark's own blank line comes along"


@given(cut_streams(), st.booleans())
def test_it_does_not_matter_how_a_stream_is_cut(stream: tuple[bytes, list[bytes]], hide: bool) -> None:
    whole, packets = stream
    meter, output, text = read_whole(packets, hide=hide)
    other, output_at_once, text_at_once = read_whole([whole], hide=hide)
    assert parsed(output) == parsed(output_at_once)
    assert text == text_at_once
    for name in ("done", "error", "usage", "model", "id", "finish_reason", "has_output", "events"):
        assert getattr(meter, name) == getattr(other, name), name
    assert meter.usage_or_estimate(3) == other.usage_or_estimate(3)


@given(cut_streams())
def test_hidden_usage_is_gone_and_nothing_else(stream: tuple[bytes, list[bytes]]) -> None:
    whole, packets = stream
    meter, output, text = read_whole(packets, hide=True)
    shown, _, text_shown = read_whole(packets, hide=False)
    assert (meter.usage, text) == (shown.usage, text_shown)
    left = []
    for data in parsed(up_to_the_end_mark(whole) + b"\n\n"):
        decoded = data if data == "[DONE]" else json.loads(data)
        if isinstance(decoded, dict) and decoded.get("usage") is not None:
            if not decoded["choices"]:
                continue
            del decoded["usage"]
        left.append(decoded)
    assert [data if data == "[DONE]" else json.loads(data) for data in parsed(output)] == left


@given(st.binary(max_size=200), st.booleans())
def test_no_bytes_at_all_break_the_meter(junk: bytes, hide: bool) -> None:
    meter = StreamMeter(Operation.CHAT, hide_usage=hide)
    output = meter.feed(junk) + meter.feed(b"\n\n")
    assert meter.error is not None or len(output) <= len(junk) + 2


# -- the end -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", ["data: [DONE]", "data: [DONE]\n", "data:[DONE]", "data: [DONE]\r\n"])
def test_an_end_mark_needs_no_blank_line_when_the_connection_ends(tail: str) -> None:
    meter = StreamMeter(Operation.CHAT)
    assert meter.feed(sse(delta("Hello")) + tail.encode()) == sse(delta("Hello"))
    assert not meter.done
    assert meter.finish().strip() == tail.strip().encode()
    assert meter.done


@pytest.mark.parametrize("tail", ["", "data: [DO", 'data: {"id":"c', ": [DONE]", 'data: {"choices":[]}'])
def test_a_stream_without_its_end_mark_is_truncated(tail: str) -> None:
    meter = meter_of(sse(delta("Hello")) + tail.encode())
    with pytest.raises(StreamTruncated):
        meter.finish()


def test_the_end_of_a_stream_that_ended_adds_nothing() -> None:
    meter = meter_of(sse(delta("Hello"), "[DONE]"))
    assert meter.finish() == b""


def test_what_follows_the_end_mark_is_not_read() -> None:
    meter = StreamMeter(Operation.CHAT, keep_text=True)
    assert meter.feed(sse("[DONE]", delta("late"))) == sse("[DONE]")
    assert meter.feed(sse(delta("later"))) == b""
    assert (meter.take_text(), meter.usage, meter.over) == ("", None, True)


@pytest.mark.parametrize("end", ["completed", "incomplete", "failed"])
def test_a_response_ends_with_its_own_last_event(end: str) -> None:
    usage = {"input_tokens": 3, "output_tokens": 2, "output_tokens_details": {"reasoning_tokens": 1}}
    response = {"id": "resp_1", "model": "m-1", "status": end, "usage": usage}
    meter = meter_of(
        sse(
            {
                "type": "response.created",
                "response": {"id": "resp_1", "model": "m-1", "status": "in_progress"},
            }
        ),
        sse({"type": "response.output_text.delta", "delta": "Hello"}),
        operation=Operation.RESPONSES,
    )
    assert not meter.done
    meter.feed(sse({"type": f"response.{end}", "response": response}))
    assert meter.done
    assert (meter.id, meter.model, meter.finish_reason) == ("resp_1", "m-1", end)
    assert meter.usage == Usage(3, 2, reasoning_tokens=1)
    assert meter.take_text() == "Hello"


def test_a_response_is_not_over_with_the_end_of_an_item() -> None:
    done = {"type": "response.output_text.done", "text": "Hello"}
    assert not meter_of(sse(done), operation=Operation.RESPONSES).done


# -- errors in streams ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operation", "event", "words"),
    [
        (Operation.CHAT, {"error": {"message": "overload", "code": "x"}}, "overload"),
        (Operation.CHAT, {"error": "overload"}, "overload"),
        (Operation.CHAT, {"error": {"code": 1}}, "no reason was given"),
        (Operation.TEXT_COMPLETION, {"error": {"message": "overload"}, "choices": []}, "overload"),
        (Operation.RESPONSES, {"type": "error", "message": "overload", "code": "x"}, "overload"),
        (Operation.RESPONSES, {"type": "error"}, "no reason was given"),
    ],
)
def test_an_error_event_is_kept_back_and_noted(operation: Operation, event: Any, words: str) -> None:
    before = (
        {"type": "response.output_text.delta", "delta": "Hi"}
        if operation is Operation.RESPONSES
        else delta("Hi")
    )
    meter = StreamMeter(operation)
    assert meter.feed(sse(before, event, delta("late"))) == sse(before)
    assert type(meter.error) is UpstreamError
    assert words in meter.error.message
    assert meter.feed(sse("[DONE]")) == b""
    assert not meter.done


def test_the_words_of_an_error_event_show_no_key_and_no_address_of_the_inside() -> None:
    meter = StreamMeter(Operation.CHAT)
    meter.secret = "own-key"
    meter.feed(sse({"error": {"message": "own-key and sk-abcdef are refused at http://10.1.2.3:8000/v1"}}))
    assert meter.error is not None
    assert meter.error.message.endswith(": (hidden) and (hidden) are refused at (hidden)")


def test_a_null_error_is_no_error() -> None:
    meter = meter_of(sse(delta("Hi", error=None), "[DONE]"))
    assert meter.error is None
    assert meter.done


@pytest.mark.parametrize(
    "data",
    [
        b"{half",
        b"Internal Server Error",
        b'{"id":"\xff"}',
        b'{"usage":' + b"[" * 100_000,
        b'{"choices":7,"id":',
    ],
)
@pytest.mark.parametrize("hide", [True, False])
def test_data_that_is_not_json_is_an_error(data: bytes, hide: bool) -> None:
    meter = StreamMeter(Operation.CHAT, hide_usage=hide)
    assert meter.feed(b"data: " + data + b"\n\n") == b""
    assert type(meter.error) is UpstreamProtocolError


@pytest.mark.parametrize("beside", [{"choices": "x"}, {"choices": [{"index": "0", "delta": {}}]}])
def test_an_error_in_an_event_of_an_unusual_shape_is_one(beside: dict[str, Any]) -> None:
    event = {"error": {"message": "Slow down.", "code": 429}, **beside}
    meter = StreamMeter(Operation.CHAT)
    assert meter.feed(sse(event)) == b""
    assert (meter.events, type(meter.error)) == (0, UpstreamRateLimited)
    meter = StreamMeter(Operation.CHAT)
    assert meter.feed(sse(delta("Hi"), event, delta("late"))) == sse(delta("Hi"))
    assert type(meter.error) is UpstreamError


def test_an_event_that_calls_itself_an_error_is_one_in_whatever_shape() -> None:
    meter = StreamMeter(Operation.CHAT)
    assert meter.feed(sse({"type": "error", "id": 5, "message": "Boom."})) == b""
    assert type(meter.error) is UpstreamError


def test_usage_that_weir_asked_for_is_hidden_in_an_unusual_shape_too() -> None:
    said = {"id": 7, "choices": [{"index": 0, "delta": {"content": "Hi"}}]}
    meter = StreamMeter(Operation.CHAT, hide_usage=True)
    assert meter.feed(sse(said, {**said, "usage": USAGE}, {"id": 7, "choices": [], "usage": USAGE})) == sse(
        said, said
    )
    assert meter.usage == Usage(11, 7)


@pytest.mark.parametrize("data", ["[]", '"text"', "7", '{"choices":"none"}', '{"choices":[{"index":"x"}]}'])
def test_json_of_an_unusual_shape_passes(data: str) -> None:
    meter = StreamMeter(Operation.CHAT)
    assert meter.feed(sse(data)) == sse(data)
    assert meter.error is None


@pytest.mark.parametrize("size", [1, 7, 64])
def test_an_event_without_an_end_is_given_up(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(metering, "MAX_EVENT_BYTES", 100)
    meter = StreamMeter(Operation.CHAT)
    fed = 0
    while meter.error is None:
        assert meter.feed(b"x" * size) == b""
        fed += size
        assert fed <= 100 + size
    assert fed > 100
    assert type(meter.error) is UpstreamProtocolError


def test_many_events_may_be_more_than_one_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metering, "MAX_EVENT_BYTES", 200)
    stream = sse(*[delta("Hello")] * 20, "[DONE]")
    meter = StreamMeter(Operation.CHAT)
    assert b"".join(meter.feed(stream[n : n + 13]) for n in range(0, len(stream), 13)) == stream
    assert meter.done


# -- what is noted -------------------------------------------------------------------------------


def test_the_facts_of_a_chat_stream_are_noted() -> None:
    finish = {"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}], "model": "m-2", "id": "c-2"}
    meter = meter_of(
        sse(delta(""), delta("Hel"), delta("lo"), finish, {"choices": [], "usage": USAGE}, "[DONE]")
    )
    assert (meter.id, meter.model, meter.finish_reason) == ("c-1", "m-2", "length")
    assert meter.usage == Usage(11, 7)
    assert meter.take_text() == "Hello"
    assert meter.take_text() == ""
    assert meter.events == 6


def test_the_last_usage_counts_and_none_is_added_up() -> None:
    growing = [delta("x", usage={"prompt_tokens": 4, "completion_tokens": n}) for n in range(1, 6)]
    assert meter_of(sse(*growing, "[DONE]")).usage == Usage(4, 5)


def test_a_role_alone_is_no_output() -> None:
    role = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}
    meter = meter_of(sse(role))
    assert not meter.has_output
    meter.feed(sse(delta("H")))
    assert meter.has_output


def test_only_the_first_choice_is_kept_as_text_and_all_are_counted() -> None:
    second = {"choices": [{"index": 1, "delta": {"content": "abcdefgh"}, "finish_reason": "stop"}]}
    meter = meter_of(sse(delta("12345678"), second))
    assert meter.take_text() == "12345678"
    assert meter.finish_reason is None
    assert meter.usage_or_estimate(0).output_tokens == 4


def test_a_text_completion_is_read_alike() -> None:
    piece = {"id": "t-1", "choices": [{"index": 0, "text": "Hello", "finish_reason": None}]}
    meter = meter_of(sse(piece, "[DONE]"), operation=Operation.TEXT_COMPLETION)
    assert meter.take_text() == "Hello"


@pytest.mark.parametrize(
    ("event", "tokens"),
    [
        (delta("12345678"), 2),
        (delta("123456789"), 3),
        (delta("世界"), 2),
        (delta("hé"), 1),
        ({"choices": [{"delta": {"reasoning_content": "12345678"}}]}, 2),
        ({"choices": [{"delta": {"content": "", "reasoning": "12345678"}}]}, 2),
        # told twice, and thrice
        ({"choices": [{"delta": {"reasoning_content": "12345678", "reasoning": "12345678"}}]}, 2),
        (
            {"choices": [{"delta": {"reasoning": "12345678", "reasoning_details": [{"text": "12345678"}]}}]},
            2,
        ),
        ({"choices": [{"delta": {"content": [{"type": "text", "text": "12345678"}]}}]}, 2),
        ({"choices": [{"delta": {"content": [{"type": "thinking", "thinking": [{"text": "1234"}]}]}}]}, 1),
        ({"choices": [{"delta": {"refusal": "12345678"}}]}, 2),
        ({"choices": [{"delta": {"tool_calls": [{"function": {"arguments": '{"a":123}'}}]}}]}, 3),
        ({"choices": [{"delta": {"tool_calls": [{"function": None}]}}]}, 0),
        ({"choices": [{"text": "12345678"}]}, 2),
        ({"choices": []}, 0),
    ],
)
def test_output_is_estimated_where_no_usage_came(event: Any, tokens: int) -> None:
    usage = meter_of(sse(event)).usage_or_estimate(42)
    assert usage == Usage(42, tokens, source=UsageSource.ESTIMATED)


@pytest.mark.parametrize("kind", ["output_text", "function_call_arguments", "refusal", "reasoning_text"])
def test_every_kind_of_delta_of_a_response_counts(kind: str) -> None:
    event = {"type": f"response.{kind}.delta", "delta": "12345678"}
    meter = meter_of(sse(event, event), operation=Operation.RESPONSES)
    assert meter.usage_or_estimate(1).output_tokens == 4
    assert meter.has_output


@given(st.lists(st.text(max_size=20), max_size=6))
def test_the_estimate_of_a_stream_is_that_of_its_text_as_a_whole(pieces: list[str]) -> None:
    streamed = meter_of(sse(*map(delta, pieces))).usage_or_estimate(0).output_tokens
    body = dumps({"choices": [{"message": {"content": "".join(pieces)}}]}).encode()
    assert streamed == estimate_answer(body)


# -- usage in all its forms ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "usage"),
    [
        pytest.param(
            {
                "prompt_tokens": 12,
                "completion_tokens": 6,
                "total_tokens": 18,
                "prompt_tokens_details": {"cached_tokens": 4, "audio_tokens": 0},
                "completion_tokens_details": {"reasoning_tokens": 2, "audio_tokens": 0},
            },
            Usage(12, 6, cached_input_tokens=4, reasoning_tokens=2),
            id="openai-chat",
        ),
        pytest.param(
            {
                "input_tokens": 12,
                "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 3},
                "output_tokens": 6,
                "output_tokens_details": {"reasoning_tokens": 2},
                "total_tokens": 18,
            },
            Usage(12, 6, 4, 3, 2),
            id="openai-responses",
        ),
        pytest.param(
            {
                "completion_tokens": 6,
                "completion_tokens_details": {
                    "accepted_prediction_tokens": 0,
                    "audio_tokens": 0,
                    "reasoning_tokens": 0,
                    "rejected_prediction_tokens": 0,
                },
                "prompt_tokens": 12,
                "prompt_tokens_details": {"audio_tokens": 0, "cached_tokens": 0},
                "total_tokens": 18,
            },
            Usage(12, 6),
            id="azure",
        ),
        pytest.param(
            {"prompt_tokens": 12, "total_tokens": 18, "completion_tokens": 6, "prompt_tokens_details": None},
            Usage(12, 6),
            id="vllm",
        ),
        pytest.param(
            {"prompt_tokens": 12, "completion_tokens": 6, "total_tokens": 18}, Usage(12, 6), id="ollama"
        ),
        pytest.param(
            {
                "queue_time": 0.03,
                "prompt_tokens": 12,
                "prompt_time": 0.002,
                "completion_tokens": 6,
                "completion_time": 0.01,
                "total_tokens": 18,
                "total_time": 0.012,
            },
            Usage(12, 6),
            id="groq",
        ),
        pytest.param(
            {
                "prompt_tokens": 12,
                "completion_tokens": 6,
                "total_tokens": 18,
                "cost": 0.00014,
                "is_byok": False,
                "prompt_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 2, "audio_tokens": 0},
                "cost_details": {"upstream_inference_cost": None},
                "completion_tokens_details": {"reasoning_tokens": 5, "image_tokens": 0},
            },
            Usage(12, 6, 4, 2, 5),
            id="openrouter",
        ),
        pytest.param(
            {
                "prompt_tokens": 12,
                "completion_tokens": 6,
                "total_tokens": 18,
                "prompt_cache_hit_tokens": 8,
                "prompt_cache_miss_tokens": 4,
            },
            Usage(12, 6, cached_input_tokens=8),
            id="deepseek",
        ),
        pytest.param({"prompt_tokens": 5, "total_tokens": 5}, Usage(5), id="embeddings"),
        pytest.param({"prompt_tokens": 0, "completion_tokens": 0}, None, id="zero"),
        pytest.param(
            {"prompt_tokens": 3, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 9}},
            Usage(3, 1, cached_input_tokens=3),
            id="more-cached-than-there-was",
        ),
        pytest.param({"prompt_tokens": "12", "completion_tokens": 6}, None, id="half-a-string"),
        pytest.param({"prompt_tokens": -1, "completion_tokens": 6}, None, id="negative"),
        pytest.param({"prompt_tokens": True, "completion_tokens": False}, None, id="booleans"),
        pytest.param({"prompt_tokens": "12", "completion_tokens": "6"}, None, id="strings"),
        pytest.param({"prompt_tokens": -12, "completion_tokens": -6}, None, id="negatives"),
        pytest.param({"prompt_tokens": 1.5}, None, id="fractions"),
        pytest.param({"prompt_tokens": None, "completion_tokens": None}, None, id="nulls"),
        pytest.param(
            {"prompt_tokens": 2, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": "many"}},
            Usage(2, 2),
            id="odd-details",
        ),
        pytest.param({"total_tokens": 18}, None, id="total-alone"),
        pytest.param({}, None, id="empty"),
        pytest.param(None, None, id="absent"),
        pytest.param("a lot", None, id="text"),
        pytest.param([12, 6], None, id="list"),
    ],
)
def test_usage_is_read_as_each_server_writes_it(given: Any, usage: Usage | None) -> None:
    assert read_usage(given) == usage


def test_usage_is_read_in_a_chunk_of_an_unusual_shape_too() -> None:
    parts = {
        "choices": [{"index": 0, "delta": {"content": [{"type": "text", "text": "Hm."}]}}],
        "usage": USAGE,
    }
    assert meter_of(sse(parts, "[DONE]")).usage == Usage(11, 7)


def test_of_a_chunk_of_an_unusual_shape_the_answers_text_is_kept() -> None:
    thinking = {"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}
    parts = [thinking, {"type": "text", "text": "NOT "}, {"type": "reference", "reference_ids": [1]}]

    def unusual(said: dict[str, Any], index: Any = 0) -> dict[str, Any]:
        return {"choices": [{"index": index, "delta": said}, "?"]}

    meter = meter_of(
        sse(delta("The answer "), unusual({"content": "is "}, "0"), unusual({"content": parts})),
        sse(unusual({"content": parts}, 1), unusual({"tool_calls": {}}), unusual({"content": None})),
        sse({"choices": [{"index": 0, "delta": "?"}]}, delta("true."), "[DONE]"),
    )
    assert meter.take_text() == "The answer is NOT true."


@pytest.mark.parametrize("name", ["content", "reasoning_content", "reasoning"])
def test_a_thought_is_output_as_a_word_is(name: str) -> None:
    """What comes first to the reader: the time to the first token ends with it."""
    assert meter_of(sse({"choices": [{"index": 0, "delta": {name: "Hm."}}]})).has_output


def test_groqs_usage_beside_the_standard_one_is_not_added_to_it() -> None:
    beside = delta("Hi", x_groq={"id": "req_1", "usage": USAGE})
    assert meter_of(sse(beside)).usage == Usage(11, 7)
    assert meter_of(sse(beside, {"choices": [], "usage": USAGE})).usage == Usage(11, 7)


# -- whole answers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ('{"id":"a","model":"m","choices":[{"finish_reason":"stop"}]}', ("a", "m", None, "stop")),
        ('{"id":"r","model":"m","status":"incomplete"}', ("r", "m", None, "incomplete")),
        (f'{{"model":"m","usage":{dumps(USAGE)}}}', (None, "m", Usage(11, 7), None)),
        ("{}", (None, "", None, None)),
        ('{"id":7,"model":null,"usage":"a lot","choices":[]}', (None, "", None, None)),
        (f'{{"id":"a","choices":{{}},"usage":{dumps(USAGE)}}}', ("a", "", Usage(11, 7), None)),
        ('{"id":"a","choices":[7]}', ("a", "", None, None)),
        ('{"choices":[{"finish_reason":3}]}', (None, "", None, None)),
        ('{"choices":null,"object":"list","data":[]}', (None, "", None, None)),
    ],
)
def test_a_whole_answers_facts_are_read_from_any_shape(body: str, expected: tuple[Any, ...]) -> None:
    facts = read_answer(body.encode())
    assert (facts.id, facts.model, facts.usage, facts.finish_reason) == expected


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b'{"id":"a"',
        b"[]",
        b"null",
        b'"text"',
        b'{"id":"\xff"}',
        b'{"choices":7,"id":',
        b'{"choices":7,"x":"\xff"}',
        b'{"usage":' + b"[" * 100_000,
    ],
)
def test_what_is_no_json_object_is_no_answer(body: bytes) -> None:
    with pytest.raises(UpstreamProtocolError):
        read_answer(body)


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        ({"message": "Too long.", "code": "context_length_exceeded"}, UpstreamRejected, "Too long."),
        ({"message": "No.", "type": "invalid_request_error"}, UpstreamRejected, "No."),
        ({"message": "Slow down.", "code": 429}, UpstreamRateLimited, "limits the rate"),
        ({"message": "Slow down.", "type": "rate_limit_error"}, UpstreamRateLimited, "limits the rate"),
        ({"message": "Bad key.", "code": 401}, UpstreamMisconfigured, "credentials"),
        (
            {"message": "Bad key.", "type": "invalid_request_error", "code": "invalid_api_key"},
            UpstreamMisconfigured,
            "credentials",
        ),
        (
            {"message": "Gone.", "type": "invalid_request_error", "code": "account_deactivated"},
            UpstreamMisconfigured,
            "credentials",
        ),
        ({"message": "Bad key.", "type": "authentication_error"}, UpstreamMisconfigured, "(401)"),
        ({"message": "No.", "type": "permission_error", "code": None}, UpstreamMisconfigured, "(403)"),
        ({"message": "Pay.", "type": "billing_error"}, UpstreamMisconfigured, "(402)"),
        (
            {"message": "No.", "type": "invalid_request_error", "code": "unsupported_parameter"},
            UpstreamRejected,
            "No.",
        ),
        ({"message": "No.", "type": "BadRequestError"}, UpstreamRejected, "No."),
        ({"message": "The maximum context length is 8192."}, UpstreamRejected, "8192"),
        ({"message": "Too many tokens, please wait."}, UpstreamError, "Too many tokens"),
        ({"message": "Overloaded.", "code": "503"}, UpstreamUnavailable, "503"),
        ({"message": "Boom.", "code": 502}, UpstreamError, "failed (502)"),
        ({"message": "Boom with sk-secret.", "code": "server_error"}, UpstreamError, "Boom with (hidden)."),
        ({"code": True}, UpstreamError, "no reason was given"),
        ("Boom.", UpstreamError, "error: Boom."),
        (["Boom."], UpstreamError, "no reason was given"),
    ],
)
def test_an_error_in_place_of_an_answer_is_what_its_status_would_have_been(
    error: Any, raised: type[UpstreamError], message: str
) -> None:
    body = dumps({"error": error})
    with pytest.raises(UpstreamError) as whole:
        read_answer(body.encode(), "sk-secret")
    meter = StreamMeter(Operation.CHAT, hide_usage=False)
    meter.secret = "sk-secret"
    meter.feed(f"data: {body}\n\n".encode())
    with pytest.raises(UpstreamError) as first:
        meter.check()
    assert type(whole.value) is type(first.value) is raised
    assert message in whole.value.message
    assert whole.value.message == first.value.message
    assert "sk-secret" not in dumps(whole.value.body())


def test_an_answer_that_tells_of_an_error_too_is_an_answer() -> None:
    """A response that failed has a status, and what it has used."""
    usage = {"input_tokens": 3, "output_tokens": 1}
    failed = {"id": "r-1", "status": "failed", "error": {"code": "rate_limit_exceeded"}, "usage": usage}
    assert read_answer(dumps(failed).encode()).usage is not None
    assert read_answer(b'{"error":null,"data":[]}').usage is None
    assert read_answer(b'{"error":{"message":"Slow."},"choices":[{"finish_reason":"error"}]}').usage is None


@pytest.mark.parametrize(
    "beside", [{"status": 500}, {"status": "error"}, {"choices": []}, {"choices": None}, {"choices": "x"}]
)
def test_an_error_is_no_answer_whatever_stands_beside_it(beside: dict[str, Any]) -> None:
    with pytest.raises(UpstreamRateLimited):
        read_answer(dumps({"error": {"message": "Slow down.", "code": 429}, **beside}).encode())


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        ('{"choices":[{"message":{"content":"12345678","role":"assistant"}}]}', 2),
        ('{"choices":[{"text":"12345678"},{"text":"1234"}]}', 3),
        ('{"choices":[{"message":{"content":"1234","reasoning_content":"12345678"}}]}', 3),
        (
            '{"choices":[{"message":{"content":"1234","reasoning":"12345678","reasoning_details":[{"text":"1"}]}}]}',
            3,
        ),
        ('{"output":[{"type":"message","content":[{"type":"output_text","text":"12345678"}]}]}', 2),
        (
            '{"choices":[{"message":{"tool_calls":[{"id":"x","function":{"name":"f","arguments":"12345678"}}]}}]}',
            2,
        ),
        ('{"data":[{"embedding":[1,2,3]}]}', 0),
        ("[]", 0),
        ("not JSON", 0),
    ],
)
def test_a_whole_answer_without_usage_is_estimated_from_what_the_model_wrote(body: str, tokens: int) -> None:
    assert estimate_answer(body.encode()) == tokens


def test_an_answer_with_letters_that_are_not_utf_8_is_estimated_as_nothing() -> None:
    assert estimate_answer(b'{"x":"\xff"}') == 0
