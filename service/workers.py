"""Several processes on one port: gunicorn with uvicorn workers, probes and metrics in its master.

Import this module only after PROMETHEUS_MULTIPROC_DIR is set: prometheus-client decides then how it
counts. The application is made in each worker after the fork, so no connection, thread or exporter
is shared; its modules are loaded before, so their memory is.
"""

from __future__ import annotations

import mmap
import os
import struct
import sys
import time
from collections.abc import Callable
from math import ceil
from typing import Any, Final

import structlog
from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter
from gunicorn.glogging import Logger
from prometheus_client import multiprocess
from starlette.types import ASGIApp
from uvicorn_worker import UvicornWorker

from service.adminport import AdminServer, address, listen
from service.api.admin import AdminApp
from service.app import create_app
from service.config import Configuration
from service.configwatch import ConfigFiles
from service.lifecycle import Lifecycle
from service.logging import LogLevel, configure, json_lines
from service.serve import HEAR_OUT_SECONDS, WeirServer, announce, server_options, welcome
from service.telemetry import exposition, merged_registry

MAX_WORKERS: Final = 1_024
MARGIN_SECONDS: Final = 5.0
_SLOT: Final = struct.Struct("d?")

log = structlog.get_logger("weir")


class Heartbeats:
    """The workers' heartbeats, in memory that the master shares with them. The probe of the whole."""

    def __init__(self, timeout_seconds: float) -> None:
        self._timeout = timeout_seconds
        self._memory = mmap.mmap(-1, _SLOT.size * MAX_WORKERS)
        self.living: set[int] = set()
        """Slots of the workers that the master has; known to the master alone."""
        self.stopping = False

    def write(self, slot: int, lifecycle: Lifecycle) -> None:
        _SLOT.pack_into(self._memory, slot * _SLOT.size, time.monotonic(), lifecycle.draining)

    def clear(self, slot: int) -> None:
        _SLOT.pack_into(self._memory, slot * _SLOT.size, 0.0, False)

    @property
    def started(self) -> bool:
        return any(beat > 0 for beat, _ in self._read())

    @property
    def alive(self) -> bool:
        return self.heartbeat_age_seconds < self._timeout

    @property
    def ready(self) -> bool:
        oldest = time.monotonic() - self._timeout
        return not self.stopping and any(beat > oldest and not drains for beat, drains in self._read())

    @property
    def draining(self) -> bool:
        return self.stopping or any(drains for _, drains in self._read())

    @property
    def heartbeat_age_seconds(self) -> float:
        """Of the worker that beat last; before the first beat 0, because booting is no fault."""
        beats = [beat for beat, _ in self._read() if beat > 0]
        return time.monotonic() - max(beats) if beats else 0.0

    def _read(self) -> list[tuple[float, bool]]:
        return [_SLOT.unpack_from(self._memory, slot * _SLOT.size) for slot in tuple(self.living)]


class Logs(Logger):
    """gunicorn's logger without handlers of its own: its lines go where all others go."""

    def setup(self, cfg: Any) -> None:
        self.error_log.propagate = True


class Worker(UvicornWorker):
    """A uvicorn worker that drains as the single process does and tells the master of its heartbeat."""

    async def _serve(self) -> None:
        self.config.app = self.wsgi
        application: Application = self.app
        weir = self.wsgi.state.weir
        self._install_sigquit_handler()
        server = WeirServer(self.config, weir.lifecycle, application.configuration.settings.drain_delay)
        await server.serve(sockets=self.sockets)
        if not server.started:
            sys.exit(Arbiter.WORKER_BOOT_ERROR)


class Master(Arbiter):
    """gunicorn's arbiter, which also keeps up with the files of the configuration.

    Each worker reads them by itself. The master does so that a worker which comes later begins with the last
    good one, and to answer /config.
    """

    def murder_workers(self) -> None:
        self.app.files.follow()
        self.app.log_level.follow()
        super().murder_workers()


class Application(BaseApplication):
    """gunicorn's application for one configuration."""

    def __init__(self, configuration: Configuration, heartbeats: Heartbeats) -> None:
        self.files = ConfigFiles(configuration)
        self.heartbeats = heartbeats
        self.log_level = LogLevel(configuration.settings.level)
        self._slot = 0
        self._worker: Any = None
        super().__init__()

    @property
    def configuration(self) -> Configuration:
        """The last good one, which a worker begins with."""
        return self.files.good

    def run(self) -> None:
        Master(self).run()

    def load_config(self) -> None:
        settings = self.configuration.settings
        Worker.CONFIG_KWARGS = server_options(self.configuration)
        options: dict[str, Any] = {
            "bind": f"{_bracketed(self.configuration.host)}:{settings.port}",
            "workers": settings.worker_count,
            "worker_class": Worker,
            "logger_class": Logs,
            "max_requests": settings.max_requests_per_worker,
            "max_requests_jitter": settings.max_requests_per_worker // 10,
            # A worker's own drain ends first, so that no stream ends without a word.
            "graceful_timeout": ceil(
                settings.drain_delay + HEAR_OUT_SECONDS + settings.drain_timeout + MARGIN_SECONDS
            ),
            "timeout": round(settings.liveness_timeout),
            "control_socket_disable": True,
            "accesslog": None,
            "pre_fork": self._pre_fork,
            "post_fork": self._post_fork,
            "child_exit": self._child_exit,
            "on_exit": self._on_exit,
        }
        for name, value in options.items():
            if name in self.cfg.settings:
                self.cfg.set(name, value)

    def load(self) -> ASGIApp:
        settings = self.configuration.settings
        configure(self.log_level.level, settings.log_format)
        lifecycle = Lifecycle(
            settings.liveness_timeout,
            on_beat=self._beat,
        )
        return create_app(self.configuration, lifecycle=lifecycle)

    def _beat(self, lifecycle: Lifecycle) -> None:
        """Tell both: the probes, and gunicorn, whom uvicorn does not tell while it drains."""
        self.log_level.follow()
        self.heartbeats.write(self._slot, lifecycle)
        if self._worker is not None:
            self._worker.notify()

    def _pre_fork(self, arbiter: Any, worker: Any) -> None:
        slot = _slot_of(worker)
        self.heartbeats.clear(slot)
        self.heartbeats.living.add(slot)

    def _post_fork(self, arbiter: Any, worker: Any) -> None:
        self._slot, self._worker = _slot_of(worker), worker

    def _child_exit(self, arbiter: Any, worker: Any) -> None:
        self.heartbeats.living.discard(_slot_of(worker))
        multiprocess.mark_process_dead(worker.pid)

    def _on_exit(self, arbiter: Any) -> None:
        self.heartbeats.stopping = True


def serve_workers(configuration: Configuration, say: Callable[[str], None] | None = None) -> None:
    """Serve with WORKER_COUNT processes until SIGTERM or SIGINT."""
    settings = configuration.settings
    listener = listen("ADMIN_PORT", configuration.admin_host, settings.admin_port)
    heartbeats = Heartbeats(settings.liveness_timeout)
    directory = os.environ["PROMETHEUS_MULTIPROC_DIR"]

    def metrics(accept: str) -> tuple[bytes, str]:
        # A new collector for each scrape: it reads the files of the workers that are there then.
        return exposition(merged_registry(directory))(accept)

    application = Application(configuration, heartbeats)
    lines = json_lines()
    if lines is not None:
        lines.share()
    tell = AdminApp(heartbeats, metrics, application.files.tell, application.log_level)
    admin = AdminServer(tell, listener)
    api = f"http://{_bracketed(configuration.host)}:{settings.port}"
    announce(configuration, api, address(listener))
    if say is not None:
        say(welcome(configuration, api, address(listener)))
    admin.start()
    master = os.getpid()
    try:
        application.run()
    finally:
        if os.getpid() == master:  # forked workers leave through here too, without the thread
            admin.stop()


def _slot_of(worker: Any) -> int:
    age: int = worker.age
    return age % MAX_WORKERS


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
