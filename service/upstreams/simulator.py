"""An upstream that needs nothing: it answers by fixed rules, word by word, and says that it is no model.

The model's name chooses the behaviour; `simulator` and every name that is not in this table answer
at the set speed:

| model | what it does |
|---|---|
| `sim-slow` | a tenth of the speed, and two seconds before the first word |
| `sim-long` | `max_tokens` words (1000 if not given), for long streams |
| `sim-STATUS` | fails with that HTTP status: `sim-429`, `sim-500`, ... |
| `sim-stall` | two words, then silence |
| `sim-drop` | two words, then the connection breaks |
| `sim-error` | two words, then an error event |
| `sim-no-done` | the whole stream without its end mark |

Its tokens are its words, and it counts them honestly.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator, Sequence
from typing import Any, Final

import msgspec

from service.domain import Call, Operation
from service.errors import UpstreamError, UpstreamRejected
from service.ports import StreamedAnswer, WholeAnswer
from service.tokens import estimate_request
from service.upstreams import simulated
from service.upstreams.rejection import broken_answer, broken_stream, rejection

NAME: Final = "simulator"
MODELS: Final = (
    NAME,
    "sim-slow",
    "sim-long",
    "sim-429",
    "sim-500",
    "sim-stall",
    "sim-drop",
    "sim-error",
    "sim-no-done",
)
SLOW_FACTOR: Final = 10
SLOW_FIRST_SECONDS: Final = 2.0
LONG_TOKENS: Final = 1_000
MOST_TOKENS: Final = 100_000
QUOTED_LETTERS: Final = 200
_STATUS: Final = re.compile(r"sim-([45]\d\d)")


class SimulatorUpstream:
    """An upstream inside the process; `tokens_per_second` is the speed of its streams."""

    provider = NAME

    def __init__(self, name: str = NAME, *, tokens_per_second: float = 50.0) -> None:
        self.name = name
        self._tokens_per_second = tokens_per_second

    async def send(self, call: Call) -> WholeAnswer | StreamedAnswer:
        model = call.model
        if status := _STATUS.fullmatch(model):
            raise _failure(int(status[1]))
        parameters = call.parameters if call.parameters is not None else _decode(call.body)
        pace = _Pace(self._tokens_per_second, slow=model == "sim-slow")
        answer = simulated.Answer(
            operation=call.operation,
            model=model if model in MODELS else NAME,
            words=_words(model, parameters),
            input_tokens=estimate_request(parameters),
            max_tokens=_max_tokens(parameters),
        )
        if call.operation is Operation.EMBEDDINGS:
            return WholeAnswer(simulated.embeddings(answer, parameters))
        if call.stream:
            usage = bool((parameters.get("stream_options") or {}).get("include_usage"))
            return _Stream(simulated.events(answer, usage=usage), pace, model)
        if model == "sim-drop":
            raise broken_answer()
        if model == "sim-stall":
            await asyncio.Event().wait()
        await pace.until_word(answer.output_tokens)
        return WholeAnswer(simulated.whole(answer))

    async def models(self) -> Sequence[dict[str, Any]]:
        return [{"id": model, "object": "model", "created": 0, "owned_by": NAME} for model in MODELS]

    def note(self, key: str | None, error: UpstreamError) -> None: ...

    async def close(self) -> None: ...


class _Pace:
    """When the n-th word is due, counted from the start: late words are not made later still."""

    def __init__(self, tokens_per_second: float, *, slow: bool) -> None:
        self._seconds = (SLOW_FACTOR if slow else 1) / tokens_per_second
        self._start = asyncio.get_running_loop().time() + (SLOW_FIRST_SECONDS if slow else 0.0)

    async def until_word(self, number: int) -> None:
        wait = self._start + number * self._seconds - asyncio.get_running_loop().time()
        if wait > 0:
            await asyncio.sleep(wait)


class _Stream:
    """A StreamedAnswer made up on the way."""

    upstream_request_id: str | None = None
    secret: str | None = None

    def __init__(self, events: Iterator[simulated.Event], pace: _Pace, model: str) -> None:
        self._events = events
        self._pace = pace
        self._model = model
        self._words = 0

    async def read(self) -> bytes:
        for event in self._events:
            if event.is_word:
                self._words += 1
                if self._words > 2:
                    await self._misbehave()
                await self._pace.until_word(self._words)
            if event.is_done and self._model == "sim-no-done":
                continue
            if event.is_word and self._words > 2 and self._model == "sim-error":
                self._events = iter(())
                return simulated.error_event()
            return event.data
        return b""

    async def close(self) -> None: ...

    async def _misbehave(self) -> None:
        if self._model == "sim-stall":
            await asyncio.Event().wait()
        if self._model == "sim-drop":
            raise broken_stream()


def _words(model: str, parameters: dict[str, Any]) -> list[str]:
    """The answer's words, each with the space before it."""
    if model == "sim-long":
        count = min(_max_tokens(parameters) or LONG_TOKENS, MOST_TOKENS)
        return ["water", *(f" flows{'.' if n % 10 == 9 else ''}" for n in range(count - 1))]
    text = f"I am Weir's simulator, not a model. You wrote: {_last_text(parameters)}"
    return re.findall(r"\s*\S+", text)


def _last_text(parameters: dict[str, Any]) -> str:
    """What the caller wrote last, shortened."""
    value: Any = parameters.get("messages", parameters.get("input", parameters.get("prompt", "")))
    while not isinstance(value, str):
        if isinstance(value, list) and value:
            value = value[-1]
        elif isinstance(value, dict):
            value = value.get("content", value.get("text", ""))
        else:
            value = ""
    text: str = value
    return text if len(text) <= QUOTED_LETTERS else text[:QUOTED_LETTERS] + " ..."


def _max_tokens(parameters: dict[str, Any]) -> int | None:
    for name in ("max_completion_tokens", "max_tokens", "max_output_tokens"):
        if isinstance(parameters.get(name), int):
            return max(int(parameters[name]), 1)
    return None


def _failure(status: int) -> Exception:
    body = {"error": {"message": f"The simulator was asked to fail with {status}.", "code": f"sim_{status}"}}
    return rejection(
        status,
        msgspec.json.encode(body),
        retry_after="1" if status in (429, 503) else None,
        request_id=None,
        secret=None,
    )


def _decode(body: bytes) -> dict[str, Any]:
    try:
        decoded = msgspec.json.decode(body)
    except (ValueError, RecursionError):
        decoded = None
    if not isinstance(decoded, dict):
        raise UpstreamRejected(400, {"message": "The body is not a JSON object.", "code": "invalid_json"})
    return decoded
