"""skaffold.yaml names what exists: files, targets, values, Services. skaffold itself does not run here."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import yaml

from service.__main__ import main
from tests.chart.rendering import Rendered
from tests.deploy.rendering import CHART, check_environment, check_schema, load, paths, render
from tests.running import ROOT

SKAFFOLD = load(ROOT / "skaffold.yaml")
PROFILES = ["simulator", "openai", "full", "staging"]
REFERENCES = {
    "loaded into the nodes": ("weir", "git-7ca38fe", ""),
    "pushed": ("registry.example.com/team/weir", "git-7ca38fe", f"sha256:{'a' * 64}"),
}
"""IMAGE_REPO, IMAGE_TAG and IMAGE_DIGEST, as skaffold makes them of the image that it has built."""


def with_profile(name: str) -> dict[str, Any]:
    """The file after the patches of a profile; the paths are JSON pointers."""
    whole: dict[str, Any] = copy.deepcopy(SKAFFOLD)
    profile = next(p for p in SKAFFOLD["profiles"] if p["name"] == name)
    assert set(profile) <= {"name", "patches"}
    for patch in profile.get("patches", []):
        *way, last = patch["path"].strip("/").split("/")
        place: Any = whole
        for step in way:
            place = place[int(step)] if isinstance(place, list) else place[step]
        if isinstance(place, list):
            if patch["op"] == "add":
                assert last == "-"
                place.append(patch["value"])
            else:
                assert patch["op"] == "replace"
                place[int(last)] = patch["value"]
        elif patch["op"] == "add":
            assert last not in place
            place[last] = patch["value"]
        else:
            assert last in place
            if patch["op"] == "remove":
                del place[last]
            else:
                place[last] = patch["value"]
    return whole


def release(whole: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = whole["deploy"]["helm"]["releases"][0]
    assert found["name"] == "weir"
    return found


def rendered(whole: dict[str, Any], reference: tuple[str, str, str] = ("weir", "git-1", "")) -> Rendered:
    ours = release(whole)
    artifact = whole["build"]["artifacts"][0]["image"]
    words = dict(
        zip((f"IMAGE_{word}_{artifact}" for word in ("REPO", "TAG", "DIGEST")), reference, strict=True)
    )
    sets = dict(ours["setValues"])
    for name, text in ours["setValueTemplates"].items():
        sets[name] = re.sub(r"\{\{\.(\w+)\}\}", lambda found: words[found[1]], text)
    return render(*ours["valuesFiles"], sets=sets)


def test_the_schema_and_the_profiles_are_those_that_the_docs_name() -> None:
    assert SKAFFOLD["apiVersion"] == "skaffold/v4beta13"
    assert [profile["name"] for profile in SKAFFOLD["profiles"]] == PROFILES
    text = (ROOT / "docs/development.md").read_text()
    for name in PROFILES:
        assert f"`{name}`" in text
    assert with_profile("simulator") == SKAFFOLD


@pytest.mark.parametrize(("profile", "target"), [("simulator", "dev"), ("staging", "production")])
def test_the_target_that_is_built_exists(profile: str, target: str) -> None:
    (artifact,) = with_profile(profile)["build"]["artifacts"]
    docker = artifact["docker"]
    assert docker["target"] == target
    dockerfile = (ROOT / artifact.get("context", ".") / docker["dockerfile"]).read_text()
    assert re.search(rf"^FROM \S+ AS {target}$", dockerfile, re.MULTILINE)


def test_every_source_file_is_synced_to_where_the_image_has_it() -> None:
    (artifact,) = SKAFFOLD["build"]["artifacts"]
    (rule,) = artifact["sync"]["manual"]
    found = {path.relative_to(ROOT).as_posix() for path in ROOT.glob(rule["src"])}
    everything = {p.relative_to(ROOT).as_posix() for p in (ROOT / "service").rglob("*.py")}
    assert found == everything
    assert "service/__main__.py" in found
    assert "strip" not in rule  # so a file keeps its path below the destination
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert f"WORKDIR {rule['dest']}\n" in dockerfile
    assert "service service\n" in dockerfile
    assert "sync" not in with_profile("staging")["build"]["artifacts"][0]


@pytest.mark.parametrize("profile", PROFILES)
def test_every_file_and_every_value_exists(profile: str) -> None:
    ours = release(with_profile(profile))
    assert ROOT / ours["chartPath"] == CHART
    known = set(paths(load(CHART / "values.yaml")))
    assert set(ours["setValues"]) | set(ours["setValueTemplates"]) <= known
    for other in with_profile(profile)["deploy"]["helm"]["releases"]:
        for file in other["valuesFiles"]:
            assert isinstance(load(ROOT / file), dict)


@pytest.mark.parametrize("profile", PROFILES)
def test_what_is_installed_is_good(profile: str) -> None:
    whole = with_profile(profile)
    check_schema(rendered(whole))
    taken = check_environment(rendered(whole).environment())
    assert (taken.openai_api_key is not None) == (profile == "openai")


@pytest.mark.parametrize("where", REFERENCES)
def test_the_pods_run_what_was_built(where: str) -> None:
    repository, tag, digest = reference = REFERENCES[where]
    wanted = f"{repository}@{digest}" if digest else f"{repository}:{tag}"
    assert rendered(SKAFFOLD, reference).server["image"] == wanted


def test_a_tag_is_never_a_number() -> None:
    prefix = SKAFFOLD["build"]["tagPolicy"]["gitCommit"]["prefix"]
    image = rendered(SKAFFOLD, ("weir", f"{prefix}1234567", "")).server["image"]
    assert image == f"weir:{prefix}1234567"
    assert prefix.startswith("git")


@pytest.mark.parametrize("profile", PROFILES)
def test_forwards_go_to_ports_that_exist_and_from_this_machine_alone(profile: str) -> None:
    whole = with_profile(profile)
    ports = {
        (service["metadata"]["name"], port["port"])
        for service in rendered(whole).all("Service")
        for port in service["spec"]["ports"]
    }
    local = {}
    for forward in whole["portForward"]:
        assert forward["address"] == "127.0.0.1"
        assert forward["resourceType"] == "service"
        local[forward["localPort"]] = (forward["resourceName"], forward["port"])
    assert local.pop(3000, None) == (("monitoring-grafana", 80) if profile == "full" else None)
    assert set(local) == {8000, 9000}
    assert set(local.values()) <= ports


def test_the_parts_of_full_are_pinned_and_come_before_weir() -> None:
    first, *others = with_profile("full")["deploy"]["helm"]["releases"]
    assert first["dependsOn"] == ["monitoring"]
    assert [other["remoteChart"] for other in others] == ["kube-prometheus-stack", "tempo", "loki", "alloy"]
    for other in others:
        assert re.fullmatch(r"\d+\.\d+\.\d+", other["version"])
        assert other["repo"].startswith("https://")
    kinds = {thing["kind"] for thing in rendered(with_profile("full")).objects}
    assert "ServiceMonitor" in kinds
    assert "ServiceMonitor" not in {thing["kind"] for thing in rendered(SKAFFOLD).objects}


def test_the_parts_of_full_are_found_by_the_names_that_weir_uses() -> None:
    releases = {r["name"]: r for r in with_profile("full")["deploy"]["helm"]["releases"]}
    taken = check_environment(rendered(with_profile("full")).environment())
    assert taken.otel_exporter_otlp_endpoint is not None
    assert str(taken.otel_exporter_otlp_endpoint).rstrip("/") == "http://tempo:4318"
    grafana = load(ROOT / releases["monitoring"]["valuesFiles"][0])["grafana"]
    for source in grafana["additionalDataSources"]:
        assert re.fullmatch(r"http://(tempo:3200|loki:3100)", source["url"])
    alloy = load(ROOT / releases["alloy"]["valuesFiles"][0])["alloy"]["configMap"]["content"]
    assert "http://loki:3100/loki/api/v1/push" in alloy
    assert {"tempo", "loki"} <= set(releases)


def test_the_sidecar_of_grafana_finds_the_dashboards() -> None:
    chart = load(CHART / "values.yaml")["dashboards"]
    sidecar = load(ROOT / "deploy/dev/full/monitoring.yaml")["grafana"]["sidecar"]["dashboards"]
    assert (sidecar["label"], sidecar["labelValue"]) == (chart["label"], chart["labelValue"])


def test_verify_runs_a_command_that_exists(capsys: pytest.CaptureFixture[str]) -> None:
    (case,) = SKAFFOLD["verify"]
    command = case["container"]["command"]
    assert command[:3] == ["python3", "-m", "service"]
    assert case["container"]["image"] == SKAFFOLD["build"]["artifacts"][0]["image"]
    with pytest.raises(SystemExit) as ended:
        main([*command[3:], "--help"])
    assert ended.value.code == 0
    assert "service smoke" in capsys.readouterr().out


def test_verifys_pod_reaches_weir_and_has_its_key() -> None:
    (case,) = SKAFFOLD["verify"]
    job = load(ROOT / case["executionMode"]["kubernetesCluster"]["jobManifestPath"])
    check_schema(Rendered(yaml.safe_dump(job), (job,)))
    assert job["metadata"]["labels"]
    spec = job["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    assert container["name"] == case["container"]["name"]
    whole = rendered(SKAFFOLD)
    ports = {s["metadata"]["name"]: s["spec"]["ports"][0]["port"] for s in whole.all("Service")}
    variables = {v["name"]: v for v in container["env"]}
    assert variables["WEIR_URL"]["value"] == "http://weir"
    assert ports["weir"] == 80
    assert variables["WEIR_ADMIN_URL"]["value"] == f"http://weir-metrics:{ports['weir-metrics']}"
    reference = variables["WEIR_API_KEY"]["valueFrom"]["secretKeyRef"]
    assert reference["key"] in whole.one("Secret", reference["name"])["data"]


def test_verifys_pod_is_as_restricted_as_the_charts() -> None:
    job = load(ROOT / "deploy/dev/smoke-job.yaml")
    spec = job["spec"]["template"]["spec"]
    test = next(o for o in render().all("Pod") if o["metadata"]["name"].endswith("-test-chat"))
    for field in ("runAsNonRoot", "runAsUser", "seccompProfile"):
        assert spec["securityContext"][field] == test["spec"]["securityContext"][field]
    ours, theirs = (s["containers"][0]["securityContext"] for s in (spec, test["spec"]))
    assert ours["capabilities"] == theirs["capabilities"]
    assert ours["allowPrivilegeEscalation"] is False
    assert ours["readOnlyRootFilesystem"] is True
    labels = job["spec"]["template"]["metadata"]["labels"]
    assert labels.items() <= test["metadata"]["labels"].items()
