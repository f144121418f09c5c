"""Every case of `ci/`: what must hold whatever the values are."""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Iterator

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.chart.crds import SCHEMAS
from tests.chart.rendering import CASES, CHART, NAMESPACE, RELEASE, Object, Rendered, render, template
from tests.programs import HELMS, need

VERSIONS = ("1.29", "1.30", "1.31", "1.32", "1.33", "1.34")
RECOMMENDED = {"name", "instance", "component", "version", "part-of", "managed-by"}

every_case = pytest.mark.parametrize("case", CASES)


def ours(rendered: Rendered) -> list[Object]:
    """Without what `extraObjects` brought."""
    return [o for o in rendered.objects if "helm.sh/chart" in o["metadata"].get("labels", {})]


@every_case
@pytest.mark.parametrize("helm", HELMS)
def test_lint_has_nothing_to_say(case: str, helm: str) -> None:
    values = str(CHART / "ci" / f"{case}-values.yaml")
    template([need(helm), "lint", "--strict", str(CHART), "--values", values, "--kube-version", "1.34.0"])


@every_case
def test_helm_3_and_helm_4_render_the_same(case: str) -> None:
    def plain(rendered: Rendered) -> list[str]:
        # Words made at random differ from one run to the next.
        return sorted(json.dumps(_without_secrets(o), sort_keys=True) for o in rendered.objects)

    assert plain(render(case=case)) == plain(render(case=case, helm="helm4"))


@every_case
def test_kubernetes_takes_each_object(case: str) -> None:
    for version in VERSIONS:
        for thing in render(case=case, kubernetes=f"{version}.0").objects:
            if thing["kind"] not in SCHEMAS:
                _validate(json.dumps(_without_secrets(thing)), version)


@every_case
def test_the_operators_take_each_object(case: str) -> None:
    for thing in render(case=case).objects:
        if thing["kind"] in SCHEMAS:
            jsonschema.validate(thing, SCHEMAS[thing["kind"]])


def test_the_matrix_has_each_custom_resource() -> None:
    kinds = {thing["kind"] for case in CASES for thing in render(case=case).objects}
    assert kinds >= set(SCHEMAS)


@every_case
def test_names_are_there_once(case: str) -> None:
    rendered = render(case=case)
    count = Counter(
        (o["apiVersion"], o["kind"], o["metadata"].get("namespace"), o["metadata"]["name"])
        for o in rendered.objects
    )
    assert max(count.values()) == 1
    for _, _, spec in rendered.pods():
        for each in [*spec.get("initContainers", []), *spec["containers"]]:
            assert max(Counter(v["name"] for v in each.get("env", [{"name": ""}])).values()) == 1
        assert max(Counter(v["name"] for v in spec.get("volumes", [{"name": ""}])).values()) == 1


@every_case
def test_every_object_says_what_it_is_and_where(case: str) -> None:
    values = yaml.safe_load((CHART / "ci" / f"{case}-values.yaml").read_text())
    for thing in ours(render(case=case)):
        metadata = thing["metadata"]
        labels = metadata["labels"]
        assert {f"app.kubernetes.io/{name}" for name in RECOMMENDED} <= set(labels)
        assert labels["app.kubernetes.io/instance"] == RELEASE
        assert labels["app.kubernetes.io/managed-by"] == "Helm"
        for name, value in values.get("commonLabels", {}).items():
            assert labels[name] == value, thing["metadata"]["name"]
        for name, value in values.get("commonAnnotations", {}).items():
            assert metadata["annotations"][name] == value
        expected = values.get("namespaceOverride", NAMESPACE)
        if labels["app.kubernetes.io/component"] == "dashboard":
            expected = values["dashboards"]["namespace"]
        assert metadata["namespace"] == expected


@every_case
def test_selectors_find_the_pods_and_ports_have_names(case: str) -> None:
    rendered = render(case=case)
    workloads = [w for w in rendered.objects if w["kind"] in ("Deployment", "StatefulSet")]
    for workload in workloads:
        template_labels = workload["spec"]["template"]["metadata"]["labels"]
        assert workload["spec"]["selector"]["matchLabels"].items() <= template_labels.items()
    for service in rendered.all("Service"):
        chosen = [
            w["spec"]["template"]
            for w in workloads
            if service["spec"]["selector"].items() <= w["spec"]["template"]["metadata"]["labels"].items()
        ]
        assert len(chosen) == 1, service["metadata"]["name"]
        for port in service["spec"]["ports"]:
            assert port["targetPort"] in _ports(chosen[0]["spec"])
    for kind, where in (("PodDisruptionBudget", "selector"), ("NetworkPolicy", "podSelector")):
        for thing in rendered.all(kind):
            wanted = thing["spec"][where]["matchLabels"]
            found = [
                w for w in workloads if wanted.items() <= w["spec"]["template"]["metadata"]["labels"].items()
            ]
            assert len(found) == 1, thing["metadata"]["name"]


@every_case
def test_probes_and_policies_name_ports_that_are_there(case: str) -> None:
    rendered = render(case=case)
    for thing, _, spec in rendered.pods():
        for each in spec["containers"]:
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                if each["name"] in ("weir", "redis"):
                    assert probe in each, thing["metadata"]["name"]
                check = each.get(probe, {}).get("httpGet") or each.get(probe, {}).get("tcpSocket")
                if check:
                    assert check["port"] in {p["name"] for p in each["ports"]}
    for policy in rendered.all("NetworkPolicy"):
        wanted = policy["spec"]["podSelector"]["matchLabels"]
        (spec,) = (s for _, m, s in rendered.pods() if wanted.items() <= m["labels"].items())
        there = {port["containerPort"] for c in spec["containers"] for port in c.get("ports", [])}
        assert {port["port"] for rule in policy["spec"]["ingress"] for port in rule["ports"]} == there


@every_case
def test_pods_name_objects_of_the_release_or_those_of_the_values(case: str) -> None:
    rendered = render(case=case)
    there = {(o["kind"], o["metadata"]["name"]) for o in rendered.objects}
    values = (CHART / "ci" / f"{case}-values.yaml").read_text()
    for _, _, spec in rendered.pods():
        for kind, name in _named(spec):
            assert (kind, name) in there or name == "default" or f" {name}\n" in values, (kind, name)


@every_case
def test_scalers_and_routes_lead_to_objects_of_the_release(case: str) -> None:
    rendered = render(case=case)
    for thing in [*rendered.all("HorizontalPodAutoscaler"), *rendered.all("ScaledObject")]:
        rendered.one("Deployment", thing["spec"]["scaleTargetRef"]["name"])
    for ingress in rendered.all("Ingress"):
        for rule in ingress["spec"]["rules"]:
            (path,) = rule["http"]["paths"]
            service = rendered.one("Service", path["backend"]["service"]["name"])
            assert path["backend"]["service"]["port"]["name"] in {p["name"] for p in service["spec"]["ports"]}
    for route in rendered.all("HTTPRoute"):
        (backend,) = route["spec"]["rules"][0]["backendRefs"]
        service = rendered.one("Service", backend["name"])
        assert backend["port"] in {p["port"] for p in service["spec"]["ports"]}


def test_the_service_monitor_finds_exactly_one_service() -> None:
    rendered = render(case="full")
    monitor = rendered.one("ServiceMonitor")
    assert monitor["spec"]["namespaceSelector"] == {"matchNames": [NAMESPACE]}
    found = [
        s
        for s in rendered.all("Service")
        if monitor["spec"]["selector"]["matchLabels"].items() <= s["metadata"]["labels"].items()
    ]
    assert [s["metadata"]["name"] for s in found] == [f"{RELEASE}-weir-metrics"]
    assert monitor["spec"]["endpoints"][0]["port"] in {p["name"] for p in found[0]["spec"]["ports"]}


def test_the_workers_metrics_have_a_service_monitor_of_their_own() -> None:
    rendered = render(case="worker")
    for name in ("rel-weir", "rel-weir-worker"):
        monitor = rendered.one("ServiceMonitor", name)
        found = [
            s["metadata"]["name"]
            for s in rendered.all("Service")
            if monitor["spec"]["selector"]["matchLabels"].items() <= s["metadata"]["labels"].items()
        ]
        assert found == [f"{name}-metrics"]


def test_without_the_worker_nothing_of_it_is_there() -> None:
    for case in CASES:
        rendered = render({"worker": {"enabled": False}}, case=case)
        assert "worker" not in {
            o["metadata"]["labels"].get("app.kubernetes.io/component") for o in ours(rendered)
        }
        assert "LEDGER_POSTGRES_URL" not in rendered.text


def _named(spec: Object) -> Iterator[tuple[str, str]]:
    yield "ServiceAccount", spec["serviceAccountName"]
    for volume in spec.get("volumes", []):
        if "secret" in volume:
            yield "Secret", volume["secret"]["secretName"]
        if "configMap" in volume:
            yield "ConfigMap", volume["configMap"]["name"]
    for each in spec["containers"]:
        for variable in each.get("env", []):
            if "valueFrom" in variable:
                yield "Secret", variable["valueFrom"]["secretKeyRef"]["name"]


def _ports(spec: Object) -> set[str]:
    return {port["name"] for c in spec["containers"] for port in c.get("ports", [])}


def _without_secrets(thing: Object) -> Object:
    return thing | {"data": dict.fromkeys(thing["data"], "")} if thing["kind"] == "Secret" else thing


@functools.cache
def _validate(thing: str, version: str) -> None:
    parsed = json.loads(thing)
    kubernetes_validate.validate(parsed, version, strict=True)
