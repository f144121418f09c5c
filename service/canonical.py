"""The canonical line: one line of the log for each request, a view of its record as the metrics are.

`RequestLine` is its schema, which docs/logs.md and docs/logs.schema.json are made of. Where the log is JSON,
a line is encoded here and not by structlog's chain, which takes three times as long.
"""

from __future__ import annotations

import logging
import math
import zlib
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal

import msgspec
import structlog

from service.api.context import RequestContext
from service.domain import FAULTS, CacheUse, Outcome, RequestRecord, UsageSource
from service.logging import encode, json_lines
from service.overload import Priority

_DIGITS: Final = 6
"""Of seconds: microseconds."""
_PRIORITIES: Final[dict[Priority, Literal["high", "normal", "low"]]] = {
    Priority.HIGH: "high",
    Priority.NORMAL: "normal",
    Priority.LOW: "low",
}
_ADDED: Final = ("timestamp", "level", "event")
_encode: Final = msgspec.json.Encoder().encode

log = structlog.get_logger("weir")


def _meta(text: str, otel: str = "", *, tz: bool | None = None) -> msgspec.Meta:
    """What a field is, and what OpenTelemetry calls it."""
    return msgspec.Meta(description=text, extra_json_schema={"x-otel": otel} if otel else None, tz=tz)


class RequestLine(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    """A field that is not there is not known, or has nothing to say of this request."""

    timestamp: Annotated[datetime, _meta("When the request ended, UTC.", "Timestamp", tz=True)]
    level: Annotated[
        Literal["info", "warning"],
        _meta("`warning`: it ended badly through no fault of the caller, or was slow.", "SeverityText"),
    ]
    event: Annotated[
        Literal["request"], _meta("`request`: what tells this line from all others.", "EventName")
    ]
    request_id: Annotated[
        str,
        _meta(
            "The caller's `X-Request-ID`, or one made here; a caller may use one twice.", "weir.request_id"
        ),
    ]
    method: Annotated[str, _meta("HTTP method.", "http.request.method")]
    route: Annotated[
        str, _meta("The route's template, never the raw path; `none`: no such route.", "http.route")
    ]
    status: Annotated[
        int,
        _meta(
            "HTTP status; 499: the caller left before it. A stream's is 200, however it ended.",
            "http.response.status_code",
        ),
    ]
    outcome: Annotated[Outcome, _meta("How the request truly ended.", "weir.outcome")]
    duration_seconds: Annotated[
        float,
        _meta("From the request's head to the last byte of its answer.", "http.server.request.duration"),
    ]
    key: Annotated[str, _meta("Name of the API key, never the key; `anonymous`: none was known.", "weir.key")]
    tenant: Annotated[str, _meta("The tenant that the key belongs to.", "weir.tenant")]
    id: Annotated[
        str | None,
        _meta("The ledger's entry of it, the only one of this id; none where no model was asked for."),
    ] = None
    trace_id: Annotated[str | None, _meta("Its trace, 32 hexadecimal digits.", "TraceId")] = None
    span_id: Annotated[str | None, _meta("Its span in that trace, where spans are made.", "SpanId")] = None
    error_code: Annotated[
        str | None, _meta("Code of the error that the caller got: docs/errors.md.", "error.type")
    ] = None
    slow: Annotated[Literal[True] | None, _meta("It took longer than `LOG_SLOW_REQUEST_SECONDS`.")] = None
    sample_ratio: Annotated[
        float | None,
        _meta(
            "The line stands for 1 / `sample_ratio` of its kind: `LOG_SAMPLE_SUCCESS`. Not there: for itself."
        ),
    ] = None
    priority: Annotated[Literal["high", "normal", "low"] | None, _meta("Its class under overload.")] = None
    operation: Annotated[
        str | None,
        _meta(
            "What was asked of the model: `chat`, `text_completion` or `embeddings`.", "gen_ai.operation.name"
        ),
    ] = None
    model: Annotated[str | None, _meta("The model that was asked for.", "gen_ai.request.model")] = None
    response_model: Annotated[
        str | None, _meta("The model that answered, as the upstream names it.", "gen_ai.response.model")
    ] = None
    answered_by: Annotated[
        str | None, _meta("The model that stood in for the one that was asked for.", "weir.answered_by")
    ] = None
    upstream: Annotated[str | None, _meta("Name of the upstream that was asked last.", "weir.upstream")] = (
        None
    )
    provider: Annotated[str | None, _meta("Whose it is.", "gen_ai.provider.name")] = None
    stream: Annotated[bool | None, _meta("A stream was asked for.", "gen_ai.request.stream")] = None
    cache: Annotated[CacheUse | None, _meta("What the response cache was to it.", "weir.cache")] = None
    attempts: Annotated[int | None, _meta("Times that upstreams were asked.", "weir.attempts")] = None
    input_tokens: Annotated[
        int | None, _meta("Tokens of the question, cached ones too.", "gen_ai.usage.input_tokens")
    ] = None
    output_tokens: Annotated[
        int | None, _meta("Tokens of the answer, reasoning too.", "gen_ai.usage.output_tokens")
    ] = None
    cached_input_tokens: Annotated[
        int | None,
        _meta(
            "Part of `input_tokens`: read from the provider's cache.", "gen_ai.usage.cache_read.input_tokens"
        ),
    ] = None
    cache_write_tokens: Annotated[
        int | None,
        _meta("Part of `input_tokens`: written to it.", "gen_ai.usage.cache_write.input_tokens"),
    ] = None
    reasoning_tokens: Annotated[
        int | None, _meta("Part of `output_tokens`.", "gen_ai.usage.reasoning.output_tokens")
    ] = None
    audio_input_tokens: Annotated[int | None, _meta("Part of `input_tokens`.")] = None
    audio_output_tokens: Annotated[int | None, _meta("Part of `output_tokens`.")] = None
    usage_source: Annotated[
        UsageSource | None,
        _meta("Who counted the tokens: the provider, or Weir by an estimate.", "weir.usage_source"),
    ] = None
    cost_usd: Annotated[
        float | None, _meta("US dollars; not there: nobody knows the price.", "weir.cost_usd")
    ] = None
    cost_source: Annotated[
        str | None, _meta("Where the price is from: the table, `override`, `cache`, or `unpriced`.")
    ] = None
    saved_usd: Annotated[
        float | None, _meta("What an answer from the cache had cost when it was first given.")
    ] = None
    time_to_first_token_seconds: Annotated[
        float | None, _meta("Of a stream: from the request's arrival.", "gen_ai.response.time_to_first_chunk")
    ] = None
    time_per_output_token_seconds: Annotated[
        float | None,
        _meta("Of a stream: the mean after its first token.", "gen_ai.server.time_per_output_token"),
    ] = None
    queue_seconds: Annotated[float | None, _meta("Wait for a place, where it had to wait.")] = None
    upstream_seconds: Annotated[
        float | None,
        _meta("All attempts, each until the whole answer or the first event of its stream was there."),
    ] = None
    overhead_seconds: Annotated[
        float | None, _meta("Weir's own time: neither the upstream's nor spent in the queue.")
    ] = None
    finish_reason: Annotated[
        str | None, _meta("Why the model stopped, in its own words.", "gen_ai.response.finish_reasons")
    ] = None
    response_id: Annotated[str | None, _meta("The answer's id.", "gen_ai.response.id")] = None
    upstream_request_id: Annotated[
        str | None, _meta("The provider's id of the call, for its support.", "weir.upstream_request_id")
    ] = None
    conversation_id: Annotated[
        str | None, _meta("The conversation that it belongs to.", "weir.conversation_id")
    ] = None
    replay_of: Annotated[
        str | None,
        _meta(
            "Answered by `Idempotency-Key` with what the request of this id got: no model was asked, "
            "and no metric of models counts it."
        ),
    ] = None


class RequestLog:
    """Writes the lines. Requests that took longer than `slow_seconds` are told as warnings; 0: none is slow.

    Of those that went well, and were not slow, the share `keep` is written, and `sampled` is told of each
    that is left out. At level debug all are written.
    """

    def __init__(self, *, slow_seconds: float = 0.0, keep: float = 1.0, sampled: Callable[[], None]) -> None:
        self._slow = slow_seconds or math.inf
        self._keep = keep
        self._sampled = sampled
        self._lines = json_lines()
        self._root = logging.getLogger()

    def write(
        self,
        context: RequestContext,
        *,
        route: str,
        status: int,
        outcome: Outcome,
        seconds: float,
        replay_of: str | None = None,
    ) -> None:
        """One line; for a request that asked a model several times, one for each of its records."""
        if not context.batch:
            return self._write(context, context.record, route, status, outcome, seconds, replay_of)
        for record in context.batch:
            self._write(context, record, route, status, record.outcome, record.duration_seconds, replay_of)

    def take_dropped(self) -> int:
        """Lines of this process that were dropped since the last call, because nobody read."""
        return self._lines.take_dropped() if self._lines is not None else 0

    def _write(
        self,
        context: RequestContext,
        record: RequestRecord | None,
        route: str,
        status: int,
        outcome: Outcome,
        seconds: float,
        replay_of: str | None,
    ) -> None:
        slow = seconds > self._slow
        trouble = slow or status >= 500 or outcome in FAULTS
        lines, level, trace = self._lines, self._root.level, context.trace
        trace_id = trace.id or None if trace is not None else None
        if lines is not None and level > (logging.WARNING if trouble else logging.INFO):
            return
        sampling = self._keep < 1 and outcome is Outcome.SUCCESS and not trouble and level > logging.DEBUG
        if sampling and not kept(context.request_id, trace_id, self._keep):
            self._sampled()
            return
        principal = context.principal
        # In the order of its fields, and the rest by assignment: by fifty names it takes four times as long.
        line = RequestLine(
            datetime.now(UTC),
            "warning" if trouble else "info",
            "request",
            context.request_id,
            context.method,
            route,
            status,
            outcome,
            round(seconds, _DIGITS),
            principal.name,
            principal.tenant,
        )
        if trace is not None:
            line.trace_id, line.span_id = trace_id, trace.span_id or None
        if slow:
            line.slow = True
        if sampling:
            line.sample_ratio = self._keep
        line.error_code, line.replay_of = context.error_code, replay_of
        if record is not None:
            _add_record(line, record, _PRIORITIES[context.priority])
        if lines is not None:
            # A warning here is no word of a process that is about to end: it waits with the others.
            lines.msg(_json(line))
        else:
            (log.warning if trouble else log.info)("request", **_told(line))


def kept(request_id: str, trace_id: str | None, ratio: float) -> bool:
    """Whether the lines of a request are among the share `ratio` of all.

    By the trace's id as OpenTelemetry's samplers choose by it, so that of equal shares the same are kept;
    without a trace by the request's id.
    """
    if trace_id is not None:
        return int(trace_id[16:], 16) < round(ratio * 2**64)
    return zlib.crc32(request_id.encode()) < ratio * 2**32


def _add_record(line: RequestLine, record: RequestRecord, priority: Literal["high", "normal", "low"]) -> None:
    """What the line says of the call to the model."""
    usage, cost = record.usage, record.cost
    line.id = record.id
    line.error_code = record.error_code
    line.priority = priority
    line.operation = record.operation.genai_name
    line.model = record.request_model
    line.response_model = record.response_model or None
    line.answered_by = record.answered_by
    line.upstream = record.upstream or None
    line.provider = record.provider or None
    line.stream = record.stream
    line.cache = record.cache
    line.attempts = record.attempts
    line.input_tokens = line.output_tokens = 0
    if usage is not None:
        line.input_tokens, line.output_tokens = usage.input_tokens, usage.output_tokens
        line.cached_input_tokens = usage.cached_input_tokens or None
        line.cache_write_tokens = usage.cache_write_tokens or None
        line.reasoning_tokens = usage.reasoning_tokens or None
        line.audio_input_tokens = usage.audio_input_tokens or None
        line.audio_output_tokens = usage.audio_output_tokens or None
        line.usage_source = usage.source
    line.cost_usd, line.cost_source, line.saved_usd = cost.usd, cost.source, record.saved_usd
    line.time_to_first_token_seconds = _rounded(record.time_to_first_token_seconds)
    line.time_per_output_token_seconds = _rounded(record.time_per_output_token_seconds)
    line.queue_seconds = _rounded(record.queue_seconds)
    line.overhead_seconds = _rounded(record.overhead_seconds)
    line.upstream_seconds = round(record.upstream_seconds, _DIGITS)
    line.finish_reason = record.finish_reason
    line.response_id = record.response_id
    line.upstream_request_id = record.upstream_request_id
    line.conversation_id = record.conversation_id


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, _DIGITS)


def _json(line: RequestLine) -> bytes:
    try:
        return _encode(line)
    except ValueError:  # half a surrogate pair in an upstream's words
        return encode(msgspec.to_builtins(line, builtin_types=(datetime,)))


def _told(line: RequestLine) -> dict[str, Any]:
    """The fields as structlog takes them: it adds time and level by itself."""
    fields = msgspec.structs.asdict(line)
    return {name: fields[name] for name in fields if fields[name] is not None and name not in _ADDED}
