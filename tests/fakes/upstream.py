"""A fake OpenAI-compatible server on a real socket that can misbehave on demand.

It speaks hand-written HTTP/1.1 over raw asyncio streams, so that every byte on the wire is under control:
packet splits, resets, missing terminators. It runs in a thread of its own, with its own event loop::

    with FakeUpstream() as upstream:
        client = OpenAI(base_url=upstream.base_url, api_key="sk-test")
        ...
        assert upstream.requests[0].json["model"] == "gpt-4o-mini"
        assert upstream.errors == []

or as a program, which prints its base url and serves until SIGTERM or SIGINT::

    python -m tests.fakes.upstream --port 0

Paths: POST /v1/chat/completions, /v1/completions, /v1/embeddings, /v1/responses; GET /v1/models and
/v1/models/{id}; the same below /openai/v1/, /openai/ and /openai/deployments/{model}/ (Azure; the deployment
is then the model). Anything else is answered with 404. Each answer has an ``x-request-id: req_fake_N``.

The ``model`` of the request (or the id in /v1/models/{id}) chooses the behaviour. "Two chunks" are the
opening event(s) and two content deltas; in a whole (not streamed) answer they are the first half of the body.

==================  ========================================================================================
model               behaviour
==================  ========================================================================================
(any other name)    Good answer, whole or streamed. A request with function ``tools`` gets a call of the first
                    one (unless ``tool_choice`` is "none" or the last message is a tool's result).
echo                The content is the request body as a string; whole answers have an extra field
                    ``"x_unknown"`` and odd whitespace. ``SeenCall.answer_body`` has the exact bytes.
status-NNN          Status NNN (400..599) with an OpenAI error envelope; in 401 the message holds the key.
status-NNN-after    The same with ``Retry-After: 7``.
status-NNN-html     Status NNN with an HTML body.
too-long            400 with the code context_length_exceeded.
too-long-200        200 with that error in place of the answer, or as the first event of the stream.
error-200-NNN       The same with an error whose code is the number NNN.
filtered            400 with the code content_filter.
by-key              A key that ends with -429 or -401 gets that status (429 with ``Retry-After: 7``); others a
                    good answer.
by-key-200          The same with OpenAI's words below a status of 200, as error-200-NNN has them.
flaky-N             The first N calls of that model get 503, later ones a good answer.
flaky-after-N       The first N calls of that model get 429 with ``Retry-After: 1``.
flaky-reset-N       The first N calls of that model get a TCP reset after the request was read.
half-N              Every second call of that model, the first one too, gets 503; the others a good answer.
hang                Never answers.
slow-head-MS        Waits MS milliseconds, then answers well.
refuse-stream       A whole JSON answer, even if a stream was asked for.
html                200 with a text/html page.
wrong-type          A good answer, whole or streamed, that says it is text/plain.
truncated-json      200 with half a JSON document and the content-length of that half.
short-body          The content-length of the whole, but only half the body, then FIN.
gzip                Good answer with ``Content-Encoding: gzip``; streams are flushed at each event.
huge                10 MB of content (streamed: in deltas of 64 KB).
wrong-usage         ``usage`` is a string.
no-usage            No usage, even if asked for.
split-N             Packets (and HTTP chunks) of N bytes; the content has letters of 2, 3 and 4 bytes.
crlf                CRLF line ends, comment lines between events, the first delta with ``data:`` and no space.
multi-data          The JSON of each delta is spread over two ``data:`` lines.
one-packet          Head and whole stream in a single write.
big-delta           One delta of 1 MB.
stall               Two chunks, then silence for ever.
stall-first         Head only, then silence for ever.
stall-comments      Head, then comment lines every 50 ms for ever (stream; whole: as stall-first).
drop                Two chunks, then a TCP reset.
drop-mid-event      Two chunks and half an event, then a proper end of the chunked body.
close-no-done       Ends properly, but without the last event ([DONE]; responses: response.completed).
abort-chunked       Two chunks, then FIN without the last-chunk terminator (whole: as short-body).
error-event         Two chunks, then an error event, then a proper end.
error-first         An error event as the first and only event.
failed              Responses: ends with response.failed (whole: status "failed"). Elsewhere a good answer.
empty-stream        Head of an event stream, which ends at once.
usage-in-finish     Usage, asked for or not, in the chunk with the finish_reason; no chunk of its own.
usage-every-chunk   Cumulative usage, asked for or not, in every chunk; and the usage chunk if asked for.
usage-twice         The usage chunk (responses: response.completed) comes twice.
endless             Deltas of 1 KB for ever, as fast as the socket takes them.
ticks-N-MS          N deltas, one each MS milliseconds, then a normal end (whole: answers after N * MS).
gate                Waits for release(), then answers well.
gate-stream         Two chunks, waits for release(), then the rest.
==================  ========================================================================================

Behaviours of streams give a good answer to a request that asked for none, unless said otherwise above.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import functools
import itertools
import json
import re
import signal
import socket
import struct
import threading
import time
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from http.client import responses
from types import TracebackType
from typing import Any, NoReturn, Self
from urllib.parse import parse_qsl, unquote

Doc = dict[str, Any]

CONTENT = "Hello from the fake upstream."
UNICODE_CONTENT = "Grüße, 世界 🌊!"
ERROR_MESSAGE = "Fake overload"
ERROR_CODE = "fake_stream_error"
TOOL_ARGUMENTS = '{"city":"Paris","unit":"celsius"}'
VECTOR = (0.25, -0.5, 0.125)
HUGE_SIZE = 10 * 1024 * 1024
BIG_DELTA_SIZE = 1024 * 1024
MODELS = ("gpt-4o-mini", "gpt-4o", "text-embedding-3-small")
CREATED = 1_700_000_000

PROMPT_TOKENS, COMPLETION_TOKENS, CACHED_TOKENS, REASONING_TOKENS = 12, 6, 4, 2
EMBEDDING_TOKENS = 5

_HTML = b"<!doctype html><html><body><h1>Fake page</h1></body></html>\n"
_LAST_CHUNK = b"0\r\n\r\n"
_WRITE_SIZE = 64 * 1024
_SEND_BUFFER = 64 * 1024
_KEPT_BODY = 16 * 1024 * 1024
_HEAD_LIMIT = 1024 * 1024
_SETTLE_SECONDS = 0.02
"""Pause before a reset, so that the peer can read what was sent before it."""


# ---------------------------------------------------------------------------------------------------------
# What was seen


@dataclass(frozen=True)
class SeenRequest:
    """A request as it arrived. `path` has no query string; `json` is None if the body was no JSON."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes
    json: Any


@dataclass(eq=False)
class SeenCall:
    """The answering of one request, as seen from the server; safe to look at from any thread."""

    request: SeenRequest
    number: int
    """The N of the answer's x-request-id."""
    model: str = ""
    began_at: float = field(default_factory=time.monotonic)
    finished: threading.Event = field(default_factory=threading.Event)
    """Set when the server has sent all it meant to send (for "drop" and the like: a deliberate end)."""
    finished_at: float | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)
    """Set when the peer closed (or half-closed) the connection before that."""
    cancelled_at: float | None = None
    ended: threading.Event = field(default_factory=threading.Event)
    """Set when the call is finished or cancelled (or broken off by the stop of the server)."""
    released: threading.Event = field(default_factory=threading.Event)
    """Set when the call was let through the gate."""
    status: int | None = None
    bytes_sent: int = 0
    """Bytes, heads and chunk frames included, that the operating system has taken."""
    _body: bytearray = field(default_factory=bytearray, repr=False)
    _gate: asyncio.Event = field(default_factory=asyncio.Event, repr=False)
    _loop: asyncio.AbstractEventLoop | None = field(default=None, repr=False)

    @property
    def answer_body(self) -> bytes:
        """The body of the answer, without chunk frames, as far as it was sent (at most the first 16 MiB)."""
        return bytes(self._body)

    def release(self) -> None:
        """Lets this one call through the gate."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._gate.set)

    def _finish(self) -> None:
        if not self.finished.is_set() and not self.cancelled.is_set():
            self.finished_at = time.monotonic()
            self.finished.set()

    def _cancel(self) -> None:
        if not self.finished.is_set() and not self.cancelled.is_set():
            self.cancelled_at = time.monotonic()
            self.cancelled.set()


# ---------------------------------------------------------------------------------------------------------
# What to answer: documents and events, without a socket


@dataclass(frozen=True)
class Ask:
    """What a request asks for."""

    operation: str
    model: str
    number: int
    payload: Doc
    body: bytes = b""

    @property
    def streams(self) -> bool:
        """Whether a stream was asked for, and the operation has one."""
        return self.payload.get("stream") is True and self.operation in _SCRIPTS

    @property
    def wants_usage(self) -> bool:
        """Whether the stream is to have a usage chunk."""
        options = self.payload.get("stream_options")
        return isinstance(options, dict) and options.get("include_usage") is True

    @property
    def choices(self) -> int:
        """How many choices were asked for; unlucky values of `n` count as 1."""
        n = self.payload.get("n")
        return n if type(n) is int and 1 <= n <= 128 else 1

    @property
    def tool(self) -> str | None:
        """The name of the function to call, if the answer is to be a tool call."""
        tools = self.payload.get("tools")
        if (
            not isinstance(tools, list)
            or self.payload.get("tool_choice") == "none"
            or self._has_tool_result()
        ):
            return None
        for tool in tools:
            if isinstance(tool, dict) and tool.get("type") == "function":
                function = tool.get("function", tool)
                name = function.get("name") if isinstance(function, dict) else None
                return name if isinstance(name, str) else "fake_tool"
        return None

    def _has_tool_result(self) -> bool:
        turns = self.payload.get("messages", self.payload.get("input"))
        last = turns[-1] if isinstance(turns, list) and turns else None
        return isinstance(last, dict) and (
            last.get("role") == "tool" or last.get("type") == "function_call_output"
        )


@dataclass(frozen=True)
class Plan:
    """The content of an answer, in the pieces it is streamed in, and how its usage is told."""

    pieces: tuple[str, ...]
    usage: str = "good"
    """good, none, wrong, in-finish, every or twice."""
    failed: bool = False

    @property
    def content(self) -> str:
        return "".join(self.pieces)


@dataclass(frozen=True)
class Event:
    """A server-sent event."""

    data: str
    name: str | None = None


@dataclass(frozen=True)
class Script:
    """The events of a stream."""

    opening: list[Event]
    deltas: list[Event]
    closing: list[Event]

    @property
    def first_part(self) -> list[Event]:
        return self.opening + self.deltas[:2]

    @property
    def second_part(self) -> list[Event]:
        return self.deltas[2:] + self.closing

    @property
    def events(self) -> list[Event]:
        return self.opening + self.deltas + self.closing


def words(text: str) -> tuple[str, ...]:
    """Pieces of a text, one a word, each with the blank before it."""
    return tuple(re.findall(r"\s*\S+", text))


GOOD = Plan(words(CONTENT))
_DONE = Event("[DONE]")


def dumps(doc: Any) -> str:
    """Compact JSON, letters beyond ASCII as they are."""
    return json.dumps(doc, ensure_ascii=False, separators=(",", ":"))


def utf8(text: str) -> bytes:
    """UTF-8, with a question mark for what cannot be encoded."""
    return text.encode("utf-8", "replace")


def encode_event(event: Event, *, eol: str = "\n", space: str = " ") -> bytes:
    """The bytes of an event; a line end in its data starts another ``data:`` line."""
    lines = [] if event.name is None else [f"event:{space}{event.name}"]
    lines += [f"data:{space}{line}" for line in event.data.split("\n")]
    return utf8(eol.join(lines) + eol * 2)


def encode_events(events: Iterable[Event]) -> bytes:
    """The bytes of a whole stream."""
    return b"".join(encode_event(event) for event in events)


def error_document(message: str, code: str, kind: str = "fake_error") -> Doc:
    """OpenAI's error envelope."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def chat_usage(completion_tokens: int = COMPLETION_TOKENS) -> Doc:
    """Usage as chat/completions and completions tell it."""
    return {
        "prompt_tokens": PROMPT_TOKENS,
        "completion_tokens": completion_tokens,
        "total_tokens": PROMPT_TOKENS + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": CACHED_TOKENS, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": min(REASONING_TOKENS, completion_tokens),
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def response_usage(output_tokens: int = COMPLETION_TOKENS) -> Doc:
    """Usage as the Responses API tells it."""
    return {
        "input_tokens": PROMPT_TOKENS,
        "input_tokens_details": {"cached_tokens": CACHED_TOKENS, "cache_write_tokens": 0},
        "output_tokens": output_tokens,
        "output_tokens_details": {"reasoning_tokens": min(REASONING_TOKENS, output_tokens)},
        "total_tokens": PROMPT_TOKENS + output_tokens,
    }


def _usage_value(plan: Plan, usage: Doc) -> Any:
    return "a lot" if plan.usage == "wrong" else usage


def _usage_field(plan: Plan, usage: Doc) -> Doc:
    return {} if plan.usage == "none" else {"usage": _usage_value(plan, usage)}


# chat/completions


def _chat_logprobs(ask: Ask, pieces: Sequence[str]) -> Doc | None:
    if ask.payload.get("logprobs") is not True:
        return None
    tokens = [
        {"token": piece, "logprob": -0.125, "bytes": list(utf8(piece)), "top_logprobs": []}
        for piece in pieces
    ]
    return {"content": tokens, "refusal": None}


def _chat_message(ask: Ask, plan: Plan) -> Doc:
    message: Doc = {"role": "assistant", "content": plan.content, "refusal": None, "annotations": []}
    if ask.tool is not None:
        function = {"name": ask.tool, "arguments": TOOL_ARGUMENTS}
        message["content"] = None
        message["tool_calls"] = [{"id": "call_fake_1", "type": "function", "function": function}]
    return message


def _chat_document(ask: Ask, plan: Plan) -> Doc:
    choices = [
        {
            "index": index,
            "message": _chat_message(ask, plan),
            "logprobs": _chat_logprobs(ask, plan.pieces) if ask.tool is None else None,
            "finish_reason": "stop" if ask.tool is None else "tool_calls",
        }
        for index in range(ask.choices)
    ]
    return {
        "id": f"chatcmpl-fake-{ask.number}",
        "object": "chat.completion",
        "created": CREATED,
        "model": ask.model,
        "choices": choices,
        **_usage_field(plan, chat_usage()),
        "service_tier": "default",
        "system_fingerprint": "fp_fake",
    }


def _chat_choice(index: int, delta: Doc, logprobs: Doc | None = None, finish: str | None = None) -> list[Doc]:
    return [{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}]


def _tool_pieces() -> list[str]:
    return re.findall(".{1,6}", TOOL_ARGUMENTS)


def _chat_script(ask: Ask, plan: Plan) -> Script:
    each = range(ask.choices)
    role: Doc = {"role": "assistant", "content": "", "refusal": None}
    if ask.tool is None:
        deltas = [
            _chat_choice(index, {"content": piece}, _chat_logprobs(ask, [piece]))
            for piece in plan.pieces
            for index in each
        ]
    else:
        function = {"name": ask.tool, "arguments": ""}
        call = {"index": 0, "id": "call_fake_1", "type": "function", "function": function}
        role |= {"content": None, "tool_calls": [call]}
        deltas = [
            _chat_choice(index, {"tool_calls": [{"index": 0, "function": {"arguments": piece}}]})
            for piece in _tool_pieces()
            for index in each
        ]
    finish = "stop" if ask.tool is None else "tool_calls"
    head = {
        "id": f"chatcmpl-fake-{ask.number}",
        "object": "chat.completion.chunk",
        "created": CREATED,
        "model": ask.model,
        "service_tier": "default",
        "system_fingerprint": "fp_fake",
    }
    return _chunk_script(
        ask,
        plan,
        head,
        [_chat_choice(index, role) for index in each],
        deltas,
        [_chat_choice(index, {}, None, finish) for index in each],
    )


def _chunk_script(
    ask: Ask,
    plan: Plan,
    head: Doc,
    opening: list[list[Doc]],
    deltas: list[list[Doc]],
    finish: list[list[Doc]],
) -> Script:
    """A stream of chunks with these choices, with usage where the plan and the request want it."""

    def chunk(choices: list[Doc], tokens: int, last: bool = False) -> Event:
        usage: Doc = {}
        if plan.usage == "every":
            usage = {"usage": chat_usage(tokens)}
        elif plan.usage == "in-finish":
            usage = {"usage": chat_usage()} if last else {}
        elif ask.wants_usage and plan.usage != "none":
            usage = {"usage": None}
        return Event(dumps(head | {"choices": choices} | usage))

    closing = [
        chunk(choices, COMPLETION_TOKENS, last=number == len(finish))
        for number, choices in enumerate(finish, 1)
    ]
    if ask.wants_usage and plan.usage not in ("none", "in-finish"):
        usage = _usage_value(plan, chat_usage())
        usage_chunk = Event(dumps(head | {"choices": [], "usage": usage}))
        closing += [usage_chunk] * (2 if plan.usage == "twice" else 1)
    return Script(
        [chunk(choices, 0) for choices in opening],
        [chunk(choices, min(number, COMPLETION_TOKENS)) for number, choices in enumerate(deltas, 1)],
        [*closing, _DONE],
    )


# completions


def _text_choice(ask: Ask, index: int, pieces: Sequence[str], offset: int, finish: str | None) -> Doc:
    logprobs: Doc | None = None
    if type(ask.payload.get("logprobs")) is int and pieces:
        starts = itertools.accumulate((len(piece) for piece in pieces), initial=offset)
        logprobs = {
            "tokens": list(pieces),
            "token_logprobs": [-0.125] * len(pieces),
            "top_logprobs": None,
            "text_offset": list(starts)[:-1],
        }
    return {"text": "".join(pieces), "index": index, "logprobs": logprobs, "finish_reason": finish}


def _text_head(ask: Ask) -> Doc:
    return {
        "id": f"cmpl-fake-{ask.number}",
        "object": "text_completion",
        "created": CREATED,
        "model": ask.model,
        "system_fingerprint": "fp_fake",
    }


def _text_document(ask: Ask, plan: Plan) -> Doc:
    choices = [_text_choice(ask, index, plan.pieces, 0, "stop") for index in range(ask.choices)]
    return _text_head(ask) | {"choices": choices} | _usage_field(plan, chat_usage())


def _text_script(ask: Ask, plan: Plan) -> Script:
    each = range(ask.choices)
    offsets = list(itertools.accumulate((len(piece) for piece in plan.pieces), initial=0))
    deltas = [
        [_text_choice(ask, index, [piece], offset, None)]
        for piece, offset in zip(plan.pieces, offsets, strict=False)
        for index in each
    ]
    finish = [[_text_choice(ask, index, [], offsets[-1], "stop")] for index in each]
    return _chunk_script(ask, plan, _text_head(ask), [], deltas, finish)


# embeddings and models


def _embedding_document(ask: Ask, plan: Plan) -> Doc:
    given = ask.payload.get("input")
    many = isinstance(given, list) and bool(given) and isinstance(given[0], str | list)
    vector: Any = list(VECTOR)
    if ask.payload.get("encoding_format") == "base64":
        vector = base64.b64encode(struct.pack(f"<{len(VECTOR)}f", *VECTOR)).decode()
    usage = {"prompt_tokens": EMBEDDING_TOKENS, "total_tokens": EMBEDDING_TOKENS}
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": vector}
            for index in range(len(given) if many and isinstance(given, list) else 1)
        ],
        "model": ask.model,
        **_usage_field(plan, usage),
    }


def _model_document(ask: Ask, plan: Plan) -> Doc:
    return {"id": ask.model, "object": "model", "created": CREATED, "owned_by": "fake"}


def _models_document(ask: Ask, plan: Plan) -> Doc:
    models = [{"id": name, "object": "model", "created": CREATED, "owned_by": "fake"} for name in MODELS]
    return {"object": "list", "data": models}


# responses


def _response_object(ask: Ask, status: str, output: list[Doc], usage: Any, error: Doc | None = None) -> Doc:
    tools = ask.payload.get("tools")
    return {
        "id": f"resp_fake_{ask.number}",
        "object": "response",
        "created_at": CREATED,
        "status": status,
        "background": False,
        "error": error,
        "incomplete_details": None,
        "instructions": None,
        "max_output_tokens": None,
        "metadata": {},
        "model": ask.model,
        "output": output,
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "service_tier": "default",
        "store": True,
        "temperature": 1.0,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": tools if isinstance(tools, list) else [],
        "top_logprobs": 0,
        "top_p": 1.0,
        "truncation": "disabled",
        "usage": usage,
        "user": None,
    }


def _response_part(text: str) -> Doc:
    return {"type": "output_text", "annotations": [], "logprobs": [], "text": text}


def _response_item(ask: Ask, plan: Plan, status: str) -> Doc:
    """The one item of the output, a message or a function call; empty while it is in progress."""
    whole = status == "completed"
    if ask.tool is not None:
        return {
            "id": f"fc_fake_{ask.number}",
            "type": "function_call",
            "status": status,
            "arguments": TOOL_ARGUMENTS if whole else "",
            "call_id": "call_fake_1",
            "name": ask.tool,
        }
    return {
        "id": f"msg_fake_{ask.number}",
        "type": "message",
        "status": status,
        "content": [_response_part(plan.content)] if whole else [],
        "role": "assistant",
    }


def _ended_response(ask: Ask, plan: Plan) -> Doc:
    if plan.failed:
        error = {"code": "server_error", "message": ERROR_MESSAGE}
        return _response_object(ask, "failed", [], None, error)
    usage = None if plan.usage == "none" else _usage_value(plan, response_usage())
    return _response_object(ask, "completed", [_response_item(ask, plan, "completed")], usage)


def _response_script(ask: Ask, plan: Plan) -> Script:
    sequence = itertools.count()

    def event(kind: str, **fields: Any) -> Event:
        return Event(dumps({"type": kind, "sequence_number": next(sequence)} | fields), kind)

    usage = response_usage(0) if plan.usage == "every" else None
    begun = _response_object(ask, "in_progress", [], usage)
    item = _response_item(ask, plan, "in_progress")
    whole = _response_item(ask, plan, "completed")
    in_item: Doc = {"item_id": item["id"], "output_index": 0}
    in_part = in_item | {"content_index": 0}
    opening = [
        event("response.created", response=begun),
        event("response.in_progress", response=begun),
        event("response.output_item.added", output_index=0, item=item),
    ]
    if ask.tool is not None:
        kind = "response.function_call_arguments"
        deltas = [event(f"{kind}.delta", **in_item, delta=piece) for piece in _tool_pieces()]
        closing = [event(f"{kind}.done", **in_item, arguments=TOOL_ARGUMENTS)]
    else:
        kind = "response.output_text"
        opening.append(event("response.content_part.added", **in_part, part=_response_part("")))
        deltas = [event(f"{kind}.delta", **in_part, delta=piece, logprobs=[]) for piece in plan.pieces]
        closing = [
            event(f"{kind}.done", **in_part, text=plan.content, logprobs=[]),
            event("response.content_part.done", **in_part, part=_response_part(plan.content)),
        ]
    closing.append(event("response.output_item.done", output_index=0, item=whole))
    ended = _ended_response(ask, plan)
    if plan.failed:
        closing = []
        sequence = itertools.count(len(opening) + len(deltas))
    for _ in range(2 if plan.usage == "twice" else 1):
        closing.append(event(f"response.{ended['status']}", response=ended))
    return Script(opening, deltas, closing)


_DOCUMENTS: dict[str, Callable[[Ask, Plan], Doc]] = {
    "chat": _chat_document,
    "completion": _text_document,
    "embedding": _embedding_document,
    "response": _ended_response,
    "model": _model_document,
    "models": _models_document,
}
_SCRIPTS: dict[str, Callable[[Ask, Plan], Script]] = {
    "chat": _chat_script,
    "completion": _text_script,
    "response": _response_script,
}


def document(ask: Ask, plan: Plan) -> bytes:
    """The body of a whole answer."""
    return utf8(dumps(_DOCUMENTS[ask.operation](ask, plan)))


def script(ask: Ask, plan: Plan) -> Script:
    """The events of a streamed answer."""
    return _SCRIPTS[ask.operation](ask, plan)


def error_event(ask: Ask, sequence_number: int) -> Event:
    """An error within a stream, as the operation tells it."""
    if ask.operation == "response":
        fields = {"code": ERROR_CODE, "message": ERROR_MESSAGE, "param": None}
        return Event(dumps({"type": "error"} | fields | {"sequence_number": sequence_number}), "error")
    error = {"message": ERROR_MESSAGE, "type": "server_error", "code": ERROR_CODE}
    return Event(json.dumps({"error": error}))


# ---------------------------------------------------------------------------------------------------------
# How to answer: bytes on the wire


class _HangUpError(Exception):
    """The answer has ended the connection on purpose."""


class _MalformedError(Exception):
    """What arrived is no HTTP/1.1 request."""


class Exchange:
    """One request and the means to answer it, well or badly."""

    def __init__(self, fake: FakeUpstream, call: SeenCall, ask: Ask, writer: asyncio.StreamWriter) -> None:
        self.fake = fake
        self.call = call
        self.ask = ask
        self._writer = writer

    # raw bytes

    async def send(self, data: bytes) -> None:
        """Gives bytes to the operating system, as fast as it takes them; the loop gets a turn before."""
        for start in range(0, len(data), _WRITE_SIZE):
            await asyncio.sleep(0)
            if self._writer.transport.is_closing():
                raise ConnectionResetError("the peer is gone")
            part = data[start : start + _WRITE_SIZE]
            self._writer.write(part)
            await self._writer.drain()
            self.call.bytes_sent += len(part)

    def head(self, status: int, headers: Doc) -> bytes:
        """The bytes of an answer's head."""
        self.call.status = status
        phrase = responses.get(status, "Unknown")
        lines = [f"HTTP/1.1 {status} {phrase}", f"x-request-id: req_fake_{self.call.number}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1", "replace")

    def kept(self, data: bytes) -> bytes:
        """Notes bytes of the answer's body."""
        if self.fake.record and len(self.call._body) < _KEPT_BODY:
            self.call._body += data
        return data

    async def whole(
        self, body: bytes, *, status: int = 200, kind: str = "application/json", headers: Doc | None = None
    ) -> None:
        """Sends a whole answer with its content-length."""
        fields = {"content-type": kind, "content-length": len(body)} | (headers or {})
        await self.send(self.head(status, fields) + self.kept(body))

    async def error(self, status: int, message: str, code: str, headers: Doc | None = None) -> None:
        """Sends an error envelope."""
        await self.whole(utf8(dumps(error_document(message, code))), status=status, headers=headers)

    def stream_head(
        self, headers: Doc | None = None, kind: str = "text/event-stream; charset=utf-8"
    ) -> bytes:
        """The bytes of a stream's head."""
        fields = {"content-type": kind, "cache-control": "no-cache", "transfer-encoding": "chunked"}
        return self.head(200, fields | (headers or {}))

    def framed(self, data: bytes) -> bytes:
        """An HTTP chunk."""
        return b"%x\r\n%b\r\n" % (len(data), self.kept(data)) if data else b""

    async def chunk(self, data: bytes, *, last: bool = False) -> None:
        """Sends an HTTP chunk; the last one together with the end of the body."""
        await self.send(self.framed(data) + (_LAST_CHUNK if last else b""))

    async def play(self, events: Sequence[Event], *, end: bool = False) -> None:
        """Sends events, each in a chunk of its own; if `end`, the last one with the end of the body."""
        for number, event in enumerate(events, 1):
            await self.chunk(encode_event(event), last=end and number == len(events))

    # ready answers

    async def answer(self, plan: Plan = GOOD) -> None:
        """A good answer, whole or streamed."""
        if not self.ask.streams:
            await self.whole(document(self.ask, plan))
            return
        await self.send(self.stream_head())
        await self.play(script(self.ask, plan).events, end=True)

    async def first_part(self, plan: Plan = GOOD) -> None:
        """Head and two chunks, or head and half the body of a whole answer."""
        if self.ask.streams:
            await self.send(self.stream_head())
            await self.play(script(self.ask, plan).first_part)
            return
        body = document(self.ask, plan)
        head = self.head(200, {"content-type": "application/json", "content-length": len(body)})
        await self.send(head + self.kept(body[: len(body) // 2]))

    async def second_part(self, plan: Plan = GOOD) -> None:
        """What first_part left."""
        if self.ask.streams:
            await self.play(script(self.ask, plan).second_part, end=True)
            return
        body = document(self.ask, plan)
        await self.send(self.kept(body[len(body) // 2 :]))

    # waits and ends

    async def pause(self, seconds: float) -> None:
        """Sends nothing for a while."""
        await asyncio.sleep(seconds)

    async def silence(self) -> NoReturn:
        """Sends nothing for ever."""
        await asyncio.get_running_loop().create_future()
        raise AssertionError("unreachable")

    async def gate(self) -> None:
        """Waits for the release of this call."""
        if not self.fake._gate_open:
            await self.call._gate.wait()
        self.call.released.set()

    def close(self) -> NoReturn:
        """Ends the connection with FIN."""
        self.call._finish()
        self._writer.close()
        raise _HangUpError

    def reset(self) -> NoReturn:
        """Ends the connection with RST."""
        self.call._finish()
        sock = self._writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()
        raise _HangUpError


# ---------------------------------------------------------------------------------------------------------
# Behaviours

Behaviour = Callable[..., Awaitable[None]]
BEHAVIOURS: dict[str, Behaviour] = {}
"""Behaviours by the model names in the table above; N, NNN and MS are numbers, given to the function."""
_PATTERNS: list[tuple[re.Pattern[str], Behaviour]] = []
_PLACEHOLDERS = {"NNN": "([0-9]{3})", "MS": "([0-9]{1,6})", "N": "([0-9]{1,6})"}


def behaviour(name: str) -> Callable[[Behaviour], Behaviour]:
    """Registers a function as the behaviour of a model name."""

    def register(function: Behaviour) -> Behaviour:
        pattern = re.sub("NNN|MS|N", lambda match: _PLACEHOLDERS[match[0]], name)
        BEHAVIOURS[name] = function
        _PATTERNS.append((re.compile(pattern), function))
        return function

    return register


def find_behaviour(model: str) -> Callable[[Exchange], Awaitable[None]]:
    """The behaviour that a model name asks for."""
    for pattern, function in _PATTERNS:
        match = pattern.fullmatch(model)
        if match:
            numbers = [int(group) for group in match.groups()]
            return lambda x: function(x, *numbers)
    return good


async def good(x: Exchange) -> None:
    await x.answer()


@behaviour("echo")
async def echo(x: Exchange) -> None:
    plan = Plan((x.ask.body.decode("utf-8", "replace"),))
    if x.ask.streams:
        await x.answer(plan)
        return
    odd = b',\n\t"x_unknown" :  {"kept": [1, 2.50, 1e3]}  }\n'
    await x.whole(document(x.ask, plan)[:-1] + odd)


@behaviour("status-NNN")
async def status(x: Exchange, code: int, headers: Doc | None = None) -> None:
    if not 400 <= code <= 599:
        await x.answer()
        return
    detail = "This is what the test asked for."
    if code == 401:
        given = x.call.request.headers
        key = given.get("authorization", "").removeprefix("Bearer ") or given.get("api-key", "")
        detail = f"Incorrect API key provided: {key}."
    await x.error(code, f"Fake {code}: {detail}", f"fake_{code}", headers)


@behaviour("status-NNN-after")
async def status_after(x: Exchange, code: int) -> None:
    await status(x, code, {"retry-after": 7})


@behaviour("status-NNN-html")
async def status_html(x: Exchange, code: int) -> None:
    await x.whole(_HTML, status=code if 400 <= code <= 599 else 200, kind="text/html")


@behaviour("too-long")
async def too_long(x: Exchange) -> None:
    await x.error(400, "Fake 400: the messages are too long.", "context_length_exceeded")


@behaviour("too-long-200")
async def too_long_with_200(x: Exchange) -> None:
    await _error_with_200(x, "Fake 400: the messages are too long.", "context_length_exceeded")


@behaviour("error-200-NNN")
async def error_with_200(x: Exchange, code: int) -> None:
    await _error_with_200(x, ERROR_MESSAGE, code)


async def _error_with_200(x: Exchange, message: str, code: str | int) -> None:
    body = json.dumps({"error": {"message": message, "code": code}})
    if x.ask.streams:
        await x.send(x.stream_head())
        await x.play([Event(body)], end=True)
    else:
        await x.whole(body.encode())


@behaviour("filtered")
async def filtered(x: Exchange) -> None:
    await x.error(400, "Fake 400: the answer was filtered.", "content_filter")


@behaviour("by-key")
async def by_key(x: Exchange) -> None:
    key = x.call.request.headers.get("authorization", "")
    if key.endswith("-429"):
        await status_after(x, 429)
    elif key.endswith("-401"):
        await status(x, 401)
    else:
        await x.answer()


@behaviour("by-key-200")
async def by_key_with_200(x: Exchange) -> None:
    key = x.call.request.headers.get("authorization", "")
    if key.endswith("-429"):
        await _error_with_200(x, "Fake 429: slow down.", "rate_limit_exceeded")
    elif key.endswith("-401"):
        await _error_with_200(x, "Fake 401: incorrect key.", "invalid_api_key")
    else:
        await x.answer()


@behaviour("flaky-N")
async def flaky(x: Exchange, failures: int) -> None:
    if x.fake._count(x.ask.model) <= failures:
        await status(x, 503)
    else:
        await x.answer()


@behaviour("flaky-reset-N")
async def flaky_reset(x: Exchange, failures: int) -> None:
    if x.fake._count(x.ask.model) <= failures:
        x.reset()
    await x.answer()


@behaviour("flaky-after-N")
async def flaky_after(x: Exchange, failures: int) -> None:
    if x.fake._count(x.ask.model) <= failures:
        await status(x, 429, {"retry-after": 1})
    else:
        await x.answer()


@behaviour("half-N")
async def half(x: Exchange, number: int) -> None:
    if x.fake._count(x.ask.model) % 2:
        await status(x, 503)
    else:
        await x.answer()


@behaviour("hang")
async def hang(x: Exchange) -> None:
    await x.silence()


@behaviour("slow-head-MS")
async def slow_head(x: Exchange, milliseconds: int) -> None:
    await x.pause(milliseconds / 1000)
    await x.answer()


@behaviour("refuse-stream")
async def refuse_stream(x: Exchange) -> None:
    await x.whole(document(x.ask, GOOD))


@behaviour("html")
async def html(x: Exchange) -> None:
    await x.whole(_HTML, kind="text/html; charset=utf-8")


@behaviour("wrong-type")
async def wrong_type(x: Exchange) -> None:
    if not x.ask.streams:
        await x.whole(document(x.ask, GOOD), kind="text/plain")
        return
    await x.send(x.stream_head(kind="text/plain"))
    await x.play(script(x.ask, GOOD).events, end=True)


@behaviour("truncated-json")
async def truncated_json(x: Exchange) -> None:
    body = document(x.ask, GOOD)
    await x.whole(body[: len(body) // 2])


@behaviour("short-body")
async def short_body(x: Exchange) -> None:
    body = document(x.ask, GOOD)
    head = x.head(200, {"content-type": "application/json", "content-length": len(body)})
    await x.send(head + x.kept(body[: len(body) // 2]))
    x.close()


@behaviour("gzip")
async def gzipped(x: Exchange) -> None:
    packer = zlib.compressobj(wbits=31)
    headers = {"content-encoding": "gzip"}
    if not x.ask.streams:
        await x.whole(packer.compress(document(x.ask, GOOD)) + packer.flush(), headers=headers)
        return
    await x.send(x.stream_head(headers))
    *events, last = script(x.ask, GOOD).events
    for event in events:
        await x.chunk(packer.compress(encode_event(event)) + packer.flush(zlib.Z_SYNC_FLUSH))
    await x.chunk(packer.compress(encode_event(last)) + packer.flush(), last=True)


@functools.cache
def _huge_plan() -> Plan:
    return Plan(("x" * _WRITE_SIZE,) * (HUGE_SIZE // _WRITE_SIZE))


@behaviour("huge")
async def huge(x: Exchange) -> None:
    await x.answer(_huge_plan())


@behaviour("wrong-usage")
async def wrong_usage(x: Exchange) -> None:
    await x.answer(Plan(GOOD.pieces, usage="wrong"))


@behaviour("no-usage")
async def no_usage(x: Exchange) -> None:
    await x.answer(Plan(GOOD.pieces, usage="none"))


@behaviour("usage-in-finish")
async def usage_in_finish(x: Exchange) -> None:
    await x.answer(Plan(GOOD.pieces, usage="in-finish"))


@behaviour("usage-every-chunk")
async def usage_every_chunk(x: Exchange) -> None:
    await x.answer(Plan(GOOD.pieces, usage="every"))


@behaviour("usage-twice")
async def usage_twice(x: Exchange) -> None:
    await x.answer(Plan(GOOD.pieces, usage="twice"))


@behaviour("failed")
async def failed(x: Exchange) -> None:
    await x.answer(Plan(GOOD.pieces[:2], failed=True) if x.ask.operation == "response" else GOOD)


@behaviour("split-N")
async def split(x: Exchange, size: int) -> None:
    plan = Plan(words(UNICODE_CONTENT))
    size = max(size, 1)
    if x.ask.streams:
        body = encode_events(script(x.ask, plan).events)
        await x.send(x.stream_head())
    else:
        body = document(x.ask, plan)
        await x.send(x.stream_head(kind="application/json"))
    for start in range(0, len(body), size):
        piece = body[start : start + size]
        last = start + size >= len(body)
        await x.chunk(piece, last=last)
        if not last and (piece.endswith(b"\n") or not piece.isascii()):
            # The pause sees to it that a reader gets these bytes apart from the next ones.
            await x.pause(0.001)


@behaviour("crlf")
async def crlf(x: Exchange) -> None:
    if not x.ask.streams:
        await x.answer()
        return
    parts = script(x.ask, GOOD)
    bare = parts.deltas[:1]
    await x.send(x.stream_head())
    for number, event in enumerate(parts.events, 1):
        await x.chunk(b": OPENROUTER PROCESSING\r\n\r\n")
        data = encode_event(event, eol="\r\n", space="" if event in bare else " ")
        await x.chunk(data, last=number == len(parts.events))


@behaviour("multi-data")
async def multi_data(x: Exchange) -> None:
    if not x.ask.streams:
        await x.answer()
        return
    parts = script(x.ask, GOOD)
    # The first '",' ends the first field, an id or a type, which has no such thing inside.
    deltas = [Event(delta.data.replace('",', '",\n', 1), delta.name) for delta in parts.deltas]
    await x.send(x.stream_head())
    await x.play([*parts.opening, *deltas, *parts.closing], end=True)


@behaviour("one-packet")
async def one_packet(x: Exchange) -> None:
    if not x.ask.streams:
        await x.answer()
        return
    chunks = [x.framed(encode_event(event)) for event in script(x.ask, GOOD).events]
    await x.send(x.stream_head() + b"".join(chunks) + _LAST_CHUNK)


@behaviour("big-delta")
async def big_delta(x: Exchange) -> None:
    await x.answer(Plan(("x" * BIG_DELTA_SIZE,)))


@behaviour("stall")
async def stall(x: Exchange) -> None:
    await x.first_part()
    await x.silence()


@behaviour("stall-first")
async def stall_first(x: Exchange) -> None:
    fields = {"content-type": "application/json", "content-length": 100}
    await x.send(x.stream_head() if x.ask.streams else x.head(200, fields))
    await x.silence()


@behaviour("stall-comments")
async def stall_comments(x: Exchange) -> None:
    if not x.ask.streams:
        await stall_first(x)
    await x.send(x.stream_head())
    while True:
        await x.chunk(b": keep-alive\n\n")
        await x.pause(0.05)


@behaviour("drop")
async def drop(x: Exchange) -> None:
    await x.first_part()
    await x.pause(_SETTLE_SECONDS)
    x.reset()


@behaviour("drop-mid-event")
async def drop_mid_event(x: Exchange) -> None:
    if not x.ask.streams:
        await x.answer()
        return
    await x.first_part()
    event = encode_event(script(x.ask, GOOD).second_part[0])
    await x.chunk(event[: len(event) // 2], last=True)


@behaviour("close-no-done")
async def close_no_done(x: Exchange) -> None:
    if not x.ask.streams:
        await x.answer()
        return
    await x.send(x.stream_head())
    await x.play(script(x.ask, GOOD).events[:-1], end=True)


@behaviour("abort-chunked")
async def abort_chunked(x: Exchange) -> None:
    await x.first_part()
    x.close()


@behaviour("error-event")
async def error_after_two(x: Exchange) -> None:
    if not x.ask.streams:
        await x.answer()
        return
    await x.first_part()
    await x.play([error_event(x.ask, len(script(x.ask, GOOD).first_part))], end=True)


@behaviour("error-first")
async def error_first(x: Exchange) -> None:
    if not x.ask.streams:
        await x.answer()
        return
    await x.send(x.stream_head())
    await x.play([error_event(x.ask, 0)], end=True)


@behaviour("empty-stream")
async def empty_stream(x: Exchange) -> None:
    if not x.ask.streams:
        await x.answer()
        return
    await x.send(x.stream_head() + _LAST_CHUNK)


@behaviour("endless")
async def endless(x: Exchange) -> None:
    if not x.ask.streams:
        await x.answer()
        return
    parts = script(x.ask, Plan(("x" * 1024,)))
    await x.send(x.stream_head())
    await x.play(parts.opening)
    while True:
        await x.play(parts.deltas)


@behaviour("ticks-N-MS")
async def ticks(x: Exchange, count: int, milliseconds: int) -> None:
    plan = Plan(tuple(f"tick{number} " for number in range(count)))
    if not x.ask.streams:
        await x.pause(count * milliseconds / 1000)
        await x.answer(plan)
        return
    parts = script(x.ask, plan)
    await x.send(x.stream_head())
    await x.play(parts.opening)
    for delta in parts.deltas:
        await x.pause(milliseconds / 1000)
        await x.play([delta])
    await x.play(parts.closing, end=True)


@behaviour("gate")
async def gate(x: Exchange) -> None:
    await x.gate()
    await x.answer()


@behaviour("gate-stream")
async def gate_stream(x: Exchange) -> None:
    await x.first_part()
    await x.gate()
    await x.second_part()


# ---------------------------------------------------------------------------------------------------------
# Requests

_POSTS = {
    "chat/completions": "chat",
    "completions": "completion",
    "embeddings": "embedding",
    "responses": "response",
}
_PATH = re.compile(r"(?:/openai/deployments/(?P<model>[^/]+)|/openai/v1|/openai|/v1)/(?P<rest>.+)")


def find_operation(method: str, path: str) -> tuple[str, str | None] | None:
    """The operation and, if the path has one, the model; None for an unknown path."""
    match = _PATH.fullmatch(path)
    if match is None:
        return None
    rest, model = match["rest"], match["model"]
    if method == "POST" and rest in _POSTS:
        return _POSTS[rest], None if model is None else unquote(model)
    if method == "GET" and rest == "models":
        return "models", ""
    if method == "GET" and rest.startswith("models/"):
        return "model", unquote(rest.removeprefix("models/"))
    return None


def find_model(request: SeenRequest) -> str:
    """The model a request names in its path or body, or an empty string."""
    found = find_operation(request.method, request.path)
    if found is not None and found[1] is not None:
        return found[1]
    given = request.json.get("model") if isinstance(request.json, dict) else None
    return given if isinstance(given, str) else ""


async def _read_chunks(reader: asyncio.StreamReader) -> bytes:
    body = bytearray()
    while True:
        size = int((await reader.readuntil(b"\r\n")).split(b";")[0], 16)
        if size == 0:
            break
        body += await reader.readexactly(size)
        if await reader.readexactly(2) != b"\r\n":
            raise _MalformedError("a chunk does not end where it should")
    while await reader.readuntil(b"\r\n") != b"\r\n":
        pass
    return bytes(body)


async def _read_body(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, headers: dict[str, str]
) -> bytes:
    if headers.get("expect", "").lower() == "100-continue":
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    if headers.get("transfer-encoding", "").lower() == "chunked":
        return await _read_chunks(reader)
    return await reader.readexactly(int(headers.get("content-length", "0")))


def _parse_json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _parse_head(head: bytes) -> tuple[str, str, dict[str, str]]:
    first, *lines = head.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
    method, target, version = first.split(" ")
    if not version.startswith("HTTP/1."):
        raise _MalformedError(f"unknown version {version!r}")
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or name != name.strip():
            raise _MalformedError(f"bad header line {line!r}")
        key, value = name.lower(), value.strip()
        headers[key] = f"{headers[key]}, {value}" if key in headers else value
    return method, target, headers


async def read_request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> SeenRequest:
    """Reads one request whole; IncompleteReadError if it ends early, _MalformedError if it is no HTTP."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
        method, target, headers = _parse_head(head)
        body = await _read_body(reader, writer, headers)
    except (ValueError, asyncio.LimitOverrunError) as error:
        raise _MalformedError(str(error)) from error
    path, _, query = target.partition("?")
    return SeenRequest(method, path, dict(parse_qsl(query)), headers, body, _parse_json(body))


# ---------------------------------------------------------------------------------------------------------
# The server


class _Connection(asyncio.StreamReaderProtocol):
    """One connection; it answers requests one after the other and notices at once that the peer is gone."""

    def __init__(self, fake: FakeUpstream) -> None:
        self._fake = fake
        self._reader = asyncio.StreamReader(limit=_HEAD_LIMIT)
        self._call: SeenCall | None = None
        self._serving: asyncio.Task[None] | None = None
        super().__init__(self._reader, self._connected)

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # With these two, data that the peer does not read piles up neither here nor in the kernel.
        writer.transport.set_write_buffer_limits(high=0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        self._serving = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._fake._tasks.add(self._serving)
        self._serving.add_done_callback(self._fake._tasks.discard)

    def eof_received(self) -> bool | None:
        self._peer_gone()
        return super().eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._peer_gone()
        super().connection_lost(exc)

    def _peer_gone(self) -> None:
        call = self._call
        if call is None or call.finished.is_set() or self._fake._stopping:
            return
        call._cancel()
        if self._serving is not None:
            self._serving.cancel()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._fake.connections += 1
        try:
            while True:
                request = await read_request(reader, writer)
                await self._answer(request, writer)
                if request.headers.get("connection", "").lower() == "close":
                    break
        except (_HangUpError, ConnectionError, asyncio.IncompleteReadError):
            pass
        except _MalformedError as error:
            self._fake.errors.append(error)
            writer.write(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        except asyncio.CancelledError:
            writer.transport.abort()
            raise
        except Exception as error:
            self._call = None
            self._fake.errors.append(error)
        finally:
            writer.close()

    async def _answer(self, request: SeenRequest, writer: asyncio.StreamWriter) -> None:
        call = self._fake._begin(request)
        self._call = call
        try:
            if self._reader.at_eof():
                call._cancel()
                raise ConnectionResetError("the peer has closed already")
            await _answer(self._fake, call, writer)
            call._finish()
        finally:
            self._fake._end(call)


async def _answer(fake: FakeUpstream, call: SeenCall, writer: asyncio.StreamWriter) -> None:
    """Answers a request as its path and model want it."""
    request, model = call.request, call.model
    payload = request.json if isinstance(request.json, dict) else {}
    found = find_operation(request.method, request.path)
    operation = found[0] if found else ""
    x = Exchange(fake, call, Ask(operation, model, call.number, payload, request.body), writer)
    if not operation:
        await x.error(404, f"Unknown request URL: {request.method} {request.path}.", "unknown_url")
    elif operation != "models" and not model:
        await x.error(400, "You must provide a model parameter in a JSON body.", "missing_model")
    else:
        await fake.behaviour_of(x.ask)(x)


class FakeUpstream:
    """The fake server; a context manager that serves while it is entered. See the module's docstring.

    All public members may be used from any thread. With `record=False` nothing of what was seen is kept, for
    long runs under load.
    """

    def __init__(self, *, host: str = "127.0.0.1", port: int = 0, record: bool = True) -> None:
        self.host = host
        self.port = port
        self.record = record
        self.errors: list[BaseException] = []
        """Exceptions inside the fake itself, and requests that were no HTTP; empty if all went well."""
        self.connections = 0
        """Connections that were made so far."""
        self._changed = threading.Condition()
        self._calls: list[SeenCall] = []
        self._numbers = itertools.count(1)
        self._counts: Counter[str] = Counter()
        self._gate_open = False
        self._live: set[SeenCall] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False
        self._started = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._thread: threading.Thread | None = None

    # what tests use

    @property
    def base_url(self) -> str:
        """What a client takes as its base url, e.g. http://127.0.0.1:4321/v1."""
        return f"{self.origin}/v1"

    @property
    def origin(self) -> str:
        """The same without a path, e.g. as an Azure endpoint."""
        return f"http://{self.host}:{self.port}"

    @property
    def calls(self) -> list[SeenCall]:
        """The calls that have begun, in order; a copy."""
        with self._changed:
            return list(self._calls)

    @property
    def requests(self) -> list[SeenRequest]:
        """The requests that were read whole, in order; a copy."""
        return [call.request for call in self.calls]

    def wait_for_call(self, n: int = 1, timeout: float = 10) -> SeenCall:
        """The n-th call, as soon as it has begun; TimeoutError if it does not."""
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._calls) >= n, timeout):
                raise TimeoutError(f"call {n} did not begin within {timeout} s, {len(self._calls)} did")
            return self._calls[n - 1]

    def clear(self) -> None:
        """Forgets the requests and calls seen, and the counts of the flaky models."""
        with self._changed:
            self._calls.clear()
            self._counts.clear()

    def release(self) -> None:
        """Opens the gate for all calls begun, and for later ones until hold()."""
        self._in_loop(self._open_gate)

    def hold(self) -> None:
        """Closes the gate for later calls; it is closed at first."""
        self._in_loop(self._close_gate)

    def start(self) -> None:
        """Begins to serve; OSError if the port is taken."""
        self._thread = threading.Thread(target=self._run, name="fake-upstream", daemon=True)
        self._thread.start()
        self._started.wait()
        if self._loop is None:
            self._thread.join()
            raise self.errors.pop()

    def stop(self) -> None:
        """Resets what connections there are and stops serving."""
        if self._thread is not None and self._thread.is_alive():
            assert self._stop is not None
            self._in_loop(self._stop.set)
            self._thread.join()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # what a fake of another kind changes

    def behaviour_of(self, ask: Ask) -> Callable[[Exchange], Awaitable[None]]:
        """What answers a request: here its model alone decides."""
        return find_behaviour(ask.model)

    # inside the loop's thread

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except BaseException as error:
            self.errors.append(error)
        finally:
            self._started.set()

    async def _main(self) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._note_error)
        server = await loop.create_server(lambda: _Connection(self), self.host, self.port, backlog=1024)
        self.port = server.sockets[0].getsockname()[1]
        self._stop = asyncio.Event()
        self._loop = loop
        self._started.set()
        await self._stop.wait()
        self._stopping = True
        server.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for _ in range(3):
            await asyncio.sleep(0)  # a turn for the transports to close their sockets

    def _note_error(self, loop: asyncio.AbstractEventLoop, context: Doc) -> None:
        self.errors.append(context.get("exception") or RuntimeError(context["message"]))

    def _in_loop(self, function: Callable[[], object]) -> None:
        if self._loop is None:
            raise RuntimeError("the fake upstream is not running")
        self._loop.call_soon_threadsafe(function)

    def _begin(self, request: SeenRequest) -> SeenCall:
        call = SeenCall(request, next(self._numbers), find_model(request), _loop=self._loop)
        with self._changed:
            if self.record:
                self._calls.append(call)
            self._changed.notify_all()
        self._live.add(call)
        return call

    def _end(self, call: SeenCall) -> None:
        self._live.discard(call)
        call.ended.set()

    def _count(self, model: str) -> int:
        with self._changed:
            self._counts[model] += 1
            return self._counts[model]

    def _open_gate(self) -> None:
        self._gate_open = True
        for call in self._live:
            call._gate.set()

    def _close_gate(self) -> None:
        self._gate_open = False


def main(arguments: Sequence[str] | None = None) -> None:
    """Serves until SIGTERM or SIGINT; prints the base url first."""
    parser = argparse.ArgumentParser(description="A fake OpenAI-compatible server.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 (the default) takes a free one")
    options = parser.parse_args(arguments)
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    with FakeUpstream(host=options.host, port=options.port, record=False) as upstream:
        print(upstream.base_url, flush=True)
        ended.wait()


if __name__ == "__main__":
    main()
