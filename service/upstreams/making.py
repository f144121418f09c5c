"""The upstreams of the configuration, each made by its kind."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from genai_prices.data_snapshot import get_snapshot

from service.config import Configuration, UpstreamConfig, UpstreamKind
from service.ports import Upstream
from service.upstreams.direct import DirectUpstream
from service.upstreams.simulator import SimulatorUpstream


def make_upstreams(configuration: Configuration) -> dict[str, Upstream]:
    """The upstreams of the configuration by name. Raises ConfigurationError for a missing key."""
    return {u.name: make_upstream(u, configuration) for u in configuration.upstreams}


def parts_of(config: UpstreamConfig, configuration: Configuration) -> tuple[Any, ...]:
    """All that its client is made of beside the settings: while they are the same, so may the client be."""
    return (
        *(config.name, config.kind, config.base_url, config.provider, config.api_version),
        config.connect_timeout,
        configuration.api_keys(config),
    )


def make_upstream(config: UpstreamConfig, configuration: Configuration) -> Upstream:
    settings = configuration.settings
    if config.kind is UpstreamKind.SIMULATOR or config.base_url is None:
        return SimulatorUpstream(config.name, tokens_per_second=settings.simulator_tokens_per_second)
    keys = configuration.api_keys(config)
    connect = config.connect_timeout or settings.upstream_connect_timeout
    provider = config.provider or _provider_at(config.base_url)
    if config.kind is UpstreamKind.DIRECT:
        return DirectUpstream(
            config.name,
            provider=provider,
            base_url=config.base_url,
            api_keys=keys,
            connect_timeout_seconds=connect,
            max_connections=settings.upstream_max_connections,
        )
    # The SDK takes 14 MB and a second to load: only where it is asked for.
    from service.upstreams.openai_sdk import OpenAISDKUpstream

    azure = config.kind is UpstreamKind.AZURE
    return OpenAISDKUpstream(
        config.name,
        provider=config.provider or ("azure" if azure else provider),
        base_url=config.base_url,
        api_key=keys[0] if keys else None,
        api_version=config.api_version if azure else None,
        connect_timeout_seconds=connect,
    )


def _provider_at(base_url: str) -> str:
    """The provider's name in the price table; the host for one that is not in it, so it is unpriced."""
    try:
        return get_snapshot().find_provider(None, None, base_url).id
    except LookupError:
        return urlsplit(base_url).hostname or "unknown"
