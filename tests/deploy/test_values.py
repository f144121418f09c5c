"""deploy/values: each file renders to objects that Kubernetes takes, and to settings that Weir takes."""

from __future__ import annotations

import pytest

from service.__main__ import main
from tests.deploy.rendering import DEPLOY, check_environment, check_schema, render

FILES = ["dev", "staging", "production"]


def file(name: str) -> str:
    return f"deploy/values/{name}.yaml"


def test_these_are_all_of_them() -> None:
    assert sorted(p.stem for p in (DEPLOY / "values").iterdir()) == sorted(FILES)


@pytest.mark.parametrize("name", FILES)
def test_kubernetes_takes_every_object(name: str) -> None:
    check_schema(render(file(name)))


@pytest.mark.parametrize("name", FILES)
def test_weir_takes_the_environment(name: str) -> None:
    rendered = render(file(name))
    taken = check_environment(rendered.environment())
    # The server's time to end fits into the time that Kubernetes gives.
    spec = rendered.one("Deployment")["spec"]["template"]["spec"]
    assert taken.drain_delay + taken.drain_timeout < spec["terminationGracePeriodSeconds"]


def test_development_stops_quickly_and_can_be_written_into() -> None:
    rendered = render(file("dev"))
    deployment = rendered.one("Deployment")
    assert deployment["spec"]["replicas"] == 1
    assert rendered.server["securityContext"]["readOnlyRootFilesystem"] is False
    assert not rendered.all("PodDisruptionBudget")
    assert not rendered.all("NetworkPolicy")
    assert "lifecycle" not in rendered.server
    taken = check_environment(rendered.environment())
    assert taken.drain_delay + taken.drain_timeout <= 1
    assert taken.log_level == "debug"
    assert taken.openai_api_key is None
    # A fault in the source leaves the container alone for a day.
    probe = rendered.server["livenessProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] >= 86_400


def test_development_keeps_all_other_restrictions() -> None:
    ours = render(file("dev")).server["securityContext"]
    assert {**ours, "readOnlyRootFilesystem": True} == render().server["securityContext"]


def test_staging_needs_nothing_from_outside() -> None:
    rendered = render(file("staging"))
    scaler = rendered.one("HorizontalPodAutoscaler")["spec"]
    assert (scaler["minReplicas"], scaler["maxReplicas"]) == (2, 4)
    assert rendered.one("PodDisruptionBudget")
    ours = {thing["metadata"]["name"] for thing in rendered.all("Secret")}
    named = {v["valueFrom"]["secretKeyRef"]["name"] for v in rendered.server["env"] if "valueFrom" in v}
    assert named <= ours
    claim = rendered.one("PersistentVolumeClaim")
    volumes = {v["name"]: v for v in rendered.one("StatefulSet")["spec"]["template"]["spec"]["volumes"]}
    assert volumes["data"]["persistentVolumeClaim"] == {"claimName": claim["metadata"]["name"]}
    assert check_environment(rendered.environment()).rate_limit_requests == 60


def test_production_is_guarded_scaled_and_watched() -> None:
    rendered = render(file("production"))
    scaler = rendered.one("HorizontalPodAutoscaler")["spec"]
    assert (scaler["minReplicas"], scaler["maxReplicas"]) == (3, 20)
    assert "replicas" not in rendered.one("Deployment")["spec"]
    assert rendered.one("PodDisruptionBudget")["spec"]["maxUnavailable"] == 1
    assert rendered.one("ServiceMonitor")
    assert rendered.one("Ingress")["spec"]["tls"] == [
        {"secretName": "weir-tls", "hosts": ["weir.example.com"]}
    ]
    assert rendered.server["resources"]["requests"].keys() == {"cpu", "memory"}
    assert not rendered.all("StatefulSet")


def test_productions_limit_is_too_high_for_a_check_and_skipped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pod = render(file("production")).one("Pod", "weir-test-limit")["spec"]["containers"][0]
    for variable in pod["env"]:
        if "value" in variable:
            monkeypatch.setenv(variable["name"], variable["value"])
    assert main(pod["command"][3:]) == 0
    assert capsys.readouterr().out.startswith("limit: skipped: a limit of 600 requests is too high")


def test_productions_network_policy_names_everybody() -> None:
    policy = render(file("production")).one("NetworkPolicy")["spec"]
    for rule in policy["ingress"]:
        assert rule["from"]
        assert {"namespaceSelector": {}} not in rule["from"]
    ports = [{port["port"] for port in rule["ports"]} for rule in policy["egress"]]
    assert ports == [{53, 5353}, {443}, {4318, 6379}]
    (world,) = policy["egress"][1]["to"]
    assert {"10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"} <= set(world["ipBlock"]["except"])


def test_production_makes_no_secret() -> None:
    rendered = render(file("production"))
    assert not rendered.all("Secret")
    assert rendered.text == render(file("production")).text  # nothing random in it
    assert check_environment(rendered.environment()).redis_url is not None
