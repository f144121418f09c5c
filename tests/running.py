"""A whole Weir on a real socket, in a thread of the test's process; and one in a process of its own."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import openai
import uvicorn
import uvloop
from prometheus_client import CollectorRegistry

from service.adminport import listen
from service.app import Adapters, Weir, create_app
from service.config import Configuration, FileConfig, KeyConfig, Settings
from service.domain import RequestRecord
from service.lifecycle import Lifecycle
from service.ports import Reservation
from service.serve import WeirServer, server_config

ROOT = Path(__file__).resolve().parent.parent


def settings(**values: Any) -> Settings:
    """Settings from `values` alone: neither the environment nor `.env` gets in."""
    return Settings(_env_file=None, **values)  # type: ignore[call-arg]  # pydantic-settings takes it


def configuration(
    *, file: FileConfig | None = None, keys: tuple[KeyConfig, ...] = (), **values: Any
) -> Configuration:
    values = {"drain_timeout": 1.0} | values
    return Configuration(settings=settings(**values), file=file or FileConfig(), keys=keys)


class RunningWeir:
    """`with RunningWeir(configuration(...)) as weir:` serves until the end of the block.

    `weir.url` is the address; `weir.parts` are the application's parts, to look at from the test.
    """

    def __init__(self, config: Configuration, adapters: Adapters | None = None) -> None:
        self.registry = CollectorRegistry()
        self.lifecycle = Lifecycle()
        self.app = create_app(config, adapters, registry=self.registry, lifecycle=self.lifecycle)
        self.parts: Weir = self.app.state.weir
        self._listener = listen("PORT", "127.0.0.1", 0)
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._server = PromptServer(server_config(self.app, config), self.lifecycle, 0.0)
        self._entered = LedgerWatch(self.parts)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._started = threading.Event()
        self.loop: asyncio.AbstractEventLoop

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._started.wait(20), "Weir did not start"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Drain and end; what has ended already stays so."""
        with suppress(RuntimeError):  # its loop is closed
            self.loop.call_soon_threadsafe(self._server.end.set)
        self._thread.join(20)
        assert not self._thread.is_alive(), "Weir did not stop"

    def sdk(self, **options: Any) -> openai.OpenAI:
        """The official client, without its own retries unless asked for."""
        return openai.OpenAI(**self._options(options))

    def async_sdk(self, **options: Any) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(**self._options(options))

    def _options(self, options: dict[str, Any]) -> dict[str, Any]:
        base = {"base_url": f"{self.url}/v1", "api_key": "any", "max_retries": 0, "timeout": 20}
        return base | options

    def records(self, count: int = 1) -> list[RequestRecord]:
        """The ledger, once it has at least `count` records."""
        return self._entered.wait_for(count)

    def in_loop(self, function: Callable[[], Any]) -> Any:
        """What `function` returns in the server's event loop."""
        return asyncio.run_coroutine_threadsafe(_call(function), self.loop).result(20)

    def metric(self, name: str, **labels: str) -> float:
        """A sample's value now; 0 if there is none."""
        return self.registry.get_sample_value(name, labels) or 0.0

    def _run(self) -> None:
        async def main() -> None:
            self.loop = asyncio.get_running_loop()
            serving = asyncio.ensure_future(self._server.serve(sockets=[self._listener]))
            while not self._server.started and not serving.done():
                await asyncio.sleep(0.005)
            self._started.set()
            await serving

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main())


class PromptServer(WeirServer):
    """Ends when it is told to, not at the next tick: a thousand tests would wait 50 ms each."""

    def __init__(self, config: uvicorn.Config, lifecycle: Lifecycle, drain_delay_seconds: float) -> None:
        super().__init__(config, lifecycle, drain_delay_seconds)
        self.end = asyncio.Event()

    async def main_loop(self) -> None:
        await self.on_tick(0)
        await self.end.wait()


class LedgerWatch:
    """Listens to what is settled in a Weir, so that a test can wait for its records."""

    def __init__(self, parts: Weir) -> None:
        self._settle = parts.service.accounts.settle
        self._records: list[RequestRecord] = []
        self._changed = threading.Condition()
        parts.service.accounts.settle = self.settle  # type: ignore[method-assign]

    async def settle(self, record: RequestRecord, reservation: Reservation | None) -> None:
        await self._settle(record, reservation)
        with self._changed:
            self._records.append(record)
            self._changed.notify_all()

    def wait_for(self, count: int) -> list[RequestRecord]:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self._records) >= count, 20), self._records
            return list(self._records)


async def _call(function: Callable[[], Any]) -> Any:
    return function()


class WeirProcess:
    """`python -m service` in a process of its own, with an environment made of `values` alone."""

    module = "service"
    """What is run; a subclass may put something around it."""

    def __init__(self, *arguments: str, **values: str) -> None:
        keep = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME") or k.startswith("COVERAGE")}
        self.port, self.admin_port = free_port(), free_port()
        environment = {
            **keep,
            "PYTHONPATH": str(ROOT),
            "PORT": str(self.port),
            "ADMIN_PORT": str(self.admin_port),
            "LOG_FORMAT": "json",
            **values,
        }
        self.url = f"http://127.0.0.1:{self.port}"
        self.admin_url = f"http://127.0.0.1:{self.admin_port}"
        self.process = subprocess.Popen(
            [sys.executable, "-m", self.module, *arguments],
            env=environment,
            cwd=values.get("PWD", ROOT),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []
        self.error_lines: list[str] = []
        self._changed = threading.Condition()
        self._readers = [
            threading.Thread(target=self._read, args=(pipe, into), daemon=True)
            for pipe, into in ((self.process.stdout, self.lines), (self.process.stderr, self.error_lines))
        ]
        for reader in self._readers:
            reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for reader in self._readers:
            reader.join(10)
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()

    def wait_for_line(self, text: str) -> str:
        """The first line of standard output with `text` in it; waits for it."""
        with self._changed:
            found = self._changed.wait_for(
                lambda: any(text in line for line in self.lines) or self.process.poll() is not None, 30
            )
            lines = [line for line in self.lines if text in line]
            assert found
            assert lines, (self.lines, self.error_lines)
            return lines[0]

    def wait_until_ready(self, workers: int = 1) -> None:
        with self._changed:
            assert self._changed.wait_for(
                lambda: (
                    sum('"event":"ready"' in line for line in self.lines) >= workers
                    or self.process.poll() is not None
                ),
                60,
            )
        assert self.process.poll() is None, (self.lines, self.error_lines)

    def wait_for_events(self, name: str, count: int) -> None:
        """Returns once so many events of this name were logged."""
        with self._changed:
            assert self._changed.wait_for(
                lambda: len(self.events(name)) >= count or self.process.poll() is not None, 30
            ), (self.lines, self.error_lines)
        assert self.process.poll() is None, (self.lines, self.error_lines)

    def events(self, name: str) -> list[dict[str, Any]]:
        """The logged events of this name so far."""
        parsed = [json.loads(line) for line in self.lines if line.startswith("{")]
        return [event for event in parsed if event["event"] == name]

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        code = self.process.wait(60)
        for reader in self._readers:
            reader.join(10)
        return code

    def _read(self, pipe: Any, into: list[str]) -> None:
        for line in pipe:
            with self._changed:
                into.append(line.rstrip("\n"))
                self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()


def free_port() -> int:
    """One below those that the kernel gives to outgoing connections: none of these takes it meanwhile.

    At random, for other processes of the same run ask too.
    """
    for _ in range(1_000):
        port = random.SystemRandom().randrange(10_000, 30_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("no port is free")
