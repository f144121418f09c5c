"""What compose and the profile `full` give Grafana fits the dashboards, and leads from one to the next."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml

from dashboards.queries import line
from dashboards.variables import SOURCES
from tests.observability.logql import formatted
from tests.programs import ROOT

COMPOSE = ROOT / "deploy/compose"
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


def of_compose() -> dict[str, dict[str, Any]]:
    """Data sources by their type."""
    text = (COMPOSE / "grafana/provisioning/datasources/datasources.yaml").read_text()
    return by_type(yaml.safe_load(one_dollar(text))["datasources"])


def of_full() -> dict[str, dict[str, Any]]:
    """The same of the profile `full`: the chart there makes Prometheus' own, from a few values."""
    values = yaml.safe_load(one_dollar((ROOT / "deploy/dev/full/monitoring.yaml").read_text()))["grafana"]
    own = values["sidecar"]["datasources"]
    point = own["exemplarTraceIdDestinations"]
    destinations = [{"name": point["traceIdLabelName"], "datasourceUid": point["datasourceUid"]}]
    prometheus = {
        "type": "prometheus",
        "uid": own["uid"],
        "jsonData": {"exemplarTraceIdDestinations": destinations},
    }
    return by_type([prometheus, *values["additionalDataSources"]])


def one_dollar(text: str) -> str:
    """Grafana makes one dollar of two; what follows a single one is a variable of its environment."""
    assert not re.search(r"(?<!\$)\$(?!\$)", re.sub(r"(?m)^ *#.*$", "", text).replace("$$", ""))
    return text.replace("$$", "$")


def by_type(sources: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    found = {source["type"]: source for source in sources}
    assert len(found) == len(sources)
    return found


both = pytest.mark.parametrize("sources", [of_compose(), of_full()], ids=["compose", "full"])


@both
def test_there_is_a_data_source_of_each_kind_and_links_name_no_other(
    sources: dict[str, dict[str, Any]],
) -> None:
    """Dashboards choose by kind; what is provisioned chooses by uid."""
    assert {kind for _, kind, _ in SOURCES} <= sources.keys()
    assert {kind: source["uid"] for kind, source in sources.items()} == {kind: kind for kind in sources}
    named = set(linked(list(sources.values())))
    assert {"tempo", "loki"} <= named <= {source["uid"] for source in sources.values()}


def linked(value: Any) -> Iterator[str]:
    """Every uid that a data source leads to."""
    if isinstance(value, dict):
        if "datasourceUid" in value:
            yield value["datasourceUid"]
        for inner in value.values():
            yield from linked(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from linked(inner)


@both
def test_a_point_leads_to_its_trace(sources: dict[str, dict[str, Any]]) -> None:
    first = sources["prometheus"]["jsonData"]["exemplarTraceIdDestinations"][0]
    assert (first["name"], first["datasourceUid"]) == ("trace_id", "tempo")


@both
def test_a_trace_leads_to_its_log_lines(sources: dict[str, dict[str, Any]]) -> None:
    logs = sources["tempo"]["jsonData"]["tracesToLogsV2"]
    assert logs["datasourceUid"] == "loki"
    assert logs["customQuery"] is True
    query = logs["query"].replace("${__trace.traceId}", TRACE)
    assert query == f'{{service_name="weir"}} | trace_id="{TRACE}"'


@both
def test_ids_in_log_lines_lead_on_in_both_forms(sources: dict[str, dict[str, Any]]) -> None:
    fields = {field["name"]: field for field in sources["loki"]["jsonData"]["derivedFields"]}
    ids = {"trace_id": TRACE, "request_id": "req-7"}
    as_json = json.dumps(ids, separators=(",", ":"))
    template = line("outcome", "status").removeprefix('line_format "').removesuffix('"')
    as_panels_write_it = formatted(template, {"outcome": "timeout", **ids})
    assert as_panels_write_it == f"timeout request_id=req-7 trace_id={TRACE}", "without what it has not"
    for written in (as_json, as_panels_write_it):
        for name, value in ids.items():
            found = re.search(fields[name]["matcherRegex"], written)
            assert found, (name, written)
            assert found[1] == value
    assert fields["trace_id"]["datasourceUid"] == "tempo"
    assert fields["request_id"]["datasourceUid"] == "loki"
    assert fields["trace_id"]["url"] == "${__value.raw}"
    query = fields["request_id"]["url"].replace("${__value.raw}", "req-7")
    assert query == '{service_name="weir"} |= "req-7"'


def test_a_point_of_compose_leads_to_its_log_lines_too() -> None:
    sources = of_compose()
    lines = sources["prometheus"]["jsonData"]["exemplarTraceIdDestinations"][1]
    assert lines["name"] == "trace_id"
    url = lines["url"].replace("${__value.raw}", TRACE)
    (query,) = json.loads(parse_qs(urlsplit(url).query)["panes"][0])["weir"]["queries"]
    assert query["expr"] == f'{{service_name="weir"}} |= "{TRACE}"'
    assert query["datasource"]["uid"] == sources["loki"]["uid"]


def test_prometheus_keeps_the_points() -> None:
    compose = yaml.safe_load((COMPOSE / "compose.yaml").read_text())["services"]["prometheus"]
    assert "--enable-feature=exemplar-storage" in compose["command"]
    full = yaml.safe_load((ROOT / "deploy/dev/full/monitoring.yaml").read_text())["prometheus"]
    assert "exemplar-storage" in full["prometheusSpec"]["enableFeatures"]


def test_compose_provisions_the_charts_own_files() -> None:
    """And Grafana there lets nobody save over them."""
    mounted = yaml.safe_load((COMPOSE / "compose.yaml").read_text())["services"]["grafana"]["volumes"]
    path = "/etc/grafana/dashboards"
    assert f"../../helm/weir/files/dashboards:{path}:ro" in mounted
    text = (COMPOSE / "grafana/provisioning/dashboards/dashboards.yaml").read_text()
    (provider,) = yaml.safe_load(text)["providers"]
    assert provider["options"]["path"] == path
    assert provider["allowUiUpdates"] is False
