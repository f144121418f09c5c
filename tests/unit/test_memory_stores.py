"""The stores in memory: whole turns, owners kept apart, and a bound on everything."""

from __future__ import annotations

import asyncio

import pytest

from service.domain import Conversation, Message, Principal, Turn
from service.stores.memory import MemoryConversations
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
