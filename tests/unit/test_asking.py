"""What becomes of requests that wait for the same places, and of what an ended one leaves behind."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from typing import Any

import pytest

from service.asking import Limits
from service.chat import Exchange
from service.errors import UpstreamRateLimited, UpstreamTimeout, UpstreamUnavailable, WeirError
from service.routing.breaker import Breaker
from service.routing.retries import SAVED
from tests.unit.ports import GOOD_BODY, Clock, Stream, chat_call
from tests.unit.test_hedging import Hedged

TIME = 7.0


class Pause:
    """A pause that is over when the test says so, by a clock that has moved as far."""

    def __init__(self, callers: int) -> None:
        self.clock = Clock()
        self.all_wait = asyncio.Event()
        self._callers = callers
        self._over = asyncio.Event()

    async def sleep(self, _seconds: float) -> None:
        self._callers -= 1
        if not self._callers:
            self.all_wait.set()
        await self._over.wait()

    def end(self) -> None:
        self.clock.now += TIME
        self._over.set()


def limited() -> UpstreamRateLimited:
    return UpstreamRateLimited("slow down", retry_after_seconds=TIME, upstream_request_id="req-limited")


def waiting(monkeypatch: pytest.MonkeyPatch, callers: int, *answers: Any) -> tuple[Hedged, Pause]:
    path, until = Hedged(*answers, hedge=False), Pause(callers)
    path.service.limits = Limits(timeout_seconds=60, idle_seconds=60, max_retries=2)
    for place in path.places:
        place.condition.breaker = Breaker(min_calls=callers, clock=until.clock)
    monkeypatch.setattr("service.asking.asyncio.sleep", until.sleep)
    return path, until


def repeats_left(path: Hedged) -> int:
    return sum(1 for _ in iter(path.service.retries.take, False))


async def test_who_waits_for_a_place_that_another_one_gets_is_told_what_it_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    callers = 8
    together = [asyncio.Barrier(callers), asyncio.Barrier(callers)]
    well = asyncio.Event()

    def at(number: int) -> Any:
        calls = 0

        async def answer() -> Any:
            nonlocal calls
            calls += 1
            if calls > callers:
                await well.wait()
                return GOOD_BODY
            await together[number].wait()
            return limited()

        return answer

    path, until = waiting(monkeypatch, callers, at(0), at(1))
    asked = [asyncio.create_task(path.ask()) for _ in range(callers)]
    await until.all_wait.wait()
    until.end()
    ended = asyncio.as_completed(asked)
    for told in [next(ended) for _ in range(callers - 2)]:
        with pytest.raises(UpstreamRateLimited, match="slow down") as caught:
            await told
        assert caught.value.upstream_request_id == "req-limited"
    well.set()
    assert [await answer for answer in ended] == [GOOD_BODY] * 2
    assert repeats_left(path) == SAVED - 2, "the others made none"
    assert {record.outcome.value for record in path.kept.records} == {"rate_limited", "success"}
    path.nothing_left()


async def test_who_finds_the_only_place_closed_after_its_pause_is_told_what_it_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, until = waiting(monkeypatch, 1, UpstreamUnavailable("busy", retry_after_seconds=TIME))
    asked = asyncio.create_task(path.ask())
    await until.all_wait.wait()
    path.places[0].condition.breaker.open_for(2 * TIME)
    until.end()
    with pytest.raises(UpstreamUnavailable, match="busy"):
        await asked
    assert repeats_left(path) == SAVED


async def test_a_repeat_that_its_caller_did_not_wait_for_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    path, until = waiting(monkeypatch, 1, limited())
    asked = asyncio.create_task(path.ask())
    await until.all_wait.wait()
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    await path.service.settled()
    assert repeats_left(path) == SAVED
    path.nothing_left()


@pytest.mark.parametrize("stream", [False, True])
async def test_who_is_late_after_its_head_has_told_its_request_id(stream: bool) -> None:
    async def never() -> None:
        await asyncio.Event().wait()

    answer = Stream([b": wait\n\n", never]) if stream else never
    path = Hedged(answer, hedge=False)
    path.service.limits = Limits(timeout_seconds=0.01)
    with pytest.raises(UpstreamTimeout) as caught:
        await path.ask(chat_call(stream=stream))
    assert caught.value.upstream_request_id == path.record.upstream_request_id
    assert path.record.upstream_request_id == ("req-stream" if stream else None)
    if isinstance(answer, Stream):
        assert answer.closed == 1


# -- by counts of references alone: a body must not wait for the garbage collector -----------------


@pytest.fixture
def uncollected() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def exchanges() -> int:
    return sum(1 for o in gc.get_objects() if type(o) is Exchange)


@pytest.mark.parametrize("how", ["left", "taken", "late"])
async def test_of_a_request_that_ends_in_a_pause_or_late_nothing_is_kept(
    how: str, monkeypatch: pytest.MonkeyPatch, uncollected: None
) -> None:
    async def ask(path: Hedged) -> str:
        try:
            await path.ask(chat_call(stream=True))
        except (WeirError, asyncio.CancelledError) as error:
            return type(error).__name__
        return ""

    async def never() -> None:
        await asyncio.Event().wait()

    async def answer() -> Any:
        if how == "late":
            return Stream([never])
        raise limited()

    before = exchanges()
    path, until = waiting(monkeypatch, 1, answer)
    if how == "late":
        path.service.limits = Limits(timeout_seconds=0.01)
    asked = asyncio.create_task(ask(path))
    if how != "late":
        await until.all_wait.wait()
        assert exchanges() == before + 1
        if how == "left":
            asked.cancel()
        else:
            path.places[0].condition.breaker.open_for(2 * TIME)
            until.end()
    told = {"left": "CancelledError", "taken": "UpstreamRateLimited", "late": "UpstreamTimeout"}
    assert await asked == told[how]
    await path.service.settled()
    assert exchanges() == before
