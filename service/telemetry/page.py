"""Metrics as a page of text: Prometheus' own format, or OpenMetrics, which has exemplars.

A page of 20,000 series is written by the admin port's thread while requests are served by another one. Only
one of them runs at a time, so this one rests after each few lines: docs/decisions/0024-our-own-page.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Final

from prometheus_client import CollectorRegistry, generate_latest, multiprocess
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.samples import Sample

from service.telemetry.instruments import Family, escaped, number

SLICE_LINES: Final = 400
"""Written without a rest: a fifth of a millisecond."""
REST_SECONDS: Final = 0.0002
_END: Final = b"# EOF\n"
_PLAIN_KINDS: Final = ("counter", "gauge", "histogram", "summary")


def exposition(
    registry: CollectorRegistry, rest: Callable[[float], None] = time.sleep
) -> Callable[[str], tuple[bytes, str]]:
    """A function from an Accept header to the metrics and their content type."""

    def render(accept: str) -> tuple[bytes, str]:
        _, content_type = choose_encoder(accept)
        page = _Page(rest, openmetrics=content_type.startswith("application/openmetrics-text"))
        for metric in registry.collect():
            page.add(metric)
        return page.end(), content_type

    return render


def merged_registry(directory: str) -> CollectorRegistry:
    """The metrics of all worker processes that write to `directory`."""
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry, path=directory)
    return registry


class _Page:
    def __init__(self, rest: Callable[[float], None], *, openmetrics: bool) -> None:
        self._rest = rest
        self._openmetrics = openmetrics
        self._lines: list[str] = []
        self._slices: list[bytes] = []

    def add(self, metric: Metric) -> None:
        if metric.type not in _PLAIN_KINDS:
            self._lines.append(self._by_the_library(metric))
            return
        self._lines.append(self._head(metric))
        if isinstance(metric, Family):
            for series in metric.series():
                series.write(self._lines, exemplars=self._openmetrics)
                self._rest_if_due()
        else:
            for sample in metric.samples:
                self._lines.append(_line(sample))
                self._rest_if_due()

    def end(self) -> bytes:
        self._cut()
        if self._openmetrics:
            self._slices.append(_END)
        return b"".join(self._slices)

    def _head(self, metric: Metric) -> str:
        # The text format names a counter as its samples are named, OpenMetrics without the ending.
        name = f"{metric.name}_total" if metric.type == "counter" and not self._openmetrics else metric.name
        text = metric.documentation.replace("\\", r"\\").replace("\n", r"\n")
        if self._openmetrics:
            text = text.replace('"', r"\"")
        return f"# HELP {name} {text}\n# TYPE {name} {metric.type}\n"

    def _by_the_library(self, metric: Metric) -> str:
        one = _One(metric)
        page = generate_openmetrics(one) if self._openmetrics else generate_latest(one)
        return page.removesuffix(_END).decode()

    def _rest_if_due(self) -> None:
        if len(self._lines) >= SLICE_LINES:
            self._cut()
            self._rest(REST_SECONDS)

    def _cut(self) -> None:
        self._slices.append("".join(self._lines).encode())
        self._lines.clear()


class _One(CollectorRegistry):
    """A registry of one metric, for the library's own writers."""

    def __init__(self, metric: Metric) -> None:
        super().__init__()
        self._metric = metric

    def collect(self) -> Iterable[Metric]:
        return [self._metric]


def _line(sample: Sample) -> str:
    inside = ",".join(f'{name}="{escaped(value)}"' for name, value in sample.labels.items())
    return (
        f"{sample.name}{{{inside}}} {number(sample.value)}\n"
        if inside
        else f"{sample.name} {number(sample.value)}\n"
    )
