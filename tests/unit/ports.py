"""Small stand-ins for the ports, for tests of the core without sockets."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from service.domain import AttemptKind, Call, Cost, Operation, Principal, RequestRecord, Standing, Usage
from service.errors import UpstreamError, WeirError
from service.ports import Demand, Reservation, StreamedAnswer, Target, Upstream, WholeAnswer
from service.routing.breaker import Breaker
from service.routing.places import Condition, Peer, Place
from service.routing.routes import Route

GOOD_BODY = msgspec.json.encode(
    {
        "id": "chatcmpl-1",
        "model": "good-2025",
        "choices": [{"index": 0, "message": {"content": "Hello there."}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
    }
)
USER = Principal("key-of-anna", "team")


def chunk(text: str | None = None, **more: Any) -> bytes:
    """One event of a chat stream."""
    delta = {} if text is None else {"content": text}
    choice = {"index": 0, "delta": delta, "finish_reason": more.pop("finish_reason", None)}
    return (
        b"data: " + msgspec.json.encode({"id": "c-1", "model": "good", "choices": [choice], **more}) + b"\n\n"
    )


DONE = b"data: [DONE]\n\n"


class Stream:
    """A StreamedAnswer of these pieces; an exception among them is raised, a callable is awaited."""

    upstream_request_id: str | None = "req-stream"
    secret: str | None = None

    def __init__(self, pieces: Iterable[Any]) -> None:
        self._pieces = iter(pieces)
        self.closed = 0

    async def read(self) -> bytes:
        for piece in self._pieces:
            if isinstance(piece, BaseException):
                raise piece
            if callable(piece):
                await piece()
                continue
            assert isinstance(piece, bytes)
            return piece
        return b""

    async def close(self) -> None:
        self.closed += 1


class ScriptedUpstream:
    """Gives the answers it was made with, one a call: bytes, streams, errors; the last one for ever."""

    provider = "scripted"

    def __init__(self, *answers: Any, name: str = "scripted") -> None:
        self.name = name
        self._answers = list(answers) or [GOOD_BODY]
        self.calls: list[Call] = []
        self.asked = asyncio.Event()

    async def send(self, call: Call) -> WholeAnswer | StreamedAnswer:
        self.calls.append(call)
        self.asked.set()
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if callable(answer):
            answer = await answer()
        if isinstance(answer, BaseException):
            raise answer
        if isinstance(answer, bytes):
            return WholeAnswer(answer, "req-whole")
        streamed: StreamedAnswer = answer
        return streamed

    async def models(self) -> Sequence[dict[str, Any]]:
        return []

    def note(self, key: str | None, error: UpstreamError) -> None: ...

    async def close(self) -> None: ...


class OneUpstream:
    """A catalogue that has one upstream for every model."""

    def __init__(self, upstream: Upstream, *, model: str | None = None, stream_usage: bool = True) -> None:
        self._upstream = upstream
        self._model = model
        self._stream_usage = stream_usage
        self._routes: dict[str, Route] = {}

    def resolve(self, model: str) -> Route:
        if model not in self._routes:
            target = Target(self._upstream, self._model or model, self._stream_usage)
            place = Place(target, Condition(Peer(self._upstream.name), Breaker()))
            self._routes[model] = Route(model, [place])
        return self._routes[model]

    def check(self, principal: Principal, model: str) -> None: ...

    async def models(self, principal: Principal) -> Sequence[dict[str, Any]]:
        return []


class FlatPrices:
    """A dollar for each token; `context` tokens of context for every model."""

    def __init__(self, context: int | None = None) -> None:
        self._context = context

    def cost(self, model: str, provider: str, response_model: str, usage: Usage) -> Cost:
        return Cost(usd=float(usage.total_tokens), source="flat")

    def context_tokens(self, model: str, provider: str) -> int | None:
        return self._context


class ListAccounts:
    """Reserves for everybody, after `before` (which may wait or raise), and keeps every record."""

    by_address = False

    def __init__(self, before: Callable[[], Any] | None = None, *, counts_use: bool = False) -> None:
        self._before = before
        self._counts_use = counts_use
        self.demands: list[Demand] = []
        self.records: list[RequestRecord] = []
        self.settled: list[Reservation | None] = []
        self.given = Reservation()

    def estimates(self, principal: Principal, model: str) -> bool:
        return self._counts_use

    async def reserve(self, record: RequestRecord, demand: Demand) -> Reservation:
        self.demands.append(demand)
        if self._before is not None:
            await self._before()
        return self.given

    async def settle(self, record: RequestRecord, reservation: Reservation | None) -> None:
        self.records.append(record)
        self.settled.append(reservation)


class NotingRecorder:
    """Notes what it is told, in order."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str | None]] = []

    def opened(self, record: RequestRecord) -> None:
        self.told.append(("opened", record.trace_id))

    def queued(self, priority: str, seconds: float) -> None: ...

    def attempted(
        self,
        record: RequestRecord,
        error: WeirError | None,
        kind: AttemptKind,
        seconds: float,
        response_model: str = "",
    ) -> None:
        self.told.append(("attempted", error.code if error else None))

    def pace(self, record: RequestRecord, response_model: str) -> Callable[[float, int], None]:
        return lambda _seconds, _events: None

    def streamed(self, record: RequestRecord, seconds: float) -> None:
        self.told.append(("streamed", record.outcome.value))

    def unheard(self, record: RequestRecord, kind: AttemptKind, seconds: float) -> None:
        self.told.append(("unheard", kind.value))

    def hedged(self, *, won: bool, wasted_usd: float) -> None:
        self.told.append(("hedged", f"{'won' if won else 'lost'} {wasted_usd:g}"))

    def late(self, wasted_usd: float) -> None:
        self.told.append(("late", f"{wasted_usd:g}"))

    def standing(self, record: RequestRecord, standing: Standing) -> None:
        self.told.append(("standing", None))

    def closed(self, record: RequestRecord) -> None:
        self.told.append(("closed", record.outcome.value))

    def count(self, what: str) -> int:
        return sum(1 for told, _ in self.told if told == what)


def chat_call(*, stream: bool = False, model: str = "good", **more: Any) -> Call:
    body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": "Hello?"}], **more}
    if stream:
        body["stream"] = True
    return Call(Operation.CHAT, model, msgspec.json.encode(body), stream=stream)


class Clock:
    """A clock that moves only when it is told to."""

    def __init__(self, now: float = 1_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now
