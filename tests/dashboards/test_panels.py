"""Every panel is as it should be, and the lint finds what is not."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest

from dashboards.catalogue import BOARDS, panels
from dashboards.panels import (
    NUMBER,
    REQUESTS_PER_SECOND,
    SECONDS,
    SHARE,
    USD,
    Limit,
    Panel,
    Target,
    Thresholds,
    Words,
    above,
    timeseries,
)
from dashboards.queries import fill, rate
from dashboards.upstreams import COUNTED, FAILED
from tests.dashboards.lint import VARIABLES, complaints
from tests.programs import ROOT

PANELS = [pytest.param(panel, id=f"{panel.dashboard}: {panel.title}") for panel in panels()]
WORDS = Words("What it is.", "Good.", "Do this.", "Nothing yet.")


@pytest.mark.parametrize("panel", PANELS)
def test_nothing_is_wrong_with_a_panel(panel: Panel) -> None:
    assert complaints(panel) == []


def one(expr: str, unit: str = NUMBER, title: str = "One", **more: Any) -> Panel:
    return timeseries(title, [(expr, "x")], WORDS, unit=unit, **more)


PLACE = 'cluster=~"$cluster",namespace=~"$namespace"'
GOOD = one(f"sum(rate(weir_requests_total{{{PLACE}}}[$__rate_interval]))", REQUESTS_PER_SECOND)
TTFT = f"gen_ai_server_time_to_first_token_seconds_bucket{{{PLACE}}}[$__rate_interval]"
TOKENS = "gen_ai_client_inference_usage_"
UNREASONED = Thresholds("green", (Limit(1, "red"),))


def test_a_panel_says_what_no_rate_sees() -> None:
    cost = replace(GOOD, targets=(Target(f"{rate('weir_cost_usd_total')} * 3600"),))
    tried = replace(GOOD, targets=(Target(rate("weir_upstream_attempts_total")),))
    zero = replace(GOOD, targets=(Target(f"sum(up) or 0 * {rate('weir_upstream_attempts_total')}"),))
    assert "a pod's first dollars" in cost.description
    assert "/api/v1/usage" in cost.description
    assert "a pod's first attempts" in tried.description
    assert "/api/v1/usage" not in tried.description
    assert "Not seen" not in GOOD.description + zero.description


def test_a_panel_says_why_its_colours_change_those_of_its_columns_too() -> None:
    failed = Target("up", "Failed", thresholds=above(1, reason="red from one."))
    table = replace(GOOD, targets=(Target("up", "Asked"), failed))
    assert "**Colours:** Failed: red from one." in table.description
    assert "**Colours:** the line is 1. Failed: red from one." in (
        replace(table, thresholds=above(1, reason="the line is 1.")).description
    )
    assert "Colours" not in GOOD.description


def test_failed_attempts_are_those_of_the_alert() -> None:
    rules = (ROOT / "helm/weir/files/rules/alerts.yaml").read_text()
    (alert,) = re.findall(r"alert: WeirUpstreamDown\n(.*?) for:", rules, re.DOTALL)
    assert set(re.findall(r"outcome[^}]+", alert)) == {FAILED, COUNTED}


def test_the_panel_that_the_bad_ones_are_made_of_is_good() -> None:
    assert complaints(GOOD) == []


@pytest.mark.parametrize(
    ("panel", "complaint"),
    [
        (replace(GOOD, shows=""), "no shows"),
        (replace(GOOD, act="do it"), "act is no sentence"),
        (replace(GOOD, empty=""), "no empty"),
        (replace(GOOD, kind="stat"), "no short text"),
        (replace(GOOD, kind="stat", width=3, short="No requests to models in this time"), "no short text"),
        (replace(GOOD, unit="percent"), "unit 'percent'"),
        (replace(GOOD, targets=()), "no query"),
        (replace(GOOD, thresholds=UNREASONED), "thresholds without a reason"),
        (replace(GOOD, targets=(Target("up", thresholds=UNREASONED),)), "thresholds without a reason"),
        (
            replace(GOOD, thresholds=Thresholds("green", (Limit(2, "red"), Limit(1, "orange")), "so.")),
            "thresholds out of order",
        ),
        (
            replace(
                GOOD,
                targets=(
                    replace(
                        GOOD.targets[0],
                        thresholds=Thresholds("green", (Limit(2, "red"), Limit(1, "orange"))),
                    ),
                ),
            ),
            "thresholds out of order",
        ),
        (
            one(
                "histogram_quantile(0.9, sum by (le) "
                f"(rate(weir_overhead_seconds_bucket{{{PLACE}}}[$__rate_interval])))",
                SECONDS,
            ),
            "without exemplars",
        ),
        (
            replace(GOOD, kind="stat", title="Very many words for a small number", width=3),
            "its title is too long",
        ),
        (one(f"sum(rate(weir_requests_total{{{PLACE}}}[5m]))", REQUESTS_PER_SECOND), "a fixed window of 5m"),
        (one(f"sum(increase(weir_requests_total{{{PLACE}}}[$__range]))"), "$__range in a course over time"),
        (replace(GOOD, kind="table"), "a range of values where one is shown"),
        (one(f'sum(up{{{PLACE},job=~"$service"}})'), "unknown variables ['service']"),
        (one(f"sum(up{{{PLACE}}}"), "PromQL"),
        (one(f"sum(weir_nothing{{{PLACE}}})"), "nobody makes weir_nothing"),
        (one(f'sum(weir_config_stale{{{PLACE},model="x"}})'), "weir_config_stale has no label ['model']"),
        (one(f"sum by (tenant) (weir_inflight_requests{{{PLACE}}})"), "has no label ['tenant'] to group by"),
        (one("sum(weir_inflight_requests)"), "does not follow the choice"),
        (
            one(f"sum(rate(weir_inflight_requests{{{PLACE}}}[$__rate_interval]))", REQUESTS_PER_SECOND),
            "which is no counter",
        ),
        (one(f"deriv(weir_requests_total{{{PLACE}}}[1h])", REQUESTS_PER_SECOND), "deriv() of a counter"),
        (one(f"sum(weir_requests_total{{{PLACE}}})"), "is a counter: it wants rate() or increase()"),
        (one(f"max_over_time(weir_requests_total{{{PLACE}}}[1h])"), "is a counter: it wants rate()"),
        (
            replace(one(f"sum by (pod) (rate({TTFT}))", SECONDS, exemplars=True), kind="heatmap"),
            "keep le",
        ),
        (one(f"histogram_quantile(0.9, sum(rate({TTFT})))", SECONDS, exemplars=True), "not summed by le"),
        (
            one(f"histogram_quantile(0.9, sum by (le) ({TTFT.partition('[')[0]}))", SECONDS, exemplars=True),
            "the whole life",
        ),
        (one(f"histogram_quantile(0.9, sum by (le) (rate({TTFT})))", SECONDS), "without exemplars"),
        (replace(one(f"sum by (le) (rate({TTFT}))", SECONDS), kind="heatmap"), "a heatmap without exemplars"),
        (
            one(f"sum(weir_inflight_requests{{{PLACE}}}) / sum(weir_concurrency_limit{{{PLACE}}})", SHARE),
            "which may be 0",
        ),
        (
            one(
                f"sum(rate({TOKENS}input_tokens_total{{{PLACE}}}[$__rate_interval])) + "
                f"sum(rate({TOKENS}cache_read_input_tokens_total{{{PLACE}}}[$__rate_interval]))",
                "suffix: tok/s",
            ),
            "in the totals already",
        ),
        (
            one(
                f'sum(rate(http_requests_total{{{PLACE},status="5xx"}}[$__rate_interval])) / '
                f"(sum(rate(http_requests_total{{{PLACE}}}[$__rate_interval])) > 0)",
                SHARE,
            ),
            "broken streams are 2xx there",
        ),
        (one(f"max(weir_event_loop_lag_seconds{{{PLACE}}})", NUMBER), "unit short for {'s': 1}"),
        (one(f"sum(rate(weir_cost_usd_total{{{PLACE}}}[$__rate_interval]))", USD), "unit currencyUSD"),
        (
            one(f"sum(rate(weir_cost_usd_total{{{PLACE}}}[$__rate_interval])) * 3600", USD),
            "no word of the hour",
        ),
        (
            one(f"sum(up{{{PLACE}}}) + max(weir_event_loop_lag_seconds{{{PLACE}}})"),
            "adds what is unlike",
        ),
        (
            replace(GOOD, kind="logs", targets=(Target('{app="other"} | json', source="loki"),)),
            "log lines of others",
        ),
        (
            replace(
                GOOD,
                kind="logs",
                targets=(
                    Target('{service_name="weir"} | json | ms > 5 | line_format "{{.nope}}"', source="loki"),
                ),
            ),
            "log lines have no ms",
        ),
    ],
)
def test_the_lint_finds(panel: Panel, complaint: str) -> None:
    found = complaints(panel)
    assert any(complaint in text for text in found), found


# -- the dashboards ----------------------------------------------------------------------------------


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.uid)
def test_panels_fill_their_lines_and_lie_on_nothing(board: Any) -> None:
    grids = [item.grid for item in board.items()]
    for one, other in combinations(grids, 2):
        beside = one.x + one.w <= other.x or other.x + other.w <= one.x
        apart = one.y + one.h <= other.y or other.y + other.h <= one.y
        assert beside or apart, (one, other)
    for y in range(max(grid.y + grid.h for grid in grids)):
        assert sum(grid.w for grid in grids if grid.y <= y < grid.y + grid.h) == 24, f"row {y}"


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.uid)
def test_the_first_sight_is_whole_on_a_laptop(board: Any) -> None:
    """1366x768 leaves some 500 pixels below the bars: 13 rows of 38."""
    first, second = board.sections[:2]
    assert not first.title
    heading = next(item for item in board.items() if item.title == second.title)
    assert heading.grid.y <= 13
    assert all(panel.kind in ("stat", "bargauge") for panel in board.panels() if panel.grid.y == 0)


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.uid)
def test_titles_and_ids_are_there_once(board: Any) -> None:
    for name, number in Counter(panel.title for panel in board.panels()).items():
        assert number == 1, name
    ids = [item.id for item in board.items()]
    assert len(ids) == len(set(ids))


def test_the_overview_answers_its_three_questions_in_the_first_row() -> None:
    first = [panel for panel in BOARDS[0].panels() if panel.grid.y == 0]
    text = " ".join(target.expr for panel in first for target in panel.targets)
    for metric in ("weir_requests_total", "time_to_first_token", "error_budget_remaining", "ALERTS"):
        assert metric in text, "are users fine"
    assert "weir_cost_usd_total" in text, "what does it cost"
    assert "by (gen_ai_request_model)" in text, "which model"


def test_variables_are_filled() -> None:
    assert fill('a{x=~"$model"}[$__range]', {"model": "b|c"}) == 'a{x=~"b|c"}[6h]'
    assert fill('a{x=~"${tenant:regex}"}') == 'a{x=~".*"}'
    assert {name for board in BOARDS for name in board.variables()} == VARIABLES | {
        "datasource",
        "loki",
        "tempo",
    }
