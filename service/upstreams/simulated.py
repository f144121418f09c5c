"""The simulator's answers in OpenAI's shapes. Pure functions: the same answer gives the same bytes."""

from __future__ import annotations

import base64
import hashlib
import math
import struct
from collections.abc import Iterator
from typing import Any, Final

import msgspec

from service.domain import Operation

CREATED: Final = 0
"""Deterministic: the simulator has no clock."""
DEFAULT_DIMENSIONS: Final = 256
MAX_DIMENSIONS: Final = 4096


class Answer(msgspec.Struct):
    """What the simulator says to one call."""

    operation: Operation
    model: str
    words: list[str]
    input_tokens: int
    max_tokens: int | None

    def __post_init__(self) -> None:
        self.cut = self.max_tokens is not None and self.max_tokens < len(self.words)
        if self.cut:
            self.words = self.words[: self.max_tokens]

    cut: bool = False

    @property
    def output_tokens(self) -> int:
        return len(self.words)

    @property
    def text(self) -> str:
        return "".join(self.words)

    @property
    def id(self) -> str:
        digest = hashlib.sha256(f"{self.operation}{self.model}{self.text}".encode()).hexdigest()[:24]
        return {Operation.CHAT: "chatcmpl-", Operation.RESPONSES: "resp_"}.get(
            self.operation, "cmpl-"
        ) + digest


class Event(msgspec.Struct):
    """One Server-Sent Event, ready to send."""

    data: bytes
    is_word: bool = False
    is_done: bool = False


def whole(answer: Answer) -> bytes:
    if answer.operation is Operation.RESPONSES:
        return _json(_response(answer, "completed"))
    choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": _finish(answer)}
    if answer.operation is Operation.CHAT:
        choice["message"] = {"role": "assistant", "content": answer.text, "refusal": None}
    else:
        choice["text"] = answer.text
    body = _envelope(answer, chunk=False)
    return _json({**body, "choices": [choice], "usage": _usage(answer)})


def events(answer: Answer, *, usage: bool) -> Iterator[Event]:
    """The answer as a stream; with `usage` its last chunk is the usage, as OpenAI sends it."""
    if answer.operation is Operation.RESPONSES:
        yield from _response_events(answer)
        return
    chat = answer.operation is Operation.CHAT
    body = _envelope(answer, chunk=True) | ({"usage": None} if usage else {})

    def chunk(piece: dict[str, Any], finish: str | None = None) -> bytes:
        content = {"delta": piece} if chat else {"text": piece.get("content", "")}
        return _event({**body, "choices": [{"index": 0, **content, "finish_reason": finish}]})

    if chat:
        yield Event(chunk({"role": "assistant", "content": ""}))
    for word in answer.words:
        yield Event(chunk({"content": word}), is_word=True)
    yield Event(chunk({}, _finish(answer)))
    if usage:
        yield Event(_event({**body, "choices": [], "usage": _usage(answer)}))
    yield Event(b"data: [DONE]\n\n", is_done=True)


def error_event() -> bytes:
    return _event({"error": {"message": "The simulator was asked to fail here.", "type": "server_error"}})


def embeddings(answer: Answer, parameters: dict[str, Any]) -> bytes:
    """Unit vectors made from a hash of each input: equal texts have equal vectors, no more."""
    given = parameters.get("input", "")
    many = isinstance(given, list) and not all(isinstance(item, int) for item in given)
    wanted = parameters.get("dimensions")
    dimensions = min(wanted, MAX_DIMENSIONS) if isinstance(wanted, int) and wanted > 0 else DEFAULT_DIMENSIONS
    in_base64 = parameters.get("encoding_format") == "base64"
    data = []
    for index, item in enumerate(given if many else [given]):
        vector = _vector(repr(item), dimensions)
        packed = base64.b64encode(struct.pack(f"<{dimensions}f", *vector)).decode()
        data.append({"object": "embedding", "index": index, "embedding": packed if in_base64 else vector})
    usage = {"prompt_tokens": answer.input_tokens, "total_tokens": answer.input_tokens}
    return _json({"object": "list", "data": data, "model": answer.model, "usage": usage})


def _envelope(answer: Answer, *, chunk: bool) -> dict[str, Any]:
    chat = "chat.completion.chunk" if chunk else "chat.completion"
    return {
        "id": answer.id,
        "object": chat if answer.operation is Operation.CHAT else "text_completion",
        "created": CREATED,
        "model": answer.model,
    }


def _usage(answer: Answer) -> dict[str, int]:
    return {
        "prompt_tokens": answer.input_tokens,
        "completion_tokens": answer.output_tokens,
        "total_tokens": answer.input_tokens + answer.output_tokens,
    }


def _finish(answer: Answer) -> str:
    return "length" if answer.cut else "stop"


def _response_events(answer: Answer) -> Iterator[Event]:
    number = iter(range(1_000_000))

    def event(kind: str, **fields: Any) -> bytes:
        return f"event: {kind}\n".encode() + _event({"type": kind, "sequence_number": next(number), **fields})

    place = {"item_id": "msg_0", "output_index": 0, "content_index": 0}
    item = {"id": "msg_0", "type": "message", "role": "assistant", "status": "in_progress", "content": []}
    part = {"type": "output_text", "text": "", "annotations": []}
    yield Event(event("response.created", response=_response(answer, "in_progress")))
    yield Event(event("response.output_item.added", output_index=0, item=item))
    yield Event(event("response.content_part.added", **place, part=part))
    for word in answer.words:
        yield Event(event("response.output_text.delta", **place, delta=word, logprobs=[]), is_word=True)
    yield Event(event("response.output_text.done", **place, text=answer.text, logprobs=[]))
    yield Event(event("response.content_part.done", **place, part={**part, "text": answer.text}))
    yield Event(event("response.output_item.done", output_index=0, item=_item(answer)))
    end = "incomplete" if answer.cut else "completed"
    yield Event(event(f"response.{end}", response=_response(answer, end)), is_done=True)


def _response(answer: Answer, status: str) -> dict[str, Any]:
    ended = status != "in_progress"
    if ended and answer.cut:
        status = "incomplete"
    usage = {
        "input_tokens": answer.input_tokens,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": answer.output_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": answer.input_tokens + answer.output_tokens,
    }
    return {
        "id": answer.id,
        "object": "response",
        "created_at": CREATED,
        "status": status,
        "model": answer.model,
        "output": [_item(answer)] if ended else [],
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if ended and answer.cut else None,
        "usage": usage if ended else None,
    }


def _item(answer: Answer) -> dict[str, Any]:
    return {
        "id": "msg_0",
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": [{"type": "output_text", "text": answer.text, "annotations": []}],
    }


def _vector(text: str, dimensions: int) -> list[float]:
    blocks = -(-dimensions // 32)
    raw = b"".join(hashlib.sha256(f"{n}:{text}".encode()).digest() for n in range(blocks))[:dimensions]
    centred = [byte - 127.5 for byte in raw]
    length = math.sqrt(sum(value * value for value in centred))
    return [value / length for value in centred]


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + _json(data) + b"\n\n"


def _json(value: Any) -> bytes:
    return msgspec.json.encode(value)
