"""The stores in memory: whole turns, owners kept apart, and a bound on everything."""

from __future__ import annotations

import asyncio
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.domain import Conversation, Message, Operation, Principal, RequestRecord, Turn
from service.errors import RateLimited
from service.stores.memory import MemoryConversations, MemoryLedger, MemoryLimiter
from tests.unit.ports import Clock

ANNA, BERT = Principal("anna", "team"), Principal("bert", "team")


def turn(number: int = 0, *, tokens: int = 10, cost_usd: float | None = 0.5) -> Turn:
    question, answer = Message("user", f"question {number}"), Message("assistant", f"answer {number}")
    return Turn(messages=(question, answer), tokens=tokens, cost_usd=cost_usd)


def store(
    clock: Clock | None = None, *, ttl_seconds: float = 100.0, most: int = 10, keep_messages: int = 200
) -> MemoryConversations:
    return MemoryConversations(
        ttl_seconds=ttl_seconds, most=most, keep_messages=keep_messages, clock=clock or Clock()
    )


async def loaded(kept: MemoryConversations, name: str, owner: Principal = ANNA) -> Conversation:
    found = await kept.load(owner, name)
    assert found is not None
    return found


# -- conversations -------------------------------------------------------------------------------


async def test_a_turn_is_added_whole() -> None:
    clock = Clock(50.0)
    kept = store(clock)
    await kept.append(ANNA, "c", turn(1), "Be brief.", begin=True)
    clock.now = 60.0
    await kept.append(ANNA, "c", turn(2), "Be brief.", begin=True)
    found = await loaded(kept, "c")
    assert [m.content for m in found.messages] == ["question 1", "answer 1", "question 2", "answer 2"]
    assert (found.created_at, found.updated_at, found.system_prompt) == (50.0, 60.0, "Be brief.")


async def test_turns_at_the_same_time_never_mix() -> None:
    kept = store()
    await asyncio.gather(*(kept.append(ANNA, "c", turn(n), None, begin=True) for n in range(50)))
    contents = [m.content for m in (await loaded(kept, "c")).messages]
    for question, answer in zip(contents[::2], contents[1::2], strict=True):
        assert question.removeprefix("question ") == answer.removeprefix("answer ")


async def test_what_was_loaded_does_not_change_any_more() -> None:
    kept = store()
    await kept.append(ANNA, "c", turn(1), None, begin=True)
    before = await loaded(kept, "c")
    await kept.append(ANNA, "c", turn(2), None, begin=True)
    assert len(before.messages) == 2


async def test_totals_count_over_the_whole_life_and_unpriced_turns_apart() -> None:
    kept = store(keep_messages=4)
    for number in range(5):
        await kept.append(ANNA, "c", turn(number, cost_usd=None if number == 2 else 0.25), None, begin=True)
    found = await loaded(kept, "c")
    assert [m.content for m in found.messages] == ["question 3", "answer 3", "question 4", "answer 4"]
    assert (found.total_messages, found.total_tokens, found.unpriced_turns) == (10, 50, 1)
    assert found.total_cost_usd == pytest.approx(1.0)


async def test_anothers_conversation_is_as_unknown_as_none() -> None:
    kept = store()
    await kept.append(ANNA, "c", turn(), None, begin=True)
    assert await kept.load(BERT, "c") is None
    assert await kept.load(Principal("anna", "other team"), "c") is None
    assert not await kept.delete(BERT, "c")
    assert await kept.list(BERT, 10) == []
    await kept.append(BERT, "c", turn(7), None, begin=True)
    assert (await loaded(kept, "c")).total_messages == 2, "the same id of two owners is two conversations"
    assert (await loaded(kept, "c", BERT)).messages[0].content == "question 7"


async def test_a_conversation_is_forgotten_after_its_time_without_a_turn() -> None:
    clock = Clock()
    kept = store(clock, ttl_seconds=100)
    await kept.append(ANNA, "c", turn(), None, begin=True)
    clock.now += 100
    assert await kept.load(ANNA, "c") is not None, "to the very end"
    clock.now += 0.001
    assert await kept.load(ANNA, "c") is None
    assert len(kept) == 0


async def test_each_turn_gives_a_conversation_its_time_again() -> None:
    clock = Clock()
    kept = store(clock, ttl_seconds=100)
    await kept.append(ANNA, "old", turn(), None, begin=True)
    await kept.append(ANNA, "used", turn(), None, begin=True)
    for _ in range(5):
        clock.now += 60
        await kept.append(ANNA, "used", turn(), None, begin=True)
    assert await kept.load(ANNA, "old") is None
    assert (await loaded(kept, "used")).total_messages == 12


async def test_an_expired_conversation_begins_anew() -> None:
    clock = Clock()
    kept = store(clock, ttl_seconds=100)
    await kept.append(ANNA, "c", turn(), None, begin=True)
    clock.now += 101
    await kept.append(ANNA, "c", turn(), None, begin=True)
    found = await loaded(kept, "c")
    assert (found.total_messages, found.created_at) == (2, clock.now)


async def test_above_the_most_the_longest_unused_goes_first() -> None:
    kept = store(most=3)
    for name in ("a", "b", "c", "a", "d"):
        await kept.append(ANNA, name, turn(), None, begin=True)
    assert len(kept) == 3
    assert await kept.load(ANNA, "b") is None
    assert [c.id for c in await kept.list(ANNA, 10)] == ["d", "a", "c"]


async def test_the_newest_are_listed_first_and_no_more_than_asked_for() -> None:
    kept = store()
    for name in "abcd":
        await kept.append(ANNA, name, turn(), None, begin=True)
    assert [c.id for c in await kept.list(ANNA, 2)] == ["d", "c"]


async def test_a_deleted_conversation_is_gone_once() -> None:
    kept = store()
    await kept.append(ANNA, "c", turn(), None, begin=True)
    assert await kept.delete(ANNA, "c")
    assert not await kept.delete(ANNA, "c")
    assert await kept.load(ANNA, "c") is None


# -- the limiter ---------------------------------------------------------------------------------


def refused(limiter: MemoryLimiter, who: Principal = ANNA) -> float | None:
    """Seconds to wait, or None if one request was admitted. The memory limiter never waits itself."""
    try:
        limiter.admit(who).send(None)
    except RateLimited as error:
        return error.retry_after_seconds
    except StopIteration:
        return None
    raise AssertionError("the limiter waited")


limits = st.tuples(st.integers(1, 20), st.floats(0.5, 600))
steps = st.lists(st.floats(0, 2), min_size=1, max_size=60)


@given(limits, steps)
def test_no_stretch_of_time_admits_more_than_a_full_share_and_its_refill(
    limit: tuple[int, float], waits: list[float]
) -> None:
    requests, window = limit
    clock = Clock()
    limiter = MemoryLimiter(requests, window, clock=clock)
    admitted: list[float] = []
    for wait in waits:
        clock.now += wait * window / requests
        if refused(limiter) is None:
            admitted.append(clock.now)
    for first, start in enumerate(admitted):
        for count, end in enumerate(admitted[first:], 1):
            assert count <= requests + math.floor((end - start) * requests / window + 1e-3)


@given(limits, steps)
def test_the_limiter_is_a_bucket_that_fills_evenly(limit: tuple[int, float], waits: list[float]) -> None:
    requests, window = limit
    clock = Clock(0.0)
    limiter = MemoryLimiter(requests, window, clock=clock)
    bucket = float(requests)
    for wait in waits:
        clock.now += wait * window / requests
        bucket = min(bucket + wait, float(requests))
        waiting = refused(limiter)
        if waiting is None:
            assert bucket >= 1 - 1e-3
            bucket -= 1
        else:
            assert bucket < 1 + 1e-3
            assert waiting == pytest.approx((1 - bucket) * window / requests, rel=1e-3, abs=1e-3 * window)


@given(limits)
def test_a_whole_share_may_be_used_at_once_and_comes_back_one_by_one(limit: tuple[int, float]) -> None:
    requests, window = limit
    clock = Clock()
    limiter = MemoryLimiter(requests, window, clock=clock)
    assert [refused(limiter) for _ in range(requests)] == [None] * requests
    for _ in range(3):
        waiting = refused(limiter)
        assert waiting is not None
        assert waiting == pytest.approx(window / requests, rel=1e-3)
        clock.now += waiting
        assert refused(limiter) is None, "after exactly the time that it named"
        assert refused(limiter) is not None


@given(limits, st.floats(0.01, 0.99))
def test_before_the_named_time_nobody_is_admitted_and_asking_costs_nothing(
    limit: tuple[int, float], part: float
) -> None:
    requests, window = limit
    clock = Clock()
    limiter = MemoryLimiter(requests, window, clock=clock)
    for _ in range(requests):
        assert refused(limiter) is None
    waiting = refused(limiter)
    assert waiting is not None
    clock.now += waiting * part
    left = refused(limiter)
    assert left == pytest.approx(waiting * (1 - part), rel=1e-2, abs=1e-9)


def test_principals_have_shares_of_their_own() -> None:
    limiter = MemoryLimiter(1, 60, clock=Clock())
    assert refused(limiter, ANNA) is None
    assert refused(limiter, BERT) is None
    assert refused(limiter, ANNA) is not None


def test_without_a_limit_everybody_is_admitted() -> None:
    limiter = MemoryLimiter(None, 60, clock=Clock())
    assert [refused(limiter) for _ in range(1_000)] == [None] * 1_000


# -- the ledger ----------------------------------------------------------------------------------


async def test_the_ledger_keeps_the_latest_records() -> None:
    ledger = MemoryLedger(most=3)
    for number in range(10):
        await ledger.enter(RequestRecord(str(number), "r", "/v1/x", Operation.CHAT))
    assert [record.id for record in ledger.records] == ["7", "8", "9"]
