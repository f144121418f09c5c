"""Writes what the docs and the chart say of the code; `make docs` runs it, and a test compares.

Each table stands between `<!-- NAME -->` and `<!-- end -->`. The chart's values schema has parts from
the code (`values_schema`), and its README is made by helm-docs, where that is there.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase

from docs import alerts, log_schema, values_schema
from service.config import Settings
from service.domain import AttemptKind, Outcome
from service.errors import catalogue
from service.overload import Priority, Shed
from service.routing.breaker import Circuit
from service.telemetry import Metrics
from service.telemetry.recorder import SHARED_FEATURES
from service.worker.metrics import RESULTS, WHERES, SinkMetrics

ROOT = Path(__file__).resolve().parent.parent
CHART = ROOT / "helm/weir"
LOG_SCHEMA = ROOT / "docs/logs.schema.json"


def settings() -> str:
    rows = ["| setting | default | what it is |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        rows.append(f"| `{name.upper()}` | {_default(field.default)} | {field.description} |")
    return "\n".join(rows)


def errors() -> str:
    rows = ["| status | code | retry | what a caller should do |", "|---|---|---|---|"]
    seen = set()
    for error in sorted(catalogue(), key=lambda e: (e.status, e.code)):
        if (error.status, error.code) not in seen:
            seen.add((error.status, error.code))
            retry = "yes" if error.retry else "no"
            rows.append(f"| {error.status} | `{error.code}` | {retry} | {error.advice} |")
    return "\n".join(rows)


def metrics() -> str:
    registry = CollectorRegistry()
    Metrics(registry, "0")
    return _families(registry)


def label_values() -> str:
    """Of the labels whose values are of a list that the code has, by the metrics that have them."""
    registry = CollectorRegistry()
    Metrics(registry, "0")
    begun = {family.name: [s.labels for s in family.samples] for family in registry.collect()}
    lists: dict[tuple[str, str], Iterable[str]] = {
        ("kind", "weir_upstream_attempts"): AttemptKind,
        ("outcome", "weir_requests"): Outcome,
        ("reason", "weir_shed"): Shed,
        ("priority", "weir_shed"): [priority.name.lower() for priority in Priority],
        ("state", "weir_circuit_state"): Circuit,
        ("feature", "weir_degraded"): SHARED_FEATURES,
        ("result", "weir_sink_records"): RESULTS,
        ("where", "weir_sink_errors"): WHERES,
    }
    for label, name in (
        ("reason", "weir_wasted_cost_usd"),
        ("result", "weir_cache_requests"),
        ("result", "weir_hedges"),
        ("result", "weir_config_reloads"),
        ("signal", "weir_telemetry_dropped"),
    ):
        lists[label, name] = dict.fromkeys(labels[label] for labels in begun[name])
    names = _labels(registry)
    rows = ["| label | of | values |", "|---|---|---|"]
    for (label, name), values in sorted(lists.items(), key=lambda row: row[0]):
        shown = name if name in names else f"{name}_total"
        rows.append(f"| `{label}` | `{shown}` | {', '.join(f'`{value}`' for value in values)} |")
    return "\n".join(rows)


def worker_metrics() -> str:
    registry = CollectorRegistry()
    SinkMetrics(registry)
    return _families(registry)


def _families(registry: CollectorRegistry) -> str:
    labels = _labels(registry)
    rows = ["| metric | type | labels | what it counts |", "|---|---|---|---|"]
    for family in sorted(registry.collect(), key=lambda f: f.name):
        if family.name.startswith("process_"):
            continue  # prometheus-client's own, and only on Linux
        name = family.name + ("_total" if family.type == "counter" else "")
        told = ", ".join(f"`{label}`" for label in labels[name]) or "-"
        rows.append(f"| `{name}` | {family.type} | {told} | {family.documentation} |")
    return "\n".join(rows)


def _labels(registry: CollectorRegistry) -> dict[str, tuple[str, ...]]:
    """Of each metric, by its name; a histogram's buckets have `le` beside."""
    found = {}
    for metric in registry._collector_to_names:  # noqa: SLF001  # there is no other way to know them
        if isinstance(metric, MetricWrapperBase):
            (about,) = metric.describe()
            name = about.name + ("_total" if about.type == "counter" else "")
            found[name] = tuple(metric._labelnames)  # noqa: SLF001  # as above
    return found


def example() -> str:
    """The `.env.example`: every setting, commented out, with its default."""
    lines = ["# Every setting with its default; copy to .env and uncomment what you change."]
    for name, field in Settings.model_fields.items():
        lines += ["", f"# {field.description}", f"#{name.upper()}={_plain(field.default)}"]
    return "\n".join(lines) + "\n"


TABLES = {
    "settings": settings,
    "errors": errors,
    "metrics": metrics,
    "label_values": label_values,
    "worker_metrics": worker_metrics,
    "log_request_fields": log_schema.request_fields,
    "log_event_fields": log_schema.event_fields,
    "log_events": log_schema.events,
    "alerts": alerts.table,
}


def with_tables(text: str) -> str:
    """`text` with its tables made anew."""
    return re.sub(
        r"<!-- (\w+) -->\n.*?<!-- end -->",
        lambda found: f"<!-- {found[1]} -->\n{TABLES[found[1]]()}\n<!-- end -->",
        text,
        flags=re.DOTALL,
    )


def stale() -> list[Path]:
    """The files that are not as the code is."""
    pages = [p for p in (ROOT / "docs").glob("*.md") if with_tables(p.read_text()) != p.read_text()]
    if (ROOT / ".env.example").read_text() != example():
        pages.append(ROOT / ".env.example")
    if LOG_SCHEMA.read_text() != log_schema.text():
        pages.append(LOG_SCHEMA)
    if values_schema.stale(CHART / "values.schema.json"):
        pages.append(CHART / "values.schema.json")
    if chart_readme() not in (None, (CHART / "README.md").read_text()):
        pages.append(CHART / "README.md")
    return pages


def chart_readme() -> str | None:
    """The chart's README, from its template and the comments of its values. None without helm-docs."""
    built = ROOT / ".venv/tools/helm-docs"
    program = str(built) if built.exists() else shutil.which("helm-docs")
    if program is None:
        return None
    return subprocess.run(  # noqa: S603  # a program of ours
        [program, "--dry-run", "--chart-search-root", str(CHART), "--sort-values-order", "file"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def main() -> int:
    for page in (ROOT / "docs").glob("*.md"):
        page.write_text(with_tables(page.read_text()))
    (ROOT / ".env.example").write_text(example())
    LOG_SCHEMA.write_text(log_schema.text())
    schema = CHART / "values.schema.json"
    schema.write_text(values_schema.with_parts(schema.read_text()))
    readme = chart_readme()
    if readme is None:
        print("helm-docs is not there: the README of the chart stays as it is", file=sys.stderr)
    else:
        (CHART / "README.md").write_text(readme)
    return 0


def _default(value: object) -> str:
    plain = _plain(value)
    return f"`{plain}`" if plain else "-"


def _plain(value: object) -> str:
    """A default as the environment would say it; empty where there is none."""
    if value is None:
        return ""
    if isinstance(value, tuple):
        return ",".join(str(part) for part in value)
    return str(value).lower() if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    sys.exit(main())
