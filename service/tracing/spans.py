"""The spans of one sampled request.

POST /v1/chat/completions gpt-4o     SERVER
├── queue                            if it waited
├── cache
├── reserve
├── chat gpt-4o                      CLIENT, one for each attempt at an upstream
└── settle
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import structlog
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanContext, SpanKind, Status, StatusCode, Tracer, set_span_in_context

from service.domain import FAULTS, AttemptKind, Call, Outcome, RequestRecord
from service.errors import WeirError
from service.ports import StreamedAnswer, Target, WholeAnswer
from service.tracing import attributes as told
from service.tracing.content import Content, Heard

if TYPE_CHECKING:
    from collections.abc import Mapping


log = structlog.get_logger("weir")


class Scene:
    """What all requests' spans need beside the tracer."""

    __slots__ = ("content", "servers", "tells_upstreams", "tracer")

    def __init__(self, tracer: Tracer, *, tells_upstreams: bool) -> None:
        self.tracer = tracer
        self.tells_upstreams = tells_upstreams
        self.servers: Mapping[str, told.Attributes] = {}
        self.content: Content | None = None


class RequestSpans:
    """See `ports.Spans`. It holds nothing of the request but numbers and names."""

    __slots__ = ("_attempts", "_baggage", "_context", "_model", "_parent", "_parties", "_scene", "_span",
                 "_told")  # fmt: skip

    def __init__(
        self,
        scene: Scene,
        span: Span,
        baggage: tuple[tuple[str, str], ...] = (),
        parent: RequestSpans | None = None,
    ) -> None:
        self._scene = scene
        self._span = span
        self._baggage = baggage
        self._parent = parent
        self._context = set_span_in_context(span, Context())
        self._parties = 0 if parent is not None else 1
        self._attempts: set[Attempt] = set()
        self._told = False
        self._model = ""

    def part(self, name: str) -> RequestSpans:
        span = self._scene.tracer.start_span(name, self._context)
        return RequestSpans(self._scene, span, self._baggage, self)

    def opened(self) -> None:
        self._parties += 1
        if self._parent is not None:
            self._parent.opened()

    def step(self, name: str) -> Step:
        return Step(self._scene.tracer, name, self._context)

    def attempt(self, call: Call, target: Target, kind: AttemptKind) -> Attempt:
        span = self._scene.tracer.start_span(
            f"{call.operation.genai_name} {target.model[: told.MOST_LETTERS]}",
            self._context,
            SpanKind.CLIENT,
            told.of_question(call, target, kind) | self._scene.servers.get(target.upstream.name, {}),
        )
        attempt = Attempt(self._scene, span, call, self._baggage, self._attempts)
        self._attempts.add(attempt)
        return attempt

    def first_token(self, seconds: float) -> None:
        self._span.add_event("first_token", {"weir.time_to_first_token_seconds": seconds})

    def closed(self, record: RequestRecord) -> None:
        self._span.set_attributes(told.of_exchange(record))
        if record.outcome is not Outcome.SUCCESS:
            _fail(self._span, record.outcome, record.error_code or record.outcome.value)
        self._told = True
        self._model = record.request_model if record.upstream else ""

    def finished(self, method: str, route: str, status: int, outcome: Outcome, request_id: str) -> None:
        span = self._span
        span.update_name(f"{method} {route} {self._model}".rstrip())
        span.set_attributes(
            {
                "http.request.method": method,
                "http.route": route,
                "http.response.status_code": status,
                "weir.request_id": request_id,
                "weir.outcome": outcome.value,
            }
        )
        if outcome is not Outcome.SUCCESS and not self._told:
            _fail(span, outcome, str(status))
        self.left()

    def left(self) -> None:
        self._parties -= 1
        if self._parties == 0:
            for attempt in tuple(self._attempts):
                attempt.done(None)
            self._span.end()
        if self._parent is not None:
            self._parent.left()


class Step:
    """See `ports.Step`: from the entry of a block to its end."""

    __slots__ = ("_context", "_name", "_span", "_tracer")

    def __init__(self, tracer: Tracer, name: str, context: Context | None = None) -> None:
        self._tracer = tracer
        self._name = name
        self._context = context

    def __enter__(self) -> Self:
        self._span = self._tracer.start_span(self._name, self._context)
        return self

    def note(self, **attributes: Any) -> None:
        self._span.set_attributes({f"weir.{name}": value for name, value in attributes.items()})

    def __exit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, trace: TracebackType | None
    ) -> None:
        if raised is not None:
            _fail(self._span, *told.of_error(raised))
        self._span.end()


class Attempt:
    """See `ports.AttemptSpan`. It lets go of the question when it ends."""

    __slots__ = (
        "_call",
        "_ended_at",
        "_first_chunk",
        "_heard",
        "_open",
        "_scene",
        "_span",
        "_started",
        "_whole",
        "headers",
    )

    def __init__(
        self,
        scene: Scene,
        span: Span,
        call: Call,
        baggage: tuple[tuple[str, str], ...],
        attempts: set[Attempt],
    ) -> None:
        self._scene = scene
        self._span = span
        self._open: set[Attempt] | None = attempts
        self._started = time.perf_counter()
        self._first_chunk: float | None = None
        self._ended_at: int | None = None
        self._call: Call | None = call if scene.content is not None else None
        self._heard: Heard | None = None
        self._whole: bytes | None = None
        self.headers = _headers(span.get_span_context(), baggage) if scene.tells_upstreams else baggage

    def answered(self, answer: WholeAnswer | StreamedAnswer) -> WholeAnswer | StreamedAnswer:
        if isinstance(answer, WholeAnswer):
            self._ended_at = time.time_ns()
            if self._call is not None:
                self._whole = answer.body
            return answer
        if self._call is None or self._scene.content is None:
            return answer
        self._heard = self._scene.content.hears(self._call.operation, answer)
        return self._heard

    def begun(self) -> None:
        if self._ended_at is None:
            self._first_chunk = time.perf_counter() - self._started

    def failed(self, error: Exception) -> None:
        if self._open is not None:
            outcome, code = told.of_error(error)
            self._span.set_attribute("weir.attempt.outcome", outcome.value)
            _fail(self._span, outcome, code, server=False)
            self._end(None)

    def cut(self, error: WeirError) -> None:
        if self._open is not None:
            self._span.set_attribute("weir.attempt.given_up", True)
            self.failed(error)

    def done(self, record: RequestRecord | None) -> None:
        if self._open is None:
            return
        span, outcome = self._span, Outcome.SUCCESS
        if record is None:
            span.set_attribute("weir.attempt.given_up", True)
        else:
            span.set_attributes(told.of_answer(record, self._first_chunk))
            if self._ended_at is None:  # what came after a whole answer is not the upstream's
                outcome = record.outcome
                if outcome is not Outcome.SUCCESS:
                    _fail(span, outcome, record.error_code or outcome.value)
        span.set_attribute("weir.attempt.outcome", outcome.value)
        self._end(self._ended_at)

    def _end(self, at: int | None) -> None:
        if self._open is not None:
            self._open.discard(self)
            self._open = None
        self._capture()
        self._span.end(at)

    def _capture(self) -> None:
        content, call, heard = self._scene.content, self._call, self._heard
        self._call = self._heard = None
        whole, self._whole = self._whole, None
        if content is None or call is None:
            return
        try:
            self._span.set_attributes(content.of_call(call))
            if heard is not None:
                self._span.set_attributes(heard.said(content))
            elif whole is not None:
                self._span.set_attributes(content.of_answer(call.operation, whole))
        except Exception:  # whatever somebody has sent: a span must not cost a request its books
            log.exception("trace_content_failed")


def _headers(context: SpanContext, baggage: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    parent = f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
    state = context.trace_state.to_header() if context.trace_state else ""
    return (("traceparent", parent), *((("tracestate", state),) if state else ()), *baggage)


def _fail(span: Span, outcome: Outcome, code: str, *, server: bool = True) -> None:
    """To a client any answer but a good one is an error; a server has done well to refuse what is wrong."""
    span.set_attribute("error.type", code)
    if outcome in FAULTS or (not server and outcome is not Outcome.CLIENT_DISCONNECTED):
        span.set_status(Status(StatusCode.ERROR, code))
