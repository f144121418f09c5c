"""Whole answers: which are good enough to be given again, and how one is made of a stream's events."""

from __future__ import annotations

from typing import Any, Final, Protocol

import msgspec

from service.domain import Operation

GOOD_ENDS: Final = frozenset(("stop", "length", "tool_calls", "function_call", "eos_token", "stop_sequence"))
"""Why a model may have ended. With any other reason, a filter's for example, the answer may not be all."""
PLACE_BYTES: Final = 100
"""What a key or an item of a list takes up while it is collected, beside its text."""
_NOT_JSON: Final = (ValueError, RecursionError)
_ODD: Final = (*_NOT_JSON, TypeError, AttributeError, KeyError)
"""What comes of a stream whose parts do not fit together: nothing that could be kept."""
_ONCE: Final = frozenset(("id", "type", "role"))
"""Strings of a delta that servers may repeat, and that are never sent in pieces."""
_NOT_OF_THE_HEAD: Final = frozenset(("choices", "usage", "object", "obfuscation"))
_LAST_EVENTS: Final = ("response.completed", "response.incomplete")
_OBJECTS: Final = {Operation.CHAT: "chat.completion", Operation.TEXT_COMPLETION: "text_completion"}


_Parts = list[dict[str, msgspec.Raw]]


class _Message(msgspec.Struct):
    tool_calls: _Parts | None = None
    function_call: dict[str, msgspec.Raw] | None = None


class _Choice(msgspec.Struct):
    index: int = 0
    finish_reason: str | None = None
    message: _Message | None = None
    text: str | None = None


class _Details(msgspec.Struct):
    reason: str | None = None


class _Item(msgspec.Struct):
    content: _Parts | None = None
    summary: _Parts | None = None


class _Answer(msgspec.Struct):
    """As much of an answer's shape as `replay` relies on."""

    error: Any = None
    choices: list[_Choice] | None = None
    data: list[msgspec.Raw] | None = None
    status: str | None = None
    output: list[_Item] | None = None
    incomplete_details: _Details | None = None


class _LastEvent(msgspec.Struct):
    type: str = ""
    response: msgspec.Raw = msgspec.Raw()


_decode: Final = msgspec.json.decode
_decode_answer: Final = msgspec.json.Decoder(_Answer).decode
_decode_last: Final = msgspec.json.Decoder(_LastEvent).decode
_encode: Final = msgspec.json.encode


def is_good(operation: Operation, body: bytes) -> bool:
    """Whether `body` is an answer of the usual shape that ended well and holds no error."""
    try:
        answer = _decode_answer(body)
    except _NOT_JSON:
        return False
    if answer.error:
        return False
    if operation is Operation.EMBEDDINGS:
        return bool(answer.data)
    if operation is Operation.RESPONSES:
        details = answer.incomplete_details
        cut = answer.status == "incomplete" and details is not None and details.reason == "max_output_tokens"
        return bool(answer.output) and (answer.status == "completed" or cut)
    chat = operation is Operation.CHAT
    return bool(answer.choices) and all(
        choice.finish_reason in GOOD_ENDS and (choice.message if chat else choice.text) is not None
        for choice in answer.choices or ()
    )


class Assembler(Protocol):
    """Makes the whole answer of a stream, event by event."""

    def feed(self, data: bytes) -> None:
        """Take the data of the stream's next event; b"" for one of which nobody knows what it adds."""
        ...

    def whole(self) -> bytes | None:
        """The answer as a caller who does not stream would have got it; None if it is none to keep."""
        ...


def assembler(operation: Operation, most_bytes: int) -> Assembler:
    """One for a stream of `operation`; it gives up, and forgets all, above `most_bytes`."""
    if operation is Operation.RESPONSES:
        return ResponseAssembler(most_bytes)
    return CompletionAssembler(operation, most_bytes)


class ResponseAssembler:
    """A stream of the Responses API: its last event holds the whole response."""

    def __init__(self, most_bytes: int) -> None:
        self._most = most_bytes
        self._response: bytes | None = None

    def feed(self, data: bytes) -> None:
        if self._response is not None or not any(kind.encode() in data for kind in _LAST_EVENTS):
            return
        try:
            event = _decode_last(data)
        except _NOT_JSON:
            return
        if event.type in _LAST_EVENTS and len(event.response) <= self._most:
            self._response = bytes(event.response)

    def whole(self) -> bytes | None:
        body = self._response
        return body if body is not None and is_good(Operation.RESPONSES, body) else None


class _Text(list[str]):
    """A string in pieces: adding each to the last would copy the whole again and again."""


class _Places(dict[int, dict[str, Any]]):
    """A list whose items come in pieces, each piece with the `index` of its item."""


class CompletionAssembler:
    """A stream of chat or text completions.

    Deltas are merged without knowing their fields: strings are joined, lists with `index` are merged by it,
    other lists are extended, objects are merged, and of all else the last counts.
    """

    def __init__(self, operation: Operation, most_bytes: int) -> None:
        self._operation = operation
        self._room = most_bytes
        self._most = most_bytes
        self._head: dict[str, Any] = {}
        self._choices: dict[int, dict[str, Any]] = {}
        self._usage: dict[str, Any] | None = None
        self._spoilt = False

    def feed(self, data: bytes) -> None:
        if self._spoilt or data.startswith(b"[DONE]"):
            return
        try:
            self._add(_decode(data))
        except _ODD:
            self._spoil()
        if self._room < 0:
            self._spoil()

    def whole(self) -> bytes | None:
        # Without usage a caller who does not stream would miss what the upstream always gives.
        if self._spoilt or not self._choices or self._usage is None:
            return None
        try:
            body = _encode(self._answer())
        except _ODD:
            return None
        return body if len(body) <= self._most and is_good(self._operation, body) else None

    def _answer(self) -> dict[str, Any]:
        return {
            "id": "",
            "created": 0,
            **self._head,
            "object": _OBJECTS[self._operation],
            "choices": [self._finished(index, self._choices[index]) for index in sorted(self._choices)],
            "usage": self._usage,
        }

    def _spoil(self) -> None:
        self._spoilt = True
        self._head, self._choices = {}, {}

    def _add(self, chunk: dict[str, Any]) -> None:
        if chunk.get("error"):
            return self._spoil()
        for name, value in chunk.items():
            if value is not None and name not in _NOT_OF_THE_HEAD:
                self._head[name] = value
        if isinstance(chunk.get("usage"), dict):
            self._usage = chunk["usage"]  # the last one is the sum
        for piece in chunk.get("choices") or ():
            index = piece.get("index", 0)
            choice = self._choices.get(index)
            if choice is None:
                self._room -= PLACE_BYTES
                choice = self._choices[int(index)] = {"delta": {}, "text": _Text(), "logprobs": None}
            self._add_choice(choice, piece)

    def _add_choice(self, choice: dict[str, Any], piece: dict[str, Any]) -> None:
        for name, value in piece.items():
            if value is None:
                choice.setdefault(name, None)
            elif name == "delta":
                self._merge(choice["delta"], value)
            elif name == "text":
                choice["text"].append(value)
                self._room -= len(value)
            elif name == "logprobs":
                if choice["logprobs"] is None:
                    choice["logprobs"] = {}
                self._merge(choice["logprobs"], value)
            else:
                choice[name] = value

    def _merge(self, into: dict[str, Any], delta: dict[str, Any]) -> None:
        for name, value in delta.items():
            known = into.get(name)
            if name not in into:
                self._room -= PLACE_BYTES
            if value is None:
                into.setdefault(name, None)
            elif isinstance(value, str) and name not in _ONCE:
                self._room -= len(value)
                if known is None:
                    into[name] = _Text((value,))
                elif not isinstance(known, _Text):
                    raise TypeError("a text goes on from what is none")
                elif not (name == "name" and known == [value]):  # some servers repeat it in each piece
                    known.append(value)
            elif isinstance(value, dict):
                if known is None:
                    known = into[name] = {}
                self._merge(known, value)
            elif isinstance(value, list):
                into[name] = self._merged_list(known, value, calls=name == "tool_calls")
            elif value or known is None:
                into[name] = value

    def _merged_list(self, known: Any, items: list[Any], *, calls: bool) -> Any:
        if isinstance(known, _Text):
            raise TypeError("a text goes on as a list")
        if calls or isinstance(known, _Places) or (not known and any(_is_placed(item) for item in items)):
            places = known or _Places()
            for item in items:
                index = item["index"] if _is_placed(item) else _place_of(places, item)
                if index not in places:
                    self._room -= PLACE_BYTES
                    places[index] = {}
                self._merge(places[index], item)
            return places
        self._room -= len(_encode(items))
        if known:
            known.extend(items)
        return known or items

    def _finished(self, index: int, choice: dict[str, Any]) -> dict[str, Any]:
        rest = {name: value for name, value in choice.items() if name not in ("delta", "text")}
        if self._operation is Operation.TEXT_COMPLETION:
            return {**rest, "text": "".join(choice["text"]), "index": index}
        message = {"role": "assistant", "content": None, **_joined(choice["delta"])}
        for call in message.get("tool_calls") or ():
            call.pop("index", None)  # only streams have it
        return {**rest, "index": index, "message": message}


def _is_placed(item: Any) -> bool:
    return isinstance(item, dict) and type(item.get("index")) is int


def _place_of(places: _Places, item: dict[str, Any]) -> int:
    """Where a piece without an `index` belongs: to its id, or without one to the last; else it is new."""
    last = max(places, default=-1)
    if item.get("id") is None:
        return max(last, 0)
    return next((index for index, known in places.items() if known.get("id") == item["id"]), last + 1)


def _joined(value: Any) -> Any:
    if isinstance(value, _Text):
        return "".join(value)
    if isinstance(value, _Places):
        return [_joined(value[index]) for index in sorted(value)]
    if isinstance(value, dict):
        return {name: _joined(part) for name, part in value.items()}
    return value
