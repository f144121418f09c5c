"""Running the application: the main server, and the admin server on a thread of its own.

The admin thread has its own event loop, so probes and metrics are answered while the main loop is
busy. On SIGTERM readiness turns false at once; new connections are still served for DRAIN_DELAY
seconds, and what runs gets DRAIN_TIMEOUT seconds to end.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import structlog
import uvicorn
from prometheus_client import CollectorRegistry
from starlette.types import ASGIApp

from service import __version__
from service.adminport import AdminServer, address, listen
from service.api.admin import AdminApp
from service.app import create_app
from service.config import SIMULATOR, Configuration, UpstreamKind
from service.configwatch import ConfigFiles
from service.lifecycle import Lifecycle
from service.logging import LogLevel
from service.protocol import BoundedHeadProtocol
from service.telemetry import exposition

KEEP_ALIVE_SECONDS = 75
"""Longer than the idle time of the usual load balancers, so that it is they who close."""

HEAR_OUT_SECONDS = 1.0

log = structlog.get_logger("weir")


class WeirServer(uvicorn.Server):
    """uvicorn's server with a drain: readiness first, then the listeners, then what runs."""

    def __init__(
        self,
        config: uvicorn.Config,
        lifecycle: Lifecycle,
        drain_delay_seconds: float,
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(config)
        self._on_ready = on_ready
        self._lifecycle = lifecycle
        self._drain_delay = drain_delay_seconds
        self._exit_at: float | None = None

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        # Not given back at the end, as uvicorn does: a second SIGTERM must not kill what ends well.
        if threading.current_thread() is threading.main_thread():
            for sig in (signal.SIGINT, signal.SIGTERM):
                signal.signal(sig, self.handle_exit)
        yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Not raised again at the end either: a drained server ends with 0.
        if self._lifecycle.draining and sig == signal.SIGINT:
            self.force_exit = True
        if self._exit_at is None:
            self._exit_at = time.monotonic() + self._drain_delay
        self._lifecycle.draining = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.started:
            return
        _settle_memory()
        log.info("ready", pid=os.getpid())
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        log.info("draining", connections=len(self.server_state.connections))
        for listener in (*self.servers, *(sockets or ())):
            listener.close()
        await self._hear_out()
        await super().shutdown(sockets)

    async def _hear_out(self) -> None:
        """Wait for the first requests of callers whose connection was accepted just now.

        uvicorn would close connections without a request at once, and their callers would see a reset.
        """
        until = time.monotonic() + HEAR_OUT_SECONDS
        while time.monotonic() < until and any(  # noqa: ASYNC110  # uvicorn has no event for it
            getattr(connection, "cycle", None) is None for connection in self.server_state.connections
        ):
            await asyncio.sleep(0.02)

    async def on_tick(self, counter: int) -> bool:
        if self._exit_at is not None and time.monotonic() >= self._exit_at:
            self.should_exit = True
        return await super().on_tick(counter)


def serve(configuration: Configuration, say: Callable[[str], None] | None = None) -> None:
    """Serve in this process until SIGTERM or SIGINT. Raises ConfigurationError for a taken port."""
    settings = configuration.settings
    admin_listener = listen("ADMIN_PORT", configuration.admin_host, settings.admin_port)
    listener = listen("PORT", configuration.host, settings.port)
    registry = CollectorRegistry()
    log_level = LogLevel(settings.level)
    lifecycle = Lifecycle(settings.liveness_timeout, on_beat=lambda _: log_level.follow())
    files = ConfigFiles(configuration)
    admin = AdminServer(AdminApp(lifecycle, exposition(registry), files.tell, log_level), admin_listener)
    admin.start()
    try:
        app = create_app(configuration, registry=registry, lifecycle=lifecycle, files=files)
        announce(configuration, address(listener), address(admin_listener))
        told = welcome(configuration, address(listener), address(admin_listener))
        server = WeirServer(
            server_config(app, configuration),
            lifecycle,
            settings.drain_delay,
            on_ready=lambda: say(told) if say is not None else None,
        )
        server.run(sockets=[listener])
    finally:
        admin.stop()
    log.info("stopped")


def server_config(app: ASGIApp, configuration: Configuration) -> uvicorn.Config:
    return uvicorn.Config(app, **server_options(configuration))


def server_options(configuration: Configuration) -> dict[str, Any]:
    """uvicorn's options, the same with and without gunicorn."""
    return {
        "loop": "uvloop",
        "http": BoundedHeadProtocol,
        "ws": "none",
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "proxy_headers": False,
        "timeout_keep_alive": KEEP_ALIVE_SECONDS,
        "timeout_graceful_shutdown": round(configuration.settings.drain_timeout),
    }


def _settle_memory() -> None:
    """What was loaded stays for ever: the garbage collector need not go through it again and again.

    And it need not look after each 700 objects, a few requests' worth: that cost a tenth of the throughput.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 50)


def announce(configuration: Configuration, api: str, admin: str) -> None:
    """What this process is, for the log; keys and addresses of upstreams stay out of it."""
    log.info(
        "starting",
        version=__version__,
        api=api,
        admin=admin,
        upstreams={u.name: u.kind.value for u in configuration.upstreams},
        keys=len(configuration.keys),
        open_to_all=configuration.open_to_all,
    )
    if any(u.kind is UpstreamKind.SIMULATOR for u in configuration.upstreams):
        log.warning("simulator", note="answers come from a simulator, not from a model")


def welcome(configuration: Configuration, api: str, admin: str) -> str:
    """What to try next, for a person at a terminal."""
    model = configuration.default_model
    note = "a simulator, not a model: no key needed" if model == SIMULATOR else "the configured upstream"
    key = "" if configuration.open_to_all else " \\\n    -H 'Authorization: Bearer YOUR_KEY'"
    return f"""
  Weir {__version__} answers at {api} ({note})

  Say something:
    curl {api}/v1/chat/completions{key} \\
    -H 'Content-Type: application/json' \\
    -d '{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'

  Stream it:      add "stream": true, and -N to curl
  OpenAI's SDK:   OpenAI(base_url="{api}/v1", api_key="any")
  Documentation:  {api}/docs
  Health:         {api}/health
  Metrics:        {admin}/metrics

  Stop with Ctrl-C.
"""
