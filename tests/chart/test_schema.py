"""The values' schema: it knows each value and no other, and says what is wrong with the rest."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from pydantic import ValidationError

from docs.values_schema import OF_THE_CHART
from service.config import FileConfig, Settings
from tests.chart.rendering import CHART, Refused, refusal, render, template
from tests.programs import HELMS, ROOT, need

SCHEMA = json.loads((CHART / "values.schema.json").read_text())
VALUES = yaml.safe_load((CHART / "values.yaml").read_text())

# The schema's top has it for parent charts alone.
ONLY_IN_SCHEMA = {"enabled"}

# Settings that have no place in values, which anybody may read.
SECRETS = {
    "OTEL_EXPORTER_OTLP_HEADERS",
    "REDIS_PASSWORD",
    "REDIS_SENTINEL_PASSWORD",
    "LEDGER_POSTGRES_URL",
    "LEDGER_POSTGRES_PASSWORD",
}


def resolved(node: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in node:
        found: Any = SCHEMA
        for part in node["$ref"].removeprefix("#/").split("/"):
            found = found[part]
        node = found
    return node


def foreign(node: dict[str, Any]) -> bool:
    """Whether it is Kubernetes', or made from the code: it knows more than values.yaml shows."""
    reference: str = node.get("$ref", "")
    return reference.startswith(
        ("#/definitions/kubernetes/", "#/definitions/config", "#/definitions/settings")
    )


def levels(node: dict[str, Any], values: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any], Any]]:
    """Each object of ours: its path, its schema, its default values."""
    if foreign(node):
        return
    node = resolved(node)
    if "properties" in node:
        yield path, node, values
        for name, child in node["properties"].items():
            if isinstance(values.get(name), dict):
                yield from levels(child, values[name], f"{path}.{name}")


LEVELS = list(levels(SCHEMA, VALUES))


def test_the_schema_is_one() -> None:
    jsonschema.Draft7Validator.check_schema(SCHEMA)


def test_the_default_values_are_valid() -> None:
    jsonschema.Draft7Validator(SCHEMA).validate(VALUES)


@pytest.mark.parametrize(("path", "node", "values"), LEVELS, ids=[path or "top" for path, _, _ in LEVELS])
def test_schema_and_values_have_the_same_names(path: str, node: dict[str, Any], values: Any) -> None:
    assert set(node["properties"]) - (ONLY_IN_SCHEMA if not path else set()) == set(values)


def test_every_level_is_closed_but_global() -> None:
    """A parent chart's other charts read `global` too."""
    still_open = [path for path, node, _ in LEVELS if node.get("additionalProperties") is not False]
    assert still_open == [".global"]


def test_what_is_made_from_the_code_is_closed_too() -> None:
    for name in ("config", "settings"):
        assert SCHEMA["definitions"][name]["additionalProperties"] is False
    for node in SCHEMA["definitions"]["config"]["definitions"].values():
        assert node["type"] == "string" or node["additionalProperties"] is False


def test_every_definition_is_used_and_each_use_is_defined() -> None:
    text = json.dumps(SCHEMA)
    used = set(re.findall(r'"\$ref": "(#/[^"]+)"', text))
    for reference in used:
        resolved({"$ref": reference})
    defined = {f"#/definitions/{name}" for name in SCHEMA["definitions"]} - {"#/definitions/kubernetes"}
    defined |= {f"#/definitions/kubernetes/definitions/{n}" for n in resolved_kubernetes()}
    assert defined <= used


def resolved_kubernetes() -> dict[str, Any]:
    definitions: dict[str, Any] = SCHEMA["definitions"]["kubernetes"]["definitions"]
    return definitions


def test_settings_are_weirs_own_but_for_secrets_and_what_the_chart_sets() -> None:
    known = set(SCHEMA["definitions"]["settings"]["properties"])
    refused = SECRETS | OF_THE_CHART
    assert known == {name.upper() for name in Settings.model_fields} - refused


def test_the_readme_names_the_settings_that_are_refused() -> None:
    page = (CHART / "README.md.gotmpl").read_text()
    for name in SECRETS | OF_THE_CHART:
        assert f"`{name}`" in page


def test_the_seconds_of_the_end_are_within_what_weir_takes() -> None:
    known = Settings.model_json_schema()["properties"]
    seconds = SCHEMA["properties"]["shutdown"]["properties"]
    assert seconds["longestStreamSeconds"]["maximum"] == known["drain_timeout"]["maximum"]
    # Before Kubernetes 1.30 Weir waits both.
    both = seconds["preStopSeconds"]["maximum"] + seconds["drainDelaySeconds"]["maximum"]
    assert both == known["drain_delay"]["maximum"]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"replicas": 3}, "additional properties 'replicas' not allowed"),
    ({"image": {"digst": ""}}, "at '/image': additional properties 'digst' not allowed"),
    (
        {"redis": {"embedded": {"persistence": {"enable": True}}}},
        "additional properties 'enable' not allowed",
    ),
    ({"settings": {"RATE_LIMIT": 1}}, "at '/settings': additional properties 'RATE_LIMIT' not allowed"),
    ({"settings": {"rate_limit_requests": 1}}, "additional properties 'rate_limit_requests' not allowed"),
    ({"settings": {"RATE_LIMIT_REQUESTS": 0}}, "at '/settings/RATE_LIMIT_REQUESTS': minimum: got 0, want 1"),
    (
        {"settings": {"OPENAI_TEMPERATURE": 2.5}},
        "at '/settings/OPENAI_TEMPERATURE': maximum: got 2.5, want 2",
    ),
    ({"settings": {"RATE_LIMIT_REQUESTS": "many"}}, "at '/settings/RATE_LIMIT_REQUESTS': got string"),
    ({"settings": {"LOG_LEVEL": "loud"}}, "at '/settings/LOG_LEVEL': value must be one of 'debug', 'info'"),
    (
        {"settings": {"OTEL_EXPORTER_OTLP_ENDPOINT": "collector:4318"}},
        "'/settings/OTEL_EXPORTER_OTLP_ENDPOINT'",
    ),
    *[
        ({"settings": {name: 1}}, f"additional properties '{name}' not allowed")
        for name in sorted(SECRETS | OF_THE_CHART)
    ],
    ({"config": {"upstream": []}}, "at '/config': additional properties 'upstream' not allowed"),
    ({"config": {"upstreams": [{"name": "a", "base_url": "b"}]}}, "at '/config/upstreams/0/base_url'"),
    ({"config": {"upstreams": [{"name": "a"}]}}, "at '/config/upstreams/0': missing property 'base_url'"),
    (
        {"config": {"models": [{"name": "m", "upstream": "u", "price": {"input": -1}}]}},
        "minimum: got -1, want 0",
    ),
    (
        {"auth": {"keys": [{"name": "a", "sha256": "secret"}]}},
        "at '/auth/keys/0/sha256': 'secret' does not match",
    ),
    ({"image": {"digest": "sha256:abc"}}, "at '/image/digest': 'sha256:abc' does not match pattern"),
    ({"image": {"tag": 1}}, "at '/image/tag': got number, want string"),
    ({"image": {"pullPolicy": "always"}}, "at '/image/pullPolicy': value must be one of 'Always'"),
    ({"redis": {"mode": "standalone"}}, "at '/redis/mode': value must be one of 'embedded', 'external'"),
    ({"redis": {"sentinel": {"nodes": ["host"]}}}, "at '/redis/sentinel/nodes/0': 'host' does not match"),
    ({"redis": {"external": {"host": "redis://h"}}}, "at '/redis/external/host': 'redis://h' does not match"),
    ({"upstream": {"baseUrl": "vllm:8000"}}, "at '/upstream/baseUrl': 'vllm:8000' does not match"),
    ({"worker": {"enable": True}}, "at '/worker': additional properties 'enable' not allowed"),
    ({"worker": {"postgres": {"sslMode": "on"}}}, "at '/worker/postgres/sslMode': value must be one of"),
    (
        {"worker": {"postgres": {"host": "postgresql://h"}}},
        "at '/worker/postgres/host': 'postgresql://h' does",
    ),
    ({"worker": {"postgres": {"username": "a@b"}}}, "at '/worker/postgres/username': 'a@b' does not match"),
    (
        {"settings": {"LEDGER_POSTGRES_SCHEMA": "A b"}},
        "at '/settings/LEDGER_POSTGRES_SCHEMA': 'A b' does not",
    ),
    ({"service": {"port": 0}}, "at '/service/port': minimum: got 0, want 1"),
    ({"service": {"type": "clusterip"}}, "at '/service/type': value must be one of"),
    ({"shutdown": {"preStopSeconds": -1}}, "at '/shutdown/preStopSeconds': minimum: got -1, want 0"),
    ({"shutdown": {"longestStreamSeconds": 7200}}, "at '/shutdown/longestStreamSeconds': maximum"),
    ({"rollout": {"maxSurge": "25"}}, "at '/rollout/maxSurge': '25' does not match"),
    ({"rollout": {"maxSurge": "00%"}}, "at '/rollout/maxSurge': '00%' does not match"),
    ({"rollout": {"maxUnavailable": "101%"}}, "at '/rollout/maxUnavailable': '101%' does not match"),
    ({"podDisruptionBudget": {"maxUnavailable": "00%"}}, "/maxUnavailable': '00%' does not match"),
    ({"podDisruptionBudget": {"minAvailable": "120%"}}, "/minAvailable': '120%' does not match"),
    ({"metrics": {"serviceMonitor": {"interval": 15}}}, "at '/metrics/serviceMonitor/interval': got number"),
    ({"metrics": {"serviceMonitor": {"interval": "15"}}}, "'15' does not match pattern"),
    (
        {"metrics": {"prometheusRule": {"objectives": {"availability": "most"}}}},
        "at '/metrics/prometheusRule/objectives/availability': 'most' does not match",
    ),
    (
        {"metrics": {"prometheusRule": {"objectives": {"ttftSeconds": 3}}}},
        (
            "at '/metrics/prometheusRule/objectives/ttftSeconds': "
            "value must be one of 0.1, 0.25, 0.5, 0.75, 1, 2.5"
        ),
    ),
    (
        {"metrics": {"prometheusRule": {"disabledAlerts": ["WeirUpstreamdown"]}}},
        "at '/metrics/prometheusRule/disabledAlerts/0': value must be one of 'WeirAvailabilityBurnFast', ",
    ),
    *[
        (
            {"metrics": {"prometheusRule": {"matchers": matchers}}},
            f"at '/metrics/prometheusRule/matchers': '{matchers}' does not match",
        )
        for matchers in ("namespace=apps", '{namespace="apps"}', 'namespace="apps')
    ],
    (
        {"metrics": {"prometheusRule": {"alertFor": {"WeirUpstreamDown": 15}}}},
        "at '/metrics/prometheusRule/alertFor/WeirUpstreamDown': got number, want string",
    ),
    (
        {"metrics": {"prometheusRule": {"alertSeverities": {"WeirUpstreamDown": "critical"}}}},
        (
            "at '/metrics/prometheusRule/alertSeverities/WeirUpstreamDown': "
            "value must be one of 'page', 'ticket'"
        ),
    ),
    (
        {"metrics": {"prometheusRule": {"thresholds": {"spendFloor": 5}}}},
        "at '/metrics/prometheusRule/thresholds': additional properties 'spendFloor' not allowed",
    ),
    (
        {"resources": {"limits": {"memory": "512 MB"}}},
        "at '/resources/limits/memory': '512 MB' does not match",
    ),
    ({"resources": {"limit": {}}}, "at '/resources': additional properties 'limit' not allowed"),
    ({"securityContext": {"readonlyRootFilesystem": True}}, "'readonlyRootFilesystem' not allowed"),
    ({"podSecurityContext": {"runAsUser": "10001"}}, "at '/podSecurityContext/runAsUser': got string"),
    ({"extraEnv": [{"value": "x"}]}, "at '/extraEnv/0': missing property 'name'"),
    ({"extraEnv": [{"name": "X", "value": 1}]}, "at '/extraEnv/0/value': got number, want string"),
    ({"tolerations": [{"keys": "x"}]}, "at '/tolerations/0': additional properties 'keys' not allowed"),
    ({"affinity": {"podAffinities": {}}}, "additional properties 'podAffinities' not allowed"),
    ({"commonLabels": {"a": True}}, "at '/commonLabels/a': got boolean, want string"),
    (
        {"commonLabels": {"app.kubernetes.io/name": "x"}},
        "at '/commonLabels/app.kubernetes.io~1name': false schema",
    ),
    ({"podLabels": {"a": "not a label!"}}, "at '/podLabels/a': 'not a label!' does not match"),
    ({"fullnameOverride": "Weir"}, "at '/fullnameOverride': 'Weir' does not match"),
    ({"fullnameOverride": "w" * 46}, "at '/fullnameOverride': maxLength: got 46, want 45"),
    ({"nameOverride": "w" * 46}, "at '/nameOverride': maxLength: got 46, want 45"),
    ({"imagePullSecrets": [{"name": "x"}]}, "at '/imagePullSecrets/0': got object, want string"),
    (
        {"ingress": {"tls": [{"hosts": ["a.example.com"]}]}},
        "at '/ingress/tls/0': missing property 'secretName'",
    ),
    ({"ingress": {"path": "v1"}}, "at '/ingress/path': 'v1' does not match"),
    ({"networkPolicy": {"apiFrom": [{"pods": {}}]}}, "additional properties 'pods' not allowed"),
    ({"httpRoute": {"timeouts": {"request": "1 minute"}}}, "at '/httpRoute/timeouts/request'"),
    ({"autoscaling": None}, "missing property 'autoscaling'"),
    ({"replicaCount": None}, "missing property 'replicaCount'"),
]


@pytest.mark.parametrize(("values", "words"), REFUSED, ids=[json.dumps(v)[:60] for v, _ in REFUSED])
def test_a_wrong_value_is_refused_with_its_place(values: dict[str, Any], words: str) -> None:
    assert words in refusal(values)


def test_helm_4_refuses_with_the_same_words() -> None:
    values, words = REFUSED[1]
    assert words in refusal(values, helm="helm4")


def test_several_wrong_values_are_told_at_once() -> None:
    said = refusal({"replica": 1, "image": {"tag": 1}, "settings": {"LOG_LEVEL": "loud", "PORT": 1}})
    for words in ("'replica' not allowed", "/image/tag", "/settings/LOG_LEVEL", "'PORT' not allowed"):
        assert words in said


def nulls(node: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Null for each value that need not be there."""
    node = resolved(node)
    made: dict[str, Any] = {}
    for name, value in values.items():
        if name not in node.get("required", []):
            made[name] = None
        elif isinstance(value, dict) and not foreign(node["properties"][name]):
            made[name] = nulls(node["properties"][name], value)
    return made


@pytest.mark.parametrize("helm", HELMS)
def test_null_takes_back_any_value_that_is_not_required(helm: str) -> None:
    rendered = render(nulls(SCHEMA, VALUES), helm=helm)
    pod = rendered.one("Deployment")["spec"]["template"]["spec"]
    assert "securityContext" not in pod
    assert "resources" not in rendered.server
    assert {(o["kind"], o["metadata"]["name"]) for o in rendered.objects} == {
        (o["kind"], o["metadata"]["name"]) for o in render(helm=helm).objects
    }


@pytest.mark.parametrize("helm", HELMS)
def test_null_takes_a_setting_back(helm: str) -> None:
    values = {"settings": {"RATE_LIMIT_REQUESTS": None, "LOG_LEVEL": "info"}}
    environment = render(values, case="redis-none", helm=helm).environment()
    assert "RATE_LIMIT_REQUESTS" not in environment
    assert environment["LOG_LEVEL"]["value"] == "info"


CONFIGS: list[tuple[bool, dict[str, Any]]] = [
    (True, {}),
    (True, {"upstreams": [{"name": "s", "kind": "simulator"}]}),
    (True, {"upstreams": [{"name": "a", "base_url": "https://h/v1", "api_key_env": "K", "provider": None}]}),
    (
        True,
        {"upstreams": [{"name": "z", "kind": "azure", "base_url": "https://h", "api_version": "2024-10-21"}]},
    ),
    (
        True,
        {
            "models": [
                {"name": "m", "upstream": "simulator", "aliases": ["x"], "price": {"input": 1, "output": 0.5}}
            ]
        },
    ),
    (True, {"keys": [{"name": "k", "sha256": "a" * 64}]}),
    (False, {"upstreams": [{"name": "a"}]}),
    (False, {"upstreams": [{"name": "a", "base_url": "h/v1"}]}),
    (False, {"upstreams": [{"name": "A", "base_url": "https://h/v1"}]}),
    (False, {"upstreams": [{"name": "a", "base_url": None}]}),
    (False, {"upstreams": [{"name": "z", "kind": "azure", "base_url": "https://h"}]}),
    (False, {"upstreams": [{"name": "z", "kind": "bedrock", "base_url": "https://h"}]}),
    (False, {"upstreams": [{"name": "a", "base_url": "https://h/v1", "api_key": "sk-secret"}]}),
    (False, {"models": [{"name": "m"}]}),
    (False, {"models": [{"name": "m", "upstream": "u", "upstreams": [{"upstream": "v"}]}]}),
    (
        True,
        {
            "upstreams": [{"name": name, "kind": "simulator"} for name in "uv"],
            "models": [{"name": "m", "upstreams": [{"upstream": "u", "weight": 2}, {"upstream": "v"}]}],
        },
    ),
    (False, {"limits": [{"name": "a"}]}),
    (True, {"limits": [{"name": "a", "per": ["tenant", "model"], "tokens": 1000}]}),
    (False, {"limits": [{"name": "a", "per": ["person"], "tokens": 1000}]}),
    (True, {"budgets": [{"name": "b", "usd": 5, "period": "day"}]}),
    (False, {"budgets": [{"name": "b", "usd": 0}]}),
    (False, {"models": [{"name": "", "upstream": "u"}]}),
    (False, {"models": [{"name": "m", "upstream": "u", "context_tokens": 0}]}),
    (False, {"keys": [{"name": "k", "sha256": "A" * 64}]}),
    (False, {"keys": [{"name": "k"}]}),
]


@pytest.mark.parametrize(("good", "config"), CONFIGS, ids=[json.dumps(c)[:70] for _, c in CONFIGS])
def test_schema_templates_and_weir_agree_on_a_config(good: bool, config: dict[str, Any]) -> None:
    assert jsonschema.Draft7Validator(SCHEMA).is_valid(VALUES | {"config": config}) is good
    try:
        FileConfig.model_validate(config)
    except ValidationError:
        assert not good
    else:
        assert good
        assert render({"config": config, "extraEnvFrom": [{"secretRef": {"name": "more"}}]}).deployment


@pytest.mark.parametrize("page", ["routing.md", "settings.md", "limits.md"])
def test_the_examples_of_the_docs_are_installed_as_they_stand(page: str) -> None:
    block = re.search(r"```yaml\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    assert block
    values = f"extraEnvFrom: [{{secretRef: {{name: more}}}}]\nconfig:\n{textwrap.indent(block[1], '  ')}"
    assert "kind: Deployment" in template([need("helm"), "template", str(CHART), "--values", "-"], values)


@pytest.mark.parametrize("helm", HELMS)
def test_it_serves_as_a_part_of_another_chart(tmp_path: Path, helm: str) -> None:
    """With `global` values of others, and a condition."""
    parent = tmp_path / "parent"
    (parent / "charts").mkdir(parents=True)
    (parent / "charts/weir").symlink_to(CHART)
    (parent / "Chart.yaml").write_text(
        "apiVersion: v2\nname: parent\nversion: 1.0.0\n"
        "dependencies: [{name: weir, version: '>=0', condition: weir.enabled}]\n"
    )
    command = [need(helm), "template", "rel", str(parent), "--kube-version", "1.34.0", "--values", "-"]
    on = template(command, json.dumps({"global": {"storageClass": "x"}, "weir": {"enabled": True}}))
    assert "kind: Deployment" in on
    off = template(command, json.dumps({"weir": {"enabled": False}}))
    assert "kind:" not in off
    with pytest.raises(Refused, match="'replicas' not allowed"):
        template(command, json.dumps({"weir": {"replicas": 3}}))


def test_each_value_has_a_comment() -> None:
    """Or a map around it has one, or it is a section whose values have."""
    text = (CHART / "values.yaml").read_text()
    lines = text.splitlines()

    def told(key: yaml.Node) -> bool:
        before = key.start_mark.line - 1
        while lines[before].strip().startswith("#") and not lines[before].strip().startswith("# -- "):
            before -= 1
        return lines[before].strip().startswith("# -- ")

    def untold(node: yaml.Node, path: str) -> Iterator[str]:
        for key, value in node.value:
            here = f"{path}.{key.value}"
            if told(key):
                continue
            if isinstance(value, yaml.MappingNode) and value.value:
                yield from untold(value, here)
            else:
                yield here

    root = yaml.compose(text)
    assert root is not None
    assert list(untold(root, "")) == []


def test_a_decimal_may_be_given_on_the_command_line() -> None:
    """`--set` makes text of what has a decimal point; it must not for that be refused."""
    assert render({"settings": {"OPENAI_TEMPERATURE": "0.5"}}).environment()["OPENAI_TEMPERATURE"] == {
        "name": "OPENAI_TEMPERATURE",
        "value": "0.5",
    }
    assert "OPENAI_TEMPERATURE" in refusal({"settings": {"OPENAI_TEMPERATURE": "warm"}})
