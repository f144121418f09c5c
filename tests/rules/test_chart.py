"""What the chart makes of the rule files by its values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.telemetry import FIRST_TOKEN_BUCKETS
from tests.chart.rendering import CHART, render
from tests.programs import HELMS
from tests.promql import reads
from tests.rules.files import ALERTS, RECORDS, RULES, Rule, edges_of, next_edge, promtool

VALUES = yaml.safe_load((CHART / "values.yaml").read_text())["metrics"]["prometheusRule"]
SCHEMA = json.loads((CHART / "values.schema.json").read_text())

OBJECTIVES = {
    "availability": "weir:availability:objective",
    "ttft": "weir:ttft:objective",
    "ttftSeconds": "weir:ttft:objective_seconds",
    "streams": "weir:streams:objective",
}


def specs(helm: str = "helm", **values: Any) -> dict[str, dict[str, Any]]:
    """The spec of each PrometheusRule, by the name of its file."""
    rendered = render({"metrics": {"prometheusRule": {"enabled": True} | values}}, helm=helm)
    return {
        o["metadata"]["name"].removeprefix("rel-weir-"): o["spec"] for o in rendered.all("PrometheusRule")
    }


def rules(helm: str = "helm", **values: Any) -> dict[str, Rule]:
    """Each rule by its name; that of an alias has its label too."""
    return {
        rule.get("alert") or rule["record"] + rule.get("labels", {}).get("gen_ai_token_type", ""): rule
        for spec in specs(helm, **values).values()
        for group in spec["groups"]
        for rule in group["rules"]
    }


def alerts(**values: Any) -> dict[str, Rule]:
    return {name: rule for name, rule in rules(**values).items() if "alert" in rule}


def number(rule: Rule) -> float:
    """Of a constant: what stands before its series."""
    return float(rule["expr"].partition(" ")[0])


def record(threshold: str) -> str:
    """The series of a value, by the rule of its name."""
    return "weir:" + "".join(f"_{c.lower()}" if c.isupper() else c for c in threshold) + ":threshold"


@pytest.mark.parametrize("helm", HELMS)
def test_without_values_the_rules_are_those_of_the_files(helm: str) -> None:
    made = specs(helm)
    assert made == {path.stem: yaml.safe_load(path.read_text()) for path in RULES}


def test_nothing_is_made_unless_it_is_asked_for() -> None:
    assert render().all("PrometheusRule") == []


def written(folder: Path, **values: Any) -> dict[str, Path]:
    """The rule files that a Prometheus would get, and their paths."""
    made = {folder / f"{name}.yaml": spec for name, spec in specs(**values).items()}
    for path, spec in made.items():
        path.write_text(yaml.safe_dump(spec))
    return {path.stem: path for path in made}


EVERYTHING: dict[str, Any] = {
    "objectives": {"availability": 0.99, "ttft": "0.9", "ttftSeconds": 10, "streams": 0.995},
    "thresholds": {"spendFloorUsd": 2_500_000, "saturationRatio": "0.75"},
    "disabledAlerts": ["WeirSpendAnomaly", "WeirTtftBurnFast"],
    "severities": {"page": "critical", "ticket": "warning"},
    "alertSeverities": {"WeirUpstreamDown": "page"},
    "alertFor": {"WeirDegraded": "15m"},
    "alertLabels": {"team": "llm"},
    "alertAnnotations": {"where": "{{ $labels.namespace }} {{ $value | humanize }}"},
    "runbookUrl": "",
    "grafanaUrl": "https://grafana.example.com",
    "genaiAliases": False,
    "additionalGroups": [{"name": "ours", "rules": [{"record": "ours:up", "expr": "sum(up)"}]}],
}


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"objectives": {"availability": "0.9995"}, "matchers": 'namespace="apps"'},
        {"matchers": 'namespace=~"apps|batch",job!="other"', "objectives": {"ttftSeconds": 0.25}},
        {"disabledAlerts": list(ALERTS)},
        EVERYTHING,
    ],
    ids=["default", "matchers", "matchers-of-several", "no-alert", "everything"],
)
def test_promtool_takes_what_the_chart_makes(values: dict[str, Any], tmp_path: Path) -> None:
    promtool("check", "rules", *written(tmp_path, **values).values())


# 0.8 % of the requests fail: too many where 0.1 % may, few enough where 1 % may.
FAILING = [
    {"series": f'{name}{{job="weir", namespace="apps", pod="a"{more}}}', "values": values}
    for name, more, values in (
        ("weir_build_info", ', version="1"', "1+0x120"),
        ("weir_requests_total", ', outcome="success"', "0+992x120"),
        ("weir_requests_total", ', outcome="timeout"', "0+8x120"),
    )
]


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({}, True),
        ({"objectives": {"availability": 0.99}}, False),
        ({"thresholds": {"badEventsFloor": 1_000_000}}, False),
        ({"disabledAlerts": ["WeirAvailabilityBurnFast"]}, False),
        ({"matchers": 'namespace="other"'}, False),
        ({"matchers": 'namespace="apps"'}, True),
        ({"severities": {"page": "critical", "ticket": "warning"}}, True),
    ],
)
def test_who_is_told_follows_the_values(values: dict[str, Any], told: bool, tmp_path: Path) -> None:
    """By promtool, on the rules that the chart makes."""
    files = written(tmp_path, **values)
    severity = values.get("severities", {}).get("page", "page")
    fires = {"labels": f'{{severity="{severity}"}}', "value": 1}
    case = {
        "rule_files": [str(path) for path in files.values()],
        "evaluation_interval": "1m",
        "group_eval_order": [
            group["name"] for path in files.values() for group in yaml.safe_load(path.read_text())["groups"]
        ],
        "tests": [
            {
                "interval": "1m",
                "input_series": FAILING,
                "promql_expr_test": [
                    {
                        "expr": (
                            "count by (severity) "
                            '(ALERTS{alertname="WeirAvailabilityBurnFast", alertstate="firing"})'
                        ),
                        "eval_time": "2h",
                        "exp_samples": [fires] if told else [],
                    }
                ],
            }
        ],
    }
    (path := tmp_path / "case.yaml").write_text(yaml.safe_dump(case))
    promtool("test", "rules", path)


def test_the_files_say_what_the_values_say() -> None:
    made = rules()
    expected = {OBJECTIVES[name]: value for name, value in VALUES["objectives"].items()}
    expected |= {record(name): value for name, value in VALUES["thresholds"].items()}
    assert set(expected) == {
        name for name in RECORDS if name.endswith((":threshold", ":objective", "_seconds"))
    }
    for name, value in expected.items():
        assert number(made[name]) == value, name


@pytest.mark.parametrize("helm", HELMS)
def test_each_value_changes_its_own_constant_and_nothing_else(helm: str) -> None:
    objectives: dict[str, float | str] = {
        "availability": 0.9,
        "ttft": 0.8,
        "ttftSeconds": 2.5,
        "streams": "0.7",
    }
    thresholds: dict[str, float] = dict(zip(VALUES["thresholds"], range(1, 100), strict=False))
    for share in ("upstreamFailureRatio", "leaversRatio", "saturationRatio"):
        thresholds[share] = 0.25
    thresholds["spendFloorUsd"] = 1_000_000
    before, after = rules(helm), rules(helm, objectives=objectives, thresholds=thresholds)
    wanted = {OBJECTIVES[name]: float(value) for name, value in objectives.items()}
    wanted |= {record(name): float(value) for name, value in thresholds.items()}
    assert {name: number(after[name]) for name in wanted} == wanted
    assert {n: r for n, r in after.items() if n not in wanted} == {
        n: r for n, r in before.items() if n not in wanted
    }


@pytest.mark.parametrize("seconds", [1, 5, 10, 20, 0.1, 0.25, "0.75"])
def test_the_seconds_become_edges_as_python_writes_them(seconds: float | str) -> None:
    made = rules(objectives={"ttftSeconds": seconds})
    assert edges_of(made) == {
        "gen_ai_server_time_to_first_token_seconds_bucket": {str(float(seconds))},
        "gen_ai_server_request_duration_seconds_bucket": {next_edge(float(seconds))},
    }
    assert number(made["weir:ttft:objective_seconds"]) == float(seconds)


def test_the_seconds_that_may_be_chosen_are_edges() -> None:
    metrics = SCHEMA["properties"]["metrics"]["properties"]["prometheusRule"]["properties"]
    choices = metrics["objectives"]["properties"]["ttftSeconds"]["enum"]
    assert {float(choice) for choice in choices} <= set(FIRST_TOKEN_BUCKETS)
    assert VALUES["objectives"]["ttftSeconds"] in choices


def test_matchers_narrow_the_constants_alone() -> None:
    made = rules(matchers='namespace="apps"')
    for name, rule in made.items():
        narrow = [read.matchers.get("namespace") for read in reads(rule["expr"])]
        constant = name.endswith((":threshold", ":objective", ":objective_seconds"))
        assert set(narrow) == {"apps"} if constant else "apps" not in narrow, name


def test_alerts_are_left_out_by_name_and_an_empty_group_with_them() -> None:
    assert set(alerts(disabledAlerts=["WeirDegraded"])) == set(ALERTS) - {"WeirDegraded"}
    spends = ["WeirSpendAnomaly", "WeirUnpricedTraffic", "WeirBudgetForecast", "WeirPriceTableStale"]
    groups = specs(disabledAlerts=spends)["alerts"]["groups"]
    assert "weir-spend-alerts" not in {group["name"] for group in groups}
    assert "alerts-slo" not in specs(disabledAlerts=[name for name in ALERTS if "Burn" in name])


def test_the_schema_knows_each_alert() -> None:
    assert SCHEMA["definitions"]["alert"]["enum"] == list(ALERTS)


def test_severities_have_your_names_and_one_alert_another_one() -> None:
    made = alerts(
        severities={"page": "critical", "ticket": "warning"}, alertSeverities={"WeirUpstreamDown": "page"}
    )
    for name, rule in made.items():
        own = "page" if name == "WeirUpstreamDown" else ALERTS[name]["labels"]["severity"]
        assert rule["labels"]["severity"] == {"page": "critical", "ticket": "warning"}[own]


def test_labels_and_annotations_come_on_every_alert_and_take_nothing_away() -> None:
    made = alerts(
        alertLabels={"team": "llm", "severity": "none"},
        alertAnnotations={"where": "{{ $labels.namespace }}", "summary": "none"},
    )
    for name, rule in made.items():
        assert rule["labels"] == ALERTS[name]["labels"] | {"team": "llm"}
        assert rule["annotations"] == ALERTS[name]["annotations"] | {"where": "{{ $labels.namespace }}"}
    plain = [rule for name, rule in rules(alertLabels={"team": "llm"}).items() if "record" in rule]
    assert not [rule for rule in plain if "team" in rule.get("labels", {})]


def test_how_long_an_alert_must_last() -> None:
    made = alerts(alertFor={"WeirDegraded": "15m", "WeirSinkGap": "1m"})
    changed = {"WeirDegraded": "15m", "WeirSinkGap": "1m"}
    assert {name: rule.get("for") for name, rule in made.items()} == {
        name: changed.get(name, rule.get("for")) for name, rule in ALERTS.items()
    }


def test_addresses_are_yours() -> None:
    made = alerts(
        runbookUrl="https://wiki.example.com/weir#{alert}", grafanaUrl="https://grafana.example.com/"
    )
    for name, rule in made.items():
        notes = rule["annotations"]
        assert notes["runbook_url"] == f"https://wiki.example.com/weir#{name}"
        assert notes["dashboard"] == "https://grafana.example.com" + ALERTS[name]["annotations"]["dashboard"]
    assert all("runbook_url" not in rule["annotations"] for rule in alerts(runbookUrl="").values())


def test_the_old_names_can_be_left_out() -> None:
    assert "genai-aliases" in specs()
    assert set(specs()) - set(specs(genaiAliases=False)) == {"genai-aliases"}
