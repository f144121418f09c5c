"""Which upstream serves which model: the catalogue of names, aliases and upstreams."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from genai_prices.data_snapshot import get_snapshot

from service.config import Configuration, UpstreamConfig, UpstreamKind
from service.errors import ModelNotFound
from service.ports import Target, Upstream
from service.upstreams.direct import DirectUpstream
from service.upstreams.simulator import SimulatorUpstream

_CLEAN_NAME = re.compile(r"[\x21-\x7e]{1,200}")


class ModelCatalogue:
    """The models of the YAML; without any there, every name goes to the first upstream."""

    def __init__(self, configuration: Configuration, upstreams: Mapping[str, Upstream]) -> None:
        counts = {u.name: u.stream_usage for u in configuration.upstreams}
        first = next(iter(upstreams))
        self._first = upstreams[first]
        self._first_counts = counts[first]
        self._targets = {
            name: Target(
                upstreams[model.upstream], model.upstream_model or model.name, counts[model.upstream]
            )
            for model in configuration.file.models
            for name in (model.name, *model.aliases)
        }

    def resolve(self, model: str) -> Target:
        target = self._targets.get(model)
        if target is not None:
            return target
        if self._targets:
            raise ModelNotFound(f"The model `{_clean(model)}` is not served here.", param="model")
        if not _CLEAN_NAME.fullmatch(model):
            raise ModelNotFound("The model's name holds letters that no model has.", param="model")
        return Target(self._first, model, self._first_counts)

    async def models(self) -> Sequence[dict[str, Any]]:
        if not self._targets:
            return await self._first.models()
        return [
            {"id": name, "object": "model", "created": 0, "owned_by": target.upstream.provider or "unknown"}
            for name, target in self._targets.items()
        ]


def make_upstreams(configuration: Configuration) -> dict[str, Upstream]:
    """The upstreams of the configuration by name. Raises ConfigurationError for a missing key."""
    return {u.name: _make(u, configuration) for u in configuration.upstreams}


def _make(config: UpstreamConfig, configuration: Configuration) -> Upstream:
    settings = configuration.settings
    if config.kind is UpstreamKind.SIMULATOR or config.base_url is None:
        return SimulatorUpstream(config.name, tokens_per_second=settings.simulator_tokens_per_second)
    key = configuration.api_key(config)
    provider = config.provider or _provider_at(config.base_url)
    if config.kind is UpstreamKind.DIRECT:
        return DirectUpstream(
            config.name,
            provider=provider,
            base_url=config.base_url,
            api_key=key,
            connect_timeout_seconds=settings.upstream_connect_timeout,
            max_connections=settings.upstream_max_connections,
        )
    # The SDK takes 14 MB and a second to load: only where it is asked for.
    from service.upstreams.openai_sdk import OpenAISDKUpstream

    azure = config.kind is UpstreamKind.AZURE
    return OpenAISDKUpstream(
        config.name,
        provider=config.provider or ("azure" if azure else provider),
        base_url=config.base_url,
        api_key=key,
        api_version=config.api_version if azure else None,
        connect_timeout_seconds=settings.upstream_connect_timeout,
    )


def _provider_at(base_url: str) -> str:
    """The provider's name in the price table; the host for one that is not in it, so it is unpriced."""
    try:
        return get_snapshot().find_provider(None, None, base_url).id
    except LookupError:
        return urlsplit(base_url).hostname or "unknown"


def _clean(model: str) -> str:
    return model if _CLEAN_NAME.fullmatch(model) else model.encode("unicode_escape").decode()[:200]
