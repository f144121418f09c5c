"""kube-score and checkov on what is rendered; each finding that stays stands here with its reason."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.chart.rendering import render
from tests.programs import need

CASES = ("default", "full", "worker")

NO_CPU_LIMIT = "Throttling is latency: memory is limited, CPU is requested. `resources.limits.cpu` sets one."
KEPT_IMAGES = "IfNotPresent lets pods start while the registry is away; a digest names what runs."
SCRATCH = "The emptyDirs have a size limit, and with a read-only root nothing else can be written."
SHORT_LIVED = "A pod of `helm test`: it asks a few questions and ends."

SCORE: dict[tuple[str, str], str] = {
    ("container-resources", "CPU limit is not set"): NO_CPU_LIMIT,
    ("container-image-pull-policy", "ImagePullPolicy is not set to Always"): KEPT_IMAGES,
    ("container-ephemeral-storage-request-and-limit", "Ephemeral Storage limit is not set"): SCRATCH,
    ("container-ephemeral-storage-request-and-limit", "Ephemeral Storage request is not set"): SCRATCH,
    ("pod-networkpolicy", "The pod does not have a matching NetworkPolicy"): SHORT_LIVED,
    (
        "deployment-replicas",
        "Deployment few replicas",
    ): "The worker: what it has not copied waits in Redis, and whoever takes its place goes on there.",
    (
        "deployment-has-host-podantiaffinity",
        "Deployment does not have a host podAntiAffinity set",
    ): "Topology spread does it, over hosts and zones, and each rollout by itself.",
    (
        "container-security-context-user-group-id",
        "The container is running with a low user ID",
    ): "The official Redis image's own user is 999.",
    (
        "container-security-context-user-group-id",
        "The container running with a low group ID",
    ): "The official Redis image's own group is 999.",
    (
        "statefulset-has-servicename",
        "StatefulSet does not have a valid serviceName",
    ): "It wants a headless Service. Redis is one pod behind an address that stays when the pod moves.",
}

CHECKOV: dict[str, str] = {
    "CKV_K8S_8": SHORT_LIVED + " Nothing waits for its probes.",
    "CKV_K8S_9": SHORT_LIVED + " Nothing waits for its probes.",
    "CKV2_K8S_6": SHORT_LIVED,
    "CKV_K8S_11": NO_CPU_LIMIT,
    "CKV_K8S_15": KEPT_IMAGES,
    "CKV_K8S_21": "The objects of `extraObjects` take the release's namespace when they are installed.",
    "CKV_K8S_35": "Weir reads OPENAI_API_KEY and REDIS_URL; callers' keys come as a file of hashes.",
    "CKV_K8S_40": "The official Redis image's own user is 999.",
    "CKV_K8S_43": "A chart that is made before its image cannot know the digest: `image.digest`.",
}


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("manifests")
    paths = [folder / f"{case}.yaml" for case in CASES]
    for case, path in zip(CASES, paths, strict=True):
        path.write_text(render(case=case).text)
    return paths


def run(*command: str, good: tuple[int, ...] = (0, 1)) -> Any:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in good, done.stderr
    return json.loads(done.stdout)


def score(path: Path) -> list[tuple[str, str, str]]:
    """The findings of kube-score: the object, the check, its words."""
    optional = ("container-seccomp-profile", "container-ports-check")
    options = [word for name in optional for word in ("--enable-optional-test", name)]
    found = run(
        need("kube-score"), "score", "--kubernetes-version", "v1.34", "-o", "json", *options, str(path)
    )
    assert found
    return [
        (thing["object_name"], check["check"]["id"], comment["summary"])
        for thing in found
        for check in thing["checks"]
        if not check["skipped"] and check["grade"] < 10
        for comment in check["comments"]
    ]


def test_kube_score_finds_nothing_but_what_is_explained(manifests: list[Path]) -> None:
    findings = [finding for path in manifests for finding in score(path)]
    assert [f for f in findings if f[1:] not in SCORE] == []
    assert {f[1:] for f in findings} == set(SCORE), "an explanation that nothing needs"


def test_kube_score_is_awake(tmp_path: Path) -> None:
    path = tmp_path / "bare.yaml"
    path.write_text(render({"securityContext": None, "probes": {"liveness": {"periodSeconds": 3}}}).text)
    assert "container-security-context-readonlyrootfilesystem" in {check for _, check, _ in score(path)}


def checkov(*paths: Path) -> dict[str, set[str]]:
    """The findings of checkov: by check, the objects."""
    files = [word for path in paths for word in ("-f", str(path))]
    quiet = ("--quiet", "--compact", "--skip-download", "-o", "json")
    report = run(need("checkov"), *files, "--framework", "kubernetes", *quiet)
    assert report["summary"]["parsing_errors"] == 0
    assert report["summary"]["passed"] > 100
    findings: dict[str, set[str]] = {}
    for failed in report["results"]["failed_checks"]:
        findings.setdefault(failed["check_id"], set()).add(f"{failed['check_name']}: {failed['resource']}")
    return findings


def test_checkov_finds_nothing_but_what_is_explained(manifests: list[Path]) -> None:
    findings = checkov(*manifests)
    assert {check: where for check, where in findings.items() if check not in CHECKOV} == {}
    assert set(findings) == set(CHECKOV), "an explanation that nothing needs"
    for check in ("CKV_K8S_8", "CKV_K8S_9", "CKV2_K8S_6"):
        assert all("-test-" in where for where in findings[check])


def test_checkov_is_awake(tmp_path: Path) -> None:
    path = tmp_path / "bare.yaml"
    path.write_text(render({"securityContext": None}).text)
    assert "CKV_K8S_22" in checkov(path)
