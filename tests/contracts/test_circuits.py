"""Circuits that all pods share: what Redis keeps of them, and what a pod makes of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from typing import Any

import pytest
from structlog.testing import capture_logs

from service.errors import StateUnavailable
from service.ports import PlaceName
from service.routing.breaker import Breaker, Cause, Circuit
from service.routing.catalogue import Conditions
from service.routing.places import Condition
from service.routing.sharing import DOUBT_SECONDS, CircuitSharing
from service.stores.redis.circuits import RedisCircuits
from service.stores.redis.link import Link
from tests.contracts.test_stores import make_link
from tests.redis_servers import Servers, Single
from tests.unit.ports import Clock

ODD = ("up|str{ea}m", "org/größe:7b|*\n")
ONE, TWO = ("one", "m"), ("two", "m")


@pytest.fixture(params=["redis_single", "redis_cluster"])
async def link(request: pytest.FixtureRequest) -> AsyncIterator[Link]:
    servers: Servers = request.getfixturevalue(request.param)
    servers.restore()
    servers.flush()
    linked = make_link(servers.url)
    await linked.start()
    assert linked.available
    yield linked
    await linked.close()


# -- what Redis keeps ----------------------------------------------------------------------------


async def test_what_one_opens_all_see_until_its_time_is_over(link: Link) -> None:
    here, there = RedisCircuits(link), RedisCircuits(link)
    assert await here.exchange({}, ()) == {}
    found = await here.exchange({ONE: 30.0, ODD: 0.2}, ())
    assert found.keys() == {ONE, ODD}
    assert 29 < found[ONE] <= 30
    seen = await there.exchange({}, ())
    assert seen.keys() >= {ONE}
    async with asyncio.timeout(10):
        while ODD in await there.exchange({}, ()):
            await asyncio.sleep(0.02)
    assert (await there.exchange({}, ())).keys() == {ONE}


async def test_what_is_closed_is_gone_for_all_and_the_key_with_it(link: Link) -> None:
    circuits = RedisCircuits(link)
    await circuits.exchange({ONE: 30.0, TWO: 30.0}, ())
    assert (await circuits.exchange({}, [ONE])).keys() == {TWO}
    assert await circuits.exchange({}, [TWO, ODD]) == {}
    assert await link.ask("EXISTS", "weir:{*}:circuits") == 0


async def test_the_longer_time_counts(link: Link) -> None:
    circuits = RedisCircuits(link)
    await circuits.exchange({ONE: 30.0}, ())
    assert (await circuits.exchange({ONE: 5.0}, ()))[ONE] > 29
    assert (await circuits.exchange({ONE: 60.0}, ()))[ONE] > 59


async def test_the_key_goes_with_its_last_circuit(link: Link) -> None:
    await RedisCircuits(link).exchange({ONE: 30.0, TWO: 60.0}, ())
    assert 59_000 < await link.ask("PTTL", "weir:{*}:circuits") <= 60_000


async def test_only_so_many_are_kept(link: Link) -> None:
    circuits = RedisCircuits(link, most=3)
    names = [("u", f"m{n}") for n in range(6)]
    found = await circuits.exchange({name: 10.0 + n for n, name in enumerate(names)}, ())
    assert found.keys() == set(names[3:])


async def test_without_redis_there_is_nothing_to_ask(redis_single: Single) -> None:
    link = make_link(redis_single.url, 0.1)
    await link.start()
    circuits = RedisCircuits(link)
    redis_single.kill()
    with pytest.raises(StateUnavailable):
        await circuits.exchange({}, ())
    assert not circuits.available
    await link.close()


# -- what a pod makes of it ----------------------------------------------------------------------


class Pod:
    """A process with one model at one upstream."""

    def __init__(self, circuits: Any, clock: Callable[[], float]) -> None:
        self.changes: list[Circuit] = []
        conditions = Conditions(lambda _upstream, _model, state: self.changes.append(state))
        peer = conditions.peer("one", most=None, region=None)
        self.condition: Condition = conditions.of(peer, "m")
        self.breaker: Breaker = self.condition.breaker
        self.breaker._clock = clock
        self.sharing = CircuitSharing(conditions, circuits, clock)

    def fail(self) -> None:
        for _ in range(5):
            self.breaker.failed(self.breaker.begin())
        assert self.breaker.state is Circuit.OPEN

    def succeed(self) -> None:
        assert self.breaker.admits
        self.breaker.succeeded(self.breaker.begin())

    async def turn(self) -> Circuit:
        await self.sharing.exchange()
        return self.breaker.state


class Board:
    """The port in memory, by a clock that the test moves."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.ends = clock, dict[PlaceName, float]()
        self.available, self.fails, self.calls = True, False, 0

    async def exchange(
        self, opened: Mapping[PlaceName, float], closed: Collection[PlaceName]
    ) -> Mapping[PlaceName, float]:
        self.calls += 1
        if self.fails:
            raise StateUnavailable("away")
        now = self.clock()
        for name, seconds in opened.items():
            self.ends[name] = max(now + seconds, self.ends.get(name, 0))
        for name in closed:
            self.ends.pop(name, None)
        self.ends = {name: end for name, end in self.ends.items() if end > now}
        return {name: end - now for name, end in self.ends.items()}


class Pods:
    def __init__(self) -> None:
        self.clock = Clock()
        self.board = Board(self.clock)
        self.a, self.b, self.c = (Pod(self.board, self.clock) for _ in range(3))


async def test_a_circuit_that_one_pod_opens_is_open_in_all_for_the_rest_of_its_time() -> None:
    pods = Pods()
    pods.a.fail()
    await pods.a.turn()
    pods.clock.now += 2
    assert await pods.b.turn() is Circuit.OPEN
    assert (pods.b.breaker.cause, pods.b.breaker.open_seconds) == (Cause.FLEET, 3.0)
    assert pods.b.changes == [Circuit.OPEN]
    await pods.b.turn()
    assert pods.board.ends == {ONE: pods.clock() + 3.0}, "who was told tells nobody"
    pods.clock.now += 3
    assert pods.b.breaker.admits


async def test_closing_is_told_too() -> None:
    pods = Pods()
    pods.a.fail()
    await pods.a.turn()
    assert await pods.b.turn() is Circuit.OPEN
    pods.a.breaker.close()
    await pods.a.turn()
    assert await pods.b.turn() is Circuit.CLOSED
    assert await pods.a.turn() is Circuit.CLOSED


async def test_who_was_told_of_a_closing_does_not_tell_it_again() -> None:
    pods = Pods()
    pods.a.fail()
    await pods.a.turn()
    await pods.b.turn()
    pods.a.breaker.close()
    await pods.a.turn()
    assert await pods.b.turn() is Circuit.CLOSED
    pods.a.fail()
    await pods.a.turn()
    await pods.b.turn()
    assert ONE in pods.board.ends, "the new one is not taken away"


async def test_what_changes_here_while_the_others_are_asked_is_newer_than_what_they_say() -> None:
    pods = Pods()
    pods.a.fail()
    await pods.a.turn()
    real = pods.board.exchange

    async def slow(opened: Any, closed: Any) -> Any:
        found = await real(opened, closed)
        pods.b.fail()
        pods.b.breaker.close()
        return found

    pods.board.exchange = slow  # type: ignore[method-assign]
    assert await pods.b.turn() is Circuit.CLOSED


async def test_a_time_that_is_over_closes_nothing_but_lets_one_call_find_out() -> None:
    pods = Pods()
    pods.a.fail()
    await pods.a.turn()
    await pods.b.turn()
    pods.clock.now += 5
    assert await pods.b.turn() is Circuit.OPEN
    probe = pods.b.breaker.begin()
    assert (pods.b.breaker.state, pods.b.breaker.admits) == (Circuit.HALF_OPEN, False)
    assert await pods.b.turn() is Circuit.HALF_OPEN
    pods.b.breaker.failed(probe)
    await pods.b.turn()
    assert pods.board.ends == {ONE: pods.clock() + 10}, "what it has found out itself it tells"


async def test_an_upstream_that_asked_for_time_asked_one_pod() -> None:
    pods = Pods()
    pods.a.breaker.open_for(30, Cause.ASKED)
    await pods.a.turn()
    assert pods.board.ends == {}
    assert await pods.b.turn() is Circuit.CLOSED


async def test_what_a_pod_knows_itself_is_not_changed_by_others() -> None:
    pods = Pods()
    pods.a.fail()
    pods.b.fail()
    await pods.a.turn()
    pods.b.breaker.open_for(20)
    await pods.b.turn()
    pods.a.breaker.close()
    await pods.a.turn()
    assert pods.board.ends == {}
    assert await pods.b.turn() is Circuit.OPEN


async def test_a_pod_that_alone_cannot_reach_the_upstream_does_not_take_it_from_the_others() -> None:
    pods = Pods()
    pods.a.fail()
    await pods.a.turn()
    assert await pods.b.turn() is Circuit.OPEN
    pods.clock.now += 5
    await pods.b.turn()
    pods.b.succeed()
    await pods.b.turn()
    for _ in range(3):
        assert pods.a.breaker.admits
        pods.a.breaker.failed(pods.a.breaker.begin())
        await pods.a.turn()
        assert await pods.b.turn() is Circuit.CLOSED
        pods.clock.now += pods.a.breaker.open_seconds
    pods.clock.now += DOUBT_SECONDS
    pods.a.breaker.failed(pods.a.breaker.begin())
    await pods.a.turn()
    assert await pods.b.turn() is Circuit.OPEN, "later it is believed again"


async def test_who_was_told_that_it_is_well_again_does_not_believe_the_next_alarm() -> None:
    pods = Pods()
    pods.a.fail()
    for pod in (pods.a, pods.b, pods.c):
        await pod.turn()
    pods.b.breaker.close()
    await pods.b.turn()
    assert await pods.c.turn() is Circuit.CLOSED
    pods.clock.now += 5
    pods.a.breaker.failed(pods.a.breaker.begin())
    await pods.a.turn()
    assert await pods.c.turn() is Circuit.CLOSED
    pods.c.fail()
    pods.c.breaker.close()
    assert await pods.c.turn() is Circuit.CLOSED


async def test_nothing_is_asked_while_redis_is_away_and_all_is_told_afterwards() -> None:
    pods = Pods()
    pods.board.available = False
    pods.a.fail()
    await pods.a.turn()
    assert pods.board.calls == 0
    pods.board.available, pods.board.fails = True, True
    await pods.a.turn()
    pods.board.fails = False
    pods.clock.now += 1
    await pods.a.turn()
    assert pods.board.ends == {ONE: pods.clock() + 4}
    pods.board.available = False
    pods.a.breaker.close()
    pods.a.fail()
    pods.clock.now += 60
    pods.board.available = True
    await pods.a.turn()
    assert pods.board.ends == {}, "that time is over"


async def test_pods_on_redis_learn_of_each_other_by_themselves(link: Link) -> None:
    loop = asyncio.get_running_loop()
    a, b = (Pod(RedisCircuits(link), loop.time) for _ in range(2))
    running = [asyncio.create_task(pod.sharing.run()) for pod in (a, b)]

    async def until(state: Circuit) -> None:
        async with asyncio.timeout(10):
            while b.breaker.state is not state:
                await asyncio.sleep(0.01)

    a.fail()
    await until(Circuit.OPEN)
    assert b.breaker.open_seconds <= 5
    a.breaker.close()
    await until(Circuit.CLOSED)
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)


async def test_what_nobody_can_read_ends_no_process(link: Link) -> None:
    """A member of a later version, or of somebody else: it is said, and the next look is made."""
    far = round((time.time() + 3_600) * 1000)
    await link.ask("ZADD", "weir:{*}:circuits", far, b"\xff\xfe")
    pod = Pod(RedisCircuits(link), asyncio.get_running_loop().time)
    with capture_logs() as lines:
        running = asyncio.create_task(pod.sharing.run())
        async with asyncio.timeout(20):
            while sum(line["event"] == "circuits_not_shared" for line in lines) < 2:
                assert not running.done()
                await asyncio.sleep(0.01)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
