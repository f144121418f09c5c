"""Real Redis for tests: one server, a primary with Sentinels, a cluster; and a proxy that is a bad network.

    with Single(password="word") as single:
        redis.Redis.from_url(single.url)
        single.kill()     # SIGKILL; `freeze` and `thaw` are SIGSTOP and SIGCONT
        single.restart()  # the same port, with its data

Every server listens on a free port of 127.0.0.1 and has a directory of its own. It ends with the block, also
when the start fails; should the test's process itself be killed, a small shell that waits for that ends it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import quote

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.programs import need

HOST: Final = "127.0.0.1"
MASTER: Final = "weir"
"""The name that the Sentinels know the primary by."""
START_SECONDS: Final = 20.0
POLL_SECONDS: Final = 0.005
# No port that the kernel gives to outgoing connections, else a client that dials a dead server time and again
# may one day hold its port; and none of Kubernetes' node ports.
PORTS: Final = range(12_000, 30_000)
GUARD: Final = 'read -r _; kill -KILL "$1"; rm -rf -- "$2"'
"""What the guarding shell does when its standard input ends: with the test's process."""


class RedisServerError(Exception):
    """A server did not do what it should; its log is in the message."""


class PortTakenError(RedisServerError):
    """Another program took the port between our look and the server's start."""


class Server:
    """One `redis-server` process, or a Sentinel; its configuration and data are in a directory of its own."""

    def __init__(
        self, lines: Iterable[str] = (), *, password: str | None = None, sentinel: bool = False
    ) -> None:
        self._program = need("redis-server")
        self._sentinel = sentinel
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._frozen = False
        self.port = free_ports(1)[0]
        self.directory = Path(tempfile.mkdtemp(prefix="weir-redis-"))
        self._log = self.directory / "log"
        self._file = self.directory / "redis.conf"
        common = [f"port {self.port}", f"bind {HOST}", f"dir {self.directory}"]
        if not sentinel:
            # The system has each write before its answer goes out (`no` never defers one for an fsync):
            # SIGKILL loses nothing.
            common += ['save ""', "appendonly yes", "appendfsync no", "shutdown-timeout 0"]
        if password is not None:
            common.append(f'requirepass "{password}"')
        self.configure([*common, *lines])
        self._client: Any = redis.Redis(  # its commands have no types
            host=HOST,
            port=self.port,
            password=password,
            socket_timeout=2,
            socket_connect_timeout=2,
            retry=Retry(NoBackoff(), 0),
            protocol=2,
            decode_responses=True,
        )

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def frozen(self) -> bool:
        return self.running and self._frozen

    @property
    def pid(self) -> int:
        assert self._process is not None, "it was never started"
        return self._process.pid

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def configure(self, lines: Iterable[str]) -> None:
        """Adds to the configuration that the next start reads."""
        with self._file.open("a") as file:
            file.writelines(f"{line}\n" for line in lines)

    def launch(self, *arguments: str) -> None:
        """Starts the process; `wait_until_ready` waits for it, so that several can start at once."""
        assert not self.running, f"redis-server on port {self.port} runs already"
        command = [self._program, str(self._file), *arguments, *(["--sentinel"] if self._sentinel else [])]
        with self._log.open("ab") as log:
            # A session of its own: Ctrl-C reaches pytest, which then ends the servers in its order.
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self._frozen = False
        self._guard = subprocess.Popen(
            ["/bin/sh", "-c", GUARD, "guard", str(self._process.pid), str(self.directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def wait_until_ready(self) -> None:
        """Returns when this process, and no other on its port, answers and has loaded its data."""
        self.until(self._answers, "did not start")

    def until(self, condition: Callable[[], bool], complaint: str, seconds: float = START_SECONDS) -> None:
        """Polls until `condition` holds; an error with the log if it does not, or if the process ends."""
        deadline = time.monotonic() + seconds
        while not condition():
            if not self.running:
                kind = PortTakenError if "Address already in use" in self.log else RedisServerError
                raise kind(self._complaint(f"ended (exit code {self._exit_code()})"))
            if time.monotonic() > deadline:
                raise RedisServerError(self._complaint(f"{complaint} within {seconds:g} s"))
            time.sleep(POLL_SECONDS)

    def command(self, *words: str | int) -> Any:
        """The answer to one command, as redis-py parses it: INFO as a dictionary, the rest as it came."""
        return self._client.execute_command(*words)

    def kill(self) -> None:
        """SIGKILL; returns when the process is gone. A dead one stays dead."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """SIGTERM, on which the server closes its files; SIGKILL where that takes too long."""
        self.thaw()
        self._end(signal.SIGTERM)

    def freeze(self) -> None:
        """SIGSTOP: connections stay, new ones are made by the kernel, nothing answers."""
        assert self.running, f"redis-server on port {self.port} does not run"
        os.kill(self.pid, signal.SIGSTOP)
        # Returns when it has stopped. WNOWAIT leaves the news of an end to Popen.
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        self._frozen = True

    def thaw(self) -> None:
        """SIGCONT; nothing happens to one that is not frozen."""
        if self.frozen:
            os.kill(self.pid, signal.SIGCONT)
        self._frozen = False

    def restart(self, *arguments: str) -> None:
        """Starts it again on the same port with its data, after an orderly stop where it still runs."""
        self.stop()
        self.launch(*arguments)
        self.wait_until_ready()

    def remove(self) -> None:
        """Ends the process and deletes its directory."""
        self.kill()
        self._client.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _answers(self) -> bool:
        try:
            state = self.command("INFO", "everything")
        except redis.RedisError:
            return False
        # It answers this also while it loads; a Sentinel loads nothing and says nothing about it.
        return state["process_id"] == self.pid and not state.get("loading")

    def _end(self, how: signal.Signals) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(how)
        # Before the process is reaped: while the guard lives, nobody else can have got its number.
        if self._guard is not None:
            self._guard.kill()
            self._guard.wait()
            if self._guard.stdin is not None:
                self._guard.stdin.close()
            self._guard = None
        if self._process is not None:
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def _exit_code(self) -> int | None:
        return None if self._process is None else self._process.returncode

    def _complaint(self, what: str) -> str:
        return f"redis-server on port {self.port} {what}. Its log:\n{self.log[-4000:]}"


class Servers(ABC):
    """Servers that start and end together: `with Single() as servers:`."""

    def __init__(self) -> None:
        self.servers: list[Server] = []
        """Those that hold data."""
        self._all: list[Server] = []

    @property
    @abstractmethod
    def url(self) -> str:
        """As REDIS_URL takes it."""

    @abstractmethod
    def restore(self) -> None:
        """Thaws the frozen and starts the dead, if any; returns when all is ready as after the start."""

    @abstractmethod
    def _start(self) -> None:
        """Starts all on new ports, and waits until the whole is ready."""

    def flush(self) -> None:
        """Deletes all data and all loaded scripts."""
        for server in self.servers:
            server.command("FLUSHALL")
            server.command("SCRIPT", "FLUSH")

    def __enter__(self) -> Self:
        for _ in range(4):
            with contextlib.suppress(PortTakenError):
                return self._enter()
        return self._enter()

    def __exit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._all:
            self._all.pop().remove()
        self.servers.clear()

    def _enter(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _add(
        self, lines: Iterable[str] = (), *, password: str | None = None, sentinel: bool = False
    ) -> Server:
        server = Server(lines, password=password, sentinel=sentinel)
        self._all.append(server)
        return server

    def _wake(self, servers: Sequence[Server], *arguments: str) -> list[Server]:
        """Thaws and starts where needed, all at once; those that were started."""
        for server in servers:
            server.thaw()
        dead = [server for server in servers if not server.running]
        for server in dead:
            server.launch(*arguments)
        for server in servers:
            server.wait_until_ready()
        return dead


class Single(Servers):
    """One server. With `maxmemory` ("10mb") it refuses writes when full. `config`: lines of redis.conf."""

    def __init__(
        self, *, password: str | None = None, maxmemory: str | None = None, config: Iterable[str] = ()
    ) -> None:
        super().__init__()
        self.password = password
        self._lines = list(config)
        if maxmemory is not None:
            self._lines += [f"maxmemory {maxmemory}", "maxmemory-policy noeviction"]

    @property
    def server(self) -> Server:
        return self.servers[0]

    @property
    def port(self) -> int:
        return self.server.port

    @property
    def url(self) -> str:
        return self.url_at(self.port)

    def url_at(self, port: int) -> str:
        """Its address by way of another port, that of a proxy."""
        login = "" if self.password is None else f":{quote(self.password, safe='')}@"
        return f"redis://{login}{HOST}:{port}/0"

    def kill(self) -> None:
        self.server.kill()

    def freeze(self) -> None:
        self.server.freeze()

    def thaw(self) -> None:
        self.server.thaw()

    def restart(self) -> None:
        self.server.restart()

    def stop(self) -> None:
        self.server.stop()

    def restore(self) -> None:
        self._wake(self.servers)

    def _start(self) -> None:
        self.servers = [self._add(self._lines, password=self.password)]
        self._wake(self.servers)


class SentinelSet(Servers):
    """One primary, two replicas, and three Sentinels that agree on a new primary when two miss the old one.

    `servers` are the first three, `sentinels` the others. The Sentinels look around more often than by
    default, so that a failover takes little more than `down_after_milliseconds`. At times votes are split;
    then they try again after twice `failover_timeout_milliseconds`.
    """

    def __init__(
        self,
        *,
        down_after_milliseconds: int = 1000,
        failover_timeout_milliseconds: int = 2000,
        config: Iterable[str] = (),
    ) -> None:
        super().__init__()
        self.sentinels: list[Server] = []
        self._down_after = down_after_milliseconds
        self._failover_timeout = failover_timeout_milliseconds
        # A replica gets its copy at once, where the default waits 5 s for others to share it.
        self._lines = ["repl-diskless-sync yes", "repl-diskless-sync-delay 0", *config]
        self._known_primary: Server

    @property
    def url(self) -> str:
        places = ",".join(f"{HOST}:{sentinel.port}" for sentinel in self.sentinels)
        return f"redis+sentinel://{places}/0?master={MASTER}"

    @property
    def primary(self) -> Server:
        """The one that the first Sentinel that answers names now; it may be dead."""
        for sentinel in self.sentinels:
            with contextlib.suppress(redis.RedisError):
                return self._named_by(sentinel)
        raise RedisServerError("no Sentinel answers")

    def kill_primary(self) -> Server:
        """The server that was the primary."""
        server = self.primary
        server.kill()
        return server

    def fail_over(self) -> None:
        """Has the Sentinels choose another primary while the present one is well: what an upgrade does."""
        self.sentinels[0].command("SENTINEL", "FAILOVER", MASTER)

    def wait_for_new_primary(self, seconds: float = 30.0) -> Server:
        """Returns when all Sentinels that run name another primary than before, and it takes writes.

        Before: at the start, or at the last return from here or from `restore`. It blocks; in a coroutine
        `await asyncio.to_thread(servers.wait_for_new_primary)`.
        """
        before = self._known_primary
        self._until(lambda: self._agreed() not in (None, before), "did not name a new primary", seconds)
        self._known_primary = self.primary
        return self._known_primary

    def restore(self) -> None:
        self._quicken(self._wake(self.sentinels))
        for server in self.servers:
            server.thaw()
        if self.primary.running:
            self._until(lambda: self._agreed() is not None, "did not agree on a primary", 30)
        else:
            # To start the dead one now would compete with the failover.
            self._known_primary = self.primary
            self.wait_for_new_primary()
        primary = self._known_primary = self.primary
        replicas = [server for server in self.servers if server is not primary]
        self._wake(replicas, "--replicaof", f"{HOST} {primary.port}")
        for replica in replicas:
            # Sentinels turn one that is back into a replica too, after seconds.
            if replica.command("INFO", "replication").get("master_port") != primary.port:
                replica.command("REPLICAOF", HOST, primary.port)
        self._until(self._ready, "did not become ready", 30)

    def flush(self) -> None:
        self.primary.command("FLUSHALL")
        self.primary.command("WAIT", 2, 1000)
        for server in self.servers:
            server.command("SCRIPT", "FLUSH")

    def _start(self) -> None:
        self.servers = [self._add(self._lines) for _ in range(3)]
        self._wake(self.servers)
        primary, *replicas = self.servers
        for replica in replicas:
            replica.command("REPLICAOF", HOST, primary.port)
        self.sentinels = [self._add(sentinel=True) for _ in range(3)]
        identities = [secrets.token_hex(20) for _ in self.sentinels]
        for sentinel, identity in zip(self.sentinels, identities, strict=True):
            # They are told of each other, which they else learn from their messages in seconds.
            sentinel.configure(
                [
                    f"sentinel myid {identity}",
                    f"sentinel monitor {MASTER} {HOST} {primary.port} 2",
                    f"sentinel down-after-milliseconds {MASTER} {self._down_after}",
                    f"sentinel failover-timeout {MASTER} {self._failover_timeout}",
                    f"sentinel parallel-syncs {MASTER} 2",
                    *(f"sentinel known-replica {MASTER} {HOST} {replica.port}" for replica in replicas),
                    *(
                        f"sentinel known-sentinel {MASTER} {HOST} {other.port} {its}"
                        for other, its in zip(self.sentinels, identities, strict=True)
                        if other is not sentinel
                    ),
                ]
            )
        self._quicken(self._wake(self.sentinels))
        self._known_primary = primary
        self._until(self._ready, "did not become ready", START_SECONDS)

    def _quicken(self, sentinels: Iterable[Server]) -> None:
        """Not in a file: a Sentinel does not keep these. Tilt is its pause after a stall of the machine."""
        periods = {"info": 500, "ping": 200, "ask": 200, "publish": 500, "tilt": 1000}
        words = [word for name, period in periods.items() for word in (f"{name}-period", period)]
        for sentinel in sentinels:
            sentinel.command("SENTINEL", "DEBUG", *words)

    def _named_by(self, sentinel: Server) -> Server:
        _, port = sentinel.command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", MASTER)
        return next(server for server in self.servers if server.port == int(port))

    def _agreed(self) -> Server | None:
        """The primary that all running Sentinels name, once it takes writes."""
        try:
            awake = [sentinel for sentinel in self.sentinels if sentinel.running and not sentinel.frozen]
            named = {self._named_by(sentinel) for sentinel in awake}
            server = named.pop()
            return server if not named and server.command("INFO", "replication")["role"] == "master" else None
        except redis.RedisError:
            return None

    def _ready(self) -> bool:
        """Both replicas hold what the primary holds, and each Sentinel sees all others well."""
        try:
            primary = self._agreed()
            if primary is None:
                return False
            state = primary.command("INFO", "replication")
            online = [state.get(name, {}).get("state") for name in ("slave0", "slave1")]
            return online == ["online", "online"] and all(map(self._sees_all, self.sentinels))
        except redis.RedisError:
            return False

    def _sees_all(self, sentinel: Server) -> bool:
        master, *_ = _rows([sentinel.command("SENTINEL", "MASTER", MASTER)])
        replicas = _rows(sentinel.command("SENTINEL", "REPLICAS", MASTER))
        others = _rows(sentinel.command("SENTINEL", "SENTINELS", MASTER))
        return (
            master["flags"] == "master"
            and [replica["flags"] for replica in replicas] == ["slave"] * 2
            and [replica["master-link-status"] for replica in replicas] == ["ok"] * 2
            and [other["flags"] for other in others] == ["sentinel"] * 2
        )

    def _until(self, condition: Callable[[], bool], complaint: str, seconds: float) -> None:
        witness = next((sentinel for sentinel in self.sentinels if sentinel.running), self.sentinels[0])
        witness.until(condition, complaint, seconds)


class ClusterSet(Servers):
    """Three primaries with a third of the slots each, and no replicas."""

    def __init__(self, *, node_timeout_milliseconds: int = 1000, config: Iterable[str] = ()) -> None:
        super().__init__()
        self._lines = [
            "cluster-enabled yes",
            f"cluster-node-timeout {node_timeout_milliseconds}",
            f"cluster-announce-ip {HOST}",
            *config,
        ]

    @property
    def url(self) -> str:
        return f"redis+cluster://{','.join(f'{HOST}:{server.port}' for server in self.servers)}"

    def restore(self) -> None:
        self._wake(self.servers)
        self.servers[0].until(self._ready, "did not become ready")

    def _start(self) -> None:
        # The default, the port and 10000, is not looked at for being free.
        buses = free_ports(3)
        self.servers = [self._add([*self._lines, f"cluster-port {bus}"]) for bus in buses]
        self._wake(self.servers)
        bounds = [0, 5461, 10923, 16384]
        for index, server in enumerate(self.servers):
            server.command("CLUSTER", "SET-CONFIG-EPOCH", index + 1)
            server.command("CLUSTER", "ADDSLOTSRANGE", bounds[index], bounds[index + 1] - 1)
            for other, bus in zip(self.servers[:index], buses[:index], strict=True):
                server.command("CLUSTER", "MEET", HOST, other.port, bus)
        self.servers[0].until(self._ready, "did not become ready")

    def _ready(self) -> bool:
        try:
            return all(map(self._sees_all, self.servers))
        except redis.RedisError:
            return False

    def _sees_all(self, server: Server) -> bool:
        state = server.command("CLUSTER", "INFO").split()
        return {"cluster_state:ok", "cluster_slots_ok:16384", "cluster_known_nodes:3"} <= set(state)


class SlowProxy:
    """A TCP proxy in front of a port of 127.0.0.1: `with SlowProxy(single.port) as proxy:`.

    It passes all on until told otherwise. The methods may be called from any thread; what they say holds
    when they return, for the connections that are there and for those that come.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.port = free_ports(1)[0]
        self._delay_seconds = 0.0
        self._swallowing = False
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._started = threading.Event()
        self._loop: asyncio.AbstractEventLoop
        self._changed: asyncio.Event
        self._stopped: asyncio.Event
        self._listener: asyncio.Server | None = None
        self._failure: BaseException | None = None

    @property
    def connections(self) -> int:
        """Those of clients that are open now."""
        return len(self._tasks)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._started.wait(20), "the proxy did not start"
        if self._failure is not None:
            raise self._failure
        return self

    def __exit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join(20)
        assert not self._thread.is_alive(), "the proxy did not stop"

    def delay(self, seconds: float) -> None:
        """Each chunk of an answer waits this long, also those that wait now; requests pass at once.

        So a round trip takes `seconds` more, and what a caller gave up was done all the same.
        """
        self._do(self._set_delay, seconds)

    def refuse(self) -> None:
        """New connections are refused; those that are there go on."""
        self._do(self._close_listener)

    def accept(self) -> None:
        """Ends `refuse`."""
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(20)

    def drop(self) -> None:
        """Closes all connections at once; new ones are accepted as before."""
        self._do(self._drop)

    def black_hole(self) -> None:
        """Connections are accepted and nothing passes, either way."""
        self._do(self._swallow)

    def pass_on(self) -> None:
        """Ends all misbehaviour. What fell into a black hole stays lost, so its connections are closed."""
        self._do(self._set_delay, 0.0)
        self._do(self._stop_swallowing)
        self.accept()

    def _do(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What `function` returns in the proxy's event loop."""

        async def call() -> Any:
            return function(*arguments)

        return asyncio.run_coroutine_threadsafe(call(), self._loop).result(20)

    def _set_delay(self, seconds: float) -> None:
        self._delay_seconds = seconds
        self._changed.set()
        self._changed = asyncio.Event()

    def _swallow(self) -> None:
        self._swallowing = True

    def _stop_swallowing(self) -> None:
        if self._swallowing:
            self._swallowing = False
            self._drop()

    def _drop(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    def _close_listener(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    async def _listen(self) -> None:
        if self._listener is None:
            self._listener = await asyncio.start_server(self._connected, HOST, self.port)

    def _run(self) -> None:
        async def main() -> None:
            self._loop, self._changed, self._stopped = (
                asyncio.get_running_loop(),
                asyncio.Event(),
                asyncio.Event(),
            )
            try:
                await self._listen()
            except OSError as error:
                self._failure = error
                return
            finally:
                self._started.set()
            await self._stopped.wait()
            self._close_listener()
            self._set_delay(0.0)
            self._drop()
            await asyncio.gather(*self._tasks, return_exceptions=True)

        asyncio.run(main())

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers = {writer}
        self._writers.add(writer)
        try:
            to_read, to_write = await asyncio.open_connection(HOST, self.target)
            writers.add(to_write)
            self._writers.add(to_write)
            pumps = [
                asyncio.ensure_future(self._pump(reader, to_write, answers=False)),
                asyncio.ensure_future(self._pump(to_read, writer, answers=True)),
            ]
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            for pump in pumps:
                pump.cancel()
            await asyncio.wait(pumps)
        except OSError:
            pass  # the server is not there: the client's connection ends, too
        finally:
            self._writers -= writers
            for each in writers:
                each.transport.abort()

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, answers: bool
    ) -> None:
        with contextlib.suppress(OSError):
            while chunk := await reader.read(65536):
                if answers:
                    await self._hold()
                if not self._swallowing:
                    writer.write(chunk)
                    await writer.drain()

    async def _hold(self) -> None:
        """Waits until the delay, as it is by then, has passed."""
        arrived = self._loop.time()
        while (left := arrived + self._delay_seconds - self._loop.time()) > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), left)


def free_ports(count: int) -> list[int]:
    """Different ports that nobody listens on now."""
    with contextlib.ExitStack() as probes:
        found: list[int] = []
        while len(found) < count:
            port = secrets.choice(PORTS)  # no seed that a test has set makes two processes look at the same
            probe = probes.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                probe.bind((HOST, port))
                found.append(port)
        return found


def _rows(answers: Iterable[Sequence[str]]) -> list[dict[str, str]]:
    """Sentinel's lists of names and values in turn."""
    return [dict(zip(answer[::2], answer[1::2], strict=True)) for answer in answers]
