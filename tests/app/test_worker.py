"""`python -m service worker` as a process: killed, stopped, cut off, wrongly set up; and several at once."""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import asyncpg
import httpx2
import msgspec
import pytest
import redis

from service.domain import Operation, Principal, RequestRecord
from tests.fakes.otlp import FakeCollector
from tests.log_lines import line_of
from tests.postgres_server import PostgresServer
from tests.redis_servers import Single, SlowProxy
from tests.running import ROOT, WeirProcess

TENANTS = ("one", "two", "three")


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    with PostgresServer() as server:
        yield server


@pytest.fixture(scope="module")
def single_server() -> Iterator[Single]:
    with Single() as servers:
        yield servers


class Place:
    """An empty Redis, a new database, and workers between them."""

    def __init__(self, single: Single, postgres: PostgresServer) -> None:
        self.single = single
        self.postgres = postgres
        self.name = f"d{uuid.uuid4().hex}"
        self.database = postgres.database(self.name)
        self.client: Any = redis.Redis.from_url(single.url)
        self.ids: set[str] = set()

    def add(self, count: int) -> None:
        pipeline = self.client.pipeline(transaction=False)
        for number in range(count):
            tenant = TENANTS[number % len(TENANTS)]
            made = RequestRecord(
                id=uuid.uuid4().hex,
                request_id="r",
                route="/v1/chat/completions",
                operation=Operation.CHAT,
                principal=Principal("app", tenant),
            )
            pipeline.xadd(f"weir:{{{tenant}}}:ledger", {"record": msgspec.json.encode(made)})
            pipeline.sadd("weir:tenants", tenant)
            self.ids.add(made.id)
        pipeline.execute()

    def worker(self, **values: str) -> WeirProcess:
        given = {
            "REDIS_URL": self.single.url,
            "LEDGER_POSTGRES_URL": self.database,
            "LEDGER_POLL_SECONDS": "0.05",
        }
        return WeirProcess("worker", **given | values)

    def copied(self) -> list[str]:
        with contextlib.suppress(asyncpg.UndefinedTableError):
            found = self.postgres.execute("SELECT id FROM weir.weir_ledger", url=self.database)
            return [row["id"] for row in found]
        return []  # no tables yet

    def until_copied(self) -> None:
        until(lambda: len(self.copied()) >= len(self.ids), "not copied")
        assert sorted(self.copied()) == sorted(self.ids), "each once, and no other"


@pytest.fixture
def place(single_server: Single, postgres: PostgresServer) -> Iterator[Place]:
    single_server.restore()
    single_server.flush()
    if not postgres.running:
        postgres.launch()
    made = Place(single_server, postgres)
    yield made
    made.client.close()


def until(condition: Callable[[], bool], complaint: str, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, complaint
        time.sleep(0.01)


def metric(worker: WeirProcess, name: str) -> float:
    text = httpx2.get(f"{worker.admin_url}/metrics", timeout=20).text
    return next(
        float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"weir_sink_{name} ")
    )


def readiness(worker: WeirProcess) -> tuple[int, str]:
    answer = httpx2.get(f"{worker.admin_url}/readyz", timeout=20)
    return answer.status_code, answer.json()["status"]


def changes(worker: WeirProcess) -> list[str]:
    names = ("redis_available", "redis_unavailable", "postgres_available", "postgres_unavailable")
    return [
        event["event"]
        for event in sorted((e for name in names for e in worker.events(name)), key=lambda e: e["timestamp"])
    ]


def test_each_batch_is_a_trace(place: Place) -> None:
    place.add(6)
    with FakeCollector() as collector, place.worker(OTEL_EXPORTER_OTLP_ENDPOINT=collector.url) as worker:
        place.until_copied()
        worker.terminate()
        assert worker.wait() == 0
        spans = collector.spans
    assert {
        (span.name, span.attributes["weir.tenant"], span.attributes["weir.records"]) for span in spans
    } == {("ledger copy", tenant, 2) for tenant in TENANTS}
    assert len({span.trace_id for span in spans}) == len(TENANTS)


# -- exactly once --------------------------------------------------------------------------------


def test_killed_again_and_again_it_copies_each_record_once(place: Place) -> None:
    place.add(3000)
    stop = threading.Event()

    def go_on_adding() -> None:
        while not stop.is_set():
            place.add(30)
            stop.wait(0.02)

    adding = threading.Thread(target=go_on_adding)
    adding.start()
    within = 0
    try:
        for _ in range(12):
            before = len(place.copied())
            with place.worker(LEDGER_BATCH_RECORDS="20") as worker:
                # In the middle: it has copied some, and not all.
                until(lambda before=before: len(place.copied()) > before, "no progress")  # type: ignore[misc]
                time.sleep(random.uniform(0, 0.02))
                worker.process.kill()
                worker.process.wait()
            within += len(place.copied()) < len(place.ids)
    finally:
        stop.set()
        adding.join()
    assert within > 0, "it was never killed in the middle"
    assert len(set(place.copied())) == len(place.copied())
    with place.worker():
        place.until_copied()
    streams = [place.client.xlen(f"weir:{{{tenant}}}:ledger") for tenant in TENANTS]
    assert sum(streams) == len(place.ids)


def test_three_at_once_of_which_some_are_killed_copy_each_record_once(place: Place) -> None:
    place.add(2000)
    with ExitStack() as stack:
        workers = [stack.enter_context(place.worker(LEDGER_BATCH_RECORDS="10")) for _ in range(3)]
        for victim in workers[:2]:
            before = len(place.copied())
            until(lambda before=before: len(place.copied()) > before, "no progress")  # type: ignore[misc]
            victim.process.kill()
            place.add(300)
        place.until_copied()
        assert metric(workers[2], 'records_total{result="known"}') == 0


def test_new_records_and_new_tenants_come_by_themselves(place: Place) -> None:
    with place.worker() as worker:
        worker.wait_for_line("redis_available")
        assert place.copied() == []
        for _ in range(3):
            place.add(3)
            place.until_copied()
        assert readiness(worker) == (200, "ready")
        assert metric(worker, 'records_total{result="copied"}') == 9
        assert (metric(worker, "lag_records"), metric(worker, "lag_seconds")) == (0, 0)


def test_what_a_weir_answers_ends_in_the_table(place: Place) -> None:
    with WeirProcess(REDIS_URL=place.single.url, SIMULATOR_TOKENS_PER_SECOND="10000") as weir, place.worker():
        weir.wait_until_ready()
        for question in ("one", "two", "three"):
            body = {"model": "simulator", "messages": [{"role": "user", "content": question}]}
            assert httpx2.post(f"{weir.url}/v1/chat/completions", json=body, timeout=20).status_code == 200
        until(lambda: len(place.copied()) == 3, "not copied")
    for row in place.postgres.execute("SELECT * FROM weir.weir_ledger", url=place.database):
        assert (row["request_model"], row["outcome"], row["tenant"]) == ("simulator", "success", "default")
        assert row["output_tokens"] > 0
        assert row["extra"] is None, "each field of today's records has a column"


# -- ends ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["idle", "busy", "frozen"])
def test_sigterm_ends_it_within_seconds_whatever_it_does(place: Place, state: str) -> None:
    with place.worker(LEDGER_BATCH_RECORDS="5") as worker:
        worker.wait_for_line("redis_available")
        if state != "idle":
            place.add(20_000)
            until(lambda: len(place.copied()) > 0, "no progress")
        if state == "frozen":
            place.postgres.freeze()
        try:
            worker.terminate()
            assert worker.process.wait(20) == 0
        finally:
            place.postgres.thaw()
    assert [e["event"] for e in worker.events("draining") + worker.events("stopped")] == [
        "draining",
        "stopped",
    ]
    copied = place.copied()
    assert len(copied) == len(set(copied))
    if state == "busy":
        assert 0 < len(copied) < len(place.ids)
        assert len(copied) % 5 == 0 or len(copied) > 5
    assert worker.error_lines == []
    assert {"starting", "ready"} <= {line_of(line)["event"] for line in worker.lines}


# -- outages -------------------------------------------------------------------------------------


def test_postgres_away_is_one_line_for_each_change_and_the_lag_is_known(place: Place) -> None:
    with place.worker() as worker:
        place.add(10)
        place.until_copied()
        place.postgres.kill()
        place.add(50)
        until(lambda: metric(worker, "lag_records") == 50, "the lag is not known")
        until(lambda: metric(worker, "lag_seconds") > 0.5, "nor its age")
        until(lambda: metric(worker, 'errors_total{where="postgres"}') >= 2, "no second attempt")
        assert readiness(worker) == (503, "waits for postgres")
        assert httpx2.get(f"{worker.admin_url}/livez").status_code == 200
        place.postgres.restart()
        place.until_copied()
        until(lambda: metric(worker, "lag_records") == 0, "the lag stays")
        until(lambda: changes(worker)[2:] == ["postgres_unavailable", "postgres_available"], "not told")
    assert {"postgres_unavailable", "postgres_available"} <= {line_of(line)["event"] for line in worker.lines}
    assert worker.error_lines == []


def test_redis_away_is_one_line_for_each_change(place: Place) -> None:
    with place.worker() as worker:
        place.add(10)
        place.until_copied()
        place.single.kill()
        until(lambda: metric(worker, 'errors_total{where="redis"}') >= 2, "no second attempt")
        assert readiness(worker) == (503, "waits for redis")
        place.single.restart()
        place.add(10)
        place.until_copied()
        until(lambda: changes(worker)[2:] == ["redis_unavailable", "redis_available"], "not told")


def test_it_starts_while_both_are_away(place: Place) -> None:
    place.add(10)
    place.postgres.stop()
    place.single.kill()
    with place.worker() as worker:
        worker.wait_for_line("postgres_unavailable")
        assert readiness(worker) == (503, "waits for redis and postgres")
        place.postgres.launch()
        worker.wait_for_line("redis_unavailable")
        place.single.restart()
        place.until_copied()
        wanted = ["postgres_unavailable", "postgres_available", "redis_unavailable", "redis_available"]
        until(lambda: changes(worker) == wanted, "not told")


def test_connections_that_are_cut_at_any_time_cost_no_record(place: Place) -> None:
    place.add(3000)
    with SlowProxy(place.single.port) as to_redis, SlowProxy(place.postgres.port) as to_postgres:
        address = place.postgres.url_of("postgres", place.postgres.password, place.name, to_postgres.port)
        values = {"REDIS_URL": place.single.url_at(to_redis.port), "LEDGER_POSTGRES_URL": address}
        with place.worker(LEDGER_BATCH_RECORDS="20", **values) as worker:
            for cut in (to_postgres, to_redis) * 3:
                before = len(place.copied())
                until(lambda before=before: len(place.copied()) > before, "no progress")  # type: ignore[misc]
                cut.drop()
                place.add(200)
            place.until_copied()
            assert worker.process.poll() is None


# -- wrong settings ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"REDIS_URL": ""}, "REDIS_URL: is not set"),
        ({"LEDGER_POSTGRES_URL": ""}, "LEDGER_POSTGRES_URL: is not set"),
        (
            {"LEDGER_POSTGRES_URL": "mysql://u:hush@h/d"},
            "LEDGER_POSTGRES_URL=(hidden): must be a URL such as",
        ),
        ({"LEDGER_POSTGRES_URL": "postgresql://u:hush@h"}, "must name a database"),
        ({"LEDGER_POSTGRES_URL": "postgresql://u:hu/sh@h/d"}, "cannot be read as an address"),
        ({"LEDGER_POSTGRES_URL": "postgresql://u:[hush@h/d"}, "cannot be read as an address"),
        ({"LEDGER_POSTGRES_SCHEMA": "We;ir"}, "LEDGER_POSTGRES_SCHEMA=We;ir"),
        ({"LEDGER_BATCH_RECORDS": "0"}, "LEDGER_BATCH_RECORDS=0"),
        ({"LEDGER_POLL_SECONDS": "0"}, "LEDGER_POLL_SECONDS=0"),
        ({"ADMIN_PORT": "TAKEN"}, "ADMIN_PORT="),
        ({"LEDGER_POSTGRES_PASSWORD": "hush", "LEDGER_POSTGRES_URL": "BARE"}, "user or password are wrong"),
    ],
    ids=str,
)
def test_a_wrong_setting_ends_it_with_one_line(place: Place, change: dict[str, str], words: str) -> None:
    with contextlib.ExitStack() as stack:
        if change.get("ADMIN_PORT"):
            change = {"ADMIN_PORT": str(place.single.port)}
        if change.get("LEDGER_POSTGRES_URL") == "BARE":
            bare = place.postgres.url_of("postgres", None, place.name)
            change = change | {"LEDGER_POSTGRES_URL": bare}
        worker = stack.enter_context(place.worker(**change))
        assert worker.wait() == 78
    (line,) = worker.error_lines
    assert words in line
    assert "hush" not in line + "\n".join(worker.lines)


@pytest.mark.parametrize("word", ["hush", ""], ids=["a wrong one", "none"])
def test_a_password_that_redis_refuses_ends_it_with_one_line(place: Place, word: str) -> None:
    with Single(password="right") as single:
        place.single = single
        url = f"redis://127.0.0.1:{single.port}"
        with place.worker(REDIS_URL=url, REDIS_PASSWORD=word) as worker:
            assert worker.wait() == 78
    (line,) = worker.error_lines
    assert "REDIS_URL, REDIS_PASSWORD: Redis does not let the worker in" in line
    assert "hush" not in line + "\n".join(worker.lines)


# -- the service is spared -----------------------------------------------------------------------


def test_the_service_loads_no_driver_of_postgres() -> None:
    program = "import sys, service.__main__, service.serve, service.workers; print('asyncpg' in sys.modules)"
    said = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert said.strip() == "False"
