"""Traces of the whole service, as a collector on a real socket gets them."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx2
import openai
import pytest
import structlog

from service.app import _reload
from service.config import FileConfig
from service.logging import trace_of_task
from service.tracing.spans import Attempt, RequestSpans
from tests.app.test_routing import places, seen, weir_with
from tests.fakes.otlp import FakeCollector, Span, below, names, root_of
from tests.fakes.upstream import CONTENT, FakeUpstream
from tests.running import RunningWeir, WeirProcess, configuration

HELLO: Any = [{"role": "user", "content": "Hello!"}]
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED, NOT_SAMPLED = f"00-{TRACE}-{PARENT}-01", f"00-{TRACE}-{PARENT}-00"
ROUTE = "/v1/chat/completions"


@pytest.fixture
def collector() -> Iterator[FakeCollector]:
    with FakeCollector() as fake:
        yield fake


@pytest.fixture
def other() -> Iterator[FakeUpstream]:
    with FakeUpstream() as fake:
        yield fake
        assert fake.errors == []


def traced(collector: FakeCollector, upstream: FakeUpstream | None = None, **values: Any) -> RunningWeir:
    """A Weir whose spans go to `collector`; all of them when it has stopped."""
    settings: dict[str, Any] = {
        "otel_exporter_otlp_endpoint": collector.url,
        "openai_api_key": "sk-upstream-secret",
        "openai_max_retries": 0,
        "openai_timeout": 5.0,
    }
    if upstream is not None:
        settings["openai_base_url"] = upstream.base_url
    return RunningWeir(configuration(**settings | values))


def ask(weir: RunningWeir, model: str = "gpt-4o-mini", *, stream: bool = False, **more: Any) -> Any:
    """The answer, a stream's to its end."""
    asked = weir.sdk().chat.completions.create(model=model, messages=HELLO, stream=stream, **more)
    return list(asked) if stream else asked


def post(weir: RunningWeir, headers: Any = None, **body: Any) -> httpx2.Response:
    body = {"model": "gpt-4o-mini", "messages": HELLO} | body
    return httpx2.post(weir.url + ROUTE, json=body, headers=headers, timeout=20)


def attempts_of(spans: list[Span]) -> list[Span]:
    return below([span for span in spans if span.kind == "CLIENT"], root_of(spans))


def outcomes(spans: list[Span]) -> list[tuple[str, str, str]]:
    """Of each attempt its kind, its outcome and its status."""
    attributes = [(s.attributes["weir.attempt.kind"], s.attributes["weir.attempt.outcome"]) for s in spans]
    return [(*told, span.status) for told, span in zip(attributes, spans, strict=True)]


def booked(weir: RunningWeir) -> list[str]:
    """The outcomes in `weir_upstream_attempts_total`."""
    families = (f for f in weir.registry.collect() if f.name == "weir_upstream_attempts")
    samples = (sample for family in families for sample in family.samples)
    return [sample.labels["outcome"] for sample in samples if sample.value and sample.name.endswith("_total")]


# -- the spans of a request ----------------------------------------------------------------------


def test_a_request_that_asks_no_model_is_named_after_its_route(
    collector: FakeCollector, upstream: FakeUpstream
) -> None:
    with traced(collector, upstream) as weir:
        for path in ("/v1/models", "/v1/models/a/b", "/api/v1/usage", "/v1/made-up"):
            httpx2.get(weir.url + path, timeout=20)
    assert sorted(span.name for span in collector.spans) == [
        *("GET /api/v1/usage", "GET /v1/models", "GET /v1/models/{model}", "GET none"),
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_a_span_with_its_steps_and_its_attempt_below(
    collector: FakeCollector, upstream: FakeUpstream, stream: bool
) -> None:
    with traced(collector, upstream) as weir:
        ask(weir, stream=stream, temperature=0.5, max_tokens=50, n=1, user="anna")
        (record,) = weir.records()
    spans = collector.spans
    root = root_of(spans)
    assert (root.name, root.kind, root.status) == (f"POST {ROUTE} gpt-4o-mini", "SERVER", "UNSET")
    assert names(below(spans, root)) == ["reserve", "chat gpt-4o-mini", "settle"]
    assert {span.trace_id for span in spans} == {record.trace_id}
    assert record.sampled
    for span in spans:
        assert root.wire.start_time_unix_nano <= span.wire.start_time_unix_nano
        assert span.wire.end_time_unix_nano <= root.wire.end_time_unix_nano
    assert root.attributes | {"weir.request_id": ""} == {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "gpt-4o-mini",
        "gen_ai.request.stream": stream,
        "http.request.method": "POST",
        "http.route": ROUTE,
        "http.response.status_code": 200,
        "weir.attempts": 1,
        "weir.cache": "bypass",
        "weir.key": "anonymous",
        "weir.outcome": "success",
        "weir.request_id": "",
        "weir.tenant": "default",
    }
    (attempt,) = attempts_of(spans)
    first_chunk = attempt.attributes.pop("gen_ai.response.time_to_first_chunk", None)
    assert (first_chunk is not None) is stream
    assert attempt.attributes == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "127.0.0.1",
        "gen_ai.request.choice.count": 1,
        "gen_ai.request.max_tokens": 50,
        "gen_ai.request.model": "gpt-4o-mini",
        "gen_ai.request.stream": stream,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.response.id": record.response_id,
        "gen_ai.response.model": "gpt-4o-mini",
        "gen_ai.usage.cache_read.input_tokens": 4,
        "gen_ai.usage.input_tokens": 12,
        "gen_ai.usage.output_tokens": 6,
        "gen_ai.usage.reasoning.output_tokens": 2,
        "server.address": "127.0.0.1",
        "server.port": int(upstream.base_url.split(":")[2].split("/")[0]),
        "weir.attempt.kind": "first",
        "weir.attempt.outcome": "success",
        "weir.upstream": "openai",
        "weir.upstream_request_id": "req_fake_1",
    }
    told = root.events.get("first_token")
    assert told == (
        {"weir.time_to_first_token_seconds": record.time_to_first_token_seconds} if stream else None
    )


def test_spans_hold_no_prompt_no_answer_and_no_key(collector: FakeCollector, upstream: FakeUpstream) -> None:
    file = FileConfig.model_validate(
        {"upstreams": [{"name": "u", "base_url": upstream.base_url.replace("//", "//me:pass-word@")}]}
    )
    with traced(collector, file=file) as weir:
        for stream in (False, True):
            with pytest.raises(openai.APIStatusError) if stream else no_error():
                asked = weir.sdk(api_key="callers-key").chat.completions.create(
                    model="status-401" if stream else "gpt-4o-mini",
                    messages=[{"role": "user", "content": "my secret prompt"}],
                    extra_headers={"baggage": "user=anna"},
                )
                assert asked.choices
    assert len(collector.spans) == 8
    for secret in (b"secret prompt", CONTENT.encode(), b"sk-upstream", b"callers-key", b"pass-word", b"anna"):
        assert secret not in collector.raw


@contextmanager
def no_error() -> Iterator[None]:
    yield


@pytest.mark.parametrize(
    ("path", "body", "name"),
    [
        ("/v1/completions", {"prompt": "Hello!"}, "text_completion gpt-4o-mini"),
        ("/v1/embeddings", {"input": "Hello!"}, "embeddings gpt-4o-mini"),
        ("/v1/responses", {"input": "Hello!"}, "chat gpt-4o-mini"),
        ("/api/v1/chat", {"message": "Hello!"}, "chat gpt-4o-mini"),
        ("/api/v1/generate", {"prompt": "Hello!"}, "chat gpt-4o-mini"),
    ],
)
def test_each_operation_has_its_name(
    collector: FakeCollector, upstream: FakeUpstream, path: str, body: dict[str, Any], name: str
) -> None:
    with traced(collector, upstream) as weir:
        answer = httpx2.post(weir.url + path, json={"model": "gpt-4o-mini", **body}, timeout=20)
        assert answer.status_code == 200
    assert root_of(collector.spans).name == f"POST {path} gpt-4o-mini"
    assert names(attempts_of(collector.spans)) == [name]


def test_the_prompts_of_a_batch_have_spans_of_their_own(
    collector: FakeCollector, upstream: FakeUpstream
) -> None:
    with traced(collector, upstream) as weir:
        answer = httpx2.post(f"{weir.url}/api/v1/batch", json={"prompts": ["a", "b"]}, timeout=20)
        assert answer.json()["succeeded"] == 2
    spans = collector.spans
    root = root_of(spans)
    assert root.name == "POST /api/v1/batch"
    prompts = below(spans, root)
    assert names(prompts) == ["prompt", "prompt"]
    for prompt in prompts:
        assert sorted(names(below(spans, prompt))) == ["chat gpt-4o-mini", "reserve", "settle"]
        assert prompt.attributes["weir.outcome"] == "success"


def test_what_the_cache_answers_asks_nobody(collector: FakeCollector, upstream: FakeUpstream) -> None:
    with traced(collector, upstream) as weir:
        for _ in range(2):
            ask(weir, temperature=0)
    traces = by_trace(collector.spans)
    steps = [names(below(spans, root_of(spans))) for spans in traces]
    assert steps == [["cache", "reserve", "chat gpt-4o-mini", "settle"], ["cache", "reserve", "settle"]]
    assert [root_of(spans).attributes["weir.cache"] for spans in traces] == ["miss", "hit"]


def test_the_wait_in_the_queue_is_a_span(collector: FakeCollector, upstream: FakeUpstream) -> None:
    limits = {"max_concurrent_requests": 1, "max_queue_seconds": 20}
    with traced(collector, upstream, **limits) as weir, ThreadPoolExecutor(2) as callers:
        first = callers.submit(ask, weir, "gate")
        upstream.wait_for_call()
        second = callers.submit(ask, weir, "gpt-4o-mini")
        while not weir.in_loop(lambda: weir.parts.gate.waiting):
            pass
        upstream.release()
        first.result(20)
        second.result(20)
    steps = {root_of(s).name.split()[-1]: names(below(s, root_of(s)))[0] for s in by_trace(collector.spans)}
    assert steps == {"gate": "reserve", "gpt-4o-mini": "queue"}


def by_trace(spans: list[Span]) -> list[list[Span]]:
    """The spans of each trace; the traces as they began."""
    grouped: dict[str, list[Span]] = {}
    for span in sorted(spans, key=lambda s: s.wire.start_time_unix_nano):
        grouped.setdefault(span.trace_id, []).append(span)
    return list(grouped.values())


# -- attempts ------------------------------------------------------------------------------------


def test_each_attempt_again_is_a_span(collector: FakeCollector, upstream: FakeUpstream) -> None:
    with traced(collector, upstream, openai_max_retries=2) as weir:
        ask(weir, "flaky-2")
    assert outcomes(attempts_of(collector.spans)) == [
        ("first", "upstream_error", "ERROR"),
        ("retry", "upstream_error", "ERROR"),
        ("retry", "success", "UNSET"),
    ]
    root = root_of(collector.spans)
    assert (root.status, root.attributes["weir.attempts"]) == ("UNSET", 3)


def test_an_attempt_elsewhere_is_a_span(
    collector: FakeCollector, upstream: FakeUpstream, other: FakeUpstream
) -> None:
    endpoint = collector.url
    with weir_with(upstream, other, places("status-500"), otel_exporter_otlp_endpoint=endpoint) as weir:
        ask(weir, "m")
    attempts = attempts_of(collector.spans)
    assert outcomes(attempts) == [
        ("first", "upstream_error", "ERROR"),
        ("failover", "success", "UNSET"),
    ]
    assert names(attempts) == ["chat status-500", "chat good"]
    assert [span.attributes["weir.upstream"] for span in attempts] == ["one", "two"]
    assert root_of(collector.spans).name == f"POST {ROUTE} m"


def test_a_model_that_stands_in_is_named(collector: FakeCollector, upstream: FakeUpstream) -> None:
    models = (
        {"name": "m", "upstream": "one", "upstream_model": "status-500", "fallbacks": {"unavailable": ["s"]}},
        {"name": "s", "upstream": "two", "upstream_model": "good"},
    )
    with weir_with(upstream, upstream, *models, otel_exporter_otlp_endpoint=collector.url) as weir:
        ask(weir, "m")
    assert [kind for kind, _, _ in outcomes(attempts_of(collector.spans))] == ["first", "fallback"]
    assert root_of(collector.spans).attributes["weir.answered_by"] == "s"


@pytest.mark.parametrize("stream", [False, True])
def test_of_two_attempts_at_a_time_each_is_a_span(
    collector: FakeCollector, upstream: FakeUpstream, other: FakeUpstream, stream: bool
) -> None:
    model = places("hang", hedge=True)
    with weir_with(upstream, other, model, otel_exporter_otlp_endpoint=collector.url) as weir:
        seen(weir, "hang")
        ask(weir, "m", stream=stream)
    attempts = attempts_of(collector.spans)
    assert outcomes(attempts) == [
        ("first", "client_disconnected", "UNSET"),
        ("hedge", "success", "UNSET"),
    ]
    assert [span.attributes.get("weir.attempt.given_up") for span in attempts] == [True, None]


@pytest.mark.parametrize(
    ("model", "stream", "status", "error", "of_root", "of_attempt"),
    [
        ("status-400", False, 400, "upstream_rejected", "UNSET", "ERROR"),
        ("status-408", False, 408, "upstream_rejected", "ERROR", "ERROR"),
        ("status-429", False, 429, "rate_limit_exceeded", "UNSET", "ERROR"),
        ("status-500", True, 502, "openai_service_error", "ERROR", "ERROR"),
        ("hang", False, 504, "api_timeout", "ERROR", "ERROR"),
        ("drop", True, 200, "stream_truncated", "ERROR", "ERROR"),
        ("stall", True, 200, "api_timeout", "ERROR", "ERROR"),
    ],
)
def test_the_status_of_a_span_is_by_its_outcome(
    collector: FakeCollector,
    upstream: FakeUpstream,
    model: str,
    stream: bool,
    status: int,
    error: str,
    of_root: str,
    of_attempt: str,
) -> None:
    with traced(collector, upstream, openai_timeout=0.5, stream_idle_timeout=0.3) as weir:
        with pytest.raises(openai.APIError):
            ask(weir, model, stream=stream)
        (record,) = weir.records()
    root, (attempt,) = root_of(collector.spans), attempts_of(collector.spans)
    assert root.attributes["http.response.status_code"] == status
    assert (root.status, attempt.status) == (of_root, of_attempt)
    assert root.attributes["error.type"] == attempt.attributes["error.type"] == record.error_code == error
    assert root.attributes["weir.outcome"] == attempt.attributes["weir.attempt.outcome"] == record.outcome
    assert booked(weir) == [record.outcome if status != 200 else "success"], "which has no end of a stream"


def test_what_never_reaches_a_model_has_a_span_and_no_name_of_the_callers(
    collector: FakeCollector, upstream: FakeUpstream
) -> None:
    file = FileConfig.model_validate(
        {
            "upstreams": [{"name": "u", "base_url": upstream.base_url}],
            "models": [{"name": "m", "upstream": "u"}],
        }
    )
    with traced(collector, file=file) as weir:
        assert post(weir, model="made-up").status_code == 404
        assert httpx2.post(weir.url + ROUTE, content=b"{", timeout=20).status_code == 400
        assert httpx2.get(f"{weir.url}/v1/nowhere").status_code == 404
        assert httpx2.get(f"{weir.url}/health").status_code == 200
    roots = [root_of(spans) for spans in by_trace(collector.spans)]
    assert names(roots) == [f"POST {ROUTE}", f"POST {ROUTE}", "GET none"]
    assert [root.attributes.get("error.type") for root in roots] == [
        "model_not_found",
        "invalid_request",
        "404",
    ]
    assert {root.status for root in roots} == {"UNSET"}


# -- ends that nobody planned --------------------------------------------------------------------


@pytest.mark.parametrize("model", ["hang", "stall"])
def test_a_caller_who_leaves_ends_all_spans_once(
    collector: FakeCollector, upstream: FakeUpstream, model: str
) -> None:
    body = json.dumps({"model": model, "messages": HELLO, "stream": True}).encode()
    with traced(collector, upstream) as weir:
        with socket.create_connection(("127.0.0.1", weir.port), timeout=20) as caller:
            caller.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: w\r\nContent-Length: %d\r\n\r\n%s"
                % (len(body), body)
            )
            upstream.wait_for_call()
            if model == "stall":
                assert caller.recv(15).startswith(b"HTTP/1.1 200")
        weir.records()
    root, (attempt,) = root_of(collector.spans), attempts_of(collector.spans)
    assert names(below(collector.spans, root)) == ["reserve", f"chat {model}", "settle"]
    assert outcomes([attempt]) == [("first", "client_disconnected", "UNSET")]
    assert attempt.attributes["error.type"] == "client_disconnected"
    assert attempt.attributes.get("weir.attempt.given_up") == (True if model == "hang" else None)
    assert booked(weir) == ["client_disconnected" if model == "hang" else "success"]
    assert (root.status, root.attributes["weir.outcome"]) == ("UNSET", "client_disconnected")


@pytest.mark.parametrize(
    ("model", "outcome", "counted"),
    [("hang", "internal_error", "internal_error"), ("stall", "stream_truncated", "success")],
)
def test_what_the_drain_cuts_off_has_its_spans(
    collector: FakeCollector, upstream: FakeUpstream, model: str, outcome: str, counted: str
) -> None:
    with ThreadPoolExecutor(1) as callers:
        with traced(collector, upstream, drain_timeout=0, openai_timeout=60, stream_idle_timeout=60) as weir:
            asked = callers.submit(ask, weir, model, stream=True)
            upstream.wait_for_call()
            if model == "stall":
                while not weir.in_loop(lambda: weir.parts.service.sweep._entries):
                    pass
        with pytest.raises(openai.APIError):
            asked.result(20)
    root = root_of(collector.spans)
    assert names(below(collector.spans, root)) == ["reserve", f"chat {model}", "settle"]
    assert root.status == "ERROR"
    (attempt,) = attempts_of(collector.spans)
    assert outcomes([attempt]) == [("first", outcome, "ERROR")]
    assert attempt.attributes["error.type"] == root.attributes["error.type"] == "server_shutting_down"
    assert attempt.attributes.get("weir.attempt.given_up") == (True if model == "hang" else None)
    assert booked(weir) == [counted]


@pytest.mark.parametrize("content", ["no_content", "span_only"])
def test_nothing_of_an_ended_request_is_kept(
    collector: FakeCollector, upstream: FakeUpstream, content: str
) -> None:
    captured = {"otel_instrumentation_genai_capture_message_content": content}
    with traced(collector, upstream, stream_idle_timeout=0.2, **captured) as weir:
        ask(weir)
        ask(weir, stream=True)
        for model in ("drop", "stall", "error-event"):
            with pytest.raises(openai.APIError):
                ask(weir, model, stream=True)
        weir.records(5)
        for _ in range(1000):  # the last task may be on its last steps
            weir.in_loop(lambda: None)
            gc.collect()
            left = [o for o in gc.get_objects() if isinstance(o, RequestSpans | Attempt)]
            if not left:
                break
        assert not left


# -- the caller's trace, and the upstream's ------------------------------------------------------


def test_the_callers_trace_goes_on_here_and_to_the_upstream(
    collector: FakeCollector, upstream: FakeUpstream
) -> None:
    with traced(collector, upstream, openai_max_retries=1) as weir:
        headers = {"traceparent": SAMPLED, "tracestate": "a=1,b=2", "baggage": "user=anna"}
        answer = post(weir, headers=headers, model="flaky-1")
        assert answer.headers["x-trace-id"] == TRACE
    spans = collector.spans
    root = root_of(spans)
    assert (root.trace_id, root.parent_id) == (TRACE, PARENT)
    sent = [request.headers for request in upstream.requests]
    assert [headers["traceparent"].split("-")[:3] for headers in sent] == [
        ["00", TRACE, attempt.id] for attempt in attempts_of(spans)
    ]
    assert {headers["traceparent"][-1] for headers in sent} <= {"1", "3"}
    assert [headers["tracestate"] for headers in sent] == ["a=1,b=2"] * 2
    assert "baggage" not in sent[0]


@pytest.mark.parametrize(
    ("path", "body"),
    [(ROUTE, {"model": "gpt-4o-mini", "messages": HELLO}), ("/api/v1/generate", {"prompt": "Hello!"})],
)
def test_of_a_request_that_is_not_sampled_the_callers_own_header_goes_on(
    collector: FakeCollector, upstream: FakeUpstream, path: str, body: dict[str, Any]
) -> None:
    headers = {"traceparent": NOT_SAMPLED, "tracestate": "a=1"}
    with traced(collector, upstream) as weir:
        answer = httpx2.post(weir.url + path, json=body, headers=headers, timeout=20)
        assert (answer.status_code, answer.headers["x-trace-id"]) == (200, TRACE)
        assert not weir.records()[0].sampled
    assert collector.spans == []
    sent = upstream.requests[0].headers
    assert (sent["traceparent"], sent["tracestate"]) == (NOT_SAMPLED, "a=1")


def test_without_a_collector_the_callers_headers_go_on_as_they_are(upstream: FakeUpstream) -> None:
    with RunningWeir(configuration(openai_base_url=upstream.base_url)) as weir:
        assert post(weir, headers={"traceparent": SAMPLED}).headers["x-trace-id"] == TRACE
        assert "x-trace-id" not in post(weir).headers
        assert post(weir, headers={"traceparent": "nonsense"}).status_code == 200
    sent = [request.headers.get("traceparent") for request in upstream.requests]
    assert sent == [SAMPLED, None, None]


@pytest.mark.parametrize("configured", [True, False])
@pytest.mark.parametrize(
    ("propagators", "expected"),
    [
        (("none",), set()),
        (("baggage",), {"baggage"}),
        (("tracecontext", "baggage"), {"traceparent", "baggage"}),
    ],
)
def test_what_goes_on_is_as_set(
    collector: FakeCollector,
    upstream: FakeUpstream,
    propagators: tuple[str, ...],
    expected: set[str],
    configured: bool,
) -> None:
    values = {} if configured else {"otel_sdk_disabled": True}
    with traced(collector, upstream, otel_propagators=propagators, **values) as weir:
        answer = post(weir, headers={"traceparent": SAMPLED, "baggage": "user=anna,x=1"})
        taken = "tracecontext" in propagators
        assert (answer.headers.get("x-trace-id") == TRACE) is taken
    sent = upstream.requests[0].headers
    assert {name for name in ("traceparent", "baggage") if name in sent} == expected
    assert sent.get("baggage", "user=anna,x=1") == "user=anna,x=1"


def test_errors_streams_and_lines_name_the_trace(collector: FakeCollector, upstream: FakeUpstream) -> None:
    with traced(collector, upstream) as weir:
        headers = {"traceparent": SAMPLED}
        answers = [
            post(weir, headers=headers, stream=True),
            post(weir, headers=headers, model="status-500"),
            httpx2.post(weir.url + ROUTE, content=b"{", headers=headers, timeout=20),
            httpx2.get(f"{weir.url}/v1/nowhere", headers=headers),
        ]
    assert [answer.status_code for answer in answers] == [200, 502, 400, 404]
    assert [answer.headers["x-trace-id"] for answer in answers] == [TRACE] * 4


def test_the_lines_of_a_request_hold_the_ids_of_its_span(upstream: FakeUpstream) -> None:
    with (
        FakeCollector() as collector,
        WeirProcess(
            OPENAI_BASE_URL=upstream.base_url,
            OPENAI_API_KEY="any",
            OTEL_EXPORTER_OTLP_ENDPOINT=collector.url,
        ) as weir,
    ):
        weir.wait_until_ready()
        body = {"model": "gpt-4o-mini", "messages": HELLO}
        answer = httpx2.post(weir.url + ROUTE, json=body, timeout=20)
        weir.terminate()
        assert weir.wait() == 0
        (line,) = weir.events("request")
        root = root_of(collector.spans)
    assert (line["trace_id"], line["span_id"]) == (root.trace_id, root.id)
    assert answer.headers["x-trace-id"] == root.trace_id
    assert root.attributes["weir.request_id"] == line["request_id"]


def test_whatever_is_logged_during_a_request_can_name_its_trace(
    collector: FakeCollector, upstream: FakeUpstream
) -> None:
    with traced(collector, upstream) as weir:
        adapter: Any = weir.parts.adapters.upstreams["openai"]
        send, known = adapter.send, []

        async def watched(call: Any) -> Any:
            known.append(trace_of_task.get())
            return await send(call)

        adapter.send = watched
        trace_id = post(weir).headers["x-trace-id"]
    assert known == [(trace_id, root_of(collector.spans).id)]


# -- sampling ------------------------------------------------------------------------------------


def test_a_share_is_sampled_and_all_have_a_trace_id(collector: FakeCollector, upstream: FakeUpstream) -> None:
    sampler = {"otel_traces_sampler": "parentbased_traceidratio", "otel_traces_sampler_arg": 0.5}
    with traced(collector, upstream, **sampler) as weir:
        ids = [post(weir).headers["x-trace-id"] for _ in range(40)]
        sampled = {r.trace_id for r in weir.records(40) if r.sampled}
    assert len(set(ids)) == 40
    assert 0 < len(sampled) < 40
    assert {span.trace_id for span in collector.spans} == sampled
    bound = round(0.5 * 2**64)
    assert sampled == {trace_id for trace_id in ids if int(trace_id, 16) & (2**64 - 1) < bound}


# -- a collector that is not well ----------------------------------------------------------------


def dropped(weir: RunningWeir) -> float:
    return weir.metric("weir_telemetry_dropped_total", signal="traces")


def wait_for_dropped(weir: RunningWeir, count: int) -> None:
    deadline = time.monotonic() + 30
    while dropped(weir) < count:
        assert time.monotonic() < deadline, "not counted"
        weir.in_loop(lambda: None)
    assert dropped(weir) == count


QUICK: Any = {"otel_bsp_schedule_delay": 10, "otel_exporter_otlp_timeout": 200}


@pytest.mark.parametrize(
    ("fault", "milliseconds", "reason"),
    [
        (400, 200, "status 400"),
        (503, 200, "not taken in time"),
        ("refuse", 1400, "ConnectionError"),  # time for another try, which tells more
        ("hang", 200, "not taken in time"),
    ],
)
def test_failed_exports_are_counted_and_told_once_and_cost_no_request_anything(
    collector: FakeCollector, upstream: FakeUpstream, fault: Any, milliseconds: int, reason: str
) -> None:
    collector.misbehave(fault)
    quick = QUICK | {"otel_exporter_otlp_timeout": milliseconds}
    with structlog.testing.capture_logs() as lines, traced(collector, upstream, **quick) as weir:
        for number in range(1, 3):
            ask(weir)
            wait_for_dropped(weir, 4 * number)
        collector.behave()
        ask(weir)
        collector.wait_for(4)
        assert dropped(weir) == 8
    told = [line["event"] for line in lines if line["event"].startswith("traces_")]
    assert told == ["traces_unavailable", "traces_available"]
    assert [line["reason"] for line in lines if line["event"] == "traces_unavailable"] == [reason]


def test_a_port_where_nobody_listens_costs_nothing(upstream: FakeUpstream) -> None:
    with FakeCollector() as gone:
        pass
    with traced(gone, upstream, **QUICK) as weir:
        ask(weir)
        wait_for_dropped(weir, 4)


def test_what_has_no_room_is_dropped_and_counted(collector: FakeCollector, upstream: FakeUpstream) -> None:
    collector.misbehave("hang")
    sizes = {"otel_bsp_max_queue_size": 8, "otel_bsp_max_export_batch_size": 4}
    with traced(collector, upstream, **sizes) as weir:
        ask(weir)
        collector.wait_until_asked()  # and there hang the first four
        for _ in range(5):
            ask(weir)
        assert dropped(weir) == 5 * 4 - 8
        collector.behave()


def test_the_end_does_not_wait_for_a_collector_that_hangs(
    collector: FakeCollector, upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.tracing.export.CLOSE_SECONDS", 0.2)
    collector.misbehave("hang")
    values = {"otel_exporter_otlp_timeout": 600_000, "otel_bsp_max_export_batch_size": 4}
    with structlog.testing.capture_logs() as lines, traced(collector, upstream, **values) as weir:
        ask(weir)
        collector.wait_until_asked()
        ask(weir)
    assert [line["spans"] for line in lines if line["event"] == "traces_lost"] == [8]
    assert dropped(weir) == 8


def test_several_processes_each_send_their_spans(collector: FakeCollector, upstream: FakeUpstream) -> None:
    with WeirProcess(
        WORKER_COUNT="2",
        OPENAI_BASE_URL=upstream.base_url,
        OPENAI_API_KEY="any",
        OTEL_EXPORTER_OTLP_ENDPOINT=collector.url,
        OTEL_EXPORTER_OTLP_COMPRESSION="gzip",
        OTEL_BSP_SCHEDULE_DELAY="50",
    ) as weir:
        weir.wait_until_ready(2)
        body = {"model": "gpt-4o-mini", "messages": HELLO}
        with ThreadPoolExecutor(4) as callers:
            answers = list(
                callers.map(lambda _: httpx2.post(weir.url + ROUTE, json=body, timeout=20), range(40))
            )
        collector.wait_for(4 * 40)  # while they run: the threads were started after the fork
        weir.terminate()
        assert weir.wait() == 0
    assert {a.headers["x-trace-id"] for a in answers} == {s.trace_id for s in collector.spans}
    assert len(collector.spans) == 4 * 40
    assert {headers["content-encoding"] for headers in collector.headers} == {"gzip"}


# -- prompts and answers -------------------------------------------------------------------------

CAPTURED: Any = {"otel_instrumentation_genai_capture_message_content": "span_only"}


@pytest.mark.parametrize("stream", [False, True])
def test_prompts_and_answers_are_there_where_they_are_wanted_without_secrets(
    collector: FakeCollector, upstream: FakeUpstream, stream: bool
) -> None:
    redact = FileConfig.model_validate({"tracing": {"redact": [r"\bproject \w+"]}})
    secrets = "sk-abcdefghij, anna@example.org, 4111 1111 1111 1111, Bearer abc.def.ghijk, project Falcon"
    with traced(collector, upstream, file=redact, **CAPTURED) as weir:
        asked = weir.sdk().chat.completions.create(
            model="echo",
            messages=[{"role": "system", "content": "Be kind."}, {"role": "user", "content": secrets}],
            stream=stream,
        )
        assert "anna@example.org" in "".join(str(e) for e in asked) if stream else str(asked)
    (attempt,) = attempts_of(collector.spans)
    clean = "[redacted], [redacted], [redacted], [redacted], [redacted]"
    assert json.loads(attempt.attributes["gen_ai.input.messages"]) == [
        {"role": "system", "parts": [{"type": "text", "content": "Be kind."}]},
        {"role": "user", "parts": [{"type": "text", "content": clean}]},
    ]
    (said,) = json.loads(attempt.attributes["gen_ai.output.messages"])
    assert (said["role"], said["finish_reason"]) == ("assistant", "stop")
    assert clean in said["parts"][0]["content"]
    for secret in (b"sk-abc", b"anna@", b"4111", b"abc.def", b"Falcon"):
        assert secret not in collector.raw


def test_of_a_stream_that_breaks_off_what_came_is_there(
    collector: FakeCollector, upstream: FakeUpstream
) -> None:
    with traced(collector, upstream, **CAPTURED) as weir, pytest.raises(openai.APIError):
        ask(weir, "drop", stream=True)
    (attempt,) = attempts_of(collector.spans)
    (said,) = json.loads(attempt.attributes["gen_ai.output.messages"])
    assert said["parts"][0]["content"]
    assert CONTENT.startswith(said["parts"][0]["content"])


def test_calls_of_tools_are_there_and_of_pictures_the_kind_alone(
    collector: FakeCollector, upstream: FakeUpstream
) -> None:
    picture: Any = [
        {"type": "text", "text": "What is it?"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAAsecret"}},
    ]
    tool: Any = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    with traced(collector, upstream, **CAPTURED) as weir:
        for stream in (False, True):
            asked = weir.sdk().chat.completions.create(
                model="gpt-4o-mini",
                messages=[{"role": "user", "content": picture}],
                tools=[tool],
                stream=stream,
            )
            if stream:
                assert list(asked)
    for spans in by_trace(collector.spans):
        (attempt,) = attempts_of(spans)
        (asked_for,) = json.loads(attempt.attributes["gen_ai.input.messages"])
        assert asked_for["parts"] == [{"type": "text", "content": "What is it?"}, {"type": "image_url"}]
        (said,) = json.loads(attempt.attributes["gen_ai.output.messages"])
        assert [(part["type"], part["name"]) for part in said["parts"]] == [("tool_call", "weather")]
    assert b"AAAAsecret" not in collector.raw


def test_what_is_redacted_follows_the_file(collector: FakeCollector, upstream: FakeUpstream) -> None:
    with traced(collector, upstream, **CAPTURED) as weir:
        config = weir.parts.configuration
        file = FileConfig.model_validate({"tracing": {"redact": ["Hello"]}})
        changed = _reload(weir.parts, config.model_copy(update={"file": file}))
        asyncio.run_coroutine_threadsafe(changed, weir.loop).result(20)
        ask(weir)
    (attempt,) = attempts_of(collector.spans)
    assert "[redacted]!" in attempt.attributes["gen_ai.input.messages"]


def test_another_protocol_is_refused_and_not_ignored() -> None:
    with WeirProcess(OTEL_EXPORTER_OTLP_PROTOCOL="grpc") as weir:
        assert weir.wait() == 78
        assert "OTEL_EXPORTER_OTLP_PROTOCOL=grpc" in "\n".join(weir.error_lines)
