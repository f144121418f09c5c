"""New versions, changes of the configuration and the way back, while requests and long streams run.

On 192 MiB of memory for each pod, on the chart's own times, with clients that try nothing twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from tests.e2e.cluster import Images, Release, namespace
from tests.e2e.conftest import Ended, LoadPod, Report

MEMORY = 192
LOAD = {"whole": 40, "fresh": 8, "streams": 80, "stream_tokens": 200, "words": 1}
"""The streams are of twenty seconds: longer than a pod is told to wait before it counts what still runs."""
SMALL = ("--set", f"resources.limits.memory={MEMORY}Mi", "--set", "settings.SIMULATOR_TOKENS_PER_SECOND=10")


@pytest.fixture(scope="module")
def release(images: Images) -> Iterator[Release]:
    with namespace("weir-e2e-rollouts") as name:
        release = Release(name, images)
        release.install(*SMALL)
        yield release


def under_load(
    release: Release, load: LoadPod, times: int, change: Callable[[int], object]
) -> tuple[Ended, float]:
    """What a load saw while `change` was made so many times; and the seconds that one took on the average.

    Each change replaces every pod: one that replaced none would lose nothing either.
    """
    with load.on(release, **LOAD) as running:
        spent = 0.0
        for number in range(times):
            before, began = release.identities(), time.monotonic()
            change(number)
            spent += time.monotonic() - began
            assert release.identities().isdisjoint(before), "every pod was replaced"
        ended = running.stop()
    return ended, spent / times


def test_rolling_upgrades_lose_nothing(
    release: Release, load: LoadPod, rollouts: int, report: Report
) -> None:
    def upgrade(number: int) -> None:
        release.upgrade(*SMALL, "--set-string", f"podAnnotations.rollout={number}")

    ended, seconds = under_load(release, load, rollouts, upgrade)
    report.row(f"{rollouts} rolling upgrades under load", ended, seconds=seconds, more=pace(ended))
    assert ended.failures() == []
    assert ended.sent("stream") >= LOAD["streams"]


def test_changes_of_the_configuration_lose_nothing(
    release: Release, load: LoadPod, rollouts: int, report: Report
) -> None:
    def configure(number: int) -> None:
        config = f"config.upstreams[0].name=sim{number},config.upstreams[0].kind=simulator"
        release.upgrade(*SMALL, "--set", config)
        assert release.upstreams() == {f"sim{number}": "simulator"}

    ended, seconds = under_load(release, load, rollouts, configure)
    report.row(
        f"{rollouts} changes of the configuration under load", ended, seconds=seconds, more=pace(ended)
    )
    assert ended.failures() == []


def test_the_way_back_loses_nothing(release: Release, load: LoadPod, rollouts: int, report: Report) -> None:
    """Each goes to the revision before, so one after the other swings to and fro."""
    release.upgrade(*SMALL, "--set-string", "podAnnotations.rollout=there")
    release.upgrade(*SMALL, "--set-string", "podAnnotations.rollout=back")
    ended, seconds = under_load(release, load, rollouts, lambda _: release.rollback())
    report.row(f"{rollouts} rollbacks by helm under load", ended, seconds=seconds, more=pace(ended))
    assert ended.failures() == []


def test_memory_holds_under_load(release: Release, load: LoadPod, report: Report) -> None:
    """Bodies of 64 kB on top of all that came before, and no container was ever started again."""
    callers = {"whole": 24, "fresh": 8, "streams": 40, "stream_tokens": 100, "words": 1}
    with load.on(release, **callers, body_bytes=64_000, enough=2_000) as running:
        ended = running.stop()
    most = max(release.peak_memory(name) for name in release.names())
    restarts = release.restarts()
    report.row(
        f"load with bodies of 64 kB on {MEMORY} MiB a pod",
        ended,
        more=f"{most / 2**20:.0f} MiB resident at the peak, {len(restarts)} containers restarted",
    )
    assert ended.failures() == []
    assert most < MEMORY * 2**20
    assert restarts == {}


def pace(ended: Ended) -> str:
    median, late = (ended.milliseconds("whole", share) for share in (0.5, 0.99))
    gap = ended.tallies["whole"].longest_gap_seconds
    return f"p50 {median:.0f} ms, p99 {late:.0f} ms, longest pause between two answers {gap:.2f} s"
