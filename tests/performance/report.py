"""The table: medians over the rounds with their range, ratios to the bare reference, and the goals."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, Final, Literal, NamedTuple

Row = Literal[
    "upstream",
    "bare",
    "fastapi",
    "weir",
    "weir_redis",
    "weir_turns",
    "weir_quiet",
    "weir_traces_1",
    "weir_traces",
]
Metric = Literal[
    "requests_per_second",
    "p50_ms",
    "p99_ms",
    "paced_chunks_per_second",
    "cpu_seconds_per_1000_chunks",
    "fast_chunks_per_second",
    "resident_mb",
    "ready_seconds",
    "cpu_seconds_per_1000_requests",
    "cpu_share_requests",
    "cpu_share_fast",
]

TITLES: Final[dict[Row, str]] = {
    "upstream": "fake upstream alone (the limit)",
    "bare": "bare ASGI + aiohttp",
    "fastapi": "FastAPI + aiohttp",
    "weir": "Weir",
    "weir_redis": "Weir on Redis (limits, a budget, the ledger)",
    "weir_turns": "Weir on Redis, turns of conversations",
    "weir_quiet": "Weir without metrics and request lines",
    "weir_traces_1": "Weir, 1 % of the requests traced",
    "weir_traces": "Weir, all requests traced",
}


class Column(NamedTuple):
    """One column of the table."""

    metric: Metric
    title: str
    format: str
    has_ratio: bool = False


COLUMNS: Final = (
    Column("requests_per_second", "requests/s, 32 connections", ".0f", has_ratio=True),
    Column("p50_ms", "p50 alone, ms", ".2f"),
    Column("p99_ms", "p99 alone, ms", ".2f"),
    Column("paced_chunks_per_second", "chunks/s, 200 streams of 50/s", ".0f", has_ratio=True),
    Column("cpu_seconds_per_1000_chunks", "CPU s per 1000 of them", ".3f", has_ratio=True),
    Column("fast_chunks_per_second", "chunks/s, 32 streams unpaced", ".0f", has_ratio=True),
    Column("resident_mb", "RSS, MB", ".0f"),
    Column("ready_seconds", "ready, s", ".2f"),
)


class Spread(NamedTuple):
    """A median with its range."""

    median: float
    low: float
    high: float

    def show(self, spec: str) -> str:
        return f"{self.median:{spec}} ({self.low:{spec}} to {self.high:{spec}})"


class Goal(NamedTuple):
    """What Weir is to reach."""

    name: str
    bound: float
    at_least: bool
    measured: Callable[[Samples], Spread | None]

    def verdict(self, samples: Samples) -> str:
        spread = self.measured(samples)
        if spread is None:
            return "not measured"
        reached = spread.median >= self.bound if self.at_least else spread.median <= self.bound
        return f"{'reached' if reached else 'missed'}: {spread.show('.2f')}"


class Samples:
    """Every figure by row, metric and round."""

    def __init__(self) -> None:
        self._values: defaultdict[tuple[Row, Metric], dict[int, float]] = defaultdict(dict)

    def add(self, row: Row, metric: Metric, turn: int, value: float | None) -> None:
        if value is not None:
            self._values[row, metric][turn] = value

    def of(self, row: Row, metric: Metric) -> list[float]:
        return list(self._values[row, metric].values())

    def spread(self, row: Row, metric: Metric) -> Spread | None:
        return _spread(self.of(row, metric))

    def ratio(self, row: Row, metric: Metric, to: Row = "bare") -> Spread | None:
        """The ratio to a reference, taken within each round, since rounds differ in noise."""
        reference = self._values[to, metric]
        values = self._values[row, metric].items()
        return _spread(v / reference[turn] for turn, v in values if reference.get(turn))


GOALS: Final = (
    Goal("requests/s, ratio to bare", 0.65, True, lambda s: s.ratio("weir", "requests_per_second")),
    Goal("the same on Redis", 0.5, True, lambda s: s.ratio("weir_redis", "requests_per_second")),
    Goal("the same with conversations", 0.5, True, lambda s: s.ratio("weir_turns", "requests_per_second")),
    Goal(
        "streamed chunks/s, ratio to bare, 200 streams of 50/s",
        0.8,
        True,
        lambda s: s.ratio("weir", "paced_chunks_per_second"),
    ),
    Goal(
        "requests/s with metrics and request lines, ratio to without",
        0.88,
        True,
        lambda s: s.ratio("weir", "requests_per_second", "weir_quiet"),
    ),
    Goal("resident memory, MB", 110, False, lambda s: s.spread("weir", "resident_mb")),
    Goal("seconds to ready", 2, False, lambda s: s.spread("weir", "ready_seconds")),
)


def _spread(values: Iterable[float]) -> Spread | None:
    listed = list(values)
    return Spread(statistics.median(listed), min(listed), max(listed)) if listed else None


def table(samples: Samples, rows: Iterable[Row]) -> str:
    """A Markdown table."""
    titles = [""]
    for column in COLUMNS:
        titles += [column.title, "ratio to bare"] if column.has_ratio else [column.title]
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)]]
    for row in rows:
        cells = [TITLES[row]]
        for column in COLUMNS:
            spread = samples.spread(row, column.metric)
            cells.append(spread.show(column.format) if spread else "-")
            if column.has_ratio:
                ratio = samples.ratio(row, column.metric)
                cells.append(ratio.show(".2f") if ratio else "-")
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def telemetry(samples: Samples) -> str:
    """What each part of the telemetry costs, where it was measured."""
    metrics: tuple[tuple[Metric, str], ...] = (
        ("requests_per_second", "requests/s"),
        ("cpu_seconds_per_1000_requests", "CPU time of a request"),
        ("cpu_seconds_per_1000_chunks", "CPU time of a streamed chunk"),
    )
    rows: tuple[tuple[Row, str], ...] = (
        ("weir", "metrics and request lines"),
        ("weir_traces_1", "and 1 % of the requests traced"),
        ("weir_traces", "all of them traced"),
    )
    lines = []
    for row, title in rows:
        told = [
            f"{what} x {ratio.show('.3f')}"
            for metric, what in metrics
            if (ratio := samples.ratio(row, metric, "weir_quiet"))
        ]
        if told:
            lines.append(f"- {title}: {', '.join(told)}")
    return "\n".join(["Telemetry, against Weir without any:", *lines]) if lines else ""


def goals(samples: Samples) -> str:
    lines = ["Goals for Weir:"]
    for goal in GOALS:
        sign = ">=" if goal.at_least else "<="
        lines.append(f"- {goal.name} {sign} {goal.bound:g}: {goal.verdict(samples)}")
    return "\n".join(lines)


def bottleneck(samples: Samples, rows: Iterable[Row]) -> str:
    """Whether it was the service that was measured, and not the harness."""
    limits: tuple[tuple[Metric, Metric, str], ...] = (
        ("requests_per_second", "cpu_share_requests", "requests/s"),
        ("fast_chunks_per_second", "cpu_share_fast", "unpaced chunks/s"),
    )
    lines = []
    for metric, share, what in limits:
        limit = samples.ratio("upstream", metric)
        if limit:
            enough = "" if limit.median >= 3 else " - too little: the harness holds the references back"
            lines.append(
                f"{what}: the harness alone does {limit.median:.1f} times the bare reference{enough}."
            )
        shares = {TITLES[r]: s.median for r in rows if r != "upstream" and (s := samples.spread(r, share))}
        busy = ", ".join(f"{title} {s:.0%}" for title, s in shares.items())
        if busy:
            lines.append(f"{what}: CPU time per second: {busy} (far below 100%: others used its core).")
    return "\n".join(lines)


def as_json(samples: Samples, rows: Iterable[Row]) -> dict[str, Any]:
    """The same for machines, with every sample."""
    metrics: tuple[Metric, ...] = (
        *(c.metric for c in COLUMNS),
        *("cpu_seconds_per_1000_requests", "cpu_share_requests", "cpu_share_fast"),
    )
    return {
        "rows": {
            row: {
                metric: spread._asdict()
                | {"samples": samples.of(row, metric)}
                | ({"ratio": ratio._asdict()} if (ratio := samples.ratio(row, metric)) else {})
                for metric in metrics
                if (spread := samples.spread(row, metric))
            }
            for row in rows
        },
        "goals": {goal.name: {"bound": goal.bound, "verdict": goal.verdict(samples)} for goal in GOALS},
    }
