"""What every book of sums must say: in memory, on one Redis, behind Sentinels, on a cluster."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.domain import CacheUse, Cost, Operation, Outcome, Principal, RequestRecord, Usage
from service.errors import StateUnavailable
from service.ports import UsageBook, UsageRow
from service.stores.memory_book import MemoryUsageBook
from service.stores.redis import book as book_module
from service.stores.redis.book import RedisUsageBook
from service.stores.redis.keys import Keys
from service.stores.redis.link import Link
from service.usage import DAY, HOUR, SUMS, increments
from tests.contracts.conftest import FORMS
from tests.contracts.test_stores import make_link
from tests.redis_servers import Servers, Single

NOW = int(time.time() // DAY) * DAY + 12 * HOUR
TODAY = NOW // DAY * DAY
ANNA, BERT = Principal("anna", "team"), Principal("b|e%r/t é", "team")
ODD = Principal("anna", "{}: teäm\n")


class Shelf(NamedTuple):
    """A book, and the way in which what it is of comes to be."""

    book: UsageBook
    add: Callable[[RequestRecord], Awaitable[None]]


@pytest.fixture(params=("memory", *FORMS))
async def shelf(request: pytest.FixtureRequest) -> AsyncIterator[Shelf]:
    if request.param == "memory":
        yield in_memory()
        return
    servers: Servers = request.getfixturevalue(request.param)
    servers.restore()
    servers.flush()
    link = make_link(servers.url)
    await link.start()
    yield on_redis(link)
    await link.close()


def in_memory() -> Shelf:
    book = MemoryUsageBook(clock=lambda: NOW)

    async def add(record: RequestRecord) -> None:
        book.add(record)

    return Shelf(book, add)


def on_redis(link: Link) -> Shelf:
    """What settles a request writes the same; here it is written apart, so that any time can be filled."""
    keys = Keys(link.prefix)

    async def add(record: RequestRecord) -> None:
        tenant = record.principal.tenant
        for key in keys.sums(tenant, int(record.started_at // HOUR)):
            for name, number in increments(record):
                await link.client.hincrby(key, name, number)
        await link.client.sadd(keys.tenants(), tenant)

    return Shelf(RedisUsageBook(link), add)


def record(
    principal: Principal = ANNA, model: str = "gpt", at: float = NOW, *, tokens: int = 10
) -> RequestRecord:
    return RequestRecord(
        "id",
        "request",
        "/v1/chat/completions",
        Operation.CHAT,
        principal,
        started_at=at,
        request_model=model,
        outcome=Outcome.SUCCESS,
        usage=Usage(input_tokens=tokens),
        cost=Cost(0.25, "test"),
    )


def counted(rows: Sequence[UsageRow]) -> list[tuple[int, str, str, int, int]]:
    return sorted((row.at, row.key, row.model, row.requests, row.input_tokens) for row in rows)


async def test_rows_are_the_sums_of_each_key_and_model(shelf: Shelf) -> None:
    for _ in range(3):
        await shelf.add(record())
    await shelf.add(record(model="mistral/large|x"))
    await shelf.add(record(BERT))
    rows = await shelf.book.rows("team", TODAY, TODAY + DAY, "day")
    assert counted(rows) == [
        (TODAY, "anna", "gpt", 3, 30),
        (TODAY, "anna", "mistral/large|x", 1, 10),
        (TODAY, "b|e%r/t é", "gpt", 1, 10),
    ]
    assert {row.tenant for row in rows} == {"team"}
    assert [row.cost_nano_usd for row in rows if row.requests == 3] == [750_000_000]


async def test_hours_and_days_are_the_same_requests(shelf: Shelf) -> None:
    for hours in (0, 1, 5, 12):
        await shelf.add(record(at=NOW - hours * HOUR + 1.5))
    await shelf.add(record(at=TODAY - 0.001))
    hours_of_it = await shelf.book.rows("team", TODAY, TODAY + DAY, "hour")
    assert [row.at for row in hours_of_it] == [NOW - n * HOUR for n in (12, 5, 1, 0)]
    assert counted(await shelf.book.rows("team", TODAY - DAY, TODAY + DAY, "day")) == [
        (TODAY - DAY, "anna", "gpt", 1, 10),
        (TODAY, "anna", "gpt", 4, 40),
    ]


async def test_the_end_of_a_time_is_not_of_it(shelf: Shelf) -> None:
    for days in (0, 1, 2):
        await shelf.add(record(at=NOW - days * DAY))
    rows = await shelf.book.rows("team", TODAY - 2 * DAY, TODAY, "day")
    assert [row.at for row in rows] == [TODAY - 2 * DAY, TODAY - DAY]
    # A beginning within an hour or day: that began before.
    rows = await shelf.book.rows("team", TODAY - 2 * DAY + 1, TODAY + 1, "day")
    assert [row.at for row in rows] == [TODAY - DAY, TODAY]
    assert await shelf.book.rows("team", TODAY, TODAY, "day") == []


async def test_tenants_are_apart_and_all_are_named(shelf: Shelf) -> None:
    assert list(await shelf.book.tenants()) == []
    await shelf.add(record())
    await shelf.add(record(ODD))
    assert list(await shelf.book.tenants()) == ["team", ODD.tenant]
    for tenant in ("team", ODD.tenant):
        (row,) = await shelf.book.rows(tenant, TODAY, TODAY + DAY, "hour")
        assert (row.tenant, row.requests) == (tenant, 1)
    assert await shelf.book.rows("nobody", TODAY, TODAY + DAY, "hour") == []


async def test_all_that_is_kept_can_be_read_at_once(shelf: Shelf) -> None:
    """More hours and days than one call to Redis reads, and more fields."""
    for number in range(0, 840, 7):
        await shelf.add(record(model=f"m{number}", at=NOW - number * HOUR))
    rows = await shelf.book.rows("team", NOW - 839 * HOUR, NOW + HOUR, "hour")
    assert [row.at for row in rows] == [NOW - n * HOUR for n in range(833, -1, -7)]
    rows = await shelf.book.rows("team", TODAY - 399 * DAY, TODAY + DAY, "day")
    assert sum(row.requests for row in rows) == 120


async def test_a_call_that_meets_its_bound_goes_on_where_it_was(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(book_module, "MOST_FIELDS", 5)
    monkeypatch.setattr(book_module, "MOST_HASHES", 4)
    for hours in range(12):
        for model in range(hours % 4):
            await shelf.add(record(model=f"m{model}", at=TODAY + hours * HOUR))
    rows = await shelf.book.rows("team", TODAY, TODAY + DAY, "hour")
    assert Counter(row.at for row in rows) == {
        TODAY + hours * HOUR: hours % 4 for hours in range(12) if hours % 4
    }


records = st.builds(
    RequestRecord,
    id=st.just("id"),
    request_id=st.just("request"),
    route=st.just("/v1/chat/completions"),
    operation=st.just(Operation.CHAT),
    principal=st.sampled_from([ANNA, BERT]),
    started_at=st.integers(TODAY, NOW - 1).map(float),
    request_model=st.sampled_from(["gpt", "a|b", ""]),
    outcome=st.sampled_from(list(Outcome)),
    usage=st.none() | st.builds(Usage, *(st.integers(0, 10**12) for _ in range(5))),
    cost=st.builds(Cost, st.none() | st.floats(0, 1e6), st.just("test")),
    cache=st.none() | st.sampled_from(list(CacheUse)),
)


@given(made=st.lists(records, max_size=8))
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
async def test_both_books_agree(redis_single: Single, made: list[RequestRecord]) -> None:
    redis_single.flush()
    link = make_link(redis_single.url)
    await link.start()
    shelves = [in_memory(), on_redis(link)]
    for one in made:
        for shelf in shelves:
            await shelf.add(one)
    for unit in ("hour", "day"):
        here, there = [await shelf.book.rows("team", TODAY, TODAY + DAY, unit) for shelf in shelves]
        assert sorted(map(repr, here)) == sorted(map(repr, there))
        assert sum(row.requests for row in here) == len(made)
        assert sum(row.input_tokens for row in here) == sum(r.usage.input_tokens for r in made if r.usage)
    await link.close()


async def test_fields_of_a_later_version_are_left_alone(redis_single: Single) -> None:
    link = make_link(redis_single.url)
    await link.start()
    key = Keys(link.prefix).sums("team", NOW // HOUR)[1]
    await link.client.hset(key, "anna|gpt|images", 3)
    await link.client.hset(key, "anna|gpt|requests", 2)
    (row,) = await RedisUsageBook(link).rows("team", TODAY, TODAY + DAY, "day")
    assert (row.key, row.model, row.requests) == ("anna", "gpt", 2)
    assert set(SUMS) < set(row.__struct_fields__)
    await link.close()


async def test_without_redis_a_book_says_so() -> None:
    link = make_link("redis://127.0.0.1:1", timeout_seconds=0.2)
    await link.start()
    with pytest.raises(StateUnavailable):
        await RedisUsageBook(link).rows("team", TODAY, TODAY + DAY, "day")
    with pytest.raises(StateUnavailable):
        await RedisUsageBook(link).tenants()
    await link.close()


# -- in memory alone -----------------------------------------------------------------------------


async def test_hours_are_kept_for_35_days_and_days_for_400() -> None:
    clock = [float(NOW)]
    book = MemoryUsageBook(clock=lambda: clock[0])
    book.add(record())
    clock[0] = NOW + 35 * DAY
    assert len(await book.rows("team", NOW, NOW + HOUR, "hour")) == 1
    clock[0] += HOUR
    assert await book.rows("team", NOW, NOW + HOUR, "hour") == []
    assert len(await book.rows("team", TODAY, TODAY + DAY, "day")) == 1
    clock[0] = NOW + 401 * DAY
    assert await book.rows("team", TODAY, TODAY + DAY, "day") == []
    assert list(await book.tenants()) == []


async def test_a_record_of_long_ago_counts_nowhere() -> None:
    book = MemoryUsageBook(clock=lambda: NOW)
    book.add(record(at=NOW - 500 * DAY))
    assert list(await book.tenants()) == []
    book.add(record(at=NOW - 100 * DAY))
    assert await book.rows("team", NOW - 100 * DAY, NOW, "hour") == []
    assert len(await book.rows("team", TODAY - 100 * DAY, TODAY, "day")) == 1


async def test_what_is_held_is_bounded_though_nobody_reads() -> None:
    clock = [float(NOW)]
    book = MemoryUsageBook(clock=lambda: clock[0])
    for _ in range(50 * 24):
        book.add(record(at=clock[0]))
        clock[0] += HOUR
    assert len(book) == (35 * 24 + 1) + 51
