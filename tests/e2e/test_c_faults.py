"""A pod is killed, a process crashes, a node is drained, Redis dies: who notices, and for how long."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.cluster import Images, Release, kubectl, namespace, until
from tests.e2e.conftest import Ended, LoadPod, Report, Running
from tests.e2e.volume import volume

LOAD = {"whole": 12, "streams": 12, "sdk": 6, "sdk_retrying": 6, "stream_tokens": 250, "words": 1}
VALUES = ("--set", "settings.SIMULATOR_TOKENS_PER_SECOND=25", "--set", "resources.limits.memory=192Mi")
TYPED = {"ServerDisconnectedError", "ClientOSError", "ClientConnectorError", "ClientPayloadError"}
"""How aiohttp tells that a connection broke: never an answer that only looks whole."""
TYPED_BY_THE_SDK = {"APIConnectionError", "RemoteProtocolError", "ReadError"}
"""The same for the official SDK; inside a stream it lets its transport's own errors through."""

CLOCKS_SECONDS = 1.0
"""By which the clock of the load generator's node may go before this machine's."""
HEARTBEAT_SECONDS = 0.5
"""The age that `weir_inflight_requests` may have."""


@pytest.fixture(scope="module")
def release(images: Images) -> Iterator[Release]:
    with namespace("weir-e2e-faults") as name:
        release = Release(name, images)
        release.install(*VALUES)
        yield release


class Victim:
    """A pod that is about to end, what it held, and how its fellows fare."""

    def __init__(self, release: Release) -> None:
        self._release = release
        self.pod = release.pods()[0]
        self.name: str = self.pod["metadata"]["name"]
        self._before = {name: release.outcomes(name) for name in release.names() if name != self.name}
        self.held = 0.0
        self.looked = 0.0

    def look(self, running: Running) -> float:
        """How many calls it holds, once the gauge knows all callers; to be asked right before its end."""
        self.looked = time.time()
        if self.looked < running.since + 2 * HEARTBEAT_SECONDS:
            return 0.0
        self.held = self._release.metric(self.name, "weir_inflight_requests")
        return self.held

    def others(self) -> Counter[str]:
        """How all calls ended that other processes had since; those that are new began from nothing."""
        ended: Counter[str] = Counter()
        for name in self._release.names():
            ended += self._release.outcomes(name) - self._before.get(name, Counter())
        return ended

    def assert_it_alone_failed(self, ended: Ended) -> None:
        """What failed is no more than what was in it, and nobody else has had a call that ended badly."""
        assert set(self.others()) == {"success"}, self.others()
        streams = ended.failures("stream", "sdk_stream")
        # The gauge is of the last heartbeat, so it does not know those that have just begun.
        known = [f for f in streams if f.began < self.looked - HEARTBEAT_SECONDS]
        assert 0 < len(known) <= self.held, "none were cut, or more than the pod held"
        assert len(ended.failures("whole")) <= LOAD["whole"], "a caller failed more than once"
        assert ended.failures("sdk_retrying") == [], "the SDK's own retries cover whole answers"

    def told(self, ended: Ended, killed: float) -> str:
        last = max((f.began for f in ended.failures()), default=killed) - killed
        return (
            f"{self.held:.0f} calls were in it; the last call that failed began {last:+.2f} s from the kill; "
            f"{kinds(ended)}; {ended.hidden()}; "
            f"the other pods: {sum(self.others().values()):,} calls, all of them good"
        )


def test_of_a_killed_pod_only_its_own_calls_fail(release: Release, load: LoadPod, report: Report) -> None:
    """Deleted by force, which leaves it two seconds of the hundred and twenty that its streams may want."""
    release.rolled_out()
    victim = Victim(release)
    with load.on(release, **LOAD) as running:
        until("calls in the pod", partial(victim.look, running))
        killed = time.time()
        release.delete_by_force(victim.name)
        release.rolled_out()
        recovered = time.time() - killed
        ended = running.stop()
    report.row("a pod deleted by force", ended, seconds=recovered, more=victim.told(ended, killed))
    assert_typed(ended)
    victim.assert_it_alone_failed(ended)
    assert max(f.began for f in ended.failures()) - killed < 1.0, (
        "a new call failed later than a second after"
    )


def test_after_a_crash_the_others_serve_and_the_sdk_notices_nothing(
    release: Release, load: LoadPod, report: Report
) -> None:
    """SIGKILL to the process: Kubernetes hears of it afterwards, so new calls are refused for a moment.

    Longer than the SDK's two tries more last, when both meet the same pod: so it is told to try five times.
    How long that is, is Kubernetes' affair; it is over once the process is there again, at the same address.
    """
    release.rolled_out()
    victim = Victim(release)
    process = process_of(victim.pod)
    if process is None:
        pytest.skip("the node's processes are not this machine's: nobody here can send it a SIGKILL")
    with load.on(release, **LOAD, sdk_max_retries=5) as running:
        until("calls in the pod", partial(victim.look, running))
        killed = time.time()
        try:
            os.kill(process, signal.SIGKILL)
        except PermissionError:
            pytest.skip("the pod's process is another user's: only root can send it a SIGKILL")
        until("the container is back", lambda: restarts(release, victim.name) > 0)
        release.kubectl("wait", f"pod/{victim.name}", "--for=condition=Ready", "--timeout=120s")
        back = time.time()
        until("calls in the new process", partial(release.metric, victim.name, "weir_inflight_requests"))
        ended = running.stop()
    report.row("a process killed by SIGKILL", ended, seconds=back - killed, more=victim.told(ended, killed))
    assert_typed(ended)
    assert ended.failures(), "it was killed under load"
    assert max(f.began for f in ended.failures()) < back + CLOCKS_SECONDS, (
        "a call failed that began when it was back"
    )
    assert set(victim.others()) == {"success"}, "another process had a call that ended badly"
    assert ended.failures("sdk_retrying") == [], "the SDK's own retries cover whole answers"


def test_a_drained_node_loses_nothing(release: Release, load: LoadPod, report: Report) -> None:
    release.rolled_out()
    nodes = {pod["spec"]["nodeName"] for pod in release.pods()}
    others = nodes - {load.node}
    if not others:
        pytest.skip("all pods are on the node of the load generator")
    node = min(others)
    selector = f"--pod-selector=app.kubernetes.io/instance={release.name}"
    try:
        with load.on(release, **LOAD) as running:
            began = time.monotonic()
            # Only Weir's pods: the lab's single DNS server is not what is tested here.
            kubectl(
                "drain", node, selector, "--ignore-daemonsets", "--delete-emptydir-data", "--timeout=200s"
            )
            seconds = time.monotonic() - began
            release.rolled_out()
            ended = running.stop()
    finally:
        kubectl("uncordon", node)
    allowed = release.pods()[0]["spec"]["terminationGracePeriodSeconds"] + 10
    report.row(
        "a node drained, with the PDB", ended, seconds=seconds, more=f"allowed: {allowed} s; {ended.hidden()}"
    )
    assert ended.failures() == []
    assert ended.tallies["sdk_retrying"].retries == 0, "the SDK had nothing to cover"
    assert seconds <= allowed
    assert {pod["spec"]["nodeName"] for pod in release.pods()}.isdisjoint({node})


def test_two_drains_at_once_wait_for_each_other(release: Release, report: Report) -> None:
    """The PDB, seen from its own side: with one of two pods gone the other one may not be evicted."""
    release.rolled_out()
    budget = until(
        "the PDB knows both pods", lambda: release.get("pdb", "weir")["status"].get("disruptionsAllowed")
    )
    assert budget == 1
    first, second = release.names()
    assert evict(release, first) == ""
    refusal = evict(release, second)
    assert "disruption budget" in refusal
    release.rolled_out()
    report.row("two drains at once: the second one waits", more=refusal.strip().splitlines()[-1][-120:])


def test_redis_comes_back_with_what_it_knew(images: Images, load: LoadPod, report: Report) -> None:
    """Its process ends, then its pod is killed: conversations are there again, and /v1 never fails.

    Meanwhile a call that names a conversation is answered or told when to come again.
    """
    with namespace("weir-e2e-redis") as name, volume(images, name) as persistent:
        release = Release(name, images)
        release.install(*VALUES, *persistent)
        conversation = hold_a_conversation(release, load)
        held = show(release, load, conversation)
        assert len(held) == 2 * TURNS
        assert redis(release, "waitaof", "1", "0", "5000").split()[0] == "1"
        for what, kill in (
            (
                "Redis' process ended without saving",
                partial(redis, release, "shutdown", "nosave", check=False),
            ),
            ("Redis' pod deleted by force", partial(release.delete_by_force, "weir-redis-0")),
        ):
            until("all pods have Redis", lambda: degraded(release) == 0)
            with load.on(release, whole=12, streams=6, stream_tokens=100, conversations=6) as running:
                before, began = redis_container(release), time.monotonic()
                kill()
                until("a new container", partial(redis_is_new, release, before))
                until("Weir has found it", lambda: degraded(release) == 0)
                seconds = time.monotonic() - began
                ended = running.stop()
            put_off = ended.tallies["conversation"].put_off
            kept = show(release, load, conversation)
            report.row(
                what,
                ended,
                seconds=seconds,
                more=f"the conversation had {len(held)} messages and has {len(kept)}; "
                f"turns told to come again: {put_off}",
            )
            assert kept == held
            assert ended.failures() == []
            assert put_off, "the outage was met by those who talked"


TURNS = 3


def hold_a_conversation(release: Release, load: LoadPod) -> str:
    said = {"message": "What is a weir?", "model": "sim-long", "max_tokens": 8}
    for _ in range(TURNS):
        ((status, answer),) = load.ask(f"{release.address}/api/v1/chat", release.key, said)
        assert status == 200, answer
        said["conversation_id"] = answer["conversation_id"]
    return str(said["conversation_id"])


def show(release: Release, load: LoadPod, conversation: str) -> list[dict[str, Any]]:
    ((status, shown),) = load.ask(f"{release.address}/api/v1/conversations/{conversation}", release.key)
    assert status == 200, shown
    messages: list[dict[str, Any]] = shown["messages"]
    return messages


def degraded(release: Release) -> float:
    """How many features do without Redis, over all pods."""
    return sum(release.metric(name, "weir_degraded") for name in release.names())


def redis(release: Release, *arguments: str, check: bool = True) -> str:
    ended = subprocess.run(
        ["kubectl", "-n", release.namespace, "exec", "weir-redis-0", "--", "redis-cli", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0 or not check, ended.stderr
    return ended.stdout.strip()


def redis_container(release: Release) -> str:
    """The id of Redis' container while it is ready, else nothing."""
    found = release.get("pods", "-l", "app.kubernetes.io/component=redis")["items"]
    states = [state for pod in found for state in pod["status"].get("containerStatuses", [])]
    return next((str(state["containerID"]) for state in states if state["ready"]), "")


def redis_is_new(release: Release, before: str) -> bool:
    now = redis_container(release)
    return now not in ("", before) and redis(release, "ping", check=False) == "PONG"


def restarts(release: Release, pod: str) -> int:
    count: int = release.get("pod", pod)["status"]["containerStatuses"][0]["restartCount"]
    return count


def evict(release: Release, pod: str) -> str:
    """Ask for an eviction as a drain does; what was said against it."""
    about = {"name": pod, "namespace": release.namespace}
    eviction = json.dumps({"apiVersion": "policy/v1", "kind": "Eviction", "metadata": about})
    path = f"/api/v1/namespaces/{release.namespace}/pods/{pod}/eviction"
    ended = subprocess.run(
        ["kubectl", "create", "--raw", path, "-f", "-"],
        input=eviction,
        capture_output=True,
        text=True,
        check=False,
    )
    return ended.stderr


def process_of(pod: dict[str, Any]) -> int | None:
    """Weir's process in this pod, where the node is this machine itself."""
    uid = pod["metadata"]["uid"]
    for path in Path("/proc").glob("[0-9]*"):
        try:
            cgroup, command = (path / "cgroup").read_text(), (path / "cmdline").read_bytes()
        except OSError:
            continue
        if uid in cgroup.replace("_", "-") and b"service" in command:
            return int(path.name)
    return None


def assert_typed(ended: Ended) -> None:
    """Each failure is an error that its client raises by itself: no answer ended as if it were whole."""
    assert {f.kind for f in ended.failures("whole", "fresh", "stream")} <= TYPED
    assert {f.kind for f in ended.failures("sdk_stream", "sdk_retrying")} <= TYPED_BY_THE_SDK


def kinds(ended: Ended) -> str:
    counted: dict[str, int] = {}
    for failure in ended.failures():
        counted[failure.kind] = counted.get(failure.kind, 0) + 1
    return ", ".join(f"{number} {kind}" for kind, number in sorted(counted.items())) or "none"
