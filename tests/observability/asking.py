"""One request of the run: what is sent, what the caller sees, and what Weir has to count for it."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Final, NamedTuple

import aiohttp

from service.domain import Outcome
from service.tokens import estimate_request
from tests.observability.providers import Directions, directed
from tests.observability.settings import KEYS, PRICES, secret

CHAT: Final = "/v1/chat/completions"
EMBEDDINGS: Final = "/v1/embeddings"
RESPONSES: Final = "/v1/responses"
TURN: Final = "/api/v1/chat"
TURN_STREAM: Final = "/api/v1/chat/stream"
GENERATE: Final = "/api/v1/generate"
MILLION: Final = 1_000_000

_BY_CODE: Final = {
    "overloaded": Outcome.OVERLOADED,
    "state_unavailable": Outcome.OVERLOADED,
    "server_shutting_down": Outcome.INTERNAL_ERROR,
    "internal_error": Outcome.INTERNAL_ERROR,
    "api_timeout": Outcome.TIMEOUT,
    "request_deadline_exceeded": Outcome.TIMEOUT,
    "stream_truncated": Outcome.STREAM_TRUNCATED,
    "openai_service_error": Outcome.UPSTREAM_ERROR,
    "upstream_authentication_error": Outcome.UPSTREAM_ERROR,
    "rate_limit_exceeded": Outcome.RATE_LIMITED,
    "budget_exceeded": Outcome.BUDGET_REJECTED,
    "budget_reserved": Outcome.BUDGET_REJECTED,
}
"""What docs/errors.md says of the codes that callers get; those of 4xx without one here are client_error."""


class Used(NamedTuple):
    """Tokens that are counted for a request."""

    input: int = 0
    output: int = 0
    cached: int = 0
    written: int = 0
    reasoning: int = 0
    audio_input: int = 0
    audio_output: int = 0


@dataclass(frozen=True)
class Ask:
    """One request. `expect` is how it has to end, as far as it can be known before."""

    told: Directions
    model: str
    key: str
    route: str = CHAT
    stream: bool = True
    expect: Outcome = Outcome.SUCCESS
    answered_by: str = ""
    """The model whose price counts, where another one stands in."""
    keep: bool = False
    """Temperature 0: the answer may come from the cache."""
    leaves: str = ""
    """The caller leaves: `before` an answer, or in the `middle` of a stream."""
    patience_seconds: float | None = None
    """The caller tells Weir how long it may take."""
    broken_body: bool = False
    wrong_key: bool = False

    @property
    def tenant(self) -> str:
        return KEYS[self.key]

    @property
    def body(self) -> dict[str, Any]:
        text = directed(self.told)
        if self.route == CHAT:
            body: dict[str, Any] = {
                "model": self.model,
                "messages": [{"role": "user", "content": text}],
            }
            if self.stream:
                body["stream"] = True
        elif self.route in (EMBEDDINGS, RESPONSES):
            body = {"model": self.model, "input": text}
        elif self.route == GENERATE:
            body = {"model": self.model, "prompt": text}
        else:
            body = {"model": self.model, "message": text}
        if self.keep:
            body["temperature"] = 0
        return body


@dataclass
class Seen:
    """What the caller of a request saw."""

    outcome: Outcome
    request_id: str
    code: str | None = None
    status: int = 0
    cached: bool = False
    first_seconds: float | None = None
    seconds: float = 0.0
    chunks: int = 0
    trace_id: str | None = None
    started_at: float = field(default_factory=time.time)
    at_opening: bool = False
    """Before the first scrape of its pod."""


def used(ask: Ask, seen: Seen) -> Used | None:
    """The tokens that Weir has to count; None where none are: it never asked, or was told of a failure."""
    told = ask.told
    if seen.cached:
        return None
    if seen.outcome is Outcome.SUCCESS:
        return _told(told, told.output)
    if seen.outcome not in (
        *(Outcome.CLIENT_DISCONNECTED, Outcome.STREAM_TRUNCATED),
        *(Outcome.TIMEOUT, Outcome.INTERNAL_ERROR),
    ):
        return None
    if seen.chunks:  # in the middle of a stream that tells the tokens so far with each chunk
        return _told(told, told.output_after(told.half))
    # The provider has the question and never counted it aloud: Weir estimates it.
    return Used(input=estimate_request(ask.body))


def _told(told: Directions, output: int) -> Used:
    """What the provider counts once it has given so many tokens."""
    return Used(
        told.input,
        output,
        told.cached,
        told.written,
        min(told.reasoning, output),
        told.audio_input,
        min(told.audio_output, output),
    )


def cost(ask: Ask, tokens: Used) -> Decimal | None:
    """Dollars by the prices of this run; None for a model that has none."""
    price = PRICES.get(ask.answered_by or ask.model)
    if price is None:
        return None
    cached = tokens.cached if price.cached_input is not None else 0
    total = (tokens.input - cached) * price.input + tokens.output * price.output
    if price.cached_input is not None:
        total += cached * price.cached_input
    return total / MILLION


class Caller:
    """Sends requests of the run, as many at a time as it is told to."""

    def __init__(self, reached: Callable[[str], bool]) -> None:
        """`reached` tells whether any provider has a request with these directions' id."""
        self._reached = reached
        self._numbers = itertools.count(1)
        self._http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=60)
        )

    async def close(self) -> None:
        await self._http.close()

    async def ask(self, url: str, ask: Ask, half: asyncio.Event | None = None) -> Seen:
        """`half` is set when half of the stream has come."""
        began, started_at = time.perf_counter(), time.time()
        headers = {"Authorization": f"Bearer {'nobody' if ask.wrong_key else secret(ask.key)}"}
        body = b'{"model": "' if ask.broken_body else json.dumps(ask.body).encode()
        headers["Content-Type"] = "application/json"
        if ask.patience_seconds is not None:
            headers["X-Request-Timeout"] = str(ask.patience_seconds)
        request_id = headers["X-Request-ID"] = f"{ask.told.id}.{next(self._numbers)}"
        seen = Seen(Outcome.SUCCESS, request_id, started_at=started_at)
        taking = asyncio.ensure_future(self._take(url, ask, body, headers, seen, began, half))
        if ask.leaves == "before" and await self._reached_before(taking, ask.told.id):
            taking.cancel()
            await asyncio.wait([taking])
            seen.outcome = Outcome.CLIENT_DISCONNECTED
        else:
            await taking
        seen.seconds = time.perf_counter() - began
        return seen

    async def _reached_before(self, taking: asyncio.Future[None], request: str) -> bool:
        """A provider has the request; False once it was answered without: turned away at the door."""
        while not self._reached(request):
            if taking.done():
                return False
            await asyncio.sleep(0.02)
        return True

    async def _take(
        self,
        url: str,
        ask: Ask,
        body: bytes,
        headers: dict[str, str],
        seen: Seen,
        began: float,
        half: asyncio.Event | None,
    ) -> None:
        async with self._http.post(f"{url}{ask.route}", data=body, headers=headers) as answer:
            seen.status = answer.status
            seen.cached = answer.headers.get("x-weir-cache") == "hit"
            seen.trace_id = answer.headers.get("x-trace-id")
            if answer.status != 200:
                error = (await answer.json())["error"]
                seen.code = error["code"]
                default = Outcome.CLIENT_ERROR if answer.status < 500 else Outcome.INTERNAL_ERROR
                seen.outcome = _BY_CODE.get(error["code"], default)
                return
            if answer.content_type != "text/event-stream":
                await answer.read()
                return
            async for event in _events(answer.content):
                if event.get("error"):
                    seen.code = event["error"]["code"]
                    cut = seen.code == "server_shutting_down"
                    seen.outcome = Outcome.STREAM_TRUNCATED if cut else _BY_CODE[event["error"]["code"]]
                    continue
                if _text(event):
                    if seen.first_seconds is None:
                        seen.first_seconds = time.perf_counter() - began
                    seen.chunks += 1
                    if half is not None and seen.chunks == ask.told.half:
                        half.set()
                    if ask.leaves == "middle" and seen.chunks == ask.told.half:
                        seen.outcome = Outcome.CLIENT_DISCONNECTED
                        answer.close()
                        return


async def _events(content: aiohttp.StreamReader) -> AsyncIterator[dict[str, Any]]:
    async for line in content:
        if line.startswith(b"data: {"):
            yield json.loads(line[6:])


def _text(event: dict[str, Any]) -> str:
    if "choices" in event:
        return "".join(choice.get("delta", {}).get("content") or "" for choice in event["choices"])
    delta = event.get("delta")
    return delta if isinstance(delta, str) else ""
