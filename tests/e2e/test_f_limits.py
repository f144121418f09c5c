"""A limit that holds over all pods: Redis counts once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from service.auth import hash_key
from tests.e2e.cluster import Images, Release, namespace
from tests.e2e.conftest import LoadPod, Report

LIMIT = 20
WINDOW_SECONDS = 3600
"""So long that it gives nothing back while the test runs: one request in three minutes."""
ATTEMPTS = 60
KEYS = ("weir-e2e-over-both", "weir-e2e-one-then-the-other")
VALUES = (
    *("--set", f"settings.RATE_LIMIT_REQUESTS={LIMIT},settings.RATE_LIMIT_WINDOW={WINDOW_SECONDS}"),
    *(
        word
        for place, key in enumerate(KEYS)
        for word in (
            *("--set", f"auth.keys[{place}].name={key},auth.keys[{place}].tenant=shop"),
            *("--set", f"auth.keys[{place}].sha256={hash_key(key)}"),
        )
    ),
)
QUESTION = {"model": "simulator", "max_tokens": 1, "messages": [{"role": "user", "content": "Hello!"}]}


@pytest.fixture(scope="module")
def release(images: Images) -> Iterator[Release]:
    with namespace("weir-e2e-limits") as name:
        release = Release(name, images)
        release.install(*VALUES)
        yield release


def statuses(load: LoadPod, url: str, key: str, times: int) -> list[int]:
    return [status for status, _ in load.ask(f"{url}/v1/chat/completions", key, QUESTION, times=times)]


def test_helm_test_meets_the_limit(release: Release, report: Report) -> None:
    told = release.test()
    report.row("`helm test` where a limit is set", more=told.get("limit", "nothing was said of the limit"))
    assert len(told) == 6
    assert f"of a limit of {LIMIT} got 429" in told["limit"]


def test_over_both_pods_as_many_get_through_as_the_limit_says(
    release: Release, load: LoadPod, report: Report
) -> None:
    before = {name: release.outcomes(name) for name in release.names()}
    answers = statuses(load, release.address, KEYS[0], ATTEMPTS)
    admitted = {name: (release.outcomes(name) - counted)["success"] for name, counted in before.items()}
    report.row(
        f"{ATTEMPTS} attempts over both pods against a limit of {LIMIT}",
        more=f"{answers.count(200)} were admitted: {' and '.join(map(str, admitted.values()))}",
    )
    assert answers == [200] * LIMIT + [429] * (ATTEMPTS - LIMIT)
    assert len(admitted) == 2
    assert all(admitted.values()), "both pods took part"


def test_what_one_pod_let_through_counts_in_the_other(
    release: Release, load: LoadPod, report: Report
) -> None:
    """A share of the limit for each pod would let half of it through here, and half of it there."""
    one, other = (f"http://{pod['status']['podIP']}:8000" for pod in release.pods())
    first, second = (statuses(load, url, KEYS[1], LIMIT) for url in (one, other))
    report.row(
        f"a limit of {LIMIT} used up at one pod",
        more=f"{first.count(200)} were admitted there, and then {second.count(200)} at the other one",
    )
    assert first == [200] * LIMIT
    assert second == [429] * LIMIT
