"""Traces by OpenTelemetry's SDK. All that it could read from the environment is given to it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Final

from opentelemetry.context import Context
from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanLimits, TracerProvider, sampling
from opentelemetry.sdk.trace.id_generator import IdGenerator, RandomIdGenerator
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    TraceFlags,
    TraceState,
    set_span_in_context,
)

from service.config import Configuration, Settings
from service.ports import Trace
from service.tracing import Work
from service.tracing.attributes import servers
from service.tracing.content import Content
from service.tracing.export import Export
from service.tracing.pairs import pairs
from service.tracing.redaction import Redaction
from service.tracing.spans import RequestSpans, Scene, Step
from service.tracing.w3c import Parent, Propagation

MOST_ATTRIBUTES: Final = 64
MOST_EVENTS: Final = 16
MOST_LETTERS: Final = 1024 * 1024
"""Of one attribute: more than OTEL_SPAN_CONTENT_BYTES can be, for JSON that is cut is none."""
_ROOT: Final = Context()
_SPAN_BEFORE_ITS_NAME: Final = "request"


class SdkTracing:
    """See `Tracing`."""

    def __init__(self, settings: Settings, version: str, export: Export, propagation: Propagation) -> None:
        self._ids = _Ids()
        self._sampler = _sampler(settings)
        self._provider = _provider(settings, version, self._ids)
        self._provider.add_span_processor(export)
        self._tracer = self._provider.get_tracer("weir")
        self._propagation = propagation
        self._settings = settings
        self._scene = Scene(self._tracer, tells_upstreams=propagation.context)

    def begin(self, headers: Mapping[bytes, bytes]) -> Trace:
        carrier = self._propagation.read(headers)
        if carrier.parent is None:
            above, trace_id = _ROOT, self._ids.generate_trace_id()
        else:
            above, trace_id = _context(carrier.parent), int(carrier.parent.trace_id, 16)
        # Asked here, not by the tracer: a request that is not sampled would cost three times as much.
        chosen = self._sampler.should_sample(above, trace_id, _SPAN_BEFORE_ITS_NAME)
        if chosen.decision is not sampling.Decision.RECORD_AND_SAMPLE:
            return Trace(f"{trace_id:032x}", headers=carrier.headers)
        self._ids.next = trace_id
        span = self._tracer.start_span(_SPAN_BEFORE_ITS_NAME, above, SpanKind.SERVER)
        spans = RequestSpans(self._scene, span, carrier.baggage)
        return Trace(f"{trace_id:032x}", f"{span.get_span_context().span_id:016x}", spans=spans)

    def work(self, name: str) -> AbstractContextManager[Work]:
        return Step(self._tracer, name, _ROOT)

    def know(self, configuration: Configuration) -> None:
        settings = self._settings
        self._scene.servers = servers(configuration)
        if settings.otel_instrumentation_genai_capture_message_content == "span_only":
            redaction = Redaction(configuration.file.tracing.redact)
            self._scene.content = Content(settings.otel_span_content_bytes, redaction)

    def close(self) -> None:
        self._provider.shutdown()


class _Ids(RandomIdGenerator):
    """Random ones, but for a trace whose id is known already: `next`, once."""

    next: int | None = None

    def generate_trace_id(self) -> int:
        known, self.next = self.next, None
        return super().generate_trace_id() if known is None else known


def _provider(settings: Settings, version: str, ids: IdGenerator) -> TracerProvider:
    attributes = {
        "service.name": settings.otel_service_name,
        **pairs(settings.otel_resource_attributes),
        "service.version": version,
    }
    if "otel_service_name" in settings.model_fields_set:  # the default alone gives way to service.name there
        attributes["service.name"] = settings.otel_service_name
    return TracerProvider(
        sampler=sampling.ALWAYS_ON,  # whoever comes here was chosen
        id_generator=ids,
        resource=Resource(attributes),
        span_limits=SpanLimits(
            max_span_attributes=MOST_ATTRIBUTES,
            max_attributes=MOST_ATTRIBUTES,
            max_events=MOST_EVENTS,
            max_links=1,
            max_event_attributes=MOST_EVENTS,
            max_link_attributes=MOST_EVENTS,
            max_attribute_length=MOST_LETTERS,
            max_span_attribute_length=MOST_LETTERS,
        ),
        meter_provider=NoOpMeterProvider(),
        shutdown_on_exit=False,
    )


def _sampler(settings: Settings) -> sampling.Sampler:
    name = settings.otel_traces_sampler
    root: sampling.Sampler
    if name.endswith("always_off"):
        root = sampling.ALWAYS_OFF
    elif name.endswith("traceidratio"):
        root = sampling.TraceIdRatioBased(settings.otel_traces_sampler_arg)
    else:
        root = sampling.ALWAYS_ON
    return sampling.ParentBased(root) if name.startswith("parentbased_") else root


def _context(parent: Parent) -> Context:
    """The caller's span as one that ours may be below."""
    state = TraceState.from_header([parent.state]) if parent.state else None
    span = SpanContext(
        int(parent.trace_id, 16), int(parent.span_id, 16), True, TraceFlags(parent.flags), state
    )
    return set_span_in_context(NonRecordingSpan(span), _ROOT)
