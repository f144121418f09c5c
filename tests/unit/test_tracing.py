"""Where traces begin, what is sampled, what the SDK may read, and what content may be in spans."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.config import FileConfig, Settings, load_settings
from service.domain import AttemptKind, Call, Operation, Outcome, RequestRecord
from service.errors import ConfigurationError
from service.ports import Target, Trace, WholeAnswer
from service.tracing import NoTracing, Tracing, make_tracing
from service.tracing.attributes import servers
from service.tracing.content import CUT, Content, Heard
from service.tracing.redaction import LEFT_OUT, Redaction
from service.tracing.w3c import parse
from tests.fakes.otlp import FakeCollector, below, root_of
from tests.running import ROOT, configuration, settings
from tests.unit.ports import DONE, ScriptedUpstream, Stream, chunk

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED, NOT_SAMPLED = f"00-{TRACE}-{PARENT}-01", f"00-{TRACE}-{PARENT}-00"


@pytest.fixture
def collector() -> Iterator[FakeCollector]:
    with FakeCollector() as fake:
        yield fake


def tracing_to(collector: FakeCollector, dropped: list[int] | None = None, **values: Any) -> Tracing:
    made = settings(otel_exporter_otlp_endpoint=collector.url, **values)
    tracing = make_tracing(made, "1.2.3", (dropped if dropped is not None else []).append)
    tracing.know(configuration(openai_base_url="http://u:8000"))
    return tracing


def begun(tracing: Tracing, **headers: str) -> Trace:
    trace = tracing.begin({name.encode(): value.encode() for name, value in headers.items()})
    assert trace is not None
    return trace


def finish(trace: Trace) -> None:
    if trace.spans is not None:
        trace.spans.finished("POST", "/v1/x", 200, Outcome.SUCCESS, "req-1")


# -- where a trace begins ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header",
    [
        "",
        "x",
        TRACE,
        f"00-{TRACE}",
        f"00-{TRACE.upper()}-{PARENT}-01",
        SAMPLED + "-more",
        SAMPLED.replace("00-", "ff-", 1),
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
    ],
)
def test_what_is_no_traceparent_begins_a_trace(collector: FakeCollector, header: str) -> None:
    assert parse(header) is None
    tracing = tracing_to(collector)
    finish(begun(tracing, traceparent=header))
    tracing.close()
    (span,) = collector.spans
    assert span.parent_id == ""
    assert span.trace_id != TRACE
    assert NoTracing.begin(make_tracing(settings(), "1", print), {b"traceparent": header.encode()}) is None  # type: ignore[arg-type]


def test_a_later_version_may_say_more() -> None:
    parent = parse(SAMPLED.replace("00-", "01-", 1) + "-more")
    assert parent is not None
    assert (parent.trace_id, parent.span_id, parent.flags) == (TRACE, PARENT, 1)


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
def test_the_sampler_decides_what_is_sent_and_never_whether_the_trace_has_an_id(
    collector: FakeCollector, sampler: str, share: float, traceparent: str | None, spans: int
) -> None:
    tracing = tracing_to(collector, otel_traces_sampler=sampler, otel_traces_sampler_arg=share)
    trace = begun(tracing, **({"traceparent": traceparent} if traceparent else {}))
    finish(trace)
    tracing.close()
    assert [span.trace_id for span in collector.spans] == [trace.id] * spans
    assert (trace.spans is not None) is bool(spans)
    assert len(trace.id) == 32
    assert traceparent is None or trace.id == TRACE


def test_service_resource_and_headers_are_as_set(collector: FakeCollector) -> None:
    tracing = tracing_to(
        collector,
        otel_service_name="gateway",
        otel_resource_attributes="deployment.environment=test, team=a%20b",
        otel_exporter_otlp_headers="authorization=Bearer%20collector-secret,x-scope=1=2",
        otel_exporter_otlp_compression="deflate",
    )
    finish(begun(tracing))
    tracing.close()
    assert collector.spans[0].resource == {
        "deployment.environment": "test",
        "team": "a b",
        "service.name": "gateway",
        "service.version": "1.2.3",
    }
    assert collector.headers[0]["authorization"] == "Bearer collector-secret"
    assert collector.headers[0]["x-scope"] == "1=2"
    assert collector.headers[0]["content-encoding"] == "deflate"
    assert collector.paths == ["/v1/traces"]


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({}, "weir"),
        ({"otel_resource_attributes": "service.name=of-attributes"}, "of-attributes"),
        ({"otel_resource_attributes": "service.name=of-attributes", "otel_service_name": "own"}, "own"),
    ],
)
def test_the_services_name_is_the_settings_then_the_resources(
    collector: FakeCollector, values: dict[str, Any], name: str
) -> None:
    tracing = tracing_to(collector, **values)
    finish(begun(tracing))
    tracing.close()
    assert collector.spans[0].resource["service.name"] == name


def test_the_traces_own_endpoint_goes_before_the_common_one(collector: FakeCollector) -> None:
    tracing = tracing_to(collector, otel_exporter_otlp_traces_endpoint=f"{collector.url}/elsewhere")
    finish(begun(tracing))
    tracing.close()
    assert collector.paths == ["/elsewhere"]


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"otel_sdk_disabled": True, "otel_exporter_otlp_endpoint": "http://127.0.0.1:1"},
        {"otel_traces_exporter": "none", "otel_exporter_otlp_endpoint": "http://127.0.0.1:1"},
        {"otel_sdk_disabled": True, "otel_exporter_otlp_traces_endpoint": "http://127.0.0.1:1/v1/traces"},
    ],
)
def test_without_a_collector_there_are_no_spans_but_the_callers_trace(values: dict[str, Any]) -> None:
    tracing = make_tracing(settings(**values), "1", print)
    assert isinstance(tracing, NoTracing)
    trace = tracing.begin({b"traceparent": SAMPLED.encode()})
    assert trace == Trace(TRACE, headers=(("traceparent", SAMPLED),))
    with tracing.work("copy") as work:
        work.note(records=1)
    tracing.close()


def test_work_that_no_request_asked_for_is_a_trace_of_its_own(collector: FakeCollector) -> None:
    tracing = tracing_to(collector)
    with tracing.work("copy") as work:
        work.note(records=3)
    with pytest.raises(ZeroDivisionError), tracing.work("copy"):
        _ = 1 / 0
    tracing.close()
    good, bad = collector.spans
    assert (good.name, good.status, good.parent_id, good.attributes) == (
        "copy",
        "UNSET",
        "",
        {"weir.records": 3},
    )
    assert (bad.status, bad.attributes) == ("ERROR", {"error.type": "internal_error"})
    assert good.trace_id != bad.trace_id


# -- ends ----------------------------------------------------------------------------------------


def record(**fields: Any) -> RequestRecord:
    known: dict[str, Any] = {"id": "1", "request_id": "r", "route": "/v1/x", "operation": Operation.CHAT}
    return RequestRecord(**known | fields)


def test_a_span_ends_with_whoever_leaves_last_and_takes_open_attempts_along(collector: FakeCollector) -> None:
    tracing = tracing_to(collector)
    trace = begun(tracing)
    assert trace.spans is not None
    call = Call(Operation.CHAT, "m", b"{}")
    part = trace.part("prompt").spans
    assert part is not None
    part.opened()
    target = Target(ScriptedUpstream(), "m")
    ended = part.attempt(call, target, AttemptKind.FIRST)
    part.attempt(call, target, AttemptKind.RETRY)  # which nobody ends
    ended.failed(ValueError())
    ended.done(record())
    finish(trace)  # the answer was cut off: the exchange is settled later
    part.closed(record(outcome=Outcome.TIMEOUT, error_code="api_timeout"))
    part.left()
    ended.failed(ValueError())
    tracing.close()
    root = root_of(collector.spans)
    (prompt,) = below(collector.spans, root)
    assert [span.status for span in below(collector.spans, prompt)] == ["ERROR", "UNSET"]
    assert len(collector.spans) == 4
    assert (prompt.status, prompt.attributes["error.type"]) == ("ERROR", "api_timeout")


def test_an_attempt_with_a_whole_answer_ends_with_it_whatever_comes_then(collector: FakeCollector) -> None:
    tracing = tracing_to(collector)
    trace = begun(tracing)
    assert trace.spans is not None
    call = Call(Operation.CHAT, "m", b"{}")
    attempt = trace.spans.attempt(call, Target(ScriptedUpstream(), "m"), AttemptKind.FIRST)
    attempt.answered(WholeAnswer(b"{}"))
    attempt.begun()
    then = time.time_ns()
    attempt.done(record(outcome=Outcome.CLIENT_DISCONNECTED))
    finish(trace)
    tracing.close()
    span = next(span for span in collector.spans if span.kind == "CLIENT")
    assert span.wire.end_time_unix_nano <= then
    assert span.attributes["weir.attempt.outcome"] == "success"


def test_after_the_end_spans_are_dropped_and_counted(collector: FakeCollector) -> None:
    dropped: list[int] = []
    tracing = tracing_to(collector, dropped)
    first, late = begun(tracing), begun(tracing)
    finish(first)
    tracing.close()
    finish(late)
    tracing.close()
    assert (len(collector.spans), dropped) == (1, [1])


# -- the environment -----------------------------------------------------------------------------

READ_BY_THE_SDK = {
    "OTEL_EXPORTER_OTLP_TRACES_HEADERS",
    "OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE",
    "OTEL_EXPORTER_OTLP_TRACES_CLIENT_CERTIFICATE",
    "OTEL_EXPORTER_OTLP_TRACES_CLIENT_KEY",
    "OTEL_PYTHON_CONTEXT",
    "OTEL_PYTHON_EXPORTER_OTLP_HTTP_CREDENTIAL_PROVIDER",
    "OTEL_PYTHON_EXPORTER_OTLP_HTTP_TRACES_CREDENTIAL_PROVIDER",
    "OTEL_PYTHON_METER_PROVIDER",
    "OTEL_PYTHON_SDK_INTERNAL_METRICS_ENABLED",
    "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT",
}
"""Beside settings; docs/tracing.md names them."""

SPY = """
import os, sys
read = set()
class Spy(dict):
    def __getitem__(self, name): read.add(name); return super().__getitem__(name)
    def get(self, name, default=None): read.add(name); return super().get(name, default)
    def __contains__(self, name): read.add(name); return super().__contains__(name)
from service.config import Settings
made = Settings(_env_file=None, otel_exporter_otlp_endpoint="http://127.0.0.1:1")
os.environ = Spy(os.environ)
from service.domain import Outcome
from service.tracing import make_tracing
tracing = make_tracing(made, "1", print)
tracing.begin({}).spans.finished("GET", "/", 200, Outcome.SUCCESS, "r")
print(*sorted(name for name in read if name.startswith("OTEL_")), flush=True)
os._exit(0)
"""


def test_the_sdk_reads_nothing_behind_our_back_that_the_docs_do_not_name() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SPY], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    read = set(done.stdout.split())
    assert read, "the spy saw nothing"
    assert read - {name.upper() for name in Settings.model_fields} <= READ_BY_THE_SDK
    told, _, not_read = (ROOT / "docs/tracing.md").read_text().partition("These are not read")
    named = set(re.findall(r"`(OTEL_\w+)`", not_read))
    assert named
    assert named & (read | READ_BY_THE_SDK | {name.upper() for name in Settings.model_fields}) == {
        "OTEL_EXPORTER_OTLP_TIMEOUT"  # which holds in place of others
    }
    assert [name for name in READ_BY_THE_SDK if f"`{name}`" not in told] == []


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("OTEL_PROPAGATORS", "tracecontext,b3", "'tracecontext', 'baggage' or 'none'"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc", "'http/protobuf'"),
        ("OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT", "EVENT_ONLY", "'no_content' or 'span_only'"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "0", "greater than or equal to 1"),
        ("OTEL_EXPORTER_OTLP_COMPRESSION", "br", "'none', 'gzip' or 'deflate'"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, complaint: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match=complaint) as refused:
        load_settings()
    assert name in str(refused.value)


def test_settings_are_written_as_opentelemetry_writes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_PROPAGATORS", "tracecontext, baggage")
    monkeypatch.setenv("OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT", "SPAN_ONLY")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "5000")
    made = load_settings()
    assert made.otel_propagators == ("tracecontext", "baggage")
    assert made.otel_instrumentation_genai_capture_message_content == "span_only"
    assert made.otel_exporter_otlp_timeout == 5000


@pytest.mark.parametrize(
    ("pattern", "complaint"), [("(", "no regular expression"), ("x*", "matches the empty text")]
)
def test_a_pattern_that_cannot_be_is_refused(pattern: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        FileConfig.model_validate({"tracing": {"redact": [pattern]}})


def test_of_an_upstreams_address_spans_get_host_and_port_alone() -> None:
    file = FileConfig.model_validate(
        {
            "upstreams": [
                {"name": "a", "base_url": "https://me:secret@host.example/v1?key=secret"},
                {"name": "b", "base_url": "http://[::1]:8000/v1"},
                {"name": "c", "kind": "simulator"},
            ]
        }
    )
    assert servers(configuration(file=file)) == {
        "a": {"server.address": "host.example", "server.port": 443},
        "b": {"server.address": "::1", "server.port": 8000},
    }


# -- redaction -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "secret",
    [
        "sk-proj-abcDEF123456789",
        "weir-abcDEF123456789",
        "Bearer abcdefgh.ijkl",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl",
        "ghp_abcdefghijklmnop1234",
        "AKIAABCDEFGHIJKLMNOP",
        "xoxb-1234567890-abc",
        "gsk_abcdefghijklmnop1234",
        "xai-abcdefghijklmnop1234",
        "Basic dXNlcjpwYXNz==",
        "OPENAI_API_KEY=abcdef123",
        "DB_PASSWORD=hunter22",
        "client_secret: hunter22",
        "accessToken=hunter22",
        "Authorization: Basic dXNlcjpwYXNz",
        "authorization: Bearer abcdefgh.ijkl",
        "Authorization: ApiKey abcdefghijklmnop",
        "Proxy-Authorization: Negotiate YIIabcdefgh==",
        "Authorization: AWS4-HMAC-SHA256 Credential=AKIAABCDEFGHIJKLMNOP/x, Signature=abcdef0123456789",
        'Authorization: Digest username="anna", response="abcdef0123456789", nc=1',
        "Bearer abc:def!ghijk",
        "sk-ab***",
        "password='correct horse battery'",
        "anna.b+c@mail.example.co.uk",
        "jürgen@example.org",
        "4111 1111 1111 1111",
        "5500-0000-0000-0004",
        "-----BEGIN RSA PRIVATE KEY-----\nAAAA\n-----END RSA PRIVATE KEY-----",
        "-----BEGIN PRIVATE KEY-----\nAAAA cut in the middle",
    ],
)
def test_a_secret_is_left_out(secret: str) -> None:
    text = Redaction()(f"before {secret}")
    assert text == f"before {LEFT_OUT}"


@pytest.mark.parametrize(
    "text",
    [
        '{"api_key": "abcdef123"}',
        "password=hunter22",
        "API-KEY: abcdef",
        '{"access_token": "abcdef123"}',
        r'{"arguments": "{\"password\": \"hunter22\"}"}',
        r'{"a": "{\"b\": \"{\\\"api_key\\\": \\\"abcdef123\\\"}\"}"}',
        '{"Authorization": "ApiKey abcdef123"}, and',
        r'{"a": "{\"authorization\": \"Custom abcdef123\", \"b\": 1}"}',
        "postgres://user:hunter22@db.example/weir",
        "redis://:hunter22'abcdef@host",
        'redis://:abcdef"hunter22@host',
        "redis://anna:abcdef@hunter22@host",
        "https://abcdef@git.example/x",
        "MY_sk-proj-abcdef123456",
    ],
)
def test_what_is_called_a_secret_is_left_out(text: str) -> None:
    clean = Redaction()(text)
    assert LEFT_OUT in clean
    assert "abcdef" not in clean
    assert "hunter22" not in clean


@pytest.mark.parametrize(
    "text",
    [
        "a sketch of risk-averse tokens: 4096",
        "4111 1111 1111 1112",
        "2024-10-21 12:30:00, order 123456789",
        "max_tokens=100 @ home",
        "token_count: 1234567, the secretary: somebody",
        "the pod weir-gateway-7f9c8d5b6-x2x4z, https://medium.example/@somebody",
        "basic authentication is a tokenizer: no secret",
        "unexpected token: identifier, authorization: you need some",
        '{"url":"https://api.example.com","to":"@somebody"}',
        "x" * 50_000,
        "@" * 5_000,
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert Redaction()(text) == text


@pytest.mark.parametrize(
    "piece",
    [
        "password", "password=", "password='", "api_key-", "a-", "token: ", r'token="\\', "secret ", "sk-",
        "authorization: ", 'authorization: ="', "authorization: =a", r'authorization:=\\"\\',
        "weir-", "eyJ-", "Bearer ", "bearer", "Basic ", "Basic a", "://", "://a:", "://@", "://'",
        '://"a', "authorization: a ",
        "-----BEGIN ", " ", "\\", "a",
    ],
)  # fmt: skip
def test_a_text_that_is_made_to_be_slow_is_read_quickly(piece: str) -> None:
    text = piece * (200_000 // len(piece))
    began = time.process_time()
    Redaction()(text)
    assert time.process_time() - began < 1.0


def test_operators_have_patterns_of_their_own() -> None:
    assert Redaction([r"(?i)falcon", r"\d{5}"])("Project FALCON, 12345") == "Project [redacted], [redacted]"


# -- content -------------------------------------------------------------------------------------


def chat(messages: Any, **more: Any) -> Call:
    return Call(Operation.CHAT, "m", msgspec.json.encode({"messages": messages, **more}))


TEXTS = st.text(st.characters(codec="utf-8"), max_size=600)


@given(st.lists(TEXTS, max_size=8), st.integers(256, 2000))
def test_content_is_json_and_never_longer_than_it_may_be(texts: list[str], most: int) -> None:
    content = Content(most, Redaction())
    found = content.of_call(chat([{"role": "user", "content": text} for text in texts]))
    written = found.get("gen_ai.input.messages", "[]")
    assert len(written.encode()) <= most
    kept = json.loads(written)
    assert len(kept) <= len(texts)
    for message, text in zip(reversed(kept), reversed(texts), strict=False):
        (part,) = message["parts"]
        assert Redaction()(text).startswith(part["content"].removesuffix(CUT))


def test_the_latest_messages_are_kept() -> None:
    messages = [{"role": "user", "content": f"{number} " + "x" * 100} for number in range(100)]
    found = Content(1000, Redaction()).of_call(chat(messages))["gen_ai.input.messages"]
    assert [m["parts"][0]["content"].split()[0] for m in json.loads(found)][-3:] == ["97", "98", "99"]


@given(st.integers(0, 300))
def test_a_secret_at_the_cut_is_seen_whole(before: int) -> None:
    secret = "4111 1111 1111 1111"
    content = Content(256, Redaction())
    text = "x" * before + " " + secret + " " + "y" * 300
    written = json.dumps(content.of_call(chat([{"role": "user", "content": text}])))
    assert "4111" not in written


@pytest.mark.parametrize(
    ("operation", "body", "expected"),
    [
        (Operation.TEXT_COMPLETION, {"prompt": "a"}, [("user", "a")]),
        (Operation.TEXT_COMPLETION, {"prompt": ["a", "b"]}, [("user", "a"), ("user", "b")]),
        (Operation.RESPONSES, {"input": "a"}, [("user", "a")]),
        (
            Operation.RESPONSES,
            {"input": [{"role": "user", "content": [{"type": "input_text", "text": "a"}]}]},
            [("user", "a")],
        ),
        (Operation.CHAT, {"messages": "no list"}, []),
        (Operation.CHAT, {"messages": [1, None, {"content": 5}]}, [("user", None)]),
        (Operation.EMBEDDINGS, {"input": "a"}, []),
    ],
)
def test_questions_of_each_operation_are_read(
    operation: Operation, body: dict[str, Any], expected: list[tuple[str, str | None]]
) -> None:
    call = Call(operation, "m", msgspec.json.encode(body))
    written = Content(1000, Redaction()).of_call(call).get("gen_ai.input.messages", "[]")
    told = [(m["role"], m["parts"][0]["content"] if m["parts"] else None) for m in json.loads(written)]
    assert told == expected


def test_instructions_and_tools_of_the_responses_api_are_read() -> None:
    content = Content(1000, Redaction())
    body = {
        "instructions": "Be kind.",
        "input": [
            {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "1", "output": "sunny"},
        ],
    }
    found = content.of_call(Call(Operation.RESPONSES, "m", msgspec.json.encode(body)))
    assert json.loads(found["gen_ai.system_instructions"]) == [{"type": "text", "content": "Be kind."}]
    assert [m["parts"][0] for m in json.loads(found["gen_ai.input.messages"])] == [
        {"type": "tool_call", "id": "1", "name": "f", "arguments": "{}"},
        {"type": "tool_call_response", "id": "1", "response": "sunny"},
    ]
    answer = {"output": [{"type": "message", "role": "assistant", "content": [{"text": "Yes."}]}]}
    (said,) = json.loads(
        content.of_answer(Operation.RESPONSES, msgspec.json.encode(answer))["gen_ai.output.messages"]
    )
    assert said["parts"] == [{"type": "text", "content": "Yes."}]


def test_a_body_that_is_too_large_is_not_looked_into() -> None:
    call = chat([{"role": "user", "content": "x" * 5_000_000}])
    assert Content(1000, Redaction()).of_call(call) == {}


@given(st.binary(max_size=300))
def test_whatever_came_as_an_answer_does_no_harm(body: bytes) -> None:
    content = Content(300, Redaction())
    assert isinstance(content.of_answer(Operation.CHAT, body), dict)
    assert isinstance(content.of_call(Call(Operation.CHAT, "m", body)), dict)


async def test_a_long_stream_is_heard_up_to_a_bound_and_read_to_its_end() -> None:
    pieces = [chunk("word ") for _ in range(5_000)]
    content = Content(1000, Redaction())
    heard = Heard(Operation.CHAT, Stream([*pieces, chunk(finish_reason="stop"), DONE]), 1000)
    read = b""
    while data := await heard.read():
        read += data
    assert read == b"".join([*pieces, chunk(finish_reason="stop"), DONE])
    said = content_of(heard, content)
    assert len(said.encode()) <= 1000
    assert "word word" in said
    assert sum(map(len, heard._text)) < 10_000


def content_of(heard: Heard, content: Content) -> str:
    return heard.said(content)["gen_ai.output.messages"]
