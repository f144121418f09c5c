"""Installed with no values by somebody who reads what it says, and taken away again."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from service.auth import hash_key
from tests.e2e.cluster import Images, Release, get, namespace, objects, run, until
from tests.e2e.conftest import LoadPod, Report
from tests.e2e.volume import volume
from tests.programs import need
from tests.running import free_port

BY_HAND = "secret/weir-openai"
"""What the notes let their reader make."""


class Installed(NamedTuple):
    release: Release
    notes: str
    before: set[str]
    """The namespace's objects before the release came."""


@pytest.fixture(scope="module")
def installed(images: Images) -> Iterator[Installed]:
    with namespace("weir-e2e-install") as name:
        release, before = Release(name, images), objects(name)
        yield Installed(release, release.install(), before)


def commands_in(notes: str) -> list[str]:
    return [line.strip() for line in notes.splitlines() if line.startswith("    ")]


def test_it_installs_into_a_restricted_namespace_without_a_warning(images: Images, report: Report) -> None:
    with namespace("weir-e2e-fresh") as name:
        before = objects(name)
        release = Release(name, images)
        began = time.monotonic()
        release.install()
        report.row("install with no values, until all pods are ready", seconds=time.monotonic() - began)
        rendered = run("helm", "get", "manifest", "weir", "-n", name)
        told = subprocess.run(
            ["kubectl", "apply", "--dry-run=server", "-n", name, "-f", "-"],
            input=rendered,
            capture_output=True,
            text=True,
            check=True,
        )
        assert "violate" not in told.stderr  # Pod Security warns there
        release.uninstall()
        release.all_pods_gone()
        until("nothing but what was there", lambda: objects(name) == before)


def test_the_pods_run_as_the_chart_promises(installed: Installed, load: LoadPod, report: Report) -> None:
    release = installed.release
    for pod in release.pods():
        name = pod["metadata"]["name"]
        shown = release.kubectl("exec", name, "--", "python3", "-c", "import os; print(os.getuid())")
        assert shown.strip() == "10001"
        wrote = subprocess.run(
            ["kubectl", "-n", release.namespace, "exec", name, "--", "python3", "-c", "open('/app/x', 'w')"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert "Read-only file system" in wrote.stderr
        token = "import os; print(os.path.exists('/var/run/secrets/kubernetes.io/serviceaccount'))"
        assert release.kubectl("exec", name, "--", "python3", "-c", token).strip() == "False"
        (status,) = pod["status"]["containerStatuses"]
        assert status["imageID"] in load.image, "the pods run the image that the report's head names"
    nodes = {pod["spec"]["nodeName"] for pod in release.pods()}
    report.row(
        "the pods as promised",
        more=f"user 10001, nothing can be written at /app, no token, {len(nodes)} nodes",
    )
    assert len(nodes) == min(2, len(get("nodes")["items"])), "spread over the nodes"


@pytest.mark.parametrize("helm", ["helm", "helm4"])
def test_helm_test_proves_it_from_inside(
    installed: Installed, images: Images, helm: str, report: Report
) -> None:
    release, where = installed.release, need(helm)
    began = time.monotonic()
    told = Release(release.namespace, images, helm=where).test()
    assert set(told) == {"auth", "chat", "stream", "conversation", "metrics"}
    assert "over 2 addresses" in told["conversation"]
    assert "2 of 2 addresses" in told["metrics"]
    report.row(
        f"`{helm} test`: key, chat, stream, metrics, a conversation over both pods",
        seconds=time.monotonic() - began,
    )
    left = release.kubectl("get", "pods", "-l", "app.kubernetes.io/component=test", "-o", "name")
    assert left == "", "the tests' pods are gone when they were good"


def test_each_line_of_the_notes_can_be_followed(installed: Installed, report: Report) -> None:
    release, notes, _ = installed
    commands = commands_in(notes)
    assert len(commands) >= 8, notes
    assert "SIMULATOR" in notes
    api, admin = free_port(), free_port()

    def local(command: str) -> str:
        """The same command, on ports that are free on the machine of the test."""
        ports = {" 8000:80": f" {api}:80", ":8000/": f":{api}/", " 9000:9000": f" {admin}:9000"}
        for theirs, ours in {**ports, ":9000/": f":{admin}/"}.items():
            command = command.replace(theirs, ours)
        return command

    key = next(c for c in commands if c.startswith("export WEIR_API_KEY"))
    forwards = [local(c).removesuffix(" &") for c in commands if "port-forward" in c]
    curls = [local(c) for c in commands if c.startswith("curl")]
    assert (len(forwards), len(curls)) == (2, 2)
    answers = []
    for forward, curl in zip(forwards, curls, strict=True):
        forwarding = subprocess.Popen(forward.split(), stdout=subprocess.PIPE, text=True)
        try:
            assert forwarding.stdout is not None
            assert "Forwarding from" in forwarding.stdout.readline()
            answers.append(run("bash", "-c", f"{key}\n{curl} -sf"))
        finally:
            forwarding.send_signal(signal.SIGTERM)
            forwarding.communicate()
    assert "simulator" in answers[0]
    assert "weir_build_info{" in answers[1]
    secret = next(c for c in commands if "create secret" in c).replace("sk-...", "sk-not-a-real-key")
    dashboards, model = (c for c in commands if c.startswith("helm upgrade"))
    run("bash", "-c", f"cd {release.root} && {dashboards}")
    shown = commands_in(run("helm", "get", "notes", "weir", "-n", release.namespace))
    assert "weir-dashboard-overview" in run("bash", "-c", next(c for c in shown if "get configmap" in c))
    run("bash", "-c", f"cd {release.root} && {secret} && {model}")
    release.rolled_out()
    assert "sk-not-a-real-key" not in run("helm", "get", "manifest", "weir", "-n", release.namespace)
    assert release.upstreams() == {"openai": "direct"}
    told = run("helm", "get", "notes", "weir", "-n", release.namespace)
    assert "SIMULATOR" not in told
    report.row(
        "the notes followed: key, forwards, calls, metrics, dashboards, another upstream",
        more=f"{len(commands)} lines with commands; `helm test` and `helm uninstall` have rows of their own",
    )


def until_all_pods_say(release: Release, status: int, key: str) -> float:
    """Seconds until each of them answers so to this key."""
    began = time.monotonic()
    for name in release.names():

        def says(name: str = name) -> bool:
            return release.status_of(name, key) == status

        # A kubelet brings a changed Secret into a pod within a minute and a half.
        until(f"{name} answers {status} to the key", says, seconds=150)
    return time.monotonic() - began


def test_keys_come_and_go_without_a_restart_and_nobody_else_gets_a_401(
    installed: Installed, load: LoadPod, report: Report
) -> None:
    """Callers with the first key go on while the Secret is changed below them, twice."""
    release = installed.release
    release.upgrade()
    key, before = release.key, release.identities()
    with load.on(release, whole=4, fresh=2, words=1) as running:
        release.upgrade(
            *("--set", "auth.keys[0].name=second,auth.keys[0].tenant=shop"),
            *("--set", f"auth.keys[0].sha256={hash_key('weir-second')}"),
        )
        come = until_all_pods_say(release, 200, "weir-second")
        assert {release.status_of(name, "weir-third") for name in release.names()} == {401}
        release.upgrade()
        gone = until_all_pods_say(release, 401, "weir-second")
        ended = running.stop()
    report.row("a second key, until all pods take it, without a restart", seconds=come)
    report.row(
        "that key withdrawn, until no pod takes it; callers with the first key meanwhile", ended, seconds=gone
    )
    assert ended.failures() == []
    assert release.key == key
    assert release.identities() == before, "no pod was restarted for a key"


def test_services_and_node_ports_are_reached_by_the_official_sdk(
    installed: Installed, load: LoadPod, report: Report
) -> None:
    release = installed.release
    release.upgrade("--set", "service.type=NodePort")
    port = release.get("service", "weir")["spec"]["ports"][0]["nodePort"]
    node = next(
        a["address"] for a in get("nodes")["items"][0]["status"]["addresses"] if a["type"] == "InternalIP"
    )
    for what, url in (
        ("Service", f"http://weir.{release.namespace}"),
        ("NodePort", f"http://{node}:{port}"),
    ):
        with load.on(release, url=url, sdk=2, sdk_retrying=2, stream_tokens=20, enough=20) as running:
            ended = running.stop()
        assert ended.failures() == []
        assert ended.sent("sdk_stream") >= 2
        report.row(f"chat and stream by the official SDK through the {what}", ended, more=ended.hidden())


def test_taken_away_by_the_line_in_the_notes_it_leaves_nothing(installed: Installed, report: Report) -> None:
    """The last of those that share this release."""
    release, notes, before = installed
    (uninstall,) = [c for c in commands_in(notes) if c.startswith("helm uninstall")]
    began = time.monotonic()
    run("bash", "-c", uninstall)
    release.all_pods_gone()
    left = before | (objects(release.namespace) & {BY_HAND})
    until("nothing but what was there, and what was made by hand", lambda: objects(release.namespace) == left)
    report.row("`helm uninstall` as the notes have it, until all is gone", seconds=time.monotonic() - began)


def test_a_volume_stays_until_the_line_in_the_notes_deletes_it(images: Images, report: Report) -> None:
    """And while it is there, an installation takes it up again with what is on it."""
    with namespace("weir-e2e-volume-kept") as name, volume(images, name) as values:
        before = objects(name)
        release = Release(name, images)
        release.install(*values)
        left = {*before, "persistentvolumeclaim/weir-redis"}
        redis = ("exec", "weir-redis-0", "--", "redis-cli")
        release.kubectl(*redis, "set", "kept", "yes")
        for time_of_it in ("first", "second"):
            commands = commands_in(run("helm", "get", "notes", "weir", "-n", name))
            (uninstall,) = [c for c in commands if c.startswith("helm uninstall")]
            (delete,) = [c for c in commands if "delete pvc" in c]
            assert release.kubectl(*redis, "get", "kept").strip() == "yes"
            run("bash", "-c", uninstall)
            release.all_pods_gone()
            until("the claim alone", lambda: objects(name) == left)
            if time_of_it == "first":
                release.install(*values)
        run("bash", "-c", delete)
        until("nothing but what was there", lambda: objects(name) == before)
        report.row("Redis' volume: kept, taken up again, deleted by the line in the notes")


def test_helm_4_installs_upgrades_rolls_back_and_takes_away(images: Images, report: Report) -> None:
    """It applies on the server's side, which refuses what Helm 3 lets pass: names that are there twice."""
    helm4 = need("helm4")
    with namespace("weir-e2e-helm4") as name:
        before = objects(name)
        release = Release(name, images, helm=helm4)
        began = time.monotonic()
        release.install()
        key = release.key
        release.upgrade("--set", "config.upstreams[0].name=other,config.upstreams[0].kind=simulator")
        assert release.upstreams() == {"other": "simulator"}
        release.rollback()
        assert release.upstreams() == {"simulator": "simulator"}
        assert release.key == key
        report.row("Helm 4: install, upgrade, rollback", seconds=time.monotonic() - began)
        release.uninstall()
        release.all_pods_gone()
        until("nothing but what was there", lambda: objects(name) == before)


def test_bad_values_are_refused_before_anything_is_installed(images: Images, report: Report) -> None:
    with namespace("weir-e2e-refused") as name:
        before = objects(name)
        told = subprocess.run(
            ["helm", "install", "weir", "helm/weir", "-n", name, "--set", "shutdown.gracePeriodSeconds=30"],
            capture_output=True,
            text=True,
            check=False,
            cwd=Release.root,
        )
        assert told.returncode != 0
        assert "shorter than the longest stream" in told.stderr
        assert not re.search("Traceback|nil pointer", told.stderr)
        assert objects(name) == before
        assert run("helm", "list", "--all", "-n", name, "--short") == ""
        report.row("bad values refused", more=told.stderr.strip().splitlines()[-1].strip(" -"))
