"""The log of real processes, read back line by line and held against docs/logs.schema.json."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import httpx2
import pytest

from service.auth import hash_key
from service.domain import Outcome
from service.logging import BufferedLines
from tests.fakes.upstream import FakeUpstream
from tests.log_lines import line_of
from tests.running import ROOT, WeirProcess, free_port

KEY: Final = "weir-key-of-a-team-0123456789"
POOR: Final = "weir-key-of-the-poor-0123456789"
HURRIED: Final = "weir-key-of-the-hurried-0123456789"
SECRETS: Final = (KEY, POOR, HURRIED, "sk-upstream-secret", "a private question")
CHAT: Final = "/v1/chat/completions"
TRACE: Final = "4bf92f3577b34da6a3ce929d0e0e4736"
CONFIG: Final = """
upstreams:
  - {{name: fake, base_url: {base_url}, api_key_env: UPSTREAM_KEY}}
models:
  - {{name: "*", upstream: fake, price: {{input: 2.0, output: 8.0}}}}
limits:
  - {{name: once, keys: [hurried], requests: 1, window: 3600}}
budgets:
  - {{name: nothing, tenants: [poor], usd: 0.000001}}
keys:
  - {{name: app, tenant: team, sha256: {app}}}
  - {{name: poor, tenant: poor, sha256: {poor}}}
  - {{name: hurried, tenant: team, sha256: {hurried}}}
"""


def checked(weir: WeirProcess) -> list[dict[str, Any]]:
    """All lines of both outputs, each of which is one of the schema."""
    assert weir.error_lines == []
    return list(map(line_of, weir.lines))


def requests(weir: WeirProcess) -> list[dict[str, Any]]:
    return [line for line in checked(weir) if line["event"] == "request"]


class Caller:
    """Asks a Weir, each request under a name of its own, which is its id."""

    def __init__(self, weir: WeirProcess) -> None:
        self._weir = weir
        self.asked: list[str] = []

    def ask(
        self, name: str, model: str = "gpt-4o-mini", *, key: str = KEY, path: str = CHAT, **more: Any
    ) -> httpx2.Response:
        own = {"X-Request-ID": name, "Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        headers = own | more.pop("headers", {})
        body = more.pop("content", None)
        if body is None:
            messages = [{"role": "user", "content": "a private question"}]
            body = json.dumps({"model": model, "messages": messages, **more})
        self.asked.append(name)
        return httpx2.post(f"{self._weir.url}{path}", content=body, headers=headers, timeout=30)

    def begin(self, name: str, model: str) -> socket.socket:
        """A request on a connection of its own, which leaves when that is closed."""
        self.asked.append(name)
        body = json.dumps({"model": model, "messages": [{"role": "user", "content": "a private question"}]})
        connection = socket.create_connection(("127.0.0.1", self._weir.port), 20)
        head = (
            f"POST {CHAT} HTTP/1.1\r\nHost: weir\r\nX-Request-ID: {name}\r\n"
            f"Authorization: Bearer {KEY}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        connection.sendall((head + body).encode())
        return connection


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeUpstream]:
    with FakeUpstream() as upstream:
        yield upstream
        assert upstream.errors == []


@pytest.fixture(scope="module")
def run(fake: FakeUpstream, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """The canonical lines of one process in which every outcome happened, by the names of the requests."""
    config = tmp_path_factory.mktemp("logs") / "weir.yaml"
    hashes = {"app": hash_key(KEY), "poor": hash_key(POOR), "hurried": hash_key(HURRIED)}
    config.write_text(CONFIG.format(base_url=fake.base_url, **hashes))
    environment = {
        "WEIR_CONFIG": str(config),
        "UPSTREAM_KEY": "sk-upstream-secret",
        "OPENAI_MAX_RETRIES": "0",
        "STREAM_IDLE_TIMEOUT": "0.5",
        "MAX_CONCURRENT_REQUESTS": "2",
        "MAX_QUEUED_REQUESTS": "0",
        "DRAIN_TIMEOUT": "1",
        "LOG_SLOW_REQUEST_SECONDS": "1",
    }
    with WeirProcess(**environment) as weir, ThreadPoolExecutor(2) as pool:
        weir.wait_until_ready()
        caller = Caller(weir)
        ask = caller.ask
        ask("good", headers={"traceparent": f"00-{TRACE}-00f067aa0ba902b7-01", "X-Weir-Priority": "low"})
        ask("stream", stream=True)
        ask("embeddings", path="/v1/embeddings", content='{"model": "text-embedding-3-small", "input": "x"}')
        ask("turn", path="/api/v1/chat", content='{"message": "a private question"}')
        ask("batch", path="/api/v1/batch", content='{"prompts": ["a", "b"], "model": "flaky-1"}')
        for name in ("miss", "hit"):
            ask(name, temperature=0)
        for name in ("kept", "replayed"):
            ask(name, headers={"Idempotency-Key": "one-key"})
        ask("slow", "slow-head-1200")
        ask("bad-key", key="wrong")
        ask("bad-json", content="{")
        ask("bad-body", path="/api/v1/chat", content='{"message": 1}')
        ask("rejected", "status-400")
        ask("limited-before", key=HURRIED)
        ask("limited", key=HURRIED)
        ask("budget", key=POOR)
        ask("upstream", "status-503")
        ask("upstream-in-stream", "error-event", stream=True)
        ask("timeout", "hang", headers={"X-Request-Timeout": "0.1"})
        ask("stalled", "stall", stream=True)
        ask("truncated", "drop", stream=True)
        calls = len(fake.requests)
        with caller.begin("left", "hang"):
            fake.wait_for_call(calls + 1)
        weir.wait_for_line('"request_id":"left"')
        calls = len(fake.requests)
        held = [pool.submit(ask, f"held-{number}", "gate") for number in range(2)]
        fake.wait_for_call(calls + 2)
        ask("overloaded")
        fake.release()
        for one in held:
            one.result()
        httpx2.get(f"{weir.url}/nowhere", headers={"X-Request-ID": "nowhere"})
        caller.asked.append("nowhere")
        calls = len(fake.requests)
        cut = pool.submit(ask, "cut", "hang")
        fake.wait_for_call(calls + 1)
        weir.terminate()
        cut.result()
        assert weir.wait() == 0
        lines = requests(weir)
        text = "\n".join(weir.lines)
    assert not [secret for secret in SECRETS if secret in text]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in caller.asked}
    for line in lines:
        found[line["request_id"]].append(line)
    return found


OUTCOMES: Final = {
    "good": ("success", 200, None, "info"),
    "stream": ("success", 200, None, "info"),
    "embeddings": ("success", 200, None, "info"),
    "turn": ("success", 200, None, "info"),
    "miss": ("success", 200, None, "info"),
    "hit": ("success", 200, None, "info"),
    "kept": ("success", 200, None, "info"),
    "replayed": ("success", 200, None, "info"),
    "slow": ("success", 200, None, "warning"),
    "bad-key": ("client_error", 401, "invalid_api_key", "info"),
    "bad-json": ("client_error", 400, "invalid_request", "info"),
    "bad-body": ("client_error", 422, "validation_error", "info"),
    "rejected": ("client_error", 400, "upstream_rejected", "info"),
    "limited": ("rate_limited", 429, "rate_limit_exceeded", "info"),
    "budget": ("budget_rejected", 402, "budget_exceeded", "info"),
    "upstream": ("upstream_error", 503, "openai_service_error", "warning"),
    "upstream-in-stream": ("upstream_error", 200, "openai_service_error", "warning"),
    "timeout": ("timeout", 504, "request_deadline_exceeded", "warning"),
    "stalled": ("timeout", 200, "api_timeout", "warning"),
    "truncated": ("stream_truncated", 200, "stream_truncated", "warning"),
    "left": ("client_disconnected", 499, "client_disconnected", "info"),
    "overloaded": ("overloaded", 503, "overloaded", "warning"),
    "cut": ("internal_error", 503, "server_shutting_down", "warning"),
    "nowhere": ("client_error", 404, "not_found", "info"),
}


@pytest.mark.parametrize("name", OUTCOMES)
def test_each_request_has_one_line_that_tells_how_it_ended(
    run: dict[str, list[dict[str, Any]]], name: str
) -> None:
    (line,) = run[name]
    assert (line["outcome"], line["status"], line.get("error_code"), line["level"]) == OUTCOMES[name]


def test_every_outcome_is_among_them(run: dict[str, list[dict[str, Any]]]) -> None:
    assert {line["outcome"] for lines in run.values() for line in lines} == set(Outcome)


def test_each_prompt_of_a_batch_has_its_own(run: dict[str, list[dict[str, Any]]]) -> None:
    assert sorted(line["outcome"] for line in run["batch"]) == ["success", "upstream_error"]
    assert len({line["id"] for line in run["batch"]}) == 2


def test_a_line_tells_of_the_call_what_is_known(run: dict[str, list[dict[str, Any]]]) -> None:
    (line,) = run["good"]
    assert {
        "trace_id": TRACE,
        "key": "app",
        "tenant": "team",
        "priority": "low",
        "operation": "chat",
        "model": "gpt-4o-mini",
        "upstream": "fake",
        "stream": False,
        "cache": "bypass",
        "attempts": 1,
        "input_tokens": 12,
        "output_tokens": 6,
        "cached_input_tokens": 4,
        "reasoning_tokens": 2,
        "usage_source": "provider",
        "cost_usd": pytest.approx((12 * 2 + 6 * 8) / 1_000_000),
        "cost_source": "override",
        "finish_reason": "stop",
    }.items() <= line.items()
    assert 0 < line["upstream_seconds"] <= line["duration_seconds"]
    assert "slow" not in line
    assert "sample_ratio" not in line


def test_a_streams_line_has_its_pace(run: dict[str, list[dict[str, Any]]]) -> None:
    (line,) = run["stream"]
    assert line["stream"] is True
    assert 0 < line["time_to_first_token_seconds"] <= line["duration_seconds"]
    assert line["time_per_output_token_seconds"] >= 0


def test_lines_of_the_cache_and_of_replays_say_so(run: dict[str, list[dict[str, Any]]]) -> None:
    (miss,), (hit,), (kept,), (replayed,) = (run[name] for name in ("miss", "hit", "kept", "replayed"))
    assert (miss["cache"], hit["cache"]) == ("miss", "hit")
    assert (hit["attempts"], hit["input_tokens"], hit["cost_usd"], hit["cost_source"]) == (0, 0, 0.0, "cache")
    assert hit["saved_usd"] == pytest.approx(miss["cost_usd"])
    assert "replay_of" not in kept
    assert replayed["replay_of"] == "kept"
    assert "id" not in replayed


def test_a_slow_request_is_told_as_a_warning_and_once(run: dict[str, list[dict[str, Any]]]) -> None:
    assert [(line["slow"], line["level"]) for line in run["slow"]] == [(True, "warning")]
    assert {name for name, lines in run.items() if "slow" in lines[0]} == {"slow", "cut"}
    assert all(line["duration_seconds"] > 1 for name in ("slow", "cut") for line in run[name])


def test_a_request_that_was_refused_at_the_door_has_no_record(run: dict[str, list[dict[str, Any]]]) -> None:
    (line,) = run["bad-key"]
    assert (line["key"], line["route"]) == ("anonymous", CHAT)
    assert not {"id", "model", "input_tokens", "cost_usd", "attempts"} & set(line)


# -- other lines ---------------------------------------------------------------------------------


def test_all_that_gunicorn_and_uvicorn_say_is_lines() -> None:
    with WeirProcess(WORKER_COUNT="2") as weir:
        weir.wait_until_ready(workers=2)
        with socket.create_connection(("127.0.0.1", weir.port), 20) as caller:
            caller.sendall(b"\x00 no HTTP\r\n\r\n")
            assert caller.recv(4096)
        weir.wait_for_line("Invalid HTTP request")
        weir.terminate()
        assert weir.wait() == 0
        lines = checked(weir)
    loggers = Counter(line.get("logger", "weir") for line in lines)
    assert loggers["uvicorn.error"] == 1
    assert loggers["gunicorn.error"] >= 5
    told = " ".join(line["event"] for line in lines if line.get("logger") == "gunicorn.error")
    assert re.search(
        "Starting gunicorn.*Listening.*Booting worker.*Handling signal: term.*Shutting down", told
    )
    assert Counter(line["event"] for line in lines)["draining"] == 2


BAD_START: Final = """
import sys, threading, warnings
import service.serve
def broken(*_, **__):
    warnings.warn("about to break", stacklevel=1)
    thread = threading.Thread(target=lambda: 1 / 0); thread.start(); thread.join()
    raise RuntimeError("no way to begin")
service.serve.create_app = broken
from service.__main__ import main
sys.exit(main(["serve"]))
"""


def started(program: str, **environment: str) -> subprocess.Popen[bytes]:
    """A process with `program`, whose output nobody reads until the test does."""
    own = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME") or k.startswith("COVERAGE")}
    return subprocess.Popen(
        [sys.executable, "-c", program],
        env=own | {"PYTHONPATH": str(ROOT), "LOG_FORMAT": "json", **environment},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_a_start_that_fails_is_told_in_lines() -> None:
    with started(BAD_START, PORT=str(free_port()), ADMIN_PORT=str(free_port())) as process:
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (1, b"")
    lines = list(map(line_of, output.splitlines()))
    told = [(line["event"], line["level"]) for line in lines]
    assert told == [
        ("python_warning", "warning"),
        ("uncaught_exception", "error"),
        ("uncaught_exception", "critical"),
    ]
    assert [line["exception"]["type"] for line in lines[1:]] == ["ZeroDivisionError", "RuntimeError"]


def test_the_line_of_an_internal_error_has_its_stack_and_its_request() -> None:
    program = """
import sys
from service.chat import ChatService
def broken(*_, **__): raise LookupError("a fault of ours")
ChatService.exchange = broken
from service.__main__ import main
sys.exit(main(["serve"]))
"""
    port, admin = free_port(), free_port()
    with started(program, PORT=str(port), ADMIN_PORT=str(admin)) as process:
        assert process.stdout is not None
        output = iter(process.stdout)
        next(line for line in output if b'"event":"ready"' in line)
        headers = {"X-Request-ID": "broken", "traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"}
        answer = httpx2.post(f"http://127.0.0.1:{port}{CHAT}", content="{}", headers=headers, timeout=30)
        assert answer.status_code == 500
        process.send_signal(signal.SIGTERM)
        lines = list(map(line_of, output))
        assert process.wait(60) == 0
    error, request = (line for line in lines if line.get("request_id") == "broken")
    assert error["trace_id"] == request["trace_id"] == TRACE
    assert (error["event"], error["level"]) == ("internal_error", "error")
    assert (error["exception"]["type"], error["exception"]["message"]) == ("LookupError", "a fault of ours")
    assert error["exception"]["frames"][-1]["function"] == "broken"
    assert (request["outcome"], request["error_code"]) == ("internal_error", "internal_error")


# -- the level -----------------------------------------------------------------------------------


def level(weir: WeirProcess, body: Any = None, method: str = "PUT") -> httpx2.Response:
    content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    return httpx2.request(method, f"{weir.admin_url}/log-level", content=content, timeout=20)


@pytest.fixture(scope="module")
def quiet() -> Iterator[WeirProcess]:
    """One that says warnings alone."""
    with WeirProcess(LOG_LEVEL="warning", SIMULATOR_TOKENS_PER_SECOND="100000") as weir:
        _wait_for_answer(f"{weir.admin_url}/readyz")
        yield weir


def test_the_level_is_changed_by_a_call_and_returns_by_itself(quiet: WeirProcess) -> None:
    usual = {"level": "warning", "configured": "warning", "seconds_left": None}
    assert level(quiet, method="GET").json() == usual
    httpx2.get(f"{quiet.url}/health", headers={"X-Request-ID": "unheard"})
    told = level(quiet, {"level": "info"}).json()
    assert (told["level"], told["configured"]) == ("info", "warning")
    assert 590 < told["seconds_left"] <= 600
    httpx2.get(f"{quiet.url}/health", headers={"X-Request-ID": "heard"})
    quiet.wait_for_line('"request_id":"heard"')
    assert level(quiet, {"level": "info", "seconds": 0.01}).status_code == 200
    while level(quiet, method="GET").json() != usual:
        pass
    quiet.wait_for_events("log_level_returned", 1)
    httpx2.get(f"{quiet.url}/health", headers={"X-Request-ID": "unheard"})
    httpx2.get(f"{quiet.url}/nowhere")
    assert level(quiet, {"level": "info"}).status_code == 200
    httpx2.get(f"{quiet.url}/health", headers={"X-Request-ID": "last"})
    quiet.wait_for_line('"request_id":"last"')
    assert {line["request_id"] for line in requests(quiet)} == {"heard", "last"}


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"", "the body must be JSON such as"),
        (b"debug", "the body must be JSON such as"),
        (["debug"], "the body must be JSON such as"),
        ({"level": "debug", "second": 3}, "the body must be JSON such as"),
        ({}, "level must be one of debug, info, warning, error, critical"),
        ({"level": "loud"}, "level must be one of"),
        ({"level": ["debug"]}, "level must be one of"),
        ({"level": "debug", "seconds": "9"}, "seconds must be a number above 0, at most 86400"),
        ({"level": "debug", "seconds": True}, "seconds must be a number"),
        ({"level": "debug", "seconds": 0}, "seconds must be a number above 0"),
        ({"level": "debug", "seconds": 86_401}, "seconds must be a number above 0"),
        (b" " * 5_000, "the body is larger than 4096 bytes"),
    ],
)
def test_a_wrong_wish_is_told_and_changes_nothing(quiet: WeirProcess, body: Any, told: str) -> None:
    before = level(quiet, method="GET").json()["level"]
    answer = level(quiet, body)
    assert answer.status_code == 400
    assert answer.json()["status"].startswith(told)
    assert level(quiet, method="GET").json()["level"] == before


def test_the_level_is_no_place_for_other_methods(quiet: WeirProcess) -> None:
    assert level(quiet, {"level": "debug"}, "POST").status_code == 405
    assert level(quiet, method="HEAD").status_code == 200
    assert "/log-level" in httpx2.get(quiet.admin_url).json()["links"]
    assert httpx2.put(f"{quiet.url}/log-level", json={"level": "debug"}).status_code == 404


def test_the_level_is_changed_in_every_worker() -> None:
    with WeirProcess(WORKER_COUNT="2", DRAIN_DELAY="3") as weir:
        weir.wait_until_ready(workers=2)
        _wait_for_answer(f"{weir.admin_url}/readyz")
        assert level(weir, {"level": "warning"}).status_code == 200
        weir.terminate()  # each worker has three seconds, in which it beats, before it tells of its end
        assert weir.wait() == 0
        assert weir.events("draining") == []
        assert len(weir.events("log_level_changed")) == 1


# -- nobody reads --------------------------------------------------------------------------------


FEW_LINES: Final = """
import sys
from service.logging import BufferedLines
BufferedLines.MOST_LINES = 100
from service.__main__ import main
sys.exit(main([{command!r}]))
"""


def dropped_lines(admin: int) -> float:
    page = httpx2.get(f"http://127.0.0.1:{admin}/metrics").text
    found = re.search(r'^weir_telemetry_dropped_total\{signal="logs"\} ([0-9.]+)$', page, re.MULTILINE)
    return float(found[1]) if found is not None else 0.0


def test_a_log_that_nobody_reads_holds_up_no_request_and_what_is_dropped_is_counted() -> None:
    program = FEW_LINES.format(command="serve")
    port, admin = free_port(), free_port()
    with started(program, PORT=str(port), ADMIN_PORT=str(admin)) as process:
        _wait_for_answer(f"http://127.0.0.1:{admin}/readyz")
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as caller:
            for _ in range(1_000):  # 64 KB in the pipe, 100 lines that wait, and several hundred more
                assert caller.get("/health").status_code == 200
        until(lambda: dropped_lines(admin) > 100, "not counted")
        assert process.stdout is not None
        output = iter(process.stdout)
        lines = map(line_of, output)  # from here on it is read
        assert next(line for line in lines if line["event"] == "log_lines_dropped")["lines"] > 0
        process.send_signal(signal.SIGTERM)
        assert {"draining", "stopped"} <= {line["event"] for line in lines}
        assert process.wait(60) == 0
    assert BufferedLines.MOST_LINES == 10_000


def test_of_a_worker_whose_log_nobody_reads_what_is_dropped_is_counted() -> None:
    admin = free_port()
    nowhere = f"127.0.0.1:{free_port()}"
    urls = {"REDIS_URL": f"redis://{nowhere}", "LEDGER_POSTGRES_URL": f"postgresql://u:p@{nowhere}/d"}
    with started(FEW_LINES.format(command="worker"), ADMIN_PORT=str(admin), **urls) as process:
        _wait_for_answer(f"http://127.0.0.1:{admin}/livez")
        with httpx2.Client(base_url=f"http://127.0.0.1:{admin}", timeout=20) as caller:
            for _ in range(1_000):  # each is told: 64 KB in the pipe, 100 lines that wait, and more
                assert caller.put("/log-level", json={"level": "debug"}).status_code == 200
        until(lambda: dropped_lines(admin) > 100, "not counted")
        assert process.stdout is not None
        lines = map(line_of, process.stdout)  # from here on it is read
        assert next(line for line in lines if line["event"] == "log_lines_dropped")["lines"] > 0
        process.send_signal(signal.SIGTERM)
        assert "stopped" in {line["event"] for line in lines}
        assert process.wait(60) == 0


def until(condition: Callable[[], bool], complaint: str) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, complaint


def _wait_for_answer(url: str) -> None:
    """Returns once there is a 200."""
    while True:
        try:
            if httpx2.get(url, timeout=20).status_code == 200:
                return
        except httpx2.TransportError:
            pass
