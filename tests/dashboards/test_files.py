"""The committed JSON is what the code makes, and Grafana can read it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from dashboards import __main__ as program
from dashboards.catalogue import BOARDS
from dashboards.grafana import render
from dashboards.queries import variables

UIDS = ("weir-overview", "weir-latency", "weir-tokens", "weir-cost", "weir-upstreams", "weir-pods")
DOCUMENTS = {board.uid: json.loads(render(board, BOARDS)) for board in BOARDS}
every_dashboard = pytest.mark.parametrize("document", DOCUMENTS.values(), ids=DOCUMENTS)


def shown(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in document["panels"] if panel["type"] != "row"]


def test_the_committed_files_are_as_the_code_is() -> None:
    assert program.stale() == [], "run `python -m dashboards`"


def test_a_changed_missing_or_foreign_file_is_noticed(tmp_path: Path) -> None:
    program.write(tmp_path)
    assert program.stale(tmp_path) == []
    (tmp_path / "cost.json").write_text((tmp_path / "cost.json").read_text().replace("Cost", "Price"))
    (tmp_path / "pods.json").unlink()
    (tmp_path / "other.json").write_text("{}")
    assert program.stale(tmp_path) == ["cost.json", "other.json", "pods.json"]
    program.write(tmp_path)
    assert program.stale(tmp_path) == []


def test_check_says_what_is_stale_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(program, "FOLDER", tmp_path)
    monkeypatch.setattr(program.stale, "__defaults__", (tmp_path,))
    monkeypatch.setattr(program.write, "__defaults__", (tmp_path,))
    monkeypatch.setattr(sys, "argv", ["dashboards", "--check"])
    assert program.main() == 1
    assert capsys.readouterr().err.count("is not as the code is") == 6
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(sys, "argv", ["dashboards"])
    assert program.main() == 0
    monkeypatch.setattr(sys, "argv", ["dashboards", "--check"])
    assert program.main() == 0


def test_uids_are_fixed_because_alerts_and_bookmarks_name_them() -> None:
    assert tuple(DOCUMENTS) == UIDS
    assert sorted(program.files()) == sorted(f"{uid.removeprefix('weir-')}.json" for uid in UIDS)
    for uid, document in DOCUMENTS.items():
        assert document["uid"] == uid


@every_dashboard
def test_nobody_edits_a_dashboard_that_is_made_anew(document: dict[str, Any]) -> None:
    assert document["editable"] is False
    assert document["tags"] == ["weir"]
    assert "id" not in document


@every_dashboard
def test_each_leads_to_all_and_keeps_time_and_choices(document: dict[str, Any]) -> None:
    links = document["links"]
    assert [link["url"] for link in links] == [f"/d/{uid}" for uid in UIDS]
    assert all(link["includeVars"] and link["keepTime"] for link in links)
    assert "inControlsMenu" not in json.dumps(document), "in a menu nobody sees them"


@every_dashboard
def test_choices_are_the_same_everywhere(document: dict[str, Any]) -> None:
    found = {variable["name"]: variable for variable in document["templating"]["list"]}
    assert list(found) == [
        *("datasource", "loki", "tempo"),
        *("cluster", "namespace", "job", "provider", "model", "tenant"),
    ]
    for name, kind in (("datasource", "prometheus"), ("loki", "loki"), ("tempo", "tempo")):
        assert (found[name]["type"], found[name]["query"]) == ("datasource", kind)
    for name in list(found)[3:]:
        one = found[name]
        assert (one["multi"], one["includeAll"]) == (True, True)
        assert one.get("allValue") == (None if name == "job" else ".*")
        assert one["current"]["value"] == ["$__all"]
        assert one["datasource"]["uid"] == "${datasource}"
        assert one["query"]["query"].startswith("label_values(")


@every_dashboard
def test_a_choice_is_shown_where_a_panel_follows_it(document: dict[str, Any]) -> None:
    text = json.dumps(document["panels"])
    used = {name for name in variables(text) if not name.startswith("__")}
    visible = {v["name"] for v in document["templating"]["list"] if v["hide"] == 0}
    assert visible == used


@every_dashboard
def test_every_query_goes_to_the_chosen_datasource(document: dict[str, Any]) -> None:
    for panel in shown(document):
        for target in panel["targets"]:
            kind = "loki" if panel["type"] == "logs" else "prometheus"
            uid = "${loki}" if kind == "loki" else "${datasource}"
            assert target["datasource"] == panel["datasource"] == {"type": kind, "uid": uid}


@every_dashboard
def test_every_panel_tells_its_unit_meaning_and_why_it_may_be_empty(document: dict[str, Any]) -> None:
    for panel in shown(document):
        defaults = panel["fieldConfig"]["defaults"]
        assert defaults["unit"], panel["title"]
        assert len(defaults["noValue"]) > 7, panel["title"]
        assert defaults["thresholds"]["steps"][0]["value"] is None
        for word in ("**Good:**", "**If not:**"):
            assert word in panel["description"], panel["title"]


@every_dashboard
def test_deploys_and_changed_configurations_are_marked(document: dict[str, Any]) -> None:
    deploys, configuration = document["annotations"]["list"]
    assert "unless count by (version)" in deploys["expr"]
    assert "offset 5m" in deploys["expr"]
    assert "weir_config_reloads_total" in configuration["expr"]
    for note in (deploys, configuration):
        assert note["enable"]
        assert not note["hide"]
        assert note["target"]["expr"] == note["expr"]


def test_times_have_exemplars_and_lead_to_traces_and_lines() -> None:
    panels = [
        panel for panel in shown(DOCUMENTS["weir-latency"]) if panel["type"] in ("timeseries", "heatmap")
    ]
    slow = [p for p in panels if any("gen_ai_" in t["expr"] and "_bucket" in t["expr"] for t in p["targets"])]
    assert len(slow) >= 9
    for panel in slow:
        assert all(target["exemplar"] for target in panel["targets"]), panel["title"]
        urls = [link["url"] for link in panel["fieldConfig"]["defaults"]["links"]]
        assert any("${tempo}" in url for url in urls)
        assert any("${loki}" in url for url in urls)


def test_links_into_explore_are_json_when_their_variables_are_filled() -> None:
    from urllib.parse import parse_qs, urlsplit

    urls = {
        link["url"]
        for document in DOCUMENTS.values()
        for panel in shown(document)
        for link in panel["fieldConfig"]["defaults"].get("links", [])
    }
    assert urls
    for url in urls:
        panes = json.loads(parse_qs(urlsplit(url).query)["panes"][0])
        (query,) = panes["weir"]["queries"]
        assert query["datasource"]["uid"] in ("${tempo}", "${loki}")
        assert panes["weir"]["range"] == {"from": "${__from}", "to": "${__to}"}


def test_tables_name_their_columns() -> None:
    tables = [p for document in DOCUMENTS.values() for p in shown(document) if p["type"] == "table"]
    assert tables
    for panel in tables:
        organize = panel["transformations"][-1]["options"]
        values = (
            ["Value"]
            if len(panel["targets"]) == 1
            else [f"Value #{target['refId']}" for target in panel["targets"]]
        )
        named = organize["renameByName"].keys() | organize["excludeByName"].keys()
        assert set(values) <= named, panel["title"]
        assert all(target["format"] == "table" and target["instant"] for target in panel["targets"])
        assert len(panel["transformations"]) == (1 if len(values) == 1 else 2)


def test_one_file_fits_into_a_configmap_and_its_note_of_what_was_applied() -> None:
    """A ConfigMap holds 1 MiB; `kubectl apply` notes it once more, in 256 KiB."""
    for name, text in program.files().items():
        assert len(text.encode()) < 200 * 1024, name


def test_the_docs_name_each_dashboard_and_its_address() -> None:
    page = (program.FOLDER.parents[3] / "docs/dashboards.md").read_text()
    for board in BOARDS:
        name = board.title.removeprefix("Weir / ")
        assert f"| {name} | `/d/{board.uid}` |" in page
