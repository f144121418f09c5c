"""What accounts must do, in memory and on Redis in its three forms: limits, budgets, the book."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NamedTuple

import msgspec
import pytest

from service.chat import new_id
from service.config import BudgetConfig, LimitConfig
from service.domain import Cost, Operation, Outcome, Principal, RequestRecord, Usage
from service.errors import BudgetExceeded, BudgetReserved, RateLimited, WeirError
from service.ports import Demand, Reservation
from service.rules import Rulebook
from service.stores.memory_accounts import MemoryAccounts
from service.stores.redis.accounts import RedisAccounts
from service.stores.redis.keys import Keys
from service.stores.redis.link import Link
from service.stores.redis.scripts import SETTLE
from tests.contracts.conftest import FORMS
from tests.contracts.test_stores import ANNA, BERT, ELSEWHERE, HOUR, ODD, make_link
from tests.redis_servers import Servers

MODEL = "gpt-4o"


class OnRedis:
    """The port on Redis alone, without what stands around it for an outage."""

    def __init__(self, link: Link, rules: Rulebook) -> None:
        self._link = link
        self.store = RedisAccounts(link, rules)

    @property
    def by_address(self) -> bool:
        return self.store.rules.by_address

    async def reserve(self, record: RequestRecord, demand: Demand) -> Reservation:
        return await self.store.reserve(record, demand, self.store.plans_for(record, demand))

    async def settle(self, record: RequestRecord, reservation: Reservation | None) -> None:
        held = reservation.held if reservation is not None else None
        for keys, arguments in self.store.settling(record, held):
            await self._link.run(SETTLE, keys, arguments)


class Making(NamedTuple):
    """How to make accounts on one state, and how to read its book."""

    accounts: Callable[..., Any]
    records: Callable[[str], Awaitable[list[RequestRecord]]]


@pytest.fixture(params=("memory", *FORMS))
async def making(request: pytest.FixtureRequest) -> AsyncIterator[Making]:
    if request.param == "memory":
        made: list[MemoryAccounts] = []

        def in_memory(*limits: LimitConfig, budgets: Any = (), **more: Any) -> MemoryAccounts:
            made.append(MemoryAccounts(Rulebook(limits, budgets, **more)))
            return made[-1]

        async def kept(tenant: str) -> list[RequestRecord]:
            return [r for accounts in made for r in accounts.records if r.principal.tenant == tenant]

        yield Making(in_memory, kept)
        return
    servers: Servers = request.getfixturevalue(request.param)
    servers.restore()
    servers.flush()
    link = make_link(servers.url)
    await link.start()
    assert link.available

    def on_redis(*limits: LimitConfig, budgets: Any = (), **more: Any) -> OnRedis:
        return OnRedis(link, Rulebook(limits, budgets, **more))

    async def records(tenant: str) -> list[RequestRecord]:
        entries: Any = await link.client.xrange(Keys(link.prefix).ledger(tenant))
        return [msgspec.json.decode(fields[b"record"], type=RequestRecord) for _, fields in entries]

    yield Making(on_redis, records)
    await link.close()


def limit(name: str = "a", **values: Any) -> LimitConfig:
    return LimitConfig(name=name, **values)


def budget(name: str = "b", usd: float = 1.0, **values: Any) -> BudgetConfig:
    return BudgetConfig(name=name, usd=usd, **values)


def record(principal: Principal = ANNA, **values: Any) -> RequestRecord:
    return RequestRecord(new_id(), "request", "/v1/chat", Operation.CHAT, principal, **values)


def demand(tokens: int = 0, usd: float = 0.0, most_usd: float = 0.0, **values: Any) -> Demand:
    return Demand(values.pop("model", MODEL), tokens=tokens, usd=usd, most_usd=most_usd, **values)


async def try_one(accounts: Any, asked: Demand, principal: Principal = ANNA) -> WeirError | None:
    """Reserve; the refusal, if it is one."""
    try:
        await accounts.reserve(record(principal), asked)
    except WeirError as refused:
        return refused
    return None


async def admitted(
    accounts: Any, attempts: int, asked: Demand | None = None, principal: Principal = ANNA
) -> int:
    refusals = await asyncio.gather(
        *(try_one(accounts, asked or demand(), principal) for _ in range(attempts))
    )
    assert all(r is None or (isinstance(r, RateLimited) and r.retry_after_seconds) for r in refusals)
    return refusals.count(None)


def ended(begun: RequestRecord, tokens: int = 0, usd: float | None = 0.0) -> RequestRecord:
    """The record at its end."""
    begun.outcome, begun.usage = Outcome.SUCCESS, Usage(tokens, 0)
    begun.cost = Cost(usd, "table")
    return begun


# -- requests per window -------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 7, 100])
async def test_a_limit_admits_so_many_and_not_one_more(making: Making, most: int) -> None:
    accounts = making.accounts(limit(requests=most, window=HOUR))
    assert await admitted(accounts, most + 20) == most


async def test_each_principal_has_a_limit_of_its_own(making: Making) -> None:
    accounts = making.accounts(requests=3, window_seconds=HOUR)
    for principal in (ANNA, BERT, ELSEWHERE, ODD):
        assert await admitted(accounts, 5, principal=principal) == 3


async def test_without_a_limit_everybody_gets_through(making: Making) -> None:
    assert await admitted(making.accounts(), 50) == 50


async def test_a_limit_gives_back_as_time_goes_by(making: Making) -> None:
    accounts = making.accounts(limit(requests=2, window=0.2))
    assert await admitted(accounts, 2) == 2
    async with asyncio.timeout(10):
        while not await admitted(accounts, 1):
            await asyncio.sleep(0.005)


async def test_the_wait_that_is_told_is_the_time_until_the_next_one(making: Making) -> None:
    accounts = making.accounts(limit(requests=2, window=HOUR))
    await admitted(accounts, 2)
    refused = await try_one(accounts, demand())
    assert isinstance(refused, RateLimited)
    assert refused.retry_after_seconds == pytest.approx(HOUR / 2, rel=0.01)
    assert refused.standing is not None
    assert refused.standing.requests is not None
    assert (refused.standing.requests.limit, refused.standing.requests.remaining) == (2, 0)


async def test_what_remains_is_told(making: Making) -> None:
    accounts = making.accounts(
        limit("wide", requests=100, window=HOUR), limit("tight", requests=10, window=60.0)
    )
    found = await accounts.reserve(record(), demand())
    window = found.standing.requests
    assert (window.limit, window.remaining) == (10, 9)
    assert window.reset_seconds == pytest.approx(6.0, rel=0.01)


async def test_another_window_counts_anew(making: Making) -> None:
    """What an earlier setting used up of a day must not be waited for once the window is a minute."""
    await admitted(making.accounts(limit(requests=100, window=24 * HOUR)), 100)
    assert await admitted(making.accounts(limit(requests=1, window=60.0)), 2) == 1


# -- whose limit it is ---------------------------------------------------------------------------


async def test_a_limit_of_a_tenant_is_shared_by_its_keys(making: Making) -> None:
    accounts = making.accounts(limit(per=("tenant",), requests=3, window=HOUR))
    assert await admitted(accounts, 2, principal=ANNA) == 2
    assert await admitted(accounts, 2, principal=BERT) == 1
    assert await admitted(accounts, 5, principal=ELSEWHERE) == 3


async def test_a_limit_of_a_model_counts_all_tenants_together(making: Making) -> None:
    accounts = making.accounts(limit(per=("model",), requests=3, window=HOUR))
    assert await admitted(accounts, 2, principal=ANNA) == 2
    assert await admitted(accounts, 2, principal=ELSEWHERE) == 1
    assert await admitted(accounts, 2, demand(model="another"), principal=ELSEWHERE) == 2


async def test_a_limit_of_a_key_and_model_counts_each_pair(making: Making) -> None:
    accounts = making.accounts(limit(per=("key", "model"), requests=1, window=HOUR))
    assert await admitted(accounts, 2) == 1
    assert await admitted(accounts, 2, demand(model="another")) == 1
    assert await admitted(accounts, 2, principal=BERT) == 1


async def test_a_limit_of_an_address_counts_each_address(making: Making) -> None:
    accounts = making.accounts(limit(per=("address",), requests=1, window=HOUR))
    assert accounts.by_address
    assert await admitted(accounts, 2, demand(address="192.0.2.1")) == 1
    assert await admitted(accounts, 2, demand(address="192.0.2.2"), principal=ELSEWHERE) == 1
    assert await admitted(accounts, 1, demand(address="192.0.2.1"), principal=ELSEWHERE) == 0


async def test_a_rule_holds_for_those_whom_it_names(making: Making) -> None:
    accounts = making.accounts(
        limit("t", tenants=("other*",), requests=1, window=HOUR),
        limit("m", models=("gpt-*",), keys=("bert",), requests=2, window=HOUR),
    )
    assert await admitted(accounts, 5, principal=ANNA) == 5
    assert await admitted(accounts, 5, principal=ELSEWHERE) == 1
    assert await admitted(accounts, 5, principal=BERT) == 2
    assert await admitted(accounts, 5, demand(model="o3"), principal=BERT) == 5


async def test_who_has_a_limit_of_requests_has_not_the_default(making: Making) -> None:
    accounts = making.accounts(
        limit(keys=("bert",), requests=4, window=HOUR), requests=2, window_seconds=HOUR
    )
    assert await admitted(accounts, 5, principal=ANNA) == 2
    assert await admitted(accounts, 5, principal=BERT) == 4


async def test_who_is_refused_by_one_limit_uses_up_no_other(making: Making) -> None:
    """Neither of those of its tenant, nor of those of the whole fleet, whichever refuses."""
    accounts = making.accounts(
        limit("own", requests=5, tokens=1000, window=HOUR),
        limit("model", per=("model",), requests=2, window=HOUR),
    )
    assert await admitted(accounts, 4, demand(tokens=10)) == 2  # the model's limit refuses
    found = (
        await making.accounts(limit("own", requests=5, tokens=1000, window=HOUR)).reserve(
            record(), demand(tokens=10)
        )
        if not isinstance(accounts, MemoryAccounts)
        else None
    )
    if found is not None:
        assert found.standing.requests.remaining == 2
        assert found.standing.tokens.remaining == pytest.approx(970, abs=1)
    else:
        other = await accounts.reserve(record(), demand(tokens=10, model="another"))
        assert other.standing.requests.remaining in (1, 2)


# -- tokens per window ---------------------------------------------------------------------------


async def test_tokens_are_reserved_by_estimate(making: Making) -> None:
    accounts = making.accounts(limit(tokens=1000, window=HOUR))
    assert await admitted(accounts, 20, demand(tokens=100)) == 10
    refused = await try_one(accounts, demand(tokens=100))
    assert isinstance(refused, RateLimited)
    assert refused.retry_after_seconds == pytest.approx(HOUR / 10, rel=0.01)


async def test_what_was_not_used_comes_back(making: Making) -> None:
    accounts = making.accounts(limit(tokens=1000, window=HOUR))
    for _ in range(20):
        begun = record()
        reservation = await accounts.reserve(begun, demand(tokens=700))
        await accounts.settle(ended(begun, tokens=10), reservation)
    found = await accounts.reserve(record(), demand(tokens=0))
    assert found.standing.tokens.remaining == pytest.approx(800, abs=5)


async def test_what_was_used_beyond_the_estimate_counts(making: Making) -> None:
    accounts = making.accounts(limit(tokens=1000, window=HOUR))
    begun = record()
    reservation = await accounts.reserve(begun, demand(tokens=10))
    await accounts.settle(ended(begun, tokens=1500), reservation)
    refused = await try_one(accounts, demand(tokens=100))
    assert isinstance(refused, RateLimited)
    assert refused.retry_after_seconds == pytest.approx(HOUR * 0.6, rel=0.01)


async def test_a_call_larger_than_the_window_goes_when_nothing_else_did(making: Making) -> None:
    accounts = making.accounts(limit(tokens=1000, window=HOUR))
    assert await admitted(accounts, 2, demand(tokens=5000)) == 1
    assert await admitted(making.accounts(limit("z", tokens=1000, window=HOUR)), 1, demand(tokens=1)) == 1


# -- requests at the same time -------------------------------------------------------------------


async def test_so_many_run_at_the_same_time_and_not_one_more(making: Making) -> None:
    accounts = making.accounts(limit(concurrent=3))
    running = []
    for _ in range(3):
        begun = record()
        running.append((begun, await accounts.reserve(begun, demand())))
    refused = await try_one(accounts, demand())
    assert isinstance(refused, RateLimited)
    assert refused.retry_after_seconds
    for begun, reservation in running:
        await accounts.settle(ended(begun), reservation)
    assert await admitted(accounts, 5) == 3


async def test_settling_twice_frees_one_place(making: Making) -> None:
    accounts = making.accounts(limit(concurrent=2))
    first, second = record(), record()
    one, _ = await accounts.reserve(first, demand()), await accounts.reserve(second, demand())
    for _ in range(3):
        await accounts.settle(ended(first), one)
    assert await admitted(accounts, 5) == 1


# -- budgets -------------------------------------------------------------------------------------


@pytest.mark.parametrize("period", ["day", "month"])
async def test_a_budget_is_spent_once(making: Making, period: str) -> None:
    accounts = making.accounts(budgets=[budget(usd=1.0, period=period)])
    for _ in range(10):
        begun = record()
        reservation = await accounts.reserve(begun, demand(usd=0.1, most_usd=0.1))
        await accounts.settle(ended(begun, usd=0.1), reservation)
    refused = await try_one(accounts, demand(usd=0.1, most_usd=0.1))
    assert isinstance(refused, BudgetExceeded)
    assert refused.status == 402
    assert "`b`" in refused.message
    longest = 86_400 if period == "day" else 31 * 86_400
    assert refused.retry_after_seconds is not None
    assert 0 < refused.retry_after_seconds <= longest
    assert refused.retry_after_seconds == pytest.approx(_left(period), abs=60)
    assert await try_one(accounts, demand(usd=0.1), ELSEWHERE) is None  # a budget of its own


def _left(period: str) -> float:
    now = time.time()
    at = time.gmtime(now)
    if period == "day":
        return 86_400 - now % 86_400
    import calendar

    following = (at.tm_year + at.tm_mon // 12, at.tm_mon % 12 + 1, 1, 0, 0, 0)
    return calendar.timegm(following) - now


async def test_calls_that_run_count_with_the_most_that_they_may_cost(making: Making) -> None:
    accounts = making.accounts(budgets=[budget(usd=1.0)])
    begun = record()
    running = await accounts.reserve(begun, demand(usd=0.1, most_usd=0.95))
    refused = await try_one(accounts, demand(usd=0.1, most_usd=0.95))
    assert isinstance(refused, BudgetReserved)
    assert refused.status == 429
    assert refused.retry
    await accounts.settle(ended(begun, usd=0.05), running)
    assert await try_one(accounts, demand(usd=0.1, most_usd=0.95)) is None


async def test_a_soft_budget_warns_and_never_refuses(making: Making) -> None:
    accounts = making.accounts(budgets=[budget(usd=1.0, warn_at=0.5, hard=False)])
    warned = []
    for _ in range(4):
        begun = record()
        reservation = await accounts.reserve(begun, demand(usd=0.4, most_usd=0.4))
        warned.append(reservation.standing.budgets[0].warns)
        await accounts.settle(ended(begun, usd=0.4), reservation)
    assert warned == [False, False, True, True]
    state = (await accounts.reserve(record(), demand())).standing.budgets[0]
    assert state.used_ratio == pytest.approx(1.6)
    assert (state.name, state.key, state.remaining_usd) == ("b", "", 0.0)


async def test_a_budget_of_a_key_is_its_own(making: Making) -> None:
    accounts = making.accounts(budgets=[budget(usd=1.0, per="key")])
    begun = record()
    await accounts.settle(ended(begun, usd=1.0), await accounts.reserve(begun, demand(usd=1.0, most_usd=1.0)))
    assert isinstance(await try_one(accounts, demand(usd=0.1)), BudgetExceeded)
    assert await try_one(accounts, demand(usd=0.1), BERT) is None
    state = (await accounts.reserve(record(BERT), demand())).standing.budgets[0]
    assert state.key == "bert"


async def test_what_failed_costs_nothing(making: Making) -> None:
    accounts = making.accounts(budgets=[budget(usd=1.0)])
    for _ in range(5):
        begun = record()
        reservation = await accounts.reserve(begun, demand(usd=0.9, most_usd=0.9))
        begun.outcome = Outcome.UPSTREAM_ERROR
        await accounts.settle(begun, reservation)
    assert await try_one(accounts, demand(usd=0.9, most_usd=0.9)) is None


# -- the book ------------------------------------------------------------------------------------


async def test_the_book_has_each_record_as_it_was_and_in_order(making: Making) -> None:
    accounts = making.accounts()
    entered = [record(error_code=f"r{n}") for n in range(5)]
    for one in entered:
        await accounts.settle(one, None)
    await accounts.settle(record(ELSEWHERE, error_code="x"), None)
    assert await making.records("team") == entered
    assert [r.error_code for r in await making.records("other team")] == ["x"]


async def test_a_request_comes_into_the_book_once(making: Making) -> None:
    accounts = making.accounts(budgets=[budget(usd=1.0)])
    begun = record()
    reservation = await accounts.reserve(begun, demand(usd=0.1, most_usd=0.1))
    for _ in range(3):
        await accounts.settle(ended(begun, usd=0.1), reservation)
    assert len(await making.records("team")) == 1
    state = (await accounts.reserve(record(), demand())).standing.budgets[0]
    assert state.used_ratio == pytest.approx(0.1)


async def test_a_refused_request_comes_into_the_book_too(making: Making) -> None:
    accounts = making.accounts(limit(requests=1, window=HOUR))
    await accounts.reserve(record(), demand())
    refused = record()
    with pytest.raises(RateLimited):
        await accounts.reserve(refused, demand())
    refused.outcome = Outcome.RATE_LIMITED
    await accounts.settle(refused, None)
    assert [r.outcome for r in await making.records("team")] == [Outcome.RATE_LIMITED]
