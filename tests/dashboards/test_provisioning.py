"""What compose gives Grafana fits the dashboards."""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

from dashboards.queries import line
from tests.programs import ROOT

PROVISIONING = ROOT / "deploy/compose/grafana/provisioning"
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


def datasource(kind: str) -> dict[str, Any]:
    # Grafana makes one dollar of two.
    text = (PROVISIONING / "datasources/datasources.yaml").read_text().replace("$$", "$")
    (found,) = (d for d in yaml.safe_load(text)["datasources"] if d["type"] == kind)
    return dict(found)


def test_a_point_leads_to_its_trace_and_its_log_lines() -> None:
    trace, lines = datasource("prometheus")["jsonData"]["exemplarTraceIdDestinations"]
    assert (trace["name"], trace["datasourceUid"]) == ("trace_id", "tempo")
    assert lines["name"] == "trace_id"
    url = lines["url"].replace("${__value.raw}", TRACE)
    (query,) = json.loads(parse_qs(urlsplit(url).query)["panes"][0])["weir"]["queries"]
    assert query["expr"] == f'{{service_name="weir"}} |= "{TRACE}"'
    assert query["datasource"]["uid"] == datasource("loki")["uid"]


def test_ids_in_log_lines_lead_on_in_both_forms() -> None:
    fields = {field["name"]: field for field in datasource("loki")["jsonData"]["derivedFields"]}
    ids = {"trace_id": TRACE, "request_id": "req-7"}
    as_json = json.dumps(ids, separators=(",", ":"))
    as_panels_write_it = re.sub(r"\{\{\.(\w+)\}\}", lambda found: ids.get(found[1], "x"), line("outcome"))
    for written in (as_json, as_panels_write_it.removeprefix('line_format "').removesuffix('"')):
        for name, value in ids.items():
            found = re.search(fields[name]["matcherRegex"], written)
            assert found, (name, written)
            assert found[1] == value
    assert fields["trace_id"]["datasourceUid"] == "tempo"
    assert fields["request_id"]["datasourceUid"] == "loki"
