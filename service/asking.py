"""Asking upstreams: which one, how often, until when. Everything here ends before the caller has a byte.

A call is one attempt after the other, in the task of its request. Only a hedged one (`_hedged`) has two
attempts at a time, each in a task of its own; both have ended when it returns, however it does.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec

from service.deadlines import Deadline, Sweep
from service.domain import AttemptKind, Call, Operation, RequestRecord
from service.errors import (
    CallerGone,
    InvalidRequest,
    RequestDeadline,
    StreamTruncated,
    UpstreamError,
    UpstreamMisconfigured,
    UpstreamRateLimited,
    UpstreamRejected,
    UpstreamTimeout,
    WeirError,
)
from service.metering import AnswerFacts, StreamMeter, read_answer
from service.ports import AttemptSpan, Recorder, StreamedAnswer, Target, Trace, WholeAnswer
from service.routing.breaker import Cause
from service.routing.places import Place
from service.routing.retries import RETRY_AFTER_MOST_SECONDS, RetryBudget, pause
from service.routing.routes import Route

ATTEMPTS_MOST: Final = 20
"""Of one request, whatever else would allow more."""
COOLING_MOST_SECONDS: Final = 60.0
TIMER_SECONDS: Final = 0.001
"""By which uvloop's timers may be early: a place that asked for time opens to the microsecond."""


class Limits(msgspec.Struct, frozen=True):
    """Deadlines and attempts of the request path."""

    timeout_seconds: float = 600.0
    """For a whole answer or the first event of a stream, all attempts together."""
    idle_seconds: float = 120.0
    max_retries: int = 2
    request_seconds: float = 0.0
    """For a request as a whole, its stream included; 0: no limit."""


class End(msgspec.Struct, frozen=True):
    """When an answer, or the first event of a stream, must be there: all attempts together."""

    at: float
    """In the loop's time."""
    own: bool = False
    """It is the end of the request's own time, its stream included, and is told so."""
    callers: bool = False
    """The caller has chosen it: that it was too soon says nothing of the upstream."""


class Answer(msgspec.Struct):
    """A good answer, or the good beginning of a stream, and where it came from."""

    place: Place
    ticket: int
    """Of the place's circuit breaker."""
    whole: bytes | None = None
    facts: AnswerFacts | None = None
    stream: StreamedAnswer | None = None
    meter: StreamMeter | None = None
    first: bytes = b""
    upstream_request_id: str | None = None
    began: float = 0.0
    """When it was asked for, by `time.perf_counter`."""
    span: AttemptSpan | None = None
    """Open until the answer is over."""

    @property
    def model(self) -> str:
        """As far as it has said by now."""
        if self.facts is not None:
            return self.facts.model
        return self.meter.model if self.meter is not None else ""


class Hedge(msgspec.Struct, frozen=True):
    """A second attempt that ran beside a first one."""

    won: bool
    """Its answer was the one that was taken."""
    wasted: Place | None
    """Where a call was given up, whose question is to be paid all the same."""


class Asking:
    """One request's attempts. `make_meter` makes what reads a stream, anew for each attempt."""

    __slots__ = (
        "_alone",
        "_budget",
        "_end_of_all",
        "_limits",
        "_loop",
        "_make_meter",
        "_record",
        "_recorder",
        "_sweep",
        "_trace",
        "asked",
        "hedges",
        "kind",
        "late_at",
        "since",
        "span",
        "unanswered",
    )

    def __init__(
        self,
        record: RequestRecord,
        *,
        recorder: Recorder,
        sweep: Sweep,
        limits: Limits,
        budget: RetryBudget,
        end: End,
        make_meter: Callable[[], StreamMeter],
        trace: Trace | None = None,
    ) -> None:
        self._trace = trace
        self._record = record
        self._recorder = recorder
        self._sweep = sweep
        self._limits = limits
        self._budget = budget
        self._end_of_all = end
        self._alone = True
        self._make_meter = make_meter
        self._loop = asyncio.get_running_loop()
        self.asked: Place | None = None
        """Where the latest attempt was made, which the record names."""
        self.unanswered = False
        """An upstream has the question, and counts it whether or not its answer was heard."""
        self.kind = AttemptKind.FIRST
        """Of the latest attempt."""
        self.since: float | None = None
        """When it began, in the loop's time, as long as nobody was told of its end."""
        self.span: AttemptSpan | None = None
        """That of the latest attempt, for whoever tells of its end."""
        self.hedges: Sequence[Hedge] = ()
        self.late_at: Sequence[Place] = ()
        """Where attempts were given up as late: these upstreams have the question, and count it."""

    async def ask(
        self, call: Call, route: Route, session: str, kind: AttemptKind = AttemptKind.FIRST
    ) -> Answer:
        """The first good answer of the route's places. Raises the last UpstreamError where there is none."""
        if kind is AttemptKind.FIRST:
            self._budget.called()
        self._alone = len(route.places) == 1
        tried: list[Place] = []
        repeats = 0
        while True:
            place = route.choose(session, tried)
            if place is None:
                raise route.closed()
            try:
                if route.hedge and (seconds := place.condition.late_seconds) is not None:
                    return await self._hedged(call, route, session, tried, place, kind, seconds)
                span = self._open_span(call, place.target, kind)
                return await self._attempt(call, place, kind, place.condition.begin(), span)
            except UpstreamError as error:
                over = self._record.attempts >= ATTEMPTS_MOST or self.late
                if error.at_once and not over:
                    kind = AttemptKind.RETRY
                    continue
                tried.append(place)
                if _movable(error) and not over and route.choose(session, tried) is not None:
                    kind = AttemptKind.FAILOVER
                    continue
                repeats += 1
                if over or not await self._paused(repeats, error, route, session):
                    raise
            tried.clear()
            kind = AttemptKind.RETRY

    @property
    def late(self) -> bool:
        """The time for all attempts is over."""
        return self._loop.time() >= self._end_of_all.at

    def done(self) -> None:
        """Nothing more is asked: let go of whoever asked."""
        del self._make_meter

    async def _paused(self, repeats: int, error: UpstreamError, route: Route, session: str) -> bool:
        """Whether the same places may be asked again, and then after the pause that is due."""
        seconds = pause(repeats, error)
        late = self._loop.time() + seconds >= self._end_of_all.at or seconds > RETRY_AFTER_MOST_SECONDS
        if repeats > self._limits.max_retries or late or not error.retry:
            return False
        # Those that asked for time are closed just now, and open when the pause is over.
        if not route.admits_in(seconds) or not self._budget.take():
            return False
        found = False
        try:
            await asyncio.sleep(seconds + TIMER_SECONDS)
            # Of many who waited for a place one may ask it: to the others their own error is told.
            found = route.choose(session, ()) is not None
        finally:
            if not found:
                self._budget.give_back()
        return found

    async def _attempt(
        self, call: Call, place: Place, kind: AttemptKind, ticket: int, span: AttemptSpan | None
    ) -> Answer:
        """`ticket` is that of the place's `begin`: taken with the choice, before others can choose it too.

        Where it is cut off, whoever did so tells the recorder, and `span`, why.
        """
        record, target, condition = self._record, place.target, place.condition
        record.attempts += 1
        self._names(place)
        began, self.unanswered, self.kind = self._loop.time(), True, kind
        self.since, self.span, clock = began, span, time.perf_counter
        began_at = clock()
        end = self._end_of_all
        until, error_then = end.at, _over if end.own else late
        if target.first_byte_seconds is not None and began + target.first_byte_seconds < until:
            until, error_then = began + target.first_byte_seconds, late
        answered: WholeAnswer | StreamedAnswer | None = None
        try:
            sent = self._traced(addressed(call, target), span)
            with Deadline(self._sweep, until, error_then):
                answered = await target.upstream.send(sent)
                if span is not None:
                    answered = span.answered(answered)
                answer = await self._begun(answered, place, ticket)
        except UpstreamError as error:
            if answered is not None:
                error.upstream_request_id = answered.upstream_request_id
                target.upstream.note(answered.secret, error)
            condition.end()
            # Past its time the upstream may still be at it; any other failure is its last word.
            self.unanswered = self._loop.time() >= until
            if self.unanswered:
                self.late_at = (*self.late_at, place)
            _judge(place, ticket, error, alone=self._alone, impatient=end.callers)
            self._ended(place, kind, error, clock() - began_at, error.upstream_request_id)
            if span is not None:
                span.failed(error)
            raise
        except BaseException as error:
            condition.end()
            condition.breaker.left(ticket)
            if span is not None and isinstance(error, Exception):
                span.failed(error)
            raise
        finally:
            seconds = clock() - began_at
            record.upstream_seconds += seconds
        if span is not None:
            span.begun()
        self.unanswered = False
        condition.answered(self._loop.time() - began)
        condition.breaker.succeeded(ticket)
        self._ended(place, kind, None, seconds, answer.upstream_request_id, answer.model)
        answer.began, answer.span = began_at, span
        return answer

    def _open_span(self, call: Call, target: Target, kind: AttemptKind) -> AttemptSpan | None:
        trace = self._trace
        return (
            trace.spans.attempt(call, target, kind) if trace is not None and trace.spans is not None else None
        )

    def _traced(self, call: Call, span: AttemptSpan | None) -> Call:
        """The call with what tells the upstream of its trace."""
        trace = self._trace
        if trace is None:
            return call
        headers = trace.headers if span is None else span.headers
        return msgspec.structs.replace(call, headers=(*call.headers, *headers)) if headers else call

    def _names(self, place: Place) -> None:
        self.asked, upstream = place, place.target.upstream
        self._record.upstream, self._record.provider = upstream.name, upstream.provider

    def _ended(
        self,
        place: Place,
        kind: AttemptKind,
        error: WeirError | None,
        seconds: float,
        id_there: str | None,
        model: str = "",
    ) -> None:
        self._names(place)  # beside a hedge the record may name the other one by now
        self._record.upstream_request_id = id_there
        self.since = self.span = None
        self._recorder.attempted(self._record, error, kind, seconds, model)

    async def _begun(self, answer: WholeAnswer | StreamedAnswer, place: Place, ticket: int) -> Answer:
        if isinstance(answer, WholeAnswer):
            return Answer(
                place,
                ticket,
                whole=answer.body,
                facts=read_answer(answer.body, answer.secret),
                upstream_request_id=answer.upstream_request_id,
            )
        meter = self._make_meter()
        meter.secret = answer.secret
        try:
            first = await first_events(answer, meter)
        except BaseException:
            await answer.close()
            raise
        return Answer(
            place,
            ticket,
            stream=answer,
            meter=meter,
            first=first,
            upstream_request_id=answer.upstream_request_id,
        )

    # -- two at a time ---------------------------------------------------------------------------

    async def _hedged(
        self,
        call: Call,
        route: Route,
        session: str,
        tried: list[Place],
        place: Place,
        kind: AttemptKind,
        seconds: float,
    ) -> Answer:
        """As `_attempt`; and after `seconds` at another place too, if there is one and the budget gives it.

        The first good answer is taken and the other call given up. `tried` gets the other place if it failed.
        """
        first = self._run(call, place, kind)
        second: _Run | None = None
        taken: _Run | None = None
        left = False
        try:
            await asyncio.wait([first.task], timeout=seconds)
            other = route.choose(session, (*tried, place)) if not first.task.done() else None
            if other is not None and self._budget.take():
                second = self._run(call, other, AttemptKind.HEDGE)
            taken = await self._first_good(first, second)
        except asyncio.CancelledError:
            left = True
            raise
        finally:
            await self._end(first, second, taken, left=left)
        if taken is not None:
            return taken.task.result()
        if second is not None:
            tried.append(second.place)
        try:
            return first.task.result()  # which raises: of two failures the first one's
        finally:
            del first, second  # the error's traceback knows this frame: a cycle would keep the request alive

    def _run(self, call: Call, place: Place, kind: AttemptKind) -> _Run:
        span = self._open_span(call, place.target, kind)
        attempt = self._attempt(call, place, kind, place.condition.begin(), span)
        return _Run(place, kind, self._loop.time(), self._loop.create_task(attempt), span)

    async def _first_good(self, first: _Run, second: _Run | None) -> _Run | None:
        """The run that has an answer. None when all have failed, or the first one as no other could mend."""
        running = [first] if second is None else [first, second]
        unanswered = False
        while running:
            await asyncio.wait([run.task for run in running], return_when=asyncio.FIRST_COMPLETED)
            for run in [run for run in running if run.task.done()]:
                running.remove(run)
                error = run.task.exception()
                if error is None:
                    return run
                if run is first and not (isinstance(error, UpstreamError) and _movable(error)):
                    return None
            unanswered = unanswered or self.unanswered
        self.unanswered = unanswered
        return None

    async def _end(self, first: _Run, second: _Run | None, taken: _Run | None, *, left: bool) -> None:
        """End what still runs, so that nothing of it is left behind, and note what was wasted.

        `left`: the caller did; then the first call that runs is booked as that of its request.
        """
        runs = [first] if second is None else [first, second]
        pending = [run for run in runs if not run.task.done()]
        now, record = self._loop.time(), self._record
        for run in pending:
            run.task.cancel()
        try:
            if pending:
                await asyncio.wait([run.task for run in pending])
        except asyncio.CancelledError:
            taken, left = None, True
            raise
        finally:
            unheard = [run for run in runs if run is not taken and _answered(run.task)]
            own = pending.pop(0) if left and pending else None
            for run in pending:
                self._overtaken(run, now - run.began)
            for run in unheard:
                if run.task.result().stream is not None:
                    self._names(run.place)
                    self._recorder.unheard(record, run.kind, now - run.began)
            self.since, self.span = (own.began, own.span) if own is not None else (None, None)
            if second is not None:
                wasted = next((run.place for run in (*pending, *unheard)), None)
                self.hedges = (*self.hedges, Hedge(taken is second, wasted))
            if taken is second and first in pending:
                first.place.condition.given_up(now - first.began)
            if taken is not None:
                self._names(taken.place)
                record.upstream_request_id = taken.task.result().upstream_request_id
                self.unanswered, self.kind = False, taken.kind
            elif own is not None:
                self._names(own.place)
                self.unanswered, self.kind = True, own.kind
            for run in unheard:
                await _throw_away(run.task.result())

    def _overtaken(self, run: _Run, seconds: float) -> None:
        self._names(run.place)
        quicker = CallerGone("Another upstream was quicker.")
        self._recorder.attempted(self._record, quicker, run.kind, seconds)
        if run.span is not None:
            run.span.cut(quicker)


class _Run(msgspec.Struct, eq=False):
    """An attempt in a task of its own."""

    place: Place
    kind: AttemptKind
    began: float
    task: asyncio.Task[Answer]
    span: AttemptSpan | None


def _answered(task: asyncio.Task[Answer]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is None


async def _throw_away(answer: Answer) -> None:
    answer.place.condition.end()
    if answer.span is not None:
        answer.span.done(None)
    if answer.stream is not None:
        await answer.stream.close()


async def first_events(answer: StreamedAnswer, meter: StreamMeter) -> bytes:
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


def addressed(call: Call, target: Target) -> Call:
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
    parameters = dict(parameters_of(call))
    parameters["model"] = target.model
    if ask:
        parameters["stream_options"] = {**(parameters.get("stream_options") or {}), "include_usage": True}
    return msgspec.structs.replace(
        call, model=target.model, body=msgspec.json.encode(parameters), parameters=parameters
    )


def parameters_of(call: Call) -> dict[str, Any]:
    return call.parameters if call.parameters is not None else decode_body(call.body)


def decode_body(body: bytes) -> dict[str, Any]:
    """The body's object. Raises InvalidRequest: `read_call` skips fields without looking at their letters."""
    try:
        decoded = msgspec.json.decode(body)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"The body is not JSON: {error}.") from None
    if not isinstance(decoded, dict):
        raise InvalidRequest("The body is not a JSON object.")
    return decoded


def late() -> UpstreamTimeout:
    return UpstreamTimeout("The upstream did not answer in time.")


def _over() -> RequestDeadline:
    return RequestDeadline("The request took longer than it may, and no answer had begun.")


def _movable(error: UpstreamError) -> bool:
    """Another place may do better."""
    return error.retry or isinstance(error, UpstreamMisconfigured)


def _judge(place: Place, ticket: int, error: UpstreamError, *, alone: bool, impatient: bool) -> None:
    """What a failed attempt says of the place where it was made."""
    breaker = place.condition.breaker
    if isinstance(error, UpstreamRejected):
        breaker.succeeded(ticket)  # it is well, and the request is not
    elif error.at_once or (impatient and isinstance(error, RequestDeadline)):
        breaker.left(ticket)  # one of its keys is not; or the caller did not wait
    elif isinstance(error, UpstreamRateLimited):
        breaker.left(ticket)
        if error.retry_after_seconds and not alone:
            breaker.open_for(min(error.retry_after_seconds, COOLING_MOST_SECONDS), Cause.ASKED)
    else:
        breaker.failed(ticket)
