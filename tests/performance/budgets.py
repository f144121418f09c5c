"""Is a budget overspent by several processes? `python -m tests.performance.budgets`.

Several processes spend one budget at once and all the time, on a real Redis, until it is spent. What a call
really costs is anything between nothing and the most that it said it might cost. So the budget is overspent
by no more than one call's error of estimate: by what the last one that was let through cost above what was
expected of it. In a second run some calls cost more than their most, which nothing can foresee: there each
of those that ran at the end may add what it cost above its most.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, Final, NamedTuple

from service import logging
from service.chat import new_id
from service.config import BudgetConfig
from service.domain import Cost, Operation, Outcome, Principal, RequestRecord, Usage
from service.errors import BudgetExceeded, BudgetReserved
from service.ports import Demand
from service.rules import NANO, Rulebook
from service.stores.redis.address import make_client
from service.stores.redis.fleet import Fleet, FleetAccounts
from tests.redis_servers import Single

AT_ONCE: Final = 4
TIMEOUT_SECONDS: Final = 10.0
"""No call shall be given up: it would be counted by a share, as while Redis is away."""
REFUSALS: Final = 25
"""After so many in a row a caller has seen that the budget is spent: the cheapest call does not fit."""
EXPECTED_USD: Final = (0.01, 0.10)
TIMES: Final = (1.0, 4.0)
"""The most that a call may cost, in terms of what is expected."""
RUNS_SECONDS: Final = 0.01
SOME: Final = 0.02
"""Of the calls in the second run cost more than their most: up to twice as much."""


class Counted(NamedTuple):
    admitted: int
    exceeded: int
    reserved: int
    elsewhere: int
    """Not counted in Redis."""
    spent: int
    largest: int
    """The largest error of estimate of a call: what it cost above what was expected."""
    beyond: int
    """What calls cost above their most, all together."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--usd", type=float, default=1_000.0)
    parser.add_argument("--processes", type=int, default=16)
    options = parser.parse_args()
    well = True
    for some in (0.0, SOME):
        with (
            Single() as single,
            ProcessPoolExecutor(options.processes, get_context("spawn")) as pool,
        ):
            well = holds(single, pool, options.processes, usd=options.usd, some=some) and well
    return 0 if well else 1


def holds(
    single: Single, pool: ProcessPoolExecutor, processes: int, *, usd: float, some: float = 0.0
) -> bool:
    """Whether the budget was spent, and overspent by no more than its bound; what was counted is printed."""
    began = time.perf_counter()
    runs = [pool.submit(spend, single.url, usd, some, number) for number in range(processes)]
    counted = [run.result() for run in runs]
    elapsed = time.perf_counter() - began
    stored: Any = single.server.command("HGETALL", "weir:{team}:budget:b:month:")
    ledger: Any = single.server.command("XLEN", "weir:{team}:ledger")
    return _report(usd, some, counted, stored, ledger, elapsed)


def _report(
    usd: float, some: float, counted: list[Counted], stored: dict[str, str], ledger: int, elapsed: float
) -> bool:
    admitted, exceeded, reserved, elsewhere, spent, _, beyond = (
        sum(column) for column in zip(*counted, strict=True)
    )
    largest, over = max(run.largest for run in counted), max(spent - round(usd * NANO), 0)
    calls = admitted + exceeded + reserved
    print(f"costs            between 0 and the most; above it: {some:.0%} of the calls")
    print(f"processes        {len(counted)}, each with {AT_ONCE} callers at once")
    print(f"budget           {usd:,.2f} USD")
    print(f"spent            {spent / NANO:,.6f} USD, in Redis {int(stored['spent']) / NANO:,.6f}")
    print(f"overspent        {over / NANO:,.6f} USD")
    print(f"largest error    {largest / NANO:,.6f} USD above what was expected of a call")
    if some:
        print(f"above their most {beyond / NANO:,.6f} USD, all calls together")
    print(f"calls            {admitted:,} admitted, {reserved:,} to be sent again, {exceeded:,} refused")
    print(f"calls/s          {calls / elapsed:,.0f}, with the start of the processes ({elapsed:.0f} s)")
    well = int(stored["spent"]) == spent and not elsewhere and ledger and "held" not in stored
    well = well and spent > round((usd - EXPECTED_USD[1]) * NANO)  # else something was refused that fitted
    bound = largest + (beyond if some else 0)
    print(f"within its bound {'yes' if over <= bound and well else 'NO'}\n")
    return bool(over <= bound and well)


def spend(url: str, usd: float, some: float, number: int) -> Counted:
    logging.configure("warning", "console")
    return asyncio.run(_spend(url, usd, some, random.Random(number)))


async def _spend(url: str, usd: float, some: float, chance: random.Random) -> Counted:
    fleet = Fleet(
        make_client(url, timeout_seconds=TIMEOUT_SECONDS, max_connections=AT_ONCE),
        prefix="weir:",
        timeout_seconds=TIMEOUT_SECONDS,
        max_connections=AT_ONCE,
        backlog_writes=100_000,
        rules=Rulebook(budgets=[BudgetConfig(name="b", usd=usd)]),
        ledger_records=1_000,
        lease_seconds=60.0,
    )
    accounts = FleetAccounts(fleet, "closed", 1)
    await fleet.open()
    admitted = exceeded = reserved = elsewhere = spent = largest = beyond = 0

    async def caller() -> None:
        nonlocal admitted, exceeded, reserved, elsewhere, spent, largest, beyond
        refusals = 0
        while refusals < REFUSALS:
            expected = chance.uniform(*EXPECTED_USD)
            most = expected * chance.uniform(*TIMES)
            record = RequestRecord(new_id(), "r", "/v1/x", Operation.CHAT, Principal("anna", "team"))
            try:
                held = await accounts.reserve(record, Demand("m", usd=expected, most_usd=most))
            except BudgetReserved:
                reserved += 1
                await asyncio.sleep(chance.uniform(0, RUNS_SECONDS))
                continue
            except BudgetExceeded:
                exceeded, refusals = exceeded + 1, refusals + 1
                continue
            admitted, refusals = admitted + 1, 0
            elsewhere += not isinstance(held.held, tuple)
            await asyncio.sleep(chance.uniform(0, RUNS_SECONDS))
            cost = most * (chance.uniform(1, 2) if chance.random() < some else chance.random())
            record.outcome, record.usage, record.cost = Outcome.SUCCESS, Usage(10, 10), Cost(cost, "table")
            await accounts.settle(record, held)
            spent += round(cost * NANO)
            largest = max(largest, round(cost * NANO) - round(expected * NANO))
            beyond += max(round(cost * NANO) - round(most * NANO), 0)

    await asyncio.gather(*(caller() for _ in range(AT_ONCE)))
    await fleet.close()
    return Counted(admitted, exceeded, reserved, elsewhere, spent, largest, beyond)


if __name__ == "__main__":
    sys.exit(main())
