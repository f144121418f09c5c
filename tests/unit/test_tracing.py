"""Spans as a collector on a real socket gets them."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from service.domain import Cost, Operation, Outcome, Principal, RequestRecord, Usage
from service.tracing import NoTracing, Tracing, make_tracing, trace_id_of
from tests.fakes.upstream import FakeUpstream
from tests.running import RunningWeir, configuration, settings

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED, NOT_SAMPLED = f"00-{TRACE}-{PARENT}-01", f"00-{TRACE}-{PARENT}-00"


class Collector:
    """An OTLP receiver: keeps what it is sent."""

    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        self.raw = b""
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                collector.raw += body
                collector.requests.append(ExportTraceServiceRequest.FromString(body))
                collector.headers.append({k.lower(): v for k, v in self.headers.items()})
                collector.paths.append(self.path)
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None: ...  # noqa: A002

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    @property
    def spans(self) -> list[Span]:
        return [
            span
            for request in self.requests
            for of_resource in request.resource_spans
            for of_scope in of_resource.scope_spans
            for span in of_scope.spans
        ]

    def resource(self) -> dict[str, Any]:
        return plain(self.requests[0].resource_spans[0].resource.attributes)

    def stop(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


def plain(attributes: Any) -> dict[str, Any]:
    """OTLP's attributes as a dictionary."""
    return {a.key: value_of(a.value) for a in attributes}


def value_of(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [value_of(item) for item in value.array_value.values]
    return getattr(value, kind)


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.stop()


def record(**fields: Any) -> RequestRecord:
    known: dict[str, Any] = {
        "id": "1",
        "request_id": "req-1",
        "route": "/v1/chat/completions",
        "operation": Operation.CHAT,
    }
    return RequestRecord(**known | fields)


def traced(
    collector: Collector, *records: RequestRecord, traceparent: str | None = None, **more: Any
) -> None:
    """The records from opening to end, and everything sent."""
    tracing = make_tracing(settings(otel_exporter_otlp_endpoint=collector.url, **more), "1.2.3")
    for each in records:
        tracing.opened(each, traceparent)
        tracing.closed(each)
    tracing.close()


def test_a_record_becomes_a_span(collector: Collector) -> None:
    done = record(
        started_at=1_700_000_000.0,
        duration_seconds=2.5,
        outcome=Outcome.SUCCESS,
        principal=Principal("key", "team-a"),
        request_model="gpt-4o",
        response_model="gpt-4o-2024-11-20",
        response_id="chatcmpl-1",
        provider="openai",
        stream=True,
        finish_reason="stop",
        usage=Usage(100, 50),
        cost=Cost(0.5, "flat"),
        time_to_first_token_seconds=0.25,
    )
    traced(collector, done)
    (span,) = collector.spans
    assert span.name == "chat gpt-4o"
    assert span.kind == Span.SPAN_KIND_CLIENT
    assert span.start_time_unix_nano == 1_700_000_000_000_000_000
    assert span.end_time_unix_nano - span.start_time_unix_nano == 2_500_000_000
    assert span.parent_span_id == b""
    assert span.status.code == Status.STATUS_CODE_UNSET
    assert plain(span.attributes) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": "gpt-4o",
        "gen_ai.request.stream": True,
        "gen_ai.response.id": "chatcmpl-1",
        "gen_ai.response.model": "gpt-4o-2024-11-20",
        "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.response.time_to_first_chunk": 0.25,
        "gen_ai.usage.input_tokens": 100,
        "gen_ai.usage.output_tokens": 50,
        "weir.outcome": "success",
        "weir.request_id": "req-1",
        "weir.tenant": "team-a",
        "weir.cost_usd": 0.5,
    }
    assert done.trace_id == span.trace_id.hex()


def test_a_failure_is_an_error_of_the_span(collector: Collector) -> None:
    traced(collector, record(outcome=Outcome.TIMEOUT, error_code="api_timeout"))
    (span,) = collector.spans
    assert (span.status.code, span.status.message) == (Status.STATUS_CODE_ERROR, "api_timeout")
    attributes = plain(span.attributes)
    assert (attributes["error.type"], attributes["weir.outcome"]) == ("api_timeout", "timeout")


@pytest.mark.parametrize(
    ("operation", "name"),
    [
        (Operation.CHAT, "chat m"),
        (Operation.RESPONSES, "chat m"),
        (Operation.TEXT_COMPLETION, "text_completion m"),
        (Operation.EMBEDDINGS, "embeddings m"),
    ],
)
def test_a_span_is_named_for_operation_and_model(
    collector: Collector, operation: Operation, name: str
) -> None:
    traced(collector, record(operation=operation, request_model="m"))
    assert collector.spans[0].name == name


def test_the_callers_trace_goes_on(collector: Collector) -> None:
    done = record()
    traced(collector, done, traceparent=SAMPLED)
    (span,) = collector.spans
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    assert done.trace_id == TRACE


@pytest.mark.parametrize("traceparent", ["nonsense", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", ""])
def test_a_traceparent_that_is_none_begins_a_trace(collector: Collector, traceparent: str) -> None:
    done = record()
    traced(collector, done, traceparent=traceparent)
    (span,) = collector.spans
    assert span.parent_span_id == b""
    assert done.trace_id == span.trace_id.hex() != "0" * 32


@pytest.mark.parametrize(
    ("sampler", "share", "traceparent", "spans"),
    [
        ("always_on", 1.0, NOT_SAMPLED, 1),
        ("always_off", 1.0, SAMPLED, 0),
        ("traceidratio", 0.0, SAMPLED, 0),
        ("traceidratio", 1.0, NOT_SAMPLED, 1),
        ("parentbased_always_on", 1.0, None, 1),
        ("parentbased_always_on", 1.0, NOT_SAMPLED, 0),
        ("parentbased_always_off", 1.0, None, 0),
        ("parentbased_always_off", 1.0, SAMPLED, 1),
        ("parentbased_traceidratio", 0.0, None, 0),
        ("parentbased_traceidratio", 0.0, SAMPLED, 1),
        ("parentbased_traceidratio", 1.0, None, 1),
    ],
)
def test_the_sampler_decides_what_is_sent_and_never_whether_the_log_knows_the_trace(
    collector: Collector, sampler: str, share: float, traceparent: str | None, spans: int
) -> None:
    done = record()
    traced(
        collector,
        done,
        traceparent=traceparent,
        otel_traces_sampler=sampler,
        otel_traces_sampler_arg=share,
    )
    assert len(collector.spans) == spans
    assert done.trace_id
    assert traceparent is None or done.trace_id == TRACE


def test_service_resource_and_headers_are_as_set(collector: Collector) -> None:
    traced(
        collector,
        record(),
        otel_service_name="gateway",
        otel_resource_attributes="deployment.environment=test, team=a%20b",
        otel_exporter_otlp_headers="authorization=Bearer%20collector-secret,x-scope=1=2",
    )
    assert collector.resource() == {
        "deployment.environment": "test",
        "team": "a b",
        "service.name": "gateway",
        "service.version": "1.2.3",
    }
    assert collector.headers[0]["authorization"] == "Bearer collector-secret"
    assert collector.headers[0]["x-scope"] == "1=2"
    assert collector.paths == ["/v1/traces"]


def test_the_traces_own_endpoint_goes_before_the_common_one(collector: Collector) -> None:
    traced(collector, record(), otel_exporter_otlp_traces_endpoint=f"{collector.url}/elsewhere")
    assert collector.paths == ["/elsewhere"]


def test_a_span_that_was_never_opened_is_not_closed(collector: Collector) -> None:
    tracing = make_tracing(settings(otel_exporter_otlp_endpoint=collector.url), "1")
    tracing.closed(record())
    tracing.close()
    assert collector.spans == []


def test_no_span_is_held_after_its_end(collector: Collector) -> None:
    tracing = make_tracing(settings(otel_exporter_otlp_endpoint=collector.url), "1")
    assert isinstance(tracing, Tracing)
    done = record()
    tracing.opened(done, None)
    tracing.closed(done)
    tracing.closed(done)
    assert tracing._open == {}
    tracing.close()
    assert len(collector.spans) == 1


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"otel_sdk_disabled": True, "otel_exporter_otlp_endpoint": "http://127.0.0.1:1"},
        {"otel_sdk_disabled": True, "otel_exporter_otlp_traces_endpoint": "http://127.0.0.1:1/v1/traces"},
    ],
)
def test_without_a_collector_there_are_no_spans_but_the_callers_trace_id(values: dict[str, Any]) -> None:
    tracing = make_tracing(settings(**values), "1")
    assert isinstance(tracing, NoTracing)
    done = record()
    tracing.opened(done, SAMPLED)
    tracing.closed(done)
    tracing.close()
    assert done.trace_id == TRACE


@pytest.mark.parametrize(
    "header", [None, "", "x", TRACE, f"00-{TRACE}", f"00-{TRACE.upper()}-{PARENT}-01", SAMPLED + "-more"]
)
def test_a_trace_id_is_taken_from_a_good_header_only(header: str | None) -> None:
    assert trace_id_of(header) is None


@pytest.mark.parametrize("stream", [False, True])
def test_spans_of_real_requests_hold_no_prompt_no_answer_and_no_key(
    collector: Collector, upstream: FakeUpstream, stream: bool
) -> None:
    with RunningWeir(
        configuration(
            openai_base_url=upstream.base_url,
            openai_api_key="sk-upstream-secret",
            otel_exporter_otlp_endpoint=collector.url,
        )
    ) as weir:
        answer: Any = weir.sdk(api_key="weir-callers-key").chat.completions.create(
            model="gpt-4o-mini",
            messages=[{"role": "user", "content": "my secret prompt"}],
            stream=stream,
            extra_headers={"traceparent": SAMPLED},
        )
        if stream:
            assert list(answer)
        done = weir.records()[0]
    (span,) = collector.spans  # sent at the latest when the service stops
    assert span.name == "chat gpt-4o-mini"
    assert span.trace_id.hex() == TRACE == done.trace_id
    assert plain(span.attributes)["weir.request_id"] == done.request_id
    for secret in (b"secret prompt", b"fake upstream.", b"sk-upstream-secret", b"weir-callers-key"):
        assert secret not in collector.raw
