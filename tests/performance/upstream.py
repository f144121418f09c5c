"""The fake upstream: an OpenAI-shaped server that costs next to nothing, since its answers are ready bytes.

The model's name says what comes: `paced-50-N` streams N tokens at 50 a second, `fast-N` streams N tokens
as fast as the socket takes them, any other name gets a whole answer of about 1 KB.
Run as `python -m tests.performance.upstream`: it prints its port and ends when its standard input does.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from typing import Any, Final, cast

import uvloop

TOKENS_PER_SECOND: Final = 50
EVENTS_BESIDE_TOKENS: Final = 4
"""Role, finish reason, usage (if asked for) and [DONE]."""

_PHASES: Final = 10
"""Streams do not tick all at once: each belongs to one of so many phases of a token's time."""
_BLOCK_TOKENS: Final = 64
_STREAMED: Final = re.compile(rb'"model"\s*:\s*"(paced-50|fast)-(\d+)"')
_CONTENT_LENGTH: Final = re.compile(rb"\r\ncontent-length:\s*(\d+)", re.IGNORECASE)

_MODEL: Final = "gpt-4o-mini-2024-07-18"
_USAGE: Final = {
    "prompt_tokens": 96,
    "completion_tokens": 128,
    "total_tokens": 224,
    "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
    "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0},
}
_TEXT: Final = (
    "A weir lets a river through and measures it; it holds back nothing but the haste of the water. "
)


def _compact(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _http(body: bytes, *, status: bytes = b"200 OK") -> bytes:
    head = b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    return head % (status, len(body)) + body


def _framed(data: bytes) -> bytes:
    """One server-sent event as one chunk of a chunked body."""
    event = b"data: " + data + b"\n\n"
    return b"%x\r\n%b\r\n" % (len(event), event)


def _chunk(delta: dict[str, str] | None, finish: str | None = None, usage: Any = None) -> bytes:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    return _framed(
        _compact(
            {
                "id": "chatcmpl-bench",
                "object": "chat.completion.chunk",
                "created": 1700000000,
                "model": _MODEL,
                "system_fingerprint": "fp_bench",
                "choices": [] if delta is None else [choice],
                "usage": usage,
            }
        )
    )


_WHOLE: Final = _http(
    _compact(
        {
            "id": "chatcmpl-bench",
            "object": "chat.completion",
            "created": 1700000000,
            "model": _MODEL,
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": _TEXT * 6, "refusal": None},
                    "logprobs": None,
                    "finish_reason": "stop",
                }
            ],
            "usage": _USAGE,
            "service_tier": "default",
            "system_fingerprint": "fp_bench",
        }
    )
)
_MODEL_ENTRY: Final = {"id": _MODEL, "object": "model", "created": 0, "owned_by": "bench"}
_MODELS: Final = _http(_compact({"object": "list", "data": [_MODEL_ENTRY]}))
_NOT_FOUND: Final = _http(b'{"error":{"message":"no such path"}}', status=b"404 Not Found")
_NO_LENGTH: Final = _http(b'{"error":{"message":"no content-length"}}', status=b"411 Length Required")
_START: Final = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncache-control: no-cache\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
) + _chunk({"role": "assistant", "content": ""})
_TOKEN: Final = _chunk({"content": " water"})
_BLOCK: Final = _TOKEN * _BLOCK_TOKENS
_FINISH: Final = _chunk({}, finish="stop")
_USAGE_CHUNK: Final = _chunk(None, usage=_USAGE)
_DONE: Final = _framed(b"[DONE]") + b"0\r\n\r\n"


class _Connection(asyncio.Protocol):
    """One keep-alive connection; at most one stream runs on it at a time."""

    transport: asyncio.Transport

    def __init__(self, server: FakeUpstream) -> None:
        self._server = server
        self._pending = b""
        self._tokens_left = 0
        self._end = b""
        self._fast = False
        self._paused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's are not of that class

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.pacer.remove(self)

    def data_received(self, data: bytes) -> None:
        data = self._pending + data
        head_end = data.find(b"\r\n\r\n")
        if head_end < 0:
            self._pending = data
            return
        if data.startswith(b"GET "):
            self._pending = b""
            self.transport.write(self._server.get(data.split(b" ", 2)[1]))
            return
        length = _CONTENT_LENGTH.search(data, 0, head_end)
        if length is None:
            self.transport.write(_NO_LENGTH)
            self.transport.close()
            return
        body_start = head_end + 4
        if len(data) - body_start < int(length[1]):
            self._pending = data
            return
        self._pending = b""
        self._answer(data, body_start)

    def _answer(self, data: bytes, body_start: int) -> None:
        self._server.calls += 1
        streamed = _STREAMED.search(data, body_start)
        if streamed is None:
            self.transport.write(_WHOLE)
            return
        self._tokens_left = int(streamed[2])
        asked = data.find(b"include_usage", body_start) >= 0
        self._end = _FINISH + (_USAGE_CHUNK if asked else b"") + _DONE
        self._fast = streamed[1] == b"fast"
        self.transport.write(_START)
        if self._fast:
            self._pour()
        else:
            self._server.pacer.add(self)

    def next_token(self) -> bool:
        """Sends one token, with the last one the stream's end; False if that was the last."""
        self._tokens_left -= 1
        if self._tokens_left > 0:
            self.transport.write(_TOKEN)
            return True
        self.transport.write(_TOKEN + self._end)
        return False

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        if self._fast:
            self._pour()

    def _pour(self) -> None:
        while self._fast and not self._paused:
            tokens = min(self._tokens_left, _BLOCK_TOKENS)
            self._tokens_left -= tokens
            block = _BLOCK if tokens == _BLOCK_TOKENS else _TOKEN * tokens
            self._fast = self._tokens_left > 0
            self.transport.write(block if self._fast else block + self._end)


class _Pacer:
    """One timer for all paced streams. It goes by absolute time, so a late tick is caught up with."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._groups: list[set[_Connection]] = [set() for _ in range(_PHASES)]
        self._turn = 0
        self._added = 0
        self._next_at: float | None = None

    def add(self, stream: _Connection) -> None:
        self._groups[self._added % _PHASES].add(stream)
        self._added += 1
        if self._next_at is None:
            self._next_at = self._loop.time()
            self._schedule(self._next_at)

    def remove(self, stream: _Connection) -> None:
        for group in self._groups:
            group.discard(stream)

    def _schedule(self, after: float) -> None:
        self._next_at = after + 1 / TOKENS_PER_SECOND / _PHASES
        self._loop.call_at(self._next_at, self._tick)

    def _tick(self) -> None:
        group = self._groups[self._turn]
        for stream in tuple(group):
            if not stream.next_token():
                group.discard(stream)
        self._turn = (self._turn + 1) % _PHASES
        if any(self._groups) and self._next_at is not None:
            self._schedule(self._next_at)
        else:
            self._next_at = None


class FakeUpstream:
    """What all connections share: the pacer and the count of calls answered."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.pacer = _Pacer(loop)
        self.calls = 0

    def get(self, path: bytes) -> bytes:
        if path == b"/calls":
            return _http(b"%d" % self.calls)
        return _MODELS if path == b"/v1/models" else _NOT_FOUND


async def _serve() -> None:
    loop = asyncio.get_running_loop()
    upstream = FakeUpstream(loop)
    server = await loop.create_server(lambda: _Connection(upstream), "127.0.0.1", 0, backlog=1024)
    ended = asyncio.Event()
    stdin = sys.stdin.fileno()
    loop.add_reader(stdin, lambda: None if os.read(stdin, 1024) else ended.set())
    print(server.sockets[0].getsockname()[1], flush=True)
    await ended.wait()
    loop.remove_reader(stdin)
    server.close()


if __name__ == "__main__":
    uvloop.run(_serve())
