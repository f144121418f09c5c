"""What a scrape takes after 50 models and 200 tenants: `python -m tests.performance.scrape`.

In each round the same requests are sent with and without a scraper beside them. It asks for a page a second,
15 to 60 times as often as Prometheus would.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from tests.performance.load import Job, Outcome
from tests.performance.pages import table
from tests.performance.processes import BenchmarkError, Child, Cores, cpu_seconds, free_port, pin

GOAL_SECONDS: Final = 0.15
GOAL_TIMES: Final = 1.1
"""The p99 of requests beside scrapes, in terms of that without: no more than its noise."""
ALONE: Final = 20
"""Scrapes of a round while nothing else runs."""
EVERY_SECONDS: Final = 1.0
CONNECTIONS: Final = (1, 16)
_ANSWER_SECONDS: Final = 60.0
_ACCEPT: Final = {"Accept": "application/openmetrics-text; version=1.0.0"}


class Page(NamedTuple):
    """One scrape."""

    seconds: float
    series: int
    size: int


class Weir:
    """The crowded one, with a load generator and a fake upstream: `ask` sends it requests."""

    def __init__(self, directory: Path, cores: Cores, running: ExitStack) -> None:
        def child(
            name: str, cores: frozenset[int] | None, environment: dict[str, str] | None = None
        ) -> Child:
            command = [sys.executable, "-m", f"tests.performance.{name}"]
            log = directory / f"{name}.log"
            started = Child(command, log=log, cores=cores, environment=environment, piped=environment is None)
            running.callback(started.stop)
            return started

        upstream = int(child("upstream", cores.rest).ask(None, _ANSWER_SECONDS))
        self._load = child("load", cores.rest)
        self._port, self._admin = free_port(), free_port()
        environment = {
            "PORT": str(self._port),
            "ADMIN_PORT": str(self._admin),
            "OPENAI_BASE_URL": f"http://127.0.0.1:{upstream}/v1",
            "LOG_FORMAT": "json",
        }
        self._service = child("crowded", cores.service, environment)
        self._service.wait_until_ready(self._admin, "/readyz")

    @property
    def cpu_seconds(self) -> float:
        return cpu_seconds(self._service.pid)

    def ask(self, connections: int, seconds: float) -> Outcome:
        job = Job("whole", self._port, connections, seconds, "any", self._service.pid)
        line = self._load.ask(msgspec.json.encode(job), seconds + _ANSWER_SECONDS)
        outcome = msgspec.json.decode(line, type=Outcome)
        if outcome.errors:
            raise BenchmarkError(str(outcome.errors))
        return outcome

    def scrape(self) -> Page:
        connection = HTTPConnection("127.0.0.1", self._admin, timeout=_ANSWER_SECONDS)
        try:
            began = time.perf_counter()
            connection.request("GET", "/metrics", headers=_ACCEPT)
            body = connection.getresponse().read()
            seconds = time.perf_counter() - began
        finally:
            connection.close()
        return Page(seconds, sum(not line.startswith(b"#") for line in body.splitlines()), len(body))

    @contextmanager
    def scraped(self, pages: list[Page]) -> Iterator[None]:
        """While this is open a page is asked for every so often, and noted."""
        over = threading.Event()

        def scrape() -> None:
            while not over.wait(EVERY_SECONDS):
                pages.append(self.scrape())

        scraper = threading.Thread(target=scrape)
        scraper.start()
        try:
            yield
        finally:
            over.set()
            scraper.join()


class Found(NamedTuple):
    """All rounds: requests by connections and whether they were scraped beside."""

    alone: list[Page]
    cpu_seconds: float
    """Of the service, for one of these."""
    beside: list[Page]
    requests: dict[tuple[int, bool], list[Outcome]]


def measure(weir: Weir, rounds: int, seconds: float) -> Found:
    alone: list[Page] = []
    cpu = 0.0
    beside: list[Page] = []
    requests: defaultdict[tuple[int, bool], list[Outcome]] = defaultdict(list)
    weir.ask(max(CONNECTIONS), 1.0)
    weir.scrape()
    for turn in range(rounds):
        before = weir.cpu_seconds
        alone += [weir.scrape() for _ in range(ALONE)]
        cpu += weir.cpu_seconds - before
        for connections in CONNECTIONS:
            for scraped in (False, True) if turn % 2 else (True, False):
                print(f"round {turn + 1}: {connections} connections", file=sys.stderr, flush=True)
                if scraped:
                    with weir.scraped(beside):
                        outcome = weir.ask(connections, seconds)
                else:
                    outcome = weir.ask(connections, seconds)
                requests[connections, scraped].append(outcome)
    return Found(alone, cpu / len(alone), beside, requests)


def told(found: Found) -> str:
    page = found.alone[-1]
    size = f"A page of {page.series:,} series, {page.size / 1e6:.1f} MB"
    lines = [f"{size}, takes {1000 * found.cpu_seconds:.0f} ms of CPU time; milliseconds:", ""]
    rows = [_times("while nothing else runs", found.alone), _times("beside the requests below", found.beside)]
    lines += [table(("", "scrapes", "p50", "highest"), rows), ""]
    lines.append(f"Requests without scrapes, and with one every {EVERY_SECONDS:g} s:")
    lines += ["", table(("", "requests/s", "p50, ms", "p99, ms"), list(_requests(found)))]
    return "\n".join(lines)


def _times(what: str, pages: Sequence[Page]) -> tuple[str, ...]:
    times = [1000 * page.seconds for page in pages]
    return (what, str(len(times)), f"{statistics.median(times):.0f}", f"{max(times):.0f}")


def _requests(found: Found) -> Iterator[tuple[str, ...]]:
    for (connections, scraped), outcomes in sorted(found.requests.items()):
        name = f"{connections} at a time, {'scraped' if scraped else 'not scraped'}"
        figures = (
            (".0f", [o.answers_per_second for o in outcomes]),
            (".2f", [o.p50_ms for o in outcomes if o.p50_ms is not None]),
            (".2f", [o.p99_ms for o in outcomes if o.p99_ms is not None]),
        )
        yield (name, *(_spread(values, spec) for spec, values in figures))


def _spread(values: Sequence[float], spec: str) -> str:
    return f"{statistics.median(values):{spec}} ({min(values):{spec}} to {max(values):{spec}})"


def goals(found: Found) -> Iterator[str]:
    alone = statistics.median(page.seconds for page in found.alone)
    yield (
        f"Goal, a page alone within {1000 * GOAL_SECONDS:.0f} ms: "
        f"{_verdict(alone < GOAL_SECONDS)}: {1000 * alone:.0f} ms"
    )
    for connections in CONNECTIONS:
        without, beside = (
            statistics.median(o.p99_ms or 0.0 for o in found.requests[connections, scraped])
            for scraped in (False, True)
        )
        yield (
            f"Goal, requests are not delayed, {connections} at a time: "
            f"{_verdict(beside <= GOAL_TIMES * without)}: p99 {without:.1f} ms, scraped {beside:.1f} ms"
        )


def _verdict(reached: bool) -> str:
    return "reached" if reached else "missed"


def main() -> int:
    """0 if everything ran, goals reached or not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0, help="measured time of each run")
    options = parser.parse_args()
    cores = Cores.choose()
    pin(cores.rest)
    with ExitStack() as running:
        directory = Path(running.enter_context(tempfile.TemporaryDirectory(prefix="weir-scrape-")))
        found = measure(Weir(directory, cores, running), options.rounds, options.seconds)
    print("\n".join((told(found), "", *goals(found), "", cores.note)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
