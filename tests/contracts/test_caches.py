"""What every cache must do, in memory and on Redis in its three forms; and one leader among several pods."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.caching.flights import Ending, Flights, Lock, Role
from service.ports import Cache
from service.stores.memory_cache import PLACE_BYTES, MemoryCache
from service.stores.redis.cache import LOCK_MS, MARK_MS, RedisCache, RedisLocks, TwoLevelCache
from service.stores.redis.link import Link, Script
from tests.contracts.conftest import FORMS
from tests.contracts.test_stores import make_link
from tests.redis_servers import Servers, Single

ODD = "{}: a*é\n"
MOST = 1024 * 1024
PEEK = Script("return {redis.call('GET', KEYS[1]), redis.call('PTTL', KEYS[1])}")
BREAK = Script("redis.call('DEL', KEYS[1]) return redis.call('RPUSH', KEYS[1], 'a list')")
DELETE = Script("return redis.call('DEL', KEYS[1])")


@pytest.fixture
async def link(redis_servers: Servers) -> AsyncIterator[Link]:
    async with contextlib.AsyncExitStack() as ended:
        yield await linked(ended, redis_servers.url)


async def linked(ended: contextlib.AsyncExitStack, url: str) -> Link:
    made = make_link(url)
    ended.push_async_callback(made.close)
    await made.start()
    assert made.available
    return made


@pytest.fixture(params=("memory", *(f"{level} {form}" for form in FORMS for level in ("far", "both"))))
async def cache(request: pytest.FixtureRequest) -> AsyncIterator[Cache]:
    if request.param == "memory":
        yield MemoryCache(MOST)
        return
    level, form = request.param.split()
    servers: Servers = request.getfixturevalue(form)
    servers.restore()
    servers.flush()
    async with contextlib.AsyncExitStack() as ended:
        far = RedisCache(await linked(ended, servers.url))
        yield far if level == "far" else TwoLevelCache(MemoryCache(MOST), far)


async def until_gone(cache: Cache, tenant: str, name: str) -> None:
    async with asyncio.timeout(10):
        while await cache.get(tenant, name) is not None:
            await asyncio.sleep(0.002)


# -- every cache ---------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [b"", b"\x00\xff\r\n", b"x" * 100_000], ids=len)
async def test_a_value_comes_back_as_it_was(cache: Cache, value: bytes) -> None:
    assert await cache.get("team", "name") is None
    await cache.put("team", "name", value, 60)
    assert await cache.get("team", "name") == value
    await cache.put("team", "name", b"another", 60)
    assert await cache.get("team", "name") == b"another"


@pytest.mark.parametrize(
    "place", [("other", "name"), ("team", "other"), (ODD, "name"), ("", "name")], ids=str
)
async def test_what_is_kept_is_known_by_its_tenant_and_name_alone(
    cache: Cache, place: tuple[str, str]
) -> None:
    await cache.put("team", "name", b"theirs", 60)
    assert await cache.get(*place) is None
    await cache.put(*place, b"ours", 60)
    assert await cache.get(*place) == b"ours"
    assert await cache.get("team", "name") == b"theirs"


async def test_a_value_ends_after_its_time(cache: Cache) -> None:
    await cache.put("team", "short", b"x", 0.05)
    await cache.put("team", "long", b"x", 60)
    await until_gone(cache, "team", "short")
    assert await cache.get("team", "long") == b"x"


@pytest.mark.parametrize("ttl_seconds", [0, -1, 0.0001])
async def test_no_time_at_all_keeps_nothing(cache: Cache, ttl_seconds: float) -> None:
    await cache.put("team", "name", b"x", ttl_seconds)
    await until_gone(cache, "team", "name")


# -- in memory -----------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.none() | st.integers(0, 150)), max_size=60))
def test_the_memory_is_bounded_and_the_longest_unused_go_first(steps: list[tuple[str, int | None]]) -> None:
    """`None` gets, a number puts so many bytes: against a list in the order of use."""

    async def play() -> None:
        room = 3 * (PLACE_BYTES + 100)
        cache = MemoryCache(room)
        used: list[tuple[str, bytes]] = []
        for name, size in steps:
            known = dict(used)
            if size is None:
                assert await cache.get("", name) == known.get(name)
                if name in known:
                    used = [(n, v) for n, v in used if n != name] + [(name, known[name])]
            else:
                await cache.put("", name, bytes(size), 60)
                used = [(n, v) for n, v in used if n != name] + [(name, bytes(size))]
                while sum(len(v) + 1 + PLACE_BYTES for _, v in used) > room:
                    used.pop(0)
            assert cache.bytes == sum(len(v) + 1 + PLACE_BYTES for _, v in used) <= room
            assert len(cache) == len(used)

    asyncio.run(play())


async def test_what_is_larger_than_all_the_room_takes_nothing_away() -> None:
    cache = MemoryCache(1000)
    await cache.put("team", "small", b"x", 60)
    await cache.put("team", "large", b"x" * 1000, 60)
    assert await cache.get("team", "large") is None
    assert await cache.get("team", "small") == b"x"
    await cache.put("team", "small", b"x" * 1000, 60)
    assert await cache.get("team", "small") is None
    assert cache.bytes == 0


# -- two levels ----------------------------------------------------------------------------------


async def test_two_pods_have_one_cache(link: Link) -> None:
    pods = [TwoLevelCache(MemoryCache(MOST), RedisCache(link)) for _ in range(2)]
    await pods[0].put("team", "name", b"x", 60)
    assert await pods[1].get("team", "name") == b"x"


async def test_a_copy_lives_no_longer_than_what_it_is_of(link: Link) -> None:
    now = 0.0
    near, far = MemoryCache(MOST, lambda: now), RedisCache(link)
    await far.put("team", "name", b"x", 60)
    assert await TwoLevelCache(near, far).get("team", "name") == b"x"
    now = 50.0
    assert await near.get("team", "name") == b"x"
    now = 60.0
    assert await near.get("team", "name") is None


async def test_redis_is_not_asked_for_what_is_near(redis_single: Single) -> None:
    async with contextlib.AsyncExitStack() as ended:
        link = await linked(ended, redis_single.url)
        cache = TwoLevelCache(MemoryCache(MOST), RedisCache(link))
        await cache.put("team", "name", b"x", 60)
        await link.run(DELETE, ["weir:{team}:cache:name"], [])
        assert await cache.get("team", "name") == b"x"


async def test_keys_are_as_the_documentation_says(link: Link) -> None:
    await RedisCache(link).put("a team", "name", b"x", 60)
    value, left = await link.run(PEEK, ["weir:{a%20team}:cache:name"], [])
    assert (value, 0 < left <= 60_000) == (b"x", True)
    await RedisLocks(link).take("a team", "name", "token")
    value, left = await link.run(PEEK, ["weir:{a%20team}:flight:name"], [])
    assert (value, 0 < left <= LOCK_MS) == (b"token", True)


@pytest.mark.parametrize("how", ["kill", "freeze"])
async def test_while_redis_is_away_only_what_is_near_is_there(redis_single: Single, how: str) -> None:
    link = make_link(redis_single.url, 0.05)
    await link.start()
    try:
        cache = TwoLevelCache(MemoryCache(MOST), RedisCache(link))
        await cache.put("team", "near", b"x", 60)
        await RedisCache(link).put("team", "far", b"x", 60)
        getattr(redis_single, how)()
        assert await cache.get("team", "near") == b"x"
        assert await cache.get("team", "far") is None
        await cache.put("team", "new", b"x", 60)
        assert await cache.get("team", "new") == b"x"
        redis_single.restore()
        async with asyncio.timeout(10):
            while await cache.get("team", "far") is None:
                await asyncio.sleep(0.01)
    finally:
        await link.close()


async def test_a_key_that_holds_something_else_is_a_miss(link: Link) -> None:
    await link.run(BREAK, ["weir:{team}:cache:name"], [])
    assert await RedisCache(link).get("team", "name") is None
    await link.run(BREAK, ["weir:{team}:flight:name"], [])
    assert await RedisLocks(link).take("team", "name", "token") is Lock.AWAY


# -- locks ---------------------------------------------------------------------------------------


async def test_a_lock_is_held_by_one(link: Link) -> None:
    locks = RedisLocks(link)
    taken = await asyncio.gather(*(locks.take("team", "name", f"token {n}") for n in range(50)))
    assert Counter(taken) == {Lock.TAKEN: 1, Lock.HELD: 49}
    holder = f"token {taken.index(Lock.TAKEN)}"
    assert await locks.take("team", "name", holder) is Lock.TAKEN
    assert await locks.take("other", "name", "token") is Lock.TAKEN
    await locks.end("team", "name", "not the holder", Ending.FAILED)
    assert await locks.take("team", "name", "another") is Lock.HELD
    await locks.end("team", "name", holder, Ending.FAILED)
    assert await locks.take("team", "name", "another") is Lock.TAKEN


@pytest.mark.parametrize(
    ("ending", "found"),
    [(Ending.KEPT, Lock.KEPT), (Ending.NOT_KEPT, Lock.NOT_KEPT), (Ending.LEFT, Lock.TAKEN)],
)
async def test_how_a_flight_ended_is_told_for_a_moment(link: Link, ending: Ending, found: Lock) -> None:
    locks = RedisLocks(link)
    await locks.take("team", "name", "token")
    await locks.end("team", "name", "token", ending)
    assert await locks.take("team", "name", "another") is found
    _, left = await link.run(PEEK, ["weir:{team}:flight:name"], [])
    assert 0 < left <= (LOCK_MS if found is Lock.TAKEN else MARK_MS)


async def test_only_its_holder_makes_a_lock_last(link: Link) -> None:
    locks, key = RedisLocks(link), ["weir:{team}:flight:name"]
    await locks.take("team", "name", "token")
    await link.run(Script("return redis.call('PEXPIRE', KEYS[1], 1000)"), key, [])
    await locks.extend("team", "name", "another")
    assert (await link.run(PEEK, key, []))[1] <= 1000
    await locks.extend("team", "name", "token")
    assert (await link.run(PEEK, key, []))[1] > 1000
    await link.run(DELETE, key, [])
    await locks.extend("team", "name", "token")
    assert await locks.take("team", "name", "another") is Lock.TAKEN


# -- one leader among pods -----------------------------------------------------------------------


class WatchedLocks(RedisLocks):
    """Tells how often a pod has met the lock of another one."""

    def __init__(self, link: Link) -> None:
        super().__init__(link)
        self.met = 0
        self.changed = asyncio.Condition()

    async def take(self, tenant: str, name: str, token: str) -> Lock:
        lock = await super().take(tenant, name, token)
        if lock is Lock.HELD:
            async with self.changed:
                self.met += 1
                self.changed.notify_all()
        return lock


class Pod:
    """A process with its own way to Redis, its own memory and its own flights."""

    def __init__(self, link: Link, patience_seconds: float = 30.0) -> None:
        self.cache = TwoLevelCache(MemoryCache(MOST), RedisCache(link))
        self.locks = WatchedLocks(link)
        self.flights = Flights(self.locks, patience_seconds=patience_seconds)


class Upstream:
    """Counts who asks, and how many do so at the same time."""

    def __init__(self) -> None:
        self.now = 0
        self.most = 0
        self.askers: list[asyncio.Task[Any]] = []
        self.asked = asyncio.Event()
        self.gate = asyncio.Event()

    @property
    def calls(self) -> int:
        return len(self.askers)

    async def ask(self) -> bytes:
        task = asyncio.current_task()
        assert task is not None
        self.askers.append(task)
        self.now += 1
        self.most = max(self.most, self.now)
        self.asked.set()
        try:
            await self.gate.wait()
        finally:
            self.now -= 1
        return b"answer"


async def answered(pod: Pod, upstream: Upstream, keep: bool = True) -> tuple[bytes, Role | None]:
    """As the request path does it."""
    found = await pod.cache.get("team", "name")
    if found is not None:
        return found, None
    flight = pod.flights.of("team", "name")
    async with flight as role:
        if role is Role.LOOKS:
            found = await pod.cache.get("team", "name")
            if found is not None:
                return found, role
        answer = await upstream.ask()
        if keep:
            await pod.cache.put("team", "name", answer, 60)
            flight.leave(Ending.KEPT)
        return answer, role


@pytest.fixture
async def pods(redis_servers: Servers) -> AsyncIterator[list[Pod]]:
    async with contextlib.AsyncExitStack() as ended:
        made = [Pod(await linked(ended, redis_servers.url)) for _ in range(2)]
        yield made
        for pod in made:
            await pod.flights.settled()
            assert len(pod.flights) == 0


async def one_waits(pods: list[Pod]) -> None:
    """Returns when a pod has looked three times whether the other one still leads."""

    async def waits(pod: Pod) -> None:
        async with pod.locks.changed:
            await pod.locks.changed.wait_for(lambda: pod.locks.met >= 3)

    looking = [asyncio.create_task(waits(pod)) for pod in pods]
    _, others = await asyncio.wait(looking, timeout=20, return_when=asyncio.FIRST_COMPLETED)
    assert len(others) < len(pods)
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


async def test_a_hundred_equal_calls_ask_once(pods: list[Pod]) -> None:
    upstream = Upstream()
    asking = [asyncio.create_task(answered(pods[n % 2], upstream)) for n in range(100)]
    await upstream.asked.wait()
    await one_waits(pods)
    upstream.gate.set()
    answers = await asyncio.gather(*asking)
    assert upstream.calls == 1
    assert {answer for answer, _ in answers} == {b"answer"}
    assert Counter(role for _, role in answers)[Role.LEADS] == 1


async def test_a_quick_answer_too_is_asked_for_once(pods: list[Pod]) -> None:
    for _ in range(10):
        upstream = Upstream()
        upstream.gate.set()
        async with asyncio.timeout(20):
            await asyncio.gather(*(answered(pods[n % 2], upstream) for n in range(100)))
        assert upstream.calls == 1
        for pod in pods:
            await pod.flights.settled()
            pod.cache = TwoLevelCache(MemoryCache(MOST), pod.cache._far)
        link = pods[0].cache._far._link
        for kind in ("cache", "flight"):
            await link.run(DELETE, [f"weir:{{team}}:{kind}:name"], [])


async def test_no_pod_queues_for_an_answer_that_cannot_be_kept(pods: list[Pod]) -> None:
    upstream = Upstream()
    asking = [asyncio.create_task(answered(pods[n % 2], upstream, keep=False)) for n in range(20)]
    await upstream.asked.wait()
    await one_waits(pods)
    assert upstream.calls == 1
    upstream.gate.set()
    answers = await asyncio.gather(*asking)
    assert Counter(role for _, role in answers) == {Role.LEADS: 1, Role.ALONE: 19}


async def test_a_leader_that_leaves_is_followed_by_one_of_all_pods(pods: list[Pod]) -> None:
    upstream = Upstream()
    asking = [asyncio.create_task(answered(pods[n % 2], upstream)) for n in range(20)]
    await upstream.asked.wait()
    for _ in range(5):
        upstream.asked.clear()
        upstream.askers[-1].cancel()
        async with asyncio.timeout(20):
            await upstream.asked.wait()
    upstream.gate.set()
    answers = await asyncio.gather(*asking, return_exceptions=True)
    assert upstream.most == 1
    assert upstream.calls == 6
    assert sum(isinstance(answer, asyncio.CancelledError) for answer in answers) == 5


async def test_a_pod_that_vanished_is_not_waited_for_for_ever(pods: list[Pod]) -> None:
    link = pods[0].cache._far._link
    key = ["weir:{team}:flight:name"]
    await RedisLocks(link).take("team", "name", "of a pod that is no more")
    upstream = Upstream()
    upstream.gate.set()
    asking = asyncio.create_task(answered(pods[1], upstream))
    await one_waits(pods[1:])
    assert not upstream.asked.is_set()
    await link.run(Script("return redis.call('PEXPIRE', KEYS[1], 1)"), key, [])  # as after LOCK_SECONDS
    assert await asking == (b"answer", Role.LEADS)


async def test_patience_with_another_pod_has_an_end(redis_single: Single) -> None:
    async with contextlib.AsyncExitStack() as ended:
        link = await linked(ended, redis_single.url)
        await RedisLocks(link).take("team", "name", "another")
        pod, upstream = Pod(link, patience_seconds=0.1), Upstream()
        upstream.gate.set()
        assert await answered(pod, upstream) == (b"answer", Role.ALONE)
        await pod.flights.settled()
        assert len(pod.flights) == 0
        assert await RedisLocks(link).take("team", "name", "another") is Lock.TAKEN  # it is still theirs


async def test_one_who_leaves_while_it_looks_hands_the_looking_on(redis_single: Single) -> None:
    async with contextlib.AsyncExitStack() as ended:
        link = await linked(ended, redis_single.url)
        locks, pod, upstream = RedisLocks(link), Pod(link), Upstream()
        await locks.take("team", "name", "another")
        first, second = (asyncio.create_task(answered(pod, upstream)) for _ in range(2))
        await one_waits([pod])
        first.cancel()
        await pod.cache._far.put("team", "name", b"theirs", 60)
        await locks.end("team", "name", "another", Ending.KEPT)
        async with asyncio.timeout(20):
            assert await second == (b"theirs", Role.LOOKS)
        assert upstream.calls == 0
        assert len(pod.flights) == 0


async def test_while_redis_is_away_each_pod_leads(redis_single: Single) -> None:
    async with contextlib.AsyncExitStack() as ended:
        made = [Pod(await linked(ended, redis_single.url)) for _ in range(2)]
        redis_single.kill()
        upstream = Upstream()
        asking = [asyncio.create_task(answered(made[n % 2], upstream)) for n in range(100)]
        async with asyncio.timeout(20):
            while upstream.calls < 2:
                await asyncio.sleep(0.001)
        upstream.gate.set()
        answers = await asyncio.gather(*asking)
        assert upstream.calls == 2
        assert Counter(role for _, role in answers)[Role.LEADS] == 2


async def test_a_lock_lasts_as_long_as_its_leader(
    monkeypatch: pytest.MonkeyPatch, redis_single: Single
) -> None:
    monkeypatch.setattr("service.caching.flights.LOCK_SECONDS", 0.03)  # it extends the lock that often
    async with contextlib.AsyncExitStack() as ended:
        link = await linked(ended, redis_single.url)
        pod, upstream, key = Pod(link), Upstream(), ["weir:{team}:flight:name"]
        asking = asyncio.create_task(answered(pod, upstream))
        await upstream.asked.wait()
        await link.run(Script("return redis.call('PEXPIRE', KEYS[1], 5000)"), key, [])
        async with asyncio.timeout(4):
            while (await link.run(PEEK, key, []))[1] <= 5000:
                await asyncio.sleep(0.005)
        upstream.gate.set()
        await asking
        await pod.flights.settled()
        assert (await link.run(PEEK, key, []))[1] <= MARK_MS
        assert not [task for task in asyncio.all_tasks() if "_hold" in repr(task.get_coro())]
