"""What is wrong with a panel, in sentences; an empty list: nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import Any, Final

import promql_parser as promql
import yaml
from prometheus_client import CollectorRegistry

from dashboards.panels import Panel, Target, Thresholds
from dashboards.queries import fill, variables
from service.telemetry import Metrics
from service.worker.metrics import SinkMetrics
from tests.dashboards import promql as tree
from tests.programs import ROOT
from tests.promql import faults

PLACES: Final = frozenset({"cluster", "namespace", "job", "pod", "instance"})
"""Labels that scraping adds."""
OUTSIDE: Final[dict[str, frozenset[str]]] = {
    "up": frozenset(),
    "scrape_duration_seconds": frozenset(),
    "scrape_samples_post_metric_relabeling": frozenset(),
    "process_cpu_seconds_total": frozenset(),
    "process_resident_memory_bytes": frozenset(),
    "ALERTS": frozenset({"alertname", "alertstate", "severity"}),
    "container_cpu_cfs_periods_total": frozenset({"container"}),
    "container_cpu_cfs_throttled_periods_total": frozenset({"container"}),
    "kube_pod_container_info": frozenset({"container"}),
    "kube_pod_container_status_restarts_total": frozenset({"container"}),
    "kube_pod_status_ready": frozenset({"condition"}),
    "kube_horizontalpodautoscaler_status_current_replicas": frozenset({"horizontalpodautoscaler"}),
    "kube_horizontalpodautoscaler_status_desired_replicas": frozenset({"horizontalpodautoscaler"}),
    "kube_horizontalpodautoscaler_spec_max_replicas": frozenset({"horizontalpodautoscaler"}),
}
"""Metrics that Prometheus, Kubernetes and the client library make, and the labels that panels may use."""
RECORDED: Final = frozenset({"tenant", "key", "budget"})
"""Labels of recorded series beside the place."""
UNITS: Final = ("s", "currencyUSD", "percentunit", "suffix: tok/s", "reqps", "cps", "short", "bytes", "none")
COUNTERS: Final = ("_total", "_count", "_sum", "_bucket")
SUBSETS: Final = re.compile(r"usage_(cache_read_input|cache_write_input|reasoning_output)_tokens_total")
"""Parts of the totals of tokens."""
OVER_TIME: Final = ("timeseries", "heatmap", "state-timeline")
VARIABLES: Final = frozenset({"cluster", "namespace", "job", "provider", "model", "tenant"})
BUILT_IN: Final = frozenset({"__rate_interval", "__range"})


@cache
def known_labels() -> dict[str, frozenset[str]]:
    """Every series that there may be, and its labels."""
    known = {name: labels | PLACES for name, labels in OUTSIDE.items()}
    service, worker = CollectorRegistry(), CollectorRegistry()
    Metrics(service, "0")
    SinkMetrics(worker)
    for collector in (*service._collector_to_names, *worker._collector_to_names):
        labels = frozenset(getattr(collector, "_labelnames", ())) | PLACES
        kind, name = getattr(collector, "_type", None), getattr(collector, "_name", "")
        if kind == "counter":
            known[f"{name}_total"] = labels
        elif kind == "gauge":
            known[name] = labels
        elif kind == "histogram":
            known |= {f"{name}_sum": labels, f"{name}_count": labels, f"{name}_bucket": labels | {"le"}}
    for path in (ROOT / "helm/weir/files/rules").glob("*.yaml"):
        for group in yaml.safe_load(path.read_text())["groups"]:
            for rule in group["rules"]:
                if "record" in rule:
                    known[rule["record"]] = PLACES | RECORDED
    return known


def complaints(panel: Panel) -> list[str]:
    return [*of_words(panel), *of_look(panel), *(c for t in panel.targets for c in of_target(panel, t))]


def of_words(panel: Panel) -> Iterator[str]:
    for name in ("title", "unit", "shows", "good", "act", "empty"):
        if not getattr(panel, name).strip():
            yield f"no {name}"
    for name in ("shows", "good", "act", "empty"):
        if not getattr(panel, name).endswith("."):
            yield f"{name} is no sentence"
    if panel.kind in ("stat", "bargauge") and not 0 < len(panel.short) <= 8 * panel.width:
        yield "no short text for the place of a number"
    if panel.kind == "stat" and len(panel.title) > 7 * panel.width:
        yield "its title is too long for its width"


def of_look(panel: Panel) -> Iterator[str]:
    if panel.unit not in UNITS:
        yield f"unit {panel.unit!r}"
    for thresholds in (panel.thresholds, *(t.thresholds for t in panel.targets if t.thresholds)):
        yield from of_thresholds(thresholds)
    if panel.kind == "heatmap" and not all(target.exemplars for target in panel.targets):
        yield "a heatmap without exemplars"
    if not panel.targets:
        yield "no query"


def of_thresholds(thresholds: Thresholds) -> Iterator[str]:
    values = [limit.value for limit in thresholds.limits]
    if values != sorted(set(values)):
        yield "thresholds out of order"
    if values and not thresholds.reason:
        yield "thresholds without a reason"


def of_target(panel: Panel, target: Target) -> Iterator[str]:
    unknown = variables(target.expr) - VARIABLES - BUILT_IN
    if unknown:
        yield f"unknown variables {sorted(unknown)}"
    if target.source == "loki":
        yield from of_log_query(target.expr)
        return
    yield from of_windows(panel, target)
    try:
        node = promql.parse(fill(target.expr))
    except ValueError as error:
        yield f"PromQL: {error}"
        return
    yield from faults(fill(target.expr))
    yield from of_metrics(node)
    yield from of_functions(node)
    yield from of_arithmetic(node)
    if not tree.names(node) & {"ALERTS"}:
        yield from of_unit(panel, target, node)
    # Those of HTTP are another library's, and have none.
    slow = [n for n in tree.names(node) if n.endswith("_seconds_bucket") and not n.startswith("http_")]
    if panel.kind == "timeseries" and slow and not target.exemplars:
        yield "a quantile of times without exemplars"


def of_log_query(query: str) -> Iterator[str]:
    if not query.startswith('{service_name="weir"'):
        yield "log lines of others"
    shown = set(re.findall(r"\{\{\.(\w+)\}\}", query))
    compared = set(
        re.findall(
            r"(\w+) ?(?:=~|!~|!=|=|>|<) ?[\"\d]", query.partition("| json")[2].partition("line_format")[0]
        )
    )
    for field in sorted((shown | compared) - log_fields()):
        yield f"log lines have no {field}"


@cache
def log_fields() -> frozenset[str]:
    """Of Weir's lines by docs/logs.md, and the labels that Alloy gives to those of pods."""
    tables = (ROOT / "docs/logs.md").read_text()
    fields = set(re.findall(r"^\| `(\w+)` \|", tables, flags=re.MULTILINE))
    for row in re.findall(r"^\| `\w+` \| [\w, ]+ \| (.+) \|$", tables, flags=re.MULTILINE):
        fields |= set(re.findall(r"`(\w+)`", row))
    return frozenset(fields | {"namespace", "pod", "container", "service_name"})


def of_windows(panel: Panel, target: Target) -> Iterator[str]:
    if panel.kind not in OVER_TIME and panel.kind != "stat" and not target.instant:
        yield "a range of values where one is shown"
    if "[$__range]" in target.expr and not target.instant:
        yield "$__range in a course over time"
    for window in re.findall(r"\[([^\]:]+)[\]:]", target.expr):
        if not window.startswith("$") and promql.parse_duration(window).total_seconds() < 3600:
            yield f"a fixed window of {window} in place of $__rate_interval"


def of_metrics(node: Any) -> Iterator[str]:
    known = known_labels()
    found = tree.names(node)
    if found & {"http_requests_total", "http_request_duration_seconds_count"} and _divides(node):
        yield "a ratio of http_requests_total: broken streams are 2xx there"
    for selector in tree.selectors(node):
        name = str(selector.name)
        if name not in known:
            yield f"nobody makes {name}"
            continue
        used = {matcher.name for matcher in selector.matchers.matchers}
        if used - known[name]:
            yield f"{name} has no label {sorted(used - known[name])}"
        if not {"cluster", "namespace"} <= used:
            yield f"{name} does not follow the choice of cluster and namespace"
    for aggregate in (n for n in tree.walk(node) if isinstance(n, promql.AggregateExpr)):
        wanted = set(aggregate.modifier.labels) if aggregate.modifier else set()
        for name in tree.names(aggregate.expr) & known.keys():
            joined = known[name] | {"pod"}
            if wanted - joined and not any(
                isinstance(n, promql.BinaryExpr) for n in tree.walk(aggregate.expr)
            ):
                yield f"{name} has no label {sorted(wanted - joined)} to group by"


def of_functions(node: Any) -> Iterator[str]:
    for call in (n for n in tree.walk(node) if isinstance(n, promql.Call)):
        name = call.func.name
        arguments = [tree.bare(argument) for argument in call.args]
        if name in ("rate", "irate", "increase"):
            selector = arguments[0]
            counted = isinstance(selector, promql.MatrixSelector) and str(
                selector.vector_selector.name
            ).endswith(COUNTERS)
            if not counted:
                yield f"{name}() of {selector}, which is no counter"
        elif name in ("deriv", "predict_linear", "delta") and any(
            n.endswith(COUNTERS) for n in tree.names(arguments[0])
        ):
            yield f"{name}() of a counter"
        elif name == "histogram_quantile":
            yield from _of_quantile(arguments[1])


def _of_quantile(buckets: Any) -> Iterator[str]:
    kept = isinstance(buckets, promql.AggregateExpr) and str(buckets.op) == "sum"
    kept = kept and buckets.modifier is not None and "le" in buckets.modifier.labels
    if not kept:
        yield "histogram_quantile() of buckets that are not summed by le"
    if not any(
        isinstance(n, promql.Call) and n.func.name in ("rate", "increase") for n in tree.walk(buckets)
    ):
        yield "histogram_quantile() over the whole life of the buckets"
    if not all(name.endswith("_bucket") for name in tree.names(buckets)):
        yield "histogram_quantile() of what is no bucket"


def of_arithmetic(node: Any) -> Iterator[str]:
    for binary in (n for n in tree.walk(node) if isinstance(n, promql.BinaryExpr)):
        if str(binary.op) == "/" and not _guarded(tree.bare(binary.rhs)):
            yield f"a division by {tree.bare(binary.rhs)}, which may be 0"
        if str(binary.op) == "+" and any(SUBSETS.search(name) for name in tree.names(binary)):
            yield "cached or reasoning tokens are added, which are in the totals already"


def _guarded(node: Any) -> bool:
    """Is no 0, or nothing at all then."""
    if tree.is_number(node):
        return True
    if not isinstance(node, promql.BinaryExpr):
        return False
    if str(node.op) == ">":
        return tree.is_number(node.rhs)
    objective = all(name.endswith(":objective") for name in tree.names(node.rhs))
    return str(node.op) == "-" and tree.is_number(node.lhs, 1) and objective


def _divides(node: Any) -> bool:
    return any(isinstance(n, promql.BinaryExpr) and str(n.op) == "/" for n in tree.walk(node))


def of_unit(panel: Panel, target: Target, node: Any) -> Iterator[str]:
    try:
        found = tree.units(node)
    except tree.Unlike as error:
        yield f"adds what is unlike: {error}"
        return
    if panel.kind == "heatmap":  # the axis, not the cells
        (bucket,) = tree.names(node)
        found = tree.of_base(bucket)
    unit = target.unit or panel.unit
    if found is not None and not _fits(unit, dict(found)):
        yield f"unit {unit} for {dict(found)}"
    hourly = found is not None and found.get("h") == -1
    if hourly and "hour" not in f"{panel.title} {target.legend}".lower():
        yield "dollars an hour, and no word of the hour"


def _fits(unit: str, found: dict[str, int]) -> bool:
    per = {u for u, exponent in found.items() if exponent < 0}
    of = {u for u, exponent in found.items() if exponent > 0}
    match unit:
        case "s":
            return of == {"s"} and per <= {"n"}
        case "currencyUSD":
            return of == {"usd"} and per <= {"h", "n", "tok"}
        case "percentunit":
            return not found
        case "suffix: tok/s":
            return of <= {"tok", "n"} and per == {"s"}
        case "reqps" | "cps":
            return of == {"n"} and per == {"s"}
        case "short":
            return of <= {"n", "tok"} and not per
        case "bytes":
            return of == {"B"} and not per
    return unit == "none"
