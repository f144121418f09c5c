"""Traces: one span for each request to a model, by OpenTelemetry's GenAI conventions.

The SDK is loaded only where a collector is configured. Export runs in a thread of its own and never
holds up a request. Prompts and answers are never recorded.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote

from service.config import Settings
from service.domain import Outcome, RequestRecord

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.sampling import Sampler
    from opentelemetry.trace import Span

_TRACEPARENT: Final = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}")
_NANOSECONDS: Final = 1_000_000_000


class NoTracing:
    """No collector: the caller's trace id still goes into the log."""

    def opened(self, record: RequestRecord, traceparent: str | None) -> None:
        record.trace_id = trace_id_of(traceparent)

    def closed(self, record: RequestRecord) -> None: ...

    def close(self) -> None: ...


class Tracing:
    """Spans to an OTLP collector over HTTP."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("weir")
        self._open: dict[str, Span] = {}

    def opened(self, record: RequestRecord, traceparent: str | None) -> None:
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        parent = None
        if traceparent:
            parent = TraceContextTextMapPropagator().extract({"traceparent": traceparent})
        span = self._tracer.start_span(
            record.operation.genai_name,
            context=parent,
            kind=SpanKind.CLIENT,
            start_time=int(record.started_at * _NANOSECONDS),
        )
        record.trace_id = f"{span.get_span_context().trace_id:032x}"
        self._open[record.id] = span

    def closed(self, record: RequestRecord) -> None:
        from opentelemetry.trace import Status, StatusCode

        span = self._open.pop(record.id, None)
        if span is None:
            return
        if span.is_recording():
            span.update_name(f"{record.operation.genai_name} {record.request_model}".strip())
            span.set_attributes(_attributes(record))
            if record.outcome is not Outcome.SUCCESS:
                span.set_status(Status(StatusCode.ERROR, record.error_code))
        span.end(int((record.started_at + record.duration_seconds) * _NANOSECONDS))

    def close(self) -> None:
        self._provider.shutdown()


def make_tracing(settings: Settings, version: str) -> NoTracing | Tracing:
    endpoint = settings.traces_endpoint
    if endpoint is None:
        return NoTracing()
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    secret = settings.otel_exporter_otlp_headers
    attributes = {
        **_pairs(settings.otel_resource_attributes),
        "service.name": settings.otel_service_name,
        "service.version": version,
    }
    provider = TracerProvider(
        sampler=_sampler(settings), resource=Resource(attributes), shutdown_on_exit=False
    )
    headers = _pairs(secret.get_secret_value()) if secret else None
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint, headers=headers)))
    return Tracing(provider)


def trace_id_of(traceparent: str | None) -> str | None:
    """The trace id of a W3C traceparent header; None if it is not one."""
    match = _TRACEPARENT.fullmatch(traceparent) if traceparent else None
    return match[1] if match else None


def _sampler(settings: Settings) -> Sampler:
    from opentelemetry.sdk.trace import sampling

    name = settings.otel_traces_sampler
    root: Sampler
    if name.endswith("always_off"):
        root = sampling.ALWAYS_OFF
    elif name.endswith("traceidratio"):
        root = sampling.TraceIdRatioBased(settings.otel_traces_sampler_arg)
    else:
        root = sampling.ALWAYS_ON
    return sampling.ParentBased(root) if name.startswith("parentbased_") else root


def _attributes(record: RequestRecord) -> dict[str, Any]:
    usage = record.usage
    attributes: dict[str, Any] = {
        "gen_ai.operation.name": record.operation.genai_name,
        "gen_ai.provider.name": record.provider,
        "gen_ai.request.model": record.request_model,
        "gen_ai.request.stream": record.stream,
        "gen_ai.response.id": record.response_id,
        "gen_ai.response.model": record.response_model,
        "gen_ai.response.finish_reasons": (record.finish_reason,) if record.finish_reason else None,
        "gen_ai.response.time_to_first_chunk": record.time_to_first_token_seconds,
        "gen_ai.usage.input_tokens": usage.input_tokens if usage else None,
        "gen_ai.usage.output_tokens": usage.output_tokens if usage else None,
        "error.type": None if record.outcome is Outcome.SUCCESS else record.error_code,
        "weir.outcome": record.outcome.value,
        "weir.request_id": record.request_id,
        "weir.tenant": record.principal.tenant,
        "weir.cost_usd": record.cost.usd,
    }
    return {name: value for name, value in attributes.items() if value not in (None, "")}


def _pairs(text: str) -> dict[str, str]:
    """`key=value,key=value` as OTEL_* settings write it, percent-encoded."""
    pairs = (part.partition("=") for part in text.split(",") if "=" in part)
    return {unquote(name.strip()): unquote(value.strip()) for name, _, value in pairs}
