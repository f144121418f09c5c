"""What only stores on Redis do: write once what is sent twice, wait for nobody, lose nothing to an outage."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import msgspec
import pytest
import structlog

from service.domain import Operation, Principal, RequestRecord
from service.errors import StateRefused, StateUnavailable
from service.rules import Rulebook
from service.stores.redis.accounts import RedisAccounts
from service.stores.redis.backlog import Backlog, Write
from service.stores.redis.fleet import FleetConversations
from service.stores.redis.keys import Keys
from service.stores.redis.link import Link, Script
from service.stores.redis.scripts import SETTLE
from service.stores.redis.stores import RedisConversations
from tests.contracts.test_stores import ANNA, BERT, ELSEWHERE, contents, make_link, turn
from tests.redis_servers import ClusterSet, Servers, Single, SlowProxy

ECHO = Script("return ARGV[1]")
RECOVERY_SECONDS = 5.0


@pytest.fixture
def proxy(redis_single: Single) -> Iterator[SlowProxy]:
    with SlowProxy(redis_single.port) as between:
        yield between


@asynccontextmanager
async def linked(url: str, timeout_seconds: float = 0.1) -> AsyncIterator[Link]:
    link = make_link(url, timeout_seconds)
    await link.start()
    try:
        yield link
    finally:
        await link.close()


@asynccontextmanager
async def backlogged(link: Link, most: int = 1000) -> AsyncIterator[Backlog]:
    backlog = Backlog(link, most)
    backlog.start()
    try:
        yield backlog
    finally:
        await backlog.close()


async def back(link: Link) -> None:
    async with asyncio.timeout(RECOVERY_SECONDS):
        await link.back.wait()


async def emptied(backlog: Backlog) -> None:
    async with asyncio.timeout(RECOVERY_SECONDS):
        while len(backlog):
            await asyncio.sleep(0.005)


def record(name: str, principal: Principal = ANNA) -> RequestRecord:
    """One whose id ends with its name; the same name is the same record."""
    made = f"{5_000:012x}{name}"
    return RequestRecord(made, f"request-{name}", "/v1/chat", Operation.CHAT, principal, started_at=5.0)


class Book:
    """Enters records as the service does: at once, or by way of a backlog."""

    def __init__(self, link: Link, backlog: Backlog | None = None, most: int = 20_000) -> None:
        self._link = link
        self._backlog = backlog
        self._accounts = RedisAccounts(link, Rulebook(), most=most)

    async def enter(self, one: RequestRecord) -> None:
        ((keys, arguments),) = self._accounts.settling(one, None)
        if self._backlog is None:
            await self._link.run(SETTLE, keys, arguments)
        else:
            await self._backlog.write(Write("ledger", one.principal.tenant, SETTLE, keys, arguments))


async def ids(link: Link, tenant: str = "team") -> list[str]:
    entries = await link.ask("XRANGE", Keys(link.prefix).ledger(tenant), "-", "+")
    return [msgspec.json.decode(fields[1], type=RequestRecord).id[12:] for _, fields in entries]


def conversations(link: Link) -> RedisConversations:
    return RedisConversations(link, ttl_seconds=3600, most=10)


# -- once ----------------------------------------------------------------------------------------


async def test_the_same_record_twice_is_there_once(redis_servers: Servers) -> None:
    async with linked(redis_servers.url, 2.0) as link:
        ledger = Book(link)
        for name in ("a", "b", "a", "b"):
            await ledger.enter(record(name))
        assert await ids(link) == ["a", "b"]


async def test_the_same_turn_twice_is_there_once(redis_servers: Servers) -> None:
    async with linked(redis_servers.url, 2.0) as link:
        kept, said = conversations(link), turn(1)
        for _ in range(3):
            assert await kept.append(ANNA, "c", said, None, begin=True)
        found = await kept.load(ANNA, "c")
        assert contents(found) == ["question 1", "answer 1"]
        assert found is not None
        assert (found.total_messages, found.total_tokens) == (2, 10)


async def test_a_turn_that_comes_again_brings_nothing_back_that_was_deleted(redis_servers: Servers) -> None:
    async with linked(redis_servers.url, 2.0) as link:
        kept, said = conversations(link), turn(1)
        await kept.append(ANNA, "c", said, None, begin=True)
        await kept.delete(ANNA, "c")
        await kept.append(ANNA, "c", said, None, begin=True)
        assert await kept.load(ANNA, "c") is None


async def test_what_was_written_though_its_answer_came_late_is_there_once(
    redis_single: Single, proxy: SlowProxy
) -> None:
    async with linked(redis_single.url_at(proxy.port)) as link, backlogged(link) as backlog:
        ledger, kept = (
            Book(link, backlog),
            FleetConversations(conversations(link), link, backlog),
        )
        await ledger.enter(record("before"))
        proxy.delay(0.3)
        await ledger.enter(record("late"))
        await kept.append(ANNA, "c", turn(1), None, begin=True)
        assert len(backlog) == 2
        proxy.delay(0.0)
        await emptied(backlog)
        assert await ids(link) == ["before", "late"]
        assert contents(await kept.load(ANNA, "c")) == ["question 1", "answer 1"]


async def test_a_writer_who_is_cancelled_loses_nothing(redis_single: Single, proxy: SlowProxy) -> None:
    async with linked(redis_single.url_at(proxy.port), 2.0) as link, backlogged(link) as backlog:
        ledger = Book(link, backlog)
        redis_single.freeze()
        entering = [asyncio.create_task(ledger.enter(record(f"r{n}"))) for n in range(5)]
        await asyncio.sleep(0)
        for one in entering:
            one.cancel()
        await asyncio.gather(*entering, return_exceptions=True)
        assert all(one.cancelled() for one in entering)
        redis_single.thaw()
        await emptied(backlog)
        assert sorted(await ids(link)) == [f"r{n}" for n in range(5)]


async def test_the_ledger_is_bounded(redis_single: Single) -> None:
    async with linked(redis_single.url, 2.0) as link:
        ledger = Book(link, most=100)
        for number in range(500):
            await ledger.enter(record(f"r{number}"))
        kept = await ids(link)
        assert 100 <= len(kept) <= 250
        assert kept[-1] == "r499"


# -- the backlog ---------------------------------------------------------------------------------


async def test_what_waits_is_written_in_its_order(redis_servers: Servers) -> None:
    """More than goes into one round trip, of several tenants, to a server that forgot the scripts."""
    async with linked(redis_servers.url, 2.0) as link, backlogged(link) as backlog:
        ledger = Book(link, backlog)
        link._trip("test")
        for number in range(150):
            await ledger.enter(record(f"r{number}"))
            await ledger.enter(record(f"x{number}", ELSEWHERE))
        redis_servers.flush()
        await back(link)
        await emptied(backlog)
        assert await ids(link) == [f"r{n}" for n in range(150)]
        assert await ids(link, "other team") == [f"x{n}" for n in range(150)]


async def test_what_redis_refuses_holds_up_nothing_else(redis_single: Single) -> None:
    dropped: list[str] = []
    async with linked(redis_single.url) as link, backlogged(link) as backlog:
        backlog.on_drop = dropped.append
        ledger = Book(link, backlog)
        redis_single.server.command("SET", "weir:{other%20team}:ledger", "not a stream")
        with structlog.testing.capture_logs() as lines:
            for name in ("a", "b"):
                await ledger.enter(record(f"x{name}", ELSEWHERE))
                await ledger.enter(record(name))
            await emptied(backlog)
        assert await ids(link) == ["a", "b"]
        assert dropped == ["ledger", "ledger"]
        assert {line["event"] for line in lines} == {"redis_refused"}
        assert link.available


async def test_a_conversation_whose_turn_waits_is_not_taken_for_unknown(redis_single: Single) -> None:
    async with linked(redis_single.url) as link:
        backlog = Backlog(link, 10)  # not started: what waits, waits
        kept = FleetConversations(conversations(link), link, backlog)
        link._trip("test")
        await kept.append(ANNA, "c", turn(1), None, begin=True)
        await back(link)
        for call in (kept.load(ANNA, "c"), kept.delete(ANNA, "c")):
            with pytest.raises(StateUnavailable):
                await call
        assert link.just_back
        with pytest.raises(StateUnavailable):  # what is unknown here may be on its way from another pod
            await kept.load(BERT, "c")
        await backlog.close()
        assert contents(await kept.load(ANNA, "c")) == ["question 1", "answer 1"]


async def test_writes_too_long_for_one_round_trip_go_in_smaller_parts(redis_single: Single) -> None:
    """All of them together would always be late."""
    slow = Script("local x = 0 for i = 1, 200000 do x = x + i end redis.call('RPUSH', KEYS[1], ARGV[1])")
    async with linked(redis_single.url) as link, backlogged(link) as backlog:
        link._trip("test")
        for number in range(150):
            await backlog.write(Write("ledger", "lane", slow, ["weir:list"], [number]))
        await back(link)
        async with asyncio.timeout(20):
            while len(backlog):
                await asyncio.sleep(0.01)
        found = redis_single.server.command("LRANGE", "weir:list", 0, -1)
        assert list(dict.fromkeys(found)) == [str(n) for n in range(150)]


async def test_a_write_does_not_wait_for_those_that_are_sent_just_now(
    redis_single: Single, proxy: SlowProxy
) -> None:
    """Under load there is always one: what waited once would make all others wait for ever."""
    async with linked(redis_single.url_at(proxy.port), 2.0) as link:
        backlog = Backlog(link, 10)
        link._trip("test")
        assert await backlog.write(Write("ledger", "lane", ECHO, ["weir:x"], ["a"])) is None
        await back(link)
        assert await backlog.write(Write("ledger", "lane", ECHO, ["weir:x"], ["b"])) is None
        assert await backlog.write(Write("ledger", "another lane", ECHO, ["weir:x"], ["c"])) == b"c"
        proxy.delay(0.2)
        backlog.start()
        await asyncio.sleep(0)
        assert await backlog.write(Write("ledger", "lane", ECHO, ["weir:x"], ["d"])) == b"d"
        await backlog.close()
        assert len(backlog) == 0


async def test_writes_of_one_request_go_in_one_round_trip_and_outlive_their_caller(
    redis_single: Single,
) -> None:
    add = Script("return redis.call('SADD', KEYS[1], ARGV[1])")
    async with linked(redis_single.url, 10.0) as link:
        backlog = Backlog(link, 10)
        await link.run(add, ["weir:set"], ["seen"])
        redis_single.server.freeze()
        try:
            some = [Write("ledger", "lane", add, ["weir:set"], [name]) for name in ("a", "b")]
            writing = asyncio.create_task(backlog.write_all(some))
            for _ in range(3):  # its first step, and that of the line
                await asyncio.sleep(0)
            writing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await writing
        finally:
            redis_single.server.thaw()
        async with asyncio.timeout(RECOVERY_SECONDS):  # one that had waited for the other would not be there
            while redis_single.server.command("SCARD", "weir:set") != 3:
                await asyncio.sleep(0.005)
        assert len(backlog) == 2, "whether Redis took them is not known"
        backlog.start()
        await emptied(backlog)
        await backlog.close()


# -- the breaker ---------------------------------------------------------------------------------


async def test_each_gets_its_own_answer_after_late_ones(redis_single: Single, proxy: SlowProxy) -> None:
    """A connection that was given up in the middle of an answer must not be used again."""
    async with linked(redis_single.url_at(proxy.port)) as link:
        wrong = 0
        for delay in (0.0, 0.098, 0.1, 0.102, 0.3):
            proxy.delay(delay)
            for _ in range(2):
                words = [f"{delay} {n}" for n in range(30)]
                asked = [link.run(ECHO, ["weir:x"], [word]) for word in words]
                answers = await asyncio.gather(*asked, return_exceptions=True)
                for word, answer in zip(words, answers, strict=True):
                    wrong += not isinstance(answer, StateUnavailable) and answer != word.encode()
            proxy.delay(0.0)
            await back(link)
        assert wrong == 0


async def test_it_opens_at_the_third_late_answer_in_a_row(redis_single: Single, proxy: SlowProxy) -> None:
    async with linked(redis_single.url_at(proxy.port)) as link:
        await link.run(ECHO, ["weir:x"], ["a"])
        for late in (2, 2, 3):
            assert link.available
            proxy.delay(0.3)
            for _ in range(late):
                with pytest.raises(StateUnavailable):
                    await link.run(ECHO, ["weir:x"], ["a"])
            proxy.delay(0.0)
            if link.available:
                await link.run(ECHO, ["weir:x"], ["a"])
        assert not link.available
        began = time.monotonic()
        with pytest.raises(StateUnavailable):
            await link.run(ECHO, ["weir:x"], ["a"])
        assert time.monotonic() - began < 0.05


async def test_a_process_that_was_held_up_does_not_blame_redis(redis_single: Single) -> None:
    async with linked(redis_single.url) as link:
        for _ in range(3):
            asked = [asyncio.create_task(link.run(ECHO, ["weir:x"], [n])) for n in range(10)]
            await asyncio.sleep(0)
            time.sleep(0.2)
            assert await asyncio.gather(*asked) == [b"%d" % n for n in range(10)]
        assert link.available


class Forgetful(SlowProxy):
    """Like a node that vanished: nothing comes on its old connections, not even an end. New ones are well."""

    def forget(self) -> None:
        self._forgotten: set[asyncio.StreamWriter] = set(self._writers)

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, answers: bool
    ) -> None:
        with contextlib.suppress(OSError):
            while chunk := await reader.read(65536):
                if writer not in getattr(self, "_forgotten", ()):
                    writer.write(chunk)


async def test_connections_that_are_dead_do_not_open_it_again(redis_single: Single) -> None:
    with Forgetful(redis_single.port) as proxy:
        async with linked(redis_single.url_at(proxy.port)) as link:

            async def at_once(most: int) -> list[bytes | BaseException]:
                asked = [link.run(ECHO, ["weir:x"], [n]) for n in range(most)]
                answers: list[bytes | BaseException] = await asyncio.gather(*asked, return_exceptions=True)
                return answers

            assert await at_once(10) == [b"%d" % n for n in range(10)]
            proxy.forget()
            assert {type(answer) for answer in await at_once(3)} == {StateUnavailable}
            assert link.available, "late together, so late once"
            link._trip("test")
            await back(link)
            assert await at_once(10) == [b"%d" % n for n in range(10)]


async def test_a_silent_node_of_a_cluster_holds_up_its_own_tenants_alone(redis_cluster: ClusterSet) -> None:
    """Found silent by the client, and asked again as soon as it speaks."""
    async with linked(redis_cluster.url) as link:
        ledger, tenants = Book(link), [f"t{n}" for n in range(12)]

        async def answered(round_: int) -> dict[str, bool]:
            found = {}
            for tenant in tenants:
                one = record(f"{round_:04}{tenant:>20}", msgspec.structs.replace(ANNA, tenant=tenant))
                try:
                    await ledger.enter(one)
                    found[tenant] = True
                except StateUnavailable:
                    found[tenant] = False
            return found

        assert all((await answered(0)).values())
        redis_cluster.servers[0].freeze()
        during = await answered(1)
        assert any(during.values())
        assert not all(during.values())
        redis_cluster.servers[0].thaw()
        async with asyncio.timeout(RECOVERY_SECONDS):
            number = 2
            while not all((await answered(number)).values()):
                number += 1
                await asyncio.sleep(0.05)


async def test_all_of_a_cluster_away_at_boot_and_later(redis_cluster: ClusterSet) -> None:
    for server in redis_cluster.servers:
        server.kill()
    with structlog.testing.capture_logs() as lines:
        async with linked(redis_cluster.url) as link:
            assert not link.available
            await asyncio.to_thread(redis_cluster.restore)
            await back(link)
            await Book(link).enter(record("a"))
            for server in redis_cluster.servers:
                server.kill()
            with pytest.raises(StateUnavailable):
                await Book(link).enter(record("b"))
            assert not link.available
            await asyncio.to_thread(redis_cluster.restore)
            await back(link)
            await Book(link).enter(record("b"))
            assert await ids(link) == ["a", "b"]
    told = [line["event"] for line in lines if line["log_level"] != "debug"]
    assert told == ["redis_unavailable", "redis_available"] * 2


async def test_a_fault_of_ours_is_no_outage(redis_single: Single) -> None:
    async with linked(redis_single.url) as link:
        with pytest.raises(StateRefused):
            await link.run(Script("return redis.call('NONSENSE')"), ["weir:x"], [])
        assert link.available


async def test_the_record_is_all_that_was_known(redis_single: Single) -> None:
    async with linked(redis_single.url) as link:
        await Book(link).enter(record("a"))
        ((_, fields),) = redis_single.server.command("XRANGE", "weir:{team}:ledger", "-", "+")
        assert msgspec.json.decode(fields["record"], type=RequestRecord) == record("a")
