"""Server-Sent Events to callers: framing, comments during silence, errors after the beginning."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Final

import msgspec
from starlette.types import Send

from service.api.context import Dialect, RequestContext
from service.errors import WeirError

HEADERS: Final = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    # Proxies must neither keep, nor compress, nor collect the stream.
    (b"cache-control", b"no-cache, no-transform"),
    (b"x-accel-buffering", b"no"),
)
COMMENT: Final = b": keep-alive\n\n"


async def send_stream(
    send: Send,
    context: RequestContext,
    dialect: Dialect,
    events: AsyncGenerator[bytes],
    *,
    keepalive_seconds: float,
    headers: tuple[tuple[bytes, bytes], ...] = (),
) -> None:
    """Send the head, then `events` as they come. What `events` raises comes out of here.

    `send` waits while the caller reads slowly, so nothing more is taken from `events` meanwhile.
    """
    context.dialect = dialect
    await send({"type": "http.response.start", "status": 200, "headers": [*HEADERS, *headers]})
    silence = _Silence(send, keepalive_seconds)
    try:
        async with aclosing(events):
            async for block in events:
                if block:
                    await silence.broken()
                    await send({"type": "http.response.body", "body": block, "more_body": True})
                    silence.begins()
    finally:
        await silence.over()
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def event(data: Any) -> bytes:
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


def error_event(dialect: Dialect, error: WeirError) -> bytes:
    """The error as the official SDK raises it out of a running stream."""
    body = error.body()
    if dialect is Dialect.RESPONSES:
        detail = body["error"]
        named = {"type": "error", "code": detail["code"], "message": detail["message"], "param": None}
        return b"event: error\n" + event({**named, "sequence_number": 0, **body})
    if dialect is Dialect.NATIVE:
        return event({**body, "finished": True})
    return event(body)


class _Silence:
    """Sends a comment for each `seconds` without an event, so that no proxy takes the stream for dead."""

    def __init__(self, send: Send, seconds: float) -> None:
        self._send = send
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._comment: asyncio.Task[None] | None = None
        self._since: float | None = self._loop.time()
        self._timer = self._loop.call_later(seconds, self._look)

    def begins(self) -> None:
        self._since = self._loop.time()

    async def broken(self) -> None:
        """An event is about to be sent: let a comment that is on its way go first."""
        self._since = None
        if self._comment is not None:
            await self._comment
            self._comment = None

    async def over(self) -> None:
        self._timer.cancel()
        if self._comment is not None:
            self._comment.cancel()
            await asyncio.wait((self._comment,))

    def _look(self) -> None:
        now = self._loop.time()
        left = self._since + self._seconds - now if self._since is not None else self._seconds
        busy = self._comment is not None and not self._comment.done()
        if left <= 0 and not busy:
            self._comment = self._loop.create_task(self._say())
            self._since, left = now, self._seconds
        self._timer = self._loop.call_later(max(left, 0.001), self._look)

    async def _say(self) -> None:
        await self._send({"type": "http.response.body", "body": COMMENT, "more_body": True})
