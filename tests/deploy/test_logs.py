"""What brings the log elsewhere, held against its schema: Alloy to Loki, Filebeat to Elasticsearch."""

from __future__ import annotations

import json
import re
from datetime import datetime
from typing import Any, Final

import httpx2
import pytest
import yaml

from docs import log_schema
from tests.deploy import alloy
from tests.deploy.alloy import Block, Reference
from tests.log_lines import line_of
from tests.running import ROOT, WeirProcess

PARTS: Final[dict[str, Any]] = log_schema.schema()["$defs"]
FIELDS: Final[dict[str, Any]] = {**PARTS["EventLine"]["properties"], **PARTS["RequestLine"]["properties"]}
FILEBEAT: Final[dict[str, Any]] = yaml.safe_load((ROOT / "deploy/filebeat/filebeat.yml").read_text())
TEMPLATE: Final[dict[str, Any]] = json.loads((ROOT / "deploy/filebeat/index-template.json").read_text())
TRACE: Final = "4bf92f3577b34da6a3ce929d0e0e4736"
RFC3339_NANO: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?(Z|[+-]\d\d:\d\d)")
"""As Go reads it: Alloy's, and Filebeat's layout."""
MAPPED: Final[dict[str, Any]] = TEMPLATE["template"]["mappings"]["properties"]


def kind_of(field: dict[str, Any]) -> dict[str, Any]:
    """A field's own schema, wherever it stands."""
    return PARTS[field["$ref"].rpartition("/")[2]] if "$ref" in field else field


# -- Alloy ---------------------------------------------------------------------------------------


def configurations() -> dict[str, Block]:
    values = yaml.safe_load((ROOT / "deploy/alloy/values.yaml").read_text())
    return {
        "compose": alloy.parse((ROOT / "deploy/compose/alloy/config.alloy").read_text()),
        "kubernetes": alloy.parse(values["alloy"]["configMap"]["content"]),
    }


ALLOYS: Final = configurations()


@pytest.fixture(params=ALLOYS)
def configuration(request: pytest.FixtureRequest) -> Block:
    return ALLOYS[request.param]


def values_of(blocks: list[Block], name: str) -> set[str]:
    return {key for block in blocks for key in block.values[name]}


def test_its_components_know_each_other(configuration: Block) -> None:
    components = {f"{block.name}.{block.label}": block for block in configuration.blocks}
    assert len(components) == len(configuration.blocks)
    used = {
        ".".join(name.split(".")[:-1])
        for name in configuration.references()
        if name.startswith(("loki.", "discovery."))
    }
    assert used <= set(components)
    # A source: nothing takes its output by name.
    (source,) = set(components) - used
    assert source.startswith("loki.source.")
    (write,) = (block for block in configuration.blocks if block.name == "loki.write")
    assert [endpoint.values["url"] for endpoint in write.all("endpoint")] == [
        "http://loki:3100/loki/api/v1/push"
    ]


def test_what_it_reads_of_a_line_is_in_the_schema(configuration: Block) -> None:
    (stage,) = configuration.all("stage.json")
    for name, path in stage.values["expressions"].items():
        root, *rest = (path or name).split(".")
        assert root in FIELDS, name
        at = kind_of(FIELDS[root])
        for part in rest:
            at = kind_of(at["properties"][part])


def test_labels_are_bounded(configuration: Block) -> None:
    (stage,) = configuration.all("stage.labels")
    (read,) = configuration.all("stage.json")
    assert set(stage.values["values"]) <= set(read.values["expressions"])
    for name in stage.values["values"]:
        assert len(kind_of(FIELDS[name])["enum"]) <= 10
    made = {rule.values["target_label"] for rule in configuration.all("rule")}
    dropped = {name for block in configuration.all("stage.label_drop") for name in block.values["values"]}
    assert made - dropped == {"service_name", "namespace"}


def test_what_is_metadata_is_read_before(configuration: Block) -> None:
    (read,) = configuration.all("stage.json")
    made = {rule.values["target_label"] for rule in configuration.all("rule")}
    metadata = values_of(configuration.all("stage.structured_metadata"), "values")
    assert {"request_id", "trace_id", "span_id"} <= metadata <= set(read.values["expressions"]) | made


def test_the_time_is_the_lines_own(configuration: Block) -> None:
    (stage,) = configuration.all("stage.timestamp")
    assert stage.values == {"source": "timestamp", "format": "RFC3339Nano"}
    assert FIELDS["timestamp"]["format"] == "date-time"


def test_only_lines_of_weir_are_read_as_such(configuration: Block) -> None:
    (match,) = configuration.all("stage.match")
    assert {"stage.json", "stage.timestamp", "stage.labels"} <= {block.name for block in match.blocks}
    assert re.fullmatch(r'\{service_name=~?"weir(\|weir-worker)?"\}', match.values["selector"])


@pytest.fixture(scope="module")
def real_lines() -> list[dict[str, Any]]:
    """All that a process said in which one request was answered."""
    with WeirProcess(SIMULATOR_TOKENS_PER_SECOND="10000") as weir:
        weir.wait_until_ready()
        body = {"model": "simulator", "messages": [{"role": "user", "content": "Hello!"}]}
        headers = {"X-Request-ID": "mine", "traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"}
        httpx2.post(f"{weir.url}/v1/chat/completions", json=body, headers=headers, timeout=20)
        weir.terminate()
        assert weir.wait() == 0
    return list(map(line_of, weir.lines))


def test_what_it_makes_of_real_lines(configuration: Block, real_lines: list[dict[str, Any]]) -> None:
    (read,) = configuration.all("stage.json")
    (labels,) = configuration.all("stage.labels")
    (time,) = configuration.all("stage.timestamp")
    metadata = values_of(configuration.all("stage.structured_metadata"), "values")
    for line in real_lines:
        found = {name: line.get(path or name) for name, path in read.values["expressions"].items()}
        assert RFC3339_NANO.fullmatch(str(found[time.values["source"]]))
        labelled = {name: found[name] for name in labels.values["values"] if found[name]}
        told = {name: found[name] for name in metadata if found.get(name)}
        if line["event"] == "request":
            assert labelled == {"level": "info", "outcome": "success"}
            assert told == {"request_id": "mine", "trace_id": TRACE}
        else:
            assert set(labelled) == {"level"}
            assert told == {}
    assert {"starting", "request", "stopped"} <= {line["event"] for line in real_lines}


@pytest.mark.parametrize(
    "text",
    ['a "b" {', "a = ", 'a { b = "c" b = "d" }', "a { } }", "a = [1 2]", "a = 'b'", "a { b = { c 1 } }"],
)
def test_the_reader_of_these_tests_refuses_what_is_none(text: str) -> None:
    with pytest.raises(ValueError):
        alloy.parse(text)


def test_the_reader_of_these_tests_reads() -> None:
    whole = alloy.parse(
        'a.b "c" { // words\n  d = [e.f.g, "h\\"}"]\n  i { j = { k = "", l = m("n") } }\n}\no = 1 + p'
    )
    (block,) = whole.blocks
    assert (block.name, block.label) == ("a.b", "c")
    assert block.values == {"d": [Reference("e.f.g"), 'h"}']}
    assert whole.all("i")[0].values == {"j": {"k": "", "l": Reference("m", ("n",))}}
    assert whole.references() == {"e.f.g", "m", "p"}


# -- Filebeat ------------------------------------------------------------------------------------


def processors(name: str) -> list[dict[str, Any]]:
    return [processor[name] for processor in FILEBEAT["processors"] if name in processor]


def renamed() -> dict[str, str]:
    """Weir's name of a field -> the Elastic Common Schema's."""
    (rename,) = processors("rename")
    return {pair["from"].removeprefix("weir."): pair["to"] for pair in rename["fields"]}


def mapping_of(path: str) -> dict[str, Any]:
    """The mapping of a field by its path."""
    at: dict[str, Any] = {"properties": MAPPED}
    for part in path.split("."):
        at = at["properties"][part]
    return at


def test_lines_are_read_as_json_below_one_name() -> None:
    (provider,) = FILEBEAT["filebeat.autodiscover"]["providers"]
    (template,) = provider["templates"]
    (source,) = template["config"]
    assert source["type"] == "filestream"
    container, ndjson = source["parsers"]
    assert "container" in container
    assert ndjson["ndjson"]["target"] == "weir"
    chart = (ROOT / "helm/weir/templates/_helpers.tpl").read_text()
    labels = re.findall(r"kubernetes\.labels\.(\S+?):", json.dumps(template["condition"]).replace('"', ""))
    for label in labels:
        assert f"{label.replace('app_kubernetes_io', 'app.kubernetes.io')}:" in chart


def test_what_is_renamed_is_in_the_schema_and_mapped() -> None:
    for name, path in renamed().items():
        root, *rest = name.split(".")
        at = kind_of(FIELDS[root])
        for part in rest:
            at = kind_of(at["properties"][part])
        assert mapping_of(path)["type"] in types_of(at), name


def types_of(field: dict[str, Any]) -> set[str]:
    if field.get("format") == "date-time":
        return {"date"}
    if "enum" in field:
        return {"boolean"} if field["enum"] == [True] else {"keyword"}
    return {
        "integer": {"long"},
        "number": {"double"},
        "boolean": {"boolean"},
        "string": {"keyword", "text"},
    }[field["type"]]


@pytest.mark.parametrize("name", sorted(set(FIELDS) - {"timestamp", "exception", "stack"}))
def test_each_field_has_a_type_in_elasticsearch(name: str) -> None:
    mapping = mapping_of(renamed().get(name, f"weir.{name}"))
    assert mapping["type"] in types_of(kind_of(FIELDS[name]))
    # A longer word than Lucene takes would cost the whole line, not the word alone.
    assert (
        mapping["type"] != "keyword"
        or "enum" in kind_of(FIELDS[name])
        or mapping.get("ignore_above", 0)
        or (name in ("trace_id", "span_id"))
    )


def test_no_type_is_for_a_field_that_is_none() -> None:
    assert set(MAPPED["weir"]["properties"]) == set(FIELDS) - set(renamed()) - {"timestamp"}


def test_fields_of_other_events_make_no_mapping_of_their_own() -> None:
    """`upstreams` is a map in one event and a number in another: the second would be refused."""
    assert MAPPED["weir"]["dynamic"] is False
    exception = MAPPED["weir"]["properties"]["exception"]["properties"]
    assert {name: kind["enabled"] for name, kind in exception.items()} == {"frames": False, "chain": False}
    lists = {n for n, f in PARTS["ExceptionInfo"]["properties"].items() if f["type"] == "array"}
    assert set(exception) == lists


def test_the_time_of_a_line_is_that_of_the_document() -> None:
    (time,) = processors("timestamp")
    assert time["field"] == "weir.timestamp"
    assert [datetime.fromisoformat(text).year for text in time["test"]] == [2026]
    assert MAPPED["@timestamp"] == {"type": "date"}


def test_the_index_is_the_templates() -> None:
    output = FILEBEAT["output.elasticsearch"]
    (pattern,) = TEMPLATE["index_patterns"]
    assert re.fullmatch(pattern.replace("*", ".*"), output["index"])
    assert TEMPLATE["priority"] > 100, "Elasticsearch's own template for logs-*-* has 100"
    assert FILEBEAT["setup.template.enabled"] is False


def test_there_is_no_address_and_no_key_in_it() -> None:
    output = FILEBEAT["output.elasticsearch"]
    assert output["hosts"] == ["${ELASTICSEARCH_URL}"]
    assert output["api_key"] == "${ELASTICSEARCH_API_KEY}"
