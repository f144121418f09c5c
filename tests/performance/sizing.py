"""How much memory Redis takes: `python -m tests.performance.sizing` fills a real one and prints it.

Conversations of 20 messages, each message of about 200 letters, written as the service writes them; records
of the ledger with the sums of their hours and days; requests under way, and counters of API keys. With
`--conversations 100000` it takes a minute or two.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from typing import Any, Final

from service import logging
from service.config import BudgetConfig, LimitConfig
from service.domain import (
    Cost,
    Message,
    Operation,
    Outcome,
    Principal,
    RequestRecord,
    Turn,
    Usage,
    UsageSource,
)
from service.ports import Demand
from service.rules import Rulebook
from service.stores.redis import scripts
from service.stores.redis.accounts import RedisAccounts
from service.stores.redis.address import make_client
from service.stores.redis.keys import Keys
from service.stores.redis.link import Link
from service.stores.redis.stores import RedisConversations
from tests.redis_servers import Single

MESSAGES: Final = 20
OF_EACH_OWNER: Final = 100
TOGETHER: Final = 200
WORDS: Final = "A weir raises the water above it and lets the rest flow over its crest, evenly. "
HOUR: Final = 3600.0


async def fill(single: Single, conversations: int, records: int) -> None:
    client = make_client(single.url, timeout_seconds=30, max_connections=4)
    link = Link(client, prefix="weir:", timeout_seconds=30, max_connections=4)
    await link.start()
    # First: what the conversations leave behind them when they go would be taken away from it.
    await fill_ledger(single, link, records)
    await fill_counters(single, link)
    await fill_conversations(single, link, conversations)
    await link.close()


async def fill_conversations(single: Single, link: Link, conversations: int) -> None:
    keys, empty = Keys(link.prefix), used(single)
    store = RedisConversations(link, ttl_seconds=24 * HOUR, most=10_000)
    began = time.perf_counter()
    calls: list[Any] = []
    for number in range(conversations):
        owner = Principal(f"key-{number // OF_EACH_OWNER}", "team")
        for turn in range(MESSAGES // 2):
            where, what = store.appending(owner, name(number), said(turn), None, begin=True)
            calls.append((scripts.APPEND, where, what))
        if len(calls) >= TOGETHER or number == conversations - 1:
            answers = await link.run_in_order(calls)
            assert answers == [1] * len(calls)
            calls.clear()
    with_turns = used(single) - empty
    # A turn's own key ends after an hour: what stays is the rest.
    cursor = 0
    while True:
        cursor, turns = await link.client.scan(cursor, match="weir:{team}:turn:*", count=5000)
        if turns:
            await link.client.unlink(*turns)
        if not cursor:
            break
    single.server.command("MEMORY", "PURGE")
    lasting = used(single) - empty
    owner = Principal("key-0", "team")
    print(f"{conversations:,} conversations of {MESSAGES} messages in {time.perf_counter() - began:.0f} s")
    print(f"  memory of the server        {with_turns / conversations:,.0f} bytes a conversation")
    print(f"  an hour after the last turn {lasting / conversations:,.0f} bytes a conversation")
    for label, key in (
        ("conversation", keys.conversation(owner, name(0))),
        ("its messages", keys.messages(owner, name(0))),
        (f"list of {min(OF_EACH_OWNER, conversations)}", keys.conversations(owner)),
    ):
        print(f"  {label:<16} {single.server.command('MEMORY', 'USAGE', key, 'SAMPLES', 0):,} bytes")


async def fill_ledger(single: Single, link: Link, records: int) -> None:
    before = used(single)
    accounts, keys = RedisAccounts(link, Rulebook(), most=records), Keys(link.prefix)
    for first in range(0, records, TOGETHER):
        made = [record(number) for number in range(first, min(first + TOGETHER, records))]
        await link.run_in_order(
            [(scripts.SETTLE, *write) for one in made for write in accounts.settling(one, None)]
        )
    print(f"{records:,} records of the ledger")
    print(f"  memory of the server        {(used(single) - before) / records:,.0f} bytes a record")
    print(f"  of them in the stream       {size(single, keys.ledger('team')) / records:,.0f} bytes a record")
    # In a tenant's hour: so many keys and models, each with all its sums.
    pairs, began = 1_000, 1_800_000_000.0
    for first in range(0, pairs, TOGETHER):
        made = [
            record(number, f"key-{number // 10}", f"model-{number % 10}")
            for number in range(first, first + TOGETHER)
        ]
        for one in made:  # of their own ids: a record comes in once
            one.started_at, one.id = began, f"{one.id[:12]}{'f' * 8}{one.id[20:]}"
        await link.run_in_order(
            [(scripts.SETTLE, *write) for one in made for write in accounts.settling(one, None)]
        )
    hour, day = keys.sums("team", int(began // HOUR))
    print(f"sums of {pairs:,} pairs of a key and a model")
    print(f"  of an hour                  {size(single, hour) / pairs:,.0f} bytes a pair")
    print(f"  of a day                    {size(single, day) / pairs:,.0f} bytes a pair")


async def fill_counters(single: Single, link: Link) -> None:
    """Requests under way of many API keys, each with all kinds of counters."""
    rules = Rulebook(
        [
            LimitConfig(name="requests", requests=60, window=86_400),
            LimitConfig(name="tokens", tokens=100_000, window=86_400),
            LimitConfig(name="at-a-time", concurrent=10),
        ],
        [BudgetConfig(name="key-day", usd=10, per="key", period="day")],
    )
    accounts, keys, owners = RedisAccounts(link, rules), Keys(link.prefix), 10_000
    before = used(single)
    for number in range(owners):
        begun = record(number, f"key-{number}")
        demand = Demand("gpt-4o-mini", tokens=1_500, usd=0.001, most_usd=0.003)
        await accounts.reserve(begun, demand, accounts.plans_for(begun, demand))
    under_way = size(single, keys.open("team")) + size(single, keys.leases("team"))
    print(f"{owners:,} requests under way, each of a key of its own with four counters")
    print(f"  memory of the server        {(used(single) - before) / owners:,.0f} bytes a request")
    print(f"  of it note and lease        {under_way / owners:,.0f} bytes")
    checks = rules.checks(Principal("key-1", "team"), "gpt-4o-mini")
    for check in checks:
        print(f"  {check.kind.value:<27} {size(single, keys.counter('team', check.name)):,} bytes")
    await link.client.delete(keys.open("team"), keys.leases("team"))


def name(number: int) -> str:
    """As long as a real one."""
    return f"{number:08x}-0000-4000-8000-000000000000"


def said(turn: int) -> Turn:
    text = (WORDS * 3)[:200]
    messages = (
        Message("user", text, 1_790_000_000.5 + turn),
        Message("assistant", text, 1_790_000_001.5 + turn),
    )
    return Turn(messages, tokens=120, cost_usd=0.000123)


def record(number: int, key: str = "key-0", model: str = "gpt-4o-mini") -> RequestRecord:
    return RequestRecord(
        id=f"{1_790_000_000_000 + number:012x}{number:020x}",
        request_id=f"{number:032x}",
        route="/api/v1/chat",
        operation=Operation.CHAT,
        principal=Principal(key, "team"),
        request_model=model,
        response_model="gpt-4o-mini-2024-07-18",
        upstream="openai",
        provider="openai",
        outcome=Outcome.SUCCESS,
        usage=Usage(500, 60, cached_input_tokens=100, reasoning_tokens=20, source=UsageSource.PROVIDER),
        cost=Cost(usd=0.000123, source="genai-prices"),
        conversation_id=name(number),
        started_at=1_790_000_000.0 + number / 100,
    )


def size(single: Single, key: str) -> int:
    found: int = single.server.command("MEMORY", "USAGE", key, "SAMPLES", 0)
    return found


def used(single: Single) -> int:
    found: int = single.server.command("INFO", "memory")["used_memory"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--conversations", type=int, default=100_000)
    parser.add_argument("--records", type=int, default=100_000)
    options = parser.parse_args()
    logging.configure("warning", "console")
    with Single(config=["appendonly no"]) as single:
        asyncio.run(fill(single, options.conversations, options.records))


if __name__ == "__main__":
    main()
