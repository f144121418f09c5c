"""Two calls at a time: the first good answer is taken, and nothing of the other is left behind."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest

from service.asking import Limits
from service.chat import ChatService, Exchange
from service.deadlines import Deadline
from service.domain import AttemptKind, Call, Outcome, Principal, RequestRecord, UsageSource
from service.errors import (
    CallerGone,
    UpstreamError,
    UpstreamRejected,
    UpstreamTimeout,
    UpstreamUnavailable,
    WeirError,
)
from service.ports import Target
from service.routing.breaker import Breaker, Circuit
from service.routing.places import HEDGE_LEAST_LATENCIES, HEDGE_LEAST_SECONDS, Condition, Peer, Place
from service.routing.retries import RetryBudget
from service.routing.routes import Route
from tests.unit.ports import (
    DONE,
    GOOD_BODY,
    USER,
    FlatPrices,
    ListAccounts,
    NotingRecorder,
    ScriptedUpstream,
    Stream,
    chat_call,
    chunk,
)

UNAVAILABLE = UpstreamUnavailable("no")
OTHER_BODY = GOOD_BODY.replace(b"chatcmpl-1", b"chatcmpl-2")


class Noting(NotingRecorder):
    """Notes where each attempt was made, and why."""

    def __init__(self) -> None:
        super().__init__()
        self.attempts: list[tuple[str, str, str | None]] = []

    def attempted(
        self,
        record: RequestRecord,
        error: WeirError | None,
        kind: AttemptKind,
        seconds: float,
        response_model: str = "",
    ) -> None:
        self.attempts.append((record.upstream, kind.value, error.code if error else None))


class Hedged:
    """One model at two upstreams, whose answers are known to come within 50 ms."""

    def __init__(self, *answers: Any, seen: int = HEDGE_LEAST_LATENCIES, hedge: bool = True) -> None:
        self.upstreams = [ScriptedUpstream(a, name=f"u{n}") for n, a in enumerate(answers)]
        self.places = [Place(Target(u, "good"), Condition(Peer(u.name), Breaker())) for u in self.upstreams]
        for _ in range(seen):
            self.places[0].condition.answered(0.001)
        self.route = Route("good", self.places, hedge=hedge)
        self.recorder, self.kept = Noting(), ListAccounts()
        self.service = ChatService(
            catalogue=self,
            prices=FlatPrices(),
            accounts=self.kept,
            recorder=self.recorder,
            limits=Limits(timeout_seconds=60, idle_seconds=60, max_retries=0),
        )

    def resolve(self, model: str) -> Route:
        return self.route

    def check(self, principal: Principal, model: str) -> None: ...

    async def models(self, principal: Principal) -> list[dict[str, Any]]:
        return []

    def exchange(self, call: Call) -> Exchange:
        return self.service.exchange(request_id="r", route="/v1/x", operation=call.operation, principal=USER)

    async def ask(self, call: Call | None = None) -> bytes:
        call = call or chat_call()
        exchange = self.exchange(call)
        async with exchange:
            await exchange.open(call)
            if exchange.whole is not None:
                return exchange.whole
            return b"".join([block async for block in exchange.events()])

    @property
    def record(self) -> RequestRecord:
        (record,) = self.kept.records
        return record

    @property
    def hedges(self) -> list[str | None]:
        return [told for what, told in self.recorder.told if what == "hedged"]

    def nothing_left(self) -> None:
        assert [(p.condition.running, p.condition.peer.running) for p in self.places] == [(0, 0)] * len(
            self.places
        )
        assert len(self.service.sweep) == 0
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert sum(t == "opened" for t, _ in self.recorder.told) == len(self.kept.records)


class Held:
    """An answer that comes when it is told to."""

    def __init__(self, answer: Any = GOOD_BODY) -> None:
        self.answer = answer
        self.go, self.asked, self.gone = asyncio.Event(), asyncio.Event(), False

    async def __call__(self) -> Any:
        self.asked.set()
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.gone = True
            raise
        return self.answer


async def test_a_quick_answer_needs_no_second_call() -> None:
    path = Hedged(GOOD_BODY, OTHER_BODY)
    assert await path.ask() is GOOD_BODY
    assert (path.upstreams[1].calls, path.hedges) == ([], [])
    assert path.recorder.attempts == [("u0", "first", None)]
    path.nothing_left()


async def test_of_many_at_once_one_finds_out_whether_a_place_is_well() -> None:
    path = Hedged(GOOD_BODY, OTHER_BODY)
    path.places[0].condition.breaker.open_for(0.0)
    answers = await asyncio.gather(*(path.ask() for _ in range(10)))
    assert (answers.count(GOOD_BODY), answers.count(OTHER_BODY)) == (1, 9)
    assert path.places[0].condition.breaker.state is Circuit.CLOSED
    path.nothing_left()


async def test_of_many_at_once_a_place_gets_no_more_than_it_may_have() -> None:
    path = Hedged(GOOD_BODY, OTHER_BODY)
    path.places[0].condition.peer.most = 2
    answers = await asyncio.gather(*(path.ask() for _ in range(10)))
    assert (answers.count(GOOD_BODY), answers.count(OTHER_BODY)) == (2, 8)
    path.nothing_left()


async def test_a_late_first_call_is_overtaken_and_given_up_at_once() -> None:
    late = Held()
    path = Hedged(late, OTHER_BODY)
    assert await path.ask() is OTHER_BODY
    assert late.gone
    assert path.recorder.attempts == [("u1", "hedge", None), ("u0", "first", "client_disconnected")]
    record = path.record
    assert (record.upstream, record.attempts, record.response_id) == ("u1", 2, "chatcmpl-2")
    assert (record.upstream_request_id, record.outcome) == ("req-whole", Outcome.SUCCESS)
    assert record.usage is not None
    assert record.usage.source is UsageSource.PROVIDER
    (told,) = path.hedges
    assert told is not None
    assert told.startswith("won ")
    assert float(told.removeprefix("won ")) > 0, "the question at the price of the one that lost"
    assert path.places[0].condition._recent[-1] >= HEDGE_LEAST_SECONDS, "it took that long and longer"
    path.nothing_left()


async def test_a_first_call_that_answers_after_all_wins() -> None:
    first, second = Held(), Held(OTHER_BODY)
    path = Hedged(first, second)
    asking = asyncio.create_task(path.ask())
    await second.asked.wait()
    first.go.set()
    assert await asking is GOOD_BODY
    assert second.gone
    assert path.recorder.attempts == [("u0", "first", None), ("u1", "hedge", "client_disconnected")]
    assert (path.record.upstream, path.record.attempts) == ("u0", 2)
    assert [told.split()[0] for told in path.hedges if told] == ["lost"]
    path.nothing_left()


async def test_the_first_event_decides_for_streams_and_the_other_stream_is_closed() -> None:
    waits = Held()
    loser = Stream([b": wait\n\n", waits])
    winner = Stream([chunk("Hello"), DONE])
    path = Hedged(loser, winner)
    assert await path.ask(chat_call(stream=True)) == chunk("Hello") + DONE
    assert (loser.closed, winner.closed, waits.gone) == (1, 1, True)
    assert path.record.upstream == "u1"
    path.nothing_left()


async def test_of_two_answers_in_one_moment_the_other_is_closed_too() -> None:
    go = asyncio.Event()
    streams = [Stream([go.wait, chunk(text), DONE]) for text in ("one", "two")]
    path = Hedged(*streams)
    asking = asyncio.create_task(path.ask(chat_call(stream=True)))
    await path.upstreams[1].asked.wait()
    await asyncio.sleep(0)
    go.set()
    assert await asking == chunk("one") + DONE
    assert [stream.closed for stream in streams] == [1, 1]
    assert [told.split()[0] for told in path.hedges if told] == ["lost"]
    path.nothing_left()


async def test_where_the_first_call_fails_the_second_ones_answer_is_taken() -> None:
    first, second = Held(UNAVAILABLE), Held(OTHER_BODY)
    path = Hedged(first, second)
    asking = asyncio.create_task(path.ask())
    await second.asked.wait()
    first.go.set()
    await asyncio.sleep(0.01)
    second.go.set()
    assert await asking is OTHER_BODY
    assert path.hedges == ["won 0"], "what failed costs nothing"
    path.nothing_left()


@pytest.mark.parametrize("error", [UNAVAILABLE, UpstreamRejected(400, {"message": "too long for me"})])
async def test_where_the_second_call_fails_the_first_ones_answer_is_taken(error: UpstreamError) -> None:
    first = Held()
    path = Hedged(first, error)
    asking = asyncio.create_task(path.ask())
    await path.upstreams[1].asked.wait()
    await asyncio.sleep(0.01)
    first.go.set()
    assert await asking is GOOD_BODY
    assert (path.record.attempts, path.hedges) == (2, ["lost 0"])
    path.nothing_left()


async def test_a_request_that_the_first_finds_wrong_is_asked_no_longer() -> None:
    rejected = UpstreamRejected(400, {"message": "no"})
    first, second = Held(rejected), Held()
    path = Hedged(first, second)
    asking = asyncio.create_task(path.ask())
    await second.asked.wait()
    first.go.set()
    with pytest.raises(UpstreamRejected):
        await asking
    assert second.gone
    assert path.record.outcome is Outcome.CLIENT_ERROR
    path.nothing_left()


async def test_where_both_fail_a_third_place_is_asked() -> None:
    first, second = Held(UNAVAILABLE), Held(UNAVAILABLE)
    path = Hedged(first, second, OTHER_BODY)
    asking = asyncio.create_task(path.ask())
    await second.asked.wait()
    second.go.set()
    first.go.set()
    assert await asking is OTHER_BODY
    assert [(where, kind) for where, kind, _ in path.recorder.attempts][-1] == ("u2", "failover")
    assert path.record.attempts == 3
    path.nothing_left()


async def test_where_both_fail_the_first_ones_error_is_told() -> None:
    first, second = Held(UpstreamTimeout("first")), Held(UNAVAILABLE)
    path = Hedged(first, second)
    asking = asyncio.create_task(path.ask())
    await second.asked.wait()
    first.go.set()
    second.go.set()
    with pytest.raises(UpstreamTimeout, match="first"):
        await asking
    assert path.hedges == ["lost 0"]
    assert path.record.usage is None
    path.nothing_left()


@pytest.mark.parametrize("left", [0, 1])
async def test_the_retry_budget_says_whether_there_is_a_second_call(left: int) -> None:
    first = Held()
    path = Hedged(first, OTHER_BODY)
    while path.service.retries.take():
        pass
    for _ in range(12 * left):
        path.service.retries.called()
    asking = asyncio.create_task(path.ask())
    await first.asked.wait()
    if left:
        await path.upstreams[1].asked.wait()
    else:
        await asyncio.sleep(0.1)
    first.go.set()
    await asking
    assert len(path.upstreams[1].calls) == left


@pytest.mark.parametrize(
    "values", [{"hedge": False}, {"seen": HEDGE_LEAST_LATENCIES - 1}], ids=["off", "too little is known"]
)
async def test_without_the_wish_or_the_knowledge_no_task_is_made(values: Any) -> None:
    tasks: list[asyncio.Task[Any] | None] = []

    async def answer() -> Any:
        tasks.append(asyncio.current_task())
        return GOOD_BODY

    path = Hedged(answer, OTHER_BODY, **values)
    await path.ask()
    assert tasks == [asyncio.current_task()]


async def test_no_second_call_goes_where_nobody_may_be_asked() -> None:
    first = Held()
    path = Hedged(first, OTHER_BODY)
    path.places[1].condition.breaker.open_for(100)
    asking = asyncio.create_task(path.ask())
    await asyncio.sleep(0.1)
    first.go.set()
    assert await asking is GOOD_BODY
    assert path.upstreams[1].calls == []


async def test_time_limits_hold_for_both_and_a_slow_first_one_counts_as_failed() -> None:
    first, second = Held(), Held()
    path = Hedged(first, second)
    path.service.limits = Limits(timeout_seconds=0.2, max_retries=0)
    with pytest.raises(UpstreamTimeout):
        await path.ask()
    assert (first.gone, second.gone) == (True, True)
    assert [code for _, _, code in path.recorder.attempts] == ["api_timeout"] * 2
    assert path.record.usage is not None, "the upstreams may still be at it"
    path.nothing_left()


async def test_a_probe_that_is_given_up_lets_the_next_call_find_out() -> None:
    first = Held()
    path = Hedged(first, OTHER_BODY)
    breaker = path.places[0].condition.breaker
    breaker.open_for(0)
    assert await path.ask() is OTHER_BODY
    assert (breaker.state, breaker.admits) == (Circuit.HALF_OPEN, True)


# -- the caller leaves ---------------------------------------------------------------------------


async def left_while(path: Hedged, reached: Callable[[], Any], call: Call) -> None:
    """Ask, and be interrupted as by a caller who leaves."""

    async def leaving() -> None:
        exchange = path.exchange(call)
        async with exchange:
            with Deadline(path.service.sweep, until, lambda: CallerGone("left")):
                await exchange.open(call)

    until = asyncio.get_running_loop().time() + 1e6
    task = asyncio.create_task(leaving())
    await reached()
    for entry in list(path.service.sweep._entries):
        if isinstance(entry, Deadline) and entry._at == until:
            entry.due(until)
    with pytest.raises(CallerGone):
        await task
    await path.service.settled()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_caller_who_leaves_takes_both_calls_along(stream: bool) -> None:
    holds = [Held(), Held()]
    answers: list[Any] = [Stream([b": wait\n\n", hold]) for hold in holds] if stream else list(holds)
    path = Hedged(*answers)
    await left_while(path, holds[1].asked.wait, chat_call(stream=stream))
    assert [hold.gone for hold in holds] == [True, True]
    if stream:
        assert [answer.closed for answer in answers] == [1, 1]
    record = path.record
    assert (record.outcome, record.attempts, record.upstream) == (Outcome.CLIENT_DISCONNECTED, 2, "u0")
    assert record.usage is not None
    assert record.usage.source is UsageSource.ESTIMATED
    assert sorted(path.recorder.attempts) == [
        ("u0", "first", "client_disconnected"),
        ("u1", "hedge", "client_disconnected"),
    ]
    (told,) = path.hedges
    assert told is not None
    assert float(told.removeprefix("lost ")) == record.usage.input_tokens
    path.nothing_left()


async def test_a_caller_who_leaves_before_the_second_call_takes_the_first_along() -> None:
    first = Held()
    path = Hedged(first, OTHER_BODY)
    await left_while(path, first.asked.wait, chat_call())
    assert first.gone
    assert path.recorder.attempts == [("u0", "first", "client_disconnected")]
    assert path.hedges == []
    path.nothing_left()


async def test_a_caller_who_leaves_after_the_first_has_failed_is_booked_with_the_second() -> None:
    first, second = Held(UNAVAILABLE), Held()
    path = Hedged(first, second)

    async def reached() -> None:
        await second.asked.wait()
        first.go.set()
        await asyncio.sleep(0.01)

    await left_while(path, reached, chat_call())
    assert path.recorder.attempts == [
        ("u0", "first", "openai_service_error"),
        ("u1", "hedge", "client_disconnected"),
    ]
    assert (path.record.upstream, path.hedges) == ("u1", ["lost 0"])
    assert path.record.usage is not None
    path.nothing_left()


@pytest.mark.parametrize("seed", range(150))
async def test_whenever_the_caller_leaves_nothing_is_left(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random answers, and a cancellation after a random number of turns of the event loop, or two of them."""
    monkeypatch.setattr("service.routing.places.HEDGE_LEAST_SECONDS", 0.0)
    chance = random.Random(seed)
    streams: list[Stream] = []

    def answer() -> Any:
        turns, how = chance.randrange(8), chance.randrange(4)

        async def answers() -> Any:
            for _ in range(turns):
                await asyncio.sleep(0)
            if how == 0:
                return UNAVAILABLE
            if how == 1:
                await asyncio.Event().wait()
            stream = Stream([lambda: asyncio.sleep(0), chunk("Hello"), lambda: asyncio.sleep(0), DONE])
            streams.append(stream)
            return stream

        return answers

    path = Hedged(answer(), answer(), answer())
    for condition in (p.condition for p in path.places):
        condition._recent.extend([0.0] * HEDGE_LEAST_LATENCIES)
        condition._recent.extend([0.0] * 100)
    task = asyncio.create_task(path.ask(chat_call(stream=True)))
    for _ in range(chance.randrange(40)):
        await asyncio.sleep(0)
    for _ in range(chance.randrange(1, 3)):
        task.cancel()
        for _ in range(chance.randrange(3)):
            await asyncio.sleep(0)
    await asyncio.wait([task])
    await path.service.settled()
    assert task.cancelled() or task.exception() is None or isinstance(task.exception(), UpstreamError)
    for _ in range(5):
        await asyncio.sleep(0)
    assert [stream.closed for stream in streams] == [1] * len(streams)
    path.nothing_left()


def test_hedges_are_as_bounded_as_retries() -> None:
    budget = RetryBudget()
    given = 0
    for _ in range(1_000):
        budget.called()
        given += budget.take()
    assert given <= 110
