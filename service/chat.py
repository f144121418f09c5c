"""The request path: reserve, ask, meter, settle. Read `Exchange` from top to bottom.

One `Exchange` is one request's way to a model and back. Whatever happens on it, its record is closed
exactly once: with the outcome, the tokens and the cost, also when the caller has left.
"""

from __future__ import annotations

import asyncio
import copy
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import nullcontext
from types import TracebackType
from typing import Any, Final, Self

import msgspec

from service.asking import Answer, Asking, End, Limits, first_events, late, parameters_of
from service.caching.answers import AnswerCache
from service.caching.entries import Entry
from service.caching.flights import Ending, Flight, Role, ending_of
from service.caching.policy import NO_WISH, Lookup, Wish
from service.caching.replay import Replay
from service.caching.whole import Assembler
from service.deadlines import Deadline, IdleTimeout, Sweep
from service.domain import (
    UNPRICED,
    AttemptKind,
    CacheUse,
    Call,
    Cost,
    Operation,
    Outcome,
    Principal,
    RequestRecord,
    Standing,
    Usage,
    UsageSource,
)
from service.errors import (
    BudgetExceeded,
    InternalError,
    InvalidRequest,
    ModelNotFound,
    RateLimited,
    RequestDeadline,
    ShuttingDown,
    StreamTruncated,
    UpstreamError,
    UpstreamTimeout,
    WeirError,
    outcome_of,
)
from service.metering import StreamMeter, estimate_answer
from service.overload import Gate, Priority
from service.overload import Place as GatePlace
from service.ports import (
    Accounts,
    Demand,
    PriceBook,
    Recorder,
    Reservation,
    Step,
    StreamedAnswer,
    Target,
    Trace,
)
from service.pricing import OVERRIDE, context_of, cost_usd
from service.routing.places import Place
from service.routing.retries import RetryBudget
from service.routing.routes import Catalogue, Route, failure_of
from service.tokens import estimate_request

MODEL_LETTERS: Final = 200
"""Of a model's name, which a caller may make as long as it likes."""
EXPECTED_TOKENS: Final = 1_024
"""Of an answer whose length the caller does not limit."""
LONGEST_TOKENS: Final = 4_096
"""What such an answer is taken to have at the most, where the YAML says nothing of the model."""
MOST_TOKENS: Final = 1_000_000_000
"""Of an answer, whatever the caller asks for: sums must not overflow."""
LONGEST_HISTORY_TOKENS: Final = 128_000
"""What a provider may have kept of a conversation, where nobody knows the model's context."""
_HISTORIES: Final = ("previous_response_id", "conversation")
MOST_TOKENS_PER_ESTIMATED: Final = 2
"""Of a text; digits and rare words take more tokens than the estimate knows."""
FROM_CACHE: Final = Cost(usd=0.0, source="cache")
_NO_SPAN: Final = nullcontext()
_PRIORITIES: Final = {priority: priority.name.lower() for priority in Priority}
END_SECONDS: Final = 1.0
"""How long the end of a connection may lag behind the stream's own end mark."""


class _Fields(msgspec.Struct):
    """The fields of a request body that Weir reads; the rest passes by."""

    model: str = ""
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    prompt_cache_key: str | None = None
    user: str | None = None


_OUTPUT_LIMITS: Final = {
    Operation.CHAT: ("max_completion_tokens", "max_tokens"),
    Operation.TEXT_COMPLETION: ("max_tokens",),
    Operation.RESPONSES: ("max_output_tokens",),
}
_decode_fields: Final = msgspec.json.Decoder(_Fields).decode


class ChatService:
    """What all requests share; `exchange` begins the way of one."""

    def __init__(
        self,
        *,
        catalogue: Catalogue,
        prices: PriceBook,
        accounts: Accounts,
        recorder: Recorder,
        cache: AnswerCache | None = None,
        gate: Gate | None = None,
        limits: Limits,
    ) -> None:
        self.catalogue = catalogue
        self.prices = prices
        self.accounts = accounts
        self.cache = cache
        self.gate = gate
        self.retries = RetryBudget()
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
        trace: Trace | None = None,
        address: Callable[[], str] = str,
    ) -> Exchange:
        """`address` tells the client's, where a limit counts by it."""
        record = RequestRecord(
            id=new_id(), request_id=request_id, route=route, operation=operation, principal=principal
        )
        if trace is not None and trace.id:
            record.trace_id, record.sampled = trace.id, trace.spans is not None
        return Exchange(self, record, trace, address)

    def under(
        self,
        *,
        catalogue: Catalogue,
        prices: PriceBook,
        accounts: Accounts,
        cache: AnswerCache | None,
    ) -> ChatService:
        """The same service under another configuration: what runs in either is settled together."""
        other = copy.copy(self)
        other.catalogue, other.prices, other.accounts, other.cache = catalogue, prices, accounts, cache
        return other

    async def settled(self) -> None:
        """Returns when every exchange that was cut short has been settled."""
        while self._settling:
            await asyncio.wait(self._settling)
        if self.cache is not None:
            await self.cache.flights.settled()

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
        "_address",
        "_answer",
        "_asking",
        "_assembler",
        "_assemblers",
        "_call",
        "_deadline",
        "_delivered",
        "_first",
        "_first_token_at",
        "_flight",
        "_impatient",
        "_lookup",
        "_meter",
        "_passed_on_at",
        "_place",
        "_reservation",
        "_service",
        "_spans",
        "_started",
        "_stream",
        "_trace",
        "_waited",
        "beside",
        "priority",
        "record",
        "standing",
        "sweep",
        "whole",
    )

    def __init__(
        self,
        service: ChatService,
        record: RequestRecord,
        trace: Trace | None,
        address: Callable[[], str] = str,
    ) -> None:
        self.record = record
        self.whole: bytes | None = None
        self.beside: Callable[[], Awaitable[None]] | None = None
        """What else is to be written once all went well: beside the settling, in the same round trip."""
        self.standing: Standing | None = None
        """How the principal stands with its limits and budgets, once it was asked for."""
        self.sweep = service.sweep
        self._address = address
        self._reservation: Reservation | None = None
        self._lookup: Lookup | None = None
        self._flight: Flight | None = None
        self._assembler: Assembler | None = None
        self._assemblers: Sequence[tuple[StreamMeter, Assembler]] = ()
        self._service = service
        self._trace = trace
        self._spans = trace.spans if trace is not None else None
        self._call: Call | None = None
        self._stream: StreamedAnswer | None = None
        self._meter: StreamMeter | None = None
        self._first = b""
        self._first_token_at: float | None = None
        self._asking: Asking | None = None
        self._answer: Answer | None = None
        self._deadline: float | None = None
        self._impatient = False
        self._place: GatePlace | None = None
        self.priority = Priority.NORMAL
        self._delivered = False
        self._passed_on_at: float | None = None
        self._waited = 0.0
        """For a place, for an equal request, for upstreams: seconds that are not Weir's own."""

    async def __aenter__(self) -> Self:
        self._started = time.perf_counter()
        self.expire(self._service.limits.request_seconds or None, by_caller=False)
        self._service.recorder.opened(self.record)
        if self._spans is not None:
            self._spans.opened()
        return self

    async def open(self, call: Call, *, keep_text: bool = False, wish: Wish = NO_WISH) -> None:
        """Returns once the whole answer, or the first event of its stream, is there.

        `wish` is what the caller says of the response cache.
        """
        record, service = self.record, self._service
        self._call = call
        record.request_model, record.stream = call.model[:MODEL_LETTERS], call.stream
        route = service.catalogue.resolve(call.model)
        service.catalogue.check(record.principal, call.model)
        target = route.first
        record.upstream, record.provider = target.upstream.name, target.upstream.provider
        if service.gate is not None:
            with self._step("queue") if service.gate.running >= service.gate.limit else _NO_SPAN:
                self._place = await self._enter_gate(service.gate)
        known = None
        if service.cache is not None:
            known = await self._known(service.cache, call, target, wish)
        if known is not None:
            record.cache = CacheUse.HIT
            await self._reserve(call, route, hit=True)
            await self._replay(call, target, known, keep_text)
            return
        await self._reserve(call, route)
        await self._ask(call, route, keep_text)

    async def _enter_gate(self, gate: Gate) -> GatePlace:
        tenant, recorder = self.record.principal.tenant, self._service.recorder
        if gate.running < gate.limit:
            recorder.queued(_PRIORITIES[self.priority], 0.0)
            return await gate.enter(tenant, self.priority)
        began = time.perf_counter()
        try:
            if self._deadline is None:
                return await gate.enter(tenant, self.priority)
            with Deadline(self.sweep, self._deadline, _over):
                return await gate.enter(tenant, self.priority)
        finally:
            seconds = self.record.queue_seconds = time.perf_counter() - began
            self._waited += seconds
            recorder.queued(_PRIORITIES[self.priority], seconds)

    def expire(self, seconds: float | None, *, by_caller: bool = True) -> None:
        """End the request, its stream too, so many seconds from now at the latest; None: whenever."""
        if seconds is None:
            return
        until = asyncio.get_running_loop().time() + seconds
        if self._deadline is None or until < self._deadline:
            self._deadline, self._impatient = until, by_caller

    async def events(self) -> AsyncGenerator[bytes]:
        """The stream's whole events, one or more at a time, as the upstream sent them.

        Raises UpstreamError when the stream does not end as its protocol wants.
        """
        stream, meter = self._stream, self._meter
        if stream is None or meter is None:
            return
        yield self._first
        meter.check()
        seconds, clock, seen = self._idle_seconds(), time.perf_counter, meter.events
        pace = self._service.recorder.pace(self.record, meter.model) if self._answer is not None else None
        with IdleTimeout(self.sweep, seconds, _stalled, end=self._deadline, over=_over) as idle:
            while not meter.done:
                idle.waiting()
                since = clock()
                data = await stream.read()
                waited = clock() - since
                idle.arrived()
                block = meter.feed(data) if data else meter.finish()
                if pace is not None and meter.events > seen:
                    pace(waited, meter.events - seen)
                    seen = meter.events
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
        record.outcome, record.error_code = _outcome(raised, begun=self._stream is not None)
        if self._delivered and record.outcome is Outcome.CLIENT_DISCONNECTED:
            record.outcome, record.error_code = Outcome.SUCCESS, None  # it had all of it
        asking, answer = self._asking, self._answer
        self._address = str  # it knows the request, which knows this: let go of it
        if asking is not None and asking.since is not None and raised is not None:
            seconds, error = asyncio.get_running_loop().time() - asking.since, _told_as(raised)
            self._service.recorder.attempted(record, error, asking.kind, seconds)
            if asking.span is not None:
                asking.span.cut(error)
        if answer is not None:
            answer.place.condition.end()
            if isinstance(raised, UpstreamError) and not isinstance(raised, RequestDeadline):
                answer.place.condition.breaker.broke(answer.ticket)  # in the middle of its stream
        if self._place is not None and self._service.gate is not None:
            self._service.gate.leave(self._place)
            self._place = None
        now = time.perf_counter()
        record.duration_seconds = now - self._started
        record.overhead_seconds = max((self._passed_on_at or now) - self._started - self._waited, 0.0)
        if self._flight is not None and record.outcome is not Outcome.SUCCESS:
            self._flight.leave(ending_of(raised))
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
            self._count_waste()
        finally:  # a failed estimate must not keep the record out of the books, nor a failed metric
            try:
                self._tell_recorder()
                self._tell_spans()
            finally:
                try:
                    with self._step("settle"):
                        await self._enter()
                finally:
                    self._leave_spans()

    def _tell_recorder(self) -> None:
        recorder, record, answer = self._service.recorder, self.record, self._answer
        recorder.closed(record)
        if answer is not None and answer.stream is not None:
            recorder.streamed(record, self._started + record.duration_seconds - answer.began)

    async def _enter(self) -> None:
        settling = self._service.accounts.settle(self.record, self._reservation)
        beside = []
        if self.record.outcome is Outcome.SUCCESS:
            if self.beside is not None:
                beside.append(asyncio.ensure_future(self.beside()))
            if self._lookup is not None:
                beside.append(asyncio.ensure_future(self._keep_answer(self._lookup)))
        try:
            # Here and not in a task: one that is cancelled before its first step would settle nothing.
            await settling
        finally:
            try:
                if beside:
                    await asyncio.gather(*beside)
            finally:
                if self._flight is not None:
                    self._flight.leave(Ending.NOT_KEPT)  # whoever still waits, waits for nothing

    # -- its spans, if it is sampled ---------------------------------------------------------------

    def _step(self, name: str) -> Step:
        return self._spans.step(name) if self._spans is not None else _NO_SPAN

    def _tell_spans(self) -> None:
        if self._spans is not None:
            if self._answer is not None and self._answer.span is not None:
                self._answer.span.done(self.record)
            self._spans.closed(self.record)

    def _leave_spans(self) -> None:
        spans, self._spans = self._spans, None
        if spans is not None:
            spans.left()

    # -- the response cache ----------------------------------------------------------------------

    async def _known(self, cache: AnswerCache, call: Call, target: Target, wish: Wish) -> Entry | None:
        """An answer that is kept. Without one this call leads those that are equal to it, or goes alone."""
        record = self.record
        self._lookup = lookup = cache.lookup(call, target, wish)
        record.cache = CacheUse.BYPASS if lookup is None else CacheUse.MISS
        if lookup is None or not lookup.read:
            return None
        with self._step("cache"):
            return await self._find(cache, lookup)

    async def _find(self, cache: AnswerCache, lookup: Lookup) -> Entry | None:
        tenant = self.record.principal.tenant
        known = await cache.find(tenant, lookup)
        if known is None:
            self._flight = flight = cache.flight(tenant, lookup)
            end = self._end()
            began = time.perf_counter()
            try:
                with Deadline(self.sweep, end.at, _over if end.own else late):
                    role = await flight.board()
            finally:
                self._waited += time.perf_counter() - began
            if role is Role.LOOKS:
                known = await cache.find(tenant, lookup)
        return known

    async def _replay(self, call: Call, target: Target, known: Entry, keep_text: bool) -> None:
        """The kept answer in the caller's form. Nobody counted a token, and nothing is to pay."""
        record = self.record
        self._lookup = None
        record.cost = FROM_CACHE
        record.response_id, record.response_model = known.id, known.model
        record.finish_reason = known.finish_reason
        if known.usage is not None:
            record.saved_usd = self._price(target, known.usage, known.model).usd
        if not call.stream:
            self.whole = known.body
            return
        answer = Replay(call.operation, known.body, usage=call.usage_shown)
        meter = StreamMeter(call.operation, keep_text=keep_text)
        self._first = await first_events(answer, meter)
        self._stream, self._meter = answer, meter
        self._passed_on_at = time.perf_counter()
        self._note_first_token(meter)

    async def _keep_answer(self, lookup: Lookup) -> None:
        """Into the cache, and those who wait for it are told."""
        cache, body = self._service.cache, self.whole
        if body is None and self._assembler is not None:
            body = self._assembler.whole()
        ending = Ending.NOT_KEPT
        try:
            if cache is not None and await cache.keep(lookup, self.record, body):
                ending = Ending.KEPT
        finally:
            if self._flight is not None:
                self._flight.leave(ending)

    # -- reserving -------------------------------------------------------------------------------

    async def _reserve(self, call: Call, route: Route, *, hit: bool = False) -> None:
        """Set aside what the call may use. Raises RateLimited, BudgetExceeded, StateUnavailable."""
        service, record = self._service, self.record
        accounts, model = service.accounts, route.name
        demand = Demand(model, self._address() if accounts.by_address else "")
        self._address = str  # it knows the request, which knows this: let go of it
        if not hit and accounts.estimates(record.principal, model):
            demand = self._estimated(call, route, demand)
        try:
            with self._step("reserve"):
                self._reservation = await accounts.reserve(record, demand)
            self.standing = self._reservation.standing
        except (RateLimited, BudgetExceeded) as refused:
            self.standing = refused.standing
            raise
        finally:
            if self.standing is not None and self.standing.budgets:
                service.recorder.standing(record, self.standing)

    def _estimated(self, call: Call, route: Route, demand: Demand) -> Demand:
        """What the call will probably use, and what it can at the most, at the dearest of its places."""
        parameters = parameters_of(call)
        given = estimate_request(parameters)
        made, most = _output(call, parameters, route.first.max_output_tokens)
        most_given = given * MOST_TOKENS_PER_ESTIMATED
        if any(parameters.get(name) for name in _HISTORIES):
            most_given = max(most_given, self._context(route))

        def usd(input_tokens: int, output_tokens: int) -> float:
            usage = Usage(input_tokens, output_tokens, source=UsageSource.ESTIMATED)
            return max(
                self._price(place.target, usage, place.target.model).usd or 0.0 for place in route.places
            )

        return msgspec.structs.replace(
            demand, tokens=given + made, usd=usd(given, made), most_usd=usd(most_given, most)
        )

    def _context(self, route: Route) -> int:
        """Tokens that the provider may put before a request, of what it has kept."""
        known = context_of(route.first, self._service.prices)
        return known if known is not None else LONGEST_HISTORY_TOKENS

    def _price(self, target: Target, usage: Usage, response_model: str) -> Cost:
        """By the price that stands at the place or the model in the configuration, else by the table."""
        if target.price is not None:
            return Cost(usd=cost_usd(target.price, usage), source=OVERRIDE)
        return self._service.prices.cost(target.name, target.upstream.provider, response_model, usage)

    # -- asking ----------------------------------------------------------------------------------

    async def _ask(self, call: Call, route: Route, keep_text: bool) -> None:
        """Ask the model, and where it cannot answer those that stand in for it."""
        service, record = self._service, self.record
        end = self._end()
        if end.own and asyncio.get_running_loop().time() >= end.at:
            raise _over()
        self._asking = asking = Asking(
            record,
            recorder=service.recorder,
            sweep=self.sweep,
            limits=service.limits,
            budget=service.retries,
            end=end,
            make_meter=lambda: self._make_meter(call, keep_text),
            trace=self._trace,
        )
        session = call.session and f"{record.principal.tenant}\n{call.session}"
        began = time.perf_counter()
        try:
            self._take(await asking.ask(call, route, session))
        except UpstreamError as error:
            failure = failure_of(error)
            others = route.stand_ins.get(failure, ()) if failure is not None else ()
            if not await self._ask_others(call, others, session, asking):
                raise
        finally:
            asking.done()
            self._waited += time.perf_counter() - began

    async def _ask_others(self, call: Call, others: Sequence[str], session: str, asking: Asking) -> bool:
        """Whether one of the models that stand in has answered."""
        catalogue, principal = self._service.catalogue, self.record.principal
        for name in others:
            if asking.late:
                break
            try:
                catalogue.check(principal, name)
                route = catalogue.resolve(name)
            except ModelNotFound:
                continue  # the operators' list of what a key may use is for stand-ins too
            self._keep_nothing()
            try:
                self._take(await asking.ask(call, route, session, AttemptKind.FALLBACK))
            except UpstreamError:
                continue
            self.record.answered_by = name
            return True
        return False

    def _keep_nothing(self) -> None:
        """The answer of another model is not kept as this one's, and those who wait for it ask themselves."""
        self._lookup = self._assembler = None
        if self._flight is not None:
            self._flight.leave(Ending.NOT_KEPT)
            self._flight = None

    def _end(self) -> End:
        """When an answer must have begun."""
        until = asyncio.get_running_loop().time() + self._service.limits.timeout_seconds
        if self._deadline is not None and self._deadline < until:
            return End(self._deadline, own=True, callers=self._impatient)
        return End(until)

    def _make_meter(self, call: Call, keep_text: bool) -> StreamMeter:
        if self._lookup is None or self._service.cache is None:
            return StreamMeter(call.operation, hide_usage=not call.usage_shown, keep_text=keep_text)
        assembler = self._service.cache.assembler(call.operation)
        meter = StreamMeter(
            call.operation, hide_usage=not call.usage_shown, keep_text=keep_text, tap=assembler.feed
        )
        self._assemblers = (*self._assemblers, (meter, assembler))  # two attempts may run at a time
        return meter

    def _take(self, answer: Answer) -> None:
        record, facts = self.record, answer.facts
        self._answer, self.whole = answer, answer.whole
        if facts is not None:
            record.response_id, record.response_model = facts.id, facts.model
            record.usage, record.finish_reason = facts.usage, facts.finish_reason
            return
        self._stream, self._meter, self._first = answer.stream, answer.meter, answer.first
        self._passed_on_at = time.perf_counter()
        self._assembler = next((a for meter, a in self._assemblers if meter is answer.meter), None)
        self._assemblers = ()
        if answer.meter is not None:
            self._note_first_token(answer.meter)

    def _idle_seconds(self) -> float:
        own = self._answer.place.target.idle_seconds if self._answer is not None else None
        return self._service.limits.idle_seconds if own is None else own

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
            seconds = self.record.time_to_first_token_seconds = self._first_token_at - self._started
            if self._spans is not None:
                self._spans.first_token(seconds)

    def count(self) -> None:
        """Put usage and cost into the record, as far as they are known by now."""
        record, meter = self.record, self._meter
        if record.cache is CacheUse.HIT:
            return  # what was used is known: nothing
        if meter is not None:
            record.response_id, record.response_model = meter.id, meter.model
            record.finish_reason = meter.finish_reason
            estimated_input = 0 if meter.usage is not None else self._estimated_input()
            record.usage = meter.usage_or_estimate(estimated_input)
            self._note_pace()
        elif record.usage is None and (
            self.whole is not None or (self._asking is not None and self._asking.unanswered)
        ):
            # Unanswered: the upstream got the question, and counts it though nobody heard its answer.
            record.usage = Usage(
                input_tokens=self._estimated_input(),
                output_tokens=estimate_answer(self.whole) if self.whole is not None else 0,
                source=UsageSource.ESTIMATED,
            )
        if record.operation is Operation.RESPONSES and record.finish_reason == "failed":
            record.outcome, record.error_code = Outcome.UPSTREAM_ERROR, "response_failed"
        if record.usage is not None:
            record.cost = self._cost(record.usage)

    def _cost(self, usage: Usage) -> Cost:
        """By the price of the place that answered, else of the one that has the question."""
        asked = self._asking.asked if self._asking is not None else None
        place = self._answer.place if self._answer is not None else asked
        return self._price(place.target, usage, self.record.response_model) if place is not None else UNPRICED

    def _count_waste(self) -> None:
        """Questions whose answers nobody heard, at the price of each place: in no budget and no record."""
        asking, recorder = self._asking, self._service.recorder
        if asking is None:
            return
        for hedge in asking.hedges:
            usd = self._question_usd(hedge.wasted) if hedge.wasted is not None else 0.0
            recorder.hedged(won=hedge.won, wasted_usd=usd)
        late_at = list(asking.late_at)
        if asking.unanswered and asking.asked in late_at:
            late_at.remove(asking.asked)  # this one is in the record
        for place in late_at:
            recorder.late(self._question_usd(place))

    def _question_usd(self, place: Place) -> float:
        usage = Usage(self._estimated_input(), source=UsageSource.ESTIMATED)
        return self._price(place.target, usage, place.target.model).usd or 0.0

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
            return estimate_request(parameters_of(call))
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
        session=fields.prompt_cache_key or fields.user or "",
    )


def new_id() -> str:
    """A unique id that sorts by time: milliseconds, then 80 random bits, in hex."""
    return f"{time.time_ns() // 1_000_000:012x}{random.getrandbits(80):020x}"


def _output(call: Call, parameters: dict[str, Any], longest: int | None) -> tuple[int, int]:
    """Tokens of the answer: how many are expected, and how many there may be."""
    if call.operation is Operation.EMBEDDINGS:
        return 0, 0
    times = max(_whole(parameters.get("n")), _whole(parameters.get("best_of")), 1)
    prompts = parameters.get("prompt")
    if call.operation is Operation.TEXT_COMPLETION and isinstance(prompts, list):
        times *= max(sum(isinstance(prompt, str | list) for prompt in prompts), 1)
    # Where there are two, which of them the upstream heeds is its own affair: the larger counts.
    limit = max(_whole(parameters.get(name)) for name in _OUTPUT_LIMITS[call.operation])
    if limit:
        most = min(min(limit, longest or limit) * times, MOST_TOKENS)
        return most, most
    longest = longest or LONGEST_TOKENS
    return min(times * min(EXPECTED_TOKENS, longest), MOST_TOKENS), min(times * longest, MOST_TOKENS)


def _whole(value: Any) -> int:
    """A whole number above 0, however it is written; else 0."""
    if type(value) not in (int, float) or not value > 0:
        return 0
    return int(min(value, MOST_TOKENS))


def _stalled() -> UpstreamTimeout:
    return UpstreamTimeout("The upstream stalled in the middle of the stream.")


def _over() -> RequestDeadline:
    return RequestDeadline("The request took longer than it may.")


def _outcome(raised: BaseException | None, *, begun: bool) -> tuple[Outcome, str | None]:
    if raised is None:
        return Outcome.SUCCESS, None
    if isinstance(raised, WeirError):
        return outcome_of(raised), raised.code
    if isinstance(raised, asyncio.CancelledError):
        return Outcome.STREAM_TRUNCATED if begun else ShuttingDown.outcome, ShuttingDown.code
    return Outcome.INTERNAL_ERROR, WeirError.code


def _told_as(raised: BaseException) -> WeirError:
    """What ended an attempt that nobody waits for any more."""
    if isinstance(raised, WeirError):
        return raised
    if isinstance(raised, asyncio.CancelledError):
        return ShuttingDown("The drain was over.")
    return InternalError("A fault of Weir itself.")


def _path_in(message: str) -> str | None:
    """msgspec ends its message with the place: ... - at `$.stream`."""
    _, found, path = message.rpartition("`$.")
    return path.rstrip("`") if found else None
