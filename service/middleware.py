"""What surrounds every request and knows nothing of models. Pure ASGI, one concern each.

From the outside: `RequestContextMiddleware` (ids, headers, the canonical log line), then CORS where
it is set, `ErrorMiddleware` (every error as one envelope), `GateMiddleware` (who calls),
`BodyMiddleware` (how much, how soon).
"""

from __future__ import annotations

import asyncio
import math
import random
import re
import time
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec
import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.address import Network
from service.api.context import SCOPE_KEY, RequestContext, context_of, source_headers
from service.api.idempotency import REPLAY_OF
from service.api.openai import send_json
from service.api.sse import error_event
from service.api.standing import standing_headers
from service.canonical import RequestLog
from service.deadlines import Deadline, Sweep
from service.domain import Outcome
from service.errors import (
    BodyTooLarge,
    CallerGone,
    InternalError,
    RequestTimeout,
    ShuttingDown,
    UpstreamError,
    WeirError,
)
from service.lifecycle import Lifecycle
from service.logging import TraceIds, request_id_of_task, trace_of_task
from service.overload import Gate, priority_of
from service.serving import Serving
from service.telemetry import Metrics
from service.tracing import Tracing

PROTECTED: Final = ("/v1/", "/api/")
MODEL_ROUTES: Final = frozenset(
    (
        *("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"),
        *("/api/v1/chat", "/api/v1/chat/stream", "/api/v1/generate", "/api/v1/batch"),
    )
)
"""Routes whose every request has an outcome, also when it never reached a model."""

_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
# uvicorn checks each header anew for each answer, so JSON gets only those that mean something to it.
_FOR_STREAMS: Final = (
    (b"x-content-type-options", b"nosniff"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
)
_FOR_ANSWERS: Final = (*_FOR_STREAMS, (b"cache-control", b"no-store"))
_FOR_PAGES: Final = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (
        b"content-security-policy",
        (
            b"default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
            b"img-src 'self' data:; worker-src blob:; frame-ancestors 'none'"
        ),
    ),
)
_GONE_STATUS: Final = CallerGone.status

log = structlog.get_logger("weir")


class RequestContextMiddleware:
    """Gives each request its context and id, and writes its one canonical log line."""

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        lifecycle: Lifecycle,
        trusted: Sequence[Network],
        tracing: Tracing,
        log: RequestLog,
        plain: Mapping[object, str],
    ) -> None:
        """`plain` are the templates of the routes that are Starlette's alone, by their endpoints."""
        self._app = app
        self._plain = plain
        self._log = log
        self._tracing = tracing
        self._trusted = trusted
        self._metrics = metrics
        metrics.expect(MODEL_ROUTES)
        self._lifecycle = lifecycle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        context = RequestContext(scope, "", self._trusted)
        context.request_id = _request_id(context.headers.get(b"x-request-id"))
        scope[SCOPE_KEY] = context
        request_id_of_task.set(context.request_id)
        if context.path.startswith(PROTECTED):
            trace = context.trace = self._tracing.begin(context.headers)
            trace_of_task.set(TraceIds(trace.id, trace.span_id) if trace is not None else None)

        async def send_with_headers(message: Message) -> None:
            if context.status is None:  # the first message is the head
                context.status = message["status"]
                message["headers"] = [*message["headers"], *_headers(context, message)]
                if self._lifecycle.draining:
                    # Who keeps a connection open would send the next request into its end.
                    message["headers"].append((b"connection", b"close"))
            elif not message.get("more_body"):
                context.complete = True
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        finally:
            self._finish(scope, context)
            # uvicorn keeps the scope until the next request on the connection; the body need not wait for it.
            del scope[SCOPE_KEY]

    def _finish(self, scope: Scope, context: RequestContext) -> None:
        seconds = time.perf_counter() - context.started
        route, status = self._route(scope, context), context.status or _GONE_STATUS
        self._metrics.http(context.method, route, status, seconds)
        record = context.record
        outcome = record.outcome if record is not None else _outcome_of(status)
        if record is None and route in MODEL_ROUTES and REPLAY_OF not in scope:
            self._metrics.refused(route, outcome)
        if context.trace is not None and context.trace.spans is not None:
            context.trace.spans.finished(context.method, route, status, outcome, context.request_id)
        self._log.write(
            context,
            route=route,
            status=status,
            outcome=outcome,
            seconds=seconds,
            replay_of=scope.get(REPLAY_OF),
        )

    def _route(self, scope: Scope, context: RequestContext) -> str:
        """The route's template, never the raw path: labels come from bounded sets."""
        if context.record is not None:
            return context.record.route
        if context.path in MODEL_ROUTES:
            return context.path
        # FastAPI's router leaves its own routes in the scope, and of all others only the endpoint.
        route = scope.get("route")
        return getattr(route, "path", None) or self._plain.get(scope.get("endpoint"), "none")


class ErrorMiddleware:
    """Turns what is raised into OpenAI's envelope, or into an event where a stream has begun."""

    def __init__(self, app: ASGIApp, *, debug: bool = False) -> None:
        self._app = app
        self._debug = debug

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        try:
            await self._app(scope, receive, send)
        except CallerGone:
            return  # nobody is there to be told
        except WeirError as error:
            await answer_error(context_of(scope), send, error)
        except asyncio.CancelledError:
            # The drain is over, and with this the request: raised further, uvicorn would log a fault.
            await answer_error(context_of(scope), send, ShuttingDown("This server is shutting down."))
        except Exception as error:  # the last resort: a fault of ours must not be a silent end
            log.exception("internal_error")
            detail = f" {type(error).__name__}: {error}" if self._debug else ""
            fault = InternalError(f"An internal error happened; see the log for this request id.{detail}")
            await answer_error(context_of(scope), send, fault)


class GateMiddleware:
    """Asks for a credential below /v1 and /api, and for room, before anything else of the request is read.

    Here a request meets the configuration that it keeps to its end.
    """

    def __init__(self, app: ASGIApp, serving: Serving, gate: Gate) -> None:
        self._app = app
        self._serving = serving
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(PROTECTED):
            return await self._app(scope, receive, send)
        context = context_of(scope)
        snapshot = context.snapshot = self._serving.now
        principal = snapshot.authenticator.principal(context.header(b"authorization"))
        context.principal = principal
        if scope["method"] == "POST" and scope["path"] in MODEL_ROUTES:
            context.priority = priority_of(context.header(b"x-weir-priority"), principal.priority)
            self._gate.check(principal.tenant, context.priority)
        snapshot.enter()
        try:
            await self._app(scope, receive, send)
        finally:
            snapshot.leave()


class BodyMiddleware:
    """Reads the body, up to a size and within a time, into the request's context."""

    def __init__(self, app: ASGIApp, sweep: Sweep, *, max_bytes: int, timeout_seconds: float) -> None:
        self._app = app
        self._sweep = sweep
        self._max_bytes = max_bytes
        self._timeout = timeout_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        bodiless = scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS")
        if bodiless or not scope["path"].startswith(PROTECTED):  # what nobody guards reads no body either
            return await self._app(scope, receive, send)
        context = context_of(scope)
        declared = context.headers.get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > self._max_bytes:
            raise self._too_large()
        context.body = await self._read(receive)
        # FastAPI's own routes read the body by `receive`; the plain ones take it from the context.
        again = receive if scope["path"].startswith("/v1/") else _Again(context.body, receive)
        await self._app(scope, again, send)

    async def _read(self, receive: Receive) -> bytes:
        until = asyncio.get_running_loop().time() + self._timeout
        with Deadline(self._sweep, until, _slow_body):
            return await self._collect(receive)

    async def _collect(self, receive: Receive) -> bytes:
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise CallerGone("The caller left before its request was whole.")
            part = message.get("body", b"")
            size += len(part)
            if size > self._max_bytes:
                raise self._too_large()
            parts.append(part)
            if not message.get("more_body"):
                return b"".join(parts)

    def _too_large(self) -> BodyTooLarge:
        return BodyTooLarge(f"The body of your request is larger than {self._max_bytes} bytes.")


def _slow_body() -> RequestTimeout:
    return RequestTimeout("The body of your request did not arrive in time.")


class _Again:
    """A `receive` that gives the body which was read already, then whatever comes."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def __call__(self) -> Message:
        if self._body is None:
            return await self._receive()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}


class PlainRoutes:
    """Hands the plain routes their requests at once, past the layers that only FastAPI's routes need.

    They are mounted in the application too: what reaches it by another way finds them there.
    """

    def __init__(self, app: ASGIApp, endpoints: Mapping[str, ASGIApp]) -> None:
        self._app = app
        self._endpoints = endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            endpoint = self._endpoints.get(scope["path"])
            if endpoint is not None:
                return await endpoint(scope, receive, send)
        await self._app(scope, receive, send)


async def answer_error(context: RequestContext, send: Send, error: WeirError) -> None:
    """Send `error`: as an answer, or as the last event of the stream that has begun."""
    if context.complete:
        return
    context.error_code = error.code
    if context.status is None:
        await send_json(send, msgspec.json.encode(error.body()), error.status, _advice(context, error))
        return
    if context.dialect is not None:
        last = error_event(context.dialect, error)
        await send({"type": "http.response.body", "body": last, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def _advice(context: RequestContext, error: WeirError) -> tuple[tuple[bytes, bytes], ...]:
    """Headers that tell a client whether, and when, to try again."""
    tried = context.record.attempts if context.record is not None else 0
    # What Weir has tried again already, its callers need not multiply; of what is Weir's own, nothing was.
    again = error.retry and (tried <= 1 or error.status == 429 or not isinstance(error, UpstreamError))
    headers = [(b"x-should-retry", b"true" if again else b"false")]
    if error.retry_after_seconds is not None:
        headers.append((b"retry-after", str(max(math.ceil(error.retry_after_seconds), 1)).encode()))
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if isinstance(error, UpstreamError) and error.upstream_request_id:
        headers.append((b"x-upstream-request-id", error.upstream_request_id.encode("latin-1", "replace")))
    return tuple(headers)


def _request_id(given: bytes | None) -> str:
    text = given.decode("latin-1") if given else ""
    return text if _REQUEST_ID.fullmatch(text) else f"{random.getrandbits(128):032x}"


def _headers(context: RequestContext, message: Message) -> list[tuple[bytes, bytes]]:
    headers = [
        (b"x-request-id", context.request_id.encode()),
        (b"x-process-time", b"%.6f" % (time.perf_counter() - context.started)),
    ]
    if context.trace is not None and context.trace.id:
        headers.append((b"x-trace-id", context.trace.id.encode()))
    record = context.record
    if record is not None:
        if message["status"] < 400:
            headers.extend(source_headers(record))
        if record.cache is not None:
            headers.append((b"x-weir-cache", record.cache.encode()))
        if context.exchange is not None and context.exchange.standing is not None:
            headers.extend(standing_headers(context.exchange.standing))
    if not context.path.startswith(PROTECTED):
        headers.extend(_FOR_PAGES)
    elif context.streams:
        headers.extend(_FOR_STREAMS)
    else:
        headers.extend(_FOR_ANSWERS)
    return headers


def _outcome_of(status: int) -> Outcome:
    if status == _GONE_STATUS:
        return Outcome.CLIENT_DISCONNECTED
    if status == 429:
        return Outcome.RATE_LIMITED
    if status == 503:
        return Outcome.OVERLOADED
    if status >= 500:
        return Outcome.INTERNAL_ERROR
    return Outcome.CLIENT_ERROR if status >= 400 else Outcome.SUCCESS
