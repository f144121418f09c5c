"""The NetworkPolicy lets Weir reach what the values name, and nothing else."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from tests.chart.rendering import CASES, RELEASE, Object, Rendered, render

DNS = {53, 5353}

# AWS, Google, Azure and most others; Azure's agent; Alibaba; AWS by IPv6.
METADATA = ("169.254.169.254", "169.254.170.2", "168.63.129.16", "100.100.100.200", "fd00:ec2::254")


def policy(rendered: Rendered, name: str = f"{RELEASE}-weir") -> Object:
    spec: Object = rendered.one("NetworkPolicy", name)["spec"]
    return spec


def egress(rendered: Rendered) -> set[int]:
    return {port["port"] for rule in policy(rendered)["egress"] for port in rule["ports"]}


@pytest.mark.parametrize(
    ("case", "ports"),
    [
        ("default", {6379, 443}),
        ("openai", {6379, 443}),
        ("azure", {6379, 443}),
        ("vllm", {6379, 443, 8000}),
        ("redis-external", {443, 6379}),
        ("redis-sentinel", {443, 26379, 26380, 6379}),
        ("redis-cluster", {443, 7000, 7001}),
        ("redis-none", {443}),
        ("url-secret", {443, 6379}),
        ("full", {443, 8001, 8443, 4318, 6380, 3128}),
    ],
)
def test_it_opens_the_ports_that_the_values_name(case: str, ports: set[int]) -> None:
    assert egress(render(case=case)) == DNS | ports


@pytest.mark.parametrize("case", CASES)
def test_ports_are_numbers(case: str) -> None:
    """Not every network knows the names of ports."""
    for thing in render(case=case).all("NetworkPolicy"):
        for rule in [*thing["spec"].get("ingress", []), *thing["spec"].get("egress", [])]:
            assert all(type(port["port"]) is int for port in rule["ports"])


def test_names_are_asked_for_over_both_protocols() -> None:
    dns = policy(render())["egress"][0]
    assert "to" not in dns
    asked = {(p["port"], p["protocol"]) for p in dns["ports"]}
    assert asked == {(port, protocol) for port in DNS for protocol in ("UDP", "TCP")}


@pytest.mark.parametrize(
    ("url", "port"),
    [
        ("http://vllm/v1", 80),
        ("https://vllm/v1", 443),
        ("http://vllm.models.svc:8000", 8000),
        ("https://[2001:db8::1]:8443/v1", 8443),
        ("http://[2001:db8::1]/v1", 80),
    ],
)
def test_the_port_of_an_address(url: str, port: int) -> None:
    for values in (
        {"upstream": {"baseUrl": url}},
        {"config": {"upstreams": [{"name": "a", "base_url": url}]}},
        {"settings": {"OTEL_EXPORTER_OTLP_ENDPOINT": url}},
        {"settings": {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": url}},
    ):
        assert egress(render(values)) == DNS | {6379, 443, port}


def test_narrowed_upstreams_leave_redis_and_the_collector_reachable() -> None:
    peers = [{"ipBlock": {"cidr": "198.51.100.0/24"}}]
    values: dict[str, Any] = {
        "networkPolicy": {"upstreamsTo": peers, "upstreamPorts": [8443]},
        "redis": {"mode": "external", "external": {"host": "redis.example.com"}},
        "settings": {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"},
    }
    _, upstreams, others = policy(render(values))["egress"]
    assert upstreams["to"] == peers
    assert {p["port"] for p in upstreams["ports"]} == {443, 8443}
    assert {p["port"] for p in others["ports"]} == {6379, 4318}
    assert {"namespaceSelector": {}} in others["to"]


@pytest.mark.parametrize("case", ["default", "full"])
def test_the_clouds_metadata_is_out_of_reach(case: str) -> None:
    rules = [r for r in policy(render(case=case))["egress"] if any("ipBlock" in to for to in r.get("to", []))]
    for rule in rules:
        for peer in rule["to"]:
            block = peer.get("ipBlock", {})
            if block.get("cidr", "").endswith("/0"):
                whole = ip_network(block["cidr"])
                mine = [a for a in map(ip_address, METADATA) if a.version == whole.version]
                assert mine
                for address in mine:
                    assert any(address in ip_network(kept_out) for kept_out in block["except"]), address


def test_callers_come_to_the_api_and_the_cluster_to_the_metrics() -> None:
    api, admin = policy(render())["ingress"]
    assert api == {"ports": [{"port": 8000, "protocol": "TCP"}]}
    assert admin["ports"] == [{"port": 9000, "protocol": "TCP"}]
    assert admin["from"] == [{"namespaceSelector": {}}]


def test_named_callers_alone_come_and_the_tests_of_the_chart() -> None:
    rendered = render(case="full")
    api, admin, extra = policy(rendered)["ingress"]
    assert extra["from"] == [{"ipBlock": {"cidr": "198.51.100.8/32"}}]
    for rule, namespace in ((api, "applications"), (admin, "monitoring")):
        first, tests = rule["from"]
        assert first["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": namespace}
        for pod in rendered.all("Pod"):
            assert tests["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()


def test_only_weir_comes_to_redis_which_goes_nowhere() -> None:
    rendered = render()
    spec = policy(rendered, f"{RELEASE}-weir-redis")
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    assert spec["egress"] == []
    (rule,) = spec["ingress"]
    (peer,) = rule["from"]
    pods = rendered.one("Deployment")["spec"]["template"]["metadata"]["labels"]
    assert peer["podSelector"]["matchLabels"].items() <= pods.items()
    to_redis = policy(rendered)["egress"][1]["to"][0]["podSelector"]["matchLabels"]
    redis = rendered.one("StatefulSet")["spec"]["template"]["metadata"]["labels"]
    assert to_redis.items() <= redis.items()


@pytest.mark.parametrize(
    ("case", "redis", "ports"),
    [("worker", True, {5432}), ("worker-password", False, {26379, 26380, 6379, 6432})],
)
def test_the_worker_reaches_redis_and_postgres(case: str, redis: bool, ports: set[int]) -> None:
    rendered = render(case=case)
    worker = rendered.one("Deployment", f"{RELEASE}-weir-worker")["spec"]["template"]["metadata"]["labels"]
    spec = policy(rendered, f"{RELEASE}-weir-worker")
    assert spec["podSelector"]["matchLabels"].items() <= worker.items()
    assert not policy(rendered)["podSelector"]["matchLabels"].items() <= worker.items()
    dns, *own, outside = spec["egress"]
    assert {p["port"] for p in dns["ports"]} == DNS
    assert {p["port"] for p in outside["ports"]} == ports
    assert {"namespaceSelector": {}} in outside["to"]
    assert [[p["port"] for p in rule["ports"]] for rule in own] == ([[6379]] if redis else [])
    if redis:
        (rule,) = policy(rendered, f"{RELEASE}-weir-redis")["ingress"]
        assert any(peer["podSelector"]["matchLabels"].items() <= worker.items() for peer in rule["from"])


def test_who_reads_the_metrics_reads_the_workers_too() -> None:
    ((rule,), narrowed) = (
        policy(render(case=case), f"{RELEASE}-weir-worker")["ingress"]
        for case in ("worker", "worker-password")
    )
    assert rule == {"ports": [{"port": 9000, "protocol": "TCP"}], "from": [{"namespaceSelector": {}}]}
    (peer,) = narrowed[0]["from"]
    assert peer["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "monitoring"}


def test_without_policies_there_are_none() -> None:
    for case in ("default", "worker"):
        assert not render({"networkPolicy": {"enabled": False}}, case=case).all("NetworkPolicy")
