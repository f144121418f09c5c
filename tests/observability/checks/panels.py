"""Every query of every dashboard goes to a Prometheus that has scraped the run, and returns data."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import pytest

from tests.dashboards.promql import filled_with_0
from tests.observability.dashboards import Dashboard, Query, dashboards, fill, usual
from tests.observability.logql import fields, matching
from tests.observability.prometheus import Series, rule_groups
from tests.observability.run import Run
from tests.observability.settings import LAB, LLAMA, MINI, REASONER
from tests.observability.traffic import CLUSTER, JOB, NAMESPACE
from tests.promql import reads

DASHBOARDS = dashboards()
QUERIES = [query for dashboard in DASHBOARDS for query in dashboard.queries]
FILLED = [query for query in QUERIES if " or 0 * " in query.expression]
LOG_QUERIES = [query for dashboard in DASHBOARDS for query in dashboard.log_queries]

STREAM_LABELS = {"cluster", "namespace", "pod", "container", "service_name", "level"}
"""What the collector of logs adds to each line."""
EMPTY: dict[str, str] = {
    "overview/Which alerts fire (table)/A": "an alert waits longer than the run takes",
    "pods/Writes lost for want of Redis (timeseries)/A": "a run whose books have to agree loses nothing",
}
"""Queries that return nothing in this run, by their names, each with the reason. All others return data."""
ZERO: dict[str, str] = {"overview/Alerts firing (stat)/A": "an alert waits longer than the run takes"}
"""Queries that return nothing but the 0 that stands in for it."""

CHOSEN: Final = {
    "cluster": CLUSTER,
    "namespace": NAMESPACE,
    "job": JOB,
    "provider": "openai",
    "model": MINI,
    "tenant": "acme",
}
"""A value of each variable, of those that have the most to show."""
CHOSEN_FOR: Final[Mapping[str, Mapping[str, str]]] = {
    "cost/Requests without a price (timeseries)/A": {"model": LAB, "provider": "vllm"},
    "tokens/Tokens by kind (timeseries)/E": {"model": REASONER},
    "upstreams/Circuits (state-timeline)/A": {"model": LLAMA},
    "upstreams/Refused for their limits (429) (timeseries)/A": {"model": LAB},
}
"""Other values, for queries of what does not happen to that model."""

SELECTORS = sorted(
    {
        read.selector
        for expression in (
            *(fill(query.expression, usual(range_seconds=60)) for query in QUERIES),
            *(rule["expr"] for group in rule_groups() for rule in group["rules"]),
        )
        for read in reads(expression)
    }
)
"""Of all panels, annotations and rules."""
WITHOUT_SERIES: dict[str, str] = {
    'ALERTS{cluster=~".*",namespace=~".*",alertname=~"Weir.*",alertstate="firing"}': (
        "an alert waits longer than the run takes"
    ),
    "kube_pod_deletion_timestamp{}": "of pods that are being deleted: this run's cluster has none",
    'weir_state_writes_dropped_total{cluster=~".*",namespace=~".*",job=~"weir"}': (
        "a run whose books have to agree loses nothing"
    ),
    "weir_state_writes_dropped_total{}": "the same",
}
"""Those that find nothing in this run, each with the reason."""


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.name)
def test_a_panel_has_data(traffic_run: Run, query: Query) -> None:
    points = _points(traffic_run, query)
    if query.name in EMPTY:
        assert points == 0, "it has data: take it off the list"
    else:
        assert points > 0, query.expression


@pytest.mark.parametrize("query", FILLED, ids=lambda query: query.name)
def test_what_a_panel_has_a_0_for_is_there(traffic_run: Run, query: Query) -> None:
    """`x or 0 * y` has data without any x."""
    seconds = traffic_run.ended - traffic_run.began
    for part in filled_with_0(fill(query.expression, usual(range_seconds=seconds))):
        found = _series(traffic_run, query._replace(expression=part))
        assert any(value > 0 for series in found for _, value in series.points) is (query.name not in ZERO), (
            part
        )


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.name)
def test_a_panel_has_data_of_what_was_chosen(traffic_run: Run, query: Query) -> None:
    """One value of each variable: `.*` would match a label that is not there."""
    points = _points(traffic_run, query, {**CHOSEN, **CHOSEN_FOR.get(query.name, {})})
    assert bool(points) is (query.name not in EMPTY), query.expression


def test_the_lists_name_panels_that_there_are() -> None:
    assert EMPTY.keys() | ZERO.keys() | CHOSEN_FOR.keys() <= {
        query.name for query in (*QUERIES, *LOG_QUERIES)
    }


@pytest.mark.parametrize("query", [q for q in QUERIES if q.named], ids=lambda query: query.name)
def test_labels_that_a_panel_shows_are_those_of_its_series(traffic_run: Run, query: Query) -> None:
    found = {label for series in _series(traffic_run, query) for label in series.labels}
    assert query.named <= found or query.name in EMPTY


@pytest.mark.parametrize("selector", SELECTORS)
def test_each_part_of_an_expression_has_series(traffic_run: Run, selector: str) -> None:
    """Where one part is missing the others may still make a 0 of it, or a rule that never fires."""
    found = traffic_run.prometheus.series(selector, traffic_run.began, traffic_run.ended)
    assert bool(found) is (selector not in WITHOUT_SERIES)


def test_the_list_of_those_without_series_names_what_is_read() -> None:
    assert WITHOUT_SERIES.keys() <= set(SELECTORS)


@pytest.mark.parametrize("query", LOG_QUERIES, ids=lambda query: query.name)
def test_a_log_panel_finds_lines(traffic_run: Run, query: Query) -> None:
    expression = fill(query.expression, usual(range_seconds=60))
    lines = [line for pod in traffic_run.lines for line in (*pod.requests, *pod.others)]
    unknown = fields(expression) - {name for line in lines for name in line} - STREAM_LABELS
    assert not unknown, f"no line has {sorted(unknown)}"
    found = matching(expression, lines)
    assert bool(found) is (query.name not in EMPTY), expression


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda dashboard: dashboard.name)
def test_variables_have_values(traffic_run: Run, dashboard: Dashboard) -> None:
    for name, query in dashboard.variable_queries.items():
        match = re.fullmatch(r"label_values\((?:(.+),\s*)?(\w+)\)", query)
        assert match, (name, query)
        selector = fill(match[1] or "weir_build_info", usual(range_seconds=60))
        series = traffic_run.prometheus.series(selector, traffic_run.began, traffic_run.ended)
        assert {s[match[2]] for s in series if s.get(match[2])}, (name, query)


def _points(run: Run, query: Query, chosen: Mapping[str, str] = MappingProxyType({})) -> int:
    found = _series(run, query, chosen)
    return sum(value == value for series in found for _, value in series.points)  # NaN is no data


def _series(run: Run, query: Query, chosen: Mapping[str, str] = MappingProxyType({})) -> list[Series]:
    seconds = run.ended - run.began
    expression = fill(query.expression, {**usual(range_seconds=seconds), **chosen})
    if query.instant:
        return run.prometheus.query(expression, run.ended)
    return run.prometheus.query_range(expression, run.began, run.ended, 1)
