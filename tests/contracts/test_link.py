"""The link on real servers: calls of one moment together, to each its own answer, and only Redis is late."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import pytest
import structlog
import uvloop
from prometheus_client import CollectorRegistry
from redis.exceptions import RedisError

from service.app import make_adapters
from service.errors import StateRefused, StateUnavailable
from service.stores.redis.address import close_client, make_client
from service.stores.redis.line import patiently
from service.stores.redis.link import Link, Script
from service.worker.metrics import SinkMetrics
from service.worker.run import make_sink
from tests.redis_servers import HOST, MASTER, ClusterSet, Server, Servers, Single, SlowProxy
from tests.running import configuration

ECHO = Script("return ARGV[1]")
PUSH = Script("return redis.call('RPUSH', KEYS[1], ARGV[1])", repeatable=False)
NONSENSE = Script("return redis.call('NONSENSE')")
COUNT = Script("return redis.call('INCR', KEYS[1])", repeatable=False)
LOOPS = [asyncio.new_event_loop, uvloop.new_event_loop]


@asynccontextmanager
async def linked(url: str, timeout_seconds: float = 2.0, max_connections: int = 20) -> AsyncIterator[Link]:
    client = make_client(url, timeout_seconds=timeout_seconds, max_connections=max_connections)
    link = Link(client, prefix="weir:", timeout_seconds=timeout_seconds, max_connections=max_connections)
    await link.start()
    assert link.available
    try:
        yield link
    finally:
        await link.close()


def statistics(server: Server) -> tuple[int, int]:
    """How often the server has read from a connection, and how many connections there have been."""
    found = server.command("INFO", "stats")
    return found["total_reads_processed"], found["total_connections_received"]


# -- together ------------------------------------------------------------------------------------


async def test_calls_of_one_moment_are_one_piece_on_one_connection(redis_single: Single) -> None:
    async with linked(redis_single.url) as link:
        await link.run(ECHO, ["weir:x"], [0])
        reads, connections = statistics(redis_single.server)
        answers = await asyncio.gather(*(link.run(ECHO, ["weir:x"], [n]) for n in range(50)))
        reads_after, connections_after = statistics(redis_single.server)
        assert answers == [b"%d" % n for n in range(50)]
        assert reads_after - reads == 2, "theirs, and that of the question itself"
        assert connections_after == connections


async def test_calls_run_in_the_order_in_which_they_were_made(redis_single: Single) -> None:
    """Also where the server is new and knows no script."""
    redis_single.flush()
    async with linked(redis_single.url) as link:
        calls = (
            link.run(PUSH, ["weir:list"], [n]) if n % 2 == 0 else link.ask("RPUSH", "weir:list", n)
            for n in range(50)
        )
        await asyncio.gather(*calls)
        assert redis_single.server.command("LRANGE", "weir:list", 0, -1) == [str(n) for n in range(50)]


async def test_a_server_that_forgot_its_scripts_is_told_again(redis_single: Single) -> None:
    async with linked(redis_single.url) as link:
        await link.run(PUSH, ["weir:list"], ["first"])
        redis_single.flush()
        await asyncio.gather(*(link.run(PUSH, ["weir:list"], [n]) for n in range(10)))
        redis_single.server.command("SCRIPT", "FLUSH")
        await link.run_in_order([(PUSH, ["weir:list"], [n]) for n in range(10, 20)])
        assert redis_single.server.command("LRANGE", "weir:list", 0, -1) == [str(n) for n in range(20)]


async def test_the_error_of_one_is_not_that_of_its_neighbours(redis_servers: Servers) -> None:
    async with linked(redis_servers.url) as link:
        calls = [(NONSENSE if n % 3 == 0 else ECHO, [f"weir:{{{n}}}"], [n]) for n in range(30)]
        for asked in (asyncio.gather(*(link.run(*c) for c in calls), return_exceptions=True), None):
            answers = await (asked if asked is not None else link.run_in_order(calls))
            for n, answer in enumerate(answers):
                assert isinstance(answer, StateRefused) if n % 3 == 0 else answer == b"%d" % n
        assert link.available
        with pytest.raises(TypeError):
            await link.run(ECHO, ["weir:x"], [None])  # type: ignore[list-item]


async def test_a_caller_who_leaves_disturbs_nobody_and_its_write_is_made(redis_single: Single) -> None:
    async with linked(redis_single.url) as link:
        await link.run(COUNT, ["weir:n"], [])
        _, connections = statistics(redis_single.server)
        for rounds in range(3):  # before it is sent, when it is sent, when it is answered
            asked = [asyncio.create_task(link.run(PUSH, ["weir:list"], [n])) for n in range(10)]
            echoed = [asyncio.create_task(link.run(ECHO, ["weir:x"], [n])) for n in range(10)]
            for _ in range(rounds + 1):
                await asyncio.sleep(0)
            for one in asked[::2]:
                one.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
            assert await asyncio.gather(*echoed) == [b"%d" % n for n in range(10)]
        # What comes after them shows that they have run.
        assert await link.ask("LLEN", "weir:list") == 30
        assert statistics(redis_single.server)[1] == connections


async def test_the_old_have_their_answer_lost_and_the_young_keep_theirs(redis_single: Single) -> None:
    with SlowProxy(redis_single.port) as proxy:
        async with linked(redis_single.url_at(proxy.port), 1.0) as link:
            await link.run(ECHO, ["weir:x"], ["warm"])
            proxy.delay(60)
            old = asyncio.create_task(link.run(ECHO, ["weir:x"], ["old"]))
            await asyncio.sleep(0.6)  # of its time
            young = asyncio.create_task(link.run(ECHO, ["weir:x"], ["young"]))
            with pytest.raises(StateUnavailable):
                await old
            proxy.delay(0)
            assert await young == b"young"
            assert await link.run(ECHO, ["weir:x"], ["new"]) == b"new"


async def test_no_more_connections_than_allowed(redis_single: Single) -> None:
    """One that may still get answers makes way for one that is not silent."""
    with SlowProxy(redis_single.port) as proxy:
        async with linked(redis_single.url_at(proxy.port), 1.0, max_connections=1) as link:
            await link.run(ECHO, ["weir:x"], ["warm"])
            proxy.delay(60)
            old = asyncio.create_task(link.run(ECHO, ["weir:x"], ["old"]))
            await asyncio.sleep(0.6)  # of its time
            young = asyncio.create_task(link.run(ECHO, ["weir:x"], ["young"]))
            with pytest.raises(StateUnavailable):
                await old
            assert not young.done()
            new = asyncio.create_task(link.run(ECHO, ["weir:x"], ["new"]))
            for _ in range(3):
                await asyncio.sleep(0)
            assert young.done()
            with pytest.raises(StateUnavailable):
                await young
            assert not new.done()
            async with asyncio.timeout(5):
                while proxy.connections != 1:
                    await asyncio.sleep(0.005)
            proxy.delay(0)
            assert await new == b"new"
            assert link.available


# -- who may ask ---------------------------------------------------------------------------------


class Watched(Single):
    """One server and one Sentinel, each with a password of its own."""

    OF_REDIS = "of-redis"
    OF_THE_SENTINEL = "of-the-sentinel"

    def __init__(self) -> None:
        super().__init__(password=self.OF_REDIS)

    @property
    def url(self) -> str:
        return f"redis+sentinel://{HOST}:{self._sentinel.port}/0?master={MASTER}"

    def _start(self) -> None:
        super()._start()
        self._sentinel = self._add(
            [
                f"sentinel monitor {MASTER} {HOST} {self.port} 1",
                f"sentinel auth-pass {MASTER} {self.OF_REDIS}",
            ],
            password=self.OF_THE_SENTINEL,
            sentinel=True,
        )
        self._wake([self._sentinel])


@pytest.fixture(scope="module")
def watched() -> Iterator[Watched]:
    with Watched() as servers:
        yield servers


@pytest.mark.parametrize(
    ("of_redis", "of_the_sentinel", "let_in"),
    [
        (Watched.OF_REDIS, Watched.OF_THE_SENTINEL, True),
        (Watched.OF_REDIS, None, False),
        (Watched.OF_REDIS, Watched.OF_REDIS, False),
        (Watched.OF_THE_SENTINEL, Watched.OF_THE_SENTINEL, False),
    ],
)
async def test_sentinels_may_have_a_password_of_their_own(
    watched: Watched, of_redis: str, of_the_sentinel: str | None, let_in: bool
) -> None:
    client = make_client(
        watched.url,
        password=of_redis,
        sentinel_password=of_the_sentinel,
        timeout_seconds=2,
        max_connections=1,
    )
    try:
        assert await client.ping() is let_in
    except RedisError:
        assert not let_in
    finally:
        await close_client(client)


async def test_pods_and_the_worker_are_told_both_passwords(watched: Watched) -> None:
    given = configuration(
        redis_url=watched.url,
        redis_password=Watched.OF_REDIS,
        redis_sentinel_password=Watched.OF_THE_SENTINEL,
        redis_timeout=2.0,
        ledger_postgres_url="postgresql://ledger.example.com/weir",
    )
    fleet = make_adapters(given).fleet
    assert fleet is not None
    await fleet.link.start()
    assert fleet.link.available
    await fleet.link.close()
    streams = make_sink(given.settings, SinkMetrics(CollectorRegistry()))._streams
    assert await streams.tenants() == []
    await streams.close()


# -- plain commands ------------------------------------------------------------------------------


async def test_plain_commands_are_answered_as_redis_sends_it(redis_servers: Servers) -> None:
    async with linked(redis_servers.url) as link:
        large = bytes(range(256)) * 4096
        assert await link.ask("GET", "weir:{t}:v") is None
        assert await link.ask("SET", "weir:{t}:v", large, "PX", 60_000) == b"OK"
        assert await link.ask("GET", "weir:{t}:v") == large
        values = await asyncio.gather(*(link.ask("GET", "weir:{t}:v") for _ in range(10)))
        assert values == [large] * 10
        assert await link.ask("SADD", "weir:{t}:s", "a", b"b") == 2
        assert sorted(await link.ask("SMEMBERS", "weir:{t}:s")) == [b"a", b"b"]
        cursor, keys = await link.ask("SCAN", 0, "MATCH", "weir:{t}:*", "COUNT", 1000, key="weir:{t}:v")
        assert (cursor, sorted(keys)) == (b"0", [b"weir:{t}:s", b"weir:{t}:v"])
        with pytest.raises(StateRefused):
            await link.ask("INCR", "weir:{t}:s")
        assert link.available


# -- late ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("new_loop", LOOPS, ids=["asyncio", "uvloop"])
def test_a_process_that_is_held_up_is_not_redis_that_is_late(
    redis_single: Single, new_loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    """The answer is there all the time, in the socket; nothing may be taken for late or asked for twice."""
    timeout = 0.1

    async def hold_up() -> None:
        async with linked(redis_single.url, timeout) as link:
            await link.ask("SET", "weir:large", b"v" * 1_000_000)
            for number in range(3):
                asked = asyncio.create_task(link.run(COUNT, ["weir:n"], []))
                large = asyncio.create_task(link.ask("GET", "weir:large"))
                for _ in range(number):  # not yet sent, sent, perhaps answered
                    await asyncio.sleep(0)
                time.sleep(3 * timeout)
                while not (asked.done() and large.done()):
                    await asyncio.sleep(0)
                    time.sleep(timeout)
                assert await asked == number + 1
                assert len(await large) == 1_000_000
            assert link.available

    with structlog.testing.capture_logs() as lines, asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(hold_up())
    assert [line["event"] for line in lines] == ["redis_available"]
    assert redis_single.server.command("GET", "weir:n") == "3"


async def test_patience_counts_no_pause_of_ours() -> None:
    release = asyncio.Event()

    async def work() -> str:
        await release.wait()
        await asyncio.sleep(0)
        return "done"

    waiting = asyncio.create_task(patiently(work(), 0.2))
    await asyncio.sleep(0)
    time.sleep(0.5)
    release.set()
    assert await waiting == "done"
    with pytest.raises(TimeoutError):
        await patiently(asyncio.Event().wait(), 0.05)


# -- a cluster that moves ------------------------------------------------------------------------


async def test_slots_that_move_are_followed(redis_cluster: ClusterSet) -> None:
    """ASK while the slot moves, MOVED when it has moved: nobody notices, and the breaker stays closed."""
    servers, key = redis_cluster.servers, "weir:{t}:n"
    slot = servers[0].command("CLUSTER", "KEYSLOT", key)
    ids = [server.command("CLUSTER", "MYID") for server in servers]
    at = min(slot * 3 // 16384, 2)
    to = (at + 1) % 3

    def begin_to_move(old: int, new: int) -> None:
        servers[new].command("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[old])
        servers[old].command("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[new])

    def end_to_move(old: int, new: int) -> None:
        for server in (servers[new], *servers):
            server.command("CLUSTER", "SETSLOT", slot, "NODE", ids[new])

    with structlog.testing.capture_logs() as lines:
        async with linked(redis_cluster.url) as link:
            begin_to_move(at, to)
            assert await link.run(COUNT, [key], []) == 1  # on the new node, for the old has no such key
            assert await asyncio.gather(*(link.run(COUNT, [key], []) for _ in range(5))) == [2, 3, 4, 5, 6]
            end_to_move(at, to)
            assert await asyncio.gather(*(link.ask("INCR", key) for _ in range(5))) == [7, 8, 9, 10, 11]
            assert await link.run_in_order([(COUNT, [key], [])] * 2) == [12, 13]
            servers[to].command("DEL", key)
            begin_to_move(to, at)
            end_to_move(to, at)
            assert await link.ask("INCR", key) == 1
    assert [line["event"] for line in lines if line["log_level"] != "debug"] == ["redis_available"]


async def test_a_node_that_is_new_at_its_place_is_found(redis_cluster: ClusterSet) -> None:
    """Its old connection is dead; no call is lost where the node is there again."""
    async with linked(redis_cluster.url) as link:
        assert await link.ask("SET", "weir:{t}:v", "a") == b"OK"
        for server in redis_cluster.servers:
            server.command("CLIENT", "KILL", "TYPE", "normal")
        for _ in range(3):
            await asyncio.sleep(0)
        assert await link.ask("GET", "weir:{t}:v") == b"a"
        assert link.available
