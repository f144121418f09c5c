"""What an outage of Redis costs those who chat: `python -m tests.performance.outage` prints a table.

One Weir with its simulator, a Redis behind a proxy, and callers who send a turn of a new conversation every
so often. Redis is taken away while they do, and given back.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Callable
from functools import partial
from statistics import quantiles
from typing import Any, Final, NamedTuple

import aiohttp

from tests.redis_servers import SentinelSet, Single, SlowProxy
from tests.running import WeirProcess

CALLERS: Final = 16
PAUSE_SECONDS: Final = 0.1
DELAY_SECONDS: Final = 0.5
PATIENCE_SECONDS: Final = 10.0
BODY: Final = b'{"message": "How does a weir work?"}'


class Fault(NamedTuple):
    begin: Callable[[Single, SlowProxy], object]
    end: Callable[[Single, SlowProxy], object]


def _refuse(_: Single, proxy: SlowProxy) -> None:
    proxy.refuse()
    proxy.drop()


def _maxmemory(size: str) -> Callable[[Single, SlowProxy], object]:
    return lambda single, _: single.server.command("CONFIG", "SET", "maxmemory", size)


FAULTS: Final = {
    "frozen": Fault(lambda single, _: single.freeze(), lambda single, _: single.thaw()),
    "killed": Fault(lambda single, _: single.kill(), lambda single, _: single.restart()),
    "refused": Fault(_refuse, lambda _, proxy: proxy.pass_on()),
    "slow": Fault(lambda _, proxy: proxy.delay(DELAY_SECONDS), lambda _, proxy: proxy.pass_on()),
    "full": Fault(_maxmemory("1"), _maxmemory("0")),
}


FAILED_OVER: Final = "failed over by Sentinel"
"""Its primary is killed and nothing is given back: what is measured from then on ends by itself."""


class Call(NamedTuple):
    began: float
    seconds: float
    status: int


class Row(NamedTuple):
    fault: str
    before: list[float]
    opening: list[float]
    during: list[float]
    after: list[float]
    opened_after: float
    recovered_after: float
    written_after: float
    not_good: int
    calls: int


async def measure(name: str, seconds: float) -> Row:
    if name == FAILED_OVER:
        with SentinelSet() as servers:
            return await _before(servers.url, name, seconds, servers.kill_primary, None)
    fault = FAULTS[name]
    with Single() as single, SlowProxy(single.port) as proxy:
        url = single.url_at(proxy.port)
        begin, end = partial(fault.begin, single, proxy), partial(fault.end, single, proxy)
        return await _before(url, name, seconds, begin, end)


async def _before(
    url: str, name: str, seconds: float, begin: Callable[[], object], end: Callable[[], object] | None
) -> Row:
    environment = {
        "REDIS_URL": url,
        "SIMULATOR_TOKENS_PER_SECOND": "100000",
        "RATE_LIMIT_REQUESTS": "1000000",
    }
    with WeirProcess(**environment) as weir:
        await asyncio.to_thread(weir.wait_until_ready)
        async with aiohttp.ClientSession() as session:
            return await _measure(name, seconds, weir, session, begin, end)


async def _measure(
    name: str,
    seconds: float,
    weir: WeirProcess,
    session: aiohttp.ClientSession,
    begin: Callable[[], object],
    end: Callable[[], object] | None,
) -> Row:
    calls: list[Call] = []
    callers = [asyncio.create_task(_call(session, weir.url, calls, number)) for number in range(CALLERS)]
    await asyncio.sleep(1.0)  # connections, caches
    started = time.perf_counter()
    await asyncio.sleep(seconds)
    taken = time.perf_counter()
    await asyncio.to_thread(begin)
    opened = await _until(lambda: _degraded(session, weir, 1))
    given_back = taken
    if end is not None:
        await asyncio.sleep(seconds)
        await asyncio.to_thread(end)
        given_back = time.perf_counter()
    recovered = await _until(lambda: _degraded(session, weir, 0))
    ended = given_back if end is not None else recovered
    written = await _until(lambda: _written(session, weir))
    await asyncio.sleep(seconds)
    for caller in callers:
        caller.cancel()
    await asyncio.gather(*callers, return_exceptions=True)

    def between(first: float, last: float) -> list[float]:
        return [c.seconds for c in calls if first <= c.began < last]

    return Row(
        name,
        before=between(started, taken - 0.5),
        opening=between(taken - 0.5, opened),
        during=between(opened, ended),
        after=between(written, time.perf_counter()),
        opened_after=opened - taken,
        recovered_after=recovered - given_back,
        written_after=written - given_back,
        not_good=sum(c.status != 200 for c in calls),
        calls=len(calls),
    )


async def _call(session: aiohttp.ClientSession, url: str, calls: list[Call], number: int) -> None:
    headers = {"Content-Type": "application/json"}
    await asyncio.sleep(PAUSE_SECONDS * number / CALLERS)
    while True:
        began = time.perf_counter()
        async with session.post(f"{url}/api/v1/chat", data=BODY, headers=headers) as answer:
            await answer.read()
        took = time.perf_counter() - began
        calls.append(Call(began, took, answer.status))
        await asyncio.sleep(max(0.0, PAUSE_SECONDS - took))


async def _until(condition: Callable[[], Any]) -> float:
    """When `condition` held."""
    deadline = time.perf_counter() + PATIENCE_SECONDS
    while not await condition():
        if time.perf_counter() > deadline:
            raise TimeoutError(f"not within {PATIENCE_SECONDS:g} s")
        await asyncio.sleep(0.01)
    return time.perf_counter()


async def _degraded(session: aiohttp.ClientSession, weir: WeirProcess, value: int) -> bool:
    async with session.get(f"{weir.admin_url}/metrics") as answer:
        return f'weir_degraded{{feature="limits"}} {value}.0' in await answer.text()


async def _written(session: aiohttp.ClientSession, weir: WeirProcess) -> bool:
    async with session.get(f"{weir.url}/health") as answer:
        parts = (await answer.json())["parts"]
        return int(parts["redis"]["detail"]["waiting_writes"]) <= CALLERS


def _percentile(seconds: list[float], percent: int) -> float:
    return quantiles(seconds, n=100)[percent - 1] * 1000


def _cells(row: Row) -> list[str]:
    p50 = [_percentile(part, 50) for part in (row.before, row.during, row.after)]
    p99 = [_percentile(part, 99) for part in (row.before, row.during, row.after)]
    return [
        row.fault,
        " / ".join(f"{value:.1f}" for value in p50),
        " / ".join(f"{value:.1f}" for value in p99),
        f"{p99[1] - p99[0]:+.1f}",
        f"{max(row.opening) * 1000:.0f}",
        f"{row.opened_after:.2f}",
        f"{row.recovered_after:.2f}",
        f"{row.written_after:.2f}",
        f"{row.not_good} of {row.calls}",
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each of the three parts")
    parser.add_argument(
        "faults", nargs="*", help=f"of {', '.join((*FAULTS, FAILED_OVER))}; all if none is named"
    )
    options = parser.parse_args()
    print(
        f"{CALLERS} callers, each a new conversation's turn every {PAUSE_SECONDS:g} s. "
        "Milliseconds before / while Redis is away / after; seconds until the breaker opens, until it "
        "closes, until all that waited is written.\n"
    )
    heads = ["Redis is", "p50", "p99", "p99 added", "slowest while it opens"]
    heads += ["opens after", "closes after", "written after", "not 200"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}", flush=True)
    worst = 0
    for name in options.faults or (*FAULTS, FAILED_OVER):
        row = asyncio.run(measure(name, options.seconds))
        worst += row.not_good
        print(f"| {' | '.join(_cells(row))} |", flush=True)
    return 1 if worst else 0


if __name__ == "__main__":
    sys.exit(main())
