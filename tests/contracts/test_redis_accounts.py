"""Accounts on Redis, where memory has nothing to compare: the calendar, repeats, leases, and outages."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from typing import Any, Literal, NamedTuple

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from service.config import BudgetConfig, LimitConfig
from service.domain import Cost, Outcome, Principal, RequestRecord, Usage
from service.errors import (
    BudgetExceeded,
    BudgetReserved,
    RateLimited,
    StateUnavailable,
    WeirError,
)
from service.ports import Demand, Reservation
from service.rules import NANO, Rulebook
from service.stores.memory_accounts import MemoryAccounts
from service.stores.memory_book import MemoryUsageBook
from service.stores.redis.accounts import ABANDONED_RECORD_MS, ID_LETTERS
from service.stores.redis.address import make_client
from service.stores.redis.book import RedisUsageBook
from service.stores.redis.fleet import Fleet, FleetAccounts
from service.stores.redis.keys import FLEET, Keys
from service.stores.redis.link import Link, Script
from service.stores.redis.scripts import EXPIRED, RELEASE, SETTLE
from service.usage import increments
from tests.contracts.test_accounts import MODEL, OnRedis, budget, demand, ended, limit, record
from tests.contracts.test_stores import ANNA, BERT, ELSEWHERE, HOUR, make_link
from tests.redis_servers import ClusterSet, Servers, Single

KEYS = Keys("weir:")
BEGINNING = datetime(2026, 1, 1, tzinfo=UTC)
SOON = 0.01
"""A lease that has ended by the time that anybody looks."""


async def eventually(condition: Callable[[], Awaitable[Any]], complaint: str, seconds: float = 20.0) -> Any:
    """What `condition` returns, once it is true."""
    began = time.monotonic()
    while not (found := await condition()):
        assert time.monotonic() - began < seconds, complaint
        await asyncio.sleep(0.02)
    return found


class Process(NamedTuple):
    """What one process has of the fleet's accounts."""

    fleet: Fleet
    accounts: FleetAccounts

    @property
    def link(self) -> Link:
        return self.fleet.link

    async def begin(self, asked: Demand, principal: Principal = ANNA) -> tuple[RequestRecord, Reservation]:
        begun = record(principal, request_model=asked.model)
        return begun, await self.accounts.reserve(begun, asked)

    async def swept(self, count: int) -> None:
        """Sweeps until so many were settled; a lease ends by whole seconds."""
        left = count

        async def some() -> bool:
            nonlocal left
            left -= await self.fleet.leases.sweep()
            return left <= 0

        await eventually(some, f"{left} of {count} were not swept")
        assert left == 0, "more than had been left behind"


class Place:
    """Makes processes on one Redis, and looks at what they leave there."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._fleets: list[Fleet] = []
        self.client: Any = make_client(url, timeout_seconds=5, max_connections=4)

    async def process(
        self,
        *limits: LimitConfig,
        budgets: tuple[BudgetConfig, ...] = (),
        lease_seconds: float = 60.0,
        mode: Literal["share", "open", "closed"] = "share",
        sharers: int = 1,
        timeout_seconds: float = 0.5,
        looks: bool = False,
    ) -> Process:
        """`looks`: after its leases and those of others by itself, as the service does."""
        client = make_client(self._url, timeout_seconds=timeout_seconds, max_connections=20)
        fleet = Fleet(
            client,
            prefix="weir:",
            timeout_seconds=timeout_seconds,
            max_connections=20,
            backlog_writes=1_000,
            rules=Rulebook(limits, budgets),
            ledger_records=1_000,
            lease_seconds=lease_seconds,
        )
        accounts = FleetAccounts(fleet, mode, sharers)
        if looks:
            await fleet.open()
        else:
            await fleet.link.start()
            fleet.backlog.start()
        assert fleet.link.available
        self._fleets.append(fleet)
        return Process(fleet, accounts)

    async def close(self) -> None:
        for fleet in self._fleets:
            await fleet.close()
        await self.client.aclose()

    async def records(self, tenant: str = "team") -> list[RequestRecord]:
        entries = await self.client.xrange(KEYS.ledger(tenant))
        return [msgspec.json.decode(fields[b"record"], type=RequestRecord) for _, fields in entries]

    async def state(self) -> dict[str, Any]:
        """All keys and what is in them, but for the probe's."""
        found: dict[str, Any] = {}
        async for name in self.client.scan_iter(match="weir:*", count=1000):
            read = {
                b"string": self.client.get,
                b"hash": self.client.hgetall,
                b"set": self.client.smembers,
                b"zset": lambda key: self.client.zrange(key, 0, -1, withscores=True),
                b"stream": self.client.xrange,
            }[await self.client.type(name)]
            if not name.endswith((b"probe", b"sweeper")):
                found[name.decode()] = await read(name)
        return found

    async def held(self) -> dict[str, Any]:
        """What is held for requests under way: nothing may be once all have ended."""
        state = await self.state()
        held = {k: v for k, v in state.items() if k.endswith(("open", "leases")) or ":concurrent:" in k}
        return held | {k: v for k, v in state.items() if ":budget:" in k and b"held" in v}


@pytest.fixture(params=("redis_single", "redis_cluster"))
async def place(request: pytest.FixtureRequest) -> AsyncIterator[Place]:
    servers: Servers = request.getfixturevalue(request.param)
    servers.restore()
    servers.flush()
    made = Place(servers.url)
    yield made
    await made.close()


@pytest.fixture
async def alone(redis_single: Single) -> AsyncIterator[Place]:
    made = Place(redis_single.url)
    yield made
    await made.close()


# -- the calendar --------------------------------------------------------------------------------

_CLOCK = files("service.stores.redis").joinpath("clock.lua").read_text(encoding="utf-8")
_PERIODS = Script(
    _CLOCK
    + """
local found = {}
for place = 2, #ARGV do
  local number, left = period_at(tonumber(ARGV[place]), ARGV[1])
  found[#found + 1] = number
  found[#found + 1] = left
end
return found
"""
)


def _moments() -> list[int]:
    """Random ones of a century, and the seconds around the ends of all its days of change."""
    chance = random.Random(20261125)
    found = [chance.randrange(100 * 366 * 86_400) for _ in range(4_000)]
    for month in range(100 * 12):
        first = datetime(2026 + month // 12, month % 12 + 1, 1, tzinfo=UTC)
        at = round((first - BEGINNING).total_seconds())
        found += [max(at + away, 0) for away in (-86_400, -1, 0, 1, 86_399)]
        last_of_february = datetime(first.year, 2, 28, 23, 59, 59, tzinfo=UTC)
        found.append(round((last_of_february - BEGINNING).total_seconds()))
    return [round(BEGINNING.timestamp()) + seconds for seconds in found]


async def test_the_scripts_calendar_is_the_worlds(redis_single: Single) -> None:
    link = make_link(redis_single.url, 10.0)
    await link.start()
    moments = _moments()
    for period in ("day", "month"):
        for some in range(0, len(moments), 2_000):
            asked = moments[some : some + 2_000]
            found = await link.run(_PERIODS, ["weir:x"], [period, *asked])
            for moment, number, left in zip(asked, found[::2], found[1::2], strict=True):
                at = datetime.fromtimestamp(moment, tz=UTC)
                day = at.replace(hour=0, minute=0, second=0)
                if period == "day":
                    expected, end = moment // 86_400, day + timedelta(days=1)
                else:
                    expected = at.year * 12 + at.month
                    end = (day.replace(day=1) + timedelta(days=32)).replace(day=1)
                assert (number, left) == (expected, round(end.timestamp()) - moment), at
    await link.close()


# -- the same as in memory -----------------------------------------------------------------------

PEOPLE = (ANNA, BERT, ELSEWHERE)
MODELS = ("gpt-4o", "gpt-4o-mini")
RULES = Rulebook(
    [
        limit("all", per=("model",), requests=30, tokens=4_000, window=HOUR),
        limit("mine", requests=12, window=HOUR),
        limit("ours", per=("tenant", "model"), tokens=2_000, concurrent=4, window=HOUR),
        limit("at-a-time", per=("key",), concurrent=3),
        limit("fleet", per=(), concurrent=6),
    ],
    [
        budget("hard", usd=1.0, period="day"),
        budget("own", usd=0.6, per="key", warn_at=0.5),
        budget("soft", usd=0.5, hard=False, period="day"),
    ],
)


class _Begin(NamedTuple):
    who: int
    model: int
    tokens: int
    cents: int
    most_cents: int


class _End(NamedTuple):
    which: int
    tokens: int | None
    cents: int | None


begins = st.builds(
    _Begin, st.integers(0, 2), st.integers(0, 1), st.integers(0, 900), st.integers(0, 25), st.integers(0, 60)
)
ends = st.builds(_End, st.integers(0, 10), st.none() | st.integers(0, 2_500), st.none() | st.integers(0, 70))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(begins | ends, min_size=5, max_size=50))
@example(steps=[_Begin(0, 0, 10, 0, 0)] * 13)
@example(steps=[_Begin(0, 0, 900, 1, 1), _End(0, 30_000, 10), _Begin(0, 0, 1, 1, 1)])
@example(steps=[step for n in range(20) for step in (_Begin(n % 3, 0, 150, 20, 25), _End(0, 160, 20))])
def test_redis_decides_as_memory_does(redis_single: Single, steps: list[_Begin | _End]) -> None:
    redis_single.flush()
    asyncio.run(_both(redis_single.url, steps))


async def _both(url: str, steps: list[_Begin | _End]) -> None:
    link = make_link(url)
    await link.start()
    book = MemoryUsageBook()
    memory, redis = MemoryAccounts(RULES, book=book), OnRedis(link, RULES)
    running: list[tuple[RequestRecord, Reservation, Reservation]] = []
    for step in steps:
        if isinstance(step, _Begin):
            begun = record(PEOPLE[step.who], request_model=MODELS[step.model])
            asked = Demand(
                MODELS[step.model],
                tokens=step.tokens,
                usd=step.cents / 100,
                most_usd=step.most_cents / 100,
            )
            here, there = await _tried(memory, begun, asked), await _tried(redis, begun, asked)
            if isinstance(here, Reservation) and isinstance(there, Reservation):
                _check_same(here, there)
                running.append((begun, here, there))
            else:
                assert isinstance(here, WeirError), "Redis refused what memory let through"
                assert isinstance(there, WeirError), "memory refused what Redis let through"
                assert (type(here), here.message) == (type(there), there.message)
                _check_same_refusal(here, there)
                assert there.retry_after_seconds == pytest.approx(here.retry_after_seconds, abs=2.0)
                begun.outcome = here.outcome
                await memory.settle(begun, None)
                await redis.settle(begun, None)
        elif running:
            begun, here, there = running.pop(step.which % len(running))
            if step.tokens is not None:
                begun.usage = Usage(step.tokens // 3, step.tokens - step.tokens // 3)
            if step.cents is not None:
                begun.cost = Cost(step.cents / 100, "table")
            begun.outcome = Outcome.SUCCESS
            await memory.settle(begun, here)
            await redis.settle(begun, there)
    for begun, here, there in running:
        begun.outcome = Outcome.TIMEOUT
        await memory.settle(begun, here)
        await redis.settle(begun, there)
    await _check_same_books(link, book, memory)
    await link.close()


async def _tried(accounts: Any, begun: RequestRecord, asked: Demand) -> Reservation | WeirError:
    try:
        reservation: Reservation = await accounts.reserve(begun, asked)
    except WeirError as refused:
        return refused
    return reservation


def _check_same_refusal(here: WeirError, there: WeirError) -> None:
    mine, theirs = getattr(here, "standing", None), getattr(there, "standing", None)
    assert (mine is None) == (theirs is None)
    if mine is not None and theirs is not None:
        assert mine.budgets == theirs.budgets
        assert len(mine.budgets) == (here.outcome is Outcome.BUDGET_REJECTED)


def _check_same(here: Reservation, there: Reservation) -> None:
    assert there.standing.budgets == here.standing.budgets
    for mine, theirs in (
        (here.standing.requests, there.standing.requests),
        (here.standing.tokens, there.standing.tokens),
    ):
        assert mine is not None
        assert theirs is not None
        assert (theirs.limit, theirs.remaining) == (mine.limit, mine.remaining)
        assert theirs.reset_seconds == pytest.approx(mine.reset_seconds, abs=2.0)


async def _check_same_books(link: Link, book: MemoryUsageBook, memory: MemoryAccounts) -> None:
    there = RedisUsageBook(link)
    until = int(time.time()) + 86_400
    for tenant in {person.tenant for person in PEOPLE}:
        for unit, since in (("hour", until - 3 * 86_400), ("day", until - 3 * 86_400)):
            mine = await book.rows(tenant, since, until, unit)  # type: ignore[arg-type]
            theirs = await there.rows(tenant, since, until, unit)  # type: ignore[arg-type]
            assert sorted(mine, key=str) == sorted(theirs, key=str)
        entries: Any = await link.client.xrange(KEYS.ledger(tenant))
        entered = [msgspec.json.decode(fields[b"record"], type=RequestRecord) for _, fields in entries]
        assert entered == [r for r in memory.records if r.principal.tenant == tenant]
        sums = Counter[str]()
        for one in entered:
            sums.update(dict(increments(one)))
        days: Counter[str] = Counter()
        async for name in link.client.scan_iter(match=f"{KEYS.counter(tenant, 'day')}:*"):
            read: Any = await link.client.hgetall(name)
            days.update({what.decode(): int(number) for what, number in read.items()})
        assert days == sums
    left: Any = [name async for name in link.client.scan_iter(match="weir:*concurrent*")]
    assert left == [], "all have ended"


# -- once and once more --------------------------------------------------------------------------

EVERYTHING = (
    limit("r", requests=5, window=HOUR),
    limit("t", per=("tenant",), tokens=1_000, window=HOUR),
    limit("c", concurrent=2),
    limit("f", per=("model",), requests=50, tokens=5_000, concurrent=9, window=HOUR),
)
DOLLARS = (budget("month"), budget("soft", per="key", hard=False, period="day"))
ASKED = Demand(MODEL, tokens=300, usd=0.1, most_usd=0.4)


async def test_to_reserve_and_to_settle_once_more_changes_nothing(place: Place) -> None:
    one = await place.process(*EVERYTHING, budgets=DOLLARS)
    begun, reservation = await one.begin(ASKED)
    reserved = await place.state()
    for _ in range(3):
        again = await one.accounts.reserve(begun, ASKED)
        assert await place.state() == reserved
        assert again.standing.budgets == reservation.standing.budgets
    for _ in range(3):
        await one.accounts.settle(ended(begun, 120, 0.05), reservation)
        assert await place.held() == {}
    settled = await place.state()
    assert await place.records() == [begun]
    assert settled[f"{KEYS.counter('team', 'budget:month:month:')}"][b"spent"] == b"50000000"
    _, after = await one.begin(ASKED)
    assert after.standing.tokens is not None
    assert after.standing.tokens.remaining == 1_000 - 120 - 300
    assert after.standing.budgets[0].used_ratio == pytest.approx(0.05)
    assert (await place.state())[f"{KEYS.counter('team', 'concurrent:c::anna')}"] == b"1"


async def test_what_nobody_could_set_aside_is_charged_once(place: Place) -> None:
    """Redis was away when it began."""
    one = await place.process(*EVERYTHING, budgets=DOLLARS)
    store, late = one.fleet.accounts, ended(record(), 400, 0.3)
    plans = store.plans_for(late, ASKED)
    for _ in range(3):
        for keys, arguments in store.settling(late, plans):
            await one.link.run(SETTLE, keys, arguments)
    _, reservation = await one.begin(ASKED)
    assert reservation.standing.tokens is not None
    assert reservation.standing.tokens.remaining == 1_000 - 400 - 300
    assert [b.used_ratio for b in reservation.standing.budgets] == pytest.approx([0.3, 0.3])
    assert await place.records() == [late]


async def test_release_gives_everything_back(place: Place) -> None:
    one = await place.process(*EVERYTHING, budgets=DOLLARS)
    store, begun = one.fleet.accounts, record()
    plans = store.plans_for(begun, ASKED)
    before = await place.state()
    await store.reserve(begun, ASKED, plans)
    assert len(await place.state()) > len(before) + 8
    for plan in plans:
        assert await one.link.run(RELEASE, plan.keys[:2], [begun.id]) == 1
        assert await one.link.run(RELEASE, plan.keys[:2], [begun.id]) == 0
    assert await place.state() == before


async def test_what_the_fleet_refuses_takes_nothing_of_the_tenants(place: Place) -> None:
    one = await place.process(
        limit("mine", requests=3, tokens=1_000, concurrent=3, window=HOUR),
        limit("all", per=("model",), concurrent=1),
        budgets=(budget(),),
    )
    running, reservation = await one.begin(ASKED)
    before = await place.state()
    for _ in range(5):
        refused = record()
        with pytest.raises(RateLimited, match="`all`"):
            await one.accounts.reserve(refused, ASKED)
        counters = await place.state()
        due = next(k for k in before if ":requests:mine" in k), next(k for k in before if ":tokens:mine" in k)
        for name in due:
            assert int(counters[name]) <= int(before[name])
        assert {k: v for k, v in counters.items() if k not in due} == {
            k: v for k, v in before.items() if k not in due
        }
    await one.accounts.settle(ended(running, 10, 0.01), reservation)
    assert await place.held() == {}


@pytest.mark.parametrize(
    "asked",
    [
        Demand(MODEL, tokens=0),
        Demand(MODEL, tokens=10**30, usd=1e300, most_usd=1e308),
        Demand(MODEL, tokens=1, usd=0.01, most_usd=float("inf")),
    ],
)
async def test_whatever_a_caller_asks_for_nothing_overflows(alone: Place, asked: Demand) -> None:
    one = await alone.process(limit(tokens=100, window=HOUR), budgets=(budget(hard=False), budget("h")))
    begun = record()
    try:
        reservation = await one.accounts.reserve(begun, asked)
    except BudgetExceeded:
        assert asked.usd > 1.0
        reservation = None
    await one.accounts.settle(ended(begun, 1_000_000_000, 1_000_000.0), reservation)
    assert await alone.held() == {}
    assert await alone.records() == [begun]


async def test_sums_are_those_of_the_records(place: Place) -> None:
    """Whatever was settled again; the sums of an hour are those of the records that began in it."""
    one = await place.process()
    chance = random.Random(7)
    now = time.time()
    for _ in range(60):
        one_record = record(chance.choice([ANNA, BERT]), request_model=chance.choice(MODELS))
        one_record.started_at = now - chance.choice([0, 3_600, 86_400])
        if chance.random() < 0.8:
            ended(one_record, chance.randrange(2_000), chance.choice([None, 0.1, 1e-9, 12.345678901]))
        for _ in range(chance.randint(1, 3)):
            await one.accounts.settle(one_record, None)
    records = await place.records()
    assert len(records) == 60
    expected: dict[str, Counter[str]] = {}
    for entered in records:
        for name in KEYS.sums("team", int(entered.started_at // 3600)):
            expected.setdefault(name, Counter()).update(dict(increments(entered)))
    state = await place.state()
    sums = {k: v for k, v in state.items() if ":hour:" in k or ":day:" in k}
    assert {k: {n.decode(): int(v) for n, v in found.items()} for k, found in sums.items()} == expected


# -- leases --------------------------------------------------------------------------------------


async def test_what_a_vanished_process_held_is_free_again_and_recorded_once(place: Place) -> None:
    gone = await place.process(*EVERYTHING, budgets=DOLLARS, lease_seconds=SOON)
    left = [(await gone.begin(ASKED, who))[0] for who in (ANNA, BERT, ELSEWHERE)]
    other = await place.process(*EVERYTHING, budgets=DOLLARS)
    running, reservation = await other.begin(ASKED)
    with pytest.raises(RateLimited, match="at the same time"):
        await other.begin(demand())
    await other.swept(3 * 2)  # the tenant's part of each, and the fleet's
    assert await other.fleet.leases.sweep() == 0
    found = [*await place.records("team"), *await place.records("other team")]
    assert {r.id for r in found} == {r.id for r in left}
    assert len(found) == 3
    for entered in found:
        assert (entered.outcome, entered.error_code) == (Outcome.INTERNAL_ERROR, "abandoned")
        assert entered.usage is None
        assert entered.request_model == MODEL
    state = await place.state()
    assert state[KEYS.counter("team", "concurrent:c::anna")] == b"1", "the one that runs"
    assert state[KEYS.counter(FLEET, f"concurrent:f::{MODEL}")] == b"1"
    assert set(state[KEYS.open("team")]) == set(state[KEYS.open(FLEET)]) == {running.id.encode()}
    for name in KEYS.sums("team", int(left[0].started_at // 3600)):
        assert sum(int(v) for n, v in state[name].items() if n.endswith(b"|errors")) == 2
    assert state[KEYS.counter("team", "budget:month:month:")] == {b"held": b"400000000"}
    await other.accounts.settle(ended(running), reservation)
    assert await place.held() == {}


async def test_a_lease_that_is_renewed_is_left_alone(place: Place) -> None:
    gone = await place.process(*EVERYTHING, lease_seconds=SOON)
    alive = await place.process(*EVERYTHING, lease_seconds=SOON)
    await gone.begin(ASKED, BERT)
    kept, reservation = await alive.begin(ASKED)
    alive.fleet.accounts.lease_ms = 60_000
    await alive.fleet.leases.look()
    await alive.swept(2)
    assert [r.principal for r in await place.records()] == [BERT]
    await alive.accounts.settle(ended(kept, 5), reservation)
    assert [r.error_code for r in await place.records()] == ["abandoned", None]
    assert await place.held() == {}


async def test_processes_look_after_their_own_and_after_each_other(alone: Place) -> None:
    """By themselves, as the service runs them: three of them, one of which vanishes."""
    gone = await alone.process(*EVERYTHING, budgets=DOLLARS, lease_seconds=SOON)
    others = [
        await alone.process(*EVERYTHING, budgets=DOLLARS, lease_seconds=3.0, looks=True) for _ in range(2)
    ]
    lost = [(await gone.begin(ASKED, who))[0].id for who in (ANNA, BERT)]
    running = [await other.begin(ASKED, ELSEWHERE) for other in others]

    async def recorded() -> bool:
        return len(await alone.records()) >= 2

    await eventually(recorded, "what was left behind was not settled")
    assert sorted(r.id for r in await alone.records()) == sorted(lost)
    assert await alone.records("other team") == [], "those that run are not abandoned"
    for other, (begun, reservation) in zip(others, running, strict=True):
        await other.accounts.settle(ended(begun, 3), reservation)
    assert [r.error_code for r in await alone.records("other team")] == [None, None]

    async def free() -> bool:
        return await alone.held() == {}

    await eventually(free, "something is held for nobody")
    assert len(await alone.records()) == 2


async def test_one_process_at_a_time_looks(place: Place) -> None:
    several = [await place.process(lease_seconds=60) for _ in range(5)]
    for _ in range(5):
        turns = await asyncio.gather(*(one.fleet.leases._my_turn() for one in several))
        assert sum(turns) <= 1
    assert await place.client.pttl(KEYS.sweeper()) > 0


async def test_what_a_process_used_that_was_not_gone_after_all_counts_once(place: Place) -> None:
    """It was held up, or cut off from Redis: its record comes late and takes the abandoned one's place."""
    slow = await place.process(*EVERYTHING, budgets=DOLLARS, lease_seconds=SOON)
    other = await place.process(*EVERYTHING, budgets=DOLLARS)
    begun, reservation = await slow.begin(ASKED)
    await other.swept(2)
    await slow.accounts.settle(ended(begun, 50, 0.2), reservation)
    after = await place.state()
    for _ in range(2):
        await slow.accounts.settle(begun, reservation)
    assert await place.state() == after
    entered = [(r.id, r.error_code) for r in await place.records()]
    assert entered == [(begun.id, "abandoned"), (begun.id, None)]
    standing = (await other.begin(demand()))[1].standing
    assert [round(budget.remaining_usd, 6) for budget in standing.budgets] == [
        round(budget.usd - 0.2, 6) for budget in DOLLARS
    ]
    _, day = KEYS.sums("team", int(time.time() // 3600))
    counted = {what.decode(): int(number) for what, number in (await place.client.hgetall(day)).items()}
    assert counted[f"anna|{MODEL}|input_tokens"] == 50
    assert counted[f"anna|{MODEL}|cost_nano_usd"] == 200_000_000
    assert sum(number for what, number in counted.items() if what.endswith("|requests")) == 1


async def test_other_records_do_not_make_it_forgotten_sooner(place: Place) -> None:
    slow = await place.process(*EVERYTHING, lease_seconds=SOON)
    begun, reservation = await slow.begin(ASKED)
    other = await place.process(*EVERYTHING)
    await other.swept(2)
    beside = ended(record())
    beside.id = begun.id[:-ID_LETTERS] + beside.id[-ID_LETTERS:]  # of the same minute
    await other.accounts.settle(beside, None)
    entered = KEYS.entered("team", int(begun.id[:12], 16) // 60_000)
    assert await place.client.pttl(entered) > ABANDONED_RECORD_MS - 60_000
    for _ in range(2):
        await slow.accounts.settle(ended(begun), reservation)
    assert len(await place.records()) == 3, "abandoned, beside it, and the real one once"


async def test_two_that_sweep_at_once_and_a_late_end_make_one_record(place: Place) -> None:
    slow = await place.process(*EVERYTHING, budgets=DOLLARS, lease_seconds=SOON)
    sweepers = [await place.process(*EVERYTHING, budgets=DOLLARS) for _ in range(3)]
    for _ in range(3):
        begun, reservation = await slow.begin(ASKED)

        async def expired() -> Any:
            where = [KEYS.open("team"), KEYS.leases("team")]
            return await slow.link.run(EXPIRED, where, [1])  # ends before the next round

        await eventually(expired, "its lease does not end")
        await asyncio.gather(
            *(one.fleet.leases.sweep() for one in sweepers),
            slow.accounts.settle(ended(begun, 10, 0.01), reservation),
            *(one.fleet.leases.sweep() for one in sweepers),
        )
        entered = [r.error_code for r in await place.records() if r.id == begun.id]
        assert entered in ([None], ["abandoned", None]), "the real one last, and once"

    async def free() -> bool:
        await sweepers[0].fleet.leases.sweep()
        return await place.held() == {}

    await eventually(free, "something is held for nobody")
    _, day = KEYS.sums("team", int(time.time() // 3600))
    counted = {what.decode(): int(number) for what, number in (await place.client.hgetall(day)).items()}
    assert counted[f"anna|{MODEL}|requests"] + counted.get("anna||requests", 0) == 3


async def test_a_record_that_nobody_can_read_does_not_keep_the_others(alone: Place) -> None:
    gone = await alone.process(limit(concurrent=2), lease_seconds=SOON)
    unreadable, _ = await gone.begin(demand())
    later = (await alone.state())[KEYS.open("team")][unreadable.id.encode()]
    await alone.client.hset(
        KEYS.open("team"), unreadable.id, later.replace(b'"operation":"chat/', b'"operation":"soup/')
    )
    readable, _ = await gone.begin(demand())
    other = await alone.process(limit(concurrent=2))
    await other.swept(1)
    assert [r.id for r in await alone.records()] == [readable.id]


async def test_tenants_are_named_again_to_a_redis_that_lost_them(alone: Place) -> None:
    one = await alone.process(limit(concurrent=2))
    running, reservation = await one.begin(demand())
    await one.accounts.settle(record(ELSEWHERE), None)  # never reserved: its ledger is one all the same
    await alone.client.flushall()
    await one.accounts.settle(ended(running), reservation)
    await one.fleet.leases.look()
    assert await alone.client.smembers(KEYS.tenants()) == {b"team", b"other team"}


async def test_many_leases_are_renewed_and_swept(alone: Place) -> None:
    gone = await alone.process(limit(concurrent=2_000), lease_seconds=SOON, timeout_seconds=10)
    await asyncio.gather(*(gone.begin(demand()) for _ in range(1_100)))
    assert len(gone.fleet.leases) == 1_100
    gone.fleet.accounts.lease_ms = 60_000
    await gone.fleet.leases.look()
    assert await gone.fleet.leases.sweep() == 0
    gone.fleet.accounts.lease_ms = 1
    await gone.fleet.leases.look()
    await gone.swept(1_100)
    assert await alone.client.xlen(KEYS.ledger("team")) >= 1_000


# -- callers who leave ---------------------------------------------------------------------------


async def test_a_reservation_that_is_given_up_on_its_way_holds_nothing(
    redis_single: Single, alone: Place
) -> None:
    one = await alone.process(*EVERYTHING, budgets=DOLLARS, lease_seconds=SOON, timeout_seconds=5)
    warm, reservation = await one.begin(ASKED)
    await one.accounts.settle(ended(warm), reservation)
    begun = record()
    redis_single.freeze()
    reserving = asyncio.create_task(one.accounts.reserve(begun, ASKED))
    await asyncio.sleep(0)
    for _ in range(5):
        await asyncio.sleep(0.01)
    reserving.cancel()
    await asyncio.gather(reserving, return_exceptions=True)
    settling = asyncio.create_task(one.accounts.settle(begun, None))
    redis_single.thaw()
    await settling
    assert len(one.fleet.leases) == 0

    async def free() -> bool:
        await one.fleet.leases.sweep()
        return await alone.held() == {}

    await eventually(free, "something is held for a caller who left")
    assert [r.id for r in await alone.records()] == [warm.id, begun.id]


async def test_an_end_that_is_cut_short_is_entered_everywhere(redis_single: Single, alone: Place) -> None:
    """Nothing is left to the sweep: its lease is long."""
    one = await alone.process(*EVERYTHING, budgets=DOLLARS, timeout_seconds=5)
    begun, reservation = await one.begin(ASKED)
    redis_single.freeze()
    settling = asyncio.create_task(one.accounts.settle(ended(begun, 20, 0.02), reservation))
    for _ in range(5):
        await asyncio.sleep(0.01)
    settling.cancel()
    await asyncio.gather(settling, return_exceptions=True)
    redis_single.thaw()

    async def free() -> bool:
        return await alone.held() == {}

    await eventually(free, "something is held for a request that has ended")
    assert await alone.records() == [begun]


async def test_a_reservation_whose_answer_came_late_is_settled_once(
    redis_single: Single, alone: Place
) -> None:
    """It is counted here instead, and there too: what was used is charged once, and nothing is held."""
    one = await alone.process(*EVERYTHING, budgets=DOLLARS, lease_seconds=SOON, timeout_seconds=0.2)
    warm, reservation = await one.begin(ASKED)
    await one.accounts.settle(ended(warm, 10, 0.01), reservation)
    redis_single.freeze()
    begun, late = await one.begin(ASKED)
    assert late.standing.requests is not None
    redis_single.thaw()
    await one.accounts.settle(ended(begun, 30, 0.03), late)

    async def free() -> bool:
        with suppress(StateUnavailable):
            await one.fleet.leases.sweep()
        return len(one.fleet.backlog) == 0 and await alone.held() == {}

    await eventually(free, "something is held for a request that has ended")
    assert await alone.records() == [warm, begun]
    spent = (await alone.state())[KEYS.counter("team", "budget:month:month:")][b"spent"]
    assert int(spent) == 4 * NANO // 100


# -- while Redis is away -------------------------------------------------------------------------


async def gone(process: Process, servers: Single) -> None:
    """Redis is killed, and the process has noticed it."""
    servers.kill()

    async def noticed() -> bool:
        with suppress(StateUnavailable):
            await process.link.run(EXPIRED, ["weir:x", "weir:y"], [1])
        return not process.link.available

    await eventually(noticed, "it is not noticed")


async def back(process: Process, servers: Single) -> None:
    servers.restart()
    await asyncio.wait_for(process.link.back.wait(), 20)

    async def written() -> bool:
        return len(process.fleet.backlog) == 0

    await eventually(written, "what waited is not written")


async def test_without_redis_each_has_its_share(redis_single: Single, alone: Place) -> None:
    rules = (limit("r", requests=10, window=HOUR), limit("t", per=("tenant",), tokens=100, window=HOUR))
    one = await alone.process(*rules, sharers=4)
    begun, reservation = await one.begin(demand(tokens=1))
    await one.accounts.settle(ended(begun, 1), reservation)
    await gone(one, redis_single)
    running = [await one.begin(demand(tokens=5)) for _ in range(3)]  # ceil(10 / 4)
    with pytest.raises(RateLimited, match="`r`"):
        await one.begin(demand(tokens=5))
    with pytest.raises(RateLimited, match="`t`"):
        await one.begin(demand(tokens=20), BERT)  # ceil(100 / 4) - 3 * 5
    for started, held in running:
        await one.accounts.settle(ended(started, 20), held)
    with pytest.raises(RateLimited, match="`t`"):
        await one.begin(demand(tokens=1), BERT)  # 60 were used
    assert len(one.fleet.backlog) == 3
    await back(one, redis_single)
    _, after = await one.begin(demand(tokens=1), BERT)
    assert after.standing.tokens is not None
    assert after.standing.tokens.remaining == 100 - 1 - 60 - 1, "what was used meanwhile is charged"
    assert after.standing.requests is not None
    assert (after.standing.requests.limit, after.standing.requests.remaining) == (10, 9)
    assert len(await alone.records()) == 4


async def test_places_of_the_time_without_redis_are_of_that_time_alone(
    redis_single: Single, alone: Place
) -> None:
    one = await alone.process(limit(concurrent=4), sharers=2)
    before = await one.begin(demand())
    await gone(one, redis_single)
    meanwhile = [await one.begin(demand()) for _ in range(2)]
    with pytest.raises(RateLimited):
        await one.begin(demand())
    await one.accounts.settle(ended(meanwhile[0][0]), meanwhile[0][1])
    again = await one.begin(demand())
    await back(one, redis_single)
    after = [await one.begin(demand()) for _ in range(3)]
    with pytest.raises(RateLimited):
        await one.begin(demand())
    for started, held in (before, meanwhile[1], again, *after):
        await one.accounts.settle(ended(started), held)
    assert await alone.held() == {}
    assert len(await alone.records()) == 7


async def test_without_redis_a_budget_is_the_share_of_what_was_left(
    redis_single: Single, alone: Place
) -> None:
    one = await alone.process(budgets=(budget(usd=10.0),), sharers=4)
    spent, reservation = await one.begin(demand(usd=6.0, most_usd=6.0))
    await one.accounts.settle(ended(spent, 1, 6.0), reservation)
    await one.begin(demand())  # it sees that 4 are left
    await gone(one, redis_single)
    with pytest.raises(BudgetExceeded):
        await one.begin(demand(usd=1.01, most_usd=1.01))  # of 4 / 4
    meanwhile = await one.begin(demand(usd=0.7, most_usd=0.7))
    with pytest.raises(BudgetReserved):
        await one.begin(demand(usd=0.7, most_usd=0.7))
    await one.accounts.settle(ended(meanwhile[0], 1, 0.9), meanwhile[1])
    with pytest.raises(BudgetExceeded):
        await one.begin(demand(usd=0.2, most_usd=0.2))
    await back(one, redis_single)
    _, after = await one.begin(demand())
    assert after.standing.budgets[0].remaining_usd == pytest.approx(10 - 6 - 0.9)


async def test_open_lets_everybody_through_and_charges_it_later(redis_single: Single, alone: Place) -> None:
    one = await alone.process(*EVERYTHING, budgets=DOLLARS, mode="open", sharers=4)
    await gone(one, redis_single)
    meanwhile = [await one.begin(ASKED) for _ in range(20)]
    for started, held in meanwhile:
        await one.accounts.settle(ended(started, 10, 0.02), held)
    await back(one, redis_single)
    _, after = await one.begin(ASKED, BERT)
    assert after.standing.budgets[0].used_ratio == pytest.approx(0.4)
    assert after.standing.tokens is not None
    assert after.standing.tokens.remaining == 1_000 - 200 - 300
    assert len(await alone.records()) == 20


async def test_closed_lets_nobody_through_whom_a_rule_counts(redis_single: Single, alone: Place) -> None:
    one = await alone.process(limit("a", keys=["anna"], requests=5), mode="closed")
    await gone(one, redis_single)
    with pytest.raises(StateUnavailable) as refused:
        await one.begin(demand())
    assert refused.value.status == 503
    assert refused.value.retry_after_seconds
    started, held = await one.begin(demand(), BERT)
    await one.accounts.settle(ended(started), held)
    await back(one, redis_single)
    await one.begin(demand())
    assert [r.principal for r in await alone.records()] == [BERT]


async def test_a_budget_is_anew_for_each_outage(redis_single: Single, alone: Place) -> None:
    one = await alone.process(budgets=(budget(usd=10.0),), sharers=2)
    for left in (10.0, 9.0):
        await one.begin(demand())
        await gone(one, redis_single)
        with pytest.raises(BudgetExceeded):
            await one.begin(demand(usd=left / 2 + 0.01))
        started, held = await one.begin(demand(usd=1.0, most_usd=1.0))
        await one.accounts.settle(ended(started, 1, 1.0), held)
        await back(one, redis_single)


async def test_what_ran_when_redis_lost_all_is_charged(redis_single: Single, alone: Place) -> None:
    """A Redis that comes back empty has no reservation; nothing may go below zero."""
    one = await alone.process(*EVERYTHING, budgets=DOLLARS)
    running = [await one.begin(ASKED) for _ in range(2)]
    await alone.client.flushall()
    other = await one.begin(ASKED)
    for started, held in running:
        await one.accounts.settle(ended(started, 10, 0.02), held)
    state = await alone.state()
    assert state[KEYS.counter("team", "concurrent:c::anna")] == b"1"
    assert state[KEYS.counter("team", "budget:month:month:")][b"held"] == str(4 * NANO // 10).encode()
    await one.accounts.settle(ended(other[0], 10, 0.02), other[1])
    assert await alone.held() == {}
    spent = (await alone.state())[KEYS.counter("team", "budget:month:month:")][b"spent"]
    assert int(spent) == 3 * 2 * NANO // 100
    assert len(await alone.records()) == 3


def test_a_clusters_slots_hold_all_of_a_request(redis_cluster: ClusterSet) -> None:
    """Many tenants, so that all nodes have some, beside the fleet's own counters."""

    async def run() -> None:
        made = Place(redis_cluster.url)
        one = await made.process(*EVERYTHING[:3], budgets=DOLLARS, lease_seconds=SOON)
        people = [Principal("anna", f"team-{n}") for n in range(30)]
        for person in people:
            await one.begin(ASKED, person)
        await one.swept(30)
        for person in people:
            assert len(await made.records(person.tenant)) == 1
        assert await made.held() == {}
        await made.close()

    asyncio.run(run())


async def test_models_that_callers_make_up_fill_no_sums(
    alone: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.stores.redis.accounts.SUMS_MOST", 20)
    one = await alone.process()
    for number in range(50):
        made_up = ended(record(request_model=f"made-up-{number}"), 1)
        await one.accounts.settle(made_up, None)
    _, day = KEYS.sums("team", int(time.time() // 3600))
    counted = {what.decode(): int(number) for what, number in (await alone.client.hgetall(day)).items()}
    assert len(counted) <= 24
    assert sum(number for what, number in counted.items() if what.endswith("|requests")) == 50
    assert counted["anna|_other|requests"] > 30
