"""Providers for the traffic run: fake upstreams that answer as each request itself directs.

The last message of a request is a JSON object, for example::

    {"id": "r17", "input": 812, "output": 96, "first": 0.12, "pace": 0.004, "faults": {"openai": ["503", ""]}}

So the run knows, before it asks, how many tokens the provider will count, when the first of them comes, and
what goes wrong where: of `faults` each call of the request at that provider takes the next one, and the last
one lasts. What they do:

| fault | what it does |
|---|---|
| (empty) | a good answer |
| 400, 429, 503, ... | that status |
| too-long | 400: the request is too long for the model |
| silence | never answers |
| late-MS | waits so many milliseconds more, then answers well |
| drop | half of a stream, each chunk with the tokens so far, then a TCP reset |
| hold | half of a stream, each chunk with the tokens so far, then silence |
| broken | a 200 that is no JSON |
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec

from tests.fakes.upstream import Ask, Doc, Event, Exchange, FakeUpstream, dumps, utf8

WORD: Final = "water "
_LAST: Final = Event("[DONE]")


class Directions(msgspec.Struct, frozen=True, omit_defaults=True):
    """How a request wants to be answered. Times are seconds."""

    id: str
    input: int = 0
    output: int = 0
    cached: int = 0
    written: int = 0
    """Input tokens that the provider puts into its cache."""
    reasoning: int = 0
    audio_input: int = 0
    audio_output: int = 0
    first: float = 0.0
    """Until the first event, or the whole answer."""
    pace: float = 0.0
    """Between the chunks of a stream."""
    chunks: int = 4
    faults: dict[str, tuple[str, ...]] = {}

    @property
    def half(self) -> int:
        """Chunks that a stream with the faults `drop` and `hold` has."""
        return max(self.chunks // 2, 1)

    def output_after(self, chunks: int) -> int:
        """Output tokens that the provider counts after so many chunks."""
        return self.output * chunks // self.chunks


class Provider(FakeUpstream):
    """One provider; `calls_seen` counts what reached it."""

    def __init__(self, name: str, port: int = 0) -> None:
        super().__init__(record=False, port=port)
        self.name = name
        self._seen: Counter[str] = Counter()
        self._lock = threading.Lock()

    @property
    def calls_seen(self) -> int:
        with self._lock:
            return self._seen.total()

    def has_seen(self, request: str) -> bool:
        with self._lock:
            return request in self._seen

    def behaviour_of(self, ask: Ask) -> Callable[[Exchange], Awaitable[None]]:
        return self._answer

    async def _answer(self, x: Exchange) -> None:
        told = directions_of(x.ask.payload)
        if told is None:
            await x.error(400, "Fake 400: the last message holds no directions.", "no_directions")
            return
        with self._lock:
            self._seen[told.id] += 1
            turn = self._seen[told.id]
        faults = told.faults.get(self.name, ())
        fault = faults[min(turn, len(faults)) - 1] if faults else ""
        await _answer_with(x, told, fault)


async def _answer_with(x: Exchange, told: Directions, fault: str) -> None:
    if fault == "silence":
        await x.silence()
    if fault == "too-long":
        await x.error(400, "Fake 400: the messages are too long.", "context_length_exceeded")
        return
    if fault.isdigit():
        headers = {"retry-after": 1} if fault == "429" else None
        await x.error(int(fault), f"Fake {fault}: this is what the run asked for.", f"fake_{fault}", headers)
        return
    late = int(fault.removeprefix("late-")) / 1000 if fault.startswith("late-") else 0.0
    await asyncio.sleep(told.first + late)
    if fault == "broken":
        await x.whole(b"<html>")
    elif not x.ask.streams:
        await asyncio.sleep(told.chunks * told.pace)
        await x.whole(utf8(dumps(_WHOLE[x.ask.operation](x.ask, told))))
    else:
        await _stream(x, told, fault)


async def _stream(x: Exchange, told: Directions, fault: str) -> None:
    """A stream of a chat completion: a role, the chunks, the end, usage."""
    head = {"id": f"chatcmpl-{x.call.number}", "object": "chat.completion.chunk", "created": 1_700_000_000}
    head |= {"model": x.ask.model}
    cut = fault in ("drop", "hold")

    def chunk(delta: Doc, finish: str | None = None, usage: Doc | None = None) -> Event:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        return Event(dumps(head | {"choices": [choice]} | ({} if usage is None else {"usage": usage})))

    await x.send(x.stream_head())
    await x.play([chunk({"role": "assistant", "content": ""})])
    count = told.half if cut else told.chunks
    for number in range(1, count + 1):
        if number > 1:
            await asyncio.sleep(told.pace)
        usage = _usage(told, told.output_after(number)) if cut else None
        await x.play([chunk({"content": WORD}, usage=usage)])
    if fault == "hold":
        await x.silence()
    if fault == "drop":
        await asyncio.sleep(0.02)
        x.reset()
    closing = [chunk({}, "stop")]
    if x.ask.wants_usage:
        closing.append(Event(dumps(head | {"choices": [], "usage": _usage(told, told.output)})))
    await x.play([*closing, _LAST], end=True)


def directions_of(payload: Doc) -> Directions | None:
    """The directions in the last message, the input or the prompt of a request."""
    messages = payload.get("messages")
    text = messages[-1].get("content") if isinstance(messages, list) and messages else payload.get("input")
    try:
        return msgspec.json.decode(text, type=Directions) if isinstance(text, str) else None
    except msgspec.DecodeError:
        return None


def _usage(told: Directions, output: int) -> Doc:
    return {
        "prompt_tokens": told.input,
        "completion_tokens": output,
        "total_tokens": told.input + output,
        "prompt_tokens_details": {
            "cached_tokens": told.cached,
            "cache_write_tokens": told.written,
            "audio_tokens": told.audio_input,
        },
        "completion_tokens_details": {
            "reasoning_tokens": min(told.reasoning, output),
            "audio_tokens": min(told.audio_output, output),
        },
    }


def _chat(ask: Ask, told: Directions) -> Doc:
    message = {"role": "assistant", "content": WORD * told.chunks}
    return {
        "id": f"chatcmpl-{ask.number}",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": ask.model,
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": _usage(told, told.output),
    }


def _response(ask: Ask, told: Directions) -> Doc:
    part = {"type": "output_text", "text": WORD * told.chunks, "annotations": []}
    item = {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed", "content": [part]}
    return {
        "id": f"resp_{ask.number}",
        "object": "response",
        "status": "completed",
        "model": ask.model,
        "output": [item],
        "usage": {
            "input_tokens": told.input,
            "input_tokens_details": {"cached_tokens": told.cached},
            "output_tokens": told.output,
            "output_tokens_details": {"reasoning_tokens": told.reasoning},
            "total_tokens": told.input + told.output,
        },
    }


def _embedding(ask: Ask, told: Directions) -> Doc:
    return {
        "object": "list",
        "model": ask.model,
        "data": [{"object": "embedding", "index": 0, "embedding": [0.25, -0.5]}],
        "usage": {"prompt_tokens": told.input, "total_tokens": told.input},
    }


_WHOLE: Final[dict[str, Callable[[Ask, Directions], Doc]]] = {
    "chat": _chat,
    "response": _response,
    "embedding": _embedding,
}


def directed(directions: Directions) -> str:
    """The text of a message that holds them."""
    return json.dumps(msgspec.to_builtins(directions))
