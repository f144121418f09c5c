"""The request path: reserve, ask, meter, settle. Read `Exchange` from top to bottom.

One `Exchange` is one request's way to a model and back. Whatever happens on it, its record is closed
exactly once: with the outcome, the tokens and the cost, also when the caller has left.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator
from types import TracebackType
from typing import Any, Final, Self

import msgspec

from service.deadlines import Deadline, IdleTimeout, Sweep
from service.domain import Call, Operation, Outcome, Principal, RequestRecord, Usage, UsageSource
from service.errors import (
    CallerGone,
    InvalidRequest,
    ShuttingDown,
    StreamTruncated,
    UpstreamError,
    UpstreamTimeout,
    WeirError,
)
from service.metering import StreamMeter, estimate_answer, read_answer
from service.ports import (
    Catalogue,
    Ledger,
    Limiter,
    PriceBook,
    Recorder,
    StreamedAnswer,
    Target,
    WholeAnswer,
)
from service.tokens import estimate_request

BACKOFF_SECONDS: Final = 0.5
BACKOFF_MOST_SECONDS: Final = 8.0
RETRY_AFTER_MOST_SECONDS: Final = 10.0
"""An upstream that asks for a longer pause gets it from the caller, who is told so."""
MODEL_LETTERS: Final = 200
"""Of a model's name, which a caller may make as long as it likes."""
END_SECONDS: Final = 1.0
"""How long the end of a connection may lag behind the stream's own end mark."""


class _Fields(msgspec.Struct):
    """The fields of a request body that Weir reads; the rest passes by."""

    model: str = ""
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None


_decode_fields: Final = msgspec.json.Decoder(_Fields).decode


class Limits(msgspec.Struct, frozen=True):
    """Deadlines and attempts of the request path."""

    timeout_seconds: float = 600.0
    """For a whole answer or the first event of a stream, all attempts together."""
    idle_seconds: float = 120.0
    max_retries: int = 2


class ChatService:
    """What all requests share; `exchange` begins the way of one."""

    def __init__(
        self,
        *,
        catalogue: Catalogue,
        prices: PriceBook,
        limiter: Limiter,
        ledger: Ledger,
        recorder: Recorder,
        limits: Limits,
    ) -> None:
        self.catalogue = catalogue
        self.prices = prices
        self.limiter = limiter
        self.ledger = ledger
        self.recorder = recorder
        self.limits = limits
        self.sweep = Sweep()
        self._settling: set[asyncio.Task[None]] = set()

    def exchange(
        self,
        *,
        request_id: str,
        route: str,
        operation: Operation,
        principal: Principal,
        traceparent: str | None = None,
    ) -> Exchange:
        record = RequestRecord(
            id=new_id(), request_id=request_id, route=route, operation=operation, principal=principal
        )
        return Exchange(self, record, traceparent)

    async def settled(self) -> None:
        """Returns when every exchange that was cut short has been settled."""
        while self._settling:
            await asyncio.wait(self._settling)

    def settle_later(self, exchange: Exchange) -> asyncio.Task[None]:
        """Settle in a task of its own, which a cancelled request cannot take down with it."""
        task = asyncio.get_running_loop().create_task(exchange.settle())
        self._settling.add(task)
        task.add_done_callback(self._settling.discard)
        return task


class Exchange:
    """One request's way; used as `async with`, which settles at its end.

    `open` asks the upstream; then either `whole` holds the answer's bytes, or `events` gives the
    stream's. Errors raised inside decide the record's outcome.
    """

    __slots__ = (
        "_call",
        "_delivered",
        "_first",
        "_first_token_at",
        "_meter",
        "_service",
        "_started",
        "_stream",
        "_traceparent",
        "_unanswered",
        "record",
        "sweep",
        "whole",
    )

    def __init__(self, service: ChatService, record: RequestRecord, traceparent: str | None) -> None:
        self.record = record
        self.whole: bytes | None = None
        self.sweep = service.sweep
        self._service = service
        self._traceparent = traceparent
        self._call: Call | None = None
        self._stream: StreamedAnswer | None = None
        self._meter: StreamMeter | None = None
        self._first = b""
        self._first_token_at: float | None = None
        self._unanswered = False
        self._delivered = False

    async def __aenter__(self) -> Self:
        self._started = time.perf_counter()
        self._service.recorder.opened(self.record, self._traceparent)
        return self

    async def open(self, call: Call, *, keep_text: bool = False) -> None:
        """Returns once the whole answer, or the first event of its stream, is there."""
        record, service = self.record, self._service
        self._call = call
        record.request_model, record.stream = call.model[:MODEL_LETTERS], call.stream
        target = service.catalogue.resolve(call.model)
        record.upstream, record.provider = target.upstream.name, target.upstream.provider
        await service.limiter.admit(record.principal)
        await self._ask(_addressed(call, target), target, keep_text)

    async def events(self) -> AsyncGenerator[bytes]:
        """The stream's whole events, one or more at a time, as the upstream sent them.

        Raises UpstreamError when the stream does not end as its protocol wants.
        """
        stream, meter = self._stream, self._meter
        if stream is None or meter is None:
            return
        yield self._first
        meter.check()
        with IdleTimeout(self.sweep, self._service.limits.idle_seconds, _stalled) as idle:
            while not meter.done:
                idle.waiting()
                data = await stream.read()
                idle.arrived()
                block = meter.feed(data) if data else meter.finish()
                self._note_first_token(meter)
                if block:
                    yield block
                meter.check()
        self._delivered = True
        await self._read_end(stream)

    def take_text(self) -> str:
        """The stream's text that came since the last call; for an exchange opened with `keep_text`."""
        return self._meter.take_text() if self._meter is not None else ""

    async def __aexit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, trace: TracebackType | None
    ) -> None:
        record = self.record
        record.outcome, record.error_code = _outcome(raised)
        if self._delivered and record.outcome is Outcome.CLIENT_DISCONNECTED:
            record.outcome, record.error_code = Outcome.SUCCESS, None  # it had all of it
        if self._unanswered and isinstance(raised, CallerGone):
            self._service.recorder.attempted(record, raised)
        record.duration_seconds = time.perf_counter() - self._started
        try:
            if self._stream is not None:
                await self._stream.close()
        except asyncio.CancelledError:
            self._service.settle_later(self)
            raise
        if isinstance(raised, asyncio.CancelledError):
            # The one who cancelled waits for nothing; the books wait for nobody.
            await asyncio.shield(self._service.settle_later(self))
        else:
            await self.settle()

    async def settle(self) -> None:
        """Close the record: usage and cost, metrics and span, ledger."""
        try:
            self.count()
        finally:  # a failed estimate must not keep the record out of the books
            self._service.recorder.closed(self.record)
            await self._service.ledger.enter(self.record)

    # -- asking ----------------------------------------------------------------------------------

    async def _ask(self, call: Call, target: Target, keep_text: bool) -> None:
        """Attempts, until one is good, none is left, or the time is over."""
        limits, record = self._service.limits, self.record
        loop = asyncio.get_running_loop()
        deadline = loop.time() + limits.timeout_seconds
        while True:
            record.attempts += 1
            try:
                began, self._unanswered = loop.time(), True
                try:
                    with Deadline(self.sweep, deadline, _late):
                        await self._attempt(call, target, keep_text)
                finally:
                    record.upstream_seconds += loop.time() - began
                self._unanswered = False
                self._service.recorder.attempted(record, None)
                return
            except UpstreamError as error:
                # Past the deadline the upstream may still be at it; any other failure is its last word.
                self._unanswered = loop.time() >= deadline
                self._service.recorder.attempted(record, error)
                record.upstream_request_id = error.upstream_request_id
                pause = _pause(record.attempts, error)
                spent = record.attempts > limits.max_retries or loop.time() + pause >= deadline
                if spent or not error.retry or pause > RETRY_AFTER_MOST_SECONDS:
                    raise
                await asyncio.sleep(pause)

    async def _attempt(self, call: Call, target: Target, keep_text: bool) -> None:
        record = self.record
        answer = await target.upstream.send(call)
        record.upstream_request_id = answer.upstream_request_id
        if isinstance(answer, WholeAnswer):
            facts = read_answer(answer.body)
            record.response_id, record.response_model = facts.id, facts.model
            record.usage, record.finish_reason = facts.usage, facts.finish_reason
            self.whole = answer.body
            return
        meter = StreamMeter(call.operation, hide_usage=not call.usage_shown, keep_text=keep_text)
        try:
            self._first = await _first_events(answer, meter)
        except BaseException:
            await answer.close()
            raise
        self._stream, self._meter = answer, meter
        self._note_first_token(meter)

    async def _read_end(self, stream: StreamedAnswer) -> None:
        """After the end mark: let the connection end by itself, so that it can serve again."""
        try:
            async with asyncio.timeout(END_SECONDS):
                while await stream.read():
                    pass
        except (TimeoutError, StreamTruncated):
            pass  # the answer is whole all the same

    # -- accounting ------------------------------------------------------------------------------

    def _note_first_token(self, meter: StreamMeter) -> None:
        if self._first_token_at is None and meter.has_output:
            self._first_token_at = time.perf_counter()
            self.record.time_to_first_token_seconds = self._first_token_at - self._started

    def count(self) -> None:
        """Put usage and cost into the record, as far as they are known by now."""
        record, meter = self.record, self._meter
        if meter is not None:
            record.response_id, record.response_model = meter.id, meter.model
            record.finish_reason = meter.finish_reason
            record.usage = meter.usage or meter.usage_or_estimate(self._estimated_input())
            self._note_pace()
        elif record.usage is None and (self.whole is not None or self._unanswered):
            # Unanswered: the upstream got the question, and counts it though nobody heard its answer.
            record.usage = Usage(
                input_tokens=self._estimated_input(),
                output_tokens=estimate_answer(self.whole) if self.whole is not None else 0,
                source=UsageSource.ESTIMATED,
            )
        if record.operation is Operation.RESPONSES and record.finish_reason == "failed":
            record.outcome, record.error_code = Outcome.UPSTREAM_ERROR, "response_failed"
        if record.usage is not None:
            record.cost = self._service.prices.cost(
                record.request_model, record.provider, record.response_model, record.usage
            )

    def _note_pace(self) -> None:
        record, usage = self.record, self.record.usage
        if self._first_token_at is not None and usage is not None and usage.output_tokens > 1:
            generating = self._started + record.duration_seconds - self._first_token_at
            record.time_per_output_token_seconds = generating / (usage.output_tokens - 1)

    def _estimated_input(self) -> int:
        call = self._call
        if call is None:
            return 0
        try:
            return estimate_request(_parameters_of(call))
        except InvalidRequest:
            return 0


def read_call(operation: Operation, body: bytes) -> Call:
    """A caller's body as a Call. Raises InvalidRequest, which names the field."""
    try:
        fields = _decode_fields(body)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"The body is not as it must be: {error}.", param=_path_in(str(error))) from None
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"The body is not JSON: {error}.") from None
    if not fields.model:
        raise InvalidRequest("The body names no model.", param="model")
    options = fields.stream_options
    return Call(
        operation=operation,
        model=fields.model,
        body=body,
        stream=bool(fields.stream) and operation is not Operation.EMBEDDINGS,
        usage_shown=bool(options and options.get("include_usage")),
    )


def decode_body(body: bytes) -> dict[str, Any]:
    """The body's object. Raises InvalidRequest: `read_call` skips fields without looking at their letters."""
    try:
        decoded = msgspec.json.decode(body)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"The body is not JSON: {error}.") from None
    if not isinstance(decoded, dict):
        raise InvalidRequest("The body is not a JSON object.")
    return decoded


def new_id() -> str:
    """A unique id that sorts by time: milliseconds, then 80 random bits, in hex."""
    return f"{time.time_ns() // 1_000_000:012x}{random.getrandbits(80):020x}"


async def _first_events(answer: StreamedAnswer, meter: StreamMeter) -> bytes:
    """What comes up to and with the first event; comments before it are of no use to anybody."""
    while True:
        data = await answer.read()
        try:
            block = meter.feed(data) if data else meter.finish()
        except StreamTruncated:
            raise UpstreamError("The upstream ended the stream before its first event.") from None
        if meter.events:
            return block
        meter.check()


def _addressed(call: Call, target: Target) -> Call:
    """The call as the upstream shall get it: its name of the model, and usage asked for in streams."""
    rename = target.model != call.model
    ask = (
        call.stream
        and target.stream_usage
        and not call.usage_shown
        and call.operation in (Operation.CHAT, Operation.TEXT_COMPLETION)
    )
    if not rename and not ask:
        return call
    if not rename and call.parameters is None and b'"stream_options"' not in call.body:
        # Spliced in, so that all else stays as the caller wrote it, to the byte.
        start = call.body.index(b"{") + 1
        body = call.body[:start] + b'"stream_options":{"include_usage":true},' + call.body[start:]
        return msgspec.structs.replace(call, body=body)
    parameters = dict(_parameters_of(call))
    parameters["model"] = target.model
    if ask:
        parameters["stream_options"] = {**(parameters.get("stream_options") or {}), "include_usage": True}
    return msgspec.structs.replace(
        call, model=target.model, body=msgspec.json.encode(parameters), parameters=parameters
    )


def _parameters_of(call: Call) -> dict[str, Any]:
    return call.parameters if call.parameters is not None else decode_body(call.body)


def _late() -> UpstreamTimeout:
    return UpstreamTimeout("The upstream did not answer in time.")


def _stalled() -> UpstreamTimeout:
    return UpstreamTimeout("The upstream stalled in the middle of the stream.")


def _pause(attempt: int, error: UpstreamError) -> float:
    """Seconds before the next attempt: what the upstream asks for, else growing, with full jitter."""
    if error.retry_after_seconds is not None:
        return error.retry_after_seconds
    return random.uniform(0, min(BACKOFF_SECONDS * 2 ** (attempt - 1), BACKOFF_MOST_SECONDS))


def _outcome(raised: BaseException | None) -> tuple[Outcome, str | None]:
    if raised is None:
        return Outcome.SUCCESS, None
    if isinstance(raised, UpstreamError) and raised.status == 408:
        return Outcome.TIMEOUT, raised.code
    if isinstance(raised, WeirError):
        return raised.outcome, raised.code
    if isinstance(raised, asyncio.CancelledError):
        return ShuttingDown.outcome, ShuttingDown.code
    return Outcome.INTERNAL_ERROR, WeirError.code


def _path_in(message: str) -> str | None:
    """msgspec ends its message with the place: ... - at `$.stream`."""
    _, found, path = message.rpartition("`$.")
    return path.rstrip("`") if found else None
