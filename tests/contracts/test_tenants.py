"""A tenant's conversations as a whole: in memory, on one Redis, behind Sentinels, on a cluster."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from service.domain import Conversation, Message, Principal, Turn
from service.errors import StateUnavailable
from service.ports import Conversations
from service.stores.memory import MemoryConversations
from service.stores.redis import answers as answers_module
from service.stores.redis import stores as stores_module
from service.stores.redis.answers import RedisAnswers
from service.stores.redis.keys import Keys
from service.stores.redis.link import Link
from service.stores.redis.stores import RedisConversations
from tests.contracts.conftest import FORMS
from tests.contracts.test_stores import make_link
from tests.redis_servers import Servers, Single

ANNA, BERT = Principal("anna", "team"), Principal("b:e{r}t é", "team")
ELSEWHERE = Principal("anna", "other team")
Make = Callable[..., Conversations]


@pytest.fixture(params=("memory", *FORMS))
async def make(request: pytest.FixtureRequest) -> AsyncIterator[Make]:
    if request.param == "memory":
        yield lambda ttl_seconds=3600.0: MemoryConversations(ttl_seconds=ttl_seconds, most=1000)
        return
    link = make_link(emptied(request, request.param).url)
    await link.start()
    yield lambda ttl_seconds=3600.0: RedisConversations(link, ttl_seconds=ttl_seconds, most=1000)
    await link.close()


@pytest.fixture(params=FORMS)
async def link(request: pytest.FixtureRequest) -> AsyncIterator[Link]:
    link = make_link(emptied(request, request.param).url)
    await link.start()
    yield link
    await link.close()


def emptied(request: pytest.FixtureRequest, form: str) -> Servers:
    servers: Servers = request.getfixturevalue(form)
    servers.restore()
    servers.flush()
    return servers


def turn(text: str = "hello") -> Turn:
    return Turn((Message("user", text, 1.5), Message("assistant", f"{text}!", 2.5)), tokens=10, cost_usd=0.5)


async def exported(kept: Conversations, tenant: str) -> list[Conversation]:
    return [conversation async for conversation in kept.of_tenant(tenant)]


def names(found: list[Conversation]) -> list[tuple[str, str]]:
    return sorted((conversation.principal.name, conversation.id) for conversation in found)


async def test_an_export_has_all_of_each_conversation_of_a_tenant(make: Make) -> None:
    kept = make()
    await kept.append(ANNA, "a1", turn("one"), "Be brief.", begin=True)
    await kept.append(ANNA, "a1", turn("two"), None, begin=False)
    await kept.append(ANNA, "a2", turn(), None, begin=True)
    await kept.append(BERT, "b1", turn(), None, begin=True)
    await kept.append(ELSEWHERE, "x", turn(), None, begin=True)
    found = await exported(kept, "team")
    assert names(found) == [("anna", "a1"), ("anna", "a2"), (BERT.name, "b1")]
    (one,) = [conversation for conversation in found if conversation.id == "a1"]
    assert one == await kept.load(ANNA, "a1")
    assert [message.content for message in one.messages] == ["one", "one!", "two", "two!"]
    assert names(await exported(kept, "other team")) == [("anna", "x")]
    assert await exported(kept, "nobody") == []


async def test_an_export_goes_over_its_bounds_batch_by_batch(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores_module, "MOST_TOGETHER", 7)
    monkeypatch.setattr(stores_module, "MOST_BYTES", 400)
    kept = make()
    for number in range(40):
        await kept.append(ANNA, f"c{number:02d}", turn("x" * (number * 20)), None, begin=True)
    found = await exported(kept, "team")
    assert [conversation.id for conversation in found] == [f"c{number:02d}" for number in range(40)]
    assert [len(c.messages[0].content) for c in found] == [number * 20 for number in range(40)]


async def test_what_is_deleted_during_an_export_does_not_end_it(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores_module, "MOST_TOGETHER", 2)
    kept = make()
    for name in "abcdef":
        await kept.append(ANNA, name, turn(), None, begin=True)
    seen = []
    async for conversation in kept.of_tenant("team"):
        seen.append(conversation.id)
        if conversation.id == "b":
            assert await kept.delete(ANNA, "d")
    assert seen == list("abcef")


async def test_erasing_takes_all_of_a_tenant_and_nothing_of_another(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores_module, "MOST_TOGETHER", 3)
    kept = make()
    for number in range(8):
        await kept.append(ANNA, f"a{number}", turn(), "Be brief.", begin=True)
    await kept.append(BERT, "b", turn(), None, begin=True)
    await kept.append(ELSEWHERE, "x", turn(), None, begin=True)
    assert await kept.erase("team") == 9
    assert await kept.erase("team") == 0
    assert await exported(kept, "team") == []
    for owner, name in ((ANNA, "a0"), (ANNA, "a7"), (BERT, "b")):
        assert await kept.load(owner, name) is None
        assert await kept.list(owner, 10) == []
        assert not await kept.append(owner, name, turn(), None, begin=False)
    assert names(await exported(kept, "other team")) == [("anna", "x")]


async def test_after_erasing_a_tenant_begins_anew(make: Make) -> None:
    kept = make()
    await kept.append(ANNA, "a", turn(), None, begin=True)
    await kept.erase("team")
    await kept.append(ANNA, "b", turn(), None, begin=True)
    assert names(await exported(kept, "team")) == [("anna", "b")]


async def test_a_conversation_that_has_ended_is_not_exported(make: Make) -> None:
    kept = make(ttl_seconds=0.3)
    await kept.append(ANNA, "a", turn(), None, begin=True)
    async with asyncio.timeout(10):
        while await exported(kept, "team"):
            await asyncio.sleep(0.01)
    assert await kept.erase("team") == 0


async def test_rights_of_a_key_do_not_make_it_another_owner(make: Make) -> None:
    kept = make()
    await kept.append(ANNA, "a", turn(), None, begin=True)
    promoted = Principal("anna", "team", admin=True)
    assert await kept.load(promoted, "a") is not None
    assert [c.id for c in await kept.list(promoted, 10)] == ["a"]
    assert await kept.delete(promoted, "a")


# -- on Redis alone ------------------------------------------------------------------------------


async def test_erasing_leaves_no_key_of_the_conversations(link: Link) -> None:
    kept = RedisConversations(link, ttl_seconds=3600, most=1000)
    for owner, name in ((ANNA, "a"), (ANNA, "b"), (BERT, "c"), (ELSEWHERE, "x")):
        await kept.append(owner, name, turn(), None, begin=True)
    await kept.erase("team")
    left = {name.decode() async for name in link.client.scan_iter("weir:{team}:*")}
    assert {name.split(":")[2] for name in left} <= {"turn"}, "which holds no text and ends after 15 minutes"
    assert [name async for name in link.client.scan_iter("weir:{other%20team}:*")]


async def test_the_index_of_owners_lives_as_long_as_the_longest_conversation(link: Link) -> None:
    keys = Keys(link.prefix)
    await RedisConversations(link, ttl_seconds=1000, most=10).append(ANNA, "a", turn(), None, begin=True)
    await RedisConversations(link, ttl_seconds=10, most=10).append(BERT, "b", turn(), None, begin=True)
    assert await link.client.pttl(keys.owners("team")) > 900_000
    await RedisConversations(link, ttl_seconds=2000, most=10).append(BERT, "b", turn(), None, begin=True)
    assert await link.client.pttl(keys.owners("team")) > 1_900_000


async def test_a_tenants_cached_answers_go_and_no_other_key(
    link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers_module, "LOOKED_AT", 10)
    mine = [f"weir:{{team}}:cache:{number}" for number in range(123)]
    others = ["weir:{team}:ledger", "weir:{other%20team}:cache:1", "weir:{tea}:cache:1", "{team}:cache:1"]
    for name in (*mine, *others):
        await link.client.set(name, b"x")
    assert await RedisAnswers(link).erase("team") == 123
    assert await link.client.exists(*mine) == 0
    for name in others:
        assert await link.client.get(name) == b"x"
    assert await RedisAnswers(link).erase("team") == 0


async def test_without_redis_nothing_is_said_to_be_erased(redis_single: Single) -> None:
    link = make_link("redis://127.0.0.1:1", timeout_seconds=0.2)
    await link.start()
    with pytest.raises(StateUnavailable):
        await RedisConversations(link, ttl_seconds=10, most=10).erase("team")
    with pytest.raises(StateUnavailable):
        await exported(RedisConversations(link, ttl_seconds=10, most=10), "team")
    with pytest.raises(StateUnavailable):
        await RedisAnswers(link).erase("team")
    await link.close()
