"""Traces: the spans of requests that are sampled, by OpenTelemetry's conventions, to an OTLP collector.

The SDK is loaded only where a collector is configured. Export runs in a thread of its own and never
holds up a request. Of prompts and answers spans hold nothing, unless an operator asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final, Protocol

from service.config import Configuration, Settings
from service.ports import Trace
from service.tracing.w3c import Propagation


class Work(Protocol):
    """A piece of work that no request asked for, while it runs."""

    def note(self, **attributes: Any) -> None: ...


class Tracing(Protocol):
    """Where traces begin."""

    def begin(self, headers: Mapping[bytes, bytes]) -> Trace | None:
        """The trace of a request with these headers; None where it has none."""
        ...

    def work(self, name: str) -> AbstractContextManager[Work]:
        """A span of its own over a block of code."""
        ...

    def know(self, configuration: Configuration) -> None:
        """By this configuration from now on, as far as it may change."""
        ...

    def close(self) -> None:
        """Send what waits, for a few seconds at the most."""
        ...


class NoTracing:
    """No collector: the caller's trace still goes into the log and on to upstreams."""

    def __init__(self, propagation: Propagation) -> None:
        self._propagation = propagation

    def begin(self, headers: Mapping[bytes, bytes]) -> Trace | None:
        carrier = self._propagation.read(headers)
        if carrier.parent is None:
            return Trace("", headers=carrier.headers) if carrier.headers else None
        return Trace(carrier.parent.trace_id, headers=carrier.headers)

    def work(self, name: str) -> AbstractContextManager[Work]:
        return _NOT_NOTED

    def know(self, configuration: Configuration) -> None: ...

    def close(self) -> None: ...


class _NotNoted:
    def note(self, **attributes: Any) -> None: ...


_NOT_NOTED: Final = nullcontext(_NotNoted())
NO_TRACING: Final = NoTracing(Propagation(()))
"""For what runs without settings."""


def make_tracing(settings: Settings, version: str, dropped: Callable[[int], None]) -> Tracing:
    """`dropped` is told of spans that the collector never gets, from any thread."""
    propagation = Propagation(settings.otel_propagators)
    endpoint = settings.traces_endpoint
    if endpoint is None:
        return NoTracing(propagation)
    from service.tracing.export import make_export
    from service.tracing.sdk import SdkTracing

    return SdkTracing(settings, version, make_export(settings, endpoint, dropped), propagation)
