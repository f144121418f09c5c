"""The worker's metrics. Written by its loop, read by the thread of the admin port."""

from __future__ import annotations

import time
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, disable_created_metrics
from prometheus_client.process_collector import ProcessCollector

from service.worker.ports import Where

WHERES: Final[tuple[Where, ...]] = ("redis", "postgres")
RESULTS: Final = ("copied", "known", "rejected")
SIGNALS: Final = ("traces", "logs")


class SinkMetrics:
    """No tenant is a label: the table has them all."""

    def __init__(self, registry: CollectorRegistry) -> None:
        disable_created_metrics()
        self._records = Counter(
            "weir_sink_records_total",
            "Records taken from the streams: copied, known (their id was there before) or rejected.",
            ["result"],
            registry=registry,
        )
        self._errors = Counter(
            "weir_sink_errors_total",
            "Attempts that Redis or PostgreSQL failed.",
            ["where"],
            registry=registry,
        )
        self._gaps = Counter(
            "weir_sink_gaps_total", "Times that a stream was trimmed before it was copied.", registry=registry
        )
        self._lost = Counter(
            "weir_sink_lost_records_total",
            "Records that were trimmed before they were copied, as far as Redis knows.",
            registry=registry,
        )
        self._available = Gauge(
            "weir_sink_available",
            "1 while the last attempt at Redis or PostgreSQL went well, else 0.",
            ["where"],
            registry=registry,
        )
        self._lag = Gauge(
            "weir_sink_lag_records", "Records in the streams that are not copied yet.", registry=registry
        )
        self._age = Gauge(
            "weir_sink_lag_seconds",
            "Age of the oldest record that is not copied yet; else 0.",
            registry=registry,
        )
        self._telemetry_dropped = Counter(
            "weir_telemetry_dropped_total",
            "Spans and log lines that nobody got: no room, or not taken in time.",
            ["signal"],
            registry=registry,
        )
        self._oldest_at: float | None = None
        self._age.set_function(self._lag_seconds)
        for result in RESULTS:
            self._records.labels(result)
        for where in WHERES:
            self._errors.labels(where)
            self._available.labels(where)
        for signal in SIGNALS:
            self._telemetry_dropped.labels(signal)
        ProcessCollector(registry=registry)

    def copied(self, *, new: int, known: int, rejected: int) -> None:
        for result, number in zip(RESULTS, (new, known, rejected), strict=True):
            self._records.labels(result).inc(number)

    def telemetry_dropped(self, signal: str, count: int) -> None:
        """`signal` is of SIGNALS. May be called from any thread."""
        self._telemetry_dropped.labels(signal).inc(count)

    def failed(self, where: Where) -> None:
        self._errors.labels(where).inc()

    def gap(self, lost: int) -> None:
        self._gaps.inc()
        self._lost.inc(lost)

    def available(self, where: Where, well: bool) -> None:
        self._available.labels(where).set(1 if well else 0)

    def waiting(self, records: int, oldest_at: float | None) -> None:
        """What is not copied: how many, and since when the oldest waits, by this machine's clock."""
        self._lag.set(records)
        self._oldest_at = oldest_at

    def _lag_seconds(self) -> float:
        oldest_at = self._oldest_at
        return 0.0 if oldest_at is None else max(time.time() - oldest_at, 0.0)
