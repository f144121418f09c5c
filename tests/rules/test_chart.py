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
from tests.rules.files import ALERTS, RECORDS, RULES, Rule, promtool

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


@pytest.mark.parametrize(
    "values", [{}, {"objectives": {"availability": "0.9995"}, "matchers": 'namespace="apps"'}]
)
def test_promtool_takes_what_the_chart_makes(values: dict[str, Any], tmp_path: Path) -> None:
    for name, spec in specs(**values).items():
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(spec))
        promtool("check", "rules", path)


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
    for share in ("upstreamFailureRatio", "saturationRatio"):
        thresholds[share] = 0.25
    thresholds["spendFloorUsd"] = 1_000_000
    before, after = rules(helm), rules(helm, objectives=objectives, thresholds=thresholds)
    wanted = {OBJECTIVES[name]: float(value) for name, value in objectives.items()}
    wanted |= {record(name): float(value) for name, value in thresholds.items()}
    assert {name: number(after[name]) for name in wanted} == wanted
    assert {n: r for n, r in after.items() if n not in wanted} == {
        n: r for n, r in before.items() if n not in wanted
    }


def edges(made: dict[str, Rule]) -> set[str]:
    return {
        read.matchers["le"] for rule in made.values() for read in reads(rule["expr"]) if "le" in read.matchers
    }


@pytest.mark.parametrize("seconds", [1, 5, 10, 0.25, "0.75"])
def test_the_seconds_become_an_edge_as_python_writes_it(seconds: float | str) -> None:
    made = rules(objectives={"ttftSeconds": seconds})
    assert edges(made) == {str(float(seconds))}
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
        assert narrow == ["apps"] if constant else "apps" not in narrow, name


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
