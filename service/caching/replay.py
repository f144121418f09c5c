"""A whole answer as the stream that a caller who streams expects: proper events, in few and large pieces."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import msgspec

from service.domain import Operation

PIECE_LETTERS: Final = 4_000
"""Of a text in one event: clients limit the length of a line."""
PIECE_ITEMS: Final = 50
"""Log probabilities in one event."""
BLOCK_BYTES: Final = 32 * 1024
_DONE: Final = b"data: [DONE]\n\n"
_LATE_TEXTS: Final = ("content", "refusal")
"""Come after all other texts of a message, which tell how the model got there."""
_IN_CALLS: Final = ("arguments", "input")
_encode: Final = msgspec.json.encode
Document = dict[str, Any]


class Replay:
    """A whole answer as a `StreamedAnswer`, like one that an upstream sends."""

    upstream_request_id: str | None = None
    secret: str | None = None

    def __init__(self, operation: Operation, body: bytes, *, usage: bool) -> None:
        self._blocks = replay(operation, body, usage=usage)

    async def read(self) -> bytes:
        return next(self._blocks, b"")

    async def close(self) -> None: ...


def replay(operation: Operation, body: bytes, *, usage: bool) -> Iterator[bytes]:
    """The stream as blocks of whole events; with `usage` it has the usage chunk of a completion."""
    answer = msgspec.json.decode(body)
    events = (
        _of_response(answer) if operation is Operation.RESPONSES else _of_completion(operation, answer, usage)
    )
    block = bytearray()
    for event in events:
        block += event
        if len(block) >= BLOCK_BYTES:
            yield bytes(block)
            block.clear()
    if block:
        yield bytes(block)


# -- chat and text completions -------------------------------------------------------------------


def _of_completion(operation: Operation, answer: Document, usage: bool) -> Iterator[bytes]:
    chat = operation is Operation.CHAT
    kind = "chat.completion.chunk" if chat else "text_completion"
    head = {name: value for name, value in answer.items() if name not in ("choices", "usage")}
    head["object"] = kind
    small: Document = {name: head[name] for name in _OF_EACH_CHUNK if name in head}
    tail = {"usage": None} if usage else {}

    def chunk(choice: Document) -> bytes:
        nonlocal head
        event = b"data: " + _encode({**head, "choices": [choice], **tail}) + b"\n\n"
        head = small  # what else the answer says of itself is said once
        return event

    choices = sorted(answer["choices"], key=_index)
    if chat:
        for choice in choices:
            yield chunk(_choice(choice, {"delta": _opening(choice["message"])}))
    for choice in choices:
        yield from map(chunk, _chat_pieces(choice) if chat else _text_pieces(choice))
    for choice in choices:
        yield chunk(_last(choice, {"delta": {}} if chat else {"text": ""}))
    if usage and answer.get("usage") is not None:
        yield b"data: " + _encode({**small, "choices": [], "usage": answer["usage"]}) + b"\n\n"
    yield _DONE


_OF_EACH_CHUNK: Final = ("id", "object", "created", "model", "service_tier", "system_fingerprint")


def _index(choice: Document) -> int:
    index: int = choice.get("index", 0)
    return index


def _choice(choice: Document, content: Document, logprobs: Document | None = None) -> Document:
    return {"index": _index(choice), **content, "logprobs": logprobs, "finish_reason": None}


def _last(choice: Document, content: Document) -> Document:
    rest = {name: value for name, value in choice.items() if name not in ("message", "text", "logprobs")}
    return {"logprobs": None, **rest, "index": _index(choice), **content}


def _opening(message: Document) -> Document:
    """The first delta: who speaks, and all of the message that is no text and no call."""
    opening: Document = {"role": "assistant"}
    opening |= {
        name: value
        for name, value in message.items()
        if name == "role" or not (isinstance(value, str) or _is_call(name, value))
    }
    if isinstance(message.get("content"), str):
        opening["content"] = ""
    return opening


def _is_call(name: str, value: Any) -> bool:
    return name in ("tool_calls", "function_call") and value is not None


def _chat_pieces(choice: Document) -> Iterator[Document]:
    message = choice["message"]
    texts = [name for name, value in message.items() if isinstance(value, str) and name != "role"]
    for name in sorted(texts, key=lambda name: name in _LATE_TEXTS):
        for text in _pieces(message[name]):
            yield _choice(choice, {"delta": {name: text}})
    for logprobs in _logprobs(choice):
        yield _choice(choice, {"delta": {}}, logprobs)
    for index, call in enumerate(message.get("tool_calls") or ()):
        for piece in _call_pieces(call):
            yield _choice(choice, {"delta": {"tool_calls": [{"index": index, **piece}]}})
    if message.get("function_call"):
        for piece in _call_pieces({"function_call": message["function_call"]}):
            yield _choice(choice, {"delta": piece})


def _call_pieces(call: Document) -> Iterator[Document]:
    """First the call with its long text empty, then that text."""
    for part, inner in call.items():
        if not isinstance(inner, dict):
            continue
        for name in _IN_CALLS:
            if isinstance(inner.get(name), str):
                yield {**call, part: {**inner, name: ""}}
                yield from ({part: {name: piece}} for piece in _pieces(inner[name]))
                return
    yield call


def _text_pieces(choice: Document) -> Iterator[Document]:
    for piece in _pieces(choice.get("text") or ""):
        yield _choice(choice, {"text": piece})
    for logprobs in _logprobs(choice):
        yield _choice(choice, {"text": ""}, logprobs)


def _logprobs(choice: Document) -> Iterator[Document]:
    """Its lists, which run side by side, in pieces."""
    logprobs = choice.get("logprobs")
    if not isinstance(logprobs, dict):
        return
    most = max((len(value) for value in logprobs.values() if isinstance(value, list)), default=0)
    for start in range(0, most, PIECE_ITEMS):
        yield {
            name: (value[start : start + PIECE_ITEMS] or None) if isinstance(value, list) else value
            for name, value in logprobs.items()
        }


def _pieces(text: str) -> Iterator[str]:
    return (text[start : start + PIECE_LETTERS] for start in range(0, len(text), PIECE_LETTERS))


# -- the Responses API ---------------------------------------------------------------------------


def _of_response(answer: Document) -> Iterator[bytes]:
    numbers = iter(range(1 << 62))

    def event(kind: str, fields: Document) -> bytes:
        data = {"type": kind, "sequence_number": next(numbers), **fields}
        return b"event: " + kind.encode() + b"\ndata: " + _encode(data) + b"\n\n"

    begun = {**answer, "status": "in_progress", "output": [], "usage": None, "incomplete_details": None}
    if "completed_at" in begun:
        begun["completed_at"] = None
    yield event("response.created", {"response": begun})
    yield event("response.in_progress", {"response": begun})
    for index, item in enumerate(answer["output"]):
        for kind, fields in _item_events(item):
            yield event(f"response.{kind}", {"output_index": index, **fields})
    yield event(f"response.{answer['status']}", {"response": answer})


Event = tuple[str, Document]


def _item_events(item: Document) -> Iterator[Event]:
    place = {"item_id": item.get("id")}
    empty = dict(item)
    for name in ("content", "summary"):
        if isinstance(item.get(name), list):
            empty[name] = []
    for name in _IN_CALLS:
        if isinstance(item.get(name), str):
            empty[name] = ""
    if "status" in empty:
        empty["status"] = "in_progress"
    yield "output_item.added", {"item": empty}
    for index, part in enumerate(item.get("summary") or ()):
        yield from _summary_events(part, {**place, "summary_index": index})
    for index, part in enumerate(item.get("content") or ()):
        yield from _part_events(part, {**place, "content_index": index})
    call = _CALLS.get(item.get("type", ""))
    if call is not None:
        kind, name = call
        named = {"name": item["name"]} if kind == "function_call_arguments" and "name" in item else {}
        yield from _texts(kind, place, name, item.get(name) or "", at_end=named)
    yield "output_item.done", {"item": item}


_CALLS: Final = {
    "function_call": ("function_call_arguments", "arguments"),
    "custom_tool_call": ("custom_tool_call_input", "input"),
}
_PARTS: Final = {
    "output_text": ("output_text", "text"),
    "refusal": ("refusal", "refusal"),
    "reasoning_text": ("reasoning_text", "text"),
}


def _part_events(part: Document, place: Document) -> Iterator[Event]:
    known = _PARTS.get(part.get("type", ""))
    if known is None:
        yield "content_part.added", {**place, "part": part}
    else:
        kind, name = known
        empty = {**part, name: ""}
        for listed in ("annotations", "logprobs"):
            if isinstance(part.get(listed), list):
                empty[listed] = []
        yield "content_part.added", {**place, "part": empty}
        logprobs = part.get("logprobs") or [] if kind == "output_text" else None
        yield from _texts(kind, place, name, part.get(name) or "", logprobs=logprobs)
        for index, annotation in enumerate(part.get("annotations") or ()):
            fields = {**place, "annotation_index": index, "annotation": annotation}
            yield "output_text.annotation.added", fields
    yield "content_part.done", {**place, "part": part}


def _summary_events(part: Document, place: Document) -> Iterator[Event]:
    yield "reasoning_summary_part.added", {**place, "part": {**part, "text": ""}}
    yield from _texts("reasoning_summary_text", place, "text", part.get("text") or "")
    yield "reasoning_summary_part.done", {**place, "part": part}


def _texts(
    kind: str,
    place: Document,
    name: str,
    text: str,
    *,
    logprobs: list[Any] | None = None,
    at_end: Document | None = None,
) -> Iterator[Event]:
    """The text in deltas, then once more whole. Log probabilities come with the first delta."""
    listed = logprobs
    for piece in _pieces(text):
        yield f"{kind}.delta", {**place, "delta": piece, **({} if listed is None else {"logprobs": listed})}
        listed = None if listed is None else []
    end = {} if logprobs is None else {"logprobs": logprobs}
    yield f"{kind}.done", {**place, name: text, **end, **(at_end or {})}
