"""Fixtures that most tests share: a fake upstream, and a whole Weir in front of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck
from hypothesis import settings as properties

from tests.fakes.upstream import FakeUpstream
from tests.running import RunningWeir, configuration

# Properties are tried without a look at the clock: a slow machine breaks none of them.
properties.register_profile("weir", deadline=None, suppress_health_check=[HealthCheck.too_slow])
properties.load_profile("weir")


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the person who runs the tests gets in."""
    from service.config import Settings

    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def upstream() -> Iterator[FakeUpstream]:
    with FakeUpstream() as fake:
        yield fake
        assert fake.errors == []


@pytest.fixture
def weir(upstream: FakeUpstream) -> Iterator[RunningWeir]:
    """Weir with the fake upstream behind it, without retries, its deadlines short."""
    with RunningWeir(
        configuration(
            openai_base_url=upstream.base_url,
            openai_api_key="sk-upstream-secret",
            openai_max_retries=0,
            openai_timeout=5.0,
            stream_idle_timeout=0.5,
            stream_keepalive=0.1,
        )
    ) as running:
        yield running
