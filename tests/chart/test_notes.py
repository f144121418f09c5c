"""What Helm prints after an install: commands that can be copied, and nothing that is not so."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest

from tests.chart.rendering import CASES, CHART, NAMESPACE, RELEASE, render, template
from tests.programs import need


@functools.cache
def notes(values: str = "{}", case: str = "default") -> str:
    """Helm 3 asks a cluster before it shows them; Helm 4 does not."""
    command = [need("helm4"), "install", RELEASE, str(CHART), "--namespace", NAMESPACE, "--dry-run=client"]
    command += ["--values", str(CHART / "ci" / f"{case}-values.yaml"), "--values", "-"]
    return template(command, values).split("\nNOTES:\n", 1)[1]


def told(values: dict[str, Any]) -> str:
    return notes(json.dumps(values))


@pytest.mark.parametrize("case", CASES)
def test_a_command_has_a_line_for_itself(case: str) -> None:
    text = notes(case=case)
    commands = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    assert len(commands) >= 5
    for command in commands:
        assert command.split()[0] in ("export", "kubectl", "curl", "helm"), command
        assert "`" not in command
        assert not command.endswith(".") or command.endswith("..."), command


@pytest.mark.parametrize("case", CASES)
def test_commands_name_objects_of_the_release(case: str) -> None:
    rendered = render(case=case)
    names = {o["metadata"]["name"] for o in rendered.objects}
    for line in notes(case=case).splitlines():
        words = line.split()
        if "port-forward" in words:
            assert words[words.index("port-forward") + 1].removeprefix("service/") in names
        if "delete" in words and "pvc" in words:
            (claim,) = rendered.all("PersistentVolumeClaim")
            assert words[words.index("pvc") + 1 :] == [claim["metadata"]["name"]]


@pytest.mark.parametrize(
    ("values", "model", "listed"),
    [
        ({}, "simulator", False),
        ({"upstream": {"baseUrl": "http://vllm/v1"}}, "MODEL", True),
        ({"config": {"models": [{"name": n, "upstream": "simulator"} for n in ("s*", "m")]}}, "m", False),
        ({"config": {"models": [{"name": "s*", "upstream": "simulator"}]}}, "MODEL", True),
    ],
)
def test_the_call_names_a_model_or_says_where_one_is(
    values: dict[str, Any], model: str, listed: bool
) -> None:
    text = told(values)
    assert f'"model": "{model}"' in text
    assert ("In place of MODEL one that GET /v1/models lists." in text) is listed
    assert "MODEL for example" not in text


def test_dashboards_are_a_command_and_an_address_away() -> None:
    upgrade = f"helm upgrade {RELEASE} helm/weir -n {NAMESPACE} --reset-then-reuse-values"
    assert f"    {upgrade} --set dashboards.enabled=true\n" in notes()
    assert "open https://YOUR-GRAFANA/d/weir-overview\n" in notes()
    assert json.loads((CHART / "files/dashboards/overview.json").read_text())["uid"] == "weir-overview"
    text = notes(case="full")
    assert "kubectl -n monitoring get configmap -l app.kubernetes.io/component=dashboard\n" in text
    assert "open https://grafana.example.com/d/weir-overview\n" in text
    assert "--set dashboards.enabled" not in text


@pytest.mark.parametrize(
    ("case", "values", "goes"),
    [
        ("default", {}, True),
        ("redis-persistent", {}, True),
        ("redis-persistent", {"auth": {"existingSecret": "mine"}}, False),
        ("default", {"auth": {"existingSecret": "mine"}}, False),
        ("openai", {}, False),
        ("no-auth", {}, False),
    ],
)
def test_the_key_that_the_chart_made_goes_and_no_other(case: str, values: dict[str, Any], goes: bool) -> None:
    assert ("the API key goes" in notes(json.dumps(values), case)) is goes


def test_a_volume_that_stays_is_told_of() -> None:
    assert "delete pvc" in notes(case="redis-persistent")
    for case in ("default", "redis-claim", "redis-external"):
        assert "delete pvc" not in notes(case=case)


@pytest.mark.parametrize(
    ("values", "warned"),
    [
        ({}, False),
        ({"redis": {"mode": "none"}}, True),
        ({"redis": {"mode": "none"}, "replicaCount": 1}, False),
        ({"redis": {"mode": "none"}, "autoscaling": {"enabled": True, "minReplicas": 1}}, True),
    ],
)
def test_pods_that_share_nothing_are_told_of(values: dict[str, Any], warned: bool) -> None:
    text = told(values)
    assert ("WITHOUT REDIS EACH POD HAS CONVERSATIONS" in text) is warned
    assert ("a conversation over all pods" in text) is not warned


def test_from_outside_it_says_the_port_or_the_host() -> None:
    assert "get service rel-weir\n" in notes(case="nodeport")
    assert "on this port of each node" in notes(case="nodeport")
    assert "on this port of the load balancer" in told({"service": {"type": "LoadBalancer"}})
    assert "get service rel-weir\n" not in notes()
    hosts = {"enabled": True, "hosts": ["llm.example.com"]}
    assert "From elsewhere: http://llm.example.com/v1" in told({"ingress": hosts})
    assert "From elsewhere" not in told({"ingress": {"enabled": True}})
    assert "From elsewhere" not in told({"httpRoute": {"enabled": True, "parentRefs": [{"name": "edge"}]}})


def test_a_narrow_network_is_told_of_where_an_upstream_is_to_be_named() -> None:
    assert "networkPolicy.upstreamPorts" in notes()
    assert "networkPolicy.upstreamPorts" not in told({"networkPolicy": {"enabled": False}})
