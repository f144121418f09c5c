"""The way of ended spans to the collector: a bounded queue, and a thread that empties it.

Whoever ends a span never waits. What has no room, and what the collector does not take, is dropped and
counted. The thread starts with the first span, so that none is lost to a fork before it.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Final

import structlog
from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from service.config import Settings
from service.tracing.pairs import pairs

CLOSE_SECONDS: Final = 3.0
"""For what still waits when the service ends."""
_LIBRARY: Final = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
_COMPRESSIONS: Final = {
    "none": Compression.NoCompression,
    "gzip": Compression.Gzip,
    "deflate": Compression.Deflate,
}

log = structlog.get_logger("weir")


class Export(SpanProcessor):
    """Sends spans in batches of up to `batch`, `delay_seconds` after the first at the latest.

    `dropped` is told of each span that nobody gets; it is called from both threads. `why` says why the last
    export failed.
    """

    def __init__(
        self,
        exporter: SpanExporter,
        *,
        most_waiting: int,
        batch: int,
        delay_seconds: float,
        dropped: Callable[[int], None],
        why: Callable[[], str] = str,
    ) -> None:
        self._exporter = exporter
        self._why = why
        self._most = most_waiting
        self._batch = min(batch, most_waiting)
        self._delay = delay_seconds
        self._dropped = dropped
        self._waiting: deque[ReadableSpan] = deque()
        self._wake = threading.Event()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = self._given_up = False
        self._sending = 0
        """Spans that are on their way."""
        self._well: bool | None = None

    def on_end(self, span: ReadableSpan) -> None:
        if self._closed or len(self._waiting) >= self._most:
            self._dropped(1)
            return
        self._waiting.append(span)
        if self._thread is None:
            self._start()
        if len(self._waiting) >= self._batch:
            self._wake.set()

    def shutdown(self) -> None:
        """Send what waits, for a few seconds at the most. May be called again."""
        self._closed = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(CLOSE_SECONDS)
            left = len(self._waiting) + self._sending
            self._waiting.clear()
            self._given_up = True
            if left:
                self._dropped(left)
                log.warning("traces_lost", spans=left, reason="the collector did not take them in time")
            self._thread = None
            self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Nobody asks for it: `shutdown` sends all."""
        return False

    def _start(self) -> None:
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="traces", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while not self._closed:
            self._wake.wait(self._delay)
            self._wake.clear()
            self._send_all()
        self._send_all()

    def _send_all(self) -> None:
        while self._waiting:
            spans: list[ReadableSpan] = []
            while self._waiting and len(spans) < self._batch:
                try:
                    spans.append(self._waiting.popleft())
                except IndexError:  # given up by `shutdown` meanwhile
                    break
            if spans:
                self._send(spans)

    def _send(self, spans: list[ReadableSpan]) -> None:
        self._sending = len(spans)
        try:
            good = self._exporter.export(spans) is SpanExportResult.SUCCESS
        except Exception as error:  # noqa: BLE001  # the thread must live, whatever a span holds
            good = False
            log.warning("traces_fault", error=type(error).__name__)
        self._sending = 0
        if self._given_up:
            return  # they were counted by whoever gave up
        if not good:
            self._dropped(len(spans))
        self._tell(good)

    def _tell(self, good: bool) -> None:
        """One line for each change."""
        if good is self._well:
            return
        if good:
            log.info("traces_available")
        else:
            note = "spans are dropped until the collector takes them"
            log.warning("traces_unavailable", reason=self._why(), note=note)
        self._well = good


class _Reasons(logging.Handler):
    """Takes the library's lines, one or more for each batch that fails, for the one line of `Export`.

    Of an error only its kind: its words hold addresses.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.last = ""

    def emit(self, record: logging.LogRecord) -> None:
        match record.args:
            case (str(reason), _, float()):  # about to try again
                self.last = reason
            case (Exception() as error, _, float()) | (_, None, Exception() as error):
                self.last = type(error).__name__
            case (_, int(status), _):
                self.last = f"status {status}"


def make_export(settings: Settings, endpoint: str, dropped: Callable[[int], None]) -> Export:
    """To an OTLP collector over HTTP."""
    reasons = _Reasons()
    logger = logging.getLogger(_LIBRARY)
    logger.handlers[:], logger.propagate = [reasons], False
    return Export(
        _exporter(settings, endpoint),
        most_waiting=settings.otel_bsp_max_queue_size,
        batch=settings.otel_bsp_max_export_batch_size,
        delay_seconds=settings.otel_bsp_schedule_delay / 1000,
        dropped=dropped,
        why=lambda: reasons.last or "not taken in time",
    )


def _exporter(settings: Settings, endpoint: str) -> SpanExporter:
    """It repeats what is worth it, within its time limit."""
    secret = settings.otel_exporter_otlp_headers
    return OTLPSpanExporter(
        endpoint=endpoint,
        headers=pairs(secret.get_secret_value()) if secret else None,
        timeout=settings.otel_exporter_otlp_timeout / 1000,
        compression=_COMPRESSIONS[settings.otel_exporter_otlp_compression],
        certificate_file=_path(settings.otel_exporter_otlp_certificate),
        client_certificate_file=_path(settings.otel_exporter_otlp_client_certificate),
        client_key_file=_path(settings.otel_exporter_otlp_client_key),
        meter_provider=NoOpMeterProvider(),
    )


def _path(path: Path | None) -> str | None:
    return str(path) if path is not None else None
