"""The whole service on a real Redis: shared by two Weirs, taken away in every way, and given back."""

from __future__ import annotations

import json
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import httpx2
import pytest
import structlog

from tests.redis_servers import SentinelSet, Server, Single, SlowProxy, free_ports
from tests.running import RunningWeir, WeirProcess, configuration

FEATURES = ("limits", "conversations", "ledger", "cache", "idempotency")
RECOVERY_SECONDS = 5.0
ODD_PASSWORD = "p@:/ %41#?ü&[x]"  # all that has a meaning in an address


@pytest.fixture
def single() -> Iterator[Single]:
    with Single() as servers:
        yield servers


@pytest.fixture
def proxy(single: Single) -> Iterator[SlowProxy]:
    with SlowProxy(single.port) as between:
        yield between


@pytest.fixture
def lines() -> Iterator[list[Any]]:
    with structlog.testing.capture_logs() as captured:
        yield captured


def on_redis(url: str, **values: Any) -> RunningWeir:
    """A Weir that answers at once, by the simulator."""
    values = {"simulator_tokens_per_second": 100_000.0, "rate_limit_requests": 100_000} | values
    return RunningWeir(configuration(redis_url=url, **values))


class Caller:
    """What callers do; each method returns the response as it came."""

    def __init__(self, url: str) -> None:
        self._http = httpx2.Client(base_url=url, timeout=20)

    def chat(self, conversation: str | None = None, message: str = "Hello!") -> httpx2.Response:
        body = {"message": message} | ({"conversation_id": conversation} if conversation else {})
        return self._http.post("/api/v1/chat", json=body)

    def begun(self, message: str = "Hello!") -> str:
        """A new conversation's id."""
        answer = self.chat(message=message)
        assert answer.status_code == 200, answer.text
        begun: str = answer.json()["conversation_id"]
        return begun

    def complete(self) -> httpx2.Response:
        body = {"model": "simulator", "messages": [{"role": "user", "content": "Hello!"}]}
        return self._http.post("/v1/chat/completions", json=body)

    def conversation(self, name: str) -> httpx2.Response:
        return self._http.get(f"/api/v1/conversations/{name}")

    def conversations(self) -> httpx2.Response:
        return self._http.get("/api/v1/conversations")

    def delete(self, name: str) -> httpx2.Response:
        return self._http.delete(f"/api/v1/conversations/{name}")

    def health(self) -> dict[str, Any]:
        answer = self._http.get("/health")
        assert answer.status_code == 200
        state: dict[str, Any] = answer.json()
        return state

    def questions(self, name: str) -> list[str]:
        answer = self.conversation(name)
        assert answer.status_code == 200, answer.text
        return [m["content"] for m in answer.json()["messages"] if m["role"] == "user"]


def until(condition: Callable[[], bool], complaint: str, seconds: float = RECOVERY_SECONDS) -> float:
    """Polls until `condition` holds; the seconds that it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, f"{complaint} within {seconds:g} s"
        time.sleep(0.01)
    return time.monotonic() - began


def degraded(weir: RunningWeir) -> set[float | None]:
    return {weir.registry.get_sample_value("weir_degraded", {"feature": f}) for f in FEATURES}


def events(lines: Iterable[Any], *names: str) -> list[str]:
    return [line["event"] for line in lines if line["event"] in names]


def changes(lines: Iterable[Any]) -> list[str]:
    return events(lines, "redis_unavailable", "redis_available")


def ledger(server: Server, prefix: str = "weir:") -> list[str]:
    """The ids of all records, in the order of the stream."""
    found: list[str] = []
    for stream in server.command("KEYS", f"{prefix}*}}:ledger"):
        for _, fields in server.command("XRANGE", stream, "-", "+"):
            found.append(json.loads(fields["record"])["id"])
    return found


def check_503(answer: httpx2.Response) -> None:
    assert answer.status_code == 503, answer.text
    assert answer.json()["error"]["code"] == "state_unavailable"
    assert int(answer.headers["retry-after"]) >= 1


# -- one state for two ---------------------------------------------------------------------------


def test_two_weirs_are_one(single: Single) -> None:
    values = {"rate_limit_requests": 40, "rate_limit_window": 3600}
    with on_redis(single.url, **values) as a, on_redis(single.url, **values) as b:
        at_a, at_b = Caller(a.url), Caller(b.url)
        name = at_a.begun("one")
        assert at_b.chat(name, "two").status_code == 200
        assert at_a.questions(name) == ["one", "two"]
        assert [c["id"] for c in at_b.conversations().json()["conversations"]] == [name]
        assert at_b.delete(name).status_code == 204
        assert at_a.conversation(name).status_code == 404
        assert at_a.chat(name).status_code == 404

        def one(number: int) -> int:
            return Caller((a, b)[number % 2].url).complete().status_code

        # Three requests are used up; the one about a conversation that is gone came to no model.
        with ThreadPoolExecutor(16) as pool:
            codes = list(pool.map(one, range(60)))
        assert (codes.count(200), codes.count(429)) == (38, 22)
        records = [r.id for r in (*a.records(), *b.records())]
        entered = ledger(single.server)
        assert sorted(entered) == sorted(records)
        assert len(set(entered)) == len(entered) == 63


def test_a_prefix_keeps_two_weirs_apart(single: Single) -> None:
    values = {"rate_limit_requests": 1, "rate_limit_window": 60}
    one, two = ({**values, "redis_prefix": prefix} for prefix in ("a:", "b:"))
    with on_redis(single.url, **one) as a, on_redis(single.url, **two) as b:
        name = Caller(a.url).begun()
        assert Caller(b.url).conversation(name).status_code == 404
        assert Caller(a.url).complete().status_code == 429
        assert Caller(b.url).complete().status_code == 200
    assert {key[:2] for key in single.server.command("KEYS", "*")} == {"a:", "b:"}


def test_every_key_has_the_prefix_the_tenants_tag_and_an_end(single: Single) -> None:
    with on_redis(single.url, redis_prefix="here:", rate_limit_requests=10, rate_limit_window=60) as weir:
        caller = Caller(weir.url)
        caller.chat(caller.begun())
        keys = single.server.command("KEYS", "*")
    kinds = {key.removeprefix("here:{default}:").partition(":")[0] for key in keys if "{" in key}
    assert kinds == {
        *("conv", "msgs", "convs", "owners", "turn"),
        *("requests", "ledger", "entered", "hour", "day"),
    }
    endless = (
        "here:{default}:ledger",
        "here:tenants",
    )  # bounded by its length, and by the keys that were given out
    for key in keys:
        assert key.startswith("here:{default}:") or key in ("here:probe", "here:tenants", "here:sweeper"), key
        assert single.server.command("PTTL", key) > 0 or key in endless, key


# -- away ----------------------------------------------------------------------------------------


class Fault(NamedTuple):
    begin: Callable[[Single, SlowProxy], object]
    end: Callable[[Single, SlowProxy], object]


def refuse(single: Single, proxy: SlowProxy) -> None:
    proxy.refuse()
    proxy.drop()


def replica(single: Single, proxy: SlowProxy) -> None:
    single.server.command("REPLICAOF", "127.0.0.1", free_ports(1)[0])


def maxmemory(size: str) -> Callable[[Single, SlowProxy], object]:
    return lambda single, _: single.server.command("CONFIG", "SET", "maxmemory", size)


FAULTS = {
    "frozen": Fault(lambda single, _: single.freeze(), lambda single, _: single.thaw()),
    "killed": Fault(lambda single, _: single.kill(), lambda single, _: single.restart()),
    "refused": Fault(refuse, lambda _, proxy: proxy.pass_on()),
    "slow": Fault(lambda _, proxy: proxy.delay(0.5), lambda _, proxy: proxy.pass_on()),
    "black hole": Fault(lambda _, proxy: proxy.black_hole(), lambda _, proxy: proxy.pass_on()),
    "full": Fault(maxmemory("1"), maxmemory("0")),
    "replica": Fault(replica, lambda single, _: single.server.command("REPLICAOF", "NO", "ONE")),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_an_outage(fault: Fault, single: Single, proxy: SlowProxy, lines: list[Any]) -> None:
    with on_redis(single.url_at(proxy.port)) as weir:
        caller = Caller(weir.url)
        before = caller.begun("before")
        assert degraded(weir) == {0}
        assert caller.health()["parts"]["redis"]["status"] == "ok"

        fault.begin(single, proxy)
        found_out = []
        while degraded(weir) != {1}:
            found_out.append(caller.begun("found out"))
            assert len(found_out) < 4, "not noticed"
        check_503(caller.chat(before))
        check_503(caller.conversation(before))
        check_503(caller.conversations())
        check_503(caller.delete(before))
        began = time.monotonic()
        during = [caller.begun("during") for _ in range(8)]
        assert {caller.complete().status_code for _ in range(8)} == {200}
        assert time.monotonic() - began < 0.8, "calls waited for a Redis that is away"
        health = caller.health()
        assert health["status"] == "degraded"
        assert health["parts"]["redis"]["status"] == health["parts"]["conversations"]["status"] == "failing"
        assert health["parts"]["redis"]["detail"]["waiting_writes"] >= 24

        fault.end(single, proxy)
        until(lambda: degraded(weir) == {0}, "not back")
        until(lambda: caller.health()["parts"]["redis"]["detail"]["waiting_writes"] == 0, "not written")
        assert caller.health()["status"] == "ok"
        assert caller.chat(before, "after").status_code == 200
        assert caller.questions(before) == ["before", "after"]
        for name in found_out:
            assert caller.questions(name) == ["found out"]
        for name in during:
            assert caller.questions(name) == ["during"]
        assert {c["id"] for c in caller.conversations().json()["conversations"]} == {
            *(before, *found_out, *during)
        }
        # A caller that waits for each answer: so the order is known.
        assert ledger(single.server) == [record.id for record in weir.records()]
        for feature in FEATURES:
            assert weir.metric("weir_state_writes_dropped_total", feature=feature) == 0
    assert changes(lines) == ["redis_available", "redis_unavailable", "redis_available"]
    assert not events(lines, "redis_refused", "backlog_lost", "unhandled")


def test_a_server_that_forgot_the_scripts_is_no_outage(single: Single, lines: list[Any]) -> None:
    with on_redis(single.url) as weir:
        caller = Caller(weir.url)
        name = caller.begun("0")
        for number in range(1, 4):
            single.server.command("SCRIPT", "FLUSH")
            assert caller.chat(name, str(number)).status_code == 200
        assert caller.questions(name) == ["0", "1", "2", "3"]
        assert ledger(single.server) == [record.id for record in weir.records()]
    assert changes(lines) == ["redis_available"]


def test_away_at_boot_with_a_password_of_odd_letters() -> None:
    with Single(password=ODD_PASSWORD) as single, SlowProxy(single.port) as proxy:
        proxy.refuse()
        with WeirProcess(
            REDIS_URL=f"redis://127.0.0.1:{proxy.port}/0",
            REDIS_PASSWORD=ODD_PASSWORD,
            LOG_LEVEL="debug",
            SIMULATOR_TOKENS_PER_SECOND="100000",
        ) as weir:
            weir.wait_until_ready()
            caller = Caller(weir.url)
            for probe in ("livez", "readyz", "startupz"):
                assert httpx2.get(f"{weir.admin_url}/{probe}", timeout=5).status_code == 200
            name = caller.begun()
            check_503(caller.chat(name))
            said = [json.dumps(caller.health()), caller.chat(name).text]
            proxy.accept()
            until(lambda: caller.conversation(name).status_code == 200, "not back")
            until(lambda: len(ledger(single.server)) == 3, "not written")
            single.server.command("CONFIG", "SET", "requirepass", "another")
            single.server.command("AUTH", "another")
            proxy.drop()
            check_503(caller.conversation(name))
            weir.wait_for_line("AuthenticationError")
            for probe in ("livez", "readyz"):
                assert httpx2.get(f"{weir.admin_url}/{probe}", timeout=5).status_code == 200
            single.server.command("CONFIG", "SET", "requirepass", ODD_PASSWORD)
            until(lambda: caller.conversation(name).status_code == 200, "not back")
            said.append(json.dumps(caller.health()))
            weir.terminate()
            assert weir.wait() == 0
            parsed = [json.loads(line) for line in weir.lines if line.startswith("{")]
            assert changes(parsed) == ["redis_unavailable", "redis_available"] * 2
            told = ("redis_probe", "redis_unavailable")
            reasons = {line["reason"] for line in parsed if line["event"] in told}
            assert reasons == {"ConnectionError", "AuthenticationError"}
            for text in (*said, *weir.lines, *weir.error_lines):
                assert ODD_PASSWORD not in text
                assert "p@:" not in text


@pytest.mark.parametrize(
    ("values", "admitted", "refused"),
    [
        ({}, 10, 429),
        ({"replicas": 3}, 4, 429),
        ({"replicas": 100}, 1, 429),
        ({"replicas": 3, "limits_without_redis": "open"}, 14, None),
        ({"replicas": 3, "limits_without_redis": "closed"}, 0, 503),
    ],
    ids=["one pod", "share", "a small share", "open", "closed"],
)
def test_limits_without_redis(
    values: dict[str, Any], admitted: int, refused: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.stores.redis.backlog.CLOSING_SECONDS", 0.01)
    away = f"redis://127.0.0.1:{free_ports(1)[0]}"
    with on_redis(away, rate_limit_requests=10, rate_limit_window=3600, **values) as weir:
        caller = Caller(weir.url)
        answers = [caller.complete() for _ in range(14)]
        assert [a.status_code for a in answers] == [200] * admitted + [refused] * (14 - admitted)
        if refused == 503:
            check_503(answers[0])
        assert {r.outcome.value for r in weir.records(14)} <= {"success", "rate_limited", "overloaded"}


def test_a_turn_is_kept_that_was_loaded_before_redis_died(single: Single) -> None:
    with on_redis(single.url) as quick, on_redis(single.url, simulator_tokens_per_second=100.0) as weir:
        name = Caller(quick.url).begun("one")
        body = {"message": "two", "conversation_id": name}
        with httpx2.stream("POST", f"{weir.url}/api/v1/chat/stream", json=body, timeout=20) as answer:
            blocks = answer.iter_lines()
            next(blocks)
            single.kill()
            rest = [line for line in blocks if line.startswith("data: ")]
        assert json.loads(rest[-1].removeprefix("data: "))["finished"] is True
        assert "error" not in rest[-1]
        single.restart()
        until(lambda: degraded(weir) == {0}, "not back")
        until(lambda: Caller(weir.url).questions(name) == ["one", "two"], "the turn was lost")


def test_what_waits_is_written_also_under_load(single: Single, proxy: SlowProxy) -> None:
    """And nobody is told meanwhile that the conversation that he has just begun is unknown."""
    stop = threading.Event()
    codes: set[int] = set()

    def load(url: str) -> None:
        caller = Caller(url)
        while not stop.is_set():
            codes.add(caller.chat(caller.begun()).status_code)

    with on_redis(single.url_at(proxy.port)) as weir:
        proxy.refuse()
        proxy.drop()
        with ThreadPoolExecutor(8) as pool:
            loads = [pool.submit(load, weir.url) for _ in range(8)]
            backlog = weir.parts.adapters.fleet.backlog  # type: ignore[union-attr]
            until(lambda: len(backlog) > 400, "no load", 20)
            proxy.accept()
            try:
                until(lambda: len(backlog) == 0, "the backlog does not get shorter")
            finally:
                stop.set()
            for one in loads:
                one.result()
        assert codes == {200, 503}
        until(lambda: len(backlog) == 0, "not written")
        entered = ledger(single.server)
        assert len(entered) == len(set(entered))
        assert set(entered) == {record.id for record in weir.records()}


def test_what_does_not_fit_is_dropped_and_counted(single: Single, proxy: SlowProxy) -> None:
    proxy.refuse()
    with on_redis(single.url_at(proxy.port), backlog_writes=3) as weir:
        caller = Caller(weir.url)
        for _ in range(5):
            assert caller.complete().status_code == 200
        caller.begun()
        dropped = {f: weir.metric("weir_state_writes_dropped_total", feature=f) for f in FEATURES}
        assert dropped == {"ledger": 3, "conversations": 1, "limits": 0, "cache": 0, "idempotency": 0}
        proxy.accept()
        until(lambda: degraded(weir) == {0}, "not back")
        until(lambda: len(ledger(single.server)) == 3, "not written")
        assert ledger(single.server) == [record.id for record in weir.records(6)[:3]]


def test_a_process_that_ends_writes_what_waits_if_it_can(single: Single, proxy: SlowProxy) -> None:
    def end(weir: WeirProcess) -> None:
        weir.terminate()
        assert weir.wait() == 0

    def started() -> WeirProcess:
        url = single.url_at(proxy.port)
        return WeirProcess(REDIS_URL=url, SIMULATOR_TOKENS_PER_SECOND="100000", DRAIN_DELAY="0")

    proxy.refuse()
    with started() as weir, started() as unlucky:
        for one in (weir, unlucky):
            one.wait_until_ready()
            assert {Caller(one.url).complete().status_code for _ in range(5)} == {200}
        end(unlucky)
        assert [e["writes"] for e in unlucky.events("backlog_lost")] == [5]
        proxy.accept()
        end(weir)
        assert not weir.events("backlog_lost")
        assert len(ledger(single.server)) == 5


def test_callers_who_leave_are_in_the_ledger_once(single: Single, proxy: SlowProxy) -> None:
    """Each leaves at another point of the way: while it is counted, asked, or entered."""
    body = b'{"model": "simulator", "messages": [{"role": "user", "content": "Hello!"}]}'
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: w\r\nContent-Length: %d\r\n\r\n" % len(body)
    with on_redis(single.url_at(proxy.port)) as weir:
        proxy.delay(0.03)
        for number in range(30):
            with socket.create_connection(("127.0.0.1", weir.port), 20) as caller:
                caller.sendall(head + body)
                caller.settimeout(0.001 + number * 0.003)
                try:
                    caller.recv(1)
                except TimeoutError:
                    continue
        proxy.pass_on()
        records = weir.records(30)
        assert {r.outcome.value for r in records} >= {"client_disconnected", "success"}
        until(lambda: len(ledger(single.server)) == 30, "records are missing")
        assert set(ledger(single.server)) == {r.id for r in records}


def test_a_failover_by_sentinel_under_load(lines: list[Any]) -> None:
    with SentinelSet() as servers, on_redis(servers.url) as weir:
        stop = threading.Event()
        codes: list[int] = []

        def load(number: int) -> None:
            caller = Caller(weir.url)
            while not stop.is_set():
                codes.append((caller.complete() if number % 2 else caller.chat()).status_code)

        with ThreadPoolExecutor(4) as pool:
            loads = [pool.submit(load, number) for number in range(4)]
            until(lambda: len(codes) > 50, "no load")
            servers.kill_primary()
            until(lambda: degraded(weir) == {1}, "not noticed")
            primary = servers.wait_for_new_primary()
            until(lambda: degraded(weir) == {0}, "not back")
            seen = len(codes)
            until(lambda: len(codes) > seen + 50, "no load")
            stop.set()
            for one in loads:
                one.result()
        assert set(codes) == {200}
        until(lambda: len(ledger(primary)) == len(codes), "records are missing")
        assert set(ledger(primary)) == {record.id for record in weir.records(len(codes))}
        assert changes(lines) == ["redis_available", "redis_unavailable", "redis_available"]


def test_a_conversation_that_is_not_there_is_404_and_no_outage(single: Single) -> None:
    with on_redis(single.url) as weir:
        caller = Caller(weir.url)
        assert caller.chat(str(uuid.uuid4())).status_code == 404
        assert degraded(weir) == {0}
