"""The worker's process: the sink, its admin port, and how it ends."""

from __future__ import annotations

import asyncio
import os
import signal
from functools import partial
from typing import Final

import structlog
import uvloop
from prometheus_client import CollectorRegistry

from service import __version__
from service.adminport import AdminServer, address, listen
from service.api.admin import AdminApp
from service.config import Settings, revealed
from service.errors import ConfigurationError
from service.lifecycle import Lifecycle
from service.logging import LogLevel, json_lines
from service.telemetry import exposition
from service.tracing import NO_TRACING, Tracing, make_tracing
from service.worker.metrics import SinkMetrics
from service.worker.postgres import Tables
from service.worker.sink import Sink
from service.worker.streams import Streams

STOP_SECONDS: Final = 5.0
"""For the batch that runs at SIGTERM; then it is rolled back."""

log = structlog.get_logger("weir")


class SinkProbe:
    """Alive while the loop beats; ready while Redis and PostgreSQL answer, of which /readyz says the missing.

    Nobody sends requests to a worker, so unlike that of a pod its readiness may know what it depends on: a
    rollout with a wrong address does not count as done.
    """

    def __init__(self, lifecycle: Lifecycle, sink: Sink) -> None:
        self._lifecycle = lifecycle
        self._sink = sink

    @property
    def missing(self) -> list[str]:
        return self._sink.missing

    @property
    def started(self) -> bool:
        return True

    @property
    def alive(self) -> bool:
        return self._lifecycle.alive

    @property
    def draining(self) -> bool:
        return self._lifecycle.draining

    @property
    def ready(self) -> bool:
        return self.alive and not self.draining and not self.missing

    @property
    def heartbeat_age_seconds(self) -> float:
        return self._lifecycle.heartbeat_age_seconds


class SinkAdmin(AdminApp):
    """The admin port's application, with a word on what readiness waits for."""

    def __init__(self, probe: SinkProbe, registry: CollectorRegistry, log_level: LogLevel) -> None:
        super().__init__(probe, exposition(registry), log_level=log_level)
        self._sink_probe = probe

    def _readyz(self) -> tuple[bool, dict[str, object]]:
        ready, told = super()._readyz()
        missing = self._sink_probe.missing
        if not ready and missing and not self._sink_probe.draining:
            told = {"status": f"waits for {' and '.join(missing)}"}
        return ready, told


def work(settings: Settings) -> None:
    """Copy until SIGTERM or SIGINT. Raises ConfigurationError."""
    registry = CollectorRegistry()
    metrics = SinkMetrics(registry)
    tracing = make_tracing(settings, __version__, partial(metrics.telemetry_dropped, "traces"))
    sink = make_sink(settings, metrics, tracing)
    log_level = LogLevel(settings.level)
    lifecycle = Lifecycle(settings.liveness_timeout, on_beat=lambda _: _tell(metrics, log_level))
    listener = listen("ADMIN_PORT", settings.admin_host or settings.host or "127.0.0.1", settings.admin_port)
    admin = AdminServer(SinkAdmin(SinkProbe(lifecycle, sink), registry, log_level), listener)
    admin.start()
    try:
        log.info("starting", version=__version__, admin=address(listener))
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_run(sink, lifecycle))
    finally:
        tracing.close()
        admin.stop()
    log.info("stopped")


def _tell(metrics: SinkMetrics, log_level: LogLevel) -> None:
    """What is told at each heartbeat."""
    log_level.follow()
    lines = json_lines()
    dropped = lines.take_dropped() if lines is not None else 0
    if dropped:
        metrics.telemetry_dropped("logs", dropped)
        log.warning("log_lines_dropped", lines=dropped)


def make_sink(settings: Settings, metrics: SinkMetrics, tracing: Tracing = NO_TRACING) -> Sink:
    """The sink as the settings describe it. Raises ConfigurationError."""
    redis_url, postgres_url = settings.redis_url, settings.ledger_postgres_url
    if redis_url is None:
        raise ConfigurationError("REDIS_URL: is not set; the worker copies the ledger from there")
    if postgres_url is None:
        raise ConfigurationError("LEDGER_POSTGRES_URL: is not set; the worker copies the ledger to there")
    return Sink(
        Streams(
            redis_url.get_secret_value(),
            password=revealed(settings.redis_password),
            sentinel_password=revealed(settings.redis_sentinel_password),
            prefix=settings.redis_prefix,
        ),
        Tables(
            postgres_url.get_secret_value(),
            password=revealed(settings.ledger_postgres_password),
            schema=settings.ledger_postgres_schema,
        ),
        metrics,
        batch_records=settings.ledger_batch_records,
        poll_seconds=settings.ledger_poll_seconds,
        tracing=tracing,
    )


async def _run(sink: Sink, lifecycle: Lifecycle) -> None:
    stop = asyncio.Event()

    def end() -> None:
        lifecycle.draining = True
        stop.set()

    loop = asyncio.get_running_loop()
    for sig in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(sig, end)
    beating = asyncio.create_task(lifecycle.beat())
    copying = asyncio.create_task(sink.run(stop))
    stopping = asyncio.create_task(stop.wait())
    log.info("ready", pid=os.getpid())
    try:
        await asyncio.wait((copying, stopping), return_when=asyncio.FIRST_COMPLETED)
        if not copying.done():
            log.info("draining")
            await asyncio.wait((copying,), timeout=STOP_SECONDS)
        if not copying.done():
            # Before it is cancelled: the driver would send a ROLLBACK and wait for the answer.
            await sink.close()
        if copying.done():
            await copying  # its error, if it has one
    finally:
        for task in (copying, stopping, beating):
            task.cancel()
        await asyncio.gather(copying, stopping, beating, return_exceptions=True)
