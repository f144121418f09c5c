"""Prompts and answers for spans, where an operator wants them: in the conventions' form, redacted, bounded.

A message is `{"role": ..., "parts": [...]}`; a part is a text, a call of a tool or its result. Of pictures,
sounds and files only the kind is told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Final

import msgspec

from service.caching.whole import assembler
from service.domain import Call, Operation
from service.metering import StreamMeter
from service.ports import StreamedAnswer
from service.tracing.redaction import Redaction

MOST_BODY_BYTES: Final = 4 * 1024 * 1024
"""A larger body is not looked into: that would hold up every other request."""
MARGIN_LETTERS: Final = 4096
"""Beyond what is kept of a text: a secret at the cut is seen whole."""
MOST_ITEMS: Final = 256
"""Messages of a question, the latest; parts of a message, the first."""
CUT: Final = " [cut]"
_NOT_JSON: Final = (ValueError, RecursionError)

Message = dict[str, Any]
Part = dict[str, Any]


class Content:
    """What of prompts and answers gets into spans: `most_bytes` of each, as JSON."""

    def __init__(self, most_bytes: int, redaction: Redaction) -> None:
        self._most = most_bytes
        self._redacted = redaction

    def of_call(self, call: Call) -> dict[str, str]:
        """The attributes of a question; the latest messages go first where not all have room."""
        parameters = _decoded(call.body) if call.parameters is None else call.parameters
        found = {"gen_ai.input.messages": self._json(_asked(call.operation, parameters), latest=True)}
        told = parameters.get("instructions")
        if call.operation is Operation.RESPONSES and isinstance(told, str):
            found["gen_ai.system_instructions"] = self._json([_text_part(told)])
        return {name: value for name, value in found.items() if value != "[]"}

    def of_answer(self, operation: Operation, body: bytes) -> dict[str, str]:
        messages = self._json(_answered(operation, _decoded(body)))
        return {"gen_ai.output.messages": messages} if messages != "[]" else {}

    def of_text(self, text: str, finish_reason: str | None) -> dict[str, str]:
        """The attributes of an answer of which only the text is known."""
        if not text:
            return {}
        message = _message("assistant", [_text_part(text)], finish_reason)
        return {"gen_ai.output.messages": self._json([message])}

    def hears(self, operation: Operation, answer: StreamedAnswer) -> Heard:
        return Heard(operation, answer, self._most)

    def _json(self, items: Iterable[Message | Part], *, latest: bool = False) -> str:
        """As many of the items as have room, in their order, without secrets."""
        ordered = list(items)
        if latest:
            ordered.reverse()
        kept: list[bytes] = []
        room = self._most - 2
        for item in ordered:
            encoded = self._fitted(item, room)
            if encoded is None:
                break
            kept.append(encoded)
            room -= len(encoded) + 1
        if latest:
            kept.reverse()
        return (b"[" + b",".join(kept) + b"]").decode()

    def _fitted(self, item: Message | Part, room: int) -> bytes | None:
        """The item in so many bytes, its texts cut if need be; None if that cannot be."""
        letters = room
        while letters > 0:
            encoded = msgspec.json.encode(_each_text(item, partial(self._cut, letters)))
            if len(encoded) <= room:
                return encoded
            letters = min(letters // 2, letters - (len(encoded) - room))
        return None

    def _cut(self, letters: int, text: str) -> str:
        """`text` without secrets, and not longer than that."""
        clean = self._redacted(text[: letters + MARGIN_LETTERS])
        return clean if len(clean) <= letters else clean[:letters] + CUT


class Heard:
    """A stream that is read by another, with what it said, up to a bound. Reads as a StreamedAnswer."""

    def __init__(self, operation: Operation, answer: StreamedAnswer, most_bytes: int) -> None:
        self._operation = operation
        self._answer = answer
        self._most = most_bytes
        self._assembler = assembler(operation, 4 * most_bytes)
        self._meter = StreamMeter(operation, keep_text=True, tap=self._assembler.feed)
        self._text: list[str] = []
        self._letters = 0

    @property
    def upstream_request_id(self) -> str | None:
        return self._answer.upstream_request_id

    @property
    def secret(self) -> str | None:
        return self._answer.secret

    async def read(self) -> bytes:
        data = await self._answer.read()
        self._meter.feed(data)
        text = self._meter.take_text()
        if text and self._letters < self._most + MARGIN_LETTERS:
            self._text.append(text)
            self._letters += len(text)
        return data

    async def close(self) -> None:
        await self._answer.close()

    def said(self, content: Content) -> dict[str, str]:
        """The attributes of all that came: of the whole answer, or of the text of one that broke off."""
        body = self._assembler.whole()
        if body is not None:
            return content.of_answer(self._operation, body)
        return content.of_text("".join(self._text), self._meter.finish_reason)


def _decoded(body: bytes) -> Mapping[str, Any]:
    if len(body) > MOST_BODY_BYTES:
        return {}
    try:
        decoded = msgspec.json.decode(body)
    except _NOT_JSON:
        return {}
    return decoded if isinstance(decoded, dict) else {}


def _asked(operation: Operation, parameters: Mapping[str, Any]) -> Iterator[Message]:
    if operation is Operation.CHAT:
        for message in _dicts(parameters.get("messages"), latest=True):
            yield _chat_message(message)
    elif operation is Operation.TEXT_COMPLETION:
        prompts = parameters.get("prompt")
        for prompt in prompts[:MOST_ITEMS] if isinstance(prompts, list) else [prompts]:
            if isinstance(prompt, str):
                yield _message("user", [_text_part(prompt)])
    elif operation is Operation.RESPONSES:
        given = parameters.get("input")
        if isinstance(given, str):
            yield _message("user", [_text_part(given)])
        for item in _dicts(given, latest=True):
            yield _item(item)


def _answered(operation: Operation, answer: Mapping[str, Any]) -> Iterator[Message]:
    if operation is Operation.RESPONSES:
        for item in _dicts(answer.get("output")):
            if item.get("type") in ("message", "function_call"):
                yield _item(item)
    for choice in _dicts(answer.get("choices")):
        reason = choice.get("finish_reason")
        if isinstance(choice.get("message"), dict):
            yield _chat_message(choice["message"], reason)
        elif isinstance(choice.get("text"), str):
            yield _message("assistant", [_text_part(choice["text"])], reason)


def _chat_message(message: Mapping[str, Any], finish_reason: Any = None) -> Message:
    """One of Chat Completions."""
    role = message.get("role")
    if role == "tool":
        parts = [_result(message.get("tool_call_id"), message.get("content"))]
    else:
        parts = [*_parts(message.get("content")), *_parts(message.get("refusal"))]
    for call in _dicts(message.get("tool_calls")):
        function = call.get("function")
        if isinstance(function, dict):
            parts.append(_tool_call(call.get("id"), function))
    return _message(role, parts, finish_reason)


def _item(item: Mapping[str, Any]) -> Message:
    """One of the Responses API."""
    kind = item.get("type")
    if kind == "function_call":
        return _message("assistant", [_tool_call(item.get("call_id"), item)])
    if kind == "function_call_output":
        return _message("tool", [_result(item.get("call_id"), item.get("output"))])
    return _message(item.get("role"), list(_parts(item.get("content"))), item.get("status"))


def _message(role: Any, parts: list[Part], finish_reason: Any = None) -> Message:
    message: Message = {"role": role if isinstance(role, str) else "user", "parts": parts}
    if isinstance(finish_reason, str):
        message["finish_reason"] = finish_reason
    return message


def _parts(content: Any) -> Iterator[Part]:
    if isinstance(content, str):
        yield _text_part(content)
    for part in _dicts(content):
        text = part.get("text")
        kind = part.get("type")
        if isinstance(text, str):
            yield _text_part(text)
        else:
            yield {"type": kind if isinstance(kind, str) else "unknown"}


def _text_part(text: str) -> Part:
    return {"type": "text", "content": text}


def _tool_call(given_id: Any, function: Mapping[str, Any]) -> Part:
    return {
        "type": "tool_call",
        "id": _string(given_id),
        "name": _string(function.get("name")),
        "arguments": _string(function.get("arguments")),
    }


def _result(call_id: Any, content: Any) -> Part:
    text = content if isinstance(content, str) else "".join(p.get("content", "") for p in _parts(content))
    return {"type": "tool_call_response", "id": _string(call_id), "response": text}


def _string(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _dicts(value: Any, *, latest: bool = False) -> list[dict[str, Any]]:
    """The objects among the first, or the latest, items of a list."""
    if not isinstance(value, list):
        return []
    some = value[-MOST_ITEMS:] if latest else value[:MOST_ITEMS]
    return [item for item in some if isinstance(item, dict)]


def _each_text(value: Any, change: Callable[[str], str]) -> Any:
    """A copy in which every string is changed; ours are not nested deeper than a message's parts."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {name: _each_text(part, change) for name, part in value.items()}
    return [_each_text(part, change) for part in value] if isinstance(value, list) else value
