"""Where the process stands, and how the parts fare."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from service import lifecycle
from service.domain import Operation, RequestRecord
from service.errors import (
    RateLimited,
    UpstreamRateLimited,
    UpstreamRejected,
    UpstreamTimeout,
    UpstreamUnavailable,
    WeirError,
)
from service.health import UpstreamHealth, UpstreamState
from service.lifecycle import Lifecycle
from tests.unit.ports import Clock


@pytest.mark.parametrize(
    ("started", "draining", "ready"),
    [(False, False, False), (True, False, True), (True, True, False), (False, True, False)],
)
def test_ready_is_started_and_not_draining(started: bool, draining: bool, ready: bool) -> None:
    state = Lifecycle()
    state.started, state.draining = started, draining
    assert state.ready is ready
    assert state.alive, "draining is no illness"


def test_a_loop_that_beats_no_more_is_neither_alive_nor_ready() -> None:
    state = Lifecycle(liveness_timeout_seconds=0.0)
    state.started = True
    assert not state.alive
    assert not state.ready


async def test_the_loop_beats_and_tells_its_lag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "BEAT_SECONDS", 0.0)
    told: list[float] = []
    beaten: list[Lifecycle] = []
    thrice = asyncio.Event()

    def tell(lag: float) -> None:
        told.append(lag)
        if len(told) == 3:
            thrice.set()

    state = Lifecycle(on_beat=beaten.append)
    first = state._beat_at
    beating = asyncio.create_task(state.beat(tell))
    await thrice.wait()
    beating.cancel()
    assert state._beat_at > first
    assert beaten[:3] == [state] * 3
    assert told[0] == 0.0
    assert all(lag >= 0 for lag in told)


async def test_a_blocked_loop_shows_as_lag(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("service.lifecycle.time", SimpleNamespace(monotonic=clock))
    monkeypatch.setattr(lifecycle, "BEAT_SECONDS", 0.0)
    told: list[float] = []
    done = asyncio.Event()

    def tell(lag: float) -> None:
        told.append(lag)
        clock.now += 3.0  # what a blocking call does to the time
        if len(told) == 2:
            done.set()

    state = Lifecycle()
    beating = asyncio.create_task(state.beat(tell))
    await done.wait()
    beating.cancel()
    assert told[1] == 3.0


# -- upstreams -----------------------------------------------------------------------------------


def attempt_at(upstream: str) -> RequestRecord:
    return RequestRecord("1", "r", "/v1/x", Operation.CHAT, upstream=upstream)


def test_an_upstream_is_unused_until_it_was_asked() -> None:
    assert UpstreamHealth([("a", "direct")]).states == {"a": UpstreamState("direct", "unused")}


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, "ok"),
        (UpstreamRejected(400, {}), "ok"),
        (UpstreamUnavailable("no"), "failing"),
        (UpstreamTimeout("late"), "failing"),
        (UpstreamRateLimited("slow down"), "failing"),
    ],
)
def test_the_last_attempt_tells_how_an_upstream_fares(error: WeirError | None, status: str) -> None:
    clock = Clock(77.0)
    health = UpstreamHealth([("a", "direct"), ("b", "direct")], clock)
    health.attempted(attempt_at("a"), error)
    state = health.states["a"]
    assert state.status == status
    assert (state.last_success_at, state.last_failure_at) == (
        (77.0, None) if status == "ok" else (None, 77.0)
    )
    assert health.states["b"].status == "unused"


def test_a_success_after_a_failure_is_ok_and_the_failure_is_remembered() -> None:
    health = UpstreamHealth([("a", "direct")], Clock())
    health.attempted(attempt_at("a"), UpstreamUnavailable("no"))
    health.attempted(attempt_at("a"), None)
    assert (health.states["a"].status, health.states["a"].last_failure) == ("ok", "openai_service_error")


def test_an_upstream_that_is_not_there_is_not_noted() -> None:
    health = UpstreamHealth([("a", "direct")])
    health.attempted(attempt_at("other"), RateLimited("x"))
    assert list(health.states) == ["a"]
