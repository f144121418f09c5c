"""The response cache without its stores: who may use it, its names, its form, and who asks first."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import msgspec
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.caching import entries
from service.caching.answers import IN_A_THREAD_ABOVE_BYTES, AnswerCache
from service.caching.entries import COMPRESS_ABOVE_BYTES, Entry, pack, unpack
from service.caching.flights import FAILURES_IN_A_ROW, Ending, Flights, Role, ending_of
from service.caching.lookups import SERVICE, cached
from service.caching.policy import NO_WISH, Lookup, Wish, find_lookup, read_wish
from service.caching.replay import PIECE_LETTERS, Replay, replay
from service.caching.whole import CompletionAssembler, assembler, is_good
from service.domain import Call, Operation, Principal, RequestRecord, Usage, UsageSource
from service.errors import CallerGone, InvalidRequest, UpstreamRejected, UpstreamUnavailable
from service.metering import StreamMeter
from service.ports import StreamedAnswer, Target
from service.stores.memory_cache import MemoryCache
from service.upstreams.simulator import SimulatorUpstream
from tests.fakes import upstream as fake

CHAT, TEXT = Operation.CHAT, Operation.TEXT_COMPLETION
EMBEDDINGS, RESPONSES = Operation.EMBEDDINGS, Operation.RESPONSES
ON, OFF, REFRESH = Wish(asks=True), Wish(asks=False), Wish(asks=True, refresh=True)
MOST = 1024 * 1024
TARGET = Target(SimulatorUpstream("there"), "model-there")
MESSAGES = [{"role": "user", "content": "Hello"}]


def call(
    operation: Operation = CHAT,
    body: bytes | None = None,
    headers: tuple[tuple[str, str], ...] = (),
    **values: Any,
) -> Call:
    if body is None:
        body = json.dumps({"model": "m", "messages": MESSAGES} | values).encode()
    return Call(operation, "m", body, headers=headers)


def lookup(one: Call, wish: Wish = NO_WISH, target: Target = TARGET) -> Lookup | None:
    return find_lookup(one, target, wish, 300.0)


def name(*args: Any, target: Target = TARGET, **values: Any) -> str:
    found = lookup(call(*args, **values), ON, target)
    assert found is not None
    return found.name


# -- who may use the cache -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x_weir_cache", "cache_control", "wish"),
    [
        (None, None, NO_WISH),
        ("on", None, ON),
        (" OFF ", None, OFF),
        ("refresh", None, REFRESH),
        (None, "no-store", OFF),
        (None, "no-cache", REFRESH),
        (None, "max-age=60", Wish(asks=True, max_age_seconds=60.0)),
        (None, "Max-Age=60, no-transform", Wish(asks=True, max_age_seconds=60.0)),
        (None, "max-age=0", REFRESH),
        (None, "max-age=60, no-cache", REFRESH),
        (None, "no-cache, max-age=60", REFRESH),
        (None, "no-cache, no-store", OFF),
        (None, "max-age=soon", NO_WISH),
        (None, "max-age=-1", NO_WISH),
        (None, "only-if-cached", NO_WISH),
        (None, "", NO_WISH),
        ("on", "no-store", ON),
        ("off", "max-age=60", OFF),
    ],
)
def test_headers_say_what_a_caller_wants(
    x_weir_cache: str | None, cache_control: str | None, wish: Wish
) -> None:
    assert read_wish(x_weir_cache, cache_control) == wish


@pytest.mark.parametrize("value", ["yes", "", "on, off"])
def test_an_unknown_wish_is_refused_by_its_header(value: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        read_wish(value, None)
    assert refused.value.param == "X-Weir-Cache"


@pytest.mark.parametrize("value", ["0", "0.0", "-0", "0e0", "0.00", "0E+3"])
def test_temperature_0_is_kept_unasked(value: str) -> None:
    for space in ("", " ", "\n\t"):
        body = f'{{"model":"m","messages":[],"temperature"{space}:{space}{value}{space}}}'
        found = lookup(call(body=body.encode()))
        assert found == Lookup(found.name if found else "", 300.0)


@pytest.mark.parametrize("value", ["0.7", "1", "0.01", "null", "false", '"0"', "[0]", "0,0"])
def test_other_temperatures_are_not(value: str) -> None:
    assert lookup(call(body=f'{{"model":"m","messages":[],"temperature":{value}}}'.encode())) is None


def test_a_temperature_that_is_not_the_calls_own_does_not_count() -> None:
    told = [{"role": "user", "content": 'Say {"temperature":0}'}]
    nested = {"format": {"temperature": 0}}
    assert lookup(call(messages=told, response_format=nested)) is None
    assert lookup(call(messages=told, temperature=1)) is None
    assert lookup(call(messages=told, temperature=0)) is not None
    assert lookup(call()) is None


def test_parameters_that_were_decoded_before_are_taken_as_they_are() -> None:
    parameters = {"model": "m", "messages": MESSAGES, "temperature": 0}
    given_before = Call(CHAT, "m", b"", parameters=parameters)
    assert lookup(given_before) == lookup(call(temperature=0))
    for other in (0.5, False, "0", None):
        assert lookup(Call(CHAT, "m", b"", parameters={**parameters, "temperature": other})) is None


def test_a_callers_word_comes_before_the_temperature() -> None:
    assert lookup(call(temperature=0), OFF) is None
    asked = lookup(call(temperature=1), ON)
    assert asked is not None
    assert (asked.read, asked.write) == (True, True)
    refreshed = lookup(call(temperature=0), REFRESH)
    assert refreshed is not None
    assert (refreshed.read, refreshed.write) == (False, True)
    young = lookup(call(), Wish(asks=True, max_age_seconds=9.0))
    assert young is not None
    assert young.max_age_seconds == 9.0


@pytest.mark.parametrize(
    "stateful",
    [
        {"store": True},
        {"background": True},
        {"previous_response_id": "resp_1"},
        {"conversation": "conv_1"},
        {"conversation": {"id": "conv_1"}},
        {"audio": {"voice": "alloy"}},
    ],
    ids=str,
)
def test_what_the_provider_remembers_is_never_kept(stateful: dict[str, Any]) -> None:
    for operation in (CHAT, RESPONSES):
        assert lookup(call(operation, temperature=0, **stateful), ON) is None
        without: dict[str, Any] = dict.fromkeys(stateful)
        assert lookup(call(operation, temperature=0, **without)) is not None
    assert lookup(call(RESPONSES, temperature=0, store=False)) is not None


@pytest.mark.parametrize(
    "outside",
    [
        {"tools": [{"type": "function", "function": {}}, {"type": "web_search"}]},
        {"tools": [{"type": "mcp"}]},
        {"web_search_options": {}},
    ],
    ids=str,
)
def test_what_the_provider_looks_up_is_kept_only_when_asked(outside: dict[str, Any]) -> None:
    one = call(temperature=0, **outside)
    assert lookup(one) is None
    assert lookup(one, ON) is not None
    own = [{"type": "function", "function": {"name": "f"}}, {"type": "custom"}]
    assert lookup(call(temperature=0, tools=own)) is not None


def test_embeddings_are_kept_only_when_asked() -> None:
    assert lookup(call(EMBEDDINGS, input="x", temperature=0)) is None
    assert lookup(call(EMBEDDINGS, input="x"), ON) is not None


@pytest.mark.parametrize("own", [None, 0.0, 7.0])
def test_a_model_has_its_own_time_to_live(own: float | None) -> None:
    target = msgspec.structs.replace(TARGET, cache_ttl_seconds=own)
    for usual in (0.0, 300.0):
        found = find_lookup(call(temperature=0), target, ON, usual)
        expected = usual if own is None else own
        assert (found.ttl_seconds if found else 0.0) == expected


@pytest.mark.parametrize(
    "body", [b"", b"[]", b'"temperature":0}', b"\xff", b'{"temperature":0', b"[" * 100_000, b'{"a":1e999}']
)
def test_a_body_that_is_no_object_passes_by(body: bytes) -> None:
    assert lookup(call(body=body), ON) is None


# -- names ---------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.text(max_size=5)
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
UNNAMED = {"stream", "stream_options", "user", "safety_identifier", "metadata", "prompt_cache_key"}
UNNAMED |= {"prompt_cache_retention", "store", "background", "previous_response_id", "conversation", "audio"}
PARAMETERS = st.dictionaries(
    st.text(min_size=1, max_size=8).filter(lambda n: n not in UNNAMED), JSON, max_size=5
)


def shuffled(value: Any, rng: random.Random) -> Any:
    """The same document, the keys of its objects in another order."""
    if isinstance(value, list):
        return [shuffled(item, rng) for item in value]
    if isinstance(value, dict):
        keys = list(value)
        rng.shuffle(keys)
        return {key: shuffled(value[key], rng) for key in keys}
    return value


@given(PARAMETERS, st.randoms(use_true_random=False), st.sampled_from([None, 2]))
def test_the_order_of_keys_does_not_matter(
    values: dict[str, Any], rng: random.Random, indent: int | None
) -> None:
    one = json.dumps(values).encode()
    other = json.dumps(shuffled(values, rng), indent=indent).encode()
    assert name(body=one) == name(body=other)


@given(PARAMETERS, PARAMETERS)
def test_any_other_value_has_another_name(one: dict[str, Any], other: dict[str, Any]) -> None:
    # As JSON: to Python 1, 1.0 and True are equal, and to a model they need not be.
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (name(body=json.dumps(one).encode()) == name(body=json.dumps(other).encode())) is same


def test_the_order_of_messages_matters() -> None:
    first, second = {"role": "user", "content": "a"}, {"role": "user", "content": "b"}
    assert name(messages=[first, second]) != name(messages=[second, first])


@pytest.mark.parametrize(
    "left_out",
    [
        {"stream": True},
        {"stream_options": {"include_usage": True}},
        {"user": "u"},
        {"safety_identifier": "s"},
        {"metadata": {"a": "b"}},
        {"prompt_cache_key": "k"},
    ],
    ids=lambda value: next(iter(value)),
)
def test_what_changes_no_answer_is_not_in_the_name(left_out: dict[str, Any]) -> None:
    assert name(**left_out) == name()
    # In the Responses API the answer repeats it, so it changes the answer.
    repeated = not next(iter(left_out)).startswith("stream")
    assert (name(RESPONSES, **left_out) != name(RESPONSES)) is repeated


def test_all_that_decides_who_answers_is_in_the_name() -> None:
    elsewhere = Target(SimulatorUpstream("elsewhere"), "model-there")
    names = {
        name(),
        name(TEXT),
        name(target=elsewhere),
        name(target=msgspec.structs.replace(TARGET, model="another")),
        name(seed=1),
        name(seed=None),
        name(headers=(("OpenAI-Beta", "x"),)),
        find_name(Call(CHAT, "alias", call().body)),
    }
    assert len(names) == 8
    assert name(headers=(("traceparent", "00-1"),)) == name()


def find_name(one: Call) -> str:
    found = lookup(one, ON)
    assert found is not None
    return found.name


# -- entries -------------------------------------------------------------------------------------

COUNTS = st.integers(0, 2**40)
USAGES = st.none() | st.builds(Usage, COUNTS, COUNTS, COUNTS, COUNTS, COUNTS)
ENTRIES = st.builds(
    Entry,
    body=st.binary(max_size=50) | st.integers(0, 40).map(lambda n: b'{"word": "water"}' * n * n),
    stored_at=st.floats(0, 1e10),
    model=st.text(max_size=5),
    id=st.none() | st.text(max_size=5),
    finish_reason=st.none() | st.just("stop"),
    usage=USAGES,
)


@given(ENTRIES)
def test_an_entry_comes_back_as_it_was(entry: Entry) -> None:
    assert unpack(pack(entry)) == entry


@given(ENTRIES, st.data())
def test_an_entry_that_was_changed_is_none(entry: Entry, data: st.DataObject) -> None:
    packed = pack(entry)
    at = data.draw(st.integers(0, len(packed) - 1))
    changed = bytearray(packed)
    changed[at] ^= data.draw(st.integers(1, 255))
    assert unpack(bytes(changed)) is None
    assert unpack(packed[:at]) is None
    assert unpack(packed + b"x") is None


@given(st.binary(max_size=200))
def test_foreign_bytes_are_no_entry(packed: bytes) -> None:
    assert unpack(packed) is None


@pytest.mark.parametrize("size", [99_999, 100_001, 0])
def test_an_entry_that_is_not_as_long_as_it_says_is_none(size: int) -> None:
    packed = pack(Entry(b"x" * 100_000, 0.0))
    start, length = entries._START, packed[5]
    facts = msgspec.msgpack.decode(packed[start : start + length], type=entries._Facts)
    facts.size = size
    other = msgspec.msgpack.encode(facts)
    head, rest = packed[:4] + len(other).to_bytes(2, "big"), other + packed[start + length :]
    assert unpack(head + zlib.crc32(rest, zlib.crc32(head)).to_bytes(4, "big") + rest) is None


def test_what_is_long_is_compressed_where_that_helps() -> None:
    text = b"word " * COMPRESS_ABOVE_BYTES
    noise = random.Random(1).randbytes(2 * COMPRESS_ABOVE_BYTES)
    assert len(pack(Entry(text, 0.0))) < len(text) / 10
    assert pack(Entry(noise, 0.0)).endswith(noise)
    assert pack(Entry(b"short", 0.0)).endswith(b"short")


# -- whole answers and streams -------------------------------------------------------------------

TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {}}}]
BODIES: dict[str, tuple[Operation, dict[str, Any]]] = {
    "chat": (CHAT, {}),
    "chat of two": (CHAT, {"n": 2}),
    "chat with logprobs": (CHAT, {"logprobs": True, "n": 2}),
    "chat with a tool": (CHAT, {"tools": TOOLS}),
    "text": (TEXT, {"prompt": "x", "n": 2}),
    "text with logprobs": (TEXT, {"prompt": "x", "logprobs": 1}),
    "response": (RESPONSES, {"input": "x"}),
    "response with a tool": (
        RESPONSES,
        {"input": "x", "tools": [{"type": "function", "name": "get_weather"}]},
    ),
}
FAKE_NAMES = {CHAT: "chat", TEXT: "completion", RESPONSES: "response"}


def ask(operation: Operation, values: dict[str, Any]) -> fake.Ask:
    payload: dict[str, Any] = {
        "messages": MESSAGES,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    payload |= values
    return fake.Ask(FAKE_NAMES[operation], "m", 1, payload, json.dumps(payload).encode())


def datas(stream: bytes) -> list[bytes]:
    """The data of each event of a stream that has one line of data in each."""
    events = stream.split(b"\n\n")
    assert events.pop() == b""
    return [event.partition(b"data: ")[2] for event in events]


def assembled(operation: Operation, events: list[bytes], most: int = MOST) -> bytes | None:
    made = assembler(operation, most)
    for event in events:
        made.feed(event)
    return made.whole()


def replayed(operation: Operation, body: bytes, *, usage: bool = True) -> list[bytes]:
    return datas(b"".join(replay(operation, body, usage=usage)))


def fake_stream(operation: Operation, values: dict[str, Any], plan: fake.Plan = fake.GOOD) -> list[bytes]:
    return [fake.utf8(event.data) for event in fake.script(ask(operation, values), plan).events]


@pytest.mark.parametrize(("operation", "values"), BODIES.values(), ids=BODIES.keys())
def test_a_stream_makes_the_answer_of_a_caller_who_does_not_stream(
    operation: Operation, values: dict[str, Any]
) -> None:
    plan = fake.Plan(fake.words(fake.UNICODE_CONTENT))
    whole = json.loads(fake.document(ask(operation, values), plan))
    made = assembled(operation, fake_stream(operation, values, plan))
    assert made is not None
    for choice in whole.get("choices", ()):
        choice.get("message", {}).pop("annotations", None)  # the fake streams none
    assert json.loads(made) == whole


def chat_answer(*messages: dict[str, Any], **values: Any) -> dict[str, Any]:
    choices = [
        {"index": index, "message": message, "logprobs": None, "finish_reason": "stop"}
        for index, message in enumerate(messages)
    ]
    head = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "m"}
    return {**head, "choices": choices, "usage": fake.chat_usage(), **values}


TEXTS = st.text(max_size=20) | st.sampled_from(["é" * (PIECE_LETTERS + 1), "x" * 3 * PIECE_LETTERS])
FUNCTIONS = st.fixed_dictionaries({"name": st.text(min_size=1, max_size=5), "arguments": TEXTS})
CALLS = st.fixed_dictionaries(
    {"id": st.text(min_size=1, max_size=5), "type": st.just("function"), "function": FUNCTIONS}
)
TOKEN = st.fixed_dictionaries({"token": st.text(max_size=3), "logprob": st.just(-0.5), "bytes": st.none()})
LOGPROBS = st.none() | st.fixed_dictionaries(
    {"content": st.lists(TOKEN, min_size=1, max_size=120), "refusal": st.none()}
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": st.none() | TEXTS},
    optional={
        "refusal": st.none() | TEXTS,
        "reasoning_content": TEXTS.filter(bool),
        "annotations": st.just([]) | st.just([{"type": "url_citation", "url_citation": {"url": "u"}}]),
        "tool_calls": st.lists(CALLS, min_size=1, max_size=3),
        "function_call": FUNCTIONS,
    },
)


@st.composite
def chat_answers(draw: st.DrawFn) -> dict[str, Any]:
    answer = chat_answer(*draw(st.lists(MESSAGE, min_size=1, max_size=3)))
    for choice in answer["choices"]:
        choice["logprobs"] = draw(LOGPROBS)
        choice["finish_reason"] = draw(st.sampled_from(["stop", "length", "tool_calls"]))
    if draw(st.booleans()):
        answer["system_fingerprint"] = "fp"
        answer["citations"] = ["one", "two"]
    return answer


@given(chat_answers())
def test_a_replay_says_all_of_a_chat_completion(answer: dict[str, Any]) -> None:
    for choice in answer["choices"]:
        if choice["message"].get("refusal") == "":
            choice["message"]["refusal"] = None  # a stream cannot tell them apart
    made = assembled(CHAT, replayed(CHAT, json.dumps(answer).encode()))
    assert made is not None
    assert json.loads(made) == answer


@given(st.lists(st.tuples(TEXTS, st.lists(st.text(max_size=3), max_size=120)), min_size=1, max_size=3))
def test_a_replay_says_all_of_a_text_completion(texts: list[tuple[str, list[str]]]) -> None:
    choices = [
        {
            "index": index,
            "text": text,
            "logprobs": {"tokens": tokens, "token_logprobs": [-0.5] * len(tokens)} if tokens else None,
            "finish_reason": "stop",
        }
        for index, (text, tokens) in enumerate(texts)
    ]
    answer = chat_answer(object="text_completion", choices=choices)
    made = assembled(TEXT, replayed(TEXT, json.dumps(answer).encode()))
    assert made is not None
    assert json.loads(made) == answer


def test_a_replay_has_usage_only_for_those_who_asked() -> None:
    body = json.dumps(chat_answer({"role": "assistant", "content": "Hello"})).encode()
    for usage in (True, False):
        *chunks, done = replayed(CHAT, body, usage=usage)
        assert done == b"[DONE]"
        last = json.loads(chunks[-1])
        assert (last["choices"] == []) is usage
        assert (last.get("usage") == fake.chat_usage()) is usage
        assert all(("usage" in json.loads(chunk)) is usage for chunk in chunks)


def test_a_replay_says_once_what_each_chunk_need_not() -> None:
    answer = chat_answer({"content": "a"}, {"content": "b"}, citations=["one"], system_fingerprint="fp")
    answer["choices"].reverse()
    *chunks, _ = map(json.loads, replayed(CHAT, json.dumps(answer).encode(), usage=False)[:-1])
    assert [chunk["choices"][0]["index"] for chunk in chunks] == [0, 1, 0, 1, 0]
    assert [chunk.get("citations") for chunk in chunks] == [["one"], None, None, None, None]
    assert {chunk["system_fingerprint"] for chunk in chunks} == {"fp"}


async def test_a_replay_is_read_like_an_answer_of_an_upstream() -> None:
    body = json.dumps(chat_answer({"content": "x" * 100 * PIECE_LETTERS})).encode()
    answer: StreamedAnswer = Replay(CHAT, body, usage=True)
    blocks = []
    while block := await answer.read():
        assert block.endswith(b"\n\n")
        blocks.append(block)
    await answer.close()
    assert len(blocks) > 1
    assert b"".join(blocks) == b"".join(replay(CHAT, body, usage=True))


def test_no_event_of_a_replay_is_long() -> None:
    text = "é\n" * 200_000
    response = json.loads(fake.document(ask(RESPONSES, {}), fake.Plan((text,))))
    chat = chat_answer({"role": "assistant", "content": text})
    assert max(map(len, replayed(CHAT, json.dumps(chat).encode()))) < 8 * PIECE_LETTERS
    deltas = [e for e in replayed(RESPONSES, json.dumps(response).encode()) if b'"delta"' in e]
    assert max(map(len, deltas)) < 8 * PIECE_LETTERS


@pytest.mark.parametrize(
    "events",
    [
        [b'{"error":{"message":"no"}}'],
        [b"no JSON"],
        [b""],
        [b"[]"],
        [b'{"choices":[{"index":"one"}]}'],
        [b'{"choices":[{"index":0,"delta":"text"}]}'],
        [b'{"choices":[{"index":0,"delta":{"content":["a"]}}]}'],
        [b'{"choices":[{"index":0,"delta":{"tool_calls":"text"}}]}'],
        [b'{"choices":[{"index":0,"logprobs":[]}]}'],
    ],
    ids=str,
)
def test_a_stream_with_anything_wrong_makes_nothing(events: list[bytes]) -> None:
    good = fake_stream(CHAT, {})
    assert assembled(CHAT, good) is not None
    assert assembled(CHAT, [*good[:2], *events, *good[2:]]) is None


def test_a_list_that_goes_on_as_a_text_makes_nothing() -> None:
    good = fake_stream(CHAT, {})
    odd = [
        b'{"choices":[{"index":0,"delta":{"odd":["a"]}}]}',
        b'{"choices":[{"index":0,"delta":{"odd":"b"}}]}',
    ]
    assert assembled(CHAT, [*good[:2], odd[0], *good[2:]]) is not None
    assert assembled(CHAT, [*good[:2], *odd, *good[2:]]) is None


@pytest.mark.parametrize(
    "delta",
    [
        {"content": [{"type": "text", "text": "NOT "}]},
        {"tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]},
    ],
    ids=str,
)
def test_a_stream_of_which_the_meter_cannot_read_a_part_makes_nothing(delta: dict[str, Any]) -> None:
    made = assembler(CHAT, MOST)
    meter = StreamMeter(CHAT, tap=made.feed)
    for event in odd_stream({"content": "The answer is "}, delta, {"content": "true."}):
        assert meter.feed(b"data: " + event + b"\n\n")
    assert made.whole() is None


def test_a_text_that_is_none_makes_nothing() -> None:
    odd = b'{"choices":[{"index":0,"text":["text"]}]}'
    assert assembled(TEXT, [odd, *fake_stream(TEXT, {})]) is None


@pytest.mark.parametrize("usage", ["asked", "every"])
@pytest.mark.parametrize(("operation", "values"), BODIES.values(), ids=BODIES.keys())
def test_a_stream_that_was_cut_makes_nothing(
    operation: Operation, values: dict[str, Any], usage: Any
) -> None:
    events = fake_stream(operation, values, fake.Plan(fake.GOOD.pieces, usage=usage))
    assert assembled(operation, events) is not None
    # An assembler does not wait for the [DONE] of a completion, nor for a usage that it has already.
    unneeded = 0 if operation is RESPONSES else 1 if usage == "asked" else 2
    for end in range(len(events) - unneeded):
        assert assembled(operation, events[:end]) is None


@pytest.mark.parametrize(
    "plan", [fake.Plan(fake.GOOD.pieces, usage="none"), fake.Plan(fake.GOOD.pieces, usage="wrong")]
)
def test_a_stream_without_usage_makes_nothing(plan: fake.Plan) -> None:
    assert assembled(CHAT, fake_stream(CHAT, {}, plan)) is None


@pytest.mark.parametrize("usage", ["every", "in-finish", "twice"])
def test_usage_may_come_anywhere(usage: Any) -> None:
    made = assembled(CHAT, fake_stream(CHAT, {}, fake.Plan(fake.GOOD.pieces, usage=usage)))
    assert made is not None
    assert json.loads(made)["usage"] == fake.chat_usage()


@pytest.mark.parametrize(("operation", "values"), BODIES.values(), ids=BODIES.keys())
def test_above_the_bound_nothing_is_made(operation: Operation, values: dict[str, Any]) -> None:
    events = fake_stream(operation, values)
    whole = assembled(operation, events)
    assert whole is not None
    assert assembled(operation, events, len(whole) - 1) is None


@pytest.mark.parametrize(
    "delta",
    [
        {"content": "x" * 1000},
        {"tool_calls": [{"index": 0, "function": {"arguments": "x" * 1000}}]},
        {"tool_calls": [{"function": {"arguments": "x" * 1000}}]},
        {"odd": ["x" * 1000]},
        {"odd": {"odder": {"text": "x" * 1000}}},
    ],
    ids=str,
)
def test_an_assembler_holds_no_more_than_its_bound(delta: dict[str, Any]) -> None:
    made = CompletionAssembler(CHAT, 10_000)
    for _ in range(20):
        made.feed(json.dumps({"choices": [{"index": 0, "delta": delta}]}).encode())
    assert not made._choices
    for index in range(200):
        made.feed(json.dumps({"choices": [{"index": index, "delta": {}}]}).encode())
    assert not made._choices


def test_many_small_pieces_are_not_copied_again_and_again() -> None:
    made = CompletionAssembler(CHAT, 10_000_000)
    piece = json.dumps({"choices": [{"index": 0, "delta": {"content": "four", "refusal": None}}]}).encode()
    for _ in range(10_000):
        made.feed(piece)
    assert len(made._choices[0]["delta"]["content"]) == 10_000
    assert made._room > 10_000_000 - 40_000 - 1_000


def odd_stream(*deltas: dict[str, Any]) -> list[bytes]:
    chunks = [{"id": "1", "model": "m", "choices": [{"index": 0, "delta": delta}]} for delta in deltas]
    end = {"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}], "usage": fake.chat_usage()}
    return [json.dumps(chunk).encode() for chunk in (*chunks, end)]


def test_servers_that_repeat_names_and_leave_out_places_are_understood() -> None:
    first, second = {"id": "a", "type": "function"}, {"id": "b", "type": "function"}
    events = odd_stream(
        {"role": "assistant", "reasoning_content": "Hm"},
        {"role": "assistant", "reasoning_content": "m."},
        {"tool_calls": [{**first, "function": {"name": "f", "arguments": "{"}}]},
        {"tool_calls": [{**first, "function": {"name": "f", "arguments": "}"}}]},
        {"tool_calls": [{**second, "function": {"name": "g", "arguments": "["}}]},
        {"tool_calls": [{"function": {"arguments": "]"}}]},
    )
    made = assembled(CHAT, events)
    assert made is not None
    assert json.loads(made)["choices"][0]["message"] == {
        "role": "assistant",
        "content": None,
        "reasoning_content": "Hmm.",
        "tool_calls": [
            {**first, "function": {"name": "f", "arguments": "{}"}},
            {**second, "function": {"name": "g", "arguments": "[]"}},
        ],
    }


@pytest.mark.parametrize(
    ("operation", "answer", "good"),
    [
        (CHAT, chat_answer({"role": "assistant", "content": "x"}), True),
        (CHAT, chat_answer(), False),
        (CHAT, chat_answer({"content": "x"}, error={"message": "no"}), False),
        (CHAT, chat_answer(choices=[{"finish_reason": "stop"}]), False),
        (CHAT, chat_answer(choices=[{"message": {}, "finish_reason": None}]), False),
        (CHAT, chat_answer(choices=[{"message": {}, "finish_reason": "content_filter"}]), False),
        (CHAT, chat_answer(choices=[{"message": {"tool_calls": ["x"]}, "finish_reason": "stop"}]), False),
        (TEXT, {"choices": [{"text": "x", "finish_reason": "length"}]}, True),
        (TEXT, {"choices": [{"finish_reason": "length"}]}, False),
        (EMBEDDINGS, {"data": [{"embedding": [0.5]}]}, True),
        (EMBEDDINGS, {"data": []}, False),
        (RESPONSES, {"status": "completed", "output": [{"type": "x"}]}, True),
        (RESPONSES, {"status": "completed", "output": []}, False),
        (RESPONSES, {"status": "completed", "output": [{"content": "x"}]}, False),
        (RESPONSES, {"status": "failed", "output": [{}], "error": {"code": "x"}}, False),
        (RESPONSES, {"status": "queued", "output": [{}]}, False),
        (RESPONSES, {"status": "incomplete", "output": [{}]}, False),
        (
            RESPONSES,
            {"status": "incomplete", "output": [{}], "incomplete_details": {"reason": "content_filter"}},
            False,
        ),
        (
            RESPONSES,
            {"status": "incomplete", "output": [{}], "incomplete_details": {"reason": "max_output_tokens"}},
            True,
        ),
    ],
    ids=str,
)
def test_only_answers_that_ended_well_are_good(
    operation: Operation, answer: dict[str, Any], good: bool
) -> None:
    assert is_good(operation, json.dumps(answer).encode()) is good


def test_what_is_no_answer_is_not_good() -> None:
    for body in (b"", b"[]", b"<html>", b"\xff", b"[" * 100_000):
        assert not any(is_good(operation, body) for operation in Operation)


# -- the official SDK reads a replay -------------------------------------------------------------


class Player:
    """A server that answers every POST with the bytes it was given."""

    def __init__(self) -> None:
        player = self
        self.stream = b""

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["content-length"]))
                self.send_response(200)
                self.send_header("content-type", "text/event-stream")
                self.send_header("content-length", str(len(player.stream)))
                self.end_headers()
                self.wfile.write(player.stream)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()
        url = f"http://127.0.0.1:{self.server.server_port}/v1"
        self.sdk = openai.OpenAI(base_url=url, api_key="any", max_retries=0, timeout=20)

    def close(self) -> None:
        self.sdk.close()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture(scope="module")
def player() -> Iterator[Player]:
    made = Player()
    yield made
    made.close()


def chat_in_sdk(player: Player, body: bytes, *, usage: bool = True) -> dict[str, Any]:
    player.stream = b"".join(replay(CHAT, body, usage=usage))
    with player.sdk.chat.completions.stream(model="m", messages=[{"role": "user", "content": "x"}]) as stream:
        final: dict[str, Any] = stream.get_final_completion().model_dump(mode="json")
    for choice in final["choices"]:
        choice["message"].pop("parsed")
        for tool in choice["message"]["tool_calls"] or ():
            tool.pop("index")
            tool["function"].pop("parsed_arguments", None)
    return final


def chat_as_sdk_reads(body: bytes) -> dict[str, Any]:
    final: dict[str, Any] = openai.types.chat.ChatCompletion.model_validate_json(body).model_dump(mode="json")
    return final


RICH: dict[str, dict[str, Any]] = {
    "content": {"role": "assistant", "content": "Grüße, 世界 🌊!" * 1000, "refusal": None, "annotations": []},
    "refusal": {"role": "assistant", "content": None, "refusal": "No. " * 2000},
    "reasoning": {"role": "assistant", "reasoning_content": "Hmm. " * 2000, "content": "Yes."},
    "calls": {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": f"call_{n}",
                "type": "function",
                "function": {"name": "f", "arguments": '{"a":"' + "x" * n + '"}'},
            }
            for n in (0, 1, 10_000)
        ],
    },
    "function": {
        "role": "assistant",
        "content": None,
        "function_call": {"name": "f", "arguments": "{}" * 5000},
    },
    "empty": {"role": "assistant", "content": ""},
}


@pytest.mark.parametrize("message", RICH.values(), ids=RICH.keys())
def test_the_sdk_makes_the_same_completion_of_a_replay(player: Player, message: dict[str, Any]) -> None:
    answer = chat_answer(message, system_fingerprint="fp", service_tier="default", citations=["a", "b"])
    token = {"token": "é", "logprob": -0.5, "bytes": [195, 169], "top_logprobs": []}
    answer["choices"][0]["logprobs"] = {"content": [token] * 120, "refusal": None}
    body = json.dumps(answer).encode()
    assert chat_in_sdk(player, body) == chat_as_sdk_reads(body)
    assert chat_in_sdk(player, body, usage=False) == chat_as_sdk_reads(body) | {"usage": None}


def test_the_sdk_makes_all_choices_of_a_replay(player: Player) -> None:
    body = json.dumps(chat_answer(RICH["content"], RICH["refusal"], RICH["calls"])).encode()
    assert chat_in_sdk(player, body) == chat_as_sdk_reads(body)


def response_answer(*items: dict[str, Any], **values: Any) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(fake.document(ask(RESPONSES, {}), fake.GOOD))
    return answer | {"output": list(items)} | values


LINK = {"type": "url_citation", "url": "u", "title": "t", "start_index": 0, "end_index": 1}
ITEMS: tuple[dict[str, Any], ...] = (
    {
        "id": "rs_1",
        "type": "reasoning",
        "summary": [{"type": "summary_text", "text": "Hm. " * 2000}],
        "content": [{"type": "reasoning_text", "text": "Well. " * 2000}],
        "encrypted_content": "zzz",
    },
    {
        "id": "ws_1",
        "type": "web_search_call",
        "status": "completed",
        "action": {"type": "search", "query": "q"},
    },
    {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": [
            {"type": "output_text", "text": "Grüße 🌊 " * 1500, "annotations": [LINK], "logprobs": []},
            {"type": "output_text", "text": "", "annotations": []},
            {"type": "refusal", "refusal": "No. " * 2000},
        ],
    },
    {
        "id": "fc_1",
        "type": "function_call",
        "status": "completed",
        "call_id": "c1",
        "name": "f",
        "arguments": "{}" * 4000,
    },
    {
        "id": "ct_1",
        "type": "custom_tool_call",
        "status": "completed",
        "call_id": "c2",
        "name": "g",
        "input": "in" * 4000,
    },
)


def response_in_sdk(player: Player, body: bytes) -> tuple[list[Any], Any]:
    player.stream = b"".join(replay(RESPONSES, body, usage=False))
    with player.sdk.responses.stream(model="m", input="x") as stream:
        events = list(stream)
        return events, stream.get_final_response()


def test_the_sdk_makes_the_same_response_of_a_replay(player: Player) -> None:
    body = json.dumps(response_answer(*ITEMS)).encode()
    events, final = response_in_sdk(player, body)
    whole = openai.types.responses.Response.model_validate_json(body)
    assert final.output_text == whole.output_text
    made = final.model_dump(mode="json")
    for item in made["output"]:
        item.pop("parsed_arguments", None)
        for part in item.get("content") or ():
            part.pop("parsed", None)
    assert made == whole.model_dump(mode="json")
    assert [event.sequence_number for event in events] == sorted(event.sequence_number for event in events)


def test_the_events_of_a_response_say_all_of_its_texts(player: Player) -> None:
    """For callers who follow the deltas and do not look at the last event."""
    events, _ = response_in_sdk(player, json.dumps(response_answer(*ITEMS)).encode())
    said: dict[tuple[str, int], str] = {}
    for event in events:
        if event.type.endswith(".delta"):
            key = (event.type.removeprefix("response.").removesuffix(".delta"), event.output_index)
            said[key] = said.get(key, "") + event.delta
    assert said == {
        ("reasoning_summary_text", 0): "Hm. " * 2000,
        ("reasoning_text", 0): "Well. " * 2000,
        ("output_text", 2): "Grüße 🌊 " * 1500,
        ("refusal", 2): "No. " * 2000,
        ("function_call_arguments", 3): "{}" * 4000,
        ("custom_tool_call_input", 4): "in" * 4000,
    }


def test_a_replay_of_a_response_has_the_events_of_a_stream() -> None:
    for values in ({}, {"tools": [{"type": "function", "name": "f"}]}):
        body = fake.document(ask(RESPONSES, values), fake.GOOD)
        events = [json.loads(data) for data in replayed(RESPONSES, body)]
        begun = events[0]["response"]
        assert (begun["status"], begun["output"], begun["usage"]) == ("in_progress", [], None)
        once = [event["type"] for event in events]
        streamed = [json.loads(data)["type"] for data in fake_stream(RESPONSES, values)]
        assert once == list(dict.fromkeys(streamed))  # deltas are joined, so each kind comes once


def test_a_response_that_was_cut_ends_as_such() -> None:
    details = {"reason": "max_output_tokens"}
    answer = response_answer(ITEMS[2], status="incomplete", incomplete_details=details)
    events = replayed(RESPONSES, json.dumps(answer).encode())
    last = json.loads(events[-1])
    assert (last["type"], last["response"]) == ("response.incomplete", answer)
    made = assembled(RESPONSES, events)
    assert made is not None
    assert json.loads(made) == answer


# -- flights -------------------------------------------------------------------------------------


async def turns(count: int = 5) -> None:
    """Lets everybody else run."""
    for _ in range(count):
        await asyncio.sleep(0)


def cancel_this_task() -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()


class Calls:
    """Callers of one flight, and the roles they got."""

    def __init__(self, flights: Flights) -> None:
        self.flights = flights
        self.roles: list[Role] = []
        self.now = 0
        self.most = 0

    async def one(self, act: Callable[[], Any], ending: Ending | None = None) -> Role:
        flight = self.flights.of("team", "name")
        async with flight as role:
            self.roles.append(role)
            if role is Role.LEADS:
                self.now += 1
                self.most = max(self.most, self.now)
                try:
                    await act()
                finally:
                    self.now -= 1
                if ending is not None:
                    flight.leave(ending)
        return role


async def test_one_leads_and_the_others_look() -> None:
    calls, gate = Calls(Flights()), asyncio.Event()
    tasks = [asyncio.create_task(calls.one(gate.wait, Ending.KEPT)) for _ in range(100)]
    await turns()
    assert calls.roles == [Role.LEADS]
    gate.set()
    await asyncio.gather(*tasks)
    assert calls.roles == [Role.LEADS] + [Role.LOOKS] * 99
    assert len(calls.flights) == 0


async def test_nobody_queues_for_an_answer_that_cannot_be_kept() -> None:
    calls, gate = Calls(Flights()), asyncio.Event()
    tasks = [asyncio.create_task(calls.one(gate.wait)) for _ in range(100)]
    await turns()
    gate.set()
    await asyncio.gather(*tasks)
    assert calls.roles == [Role.LEADS] + [Role.ALONE] * 99


async def test_a_leader_may_free_the_others_before_it_is_done() -> None:
    flights = Flights()
    flight = flights.of("team", "name")
    assert await flight.board() is Role.LEADS
    waiting = asyncio.create_task(flights.of("team", "name").board())
    await turns()
    flight.leave(Ending.NOT_KEPT)
    assert await waiting is Role.ALONE
    flight.leave(Ending.KEPT)  # the second word counts for nothing
    assert await flights.of("team", "name").board() is Role.LEADS


async def test_other_names_and_tenants_fly_by_themselves() -> None:
    flights = Flights()
    for tenant, name_of in (("a", "x"), ("a", "y"), ("b", "x")):
        assert await flights.of(tenant, name_of).board() is Role.LEADS


async def test_a_leader_that_leaves_is_followed_by_one_alone() -> None:
    calls, gate = Calls(Flights()), asyncio.Event()
    tasks = [asyncio.create_task(calls.one(gate.wait, Ending.KEPT)) for _ in range(20)]
    await turns()
    for left in range(10):
        tasks[left].cancel()
        await turns()
        assert calls.roles == [Role.LEADS] * (left + 2)
    gate.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert calls.most == 1
    assert calls.roles == [Role.LEADS] * 11 + [Role.LOOKS] * 9


async def test_failures_are_tried_again_one_at_a_time_but_not_for_ever() -> None:
    calls = Calls(Flights())

    async def fail() -> None:
        await asyncio.sleep(0)
        raise UpstreamUnavailable("no")

    await asyncio.gather(*(calls.one(fail) for _ in range(20)), return_exceptions=True)
    assert calls.most == 1
    assert calls.roles[:FAILURES_IN_A_ROW] == [Role.LEADS] * FAILURES_IN_A_ROW
    assert calls.roles[FAILURES_IN_A_ROW:] == [Role.ALONE] * (20 - FAILURES_IN_A_ROW)


async def test_patience_has_an_end() -> None:
    flights = Flights(patience_seconds=0.01)
    leader = flights.of("team", "name")
    assert await leader.board() is Role.LEADS
    assert await flights.of("team", "name").board() is Role.ALONE
    leader.leave(Ending.KEPT)
    assert len(flights) == 0


async def test_one_who_leaves_just_when_it_shall_lead_hands_the_lead_on() -> None:
    flights = Flights()
    leader = flights.of("team", "name")
    await leader.board()
    second, third = (asyncio.create_task(flights.of("team", "name").board()) for _ in range(2))
    await turns()
    leader.leave(Ending.FAILED)
    second.cancel()
    assert await third is Role.LEADS
    assert second.cancelled()


@pytest.mark.parametrize(
    ("raised", "ending"),
    [
        (None, Ending.NOT_KEPT),
        (asyncio.CancelledError(), Ending.LEFT),
        (CallerGone("gone"), Ending.LEFT),
        (UpstreamUnavailable("no"), Ending.FAILED),
        (UpstreamRejected(400, {}), Ending.NOT_KEPT),
        (ValueError(), Ending.FAILED),
    ],
    ids=repr,
)
def test_how_a_flight_ended_is_in_what_was_raised(raised: BaseException | None, ending: Ending) -> None:
    assert ending_of(raised) is ending


@given(
    st.lists(
        st.sampled_from(["kept", "not kept", "fail", "cancel", "cancel waiting"]), min_size=1, max_size=30
    ),
    st.randoms(use_true_random=True),  # seeded: tasks draw from it, out of the reach of the property
)
def test_whatever_happens_one_leads_at_a_time_and_nobody_is_forgotten(
    fates: list[str], rng: random.Random
) -> None:
    async def play() -> None:
        flights, leading = Flights(), 0

        async def one(fate: str) -> None:
            nonlocal leading
            for _ in range(rng.randrange(4)):
                await asyncio.sleep(0)
            flight = flights.of("team", "name")
            async with flight as role:
                if role is not Role.LEADS:
                    return
                leading += 1
                assert leading == 1
                try:
                    for _ in range(rng.randrange(4)):
                        await asyncio.sleep(0)
                    if fate == "fail":
                        raise UpstreamUnavailable("no")
                    flight_ends[fate](flight)
                finally:
                    leading -= 1

        flight_ends: dict[str, Callable[[Any], None]] = {
            "kept": lambda flight: flight.leave(Ending.KEPT),
            "not kept": lambda flight: flight.leave(Ending.NOT_KEPT),
            "cancel": lambda _: cancel_this_task(),
            "cancel waiting": lambda flight: flight.leave(Ending.KEPT),
        }
        tasks = [asyncio.create_task(one(fate)) for fate in fates]
        for fate, task in zip(fates, tasks, strict=True):
            if fate == "cancel waiting":
                for _ in range(rng.randrange(6)):
                    await asyncio.sleep(0)
                task.cancel()
        async with asyncio.timeout(20):
            ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(
            end is None or isinstance(end, UpstreamUnavailable | asyncio.CancelledError) for end in ends
        )
        assert len(flights) == 0

    asyncio.run(play())


# -- all together --------------------------------------------------------------------------------

FOUND = Lookup("name", 60.0)
BODY = json.dumps(chat_answer({"role": "assistant", "content": "Hello"})).encode()
COUNTED = Usage(12, 6)


def record(operation: Operation = CHAT, usage: Usage | None = COUNTED) -> RequestRecord:
    return RequestRecord(
        "1",
        "r",
        "/v1",
        operation,
        Principal("anna", "team"),
        response_model="m-1",
        response_id="chatcmpl-1",
        finish_reason="stop",
        usage=usage,
    )


def answers(clock: Callable[[], float] = lambda: 100.0, most: int = MOST) -> AnswerCache:
    return AnswerCache(
        MemoryCache(MOST * 4), Flights(), ttl_seconds=300.0, most_answer_bytes=most, clock=clock
    )


async def test_what_was_kept_is_found_by_its_tenant_alone() -> None:
    cache = answers()
    assert await cache.find("team", FOUND) is None
    assert await cache.keep(FOUND, record(), BODY)
    found = await cache.find("team", FOUND)
    assert found == Entry(BODY, 100.0, "m-1", "chatcmpl-1", "stop", COUNTED)
    assert await cache.find("other", FOUND) is None
    assert await cache.find("team", msgspec.structs.replace(FOUND, name="other")) is None
    assert await cache.find("team", msgspec.structs.replace(FOUND, read=False)) is None


async def test_a_large_answer_is_kept_like_a_small_one() -> None:
    body = json.dumps(
        chat_answer({"content": random.Random(1).randbytes(IN_A_THREAD_ABOVE_BYTES).hex()})
    ).encode()
    cache = answers()
    assert await cache.keep(FOUND, record(), body)
    found = await cache.find("team", FOUND)
    assert found is not None
    assert found.body == body


async def test_an_entry_may_be_too_old() -> None:
    now = 100.0
    cache = answers(lambda: now)
    await cache.keep(FOUND, record(), BODY)
    now = 110.0
    for most, there in ((9.0, False), (10.0, True), (None, True)):
        young = msgspec.structs.replace(FOUND, max_age_seconds=most)
        assert (await cache.find("team", young) is not None) is there


@pytest.mark.parametrize(
    "body", [None, b"{}", b"no", BODY + b" " * MOST], ids=["none", "empty", "no JSON", "large"]
)
async def test_what_is_not_good_is_not_kept(body: bytes | None) -> None:
    cache = answers()
    assert not await cache.keep(FOUND, record(), body)
    assert await cache.find("team", FOUND) is None


async def test_estimates_are_not_kept_as_counts() -> None:
    cache = answers()
    await cache.keep(FOUND, record(usage=Usage(1, 1, source=UsageSource.ESTIMATED)), BODY)
    found = await cache.find("team", FOUND)
    assert found is not None
    assert found.usage is None


async def test_foreign_bytes_are_a_miss() -> None:
    store = MemoryCache(MOST)
    cache = AnswerCache(store, Flights(), ttl_seconds=300.0, most_answer_bytes=MOST)
    await store.put("team", "name", b"of another program", 60)
    assert await cache.find("team", FOUND) is None


# -- the service's own look-ups ------------------------------------------------------------------


class Place(msgspec.Struct):
    name: str
    size: int = 1


class Slow:
    """Look-ups that count how often they were made."""

    def __init__(self) -> None:
        self.made = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def place(self, wanted: str, size: int = 1) -> Place:
        self.made += 1
        await self.gate.wait()
        return Place(wanted, size)

    async def fail(self) -> int:
        self.made += 1
        await self.gate.wait()
        raise ValueError

    async def unwritable(self) -> object:
        self.made += 1
        return self


async def test_a_look_up_is_made_once_for_equal_arguments() -> None:
    slow, cache = Slow(), MemoryCache(MOST)
    place = cached(cache, "places", 60)(slow.place)
    for _ in range(3):
        assert await place("here") == Place("here")
    assert slow.made == 1
    assert await place("there", size=2) == Place("there", 2)
    assert await place("there", size=3) == Place("there", 3)
    assert slow.made == 3
    assert await cached(cache, "other places", 60)(slow.place)("here") == Place("here")
    assert slow.made == 4


async def test_a_look_up_is_made_once_for_all_who_ask_at_the_same_time() -> None:
    slow = Slow()
    slow.gate.clear()
    place = cached(MemoryCache(MOST), "places", 60)(slow.place)
    asking = [asyncio.create_task(place("here")) for _ in range(100)]
    await turns()
    slow.gate.set()
    assert await asyncio.gather(*asking) == [Place("here")] * 100
    assert slow.made == 1


async def test_a_look_up_is_made_again_when_its_time_is_over() -> None:
    now = 0.0
    slow = Slow()
    place = cached(MemoryCache(MOST, lambda: now), "places", 60)(slow.place)
    await place("here")
    now = 59.0
    await place("here")
    assert slow.made == 1
    now = 60.0
    await place("here")
    assert slow.made == 2


async def test_errors_and_what_has_no_json_form_are_not_kept() -> None:
    slow, cache = Slow(), MemoryCache(MOST)
    fail, unwritable = cached(cache, "a", 60)(slow.fail), cached(cache, "b", 60)(slow.unwritable)
    for _ in range(2):
        with pytest.raises(ValueError):
            await fail()
        assert await unwritable() is slow
    assert slow.made == 4
    assert len(cache) == 0

    async def of(thing: object) -> str:
        slow.made += 1
        return "one"

    assert await cached(cache, "c", 60)(of)(slow) == "one"
    assert slow.made == 5


async def test_what_another_version_kept_is_a_miss() -> None:
    slow, cache = Slow(), MemoryCache(MOST)
    place = cached(cache, "places", 60)(slow.place)
    await place("here")
    ((tenant, key),) = cache._kept
    assert (tenant, key.partition(":")[0]) == (SERVICE, "places")
    await cache.put(tenant, key, b'{"other":1}', 60)
    assert await place("here") == Place("here")
    assert slow.made == 2
