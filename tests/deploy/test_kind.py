"""deploy/kind: the script runs the commands that it should; stand-ins for the programs write them down."""

from __future__ import annotations

import os
import subprocess
from itertools import pairwise
from pathlib import Path

from tests.deploy.rendering import DEPLOY, check_schema, load, render
from tests.programs import need
from tests.running import ROOT

SCRIPT = DEPLOY / "kind/up.sh"
CLUSTER = load(DEPLOY / "kind/cluster.yaml")


def commands(tmp_path: Path, clusters: str) -> list[list[str]]:
    """What up.sh runs where `kind get clusters` says `clusters`."""
    environment = stand_ins(tmp_path, clusters)
    subprocess.run([SCRIPT], env=environment, check=True, capture_output=True, text=True)
    written = tmp_path / "commands"
    return [line.split("\x1f")[:-1] for line in written.read_text().splitlines()]


def stand_ins(tmp_path: Path, clusters: str = "") -> dict[str, str]:
    """An environment in which each program only writes down what it was told."""
    written = tmp_path / "commands"
    for name in ("docker", "kind", "helm", "kubectl"):
        program = tmp_path / name
        program.write_text(
            f'#!/bin/sh\nprintf "%s\\037" {name} "$@" >>"{written}"; echo >>"{written}"\n'
            f'[ "$1 $2" != "get clusters" ] || echo "{clusters}"\n'
        )
        program.chmod(0o755)
    return os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}


def test_it_builds_creates_loads_installs_and_waits(tmp_path: Path) -> None:
    ran = [" ".join(command[:3]) for command in commands(tmp_path, "other")]
    assert ran == [
        "docker build --tag",
        "kind get clusters",
        "kind create cluster",
        "kind load docker-image",
        "helm upgrade --install",
        "kubectl --context kind-weir",
    ]


def test_run_again_it_keeps_the_cluster(tmp_path: Path) -> None:
    assert not [c for c in commands(tmp_path, CLUSTER["name"]) if c[:3] == ["kind", "create", "cluster"]]


def test_it_never_touches_another_cluster(tmp_path: Path) -> None:
    for command in commands(tmp_path, "other"):
        if command[0] in ("helm", "kubectl"):
            assert any("context" in word for word in command)
            assert "kind-weir" in command


def test_what_it_installs_is_good_and_reached_at_the_port_that_is_mapped(tmp_path: Path) -> None:
    ran = commands(tmp_path, "other")
    (install,) = [command for command in ran if command[0] == "helm"]
    sets = dict(word.split("=", 1) for flag, word in pairwise(install) if flag in ("--set", "--set-string"))
    rendered = render(sets=sets)
    check_schema(rendered)
    (built,) = [command[3] for command in ran if command[0] == "docker"]
    assert rendered.server["image"] == built
    assert rendered.server["imagePullPolicy"] == "Never"
    (mapping,) = CLUSTER["nodes"][0]["extraPortMappings"]
    (port,) = rendered.one("Service", "weir")["spec"]["ports"]
    assert port["nodePort"] == mapping["containerPort"]
    assert mapping["listenAddress"] == "127.0.0.1"
    assert f"http://127.0.0.1:{mapping['hostPort']};" in SCRIPT.read_text()


def test_the_command_for_the_tests_names_the_images_that_the_nodes_have_or_can_pull(tmp_path: Path) -> None:
    (built,) = [command[3] for command in commands(tmp_path, "other") if command[0] == "docker"]
    redis = load(ROOT / "helm/weir/values.yaml")["redis"]["embedded"]["image"]
    ran = subprocess.run([SCRIPT], env=stand_ins(tmp_path), check=True, capture_output=True, text=True)
    (line,) = [line.strip() for line in ran.stdout.splitlines() if line.endswith("make e2e")]
    assert line.split() == [
        "KUBECONFIG=$HOME/.kube/config",
        f"E2E_IMAGE={built}",
        f"E2E_REDIS_IMAGE={redis['repository'].removeprefix('library/')}:{redis['tag']}",
        "E2E_PULL_POLICY=IfNotPresent",
        *("make", "e2e"),
    ]
    # Docs that show a command show this one.
    assert line in (ROOT / "docs/e2e.md").read_text()


def test_two_workers_are_in_two_zones() -> None:
    workers = [node for node in CLUSTER["nodes"] if node["role"] == "worker"]
    zones = [worker["labels"]["topology.kubernetes.io/zone"] for worker in workers]
    assert len(zones) == len(set(zones)) == 2


def test_shellcheck_finds_nothing() -> None:
    scripts = [SCRIPT, ROOT / "deploy/compose/init.sh", ROOT / ".ci/run"]
    subprocess.run([need("shellcheck"), *scripts], check=True, cwd=ROOT)
