"""What dashboards, rules, the chart's scaling and the docs name is there, and what is there is named."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase

from service.errors import catalogue
from service.telemetry import Metrics
from tests.observability.dashboards import dashboards, fill, usual
from tests.observability.prometheus import rule_groups
from tests.observability.run import Run
from tests.programs import ROOT
from tests.promql import Read, reads

TARGET_LABELS = {"cluster", "namespace", "job", "pod", "container", "service", "endpoint", "instance"}
"""What discovery and Prometheus add to each series."""
CLUSTER_METRICS = ("kube_", "container_", "ALERTS", "up", "scrape_")
"""Of kube-state-metrics, of the kubelet and of Prometheus itself."""
HPA, KEDA = "scaling/HPA", "scaling/KEDA"
"""Where the chart's autoscalers name metrics."""
NAME = re.compile(
    r"\b(?:weir|gen_ai|http|openai|process)_[a-z0-9_]+[a-z0-9]\b|\bweir:[a-z0-9_]+:[a-z0-9_]+[a-z0-9]\b"
)
DOCS = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "README.md"])
CHART = sorted(
    path
    for folder in ("helm/weir", "deploy/values", "deploy/compose/prometheus")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".yaml", ".yml", ".tpl", ".txt", ".md") and "files" not in path.parts
)
"""Values, templates and notes; the files that the chart installs are read as PromQL."""
TABLES = (ROOT / "docs" / "metrics.md", ROOT / "docs" / "ledger.md")
"""The pages that list the metrics: of the service, and of the worker."""
WITH_LABELS = re.compile(r"\b((?:weir|gen_ai|http|openai)[:_][a-z0-9_:]+)\{([^}]*)\}")
NOT_METRICS = {
    *("openai_sdk", "openai_version"),  # a kind of upstream, a header
    *("weir_ledger", "weir_ledger_cursors", "weir_ledger_rejected", "weir_ledger_schema"),  # tables
    *("weir_redis", "weir_turns", "weir_quiet", "weir_traces_1", "weir_traces"),  # rows of the benchmark
    "gen_ai_client_token_usage",  # an old name, as an example of what may be left out
    *(error.code for error in catalogue()),
}
"""What pages name in code, and looks like a metric."""
SILENT = {
    "weir_state_writes_dropped_total": "counts losses, and a run whose books have to agree has none",
}
"""Metrics that have no sample in the run, each with the reason; their labels are those of the code."""


class Registry:
    """All samples that a scrape may have: of the pods, of the worker, and those that rules record."""

    def __init__(self, run: Run) -> None:
        self.pods, self.worker = run.samples, run.worker
        self.declared = {r["record"] for g in rule_groups() for r in g["rules"] if "record" in r}
        self.recorded = {
            name: {label for series in found for label in series.labels} - {"__name__"}
            for name in self.declared
            if (found := run.prometheus.query(name, run.ended))
        }

    def labels(self, name: str) -> set[str] | None:
        """The labels of a sample's name; None where there is no such sample."""
        for names in (self.pods.names(), self.worker.names(), self.recorded, silent()):
            if name in names:
                return names[name] | TARGET_LABELS
        return None


def silent() -> dict[str, set[str]]:
    """Names and labels of the silent ones, as the code has them."""
    registry = CollectorRegistry()
    Metrics(registry, "0")
    return {
        f"{metric._name}_total": set(metric._labelnames)
        for metric in registry._collector_to_names
        if isinstance(metric, MetricWrapperBase) and f"{metric._name}_total" in SILENT
    }


@pytest.fixture(scope="module")
def registry(traffic_run: Run) -> Registry:
    return Registry(traffic_run)


def uses() -> Iterator[tuple[str, str]]:
    """Where an expression stands, and the expression."""
    for dashboard in dashboards():
        for query in dashboard.queries:
            yield query.name, fill(query.expression, usual(range_seconds=60))
    for group in rule_groups():
        for rule in group["rules"]:
            yield f"{group['name']}/{rule.get('record') or rule['alert']}", rule["expr"]
    scaling = (ROOT / "helm" / "weir" / "templates" / "scaling.yaml").read_text()
    for name in re.findall(r"^\s+name: (weir_\w+)$", scaling, re.MULTILINE):
        yield HPA, name
    for query in re.findall(r"^\s+query: (.*)$", scaling, re.MULTILINE):
        yield KEDA, re.sub(r"\{\{.*?\}\}", "x", query)


USES = list(uses())


def test_the_scaling_of_the_chart_is_among_the_uses() -> None:
    """It is found by its look in a template, and may look otherwise some day."""
    assert {HPA, KEDA} <= {where for where, _ in USES}


@pytest.mark.parametrize(("where", "expression"), USES, ids=[where for where, _ in USES])
def test_names_and_labels_are_in_the_registry(registry: Registry, where: str, expression: str) -> None:
    for read in reads(expression):
        if not read.name.startswith(CLUSTER_METRICS):
            _check(registry, read)


def _check(registry: Registry, read: Read) -> None:
    labels = registry.labels(read.name)
    assert labels is not None, f"there is no {read.name}"
    wanted = (set(read.matchers) | read.named) - {"__name__"}
    assert wanted <= labels, f"{read.name} has no {sorted(wanted - labels)}"


def documented() -> set[str]:
    """Names in the tables of metrics."""
    row = re.compile(r"^\| `(\w+)` \| (?:counter|gauge|histogram) \|", re.MULTILINE)
    return {name for page in TABLES for name in row.findall(page.read_text())}


def documented_labels() -> dict[str, set[str]]:
    """Labels in the same tables, by metric."""
    row = re.compile(r"^\| `(\w+)` \| (?:counter|gauge|histogram) \| ([^|]*) \|", re.MULTILINE)
    found: dict[str, set[str]] = {}
    for page in TABLES:
        for name, labels in row.findall(page.read_text()):
            found.setdefault(name, set()).update(re.findall(r"`(\w+)`", labels))
    return found


@pytest.mark.parametrize(("name", "labels"), sorted(documented_labels().items()))
def test_documented_labels_are_those_of_the_registry(registry: Registry, name: str, labels: set[str]) -> None:
    found = registry.labels(name) or registry.labels(f"{name}_count")
    assert found is not None, f"there is no {name}"
    assert labels - TARGET_LABELS == found - TARGET_LABELS


def test_each_metric_is_documented(registry: Registry) -> None:
    missing = {name for name in _families(registry) if not name.startswith("process_")} - documented()
    assert not missing


def test_each_documented_metric_is_there(registry: Registry) -> None:
    assert not {name for name in documented() if not name.startswith("process_")} - _families(registry)


def test_each_metric_is_used_or_spare(registry: Registry) -> None:
    """docs/metrics.md has a paragraph that begins with "Spare"."""
    used = {_family(read.name) for _, expression in USES for read in reads(expression)}
    unused = _families(registry) - used - {f for f in _families(registry) if f.startswith("process_")}
    text = (ROOT / "docs" / "metrics.md").read_text()
    spare = set(re.findall(r"`(\w+)`", text.partition("Spare")[2].partition("\n\n")[0]))
    assert not unused - spare, "neither used nor spare"
    assert not spare & used, "used, so not spare"


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.stem)
def test_pages_name_metrics_that_there_are(registry: Registry, page: Path) -> None:
    code = snippets(page.read_text())
    assert not strangers(registry, code)
    for name, inside in (match.groups() for text in code for match in WITH_LABELS.finditer(text)):
        wanted = set(re.findall(r"(\w+)\s*(?:=|!|,|$)", re.sub(r'"[^"]*"', "", inside)))
        found = registry.labels(name) or registry.labels(f"{name}_bucket") or set()
        assert wanted <= found, f"{name} has no {sorted(wanted - found)}"
    for read in (read for text in code for read in queried(text)):
        _check(registry, read)


@pytest.mark.parametrize("path", CHART, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_chart_names_metrics_that_there_are(registry: Registry, path: Path) -> None:
    assert not strangers(registry, [path.read_text()])


def strangers(registry: Registry, texts: Iterable[str]) -> set[str]:
    """What looks like a metric in these texts, and is none."""
    found = (registry.pods, registry.worker)
    known = _families(registry) | registry.declared | NOT_METRICS | SILENT.keys()
    for samples in found:
        for name, labels in samples.names().items():
            known |= {name, *labels}
    names = {name for text in texts for name in NAME.findall(text)}
    return {name for name in names if name not in known and not _is_prefix(name, known)}


def snippets(page: str) -> list[str]:
    """What a page has in code: in its lines, in fences, and what is set in by four spaces."""
    fenced = re.findall(r"^ *```\w*\n(.*?)^ *```", page, re.DOTALL | re.MULTILINE)
    return [
        *re.findall(r"`([^`\n]+)`", page),
        *fenced,
        *re.findall(r"^[ -]*expr: (.+)$", "\n".join(fenced), re.MULTILINE),
        *(block.strip() for block in re.findall(r"(?:^    .*\n?)+", page, re.MULTILINE)),
    ]


def queried(text: str) -> list[Read]:
    """What it reads of our metrics, where it is PromQL."""
    try:
        found = list(reads(text))
    except ValueError:
        return []
    return [
        read for read in found if NAME.fullmatch(read.name) and read.name not in NOT_METRICS and _asks(read)
    ]


def _asks(read: Read) -> bool:
    """A name alone may be a family's or a label's, and is looked at as a name."""
    return bool(read.matchers or read.functions)


def test_the_reader_of_pages_reads() -> None:
    page = "See `sum(weir_one)`:\n\n    rate(weir_two[5m])\n\n```yaml\n- expr: max(weir_three) == 1\n```\n"
    found = {read.name for text in snippets(page) for read in queried(text)}
    assert found == {"weir_one", "weir_two", "weir_three"}


def _is_prefix(name: str, known: set[str]) -> bool:
    """`weir_budget_*` and the like are written for several."""
    return any(other.startswith(f"{name}_") for other in known)


def _families(registry: Registry) -> set[str]:
    return {
        f"{name}_total" if kind == "counter" and not name.endswith("_total") else name
        for samples in (registry.pods, registry.worker)
        for name, kind in samples.types.items()
    }


def _family(sample: str) -> str:
    return re.sub(r"_(bucket|sum|count)$", "", sample)
