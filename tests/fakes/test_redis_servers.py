"""The Redis servers of the tests do what their names say, and none of them stays."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import redis
from redis.backoff import NoBackoff
from redis.cluster import RedisCluster
from redis.retry import Retry
from redis.sentinel import Sentinel

from tests.redis_servers import (
    HOST,
    MASTER,
    ClusterSet,
    PortTakenError,
    RedisServerError,
    SentinelSet,
    Servers,
    Single,
    SlowProxy,
)
from tests.running import ROOT


@pytest.fixture
def _nothing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Neither a process nor a directory is there after the test; other runs make theirs elsewhere."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)  # it is looked up anew
    before = {child.pid for child in psutil.Process().children()}
    yield
    assert [child for child in psutil.Process().children() if child.pid not in before] == []
    assert list(tmp_path.iterdir()) == []


pytestmark = pytest.mark.usefixtures("_nothing_stays")


def client(url: str, timeout: float = 5.0) -> redis.Redis:
    return redis.Redis.from_url(
        url, socket_timeout=timeout, retry=Retry(NoBackoff(), 0), protocol=2, decode_responses=True
    )


def by_sentinel(servers: SentinelSet) -> redis.Redis:
    places = [(HOST, sentinel.port) for sentinel in servers.sentinels]
    found: redis.Redis = Sentinel(places, socket_timeout=5).master_for(  # type: ignore[no-untyped-call]
        MASTER, socket_timeout=5, decode_responses=True
    )
    return found


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def eventually(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class TestSingle:
    def test_a_killed_server_comes_back_with_its_data(self) -> None:
        with Single() as single, client(single.url) as caller:
            caller.set("kept", "yes")
            port, pid = single.port, single.server.pid
            single.kill()
            assert gone(pid)
            with pytest.raises(redis.ConnectionError):
                caller.ping()
            single.restart()
            assert (single.port, caller.get("kept")) == (port, "yes")
            single.stop()
            assert not single.server.running
            single.restore()
            assert caller.get("kept") == "yes"
            single.flush()
            assert caller.dbsize() == 0

    def test_it_is_ready_when_its_data_is_loaded(self) -> None:
        # Slowly: while it loads, it looks at its connections after each 1024 commands.
        with Single(config=["key-load-delay 10"]) as single:
            with client(single.url) as caller, caller.pipeline(transaction=False) as many:
                for number in range(10_000):
                    many.set(f"key-{number}", number)
                many.execute()
            single.restart()
            assert single.server.command("DBSIZE") == 10_000

    def test_a_frozen_server_answers_once_it_is_thawed(self) -> None:
        with Single() as single, client(single.url, timeout=0.1) as caller:
            caller.ping()
            single.freeze()
            with pytest.raises(redis.TimeoutError):
                caller.ping()
            single.thaw()
            with client(single.url) as patient:
                assert patient.ping()
            single.freeze()
            single.restore()
            with client(single.url) as patient:
                assert patient.ping()

    def test_it_ends_also_when_it_is_frozen(self) -> None:
        with Single() as single:
            single.freeze()
            pid = single.server.pid
        assert gone(pid)

    def test_a_password_is_asked_for(self) -> None:
        with Single(password="a/b c@d") as single:
            with client(single.url) as caller:
                assert caller.ping()
            stranger = client(f"redis://{HOST}:{single.port}")
            with stranger, pytest.raises(redis.AuthenticationError):
                stranger.ping()

    def test_a_full_server_refuses_writes_and_answers_reads(self) -> None:
        with Single(maxmemory="3mb") as single, client(single.url) as caller:
            caller.set("early", "1")
            with pytest.raises(redis.OutOfMemoryError):
                for number in range(100):
                    caller.set(f"big-{number}", "x" * 100_000)
            assert caller.get("early") == "1"

    def test_the_log_is_shown_when_it_does_not_start(self) -> None:
        with pytest.raises(RedisServerError, match="no-such-directive"):
            Single(config=["no-such-directive yes"]).__enter__()

    def test_a_port_that_another_has_is_told_apart(self) -> None:
        taken = socket.create_server((HOST, 0))
        with taken, pytest.raises(PortTakenError, match="Address already in use"):
            Single(config=[f"port {taken.getsockname()[1]}"]).__enter__()

    def test_it_ends_when_the_process_of_the_test_is_killed(self) -> None:
        program = (
            "from tests.redis_servers import Single\n"
            "with Single() as single:\n"
            "    print(single.server.pid, single.server.directory, flush=True)\n"
            "    input()\n"
        )
        with subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as child:
            assert child.stdout is not None
            pid, directory = child.stdout.readline().split()
            assert not gone(int(pid))
            child.send_signal(signal.SIGKILL)
        eventually(lambda: gone(int(pid)) and not Path(directory).exists())


class TestSentinelSet:
    def test_another_server_takes_over(self) -> None:
        with SentinelSet() as servers, contextlib.closing(by_sentinel(servers)) as caller:
            caller.set("kept", "yes")
            caller.wait(2, 5000)
            killed = servers.kill_primary()
            new = servers.wait_for_new_primary()
            assert new is not killed
            assert new is servers.primary
            assert caller.get("kept") == "yes"
            caller.set("later", "yes")

            servers.restore()
            assert servers.primary is new
            assert new.command("INFO", "replication")["connected_slaves"] == 2
            assert killed.command("GET", "later") == "yes"
            servers.flush()
            assert [server.command("DBSIZE") for server in servers.servers] == [0, 0, 0]

    def test_it_is_whole_again_after_a_freeze_and_a_planned_failover(self) -> None:
        with SentinelSet() as servers:
            old = servers.primary
            old.freeze()
            middle = servers.wait_for_new_primary()
            assert middle is not old
            servers.restore()
            servers.fail_over()
            assert servers.wait_for_new_primary() is not middle
            # Nobody has noticed yet.
            servers.kill_primary()
            servers.sentinels[0].kill()
            servers.restore()
            assert all(server.running for server in (*servers.servers, *servers.sentinels))
            assert servers.primary.command("INFO", "replication")["connected_slaves"] == 2


class TestClusterSet:
    def test_each_node_has_a_share_and_comes_back_with_it(self) -> None:
        with ClusterSet() as servers:
            first = servers.servers[0]
            with contextlib.closing(RedisCluster(HOST, first.port, decode_responses=True)) as caller:
                for number in range(60):
                    caller.set(f"key-{number}", number)
                sizes = [server.command("DBSIZE") for server in servers.servers]
                assert sum(sizes) == 60
                assert min(sizes) > 0
                servers.servers[1].kill()
                servers.restore()
                assert [server.command("DBSIZE") for server in servers.servers] == sizes
                assert caller.get("key-7") == "7"
                servers.flush()
                assert sum(server.command("DBSIZE") for server in servers.servers) == 0


@pytest.mark.parametrize("form", [SentinelSet, ClusterSet])
def test_a_set_that_does_not_start_leaves_nothing(form: Callable[..., Servers]) -> None:
    with pytest.raises(RedisServerError, match="no-such-directive"):
        form(config=["no-such-directive yes"]).__enter__()


class TestSlowProxy:
    @pytest.fixture
    def single(self) -> Iterator[Single]:
        with Single() as running:
            yield running

    @pytest.fixture
    def proxy(self, single: Single) -> Iterator[SlowProxy]:
        with SlowProxy(single.port) as running:
            yield running

    @pytest.fixture
    def caller(self, single: Single, proxy: SlowProxy) -> Iterator[redis.Redis]:
        with client(single.url_at(proxy.port), timeout=0.3) as connected:
            assert connected.ping()
            yield connected

    def test_it_passes_on_much(self, caller: redis.Redis) -> None:
        caller.set("big", "x" * 3_000_000)
        assert len(str(caller.get("big"))) == 3_000_000

    def test_a_delayed_answer_is_late_and_the_request_is_not(
        self, single: Single, proxy: SlowProxy, caller: redis.Redis
    ) -> None:
        proxy.delay(0.1)
        began = time.monotonic()
        assert caller.ping()
        assert time.monotonic() - began >= 0.1
        proxy.delay(60)
        with pytest.raises(redis.TimeoutError):
            caller.incr("count")
        assert single.server.command("GET", "count") == "1"

    def test_a_shorter_delay_holds_for_answers_that_wait(self, single: Single, proxy: SlowProxy) -> None:
        with client(single.url_at(proxy.port), timeout=20) as patient:
            patient.ping()
            proxy.delay(60)
            answers: list[object] = []
            waiting = threading.Thread(target=lambda: answers.append(patient.incr("count")))
            waiting.start()
            eventually(lambda: single.server.command("GET", "count") == "1")
            proxy.delay(0)
            waiting.join(20)
            assert answers == [1]

    def test_refusing_leaves_those_that_are_connected(
        self, single: Single, proxy: SlowProxy, caller: redis.Redis
    ) -> None:
        proxy.refuse()
        assert caller.ping()
        with client(single.url_at(proxy.port)) as other:
            with pytest.raises(redis.ConnectionError, match="refused"):
                other.ping()
            proxy.accept()
            assert other.ping()

    def test_dropped_connections_are_closed(self, proxy: SlowProxy, caller: redis.Redis) -> None:
        with socket.create_connection((HOST, proxy.port), timeout=20) as bare:
            bare.sendall(b"PING\r\n")
            assert bare.recv(100) == b"+PONG\r\n"
            proxy.drop()
            with contextlib.suppress(ConnectionResetError):
                assert bare.recv(100) == b""
        eventually(lambda: proxy.connections == 0)

    def test_nothing_comes_out_of_a_black_hole(
        self, single: Single, proxy: SlowProxy, caller: redis.Redis
    ) -> None:
        proxy.black_hole()
        with pytest.raises(redis.TimeoutError):
            caller.incr("count")
        with socket.create_connection((HOST, proxy.port), timeout=0.2) as bare:
            bare.sendall(b"INCR count\r\n")
            with pytest.raises(TimeoutError):
                bare.recv(100)
            proxy.pass_on()
            bare.settimeout(20)
            with contextlib.suppress(ConnectionResetError):
                assert bare.recv(100) == b""
        assert caller.incr("count") == 1

    def test_connections_end_with_the_server(self, single: Single, proxy: SlowProxy) -> None:
        with socket.create_connection((HOST, proxy.port), timeout=20) as bare:
            bare.sendall(b"PING\r\n")
            assert bare.recv(100) == b"+PONG\r\n"
            single.kill()
            with contextlib.suppress(ConnectionResetError):
                assert bare.recv(100) == b""
