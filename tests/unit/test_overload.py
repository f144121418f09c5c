"""The gate: who runs, who waits, who is turned away; and that no place is ever lost."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.config import KeyConfig
from service.domain import Outcome
from service.errors import InvalidRequest, Overloaded
from service.overload import LAG_MOST_SECONDS, REFUSALS_MOST, Gate, Place, Priority, Shed, priority_of

HIGH, NORMAL, LOW = Priority
AN_AGE = 3600.0
LATE = LAG_MOST_SECONDS * 2


class Door(Gate):
    """A gate with a clock that the test sets, and a list of those who were turned away."""

    def __init__(self, most: int, most_waiting: int = 0, wait_seconds: float = AN_AGE) -> None:
        self.shed: list[tuple[Shed, Priority]] = []
        self.now = 0.0
        super().__init__(
            most=most,
            most_waiting=most_waiting,
            wait_seconds=wait_seconds,
            on_shed=lambda reason, priority: self.shed.append((reason, priority)),
            clock=lambda: self.now,
        )


async def turns() -> None:
    """Until all that is due has been done; what is woken may wake others."""
    for _ in range(6):
        await asyncio.sleep(0)


async def asks(gate: Gate, tenant: str = "t", priority: Priority = NORMAL) -> asyncio.Task[Place]:
    """A request that has come to the gate."""
    task = asyncio.create_task(gate.enter(tenant, priority))
    await turns()
    return task


def got_in(*tasks: asyncio.Task[Place]) -> list[bool]:
    return [task.done() and not task.cancelled() and task.exception() is None for task in tasks]


async def test_whoever_fits_gets_a_place_at_once() -> None:
    gate = Door(most=2)
    first, second = await gate.enter("a", NORMAL), await gate.enter("b", LOW)
    assert (gate.running, gate.waiting, gate.limit) == (2, 0, 2)
    gate.leave(first)
    gate.leave(second)
    assert gate.running == 0


async def test_without_a_limit_everybody_gets_in_whatever_the_loop_does() -> None:
    gate = Door(most=0)
    places = [await gate.enter("t", NORMAL) for _ in range(2000)]
    gate.adapt(AN_AGE)
    places.append(await gate.enter("t", NORMAL))
    assert (gate.running, gate.waiting) == (2001, 0)
    assert gate.limit == gate.most


async def test_one_too_many_is_refused_at_once_with_a_typed_error() -> None:
    gate = Door(most=1)
    await gate.enter("t", NORMAL)
    with pytest.raises(Overloaded) as refused:
        await gate.enter("t", HIGH)
    error = refused.value
    assert (error.status, error.code, error.outcome) == (503, "overloaded", Outcome.OVERLOADED)
    assert error.retry
    assert error.retry_after_seconds in (1, 2, 3)
    assert gate.shed == [(Shed.FULL, HIGH)]
    assert (gate.running, gate.waiting) == (1, 0)


async def test_those_refused_in_one_moment_are_not_told_one_moment_to_come_again() -> None:
    gate = Door(most=1)
    await gate.enter("t", NORMAL)
    told = set()
    for _ in range(200):
        with pytest.raises(Overloaded) as refused:
            await gate.enter("t", NORMAL)
        told.add(refused.value.retry_after_seconds)
    assert len(told) > 1


async def test_the_queue_is_first_in_first_out() -> None:
    gate = Door(most=1, most_waiting=2)
    place = await gate.enter("t", NORMAL)
    first, second = await asks(gate), await asks(gate)
    assert got_in(first, second) == [False, False]
    assert gate.waiting == 2
    gate.leave(place)
    await turns()
    assert got_in(first, second) == [True, False]
    gate.leave(await first)
    await turns()
    assert got_in(second) == [True]
    assert (gate.running, gate.waiting) == (1, 0)


async def test_who_waited_as_long_as_anybody_may_is_turned_away() -> None:
    shed: list[Shed] = []
    gate = Gate(most=1, most_waiting=2, wait_seconds=0.02, on_shed=lambda reason, _: shed.append(reason))
    place = await gate.enter("t", NORMAL)
    for task in (await asks(gate), await asks(gate)):
        with pytest.raises(Overloaded, match="in vain"):
            await task
    assert shed == [Shed.LATE, Shed.LATE]
    assert (gate.running, gate.waiting) == (1, 0)
    gate.leave(place)
    await gate.enter("t", NORMAL)


async def test_each_waits_its_own_time() -> None:
    gate = Door(most=1, most_waiting=2, wait_seconds=0.02)
    await gate.enter("t", NORMAL)
    first = await asks(gate)
    gate.now = 0.01
    second = await asks(gate)
    gate.now = 0.02
    with pytest.raises(Overloaded):
        await first
    assert not second.done()
    gate.now = 0.03
    async with asyncio.timeout(20):
        with pytest.raises(Overloaded):
            await second


async def test_a_place_that_is_free_in_time_ends_the_wait_and_its_limit() -> None:
    gate = Gate(most=1, most_waiting=1, wait_seconds=0.02)
    place = await gate.enter("t", NORMAL)
    waits = await asks(gate)
    gate.leave(place)
    await waits
    late = await asks(gate)  # its own time begins anew
    with pytest.raises(Overloaded):
        await late
    assert gate.running == 1


async def test_a_higher_class_goes_first() -> None:
    gate = Door(most=1, most_waiting=3)
    place = await gate.enter("t", NORMAL)
    low, normal, high = [await asks(gate, priority=priority) for priority in (LOW, NORMAL, HIGH)]
    for expected in (high, normal, low):
        gate.leave(place)
        await turns()
        assert got_in(expected) == [True]
        place = await expected


async def test_a_higher_class_pushes_out_the_newest_of_the_lowest() -> None:
    gate = Door(most=1, most_waiting=4)
    await gate.enter("t", NORMAL)
    waiting = [await asks(gate, priority=priority) for priority in (LOW, LOW, NORMAL, NORMAL)]
    await asks(gate, priority=HIGH)
    assert [task.done() for task in waiting] == [False, True, False, False]
    with pytest.raises(Overloaded):
        await waiting[1]
    assert gate.shed == [(Shed.DISPLACED, LOW)]
    assert gate.waiting == 4


@pytest.mark.parametrize("priority", [NORMAL, LOW])
async def test_an_equal_or_lower_class_pushes_out_nobody(priority: Priority) -> None:
    gate = Door(most=1, most_waiting=2)
    await gate.enter("t", NORMAL)
    waiting = [await asks(gate), await asks(gate)]
    with pytest.raises(Overloaded):
        await gate.enter("t", priority)
    assert not any(task.done() for task in waiting)
    assert gate.shed == [(Shed.FULL, priority)]


async def test_the_tenant_with_the_fewest_running_gets_the_next_place_though_it_came_last() -> None:
    gate = Door(most=4, most_waiting=4)
    places = [await gate.enter("greedy", NORMAL) for _ in range(4)]
    greedy = [await asks(gate, "greedy") for _ in range(3)]
    modest = await asks(gate, "modest")
    gate.leave(places.pop())
    await turns()
    assert got_in(modest, *greedy) == [True, False, False, False]


async def test_two_tenants_end_with_equal_parts_however_many_requests_one_has() -> None:
    gate = Door(most=6, most_waiting=20)
    places = [await gate.enter("greedy", NORMAL) for _ in range(6)]
    waiting = [(await asks(gate, tenant), tenant) for tenant in ["greedy"] * 10 + ["modest"] * 6]
    for place in places:
        gate.leave(place)
    await turns()
    running = Counter(tenant for task, tenant in waiting if got_in(task) == [True])
    assert running == {"greedy": 3, "modest": 3}


async def test_a_full_queue_sheds_the_tenant_that_has_more_than_its_share() -> None:
    gate = Door(most=2, most_waiting=4)
    for _ in range(2):
        await gate.enter("greedy", NORMAL)
    greedy = [await asks(gate, "greedy") for _ in range(4)]
    modest = [await asks(gate, "modest") for _ in range(3)]
    assert [task.done() for task in greedy] == [False, True, True, True], "the newest go first"
    assert not any(task.done() for task in modest)
    with pytest.raises(Overloaded):
        await gate.enter("modest", NORMAL)  # three each: nobody has more than the other


async def test_no_class_takes_a_tenant_its_share() -> None:
    gate = Door(most=2, most_waiting=2)
    places = [await gate.enter("greedy", HIGH) for _ in range(2)]
    await asks(gate, "greedy", HIGH)
    modest = await asks(gate, "modest", LOW)
    with pytest.raises(Overloaded):
        await gate.enter("greedy", HIGH)
    gate.leave(places.pop())
    gate.leave(places.pop())
    await turns()
    assert got_in(modest) == [True]


async def test_between_tenants_that_have_equal_claims_the_class_decides() -> None:
    gate = Door(most=6, most_waiting=4)
    places = [await gate.enter(tenant, NORMAL) for tenant in ("a", "b", "b", "c", "c", "c")]
    low, high = await asks(gate, "a", LOW), await asks(gate, "b", HIGH)
    gate.leave(places.pop())
    await turns()
    assert got_in(low, high) == [True, False], "b has its share, and a has not"
    low = await asks(gate, "a", LOW)
    gate.leave(places.pop())
    await turns()
    assert got_in(low, high) == [False, True], "both have their share"


async def test_between_equals_of_two_tenants_the_first_to_come_goes_first() -> None:
    gate = Door(most=1, most_waiting=3)
    place = await gate.enter("x", NORMAL)
    waiting = [await asks(gate, tenant) for tenant in ("c", "a", "b")]
    for task in waiting:
        gate.leave(place)
        await turns()
        assert got_in(task) == [True]
        place = await task


async def test_who_leaves_while_it_waits_frees_its_place_in_the_queue() -> None:
    gate = Door(most=1, most_waiting=1)
    place = await gate.enter("t", NORMAL)
    leaver = await asks(gate)
    leaver.cancel()
    await turns()
    assert (leaver.cancelled(), gate.waiting) == (True, 0)
    waits = await asks(gate)
    gate.leave(place)
    await waits
    assert gate.shed == []


async def test_who_leaves_in_the_moment_it_gets_a_place_hands_it_on() -> None:
    gate = Door(most=1, most_waiting=2)
    place = await gate.enter("t", NORMAL)
    leaver, waits = await asks(gate), await asks(gate)
    gate.leave(place)
    leaver.cancel()  # it has the place, and has not run since
    await turns()
    assert leaver.cancelled()
    assert got_in(waits) == [True]
    assert gate.running == 1


async def test_a_place_is_not_given_to_one_who_is_leaving() -> None:
    gate = Door(most=1, most_waiting=2)
    place = await gate.enter("t", NORMAL)
    leaver, waits = await asks(gate), await asks(gate)
    leaver.cancel()
    gate.leave(place)
    await turns()
    assert leaver.cancelled()
    assert got_in(waits) == [True]
    assert gate.running == 1


async def test_one_who_is_leaving_is_nobodys_refusal() -> None:
    gate = Door(most=1, most_waiting=1)
    place = await gate.enter("t", NORMAL)
    low = await asks(gate, priority=LOW)
    low.cancel()
    asyncio.get_running_loop().call_soon(gate.leave, place)
    await gate.enter("t", HIGH)  # takes the room of one who has not noticed yet that it is cancelled
    assert low.cancelled()
    assert gate.shed == []
    assert (gate.running, gate.waiting) == (1, 0)


async def test_a_check_takes_nothing() -> None:
    gate = Door(most=1, most_waiting=1)
    gate.check("t", NORMAL)
    assert (gate.running, gate.waiting) == (0, 0)
    await gate.enter("t", NORMAL)
    gate.check("t", NORMAL)
    low = await asks(gate, priority=LOW)
    gate.check("t", NORMAL)
    assert not low.done()
    with pytest.raises(Overloaded):
        gate.check("t", LOW)
    assert gate.shed == [(Shed.FULL, LOW)]
    assert gate.waiting == 1


# -- how many may wait ---------------------------------------------------------------------------


async def test_when_a_rush_lasts_only_those_may_wait_who_will_get_a_place_in_time() -> None:
    gate = Door(most=1, most_waiting=50, wait_seconds=AN_AGE)
    place = await gate.enter("t", NORMAL)
    waiting = [await asks(gate) for _ in range(50)]
    for task in waiting[:25]:  # 25 leave in the first hour
        gate.leave(place)
        place = await task
    gate.now = AN_AGE
    with pytest.raises(Overloaded):  # of 25 to come 16 are nearly certain, and 25 wait
        gate.check("t", NORMAL)
    for task in waiting[25:35]:
        gate.leave(place)
        place = await task
    assert gate.waiting == 15
    gate.check("t", NORMAL)
    await asks(gate)
    with pytest.raises(Overloaded):
        gate.check("t", NORMAL)


async def test_where_nobody_leaves_one_may_wait() -> None:
    gate = Door(most=1, most_waiting=50)
    await gate.enter("t", NORMAL)
    waits = await asks(gate)
    gate.now = AN_AGE
    with pytest.raises(Overloaded):
        gate.check("t", NORMAL)
    waits.cancel()
    await turns()
    gate.check("t", NORMAL)


@pytest.mark.parametrize("leaving", [1, 2, 3])
async def test_where_few_leave_one_may_wait(leaving: int) -> None:
    gate = Door(most=5, most_waiting=50)
    places = [await gate.enter("t", NORMAL) for _ in range(5)]
    gate.check("t", NORMAL)
    for place in places[:leaving]:
        gate.leave(place)
        await gate.enter("t", NORMAL)
    gate.now = AN_AGE
    waits = await asks(gate)
    assert not waits.done()
    with pytest.raises(Overloaded):
        gate.check("t", NORMAL)


async def test_only_the_last_stretch_of_time_counts() -> None:
    gate = Door(most=1, most_waiting=50)
    place = await gate.enter("t", NORMAL)
    waiting = [await asks(gate) for _ in range(40)]
    for task in waiting[:37]:
        gate.leave(place)
        place = await task
    gate.now = AN_AGE
    gate.check("t", NORMAL)
    gate.now = 2.9 * AN_AGE  # and nobody has left since
    with pytest.raises(Overloaded):
        gate.check("t", NORMAL)


async def test_a_new_rush_may_fill_the_queue_again() -> None:
    gate = Door(most=1, most_waiting=2)
    await gate.enter("t", NORMAL)
    await asks(gate)
    gate.now = AN_AGE
    with pytest.raises(Overloaded):
        gate.check("t", NORMAL)
    gate.now += 2 * AN_AGE
    gate.check("t", NORMAL)


# -- the limit -----------------------------------------------------------------------------------


async def filled(most: int, running: int, most_waiting: int = 0) -> tuple[Door, list[Place]]:
    gate = Door(most, most_waiting)
    return gate, [await gate.enter("t", NORMAL) for _ in range(running)]


async def test_a_late_loop_lowers_the_limit_below_what_runs() -> None:
    gate, _ = await filled(100, running=50)
    gate.adapt(LAG_MOST_SECONDS)
    assert gate.limit == 100
    gate.adapt(LATE)
    assert gate.limit == 45
    with pytest.raises(Overloaded):
        await gate.enter("t", NORMAL)


async def test_the_limit_does_not_fall_again_before_it_is_reached() -> None:
    gate, places = await filled(100, running=50)
    for _ in range(9):
        gate.adapt(LATE)
    assert gate.limit == 45
    for place in places[:5]:
        gate.leave(place)
    gate.adapt(LATE)
    assert gate.limit == 40


async def test_the_limit_does_not_fall_while_it_is_refusing_that_keeps_the_loop_busy() -> None:
    gate, _ = await filled(100, running=100)
    for _ in range(REFUSALS_MOST + 1):
        assert refuses(gate, "t", NORMAL)
    gate.adapt(LATE)
    assert gate.limit == 100
    gate.adapt(LATE)  # nobody was refused since
    assert gate.limit == 90


@pytest.mark.parametrize(("most", "least"), [(800, 100), (40, 8), (4, 4)])
async def test_the_limit_keeps_a_part(most: int, least: int) -> None:
    gate = Door(most)
    for _ in range(100):
        gate.adapt(LATE)
    assert gate.limit == least


async def test_a_limit_that_rises_lets_in_those_who_wait_and_ends_at_the_setting() -> None:
    gate, _ = await filled(64, running=64, most_waiting=5)
    gate.adapt(LATE)
    assert gate.limit == 57
    waiting = [await asks(gate) for _ in range(2)]
    for _ in range(4):
        gate.adapt(0.0)
    assert gate.limit == 64
    assert gate.waiting == 2
    place = next(iter(gate._places.values()))
    gate.adapt(LATE)
    for _ in range(8):
        gate.leave(place)
    await turns()
    assert (gate.running, gate.waiting) == (57, 1)
    gate.adapt(0.0)
    await turns()
    assert got_in(*waiting) == [True, True]
    for _ in range(9):
        gate.adapt(0.0)
    assert gate.limit == 64


async def test_the_watch_notices_that_the_loop_is_late() -> None:
    gate = Gate(most=100, most_waiting=0, wait_seconds=1.0)
    watch = asyncio.create_task(gate.watch())
    async with asyncio.timeout(20):
        while gate.limit == gate.most:
            time.sleep(LATE)  # what a busy loop does
            await asyncio.sleep(0)
    watch.cancel()
    with pytest.raises(asyncio.CancelledError):
        await watch


# -- classes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "most", "expected"),
    [
        (None, "normal", NORMAL),
        (None, "high", HIGH),
        (None, "low", LOW),
        ("high", "normal", NORMAL),
        ("high", "high", HIGH),
        (" Low ", "high", LOW),
        ("normal", "high", NORMAL),
        ("normal", "low", LOW),
    ],
)
def test_a_header_asks_for_no_more_than_the_key_may_have(
    asked: str | None, most: str, expected: Priority
) -> None:
    assert priority_of(asked, most) is expected


def test_a_class_that_does_not_exist_is_the_callers_error() -> None:
    with pytest.raises(InvalidRequest, match="high, normal, low") as refused:
        priority_of("urgent")
    assert refused.value.param == "X-Weir-Priority"


def test_a_key_is_of_the_normal_class_unless_the_file_says_more() -> None:
    assert priority_of(None, KeyConfig(name="k", sha256="0" * 64).priority) is NORMAL
    assert priority_of(None, KeyConfig(name="k", sha256="0" * 64, priority="high").priority) is HIGH


# -- against a model -----------------------------------------------------------------------------

TENANTS = ("a", "b", "c")
JOIN = st.tuples(st.just("join"), st.sampled_from(TENANTS), st.sampled_from(Priority))
OTHER = st.tuples(
    st.sampled_from(["leave", "leave", "cancel", "late", "well"]), st.integers(0, 99), st.just(NORMAL)
)
STEPS = st.lists(st.one_of(JOIN, JOIN, JOIN, OTHER), max_size=60)


class Model:
    """The rules of the gate, word by word, on plain lists. A request is its number, tenant and class."""

    def __init__(self, most: int, most_waiting: int) -> None:
        self.limit = most
        self.most_waiting = most_waiting
        self.running: list[tuple[int, str, Priority]] = []
        self.waiting: list[tuple[int, str, Priority]] = []

    def join(self, request: tuple[int, str, Priority]) -> int | None:
        """The number of the one that has to go, if one has to."""
        if len(self.running) < self.limit:
            self.running.append(request)
            return None
        self.waiting.append(request)
        if len(self.waiting) <= self.most_waiting:
            return None
        has = Counter(tenant for _, tenant, _ in self.running + self.waiting)
        share = (self.limit + self.most_waiting) / len(has)
        worst = max(self.waiting, key=lambda w: (has[w[1]] > share, w[2], has[w[1]], w[0]))
        self.waiting.remove(worst)
        return worst[0]

    def leave(self, number: int) -> None:
        self.running = [r for r in self.running if r[0] != number]
        self.waiting = [w for w in self.waiting if w[0] != number]
        self.fill()

    def fill(self) -> None:
        while self.waiting and len(self.running) < self.limit:
            runs = Counter(tenant for _, tenant, _ in self.running)
            share = self.limit / len({tenant for _, tenant, _ in self.running + self.waiting})
            best = min(self.waiting, key=lambda w: (runs[w[1]] >= share, w[2], runs[w[1]], w[0]))
            self.waiting.remove(best)
            self.running.append(best)


class Crowd:
    """Requests at a gate, each a task that keeps its place until it is told to go or is cancelled."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.inside: set[int] = set()
        self.refused: set[int] = set()
        self.tasks: dict[int, asyncio.Task[None]] = {}
        self.ends: dict[int, asyncio.Event] = {}

    def join(self, number: int, tenant: str, priority: Priority) -> None:
        self.ends[number] = asyncio.Event()
        self.tasks[number] = asyncio.create_task(self._request(number, tenant, priority))

    async def _request(self, number: int, tenant: str, priority: Priority) -> None:
        try:
            place = await self.gate.enter(tenant, priority)
        except Overloaded:
            self.refused.add(number)
            return
        try:
            self.inside.add(number)
            await self.ends[number].wait()
        finally:
            self.inside.discard(number)
            self.gate.leave(place)

    async def all_go(self) -> None:
        while any(not task.done() for task in self.tasks.values()):
            for end in self.ends.values():
                end.set()
            await turns()


def refuses(gate: Door, tenant: str, priority: Priority) -> bool:
    try:
        gate.check(tenant, priority)
    except Overloaded:
        return True
    return False


def pick(numbers: list[int], index: int) -> Iterator[int]:
    """One of them or, if there are none, nothing."""
    if numbers:
        yield sorted(numbers)[index % len(numbers)]


@settings(max_examples=500, deadline=None)
@given(steps=STEPS, most=st.sampled_from([1, 2, 3, 4, 6, 9, 12]), most_waiting=st.integers(0, 8))
def test_the_gate_does_what_the_model_does(
    steps: list[tuple[str, str | int, Priority]], most: int, most_waiting: int
) -> None:
    async def run() -> None:
        gate, model = Door(most, most_waiting), Model(most, most_waiting)
        crowd, gone = Crowd(gate), set[int]()
        for number, (what, whom, priority) in enumerate(steps):
            if what == "join":
                tenant = str(whom)
                refused = refuses(gate, tenant, priority)
                crowd.join(number, tenant, priority)
                shed = model.join((number, tenant, priority))
                assert refused == (shed == number), "check says what enter does"
                gone |= {shed} if shed is not None else set()
            elif what == "leave":
                for leaver in pick([r[0] for r in model.running], int(whom)):
                    crowd.ends[leaver].set()
                    model.leave(leaver)
            elif what == "cancel":
                for leaver in pick([r[0] for r in model.running + model.waiting], int(whom)):
                    crowd.tasks[leaver].cancel()
                    model.leave(leaver)
            else:
                gate.adapt(LATE if what == "late" else 0.0)
                model.limit = gate.limit
                model.fill()
            await turns()
            assert crowd.inside == {r[0] for r in model.running}
            assert crowd.refused == gone
            assert (gate.running, gate.waiting) == (len(model.running), len(model.waiting))
        await crowd.all_go()
        assert (gate.running, gate.waiting) == (0, 0)
        assert not gate._places, "no tenant stays behind"
        assert not gate._queued

    asyncio.run(run())


@settings(max_examples=300, deadline=None)
@given(
    bursts=st.lists(STEPS, max_size=6), most=st.integers(1, 6), most_waiting=st.integers(0, 4)
)  # fmt: skip
def test_no_place_is_lost_whatever_happens_in_one_moment(
    bursts: list[list[tuple[str, str | int, Priority]]], most: int, most_waiting: int
) -> None:
    async def run() -> None:
        gate = Door(most, most_waiting)
        crowd, number = Crowd(gate), 0
        for burst in bursts:
            for what, whom, priority in burst:  # nobody runs in between
                number += 1
                if what == "join":
                    crowd.join(number, str(whom), priority)
                elif what == "leave":
                    for leaver in pick([n for n in crowd.ends if n in crowd.inside], int(whom)):
                        crowd.ends[leaver].set()
                elif what == "cancel":
                    for leaver in pick(list(crowd.tasks), int(whom)):
                        crowd.tasks[leaver].cancel()
                if number % 3 == 0:
                    await asyncio.sleep(0)
                assert gate.running <= gate.limit
                assert gate.waiting <= most_waiting
                assert not gate.waiting or gate.running == gate.limit, "nobody waits while there is room"
            await turns()
            assert gate.running == len(crowd.inside)
            assert gate.running == sum(place.running for place in gate._places.values())
            assert gate.waiting == sum(place.waiting for place in gate._places.values())
        await crowd.all_go()
        assert (gate.running, gate.waiting) == (0, 0)
        assert not gate._places
        assert not gate._queued

    asyncio.run(run())
