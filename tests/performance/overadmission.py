"""Is anybody admitted beyond a limit of several processes? `python -m tests.performance.overadmission`.

Several processes attempt at once and all the time, on a real Redis. Of two API keys one meets its limit of
requests, the other its limit of tokens. A limit comes back evenly, so what is allowed is the limit and what
came back between the first attempt and the last, by Redis' own clock. Each admitted request is settled with
as many tokens as were expected of it.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, Final, NamedTuple

from service import logging
from service.chat import new_id
from service.config import LimitConfig
from service.domain import Cost, Operation, Outcome, Principal, RequestRecord, Usage
from service.errors import RateLimited, StateUnavailable
from service.ports import Demand
from service.rules import Rulebook
from service.stores.redis.accounts import RedisAccounts
from service.stores.redis.address import make_client
from service.stores.redis.link import Link
from service.stores.redis.scripts import SETTLE
from tests.redis_servers import Single

WINDOW_SECONDS: Final = 86_400.0
AT_ONCE: Final = 100
TIMEOUT_SECONDS: Final = 10.0
"""No attempt shall be given up: whether it was counted would not be known."""
TOKENS: Final = {"few": 1, "many": 10}
"""Of each request, by the API key: `few` meets the limit of requests, `many` that of tokens."""
TOKENS_A_REQUEST: Final = 5
"""What the limit of tokens is, in terms of the limit of requests."""


class Counted(NamedTuple):
    few: int
    many: int
    """Admitted, of each key."""
    refused: int
    unanswered: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--attempts", type=int, default=1_000_000)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--limit", type=int, default=100_000)
    options = parser.parse_args()
    with (
        Single(config=["appendonly no"]) as single,
        ProcessPoolExecutor(options.processes, get_context("spawn")) as pool,
    ):
        held = holds(single, pool, options.processes, attempts=options.attempts, limit=options.limit)
    return 0 if held else 1


def holds(single: Single, pool: ProcessPoolExecutor, processes: int, *, attempts: int, limit: int) -> bool:
    """Whether both limits were met and nobody was admitted beyond them; what was counted is printed."""
    share = attempts // processes
    began, clock = time.perf_counter(), _seconds(single)
    runs = [pool.submit(attempt, single.url, limit, share) for _ in range(processes)]
    counted = [run.result() for run in runs]
    elapsed, came_back = time.perf_counter() - began, (_seconds(single) - clock) / WINDOW_SECONDS
    few, many, refused, unanswered = (sum(column) for column in zip(*counted, strict=True))
    attempts = few + many + refused + unanswered
    print(f"processes      {processes}, each with {AT_ONCE} attempts at once")
    print(f"attempts       {attempts:,}, of two API keys by turns")
    over, well = 0, not unanswered
    for what, most, used in (
        ("requests", limit, few),
        ("tokens", limit * TOKENS_A_REQUEST, many * TOKENS["many"]),
    ):
        allowed = most + int(most * came_back)
        over += max(0, used - allowed)
        well = well and used > most - TOKENS["many"]
        print(f"{what:<14} {used:,} admitted of {allowed:,} allowed: {most:,} and what came back")
    print(f"unanswered     {unanswered:,}")
    print(f"over-admitted  {over:,}")
    print(f"attempts/s     {(attempts - unanswered) / elapsed:,.0f}, with the start of the processes")
    return well and not over


def attempt(url: str, limit: int, attempts: int) -> Counted:
    logging.configure("warning", "console")
    return asyncio.run(_attempt(url, limit, attempts))


async def _attempt(url: str, limit: int, attempts: int) -> Counted:
    client = make_client(url, timeout_seconds=TIMEOUT_SECONDS, max_connections=AT_ONCE)
    link = Link(client, prefix="weir:", timeout_seconds=TIMEOUT_SECONDS, max_connections=AT_ONCE)
    await link.start()
    rule = LimitConfig(name="a", requests=limit, tokens=limit * TOKENS_A_REQUEST, window=WINDOW_SECONDS)
    accounts = RedisAccounts(link, Rulebook([rule]), most=1_000)
    left, refused, unanswered = attempts, 0, 0
    admitted = dict.fromkeys(TOKENS, 0)

    async def worker() -> None:
        nonlocal left, refused, unanswered
        while left > 0:
            left -= 1
            name = "few" if left % 2 else "many"
            record = RequestRecord(new_id(), "r", "/v1/x", Operation.CHAT, Principal(name, "team"))
            demand = Demand("m", tokens=TOKENS[name])
            try:
                held = await accounts.reserve(record, demand, accounts.plans_for(record, demand))
                admitted[name] += 1
                record.outcome, record.usage = Outcome.SUCCESS, Usage(TOKENS[name], 0)
                record.cost = Cost(0.0, "table")
                for keys, arguments in accounts.settling(record, held.held):
                    await link.run(SETTLE, keys, arguments)
            except RateLimited:
                refused += 1
            except StateUnavailable:
                unanswered += 1

    await asyncio.gather(*(worker() for _ in range(AT_ONCE)))
    await link.close()
    return Counted(admitted["few"], admitted["many"], refused, unanswered)


def _seconds(single: Single) -> float:
    answer: Any = single.server.command("TIME")
    return float(answer[0]) + float(answer[1]) / 1e6


if __name__ == "__main__":
    sys.exit(main())
