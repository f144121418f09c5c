"""What ten times too many requests do: `python -m tests.performance.overload` prints a table.

Weirs in processes of their own, pinned as in the benchmark. The first has few places and an upstream
that takes half a second: it is offered ten times the requests that it served at its peak, whether it answers
or not. The second has the usual places and an upstream that answers at once, so its processor is the end:
it meets ten times the callers that it needs for its peak, who come again when Retry-After says. A third, with
one place, tells what a refusal costs.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

import aiohttp
import msgspec
import uvloop

from tests.performance.processes import Child, Cores, free_port, pin

PLACES: Final = 64
FEW_CALLERS: Final = (16, 32, 64, 96)
PROCESSOR_CALLERS: Final = (8, 16, 32, 64)
FULL_CALLERS: Final = 16
NEARLY_PEAK: Final = 0.95
TIMES: Final = 10
TICK_SECONDS: Final = 0.005
PROBE_SECONDS: Final = 0.1
FILLING_SECONDS: Final = 1.0
"""Until the first answers are there; refusals count from the beginning."""
GRACE_SECONDS: Final = 10.0
ANSWER_SECONDS: Final = 30.0

GOODPUT_GOAL: Final = 0.9
REFUSAL_GOAL_MS: Final = 20.0


class Ended(NamedTuple):
    """One request: when it ended, how long it took, its status, whether its answer was whole."""

    at: float
    seconds: float
    status: int
    whole: bool
    retry_after: float


class Load(NamedTuple):
    """What the callers saw between two moments."""

    seconds: float
    goodput: float
    """Whole answers a second, once the first have come."""
    refusals: list[float]
    bad: int
    sent: int


class Probes:
    """Asks for liveness all the time."""

    def __init__(self) -> None:
        self.asked = self.failed = 0
        self.slowest = 0.0
        self.lowest_limit = float("inf")

    async def run(self, admin_port: int) -> None:
        base = f"http://127.0.0.1:{admin_port}"
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session:
            while True:
                await asyncio.sleep(PROBE_SECONDS)
                began = time.perf_counter()
                try:
                    async with session.get(f"{base}/livez") as answer:
                        live = answer.status == 200
                except (aiohttp.ClientError, TimeoutError):
                    live = False
                self.asked += 1
                self.failed += not live
                self.slowest = max(self.slowest, time.perf_counter() - began)
                if self.asked % 10 == 0:
                    async with session.get(f"{base}/metrics") as answer:
                        limits = sample(await answer.text(), "weir_concurrency_limit")
                    self.lowest_limit = min([self.lowest_limit, *limits])


class Connection(asyncio.Protocol):
    """One keep-alive connection with at most one request on it."""

    _transport: asyncio.Transport
    _answered: asyncio.Future[None]

    def __init__(self, ended: Callable[[Connection, Ended], None]) -> None:
        self._ended = ended
        self._data = bytearray()
        self._began: float | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are not of that class

    def connection_lost(self, exc: Exception | None) -> None:
        if self._began is not None:
            self._end(0, whole=False, retry_after=0.0)

    async def known(self, port: int) -> None:
        """Once the server has answered on this connection."""
        ended, self._ended = self._ended, self._first
        self._answered = asyncio.get_running_loop().create_future()
        self.send(f"GET / HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\n\r\n".encode())
        await self._answered
        self._ended = ended

    def _first(self, _connection: Connection, _ended: Ended) -> None:
        self._answered.set_result(None)

    def send(self, request: bytes) -> None:
        self._began = time.perf_counter()
        self._data.clear()
        self._transport.write(request)

    def close(self) -> None:
        self._began = None
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._data += data
        head_end = self._data.find(b"\r\n\r\n")
        if head_end < 0 or self._began is None:
            return
        head = bytes(self._data[:head_end]).lower()
        length = value(head, b"content-length")
        if length:
            if len(self._data) < head_end + 4 + int(length):
                return
            whole = b'"choices"' in self._data
        else:
            if not self._data.endswith(b"0\r\n\r\n"):
                return
            whole = b"data: [DONE]" in self._data[-300:]
        self._end(int(head[9:12]), whole=whole, retry_after=float(value(head, b"retry-after") or 0))

    def _end(self, status: int, *, whole: bool, retry_after: float) -> None:
        began, self._began = cast("float", self._began), None
        now = time.perf_counter()
        self._ended(self, Ended(now, now - began, status, whole, retry_after))


class Crowd:
    """Callers of one Weir."""

    def __init__(self, port: int, request: bytes) -> None:
        self._port = port
        self._request = request
        self._idle: list[Connection] = []
        self._all: list[Connection] = []
        self._stopping = False
        self._closed_loop = False
        self._patient = True
        self.ended: list[Ended] = []
        self.sent = 0

    async def callers(self, number: int, seconds: float) -> Load:
        """So many callers, each with its next request as soon as it has an answer, or as it was told."""
        self._closed_loop = True
        await self._connect(number)
        for connection in self._all:
            self._send(connection)
        return await self._measure(seconds)

    async def refused(self, number: int, seconds: float) -> Load:
        """So many callers who come again at once, whatever they are told."""
        self._patient = False
        return await self.callers(number, seconds)

    async def offer(self, per_second: float, seconds: float) -> Load:
        """So many requests a second, whatever becomes of them."""
        await self._connect(3 * PLACES)
        load = asyncio.create_task(self._measure(seconds))
        began, due = time.perf_counter(), 0
        while not load.done():
            owed = int((time.perf_counter() - began) * per_second) - due
            for _ in range(owed):
                if not self._idle:
                    await self._connect(1)
                self._send(self._idle.pop())
            due += owed
            await asyncio.sleep(TICK_SECONDS)
        return await load

    async def close(self) -> None:
        """Let what runs end, then close."""
        self._stopping = True
        until = time.perf_counter() + GRACE_SECONDS
        while len(self.ended) < self.sent and time.perf_counter() < until:
            await asyncio.sleep(0.05)
        self.abort()

    def abort(self) -> None:
        for connection in self._all:
            connection.close()

    async def _connect(self, number: int) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(number):
            _, connection = await loop.create_connection(
                lambda: Connection(self._has_ended), "127.0.0.1", self._port
            )
            self._all.append(connection)
            # Accepted before it counts: uvloop accepts one connection in each turn of a busy loop.
            await connection.known(self._port)
            self._idle.append(connection)

    def _send(self, connection: Connection) -> None:
        if not self._stopping:
            self.sent += 1
            connection.send(self._request)

    def _has_ended(self, connection: Connection, ended: Ended) -> None:
        self.ended.append(ended)
        if not self._closed_loop:
            self._idle.append(connection)
        elif ended.status == 503 and self._patient:
            asyncio.get_running_loop().call_later(ended.retry_after, self._send, connection)
        else:
            self._send(connection)

    async def _measure(self, seconds: float) -> Load:
        began, sent = time.perf_counter(), self.sent
        await asyncio.sleep(seconds)
        until = time.perf_counter()
        ended = [e for e in self.ended if began <= e.at < until]
        refusals = [e.seconds for e in ended if e.status == 503]
        good = [e for e in ended if e.status == 200 and e.whole]
        steady = began + FILLING_SECONDS
        return Load(
            until - began,
            sum(e.at >= steady for e in good) / (until - steady),
            refusals,
            len(ended) - len(good) - len(refusals),
            self.sent - sent,
        )


class Row(NamedTuple):
    what: str
    peak: float
    callers: int
    over: Load
    probes: Probes
    late: float

    @property
    def ratio(self) -> float:
        return self.over.goodput / self.peak

    @property
    def p99_ms(self) -> float:
        return percentile(self.over.refusals, 0.99)

    @property
    def reached(self) -> bool:
        refusals = not self.over.refusals or self.p99_ms < REFUSAL_GOAL_MS
        return self.ratio >= GOODPUT_GOAL and refusals and not self.probes.failed and not self.over.bad


async def find_peak(port: int, request: bytes, steps: tuple[int, ...], seconds: float) -> tuple[float, int]:
    """The best goodput, and the fewest callers that nearly reach it."""
    found = []
    for callers in steps:
        crowd = Crowd(port, request)
        await crowd.callers(callers, 1.0)  # connections, caches
        load = await crowd._measure(seconds)
        await crowd.close()
        found.append((load.goodput, callers))
    peak = max(goodput for goodput, _ in found)
    return peak, min(callers for goodput, callers in found if goodput >= NEARLY_PEAK * peak)


async def measure(
    what: str,
    ports: tuple[int, int],
    request: bytes,
    steps: tuple[int, ...],
    seconds: float,
    *,
    offered: bool,
) -> Row:
    port, admin_port = ports
    peak, callers = await find_peak(port, request, steps, max(seconds / 3, 3.0))
    probes, crowd = Probes(), Crowd(port, request)
    probing = asyncio.create_task(probes.run(admin_port))
    if offered:
        over = await crowd.offer(TIMES * peak, seconds)
    else:
        over = await crowd.callers(TIMES * callers, seconds)
    probing.cancel()
    await asyncio.gather(probing, return_exceptions=True)
    late = await timed_out(admin_port)
    await crowd.close()
    return Row(what, peak, callers, over, probes, late)


async def refusing(port: int, request: bytes, seconds: float) -> Load:
    """What a Weir does that is full and has nothing to do but refuse."""
    holder, crowd = Crowd(port, post(port, "paced-50-1000000", stream=True)), Crowd(port, request)
    holding = asyncio.create_task(holder.callers(1, 2 * seconds))
    await asyncio.sleep(1.0)
    load = await crowd.refused(FULL_CALLERS, seconds)
    await crowd.close()
    holding.cancel()
    await asyncio.gather(holding, return_exceptions=True)
    holder.abort()
    return load


async def timed_out(admin_port: int) -> float:
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"http://127.0.0.1:{admin_port}/metrics") as answer,
    ):
        return sum(sample(await answer.text(), 'weir_shed_total{priority="normal",reason="queue_timeout"}'))


def sample(text: str, name: str) -> list[float]:
    return [float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name + " ")]


def value(head: bytes, name: bytes) -> bytes:
    return head.partition(b"\r\n" + name + b":")[2].partition(b"\r\n")[0].strip()


def post(port: int, model: str, *, stream: bool) -> bytes:
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": "What does a weir do when there is too much water? " * 10}],
        "stream": stream,
    }
    encoded = msgspec.json.encode(body)
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(encoded)}\r\n\r\n"
    )
    return head.encode() + encoded


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] * 1000 if ordered else 0.0


class Stage:
    """The processes of a run."""

    def __init__(self, running: ExitStack) -> None:
        self._running = running
        self._directory = Path(running.enter_context(tempfile.TemporaryDirectory()))
        self._cores = Cores.choose()
        command = [sys.executable, "-m", "tests.performance.upstream"]
        upstream = Child(command, log=self._directory / "upstream.log", cores=self._cores.rest, piped=True)
        running.callback(upstream.stop)
        self._upstream_port = int(upstream.ask(None, ANSWER_SECONDS))
        pin(self._cores.rest)
        self.note = self._cores.note

    def weir(self, **settings: str) -> tuple[int, int]:
        """The ports of a new one."""
        port, admin_port = free_port(), free_port()
        environment = {
            "PORT": str(port),
            "ADMIN_PORT": str(admin_port),
            "OPENAI_BASE_URL": f"http://127.0.0.1:{self._upstream_port}/v1",
            "LOG_FORMAT": "json",
            **settings,
        }
        child = Child(
            [sys.executable, "-m", "service"],
            log=self._directory / f"weir-{port}.log",
            cores=self._cores.service,
            environment=environment,
        )
        self._running.callback(child.stop)
        child.wait_until_ready(admin_port, "/readyz")
        return port, admin_port


def cells(row: Row) -> list[str]:
    over, probes = row.over, row.probes
    refused = len(over.refusals) / over.seconds
    p50, most = percentile(over.refusals, 0.5), percentile(over.refusals, 1.0)
    return [
        row.what,
        f"{row.peak:.0f}",
        f"{over.sent / over.seconds:.0f}",
        f"{over.goodput:.0f}",
        f"{row.ratio:.2f}",
        f"{refused:.0f}",
        f"{p50:.1f} / {row.p99_ms:.1f} / {most:.0f}",
        f"{row.late:.0f}",
        f"{over.bad}",
        f"{probes.failed} of {probes.asked}, {probes.slowest * 1000:.0f}",
        f"{probes.lowest_limit:.0f}",
        "reached" if row.reached else "**missed**",
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=10.0, help="of the overload")
    options = parser.parse_args()
    heads = ["what ends first", "peak/s", "offered/s", "goodput/s", "of peak", "refused/s"]
    heads += ["refusals p50 / p99 / slowest ms", "of them after a wait", "neither good nor refused"]
    heads += ["liveness failed, slowest ms", "lowest limit", ""]
    good = True
    with ExitStack() as running, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        stage = Stage(running)
        print(f"{stage.note}\n\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}", flush=True)
        ports = stage.weir(MAX_CONCURRENT_REQUESTS=str(PLACES))
        request = post(ports[0], "paced-50-25", stream=True)
        row = runner.run(measure("places", ports, request, FEW_CALLERS, options.seconds, offered=True))
        good &= row.reached
        print(f"| {' | '.join(cells(row))} |", flush=True)
        ports = stage.weir()
        request = post(ports[0], "gpt-4o-mini", stream=False)
        what = measure("the processor", ports, request, PROCESSOR_CALLERS, options.seconds, offered=False)
        row = runner.run(what)
        good &= row.reached
        print(f"| {' | '.join(cells(row))} |", flush=True)
        ports = stage.weir(MAX_CONCURRENT_REQUESTS="1", MAX_QUEUED_REQUESTS="0")
        full = runner.run(
            refusing(ports[0], post(ports[0], "gpt-4o-mini", stream=False), options.seconds / 2)
        )
        refused = len(full.refusals) / full.seconds
        print(
            f"\nFull, and with nothing to do but refuse: {refused:.0f} refusals/s, "
            f"{1e6 / max(refused, 1):.0f} us each; {full.goodput:.0f} good/s, {full.bad} neither."
        )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
