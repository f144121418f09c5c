"""What every store of shared state must do: in memory, on one Redis, behind Sentinels, on a cluster."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import NamedTuple

import pytest

from service.domain import Conversation, Message, Principal, Turn
from service.ports import Conversations
from service.stores.memory import MemoryConversations
from service.stores.redis.address import make_client
from service.stores.redis.link import Link
from service.stores.redis.stores import RedisConversations
from tests.contracts.conftest import FORMS
from tests.redis_servers import Servers

ANNA, BERT = Principal("anna", "team"), Principal("bert", "team")
ELSEWHERE = Principal("anna", "other team")
ODD = Principal("a:b{c}d é\n", "{}: team")
HOUR = 3600.0


class Stores(NamedTuple):
    """A set of stores on one state."""

    conversations: Callable[..., Conversations]


@pytest.fixture(params=("memory", *FORMS))
async def stores(request: pytest.FixtureRequest) -> AsyncIterator[Stores]:
    if request.param == "memory":
        yield in_memory()
        return
    servers: Servers = request.getfixturevalue(request.param)
    servers.restore()
    servers.flush()
    link = make_link(servers.url)
    await link.start()
    assert link.available
    yield on_redis(link)
    await link.close()


def in_memory() -> Stores:
    def conversations(
        *, ttl_seconds: float = HOUR, most: int = 10, keep_messages: int = 200
    ) -> Conversations:
        return MemoryConversations(ttl_seconds=ttl_seconds, most=most, keep_messages=keep_messages)

    return Stores(conversations)


def make_link(url: str, timeout_seconds: float = 2.0) -> Link:
    client = make_client(url, timeout_seconds=timeout_seconds, max_connections=20)
    return Link(client, prefix="weir:", timeout_seconds=timeout_seconds, max_connections=20)


def on_redis(link: Link) -> Stores:
    def conversations(
        *, ttl_seconds: float = HOUR, most: int = 10, keep_messages: int = 200
    ) -> Conversations:
        return RedisConversations(link, ttl_seconds=ttl_seconds, most=most, keep_messages=keep_messages)

    return Stores(conversations)


def turn(number: int = 0, *, tokens: int = 10, cost_usd: float | None = 0.5) -> Turn:
    question, answer = Message("user", f"question {number}", 1.5), Message("assistant", f"answer {number}")
    return Turn(messages=(question, answer), tokens=tokens, cost_usd=cost_usd)


def contents(conversation: Conversation | None) -> list[str]:
    assert conversation is not None
    return [message.content for message in conversation.messages]


# -- conversations -------------------------------------------------------------------------------


async def test_a_conversation_is_what_was_appended(stores: Stores) -> None:
    kept = stores.conversations()
    assert await kept.load(ANNA, "c") is None
    assert await kept.append(ANNA, "c", turn(1), "Be brief.", begin=True)
    assert await kept.append(ANNA, "c", turn(2, tokens=5, cost_usd=None), None, begin=False)
    found = await kept.load(ANNA, "c")
    assert found is not None
    assert found.messages[0] == Message("user", "question 1", 1.5)
    assert contents(found) == ["question 1", "answer 1", "question 2", "answer 2"]
    assert found.system_prompt == "Be brief."
    assert (found.total_messages, found.total_tokens, found.unpriced_turns) == (4, 15, 1)
    assert found.total_cost_usd == pytest.approx(0.5)
    assert 0 < found.created_at <= found.updated_at


async def test_a_new_system_prompt_takes_the_place_of_the_old_one(stores: Stores) -> None:
    kept = stores.conversations()
    await kept.append(ANNA, "c", turn(1), "Be brief.", begin=True)
    await kept.append(ANNA, "c", turn(2), "Be long. é", begin=False)
    found = await kept.load(ANNA, "c")
    assert found is not None
    assert found.system_prompt == "Be long. é"


async def test_the_latest_messages_are_kept_and_the_totals_go_on(stores: Stores) -> None:
    kept = stores.conversations(keep_messages=4)
    for number in range(5):
        await kept.append(ANNA, "c", turn(number), None, begin=True)
    found = await kept.load(ANNA, "c")
    assert contents(found) == ["question 3", "answer 3", "question 4", "answer 4"]
    assert found is not None
    assert (found.total_messages, found.total_tokens) == (10, 50)


async def test_turns_at_the_same_time_never_mix_and_none_is_lost(stores: Stores) -> None:
    kept = stores.conversations()
    await asyncio.gather(*(kept.append(ANNA, "c", turn(n), None, begin=True) for n in range(50)))
    said = contents(await kept.load(ANNA, "c"))
    assert sorted(said[::2]) == sorted(f"question {n}" for n in range(50))
    for question, answer in zip(said[::2], said[1::2], strict=True):
        assert question.removeprefix("question ") == answer.removeprefix("answer ")


@pytest.mark.parametrize("stranger", [BERT, ELSEWHERE, ODD], ids=["key", "tenant", "odd"])
async def test_anothers_conversation_is_as_unknown_as_none(stores: Stores, stranger: Principal) -> None:
    kept = stores.conversations()
    await kept.append(ANNA, "c", turn(1), None, begin=True)
    assert await kept.load(stranger, "c") is None
    assert not await kept.append(stranger, "c", turn(2), None, begin=False)
    assert not await kept.delete(stranger, "c")
    assert await kept.list(stranger, 10) == []
    await kept.append(stranger, "c", turn(3), None, begin=True)
    assert contents(await kept.load(ANNA, "c")) == ["question 1", "answer 1"]
    assert contents(await kept.load(stranger, "c")) == ["question 3", "answer 3"]


async def test_what_was_deleted_stays_deleted(stores: Stores) -> None:
    kept = stores.conversations()
    await kept.append(ANNA, "c", turn(1), None, begin=True)
    assert await kept.delete(ANNA, "c")
    assert not await kept.delete(ANNA, "c")
    assert not await kept.append(ANNA, "c", turn(2), None, begin=False)
    assert await kept.load(ANNA, "c") is None
    assert await kept.list(ANNA, 10) == []


async def test_the_list_has_the_latest_first_and_no_more_than_wanted(stores: Stores) -> None:
    kept = stores.conversations()
    for name in "abc":
        await kept.append(ANNA, name, turn(), f"I am {name}.", begin=True)
        await until_the_clock_ticks()
    await kept.append(ANNA, "a", turn(9), None, begin=False)
    found = await kept.list(ANNA, 2)
    assert [c.id for c in found] == ["a", "c"]
    assert (found[0].total_messages, found[0].messages) == (4, ())
    assert found[1].system_prompt == "I am c."


async def test_above_the_most_the_longest_unused_one_goes(stores: Stores) -> None:
    kept = stores.conversations(most=2)
    for name in "abc":
        await kept.append(ANNA, name, turn(), None, begin=True)
        await until_the_clock_ticks()
    assert await kept.load(ANNA, "a") is None
    assert [c.id for c in await kept.list(ANNA, 10)] == ["c", "b"]
    assert not await kept.append(ANNA, "a", turn(), None, begin=False)


async def test_a_conversation_ends_with_its_time_to_live(stores: Stores) -> None:
    kept = stores.conversations(ttl_seconds=0.3)
    await kept.append(ANNA, "c", turn(), None, begin=True)
    async with asyncio.timeout(10):
        while await kept.load(ANNA, "c") is not None:
            await asyncio.sleep(0.01)
    assert await kept.list(ANNA, 10) == []


async def until_the_clock_ticks() -> None:
    """Times are kept in milliseconds: the next thing is later by one at least."""
    loop = asyncio.get_running_loop()
    until = loop.time() + 0.002
    while loop.time() < until:
        await asyncio.sleep(0)
