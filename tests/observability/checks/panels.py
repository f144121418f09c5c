"""Every query of every dashboard goes to a Prometheus that has scraped the run, and returns data."""

from __future__ import annotations

import re

import pytest

from tests.observability.dashboards import Dashboard, Query, dashboards, fill, usual
from tests.observability.logql import fields, matching
from tests.observability.run import Run

DASHBOARDS = dashboards()
QUERIES = [query for dashboard in DASHBOARDS for query in dashboard.queries]
LOG_QUERIES = [query for dashboard in DASHBOARDS for query in dashboard.log_queries]

STREAM_LABELS = {"cluster", "namespace", "pod", "container", "service_name", "level"}
"""What the collector of logs adds to each line."""
EMPTY: dict[str, str] = {
    "overview/Which alerts fire (table)/A": "an alert waits longer than the run takes",
    "pods/Writes lost for want of Redis (timeseries)/A": "a run whose books have to agree loses nothing",
}
"""Queries that return nothing in this run, by their names, each with the reason. All others return data."""


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.name)
def test_a_panel_has_data(traffic_run: Run, query: Query) -> None:
    points = _points(traffic_run, query)
    if query.name in EMPTY:
        assert points == 0, "it has data: take it off the list"
    else:
        assert points > 0, query.expression


def test_the_list_of_the_empty_names_panels_that_there_are() -> None:
    assert EMPTY.keys() <= {query.name for query in (*QUERIES, *LOG_QUERIES)}


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


def _points(run: Run, query: Query) -> int:
    seconds = run.ended - run.began
    expression = fill(query.expression, usual(range_seconds=seconds))
    if query.instant:
        found = run.prometheus.query(expression, run.ended)
    else:
        found = run.prometheus.query_range(expression, run.began, run.ended, 1)
    return sum(value == value for series in found for _, value in series.points)  # NaN is no data
