"""Processes of the benchmark: started pinned to their cores, measured, and ended by their own handle."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import IO, Final, NamedTuple, Self

import psutil

ROOT: Final = Path(__file__).resolve().parents[2]
_STOP_SECONDS: Final = 10.0
_READY_SECONDS: Final = 60.0
_POLL_SECONDS: Final = 0.005
_KEPT_VARIABLES: Final = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "VIRTUAL_ENV")


class BenchmarkError(Exception):
    """Something of the benchmark did not run; the message says what."""


class Cores(NamedTuple):
    """Which cores belong to whom; None where nothing can be pinned."""

    service: frozenset[int] | None
    rest: frozenset[int] | None
    note: str

    @classmethod
    def choose(cls) -> Self:
        if not hasattr(os, "sched_setaffinity"):
            return cls(None, None, "Nothing is pinned: this system has no CPU affinity. Expect more noise.")
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) < 2:
            note = (
                "Nothing is pinned: service, load generator and fake upstream share one core; see the ratios."
            )
            return cls(None, None, note)
        service, rest = cores[-1], cores[:-1]
        others = ", ".join(map(str, rest))
        note = f"The service is pinned to core {service}, load generator and fake upstream to {others}."
        return cls(frozenset({service}), frozenset(rest), note)


class Child:
    """A process that the benchmark started."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        log: Path,
        cores: frozenset[int] | None,
        environment: Mapping[str, str] | None = None,
        piped: bool = False,
        stop_signal: signal.Signals = signal.SIGTERM,
    ) -> None:
        self._log = log
        self._stop_signal = stop_signal
        self.started_at = time.perf_counter()
        with log.open("wb") as output:
            self._process = _spawn(
                command, output, cores=cores, environment=environment or {}, cwd=log.parent, piped=piped
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, line: bytes | None, timeout_seconds: float) -> bytes:
        """Writes a line to its standard input, if any, and gives the line that it answers."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        if line is not None:
            stdin.write(line + b"\n")
            stdin.flush()
        readable, _, _ = select.select([stdout], [], [], timeout_seconds)
        answer = stdout.readline() if readable else b""
        if not answer:
            raise BenchmarkError(f"no answer within {timeout_seconds:.0f} s\n{self.last_words()}")
        return answer

    def wait_until_ready(self, port: int, path: str) -> float:
        """Seconds from its start until `path` answered 200 first."""
        while (elapsed := time.perf_counter() - self.started_at) < _READY_SECONDS:
            if self._process.poll() is not None:
                raise BenchmarkError(f"ended with {self._process.returncode}\n{self.last_words()}")
            if get(port, path) is not None:
                return time.perf_counter() - self.started_at
            time.sleep(_POLL_SECONDS)
        raise BenchmarkError(f"not ready after {elapsed:.0f} s\n{self.last_words()}")

    def last_words(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-5:])

    def stop(self) -> None:
        if self._process.poll() is not None:
            return
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.send_signal(self._stop_signal)
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_SECONDS)
        finally:
            if self._process.poll() is None:
                self._process.kill()
                self._process.wait()


def _spawn(
    command: Sequence[str],
    output: IO[bytes],
    *,
    cores: frozenset[int] | None,
    environment: Mapping[str, str],
    cwd: Path,
    piped: bool,
) -> subprocess.Popen[bytes]:
    # A child inherits the affinity. Its directory has no .env, its environment nothing of the caller's own.
    before = pin(cores)
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE if piped else subprocess.DEVNULL,
            stdout=subprocess.PIPE if piped else output,
            stderr=output,
            env={k: os.environ[k] for k in _KEPT_VARIABLES if k in os.environ}
            | {"PYTHONPATH": str(ROOT)}
            | dict(environment),
            cwd=cwd,
            # Ctrl-C reaches the benchmark alone, which then ends its children itself.
            start_new_session=True,
        )
    finally:
        pin(before)


def pin(cores: frozenset[int] | None) -> frozenset[int] | None:
    """Pins this process, and gives what it was pinned to before."""
    if cores is None:
        return None
    before = frozenset(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores)
    return before


def get(port: int, path: str) -> bytes | None:
    """The body of a 200, or None for anything else."""
    connection = HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read()
        return body if response.status == 200 else None
    except (OSError, HTTPException):
        return None
    finally:
        connection.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def cpu_seconds(pid: int) -> float:
    """CPU time of the process and its children so far."""
    return _sum(pid, lambda process: sum(process.cpu_times()[:2]))


def resident_mb(pid: int) -> float | None:
    """Resident memory of the process and its children; None if it is gone."""
    return _sum(pid, lambda process: process.memory_info().rss / 1e6) or None


def _sum(pid: int, measure: Callable[[psutil.Process], float]) -> float:
    total = 0.0
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for member in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                total += measure(member)
    return total
