"""The rules of the chart: they are rules, each alert is tried and has its runbook, all read what there is."""

from __future__ import annotations

import copy
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from dashboards.catalogue import panels
from dashboards.queries import fill
from service.domain import Outcome
from service.telemetry import FIRST_TOKEN_BUCKETS, Metrics
from service.worker.metrics import SinkMetrics
from tests.programs import ROOT, need
from tests.promql import faults, reads
from tests.rules.files import (
    ALERTS,
    CASES,
    FIRING,
    RECORDS,
    RULES,
    RUNBOOKS,
    Rule,
    cases,
    edges_of,
    next_edge,
    promtool,
    rules,
)

OF_OTHERS = {
    "up": "Prometheus'",
    "kube_pod_status_ready": "kube-state-metrics'",
    "kube_pod_container_info": "kube-state-metrics'",
    "kube_pod_deletion_timestamp": "kube-state-metrics'",
    "kube_pod_status_phase": "kube-state-metrics'",
}
WITHOUT_A_NUMBER = {
    "WeirMetricsAbsent": "of what is not there there is none",
    "WeirPodsNotReady": "one alert for each pod, and the value is always 0",
    "WeirSinkUnavailable": "it is 0, or the worker is gone",
}
SLO_PAGE = (ROOT / "docs/slo.md").read_text()
READ_AS_THEY_ARE = {
    "WeirLedgerWritesDropped": ["weir_state_writes_dropped_total"],
}

each_alert = pytest.mark.parametrize("name", sorted(ALERTS))
each_rule = pytest.mark.parametrize(
    "rule", rules(), ids=[rule.get("alert") or rule["record"] for rule in rules()]
)


def test_promtool_takes_the_rules() -> None:
    promtool("check", "rules", *RULES)


@pytest.mark.parametrize("path", CASES, ids=[path.stem for path in CASES])
def test_rules_do_what_their_cases_say(path: Path) -> None:
    promtool("test", "rules", path)


@each_alert
def test_each_alert_has_a_case_in_which_it_fires_and_one_in_which_it_is_silent(name: str) -> None:
    expected = [
        bool(expectation["exp_samples"])
        for _, _, expectation in cases()
        if name in FIRING.findall(expectation["expr"]) and 'alertstate="firing"' in expectation["expr"]
    ]
    assert set(expected) == {True, False}


@each_rule
def test_the_expression_reads_counters_by_their_rates_and_nothing_else(rule: Rule) -> None:
    # An alias is the same counter under another name.
    alias = rule["expr"].startswith("label_replace(")
    raw = (
        [read.name for read in reads(rule["expr"])] if alias else READ_AS_THEY_ARE.get(rule.get("alert", ""))
    )
    assert faults(rule["expr"], raw or ()) == []


def live() -> dict[str, frozenset[str]]:
    """The names of all series of the service and of the worker, with the labels that they may have."""
    labels: dict[str, frozenset[str]] = {}
    for build in (lambda r: Metrics(r, "0"), SinkMetrics):
        registry = CollectorRegistry()
        build(registry)
        for collector, names in registry._collector_to_names.items():
            own = frozenset(getattr(collector, "_labelnames", ())) | {"le"}
            labels |= dict.fromkeys(names, own)
    return labels


LIVE = live()


@each_rule
def test_the_expression_reads_series_that_there_are(rule: Rule) -> None:
    target = {"cluster", "namespace", "job", "pod", "instance", "__name__"}
    for read in reads(rule["expr"]):
        if read.name in RECORDS or read.name in OF_OTHERS:
            continue
        assert read.name in LIVE, read.name
        assert set(read.matchers) <= LIVE[read.name], read.name
        if read.labels is not None:
            assert read.labels - target <= LIVE[read.name], read.name


@each_rule
def test_the_expression_keeps_apart_what_is_in_different_places(rule: Rule) -> None:
    place, found = {"cluster", "namespace"}, list(reads(rule["expr"]))
    for read in found:
        # Kubernetes knows pods and no jobs.
        own = place if {*OF_OTHERS} & {other.name for other in found} else place | {"job"}
        assert read.labels is None or own <= read.labels, read.name
    for joined in re.findall(r"\bon \(([^)]*)\)", rule["expr"]):
        assert place <= set(joined.split(", ")), joined


def test_the_threshold_of_first_tokens_is_an_edge_of_a_bucket() -> None:
    """And the one that callers wait before they leave in vain, the next edge of other buckets."""
    edges = edges_of({str(number): rule for number, rule in enumerate(rules())})
    (first_token,) = edges.pop("gen_ai_server_time_to_first_token_seconds_bucket")
    (waited,) = edges.pop("gen_ai_server_request_duration_seconds_bucket")
    assert not edges
    assert first_token in {str(edge) for edge in FIRST_TOKEN_BUCKETS}
    assert waited == next_edge(float(first_token))


def test_the_three_objectives_are_measured_the_same_way_over_the_same_windows() -> None:
    def of(sli: str) -> set[str]:
        return {name.replace(sli, "SLI") for name in RECORDS if name.startswith(f"weir:{sli}:")}

    windows = ("5m", "30m", "1h", "2h", "6h", "1d", "3d", "30d")
    assert {f"weir:SLI:error_ratio_rate{window}" for window in windows} <= of("streams")
    assert of("availability") == of("streams") == of("ttft") - {"weir:SLI:objective_seconds"}
    written = {
        sli: [
            str(rule["expr"]).replace(f":{sli}:", ":SLI:")
            for rule in rules()
            if str(rule.get("record", "")).startswith(f"weir:{sli}:") and "_rate" not in str(rule["record"])
        ]
        for sli in ("availability", "streams")
    }
    assert written["availability"] == written["streams"]


def test_the_three_objectives_alert_the_same_way() -> None:
    for burn in ("BurnFast", "BurnSlow"):
        made = {
            ALERTS[f"Weir{name}{burn}"]["expr"].replace(f":{name.lower()}:", ":SLI:")
            for name in ("Availability", "Ttft", "Streams")
        }
        assert len(made) == 1


def test_each_record_that_is_read_is_recorded_and_each_threshold_is_read() -> None:
    read = {read.name for rule in rules() for read in reads(rule["expr"]) if ":" in read.name}
    assert read <= RECORDS
    assert {name for name in RECORDS if name.endswith(":threshold")} <= read


def test_each_record_ends_in_an_alert_or_a_panel_or_is_said_to_be_spare() -> None:
    asked = [rule["expr"] for rule in ALERTS.values()]
    asked += [fill(t.expr) for panel in panels() for t in panel.targets if t.source == "prometheus"]
    used: set[str] = set()
    while asked:
        new = {read.name for read in reads(asked.pop())} & RECORDS - used
        used |= new
        asked += [rule["expr"] for rule in rules() if rule.get("record") in new]
    (spare,) = re.findall(r"^Spare(?:.+\n)+", (ROOT / "docs/alerts.md").read_text(), re.MULTILINE)
    named = set(re.findall(r"`([\w:]+)`", spare))
    assert named == {re.sub(r"_(bucket|sum|count)$", "", name) for name in RECORDS - used}


# -- whose fault it is ---------------------------------------------------------------------------


def outcomes_of(record: str) -> list[frozenset[str]]:
    """Those that a recorded rate counts, one set for each window of it."""
    every = frozenset(outcome.value for outcome in Outcome)
    found = []
    for rule in rules():
        if str(rule.get("record", "")).startswith(record):
            ((operator, names),) = re.findall(r'outcome(=~|!~|!=|=)"([^"]+)"', rule["expr"])
            told = frozenset(names.split("|"))
            assert told <= every
            found.append(told if operator in ("=~", "=") else every - told)
    return found


def test_each_outcome_is_good_or_bad_or_not_counted_as_the_docs_say() -> None:
    table = re.findall(r"^\| (`.+`) \| (good|bad|not counted) \|", SLO_PAGE, re.MULTILINE)
    said = {name: verdict for names, verdict in table for name in re.findall(r"`(\w+)`", names)}
    assert set(said) == {outcome.value for outcome in Outcome}
    valid, bad = (outcomes_of(f"weir:availability:{part}_rate") for part in ("valid", "bad"))
    assert len(valid) == len(bad) == 3
    assert set(valid) == {frozenset(name for name, verdict in said.items() if verdict != "not counted")}
    assert set(bad) == {frozenset(name for name, verdict in said.items() if verdict == "bad")}


def test_a_stream_is_good_where_it_ended_as_it_should() -> None:
    valid, bad = (outcomes_of(f"weir:streams:{part}_rate") for part in ("valid", "bad"))
    assert len(valid) == len(bad) == 3
    assert {v - b for v, b in zip(valid, bad, strict=True)} == {frozenset({"success", "client_error"})}
    left = {outcome.value for outcome in Outcome} - valid[0]
    assert left == {"client_disconnected"}


# -- what people read ----------------------------------------------------------------------------


@each_alert
def test_each_alert_says_what_to_do(name: str) -> None:
    rule = ALERTS[name]
    assert name.startswith("Weir")
    assert rule["labels"]["severity"] in ("page", "ticket")
    notes = rule["annotations"]
    assert set(notes) == {"summary", "description", "dashboard", "runbook_url"}
    assert ("$value" in notes["description"]) is (name not in WITHOUT_A_NUMBER)
    assert not re.search(r"\$value(?! \| humanize)", notes["description"]), "numbers for people"
    assert notes["summary"][0].isupper()
    assert not notes["summary"].endswith(".")
    assert notes["description"].endswith(".")
    assert notes["runbook_url"] == f"https://github.com/weir-llm/weir/blob/main/docs/runbooks/{name}.md"


@each_alert
def test_each_alert_leads_to_a_dashboard_that_is_there(name: str) -> None:
    found = re.match(r"/d/(weir-[a-z]+)\?var-namespace=", ALERTS[name]["annotations"]["dashboard"])
    assert found
    boards = {path.stem: path for path in (ROOT / "helm/weir/files/dashboards").glob("*.json")}
    known = {
        uid for path in boards.values() for uid in re.findall(r'"uid": "(weir-[a-z]+)"', path.read_text())
    }
    assert not boards or found[1] in known


HEADINGS = ["What it means", "How to see", "What to do", "How to know that it is over"]


@each_alert
def test_each_alert_has_a_runbook_with_its_four_parts(name: str) -> None:
    page = (RUNBOOKS / f"{name}.md").read_text()
    assert page.startswith(f"# {name}\n")
    parts = re.split(r"^## (.+)$", page, flags=re.MULTILINE)
    assert parts[1::2] == HEADINGS
    assert all(len(part.split()) >= 6 for part in parts[2::2]), "each says something"
    see, do = parts[4], parts[6]
    assert re.search(r"^    .*[a-z]", see, re.MULTILINE), "something to type"
    assert re.search(r"^1\. ", do, re.MULTILINE), "in order"


def test_each_runbook_has_its_alert() -> None:
    assert {path.stem for path in RUNBOOKS.glob("*.md")} == set(ALERTS)


def indented(page: str) -> list[str]:
    """The blocks of a page that one types."""
    blocks = re.findall(r"(?:^    .*\n?)+", page, re.MULTILINE)
    return [re.sub(r"^    ", "", block, flags=re.MULTILINE).strip() for block in blocks]


QUERIES = [
    (path.stem, query)
    for path in sorted(RUNBOOKS.glob("*.md"))
    for query in indented(path.read_text())
    if not re.match(r"(kubectl|helm|for|curl|python|redis-cli|docker|\{)", query)
]


@pytest.mark.parametrize(("name", "query"), QUERIES)
def test_the_queries_of_the_runbooks_are_such(name: str, query: str) -> None:
    raw = READ_AS_THEY_ARE.get(name, ())
    assert faults(query, raw) == []
    for read in reads(query):
        known = read.name in RECORDS or read.name in OF_OTHERS or read.name in LIVE
        assert known or read.name.startswith(("kube_", "container_", "process_", "ALERTS")), read.name


def commands(page: str) -> Iterator[str]:
    """What kubectl and helm are asked for, in blocks and within sentences."""
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", page)]
    for typed in (*"\n".join(indented(page)).splitlines(), *spans):
        for part in re.split(r"[|;]|&&|\$\(", typed):
            yield from re.findall(r"\b(?:kubectl|helm) .*", part)


@each_alert
def test_the_commands_of_the_runbooks_look_into_the_namespace_and_see_every_line(name: str) -> None:
    placeholders = set(re.findall(r"^\| `([A-Z]+)` \|", (ROOT / "docs/alerts.md").read_text(), re.MULTILINE))
    for command in commands((RUNBOOKS / f"{name}.md").read_text()):
        # What follows is for the pod.
        own = command.partition(" -- ")[0].split()
        assert "-n NAMESPACE" in " ".join(own), command
        assert {word for word in own if word.isupper()} <= placeholders, command
        if own[1] == "logs":
            # With a selector it is ten lines a pod otherwise.
            assert any(word.startswith("--tail=") for word in own), command
            # Of the pods of a selector, the first that has not ended once would end it.
            assert not {"-l", "--previous"} <= set(own), command


@each_alert
def test_what_is_typed_into_a_shell_is_such(name: str) -> None:
    page = (RUNBOOKS / f"{name}.md").read_text()
    typed = [block for block in indented(page) if block.startswith(("kubectl", "helm", "for"))]
    subprocess.run(["sh", "-n"], input="\n".join(typed), text=True, check=True, timeout=30)


def notes_of(path: Path, folder: Path) -> str:
    """What promtool says where each alert that fires is expected not to: its labels and annotations."""
    document: dict[str, Any] = yaml.safe_load(path.read_text())
    document["rule_files"] = [str((path.parent / name).resolve()) for name in document["rule_files"]]
    kept = []
    for test in document["tests"]:
        asked = copy.deepcopy(test)
        told = [
            {"eval_time": e["eval_time"], "alertname": FIRING.findall(e["expr"])[0], "exp_alerts": []}
            for e in asked.pop("promql_expr_test")
            if e["exp_samples"] and FIRING.search(e["expr"])
        ]
        if told:
            kept.append(asked | {"alert_rule_test": told})
    document["tests"] = kept
    changed = folder / path.name
    changed.write_text(yaml.safe_dump(document, sort_keys=False))
    done = subprocess.run(
        [need("promtool"), "test", "rules", str(changed)], capture_output=True, text=True, timeout=240
    )
    assert done.returncode != 0
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    "path", [p for p in CASES if p.stem in ("alerts", "burn", "spend")], ids=lambda p: p.stem
)
def test_annotations_are_sentences_with_numbers_when_alerts_fire(path: Path, tmp_path: Path) -> None:
    said = notes_of(path, tmp_path)
    for wrong in ("<error", "no value", "<no", "NaN", "%!", "{{"):
        assert wrong not in said
    descriptions = re.findall(r'alertname="(\w+)".*?description="(.*?)(?<!\\)"', said, re.DOTALL)
    assert descriptions
    for name, text in descriptions:
        if name not in WITHOUT_A_NUMBER:
            assert re.search(r"\d", text), name
        assert " in ." not in text
        assert "  " not in text
