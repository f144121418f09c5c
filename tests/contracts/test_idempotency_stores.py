"""What every store of answers by idempotency key must do; and what only the one on Redis does."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from typing import TypeAlias

import pytest

from service.domain import Principal
from service.errors import StateUnavailable
from service.ports import Claim, ClaimState, Place, Replays
from service.stores.memory_idempotency import PLACE_BYTES, MemoryReplays
from service.stores.redis.idempotency import FleetReplays, RedisReplays
from service.stores.redis.link import Link
from tests.contracts.conftest import FORMS
from tests.contracts.test_stores import make_link
from tests.redis_servers import Servers, Single
from tests.unit.test_idempotency import Model

HOUR = 3600.0
MANY = 1_000_000
TAKEN, RUNNING, OTHER = Claim(ClaimState.TAKEN), Claim(ClaimState.RUNNING), Claim(ClaimState.OTHER)
ODD = Principal("a:b{c}d é\n", "{}: team")
A, B = bytes(32), b"\xff" * 32
"""Fingerprints; any bytes."""

Make: TypeAlias = Callable[..., Replays]


@pytest.fixture(params=("memory", *FORMS))
async def make(request: pytest.FixtureRequest) -> AsyncIterator[Make]:
    """Makes stores; those on Redis are on the same one."""

    def values(
        ttl_seconds: float = HOUR, lease_seconds: float = HOUR, most_bytes: int = MANY
    ) -> dict[str, float]:
        return {"ttl_seconds": ttl_seconds, "lease_seconds": lease_seconds, "most_bytes": most_bytes}

    if request.param == "memory":
        yield lambda **given: MemoryReplays(**values(**given))  # type: ignore[arg-type]
        return
    servers: Servers = request.getfixturevalue(request.param)
    servers.restore()
    servers.flush()
    link = make_link(servers.url)
    await link.start()
    assert link.available
    yield lambda **given: RedisReplays(link, **values(**given))  # type: ignore[arg-type]
    await link.close()


def place(name: str = "n", tenant: str = "team", key: str = "anna") -> Place:
    return Place(tenant, key, name)


def kept(answer: bytes) -> Claim:
    return Claim(ClaimState.KEPT, answer)


async def until_found(store: Replays, wanted: Claim, fingerprint: bytes = A) -> None:
    async with asyncio.timeout(10):
        while await store.claim(place(), fingerprint, "poll") != wanted:
            await asyncio.sleep(0.01)


# -- all stores ----------------------------------------------------------------------------------


async def test_the_first_takes_the_place_and_its_answer_is_given_again(make: Make) -> None:
    store = make()
    assert await store.claim(place(), A, "one") == TAKEN
    assert await store.claim(place(), A, "two") == RUNNING
    assert await store.keep(place(), A, "one", b"answer \x00\xff")
    assert await store.claim(place(), A, "two") == kept(b"answer \x00\xff")
    assert await store.claim(place(), A, "two") == kept(b"answer \x00\xff")


async def test_an_empty_answer_is_an_answer(make: Make) -> None:
    store = make()
    await store.claim(place(), A, "one")
    assert await store.keep(place(), A, "one", b"")
    assert await store.claim(place(), A, "two") == kept(b"")


async def test_another_request_is_told_so_before_and_after_the_answer(make: Make) -> None:
    store = make()
    await store.claim(place(), A, "one")
    assert await store.claim(place(), B, "two") == OTHER
    await store.keep(place(), A, "one", b"answer")
    assert await store.claim(place(), B, "two") == OTHER
    assert await store.claim(place(), A, "two") == kept(b"answer")


async def test_a_place_that_was_released_is_free_for_every_request(make: Make) -> None:
    store = make()
    await store.claim(place(), A, "one")
    await store.release(place(), "one")
    assert await store.claim(place(), B, "two") == TAKEN


async def test_only_the_holder_releases_and_no_answer_is_released(make: Make) -> None:
    store = make()
    await store.claim(place(), A, "one")
    await store.release(place(), "two")
    assert await store.claim(place(), A, "two") == RUNNING
    await store.keep(place(), A, "one", b"answer")
    await store.release(place(), "one")
    assert await store.claim(place(), A, "two") == kept(b"answer")
    await store.release(place("unknown"), "one")


async def test_what_is_done_twice_is_done_once(make: Make) -> None:
    store = make()
    assert [await store.claim(place(), A, "one") for _ in range(2)] == [TAKEN, TAKEN]
    assert [await store.keep(place(), A, "one", b"answer") for _ in range(2)] == [True, True]
    assert await store.erase("team") == 1


@pytest.mark.parametrize(
    "stranger",
    [place(key="bert"), place(tenant="other"), place("other"), place(tenant=ODD.tenant, key=ODD.name)],
    ids=["key", "tenant", "name", "odd"],
)
async def test_anothers_place_is_another_place(make: Make, stranger: Place) -> None:
    store = make()
    await store.claim(place(), A, "one")
    assert await store.claim(stranger, A, "two") == TAKEN
    await store.keep(stranger, A, "two", b"strange")
    await store.keep(place(), A, "one", b"own")
    assert await store.claim(stranger, A, "three") == kept(b"strange")
    assert await store.claim(place(), A, "three") == kept(b"own")


async def test_a_claim_ends_with_its_lease(make: Make) -> None:
    store = make(lease_seconds=0.05)
    await store.claim(place(), A, "killed")
    await until_found(store, TAKEN)


async def test_an_answer_comes_late_after_the_lease_and_is_kept_if_the_place_is_free(make: Make) -> None:
    store = make(lease_seconds=0.05)
    await store.claim(place(), A, "late")
    await until_found(store, TAKEN)
    await store.release(place(), "poll")
    assert await store.keep(place(), A, "late", b"answer")
    assert await store.claim(place(), A, "three") == kept(b"answer")


async def test_an_answer_ends_with_its_time_to_live(make: Make) -> None:
    store = make(ttl_seconds=0.05)
    await store.claim(place(), A, "one")
    await store.keep(place(), A, "one", b"answer")
    await until_found(store, TAKEN)


async def test_of_many_at_once_one_takes_the_place(make: Make) -> None:
    store = make()
    found = await asyncio.gather(*(store.claim(place(), A, f"t{n}") for n in range(50)))
    assert sorted(claim.state.name for claim in found) == ["RUNNING"] * 49 + ["TAKEN"]


async def test_above_the_most_the_oldest_answers_go_and_the_latest_stays(make: Make) -> None:
    store = make(most_bytes=3 * (100 + PLACE_BYTES))
    for number in range(5):
        await store.claim(place(f"n{number}"), A, "t")
        await store.keep(place(f"n{number}"), A, "t", b"x" * 100)
        await asyncio.sleep(0.002)  # the order is by milliseconds
    found = [await store.claim(place(f"n{number}"), A, "new") for number in range(5)]
    assert [claim.state.name for claim in found] == ["TAKEN", "TAKEN", "KEPT", "KEPT", "KEPT"]
    await store.claim(place("large"), A, "t")
    await store.keep(place("large"), A, "t", b"y" * 10_000)
    assert await store.claim(place("large"), A, "new") == kept(b"y" * 10_000)
    assert await store.claim(place("n4"), A, "new") == TAKEN


async def test_an_erased_tenant_has_no_answers(make: Make) -> None:
    store = make()
    for number in range(1, 4):
        for tenant in ("team", "other", ODD.tenant):
            await store.claim(place(f"n{number}", tenant, ODD.name), A, "t")
            await store.keep(place(f"n{number}", tenant, ODD.name), A, "t", b"x" * number)
    assert await store.erase(ODD.tenant) == 3
    assert await store.erase(ODD.tenant) == 0
    assert await store.claim(place("n1", ODD.tenant, ODD.name), A, "new") == TAKEN
    assert await store.erase("team") == 3
    assert await store.claim(place("n3", "other", ODD.name), A, "new") == kept(b"xxx")


@pytest.mark.parametrize("seed", range(5))
async def test_whatever_happens_in_whatever_order_it_is_as_the_model_says(make: Make, seed: int) -> None:
    chance, store, model = random.Random(seed), make(), Model(MANY)
    for step in range(200):
        where = place(f"n{chance.randrange(12)}")
        fingerprint, token = chance.choice((A, A, B)), chance.choice(("one", "two"))
        what, body = chance.choice(("claim", "claim", "release", "keep")), bytes([step])
        if what == "claim":
            found = await store.claim(where, fingerprint, token)
            assert found == model.claim(0, where.name, fingerprint, token), step
        elif what == "keep":
            kept_it = await store.keep(where, fingerprint, token, body)
            assert kept_it == model.keep(0, where.name, fingerprint, token, body), step
        else:
            await store.release(where, token)
            model.release(where.name, token)
    assert await store.erase("team") == len(model.answers) > 0


# -- on Redis ------------------------------------------------------------------------------------


@pytest.fixture
async def link(redis_single: Single) -> AsyncIterator[Link]:
    made = make_link(redis_single.url, 0.5)
    await made.start()
    yield made
    await made.close()


def on_redis(link: Link, **given: float) -> RedisReplays:
    values = {"ttl_seconds": HOUR, "lease_seconds": HOUR, "most_bytes": MANY} | given
    return RedisReplays(link, **values)  # type: ignore[arg-type]


def fleet(link: Link, **given: float) -> FleetReplays:
    values = {"ttl_seconds": HOUR, "lease_seconds": HOUR, "most_bytes": MANY} | given
    return FleetReplays(MemoryReplays(**values), on_redis(link, **given))  # type: ignore[arg-type]


async def test_every_key_has_the_tenants_tag_and_an_end_and_shows_no_idempotency_key(
    link: Link, redis_single: Single
) -> None:
    store = on_redis(link)
    for name in ("done", "running"):
        await store.claim(place(name), A, "t")
    await store.keep(place("done"), A, "t", b"answer")
    command = redis_single.server.command
    names = {name for name in command("KEYS", "*") if not name.endswith(":probe")}
    assert names == {
        f"weir:{{team}}:{n}" for n in ("idem:anna:done", "idem:anna:running", "idems", "idembytes")
    }
    assert all(0 < command("PTTL", name) <= HOUR * 1000 for name in names)


async def test_the_sum_is_that_of_the_answers_that_are_there(link: Link, redis_single: Single) -> None:
    command = redis_single.server.command
    brief, store = on_redis(link, ttl_seconds=0.03), on_redis(link)
    await until_taken(store, place("first"), "t")
    await store.keep(place("first"), A, "t", b"x")
    for round_ in range(3):  # the same places again, whose answers have ended
        for number in range(5):
            await until_taken(brief, place(f"n{number}"), f"t{round_}")
            await brief.keep(place(f"n{number}"), A, f"t{round_}", b"x" * 10)
    await until_taken(store, place("last"), "t")
    await until_taken(store, place("n4"), "t")  # the last one to end has ended
    await store.keep(place("last"), A, "t", b"x" * 20)
    assert int(command("GET", "weir:{team}:idembytes")) == 21 + 2 * PLACE_BYTES
    assert command("ZCARD", "weir:{team}:idems") == 2


async def until_taken(store: Replays, where: Place, token: str) -> None:
    async with asyncio.timeout(10):
        while await store.claim(where, A, token) != TAKEN:
            await asyncio.sleep(0.005)


async def test_a_claim_that_is_taken_again_goes_on(link: Link) -> None:
    short, long = on_redis(link, lease_seconds=0.05), on_redis(link)
    await short.claim(place(), A, "one")
    await long.claim(place(), A, "one")
    await asyncio.sleep(0.06)  # longer than the first lease, however late this wakes
    assert await long.claim(place(), A, "two") == RUNNING


async def test_an_answer_that_comes_after_another_has_taken_the_place_is_not_kept(link: Link) -> None:
    short, long = on_redis(link, lease_seconds=0.05), on_redis(link)
    await short.claim(place(), A, "late")
    await until_taken(long, place(), "second")
    assert not await short.keep(place(), A, "late", b"late")
    assert await long.keep(place(), A, "second", b"second")
    assert not await short.keep(place(), A, "late", b"late")
    assert await long.claim(place(), A, "three") == kept(b"second")


async def test_two_processes_are_one_while_redis_is_there(link: Link) -> None:
    one, two = fleet(link), fleet(link)
    assert await one.claim(place(), A, "one") == TAKEN
    assert await two.claim(place(), A, "two") == RUNNING
    assert await two.claim(place(), B, "two") == OTHER
    assert await one.keep(place(), A, "one", b"answer")
    assert await two.claim(place(), A, "two") == kept(b"answer")
    assert await one.claim(place(), A, "three") == kept(b"answer")
    assert await one.claim(place("next"), A, "one") == TAKEN
    await one.release(place("next"), "one")
    assert await two.claim(place("next"), A, "two") == TAKEN


async def test_of_many_at_once_in_one_process_all_get_the_answer_that_is_kept(link: Link) -> None:
    one = fleet(link)
    await one.claim(place(), A, "one")
    await one.keep(place(), A, "one", b"answer")
    found = await asyncio.gather(*(one.claim(place(), A, f"t{n}") for n in range(50)))
    assert found == [kept(b"answer")] * 50


class Late(RedisReplays):
    """Twice its answers come too late, which the link does not take for an outage yet."""

    late = 2

    async def claim(self, place: Place, fingerprint: bytes, token: str) -> Claim:
        found = await super().claim(place, fingerprint, token)
        if self.late:
            self.late -= 1
            raise StateUnavailable("late")
        return found


async def test_an_answer_that_is_late_is_no_outage(link: Link) -> None:
    one = fleet(link)
    memory = MemoryReplays(ttl_seconds=HOUR, lease_seconds=HOUR, most_bytes=MANY)
    two = FleetReplays(memory, Late(link, ttl_seconds=HOUR, lease_seconds=HOUR, most_bytes=MANY))
    assert await one.claim(place(), A, "one") == TAKEN
    assert await two.claim(place(), A, "two") == RUNNING


async def away(link: Link) -> None:
    async with asyncio.timeout(10):
        await link.away.wait()


async def test_while_redis_is_away_each_process_knows_its_own_and_goes_on_to(
    link: Link, redis_single: Single
) -> None:
    one, two = fleet(link), fleet(link)
    assert await one.claim(place("before"), A, "one") == TAKEN
    redis_single.kill()
    assert await one.claim(place("during"), A, "one") == TAKEN
    await away(link)
    assert await one.claim(place("before"), A, "again") == RUNNING
    assert await one.claim(place("during"), A, "again") == RUNNING
    assert await one.claim(place("during"), B, "again") == OTHER
    assert await two.claim(place("during"), A, "two") == TAKEN  # what nobody can prevent
    assert await one.keep(place("before"), A, "one", b"before")
    assert await one.keep(place("during"), A, "one", b"during")
    with pytest.raises(StateUnavailable):
        await two.release(place("during"), "two")

    redis_single.restart()
    async with asyncio.timeout(10):
        await link.back.wait()
    assert await one.claim(place("before"), A, "again") == kept(b"before")
    assert await one.claim(place("during"), A, "again") == kept(b"during")
    assert await two.claim(place("during"), A, "again") == TAKEN


async def test_a_claim_from_an_outage_is_everybodys_once_redis_is_back(
    link: Link, redis_single: Single
) -> None:
    one, two = fleet(link), fleet(link)
    redis_single.kill()
    assert await one.claim(place(), A, "one") == TAKEN
    await away(link)
    redis_single.restart()
    async with asyncio.timeout(10):
        await link.back.wait()
    assert await one.claim(place(), A, "one") == TAKEN  # the renewal
    assert await two.claim(place(), A, "two") == RUNNING
    await one.keep(place(), A, "one", b"answer")
    assert await two.claim(place(), A, "two") == kept(b"answer")
