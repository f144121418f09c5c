"""A PostgreSQL of its own for tests: a new cluster from Debian's package, on a free port of 127.0.0.1.

    with PostgresServer() as server:
        asyncpg.connect(server.url)
        server.kill()     # SIGKILL of all its processes; `freeze` and `thaw` are SIGSTOP and SIGCONT
        server.restart()  # the same port, with its data

PostgreSQL refuses to run as root, so then all of it runs as `nobody`. It ends with the block; should the
test's process itself be killed, a small shell that waits for that ends it.
"""

from __future__ import annotations

import asyncio
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import asyncpg
import psutil

from tests.programs import need
from tests.redis_servers import HOST, free_ports

START_SECONDS: Final = 60.0
POLL_SECONDS: Final = 0.02
SUPERUSER: Final = "postgres"
GUARD: Final = 'read -r _; kill -QUIT "$1"; sleep 1; kill -KILL "$1"; rm -rf -- "$2"'
CONFIGURATION: Final = """
listen_addresses = '127.0.0.1'
unix_socket_directories = ''
fsync = off
max_connections = 30
shared_buffers = 32MB
log_min_messages = warning
"""


class PostgresServer:
    """One cluster. `role` makes a user with a database, or with a schema alone."""

    def __init__(self) -> None:
        self._initdb = need("initdb")
        self._postgres = str(Path(self._initdb).with_name("postgres"))
        self._user = "nobody" if os.geteuid() == 0 else None
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self.password = secrets.token_urlsafe(12)
        self.port = free_ports(1)[0]
        self.directory = Path(tempfile.mkdtemp(prefix="weir-postgres-"))
        self._data = self.directory / "data"
        self._log = self.directory / "log"

    @property
    def url(self) -> str:
        return self.url_of(SUPERUSER, self.password, "postgres")

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def url_of(self, user: str, password: str | None, database: str, port: int | None = None) -> str:
        login = user if password is None else f"{user}:{password}"
        return f"postgresql://{login}@{HOST}:{port or self.port}/{database}"

    def execute(self, *statements: str, url: str | None = None) -> list[Any]:
        """The rows of the last statement."""

        async def run() -> list[Any]:
            connection = await asyncpg.connect(url or self.url, timeout=20)
            try:
                for statement in statements[:-1]:
                    await connection.execute(statement)
                return await connection.fetch(statements[-1])
            finally:
                await connection.close(timeout=20)

        return asyncio.run(run())

    def database(self, name: str) -> str:
        """A new database; its address."""
        self.execute(f"CREATE DATABASE {name}")
        return self.url_of(SUPERUSER, self.password, name)

    def launch(self) -> None:
        assert not self.running
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [self._postgres, "-D", str(self._data), "-p", str(self.port)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                user=self._user,
                cwd=self.directory,
                start_new_session=True,
            )
        self._guard = subprocess.Popen(
            ["/bin/sh", "-c", GUARD, "guard", str(self._process.pid), str(self.directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + START_SECONDS
        while True:
            with suppress(OSError, asyncpg.PostgresError, asyncpg.InterfaceError, TimeoutError):
                self.execute("SELECT 1")
                return
            assert self.running, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(POLL_SECONDS)

    def kill(self) -> None:
        """SIGKILL of all its processes, as when the machine goes."""
        for process in self._processes():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._ended()

    def stop(self) -> None:
        """At once, but in order: connections are cut, data is written."""
        self.thaw()
        if self._process is not None and self.running:
            self._process.send_signal(signal.SIGINT)
        self._ended()

    def restart(self) -> None:
        self.stop()
        self.launch()

    def freeze(self) -> None:
        """SIGSTOP: connections stay, nothing answers."""
        for process in self._processes():
            with suppress(psutil.NoSuchProcess):
                process.suspend()

    def thaw(self) -> None:
        for process in self._processes():
            with suppress(psutil.NoSuchProcess):
                process.resume()

    def insist_on_tls(self) -> Path:
        """From now on it takes nobody without; the authority of its certificate, which is for `localhost`."""
        openssl = need("openssl")
        new = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
        names = ("-addext", "subjectAltName=DNS:localhost")
        signed = ("-CA", "ca.crt", "-CAkey", "ca.key", "-days", "2")
        for words in (
            ("req", "-x509", *new, "-keyout", "ca.key", "-out", "ca.crt", "-days", "2", "-subj", "/CN=test"),
            ("req", *new, *names, "-keyout", "own.key", "-out", "own.csr", "-subj", "/CN=localhost"),
            ("x509", "-req", "-in", "own.csr", *signed, "-copy_extensions", "copy", "-out", "own.crt"),
        ):
            subprocess.run([openssl, *words], cwd=self.directory, capture_output=True, check=True)
        key = self.directory / "own.key"
        if self._user is not None:
            entry = pwd.getpwnam(self._user)
            os.chown(key, entry.pw_uid, entry.pw_gid)
        with (self._data / "postgresql.conf").open("a") as file:
            file.write(f"ssl = on\nssl_key_file = '{key}'\nssl_cert_file = '{key.with_suffix('.crt')}'\n")
        (self._data / "pg_hba.conf").write_text("hostssl all all all scram-sha-256\n")
        self.restart()
        return self.directory / "ca.crt"

    def __enter__(self) -> Self:
        try:
            self._make()
            self.launch()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _make(self) -> None:
        if self._user is not None:
            entry = pwd.getpwnam(self._user)
            os.chown(self.directory, entry.pw_uid, entry.pw_gid)
        word = self.directory / "word"
        word.write_text(self.password)
        word.chmod(0o644)
        done = subprocess.run(
            [
                self._initdb,
                "-D",
                str(self._data),
                "-U",
                SUPERUSER,
                "--pwfile",
                str(word),
                "-A",
                "scram-sha-256",
                "-E",
                "UTF8",
                "--locale",
                "C",
                "--no-sync",
            ],
            user=self._user,
            cwd=self.directory,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        word.unlink()
        with (self._data / "postgresql.conf").open("a") as file:
            file.write(CONFIGURATION)

    def _processes(self) -> Iterator[psutil.Process]:
        """The postmaster first, so that it starts none anew."""
        if self._process is None or not self.running:
            return
        with suppress(psutil.NoSuchProcess):
            postmaster = psutil.Process(self._process.pid)
            children = postmaster.children(recursive=True)
            yield postmaster
            yield from children

    def _ended(self) -> None:
        # Before the process is reaped: while the guard lives, nobody else can have got its number.
        if self._guard is not None:
            self._guard.kill()
            self._guard.wait()
            if self._guard.stdin is not None:
                self._guard.stdin.close()
            self._guard = None
        if self._process is not None:
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
