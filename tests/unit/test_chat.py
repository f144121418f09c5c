"""The request path with small ports around it: attempts, deadlines, and books that are closed once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service import chat
from service.asking import Limits
from service.chat import ChatService, Exchange, new_id, read_call
from service.domain import Call, Cost, Operation, Outcome, Price, RequestRecord, Usage, UsageSource
from service.errors import (
    CallerGone,
    InvalidRequest,
    RateLimited,
    StreamTruncated,
    UpstreamError,
    UpstreamMisconfigured,
    UpstreamProtocolError,
    UpstreamRateLimited,
    UpstreamRejected,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from service.metering import MAX_EVENT_BYTES
from service.ports import Reservation, Trace, Upstream
from service.routing import retries
from tests.unit.ports import (
    DONE,
    GOOD_BODY,
    USER,
    FlatPrices,
    ListAccounts,
    NotingRecorder,
    OneUpstream,
    ScriptedUpstream,
    Stream,
    chat_call,
    chunk,
)

UNAVAILABLE = UpstreamUnavailable("no", upstream_request_id="req-failed")


class Pauses(list[float]):
    """What `asyncio.sleep` was asked for by the request path; it does not sleep."""


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> Pauses:
    noted = Pauses()
    real = asyncio.sleep

    async def sleep(seconds: float) -> None:
        noted.append(seconds)
        await real(0)

    monkeypatch.setattr("service.asking.asyncio.sleep", sleep)
    return noted


class Path:
    """A request path, and what it wrote down."""

    def __init__(
        self,
        upstream: Upstream | None = None,
        *,
        limits: Limits | None = None,
        accounts: ListAccounts | None = None,
        catalogue: OneUpstream | None = None,
    ) -> None:
        self.upstream = upstream or ScriptedUpstream()
        self.kept = accounts or ListAccounts()
        self.recorder = NotingRecorder()
        self.service = ChatService(
            catalogue=catalogue or OneUpstream(self.upstream),
            prices=FlatPrices(),
            accounts=self.kept,
            recorder=self.recorder,
            limits=limits or Limits(timeout_seconds=60, idle_seconds=60, max_retries=2),
        )

    def exchange(self, operation: Operation = Operation.CHAT) -> Exchange:
        return self.service.exchange(
            request_id="req-1", route="/v1/x", operation=operation, principal=USER, trace=Trace("tp")
        )

    async def ask(self, call: Call, *, keep_text: bool = False) -> tuple[bytes, RequestRecord]:
        """The whole answer, or all of the stream."""
        exchange = self.exchange(call.operation)
        async with exchange:
            await exchange.open(call, keep_text=keep_text)
            if exchange.whole is not None:
                body = exchange.whole
            else:
                body = b"".join([block async for block in exchange.events()])
        return body, exchange.record

    def closed_record(self) -> RequestRecord:
        """The one record; it was closed exactly once, everywhere."""
        (record,) = self.kept.records
        assert self.recorder.count("opened") == self.recorder.count("closed") == 1
        return record


# -- good answers --------------------------------------------------------------------------------


async def test_a_whole_answer_fills_the_record() -> None:
    path = Path()
    body, record = await path.ask(chat_call())
    assert body is GOOD_BODY
    assert record is path.closed_record()
    assert (record.outcome, record.error_code, record.attempts) == (Outcome.SUCCESS, None, 1)
    assert record.usage == Usage(10, 5)
    assert record.cost.usd == 15.0
    assert (record.response_id, record.response_model, record.finish_reason) == (
        "chatcmpl-1",
        "good-2025",
        "stop",
    )
    assert (record.upstream, record.provider, record.upstream_request_id) == (
        "scripted",
        "scripted",
        "req-whole",
    )
    assert (record.principal, record.request_model, record.stream) == (USER, "good", False)
    assert path.recorder.told == [("opened", "tp"), ("attempted", None), ("closed", "success")]


async def test_a_stream_fills_the_record_and_is_closed() -> None:
    stream = Stream(
        [
            chunk(""),
            chunk("Hel"),
            chunk("lo"),
            chunk(finish_reason="stop"),
            b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}\n\n',
            DONE,
        ]
    )
    path = Path(ScriptedUpstream(stream))
    body, record = await path.ask(chat_call(stream=True, stream_options={"include_usage": True}))
    assert body.endswith(DONE)
    assert record is path.closed_record()
    assert record.usage == Usage(3, 2)
    assert (record.finish_reason, record.response_id, record.stream) == ("stop", "c-1", True)
    assert record.time_to_first_token_seconds is not None
    assert record.time_per_output_token_seconds is not None
    assert stream.closed == 1


async def test_the_text_of_a_stream_is_kept_if_wanted() -> None:
    path = Path(ScriptedUpstream(Stream([chunk("Hel"), chunk("lo"), DONE])))
    exchange = path.exchange()
    text = ""
    async with exchange:
        await exchange.open(chat_call(stream=True), keep_text=True)
        async for _ in exchange.events():
            text += exchange.take_text()
    assert text == "Hello"


async def test_comments_before_the_first_event_are_no_event() -> None:
    stream = Stream([b": wait\n\n", b": wait\n\n", chunk("Hello"), DONE])
    body, _ = await Path(ScriptedUpstream(stream)).ask(chat_call(stream=True))
    assert body == chunk("Hello") + DONE


async def test_an_answer_without_usage_is_estimated() -> None:
    answer = b'{"choices":[{"message":{"content":"12345678"}}]}'
    _, record = await Path(ScriptedUpstream(answer)).ask(chat_call())
    assert record.usage is not None
    assert (record.usage.output_tokens, record.usage.source) == (2, UsageSource.ESTIMATED)
    assert record.usage.input_tokens > 0


@pytest.mark.parametrize("answer", [b'{"choices":[],"x":"\xff"}', GOOD_BODY[:-1] + b',"x":"\xff"}'])
async def test_letters_that_are_not_utf_8_in_fields_that_nobody_reads_do_not_stop_the_books(
    answer: bytes,
) -> None:
    path = Path(ScriptedUpstream(answer))
    call = Call(Operation.CHAT, "good", b'{"model":"good","x":"\xff"}')
    body, _ = await path.ask(call)
    assert body == answer
    assert path.closed_record().outcome is Outcome.SUCCESS


# -- what the upstream is asked ------------------------------------------------------------------


async def asked(call: Call, catalogue: Callable[[Upstream], OneUpstream] | None = None) -> Call:
    """The call as the upstream got it."""
    answer: Any = Stream([chunk("x"), DONE]) if call.stream else GOOD_BODY
    upstream = ScriptedUpstream(answer)
    await Path(upstream, catalogue=(catalogue or OneUpstream)(upstream)).ask(call)
    return upstream.calls[0]


async def test_a_whole_call_goes_on_to_the_byte() -> None:
    call = chat_call()
    call.body = b' {"model" : "good", "x": 1e3 ,"messages":[]} \n'
    assert (await asked(call)).body == call.body


async def test_usage_is_spliced_into_a_streams_call_and_all_else_stays_to_the_byte() -> None:
    call = chat_call(stream=True)
    call.body = b' {"model" : "good", "x": 1e3 ,"stream":true}'
    sent = await asked(call)
    assert (
        sent.body == b' {"stream_options":{"include_usage":true},"model" : "good", "x": 1e3 ,"stream":true}'
    )


@pytest.mark.parametrize("options", [None, {}, {"include_usage": False}, {"other": 1}])
async def test_usage_is_added_to_the_stream_options_that_are_there(options: Any) -> None:
    sent = await asked(chat_call(stream=True, stream_options=options))
    assert json.loads(sent.body)["stream_options"] == {**(options or {}), "include_usage": True}


async def test_who_asked_for_usage_gets_it_unchanged() -> None:
    call = chat_call(stream=True, stream_options={"include_usage": True})
    call.usage_shown = True
    assert (await asked(call)).body == call.body


@pytest.mark.parametrize("operation", [Operation.RESPONSES, Operation.EMBEDDINGS])
async def test_operations_without_that_option_are_not_given_it(operation: Operation) -> None:
    end = b'data: {"type":"response.completed","response":{"id":"r"}}\n\n'
    upstream = ScriptedUpstream(Stream([end]))
    call = Call(operation, "good", b'{"model":"good","stream":true}', stream=True)
    if operation is Operation.EMBEDDINGS:
        upstream, call.stream = ScriptedUpstream(), False
    await Path(upstream).ask(call)
    assert upstream.calls[0].body == call.body


async def test_an_upstream_that_refuses_the_option_is_not_given_it() -> None:
    call = chat_call(stream=True)
    assert (await asked(call, lambda u: OneUpstream(u, stream_usage=False))).body == call.body


@pytest.mark.parametrize("stream", [False, True])
async def test_the_upstreams_own_name_of_a_model_is_put_in(stream: bool) -> None:
    call = chat_call(stream=stream, seed=7)
    sent = await asked(call, lambda u: OneUpstream(u, model="their-name"))
    body = json.loads(sent.body)
    assert (sent.model, body["model"], body["seed"]) == ("their-name", "their-name", 7)
    assert body.get("stream_options") == ({"include_usage": True} if stream else None)
    assert json.loads(call.body)["model"] == "good", "the caller's own call stays as it was"


async def test_a_body_that_cannot_be_rewritten_is_refused_and_never_emptied() -> None:
    upstream = ScriptedUpstream()
    path = Path(upstream, catalogue=OneUpstream(upstream, model="their-name"))
    with pytest.raises(InvalidRequest):
        await path.ask(Call(Operation.CHAT, "good", b'{"model":"good","x":"\xff"}'))
    assert upstream.calls == []
    assert path.closed_record().outcome is Outcome.CLIENT_ERROR


# -- attempts ------------------------------------------------------------------------------------


async def test_a_failure_is_tried_again_and_the_answer_taken(pauses: Pauses) -> None:
    path = Path(ScriptedUpstream(UNAVAILABLE, UNAVAILABLE, GOOD_BODY))
    body, record = await path.ask(chat_call())
    assert body is GOOD_BODY
    assert (record.attempts, record.outcome, record.upstream_request_id) == (3, Outcome.SUCCESS, "req-whole")
    code = "openai_service_error"
    assert [told for what, told in path.recorder.told if what == "attempted"] == [code, code, None]
    assert len(pauses) == 2


@pytest.mark.parametrize("retries", [0, 1, 4])
async def test_no_more_attempts_are_made_than_allowed(pauses: Pauses, retries: int) -> None:
    path = Path(ScriptedUpstream(UNAVAILABLE), limits=Limits(max_retries=retries))
    with pytest.raises(UpstreamUnavailable):
        await path.ask(chat_call())
    record = path.closed_record()
    assert (record.attempts, record.upstream_request_id) == (retries + 1, "req-failed")
    assert record.usage is None, "what nobody answered costs nothing"


@pytest.mark.parametrize(
    "error",
    [
        UpstreamRejected(400, {"message": "no"}),
        UpstreamMisconfigured("no"),
        ValueError("a fault of ours"),
        InvalidRequest("no"),
    ],
)
async def test_what_no_retry_can_help_is_not_tried_again(pauses: Pauses, error: Exception) -> None:
    path = Path(ScriptedUpstream(error))
    with pytest.raises(type(error)):
        await path.ask(chat_call())
    assert (path.closed_record().attempts, pauses) == (1, [])


@pytest.mark.parametrize("bad", [b"<html>", b'{"id":', b"[]"])
async def test_an_answer_that_is_none_is_tried_again(pauses: Pauses, bad: bytes) -> None:
    body, record = await Path(ScriptedUpstream(bad, GOOD_BODY)).ask(chat_call())
    assert (body, record.attempts) == (GOOD_BODY, 2)


@pytest.mark.parametrize(
    "pieces",
    [
        [],
        [StreamTruncated("cut")],
        [b": only a comment\n\n"],
        [b'data: {"error":{"message":"overload"}}\n\n'],
        [b"data: {half"],
        [b"data: no json\n\n"],
    ],
)
async def test_a_stream_that_fails_before_its_first_event_is_tried_again(
    pauses: Pauses, pieces: list[Any]
) -> None:
    failed = Stream(pieces)
    path = Path(ScriptedUpstream(failed, Stream([chunk("Hello"), DONE])))
    body, record = await path.ask(chat_call(stream=True))
    assert body == chunk("Hello") + DONE
    assert record.attempts == 2
    assert failed.closed == 1


@pytest.mark.parametrize(
    ("end", "outcome"),
    [
        (StreamTruncated("cut"), Outcome.STREAM_TRUNCATED),
        (b"", Outcome.STREAM_TRUNCATED),
        (b'data: {"error":{"message":"overload"}}\n\n', Outcome.UPSTREAM_ERROR),
        (b"data: no json\n\n", Outcome.UPSTREAM_ERROR),
    ],
)
async def test_after_the_first_event_nothing_is_tried_again(
    pauses: Pauses, end: Any, outcome: Outcome
) -> None:
    broken = Stream([chunk("Hel"), chunk("lo"), end])
    upstream = ScriptedUpstream(broken, Stream([chunk("never"), DONE]))
    path = Path(upstream)
    with pytest.raises(UpstreamError):
        await path.ask(chat_call(stream=True))
    record = path.closed_record()
    assert (record.attempts, record.outcome, len(upstream.calls)) == (1, outcome, 1)
    assert record.usage is not None
    assert (record.usage.output_tokens, record.usage.source) == (2, UsageSource.ESTIMATED)
    assert broken.closed == 1


async def test_an_error_in_the_first_events_own_packet_comes_after_it(pauses: Pauses) -> None:
    both = chunk("Hello") + b'data: {"error":{"message":"overload"}}\n\n'
    path = Path(ScriptedUpstream(Stream([both])))
    seen = b""
    exchange = path.exchange()
    with pytest.raises(UpstreamError, match="overload"):
        async with exchange:
            await exchange.open(chat_call(stream=True))
            async for block in exchange.events():
                seen += block
    assert seen == chunk("Hello")
    assert exchange.record.attempts == 1


@pytest.mark.parametrize(
    ("pieces", "outcome"),
    [
        ([chunk("Hello"), DONE, CallerGone("left")], Outcome.SUCCESS),
        ([chunk("Hello"), CallerGone("left")], Outcome.CLIENT_DISCONNECTED),
    ],
)
async def test_a_caller_who_leaves_after_the_end_mark_had_all_of_it(
    pieces: list[Any], outcome: Outcome
) -> None:
    path = Path(ScriptedUpstream(Stream(pieces)))
    with pytest.raises(CallerGone):
        await path.ask(chat_call(stream=True))
    assert path.closed_record().outcome is outcome


# -- pauses and deadlines ------------------------------------------------------------------------


async def test_the_pause_that_the_upstream_asks_for_is_kept(pauses: Pauses) -> None:
    limited = UpstreamRateLimited("slow", retry_after_seconds=7.5)
    await Path(ScriptedUpstream(limited, limited, GOOD_BODY)).ask(chat_call())
    assert pauses == pytest.approx([7.5, 7.5], abs=0.01)
    assert min(pauses) > 7.5, "or a timer that is early finds the place closed"


async def test_an_upstream_that_asks_for_a_long_pause_gets_it_from_the_caller(pauses: Pauses) -> None:
    limited = UpstreamRateLimited("slow", retry_after_seconds=retries.RETRY_AFTER_MOST_SECONDS + 0.1)
    path = Path(ScriptedUpstream(limited, GOOD_BODY))
    with pytest.raises(UpstreamRateLimited):
        await path.ask(chat_call())
    record = path.closed_record()
    assert (record.attempts, record.outcome, pauses) == (1, Outcome.RATE_LIMITED, [])


async def test_a_pause_beyond_the_deadline_is_not_begun(pauses: Pauses) -> None:
    limited = UpstreamRateLimited("slow", retry_after_seconds=5.0)
    path = Path(ScriptedUpstream(limited, GOOD_BODY), limits=Limits(timeout_seconds=4.0))
    with pytest.raises(UpstreamRateLimited):
        await path.ask(chat_call())
    assert pauses == []


@given(st.integers(1, 60))
def test_pauses_grow_up_to_a_bound(attempt: int) -> None:
    most = min(retries.BACKOFF_SECONDS * 2 ** (attempt - 1), retries.BACKOFF_MOST_SECONDS)
    assert all(0 <= retries.pause(attempt, UNAVAILABLE) <= most for _ in range(20))


async def never() -> Any:
    await asyncio.Event().wait()


@pytest.mark.parametrize("stream", [False, True])
async def test_an_upstream_that_never_answers_ends_in_a_timeout(stream: bool) -> None:
    answer = Stream([never]) if stream else never
    path = Path(ScriptedUpstream(answer), limits=Limits(timeout_seconds=0.01, max_retries=5))
    with pytest.raises(UpstreamTimeout):
        await path.ask(chat_call(stream=stream))
    record = path.closed_record()
    assert (record.outcome, record.attempts, record.error_code) == (Outcome.TIMEOUT, 1, "api_timeout")
    assert record.usage is not None, "the upstream heard the question, and counts it"
    assert record.usage.source is UsageSource.ESTIMATED
    assert path.recorder.told[1] == ("attempted", "api_timeout")


async def test_comments_do_not_hold_off_the_deadline() -> None:
    async def turn() -> None:
        await asyncio.sleep(0.001)

    pieces = [piece for _ in range(100_000) for piece in (b": wait\n\n", turn)]
    path = Path(ScriptedUpstream(Stream(pieces)), limits=Limits(timeout_seconds=0.01))
    with pytest.raises(UpstreamTimeout):
        await path.ask(chat_call(stream=True))


async def test_all_attempts_together_have_one_deadline(
    monkeypatch: pytest.MonkeyPatch, pauses: Pauses
) -> None:
    """Each attempt takes 6 of 10 seconds, by a clock that the attempts move: the second one is the last."""
    loop = asyncio.get_running_loop()
    now = loop.time()
    monkeypatch.setattr(loop, "time", lambda: now)

    async def slow_failure() -> Any:
        nonlocal now
        now += 6.0
        return UNAVAILABLE

    upstream = ScriptedUpstream(slow_failure)
    path = Path(upstream, limits=Limits(timeout_seconds=10.0, max_retries=9))
    with pytest.raises(UpstreamError):
        await path.ask(chat_call())
    assert len(upstream.calls) == 2


async def test_a_stream_that_stalls_ends_in_a_timeout_and_keeps_its_tokens() -> None:
    stalled = Stream([chunk("12345678"), never])
    path = Path(ScriptedUpstream(stalled), limits=Limits(idle_seconds=0.01))
    with pytest.raises(UpstreamTimeout):
        await path.ask(chat_call(stream=True))
    record = path.closed_record()
    assert record.outcome is Outcome.TIMEOUT
    assert record.usage is not None
    assert record.usage.output_tokens == 2
    assert stalled.closed == 1


async def test_a_connection_that_lingers_after_the_end_mark_costs_the_answer_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chat, "END_SECONDS", 0.001)
    lingering = Stream([chunk("Hello"), DONE, never])
    body, record = await Path(ScriptedUpstream(lingering)).ask(chat_call(stream=True))
    assert body == chunk("Hello") + DONE
    assert (record.outcome, lingering.closed) == (Outcome.SUCCESS, 1)


async def test_a_connection_that_breaks_after_the_end_mark_costs_the_answer_nothing() -> None:
    broken = Stream([chunk("Hello"), DONE, StreamTruncated("cut")])
    _, record = await Path(ScriptedUpstream(broken)).ask(chat_call(stream=True))
    assert record.outcome is Outcome.SUCCESS


# -- the books are closed exactly once -----------------------------------------------------------

Where = Callable[[asyncio.Event], tuple[Path, Call]]


def in_the_accounts(here: asyncio.Event) -> tuple[Path, Call]:
    async def wait() -> None:
        here.set()
        await never()

    return Path(accounts=ListAccounts(wait)), chat_call()


def in_the_upstream(here: asyncio.Event) -> tuple[Path, Call]:
    async def wait() -> None:
        here.set()
        await never()

    return Path(ScriptedUpstream(wait)), chat_call()


def before_the_first_event(here: asyncio.Event) -> tuple[Path, Call]:
    async def wait() -> None:
        here.set()
        await never()

    return Path(ScriptedUpstream(Stream([b": wait\n\n", wait]))), chat_call(stream=True)


def in_the_stream(here: asyncio.Event) -> tuple[Path, Call]:
    async def wait() -> None:
        here.set()
        await never()

    return Path(ScriptedUpstream(Stream([chunk("12345678"), wait]))), chat_call(stream=True)


def in_a_pause(here: asyncio.Event) -> tuple[Path, Call]:
    async def fail() -> Any:
        here.set()
        return UpstreamRateLimited("slow", retry_after_seconds=9.0)

    return Path(ScriptedUpstream(fail)), chat_call()


WHERE = [in_the_accounts, in_the_upstream, before_the_first_event, in_the_stream, in_a_pause]


@pytest.mark.parametrize("where", WHERE, ids=lambda f: f.__name__)
@pytest.mark.parametrize("times", [1, 2])
async def test_a_cancelled_request_is_closed_once(where: Where, times: int) -> None:
    here = asyncio.Event()
    path, call = where(here)
    task = asyncio.create_task(path.ask(call))
    await here.wait()
    for _ in range(3):
        await asyncio.sleep(0)  # into the pause, after the failure
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await task
    await path.service.settled()
    record = path.closed_record()
    cut = Outcome.STREAM_TRUNCATED if where is in_the_stream else Outcome.INTERNAL_ERROR
    assert (record.outcome, record.error_code) == (cut, "server_shutting_down")
    if where is in_the_stream:
        assert record.usage is not None
        assert record.usage.output_tokens == 2, "what was streamed is paid for"


async def test_a_cancellation_while_the_stream_is_closed_loses_no_record() -> None:
    closing = asyncio.Event()

    class SlowToClose(Stream):
        async def close(self) -> None:
            closing.set()
            await never()

    path = Path(ScriptedUpstream(SlowToClose([chunk("Hello"), DONE])))
    task = asyncio.create_task(path.ask(chat_call(stream=True)))
    await closing.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await path.service.settled()
    path.closed_record()


async def test_a_request_cancelled_again_while_it_settles_is_entered_all_the_same() -> None:
    entering, go_on = asyncio.Event(), asyncio.Event()

    class SlowAccounts(ListAccounts):
        async def settle(self, record: RequestRecord, reservation: Reservation | None) -> None:
            entering.set()
            await go_on.wait()
            await super().settle(record, reservation)

    accounts, here = SlowAccounts(), asyncio.Event()

    async def wait() -> None:
        here.set()
        await never()

    path = Path(ScriptedUpstream(wait), accounts=accounts)
    task = asyncio.create_task(path.ask(chat_call()))
    await here.wait()
    task.cancel()
    await entering.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert accounts.records == []
    go_on.set()
    await path.service.settled()
    assert len(accounts.records) == 1


@pytest.mark.parametrize(
    ("raised", "outcome", "code"),
    [
        (CallerGone("gone"), Outcome.CLIENT_DISCONNECTED, "client_disconnected"),
        (ValueError("ours"), Outcome.INTERNAL_ERROR, "internal_error"),
        (InvalidRequest("no"), Outcome.CLIENT_ERROR, "invalid_request"),
        (UpstreamRejected(408, {}), Outcome.TIMEOUT, "upstream_rejected"),
    ],
)
async def test_what_is_raised_inside_decides_the_outcome(
    raised: Exception, outcome: Outcome, code: str
) -> None:
    path = Path()
    with pytest.raises(type(raised)):
        async with path.exchange():
            raise raised
    record = path.closed_record()
    assert (record.outcome, record.error_code, record.usage) == (outcome, code, None)


async def test_a_caller_who_leaves_while_the_upstream_works_is_booked_with_an_estimate() -> None:
    async def leave() -> Any:
        return CallerGone("gone")

    path = Path(ScriptedUpstream(leave))
    with pytest.raises(CallerGone):
        await path.ask(chat_call())
    record = path.closed_record()
    assert record.usage is not None
    assert (record.usage.output_tokens, record.usage.source) == (0, UsageSource.ESTIMATED)


async def test_a_refused_principal_never_reaches_the_upstream() -> None:
    async def refuse() -> None:
        raise RateLimited("too many", retry_after_seconds=3)

    upstream = ScriptedUpstream()
    path = Path(upstream, accounts=ListAccounts(refuse))
    with pytest.raises(RateLimited):
        await path.ask(chat_call())
    record = path.closed_record()
    assert (record.outcome, record.attempts, upstream.calls) == (Outcome.RATE_LIMITED, 0, [])


async def test_many_requests_at_once_have_a_record_each() -> None:
    path = Path()
    await asyncio.gather(*(path.ask(chat_call()) for _ in range(50)))
    assert len({record.id for record in path.kept.records}) == 50


def test_ids_are_unique_and_sort_by_time() -> None:
    ids = [new_id() for _ in range(1_000)]
    assert len(set(ids)) == 1_000
    assert [each[:12] for each in ids] == sorted(each[:12] for each in ids)


# -- reading a call ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"model":"m"}', ("m", False, False)),
        (b'{"model":"m","stream":true}', ("m", True, False)),
        (b'{"model":"m","stream":null,"stream_options":null}', ("m", False, False)),
        (b'{"model":"m","stream":true,"stream_options":{"include_usage":true}}', ("m", True, True)),
        (b'{"stream":true,"x":[1,{"model":"inner"}],"model":"m"}', ("m", True, False)),
        ('{"model":"größe","x":"\\ud83c\\udf0a"}'.encode(), ("größe", False, False)),
    ],
)
def test_the_few_fields_that_matter_are_read(body: bytes, expected: tuple[str, bool, bool]) -> None:
    call = read_call(Operation.CHAT, body)
    assert (call.model, call.stream, call.usage_shown) == expected
    assert call.body is body


def test_embeddings_never_stream() -> None:
    assert not read_call(Operation.EMBEDDINGS, b'{"model":"m","stream":true}').stream


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"model":7}', "model"),
        (b'{"model":null}', "model"),
        (b'{"model":""}', "model"),
        (b"{}", "model"),
        (b'{"model":"m","stream":"yes"}', "stream"),
        (b'{"model":"m","stream_options":true}', "stream_options"),
        (b"", None),
        (b"{", None),
        (b"[]", None),
        (b'"text"', None),
        (b'{"model":"m"} trailing', None),
        (b'{"model":"\xff"}', None),
        (b'{"model":"\\ud800"}', None),
        (b'{"model":"m","x":' + b"[" * 100_000, None),
        (b'{"model":"m","x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", None),
    ],
    ids=repr,
)
def test_a_wrong_body_is_refused_with_the_field_that_is_wrong(body: bytes, param: str | None) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_call(Operation.CHAT, body)
    assert caught.value.param == param
    assert len(caught.value.message) < 300


@given(st.binary(max_size=300))
def test_no_bytes_at_all_are_more_than_an_invalid_request(body: bytes) -> None:
    try:
        call = read_call(Operation.CHAT, body)
    except InvalidRequest:
        return
    assert call.model


async def test_an_endless_event_is_given_up() -> None:
    def flood() -> Any:
        while True:
            yield b"x" * 1_048_576

    path = Path(ScriptedUpstream(Stream(flood())), limits=Limits(max_retries=0))
    with pytest.raises(UpstreamProtocolError):
        await path.ask(chat_call(stream=True))
    assert MAX_EVENT_BYTES <= 64 * 1024 * 1024


# -- estimates -----------------------------------------------------------------------------------


def output(operation: Operation = Operation.CHAT, **parameters: Any) -> tuple[int, int]:
    """Tokens of an answer: expected, and at the most."""
    return chat._output(Call(operation, "m", b""), parameters, None)


@pytest.mark.parametrize(
    ("parameters", "most"),
    [
        ({"max_tokens": 100}, 100),
        ({"max_completion_tokens": 1, "max_tokens": 100}, 100),  # one of them is not heeded
        ({"max_output_tokens": 1}, 4096),  # not of this operation
        ({"max_tokens": 100.0}, 100),
        ({"max_tokens": True}, 4096),
        ({"max_tokens": -5}, 4096),
        ({"max_tokens": 10**30}, 1_000_000_000),
        ({"max_tokens": 10, "n": 3}, 30),
        ({"max_tokens": 10, "n": 3.0}, 30),
        ({"max_tokens": 10, "n": "3"}, 10),
    ],
)
def test_the_longest_answer_is_the_largest_that_an_upstream_may_give(
    parameters: dict[str, Any], most: int
) -> None:
    assert output(**parameters)[1] == most


def test_each_prompt_and_each_try_has_an_answer() -> None:
    assert output(Operation.TEXT_COMPLETION, prompt=["a", "b"], max_tokens=10)[1] == 20
    assert output(Operation.TEXT_COMPLETION, prompt=[[1, 2], [3]], max_tokens=10, best_of=5)[1] == 100
    assert output(Operation.TEXT_COMPLETION, prompt=[1, 2, 3], max_tokens=10)[1] == 10
    assert output(Operation.EMBEDDINGS, input="a", max_tokens=10) == (0, 0)


async def test_what_the_provider_has_kept_of_a_conversation_is_reckoned_with() -> None:
    accounts = ListAccounts(counts_use=True)
    path = Path(accounts=accounts)
    body = {"model": "good", "input": "Hello?", "max_output_tokens": 10, "previous_response_id": "resp_1"}
    await path.ask(Call(Operation.RESPONSES, "good", msgspec.json.encode(body)))
    (demand,) = accounts.demands
    assert demand.usd < 20
    assert demand.most_usd == 128_010


async def test_what_nobody_heard_costs_what_it_costs_where_it_was_asked() -> None:
    async def leave() -> Any:
        return CallerGone("gone")

    upstream = ScriptedUpstream(leave)
    catalogue = OneUpstream(upstream)
    (place,) = catalogue.resolve("good").places
    place.target = msgspec.structs.replace(place.target, price=Price(input=2_000_000.0, output=0.0))
    path = Path(upstream, catalogue=catalogue)
    with pytest.raises(CallerGone):
        await path.ask(chat_call())
    record = path.closed_record()
    assert record.usage is not None
    assert record.cost == Cost(2.0 * record.usage.input_tokens, "override")
