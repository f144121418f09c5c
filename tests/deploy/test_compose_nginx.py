"""nginx with the stack's own nginx.conf, on loopback, in front of a running Weir."""

from __future__ import annotations

import json
import re
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx2
import openai
import pytest

from service.auth import hash_key
from service.config import Settings
from tests.deploy.stack import COMPOSE, document, prepare
from tests.fakes.upstream import CONTENT, FakeUpstream
from tests.programs import need
from tests.running import WeirProcess, free_port, settings

KEY = "a-key-for-the-tests"
ADMIN = ("/livez", "/readyz", "/startupz", "/metrics")
CONF = (COMPOSE / "nginx/nginx.conf").read_text()


class Nginx:
    """`with Nginx(stack, folder, upstream_port) as edge:` serves `edge.url` until the end of the block.

    Only places differ from the container: ports, paths, the upstream's address; and what `changes` says.
    """

    def __init__(self, stack: Path, folder: Path, upstream_port: int, **changes: str) -> None:
        self._program = need("nginx")
        self._stack = stack
        self.port, self.health_port = free_port(), free_port()
        self.url = f"https://localhost:{self.port}"
        text = CONF
        for old, new in {
            "weir:8000": f"127.0.0.1:{upstream_port}",
            "listen 8443 ssl;": f"listen 127.0.0.1:{self.port} ssl;",
            "listen 127.0.0.1:8080;": f"listen 127.0.0.1:{self.health_port};",
            " /tmp/": f" {folder}/",
            "/etc/nginx/certs/": f"{stack}/certs/",
            # Said when it is ready; one worker, so that connections can be counted.
            "error_log stderr warn;": "error_log stderr notice;",
            "worker_processes auto;": "worker_processes 1;",
            **changes,
        }.items():
            assert old in text, old
            text = text.replace(old, new)
        # As root its workers would be nobody, who cannot read the folder; elsewhere it says so and goes on.
        self._conf = folder / "nginx.conf"
        self._conf.write_text(f"user root;\n{text}")
        self._command = [self._program, "-e", "stderr", "-p", str(folder), "-c", str(self._conf)]
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self._ended = False

    def check(self) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*self._command, "-t"], capture_output=True, text=True, timeout=30)

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [*self._command, "-g", "daemon off;"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.wait_for_line("start worker process ")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(10)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def wait_for_line(self, text: str) -> str:
        """The first line that it wrote with `text` in it; waits for it."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or any(text in line for line in self.lines), 20)
            assert any(text in line for line in self.lines), self.lines
            return next(line for line in self.lines if text in line)

    def client(self, **options: Any) -> httpx2.Client:
        trusted = ssl.create_default_context(cafile=self._stack / "certs/tls.crt")
        base: dict[str, Any] = {"base_url": self.url, "verify": trusted, "timeout": 20}
        return httpx2.Client(**base | {"headers": {"authorization": f"Bearer {KEY}"}} | options)

    def sdk(self, **options: Any) -> openai.OpenAI:
        """The official client, as it is but for the certificate that it trusts."""
        base: dict[str, Any] = {"base_url": f"{self.url}/v1", "api_key": KEY, "max_retries": 0, "timeout": 20}
        return openai.OpenAI(**base | {"http_client": self.client(headers={})} | options)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._changed:
                self.lines.append(line.rstrip("\n"))
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()


Start = Callable[..., Nginx]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need("nginx")
    return prepare(tmp_path_factory.mktemp("stack"))


@pytest.fixture(scope="module")
def upstream() -> Iterator[FakeUpstream]:
    with FakeUpstream() as fake:
        yield fake
        assert fake.errors == []


@pytest.fixture(scope="module")
def weir(upstream: FakeUpstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WeirProcess]:
    keys = tmp_path_factory.mktemp("keys") / "keys.yaml"
    keys.write_text(f"keys: [{{name: tests, sha256: '{hash_key(KEY)}'}}]")
    with WeirProcess(
        OPENAI_BASE_URL=upstream.base_url, WEIR_KEYS_FILE=str(keys), OPENAI_MAX_RETRIES="0", DRAIN_TIMEOUT="1"
    ) as running:
        running.wait_until_ready()
        yield running


@pytest.fixture
def start(stack: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts an nginx of this test alone."""
    with ExitStack() as running:
        yield lambda port, **changes: running.enter_context(Nginx(stack, tmp_path, port, **changes))


@pytest.fixture(scope="module")
def edge(stack: Path, weir: WeirProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    with Nginx(stack, tmp_path_factory.mktemp("nginx"), weir.port) as running:
        yield running


def ask(client: openai.OpenAI, model: str = "gpt-4o-mini") -> Any:
    return client.chat.completions.create(model=model, messages=[{"role": "user", "content": "Hello!"}])


def test_nginx_accepts_the_config(stack: Path, tmp_path: Path) -> None:
    told = Nginx(stack, tmp_path, 8000).check()
    assert told.returncode == 0, told.stderr
    faults = [
        line for line in told.stderr.splitlines() if "[notice]" not in line and "nginx: the" not in line
    ]
    assert [
        line for line in faults if '"user" directive' not in line and "test is successful" not in line
    ] == []


def test_a_chat_over_tls(edge: Nginx) -> None:
    assert ask(edge.sdk()).choices[0].message.content == CONTENT


def test_each_event_of_a_stream_arrives_while_the_stream_still_runs(
    edge: Nginx, upstream: FakeUpstream
) -> None:
    read_a_held_stream(edge, upstream)


def test_it_is_nginx_too_that_holds_no_event_back(start: Start, upstream: FakeUpstream) -> None:
    """Weir asks for it by a header (`X-Accel-Buffering`); the fake does not."""
    read_a_held_stream(start(upstream.port), upstream)


def read_a_held_stream(edge: Nginx, upstream: FakeUpstream) -> None:
    upstream.hold()
    upstream.clear()
    with edge.sdk(timeout=10) as client:
        stream = client.chat.completions.create(
            model="gate-stream", messages=[{"role": "user", "content": "Hello!"}], stream=True
        )
        text = ""
        while not text:  # the upstream goes on only when we have read this
            text = next(stream).choices[0].delta.content or ""
        call = upstream.wait_for_call()
        assert not call.released.is_set()
        assert not call.finished.is_set()
        upstream.release()
        for chunk in stream:
            if chunk.choices:
                text += chunk.choices[0].delta.content or ""
    assert text == CONTENT


def test_a_caller_who_leaves_is_seen_by_the_upstream(edge: Nginx, upstream: FakeUpstream) -> None:
    upstream.hold()
    upstream.clear()
    with edge.sdk() as client:
        stream = client.chat.completions.create(
            model="gate-stream", messages=[{"role": "user", "content": "Hello!"}], stream=True
        )
        next(stream)
        stream.close()
    assert upstream.wait_for_call().cancelled.wait(20)


def test_without_a_key_weir_refuses(edge: Nginx) -> None:
    with pytest.raises(openai.AuthenticationError):
        ask(edge.sdk(api_key="wrong"))


@pytest.mark.parametrize("path", [*ADMIN, "/metrics/", "/metrics?a=b", "//metrics"])
def test_nothing_of_the_admin_port_is_there(edge: Nginx, path: str) -> None:
    with edge.client() as client:
        answer = client.get(f"{edge.url}{path}")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "not_found"


def test_the_admin_paths_are_not_there_even_if_it_led_to_the_admin_port(
    start: Start, weir: WeirProcess
) -> None:
    astray = start(weir.admin_port)
    with astray.client() as client:
        for path in (*ADMIN, "/x/../metrics", "/%6detrics"):
            assert client.get(path).status_code == 404
        assert client.get("/").json()["status"] == "admin", "it does lead there"


def test_a_body_that_is_too_large_is_refused_as_the_sdk_knows_it(edge: Nginx) -> None:
    most = Settings.model_fields["max_body_bytes"].default
    assert f"client_max_body_size {most // 1024**2}m;" in CONF
    with pytest.raises(openai.APIStatusError) as raised:
        edge.sdk().chat.completions.create(
            model="gpt-4o-mini", messages=[{"role": "user", "content": "x" * most}]
        )
    assert raised.value.status_code == 413
    assert raised.value.code == "request_too_large"
    assert raised.value.response.headers["x-should-retry"] == "false"


def test_a_body_that_weir_takes_gets_through(edge: Nginx) -> None:
    answer = edge.sdk().chat.completions.create(
        model="gpt-4o-mini", messages=[{"role": "user", "content": "x" * 4_000_000}]
    )
    assert answer.choices[0].message.content == CONTENT


def test_too_many_requests_are_refused_as_the_sdk_knows_it(start: Start, weir: WeirProcess) -> None:
    edge = start(weir.port, **{"rate=50r/s": "rate=1r/m", "burst=100": "burst=1"})
    with edge.sdk() as client:
        ask(client)
        ask(client)
        with pytest.raises(openai.RateLimitError) as raised:
            ask(client)
    assert raised.value.code == "rate_limit_exceeded"
    assert raised.value.response.headers["retry-after"] == "1"


def test_too_many_connections_are_refused(start: Start, weir: WeirProcess, upstream: FakeUpstream) -> None:
    upstream.hold()
    upstream.clear()
    edge = start(weir.port, **{"limit_conn connections 100;": "limit_conn connections 1;"})
    with edge.sdk() as client:
        held = client.chat.completions.create(
            model="gate-stream", messages=[{"role": "user", "content": "Hello!"}], stream=True
        )
        next(held)
        with pytest.raises(openai.RateLimitError):
            ask(client)
        held.close()


def test_while_weir_is_away_callers_are_told_to_try_again(start: Start) -> None:
    edge = start(free_port())
    with pytest.raises(openai.InternalServerError) as raised:
        ask(edge.sdk())
    assert raised.value.status_code == 503
    assert raised.value.code == "server_shutting_down"
    assert raised.value.response.headers["x-should-retry"] == "true"


def test_what_reaches_weir(start: Start, upstream: FakeUpstream) -> None:
    """The fake stands in Weir's place, for it keeps what it is sent."""
    upstream.clear()
    edge = start(upstream.port)
    before = upstream.connections
    with edge.sdk() as client:
        for given in ("req-1:a/b", "bad id"):
            client.with_options(
                default_headers={"X-Request-ID": given, "X-Forwarded-For": "203.0.113.9"}
            ).chat.completions.create(model="gpt-4o-mini", messages=[{"role": "user", "content": "Hello!"}])
    first, second = (request.headers for request in upstream.requests)
    assert first["x-request-id"] == "req-1:a/b"
    assert re.fullmatch(r"[0-9a-f]{32}", second["x-request-id"])
    for headers in (first, second):
        assert headers["x-forwarded-for"] == "127.0.0.1"
        assert headers["x-forwarded-proto"] == "https"
        assert headers["host"] == "localhost"
        assert headers["authorization"] == f"Bearer {KEY}"
    assert upstream.connections - before == 1, "one connection for both"


def test_both_logs_have_the_same_id_and_none_has_the_key(edge: Nginx, weir: WeirProcess) -> None:
    with edge.client() as client:
        given = client.get("/v1/models?secret=in-the-query", headers={"X-Request-ID": "the-same-id"})
    assert given.headers["x-request-id"] == "the-same-id"
    line = edge.wait_for_line("the-same-id")
    event = json.loads(line)
    assert (event["status"], event["path"], event["client"]) == (200, "/v1/models", "127.0.0.1")
    weir.wait_for_line("the-same-id")
    assert KEY not in "".join(edge.lines)
    assert "in-the-query" not in "".join(edge.lines)


def test_the_health_check_is_answered(edge: Nginx) -> None:
    path = document("compose.yaml")["services"]["nginx"]["healthcheck"]["test"][-1].partition(":8080")[2]
    assert httpx2.get(f"http://127.0.0.1:{edge.health_port}{path}", timeout=20).status_code == 204


def test_it_waits_longer_than_weir_does() -> None:
    def of(name: str) -> int:
        found = re.search(rf"{name} (\d+)s;", CONF)
        assert found
        return int(found[1])

    ours = settings()
    assert of("proxy_read_timeout") > ours.openai_timeout
    assert of("client_body_timeout") >= ours.body_timeout
    assert of("proxy_read_timeout") > 4 * ours.stream_keepalive
    from service.serve import KEEP_ALIVE_SECONDS

    upstream = re.search(r"keepalive 64;.*?keepalive_timeout (\d+)s;", CONF, re.DOTALL)
    assert upstream
    assert int(upstream[1]) < KEEP_ALIVE_SECONDS
