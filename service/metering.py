"""Reading answers: usage, model and end of an answer from its bytes, without changing what is passed on.

Answers pass through Weir as bytes. This module looks into them once, with decoders that build only
the few fields of interest (about a microsecond for a streamed chunk), and it tolerates what servers
that call themselves OpenAI-compatible send. Pure functions and one state machine: no input or output.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, Final

import msgspec

from service.domain import Operation, Usage, UsageSource
from service.errors import StreamTruncated, UpstreamError, UpstreamProtocolError
from service.refusals import failed_in_words, reported
from service.tokens import ASCII_LETTERS_PER_TOKEN, estimate_text

MAX_EVENT_BYTES: Final = 16 * 1024 * 1024
"""An event that has not ended after so many bytes is no event."""
MOST_TOKENS: Final = 1_000_000_000
"""A count above it is no count: sums must not overflow."""

_NOT_JSON: Final = (ValueError, RecursionError)
"""What decoding raises: msgspec's own errors, letters that are not UTF-8, nesting without end."""
_DONE: Final = b"[DONE]"
# A blank line ends an event. Atomic groups: "\r\n" is one line end, never two.
_BLANK_LINE: Final = re.compile(rb"(?>\r\n|\n|\r)(?>\r\n|\n|\r)")
_LINE_END: Final = re.compile(rb"\r\n|\n|\r")
_WRITTEN: Final = frozenset(("content", "text", "arguments", "refusal"))
_THOUGHT: Final = ("reasoning_content", "reasoning")
"""What a model thought aloud: DeepSeek's name, and that of OpenRouter, Groq, Ollama, vLLM. Some send both."""
_THOUGHT_AGAIN: Final = "reasoning_details"
"""Where OpenRouter says the same once more, in parts."""
_GIVEN: Final = ("prompt_tokens", "input_tokens")
_MADE: Final = ("completion_tokens", "output_tokens")
_CACHED: Final = ("cached_tokens", "prompt_cache_hit_tokens", "cache_read_input_tokens")
"""OpenAI's name, DeepSeek's, and that of Anthropic and of proxies before it."""
_WRITES: Final = ("cache_write_tokens", "cache_creation_tokens", "cache_creation_input_tokens")
_BESIDE: Final = frozenset(_CACHED + _WRITES)
"""Fields that some write beside the totals; OpenAI has none there."""
_RESPONSE_STATES: Final = ("completed", "failed", "incomplete", "in_progress", "queued", "cancelled")
_COUNTS: Final = tuple(name for name in Usage.__struct_fields__ if name != "source")
_RESPONSE_ENDS: Final = ("response.completed", "response.incomplete", "response.failed")


class AnswerFacts(msgspec.Struct):
    """What a whole answer says of itself."""

    id: str | None = None
    model: str = ""
    usage: Usage | None = None
    finish_reason: str | None = None


class _Head(msgspec.Struct):
    finish_reason: Any = None


class _Whole(msgspec.Struct):
    id: Any = None
    error: Any = None
    model: Any = None
    usage: Any = None
    choices: list[_Head] | None = None
    status: Any = None


class _Function(msgspec.Struct):
    arguments: str | None = None


class _ToolCall(msgspec.Struct):
    function: _Function | None = None


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: Any = None
    reasoning: Any = None
    refusal: str | None = None
    tool_calls: list[_ToolCall] | None = None


class _Choice(msgspec.Struct):
    index: int = 0
    delta: _Delta | None = None
    text: str | None = None
    finish_reason: str | None = None
    usage: Any = None


class _Chunk(msgspec.Struct):
    """One event's data: of a chat or text completion, or (type, delta, response) of a response."""

    id: str | None = None
    model: str | None = None
    choices: list[_Choice] | None = None
    usage: Any = None
    x_groq: Any = None
    error: Any = None
    type: str | None = None
    delta: Any = None
    response: _Whole | None = None
    message: Any = None
    code: Any = None


_decode_whole: Final = msgspec.json.Decoder(_Whole).decode
_decode_chunk: Final = msgspec.json.Decoder(_Chunk).decode


def read_answer(body: bytes, secret: str | None = None) -> AnswerFacts:
    """The facts of a whole answer.

    Raises UpstreamProtocolError if it is no JSON object, and what an error in its place says: some gateways
    put one below a status of 200. A response that failed has a status, and is an answer.
    """
    try:
        whole = _decode_whole(body)
    except msgspec.ValidationError:
        whole = _decode_leniently(body)
    except _NOT_JSON:
        raise _no_json() from None
    if whole.error and not whole.choices and whole.status not in _RESPONSE_STATES:
        raise reported(whole.error, secret)
    return _facts(whole)


def estimate_answer(body: bytes) -> int:
    """Output tokens of a whole answer that came without usage: an estimate from its texts."""
    try:
        decoded = msgspec.json.decode(body)
    except _NOT_JSON:
        return 0
    if not isinstance(decoded, dict):
        return 0
    return sum(estimate_text(text) for text in _texts([decoded.get("choices"), decoded.get("output")]))


def read_usage(value: Any) -> Usage | None:
    """Usage as any of OpenAI's APIs write it; None if it is absent or nonsense.

    Chat and text completions name the totals prompt_tokens and completion_tokens, the Responses API
    input_tokens and output_tokens; the parts sit in `..._tokens_details`, or beside the totals.
    """
    if not isinstance(value, dict):
        return None
    total = _count(value, "total_tokens")
    given = _count(value, *_GIVEN)
    made = _count(value, *_MADE)
    if given is None and made is not None:
        given = _other_half(value, _GIVEN, total, made)
    elif made is None and given is not None:
        made = _other_half(value, _MADE, total, given)
    if given is None or made is None or given + made == 0:
        return None  # no request has no tokens: zeros are a server that does not count
    given_details = _part(value, "prompt_tokens_details", "input_tokens_details")
    made_details = _part(value, "completion_tokens_details", "output_tokens_details")
    cached, written = _count(given_details, *_CACHED) or 0, _count(given_details, *_WRITES) or 0
    if not _BESIDE.isdisjoint(value):
        cached, written = cached or _count(value, *_CACHED) or 0, written or _count(value, *_WRITES) or 0
        if not given_details and _cache_is_beside(value, given, made, total, cached + written):
            given += cached + written
    reasoning = _count(made_details, "reasoning_tokens") or 0
    beside = reasoning if reasoning > made else 0
    if total is not None:
        beside = max(total - given - made, 0)
    # xAI and Gemini leave what was thought out of the output tokens, and charge it as these.
    made += beside
    return Usage(
        input_tokens=given,
        output_tokens=made,
        cached_input_tokens=min(cached, given),
        cache_write_tokens=min(written, given - min(cached, given)),
        reasoning_tokens=min(reasoning or beside, made),
        audio_input_tokens=min(_count(given_details, "audio_tokens") or 0, given),
        audio_output_tokens=min(_count(made_details, "audio_tokens") or 0, made),
    )


class StreamMeter:
    """Follows one stream: cuts it into whole events, reads them, and gives back the bytes to pass on.

    `feed` takes bytes cut anywhere and returns only whole events, unchanged; an event cut in two is
    held until its rest comes. After `feed`, these tell where the stream stands:

    - `done`: it ended as its protocol wants; what follows is ignored.
    - `error`: the upstream reported an error in the stream; the event itself is not passed on.
    - `usage`, `model`, `id`, `finish_reason`; `has_output` once the first piece of answer came.
    """

    def __init__(
        self,
        operation: Operation,
        *,
        hide_usage: bool = False,
        keep_text: bool = False,
        tap: Callable[[bytes], None] | None = None,
    ) -> None:
        """`tap` gets the data of each good event as the upstream sent it; b"" for one of an unusual shape."""
        self._tap = tap
        self._responses = operation is Operation.RESPONSES
        self._hide_usage = hide_usage
        self._keep_text = keep_text
        self._pending = bytearray()
        self._ascii_letters = 0
        self._other_letters = 0
        self._text: list[str] = []
        self._failed = False
        self.done = False
        self.error: UpstreamError | None = None
        self.usage: Usage | None = None
        self.model = ""
        self.id: str | None = None
        self.finish_reason: str | None = None
        self.has_output = False
        self.secret: str | None = None
        """Cut out of what the upstream says of an error."""
        self.events = 0
        """Good events so far, comments not counted."""

    def check(self) -> None:
        """Raises `error`, if there is one, and forgets it: kept, it would keep the whole request alive."""
        error, self.error = self.error, None
        if error is not None:
            self._failed = True
            try:
                raise error
            finally:
                del error

    @property
    def over(self) -> bool:
        """Nothing that comes now matters: the stream ended, well or not."""
        return self.done or self._failed or self.error is not None

    def feed(self, data: bytes) -> bytes:
        """Take `data`; return what of the stream can go to the caller now, maybe nothing."""
        if self.over:
            return b""
        block = self._whole_events(data)
        if not block:
            return b""
        events = _BLANK_LINE.split(block) if b"\r" in block else block.split(b"\n\n")
        events.pop()  # after the last blank line there is nothing
        passed: list[bytes | None] = []
        for event in events:
            passed.append(self._read(event))
            if self.over:
                break
        if passed == events:  # nearly always, and quick: the very same objects
            return block
        ends = _BLANK_LINE.findall(block)
        return b"".join(event + end for event, end in zip(passed, ends, strict=False) if event is not None)

    def finish(self) -> bytes:
        """The upstream's connection ended: the last event, should only its blank line be missing.

        Raises StreamTruncated if the stream had not ended.
        """
        rest = b""
        if not self.done and _data_of(bytes(self._pending).strip()) == _DONE:
            rest = self.feed(b"\n\n")
        if not self.done:
            raise StreamTruncated(
                "The upstream ended the stream before its end mark: the answer may be incomplete."
            )
        return rest

    def take_text(self) -> str:
        """The answer's text that came since the last call; needs `keep_text`."""
        text = "".join(self._text)
        self._text.clear()
        return text

    def usage_or_estimate(self, estimated_input_tokens: int) -> Usage:
        """The provider's count; else an estimate of what came, or of what came after the count."""
        output_tokens = -(-self._ascii_letters // ASCII_LETTERS_PER_TOKEN) + self._other_letters
        usage = self.usage
        if usage is None:
            return Usage(estimated_input_tokens, output_tokens, source=UsageSource.ESTIMATED)
        if self.counted:
            return usage
        return msgspec.structs.replace(
            usage, output_tokens=usage.output_tokens + output_tokens, source=UsageSource.ESTIMATED
        )

    @property
    def counted(self) -> bool:
        """The provider's count is there, and of all that came."""
        return self.usage is not None and (self.done or not (self._ascii_letters or self._other_letters))

    def _whole_events(self, data: bytes) -> bytes:
        """Everything up to the last blank line; the rest is held back."""
        pending = self._pending
        if not pending and data.endswith(b"\n\n"):
            return data  # nearly always: packets carry whole events
        searched = max(len(pending) - 3, 0)
        pending += data
        end = -1
        if b"\r" in pending:
            for match in _BLANK_LINE.finditer(pending, searched):
                end = match.end()
        else:
            found = pending.rfind(b"\n\n", searched)
            end = found + 2 if found >= 0 else -1
        if end < 0:
            if len(pending) > MAX_EVENT_BYTES:
                self.error = UpstreamProtocolError("The upstream sent an event without an end.")
            return b""
        block = bytes(pending[:end])
        del pending[:end]
        return block

    def _read(self, event: bytes) -> bytes | None:
        """Note what `event` says; return it, a changed one in its place, or None to leave it out."""
        data = _data_of(event)
        if data is None:
            return event
        if data.strip() == _DONE:
            self.done = True
            self.events += 1
            return event
        try:
            chunk = _decode_chunk(data)
        except msgspec.ValidationError:
            return self._read_unusual(event, data)
        except _NOT_JSON:
            self.error = _no_json()
            return None
        if chunk.error or chunk.type == "error":
            self.error = self._told(chunk.error or {"message": chunk.message, "code": chunk.code})
            return None
        self.events += 1
        if self._tap is not None:
            self._tap(data)
        if self._responses:
            self._note_response(chunk)
            return event
        return self._note_completion(chunk, event, data)

    def _note_completion(self, chunk: _Chunk, event: bytes, data: bytes) -> bytes | None:
        if self.id is None and chunk.id:  # Azure's first chunk, of filters, has neither
            self.id = chunk.id
        if chunk.model:
            self.model = chunk.model
        for choice in chunk.choices or ():
            if choice.finish_reason and choice.index == 0:
                self.finish_reason = choice.finish_reason
            if choice.delta is not None:
                self._note_delta(choice.delta, choice.index)
            elif choice.text:
                self._note_text(choice.text, choice.index)
            if choice.usage is not None:  # where Moonshot puts it
                self._note_usage(choice.usage)
        if isinstance(chunk.x_groq, dict):
            self._note_usage(chunk.x_groq.get("usage"))
        if chunk.usage is None:
            return event
        self._note_usage(chunk.usage)
        if not self._hide_usage:
            return event
        return _without_usage(event, data) if chunk.choices else None

    def _told(self, error: Any) -> UpstreamError:
        """Before the first event it is what an HTTP status would have been; later the stream is broken."""
        return (failed_in_words if self.events else reported)(error, self.secret)

    def _read_unusual(self, event: bytes, data: bytes) -> bytes | None:
        """A chunk of another shape is not ours to judge: Mistral's content may be a list of parts."""
        try:
            chunk = msgspec.json.decode(data)
        except _NOT_JSON:
            self.error = _no_json()
            return None
        if isinstance(chunk, dict):
            if (error := chunk.get("error")) or chunk.get("type") == "error":
                self.error = self._told(error or {name: chunk.get(name) for name in ("message", "code")})
                return None
            choices = chunk.get("choices")
            for text in _texts(choices):
                self._count_letters(text)
            if self._keep_text:
                self._text.extend(_answer_texts(choices))
            self._note_usage(chunk.get("usage"))
            if self._hide_usage and chunk.get("usage") is not None:
                event = _without_usage(event, data) if choices else b""
        self.events += 1
        if self._tap is not None:
            self._tap(b"")
        return event or None

    def _note_usage(self, value: Any) -> None:
        """Running totals grow, and some servers tell input and output apart: the largest, never a sum."""
        usage = read_usage(value)
        if usage is None:
            return
        self.usage = usage if self.usage is None else _largest(self.usage, usage)
        self._ascii_letters = self._other_letters = 0  # they are counted

    def _note_delta(self, delta: _Delta, index: int) -> None:
        if delta.content:
            self._note_text(delta.content, index)
        if delta.reasoning_content or delta.reasoning:
            self._count_letters(_thought(delta.reasoning_content, delta.reasoning))
        if delta.refusal:
            self._note_text(delta.refusal, index)
        for call in delta.tool_calls or ():
            if call.function is not None:
                self._count_letters(call.function.arguments or "")

    def _note_response(self, chunk: _Chunk) -> None:
        kind = chunk.type or ""
        if kind.endswith(".delta") and isinstance(chunk.delta, str):
            if kind == "response.output_text.delta":
                self._note_text(chunk.delta, 0)
            else:
                self._count_letters(chunk.delta)
        if chunk.response is not None:
            facts = _facts(chunk.response)
            self.id, self.model = facts.id, facts.model or self.model
            if kind in _RESPONSE_ENDS:
                self.usage, self.finish_reason, self.done = facts.usage, facts.finish_reason, True

    def _note_text(self, text: str, index: int) -> None:
        self._count_letters(text)
        if self._keep_text and index == 0:
            self._text.append(text)

    def _count_letters(self, text: str) -> None:
        self.has_output = True
        if text.isascii():
            self._ascii_letters += len(text)
        else:
            ascii_letters = sum(1 for letter in text if letter < "\u0250")
            self._ascii_letters += ascii_letters
            self._other_letters += len(text) - ascii_letters


def _largest(one: Usage, other: Usage) -> Usage:
    larger = {name: max(getattr(one, name), getattr(other, name)) for name in _COUNTS}
    return msgspec.structs.replace(one, **larger)


def _thought(*told: Any) -> str:
    """What a model thought aloud, of the fields that may have it: the first, for the others repeat it."""
    return next((text for text in told if text and isinstance(text, str)), "")


def _texts(value: Any) -> Iterator[str]:
    """The strings in an answer that a model wrote. Not recursive: its depth is the upstream's choice."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, list):
            waiting.extend(item)
        elif isinstance(item, dict):
            if thought := _thought(*map(item.get, _THOUGHT)):
                yield thought
            for name, part in item.items():
                if isinstance(part, str) and name in _WRITTEN:
                    yield part
                elif not (thought and name == _THOUGHT_AGAIN):
                    waiting.append(part)


def _answer_texts(choices: Any) -> Iterator[str]:
    """The pieces of answer in a chunk's first choice, be its content a string or a list of parts."""
    for choice in choices if isinstance(choices, list) else ():
        if isinstance(choice, dict) and choice.get("index") in (None, 0, "0"):
            delta = choice.get("delta")
            told = delta.get("content") if isinstance(delta, dict) else choice.get("text")
            for part in told if isinstance(told, list) else [told]:
                text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else part
                if isinstance(text, str):
                    yield text


def _data_of(event: bytes) -> bytes | None:
    """The data of one event, its `data:` lines joined; None for comments and empty events."""
    if event.startswith(b"data: ") and b"\n" not in event and b"\r" not in event:
        return event[6:]
    lines = [
        line[6:] if line.startswith(b"data: ") else line[5:]
        for line in _LINE_END.split(event)
        if line.startswith(b"data:")
    ]
    return b"\n".join(lines) if lines else None


def _facts(whole: _Whole) -> AnswerFacts:
    finish = whole.choices[0].finish_reason if whole.choices else whole.status
    return AnswerFacts(
        id=whole.id if isinstance(whole.id, str) else None,
        model=whole.model if isinstance(whole.model, str) else "",
        usage=read_usage(whole.usage),
        finish_reason=finish if isinstance(finish, str) else None,
    )


def _decode_leniently(body: bytes) -> _Whole:
    """An answer whose `choices` are unusual: the rest of it still counts."""
    try:
        decoded = msgspec.json.decode(body)
    except _NOT_JSON:
        decoded = None
    if not isinstance(decoded, dict):
        raise _no_json()
    return _Whole(**{name: decoded.get(name) for name in ("id", "error", "model", "usage", "status")})


def _without_usage(event: bytes, data: bytes) -> bytes:
    try:
        decoded = msgspec.json.decode(data)
    except _NOT_JSON:
        return event
    decoded.pop("usage", None)
    return b"data: " + msgspec.json.encode(decoded)


def _no_json() -> UpstreamProtocolError:
    return UpstreamProtocolError("The upstream answered something that is not JSON.")


def _other_half(value: dict[str, Any], names: tuple[str, ...], total: int | None, known: int) -> int | None:
    """The input or output tokens where only the other ones are told: None if nobody can know."""
    if total is not None:
        return max(total - known, 0)
    return None if any(value.get(name) is not None for name in names) else 0


def _cache_is_beside(
    value: dict[str, Any], given: int, made: int, total: int | None, cache_tokens: int
) -> bool:
    """Whether cached and written tokens are no part of the input tokens: so Anthropic's own API counts."""
    if not cache_tokens:
        return False
    return (
        value.get("prompt_tokens") is None
        or cache_tokens > given
        or (total is not None and total >= given + made + cache_tokens)
    )


def _part(value: dict[str, Any], *names: str) -> dict[str, Any]:
    for name in names:
        part = value.get(name)
        if isinstance(part, dict):
            return part
    return {}


def _count(value: dict[str, Any], *names: str) -> int | None:
    for name in names:
        count = value.get(name)
        if count is None:
            continue
        if type(count) is float and count.is_integer():
            count = int(count)  # 12.0 is 12 in JSON
        if type(count) is int and 0 <= count <= MOST_TOKENS:
            return count
    return None
