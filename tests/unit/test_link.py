"""What of the link to Redis no real server shows on demand: how its answers and addresses are read."""

from __future__ import annotations

import time

import pytest
from redis import exceptions as known
from structlog.testing import capture_logs

from service.errors import StateRefused
from service.stores.redis.address import _hosts, make_client
from service.stores.redis.link import LATE_IN_A_ROW, Link


def link() -> Link:
    client = make_client("redis://h", timeout_seconds=0.1, max_connections=1)
    made = Link(client, prefix="weir:", timeout_seconds=0.1, max_connections=1)
    made._open = False
    return made


@pytest.mark.parametrize(
    "error",
    [
        known.ConnectionError("secret.host:6379 refused"),
        ConnectionRefusedError(111, "secret.host"),
        known.AuthenticationError("invalid secret"),
        known.BusyLoadingError("loading"),
        known.MaxConnectionsError("secret"),
        known.ReadOnlyError("You can't write"),
        known.OutOfMemoryError("command not allowed"),
        known.MasterDownError("link"),
        known.ClusterDownError("The cluster is down"),
        known.TryAgainError("Multiple keys"),
        known.MovedError("3999 secret.host:6379"),
        known.RedisClusterException("secret"),
        known.ResponseError("MISCONF Redis is configured"),
        known.ResponseError("NOREPLICAS Not enough good replicas"),
        known.ResponseError("BUSY Redis is busy running a script."),
        known.ResponseError("LOADING Redis is loading"),
    ],
    ids=lambda error: f"{type(error).__name__} {error}"[:30],
)
def test_a_server_that_can_do_nothing_is_away_at_once(error: Exception) -> None:
    one = link()
    with capture_logs() as lines:
        for _ in range(3):
            told = one._failed(error, time.monotonic(), "weir:{t}:k")
            assert not isinstance(told, StateRefused)
            assert "secret" not in told.message
    assert not one.available
    assert [line["event"] for line in lines] == ["redis_unavailable"]
    assert "secret" not in str(lines)


@pytest.mark.parametrize(
    "error",
    [
        known.ResponseError("WRONGTYPE Operation against a key holding the wrong kind of value"),
        known.ResponseError("BUSYGROUP Consumer Group name already exists"),
        known.NoPermissionError("this user has no permissions"),
    ],
    ids=str,
)
def test_a_server_that_refuses_one_command_is_well(error: Exception) -> None:
    one = link()
    for _ in range(LATE_IN_A_ROW):
        assert isinstance(one._failed(error, 0.0, "k"), StateRefused)
    assert one.available


def test_late_is_late_whoever_noticed_it() -> None:
    one = link()
    late = (known.TimeoutError("redis-py"), TimeoutError("asyncio"), known.TimeoutError("redis-py"))
    for error in late:
        assert one.available
        one._failed(error, time.monotonic(), "k")
    assert not one.available


def test_calls_that_met_one_pause_together_are_late_once() -> None:
    one, began = link(), time.monotonic()
    for _ in range(10):
        one._failed(TimeoutError(), began, "k")
    assert one.available


def test_the_probe_asks_where_a_call_failed() -> None:
    one = link()
    assert one._probe_key == "weir:probe"
    one._failed(TimeoutError(), 0.0, "weir:{a tenant}:conv:x:y")
    assert one._probe_key == "weir:{a tenant}:probe"


@pytest.mark.parametrize(
    ("netloc", "hosts"),
    [
        ("h", [("h", 1)]),
        ("u:p%40:@h:7,h2", [("h", 7), ("h2", 1)]),
        ("[::1]:7,[::2]", [("::1", 7), ("::2", 1)]),
    ],
)
def test_hosts_and_ports(netloc: str, hosts: list[tuple[str, int]]) -> None:
    assert _hosts(netloc, 1) == hosts
