"""Real Redis in its three forms: started once, and empty at the start of each test that uses it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.redis_servers import ClusterSet, SentinelSet, Servers, Single

FORMS = ("redis_single", "redis_sentinel", "redis_cluster")


@pytest.fixture(scope="session")
def redis_single() -> Iterator[Single]:
    with Single() as servers:
        yield servers


@pytest.fixture(scope="session")
def redis_sentinel() -> Iterator[SentinelSet]:
    with SentinelSet() as servers:
        yield servers


@pytest.fixture(scope="session")
def redis_cluster() -> Iterator[ClusterSet]:
    with ClusterSet() as servers:
        yield servers


@pytest.fixture(autouse=True)
def _empty_redis(request: pytest.FixtureRequest) -> None:
    """For tests that name a form themselves: whatever the last test did to it, it is whole and empty."""
    for form in FORMS:
        if form in request.fixturenames:
            _emptied(request, form)


@pytest.fixture(params=FORMS)
def redis_servers(request: pytest.FixtureRequest) -> Servers:
    """Each form in turn, whole and empty."""
    return _emptied(request, request.param)


@pytest.fixture
def redis_url(redis_servers: Servers) -> str:
    """Each form's address, as REDIS_URL takes it."""
    return redis_servers.url


def _emptied(request: pytest.FixtureRequest, form: str) -> Servers:
    servers: Servers = request.getfixturevalue(form)
    servers.restore()
    servers.flush()
    return servers
