"""The autoscaler follows CPU, and requests in flight; on the way back it cuts no stream."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator

import pytest

from tests.e2e.cluster import Images, Release, kubectl, namespace, until
from tests.e2e.conftest import LoadPod, Report

MOST = 4
DOWN = "autoscaling.behavior.scaleDown"
VALUES = (
    *("--set", f"autoscaling.enabled=true,autoscaling.minReplicas=1,autoscaling.maxReplicas={MOST}"),
    # A test does not wait five minutes for calm.
    *("--set", f"{DOWN}.stabilizationWindowSeconds=10,{DOWN}.policies[0].value=100"),
    *("--set", f"{DOWN}.policies[0].type=Percent,{DOWN}.policies[0].periodSeconds=5"),
    *("--set", "settings.SIMULATOR_TOKENS_PER_SECOND=10"),
)
BY_CPU = ("--set", "autoscaling.targetCPUUtilizationPercentage=60")
TARGET = 15
"""Of requests in flight; so many streams are over all pods, whichever of them goes."""
BY_INFLIGHT = (
    *("--set", "autoscaling.targetCPUUtilizationPercentage=null"),
    *("--set", f"autoscaling.targetInflightPerPod={TARGET}"),
)


@pytest.fixture(scope="module")
def release(images: Images) -> Iterator[Release]:
    with namespace("weir-e2e-scaling") as name:
        release = Release(name, images)
        release.install(*VALUES, *BY_CPU)
        yield release


class Pods:
    """The pods of an autoscaled release, as one looks at them again and again."""

    def __init__(self, release: Release) -> None:
        self._release = release
        self.most = 0
        """The highest number of ready pods that was seen."""
        self.ending_held = 0.0
        """The most streams that were seen in pods on their way out."""

    def ready(self) -> int:
        count: int = self._release.get("deployment", "weir")["status"].get("readyReplicas", 0)
        self.most = max(self.most, count)
        return count

    def alone(self) -> bool:
        """One pod, and the autoscaler has a measurement to go by."""
        status = self._release.get("hpa", "weir")["status"]
        return self.ready() == 1 and bool(status.get("currentMetrics")) and status["desiredReplicas"] == 1

    def held(self) -> dict[str, float]:
        """Streams in flight by pod."""
        return {name: self._held_by(name) for name in self._release.names()}

    def spread(self, streams: int) -> int:
        """How many pods hold the load's streams; 0 while others run too, or not all of these."""
        held = self.held()
        return sum(number > 0 for number in held.values()) if sum(held.values()) == streams else 0

    def one_again(self) -> bool:
        one = self.ready() == 1  # first: whom it leaves out is then looked at
        for pod in self._release.pods(ending=True):
            self.ending_held = max(self.ending_held, self._held_by(pod["metadata"]["name"]))
        return one

    def _held_by(self, name: str) -> float:
        try:
            return self._release.metric(name, "weir_inflight_requests")
        except (AssertionError, subprocess.TimeoutExpired):
            return 0.0  # not there yet, or not any more


def told(pods: Pods, spread: int) -> str:
    return (
        f"from {pods.most} to 1 pod; the streams were in {spread} pods when it began, "
        f"{pods.ending_held:.0f} of them in pods that then ended"
    )


def test_it_scales_on_cpu_and_back_without_cutting_a_stream(
    release: Release, load: LoadPod, report: Report
) -> None:
    pods, streams = Pods(release), 8
    until("one pod, measured", pods.alone, seconds=180)
    with load.on(release, whole=48, words=1) as running:
        began = time.monotonic()
        until("more pods", lambda: pods.ready() > 1, seconds=180)
        out = time.monotonic() - began
        with load.on(release, streams=streams, stream_tokens=450) as streaming:
            loaded = running.stop()
            began = time.monotonic()
            spread = until("streams alone", lambda: pods.spread(streams))
            until("one pod again", pods.one_again, seconds=240)
            back = time.monotonic() - began
            ended = streaming.stop()
    report.row(
        "scale-out on CPU (60 %): the second pod ready", loaded, seconds=out, more=f"to {pods.most} pods"
    )
    report.row("scale-in with streams of 45 s running", ended, seconds=back, more=told(pods, spread))
    assert loaded.failures() == []
    assert ended.failures() == []
    assert spread > 1, "more than one pod held streams"
    assert pods.ending_held > 0, "a pod with streams was taken away"


def test_it_scales_on_requests_in_flight_and_back_without_cutting_a_stream(
    release: Release, load: LoadPod, report: Report
) -> None:
    if "custom.metrics.k8s.io/" not in kubectl("api-versions"):
        pytest.skip("this cluster has no adapter for custom metrics (custom.metrics.k8s.io)")
    release.upgrade(*VALUES, *BY_INFLIGHT)
    pods = Pods(release)
    until("one pod, measured", pods.alone, seconds=180)
    with load.on(release, streams=TARGET * MOST, stream_tokens=100) as many:
        began = time.monotonic()
        until(f"{MOST} pods", lambda: pods.ready() == MOST, seconds=180)
        out = time.monotonic() - began
        # As many as one pod is meant for, over pods that are all ready.
        with load.on(release, streams=TARGET, stream_tokens=600) as few:
            ended = many.stop()
            began = time.monotonic()
            spread = until("the few streams alone", lambda: pods.spread(TARGET))
            until("one pod again", pods.one_again, seconds=240)
            back = time.monotonic() - began
            stayed = few.stop()
    report.row(
        f"scale-out on requests in flight ({TARGET} a pod)", ended, seconds=out, more=f"from 1 to {MOST} pods"
    )
    report.row("scale-in with streams of 60 s running", stayed, seconds=back, more=told(pods, spread))
    assert ended.failures() == []
    assert stayed.failures() == []
    assert spread > 1, "more than one pod held streams"
    assert pods.ending_held > 0, "a pod with streams was taken away"
