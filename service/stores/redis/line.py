"""One connection to one Redis, which carries all calls of this process at the same time.

redis-py connects: it knows TLS, passwords and Sentinels. From then on the connection is ours. What is asked
for in one round of the event loop leaves in one piece; an answer belongs to the oldest call that has none.

A time limit is counted in ticks and not by the clock. However late a tick comes, it counts once, and between
two of them the event loop has read what had arrived. So a process that was held up for a second has waited
for Redis for one tick.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Coroutine
from itertools import islice
from typing import Any, Final, TypeVar, cast

from hiredis import Reader
from redis.asyncio.connection import AbstractConnection, DefaultParser
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import InvalidResponse

TICKS: Final = 8
"""In one time limit. An answer is late after so many of them, and after one more at most."""
_NOTHING: Final = object()

_Result = TypeVar("_Result")


class Line(asyncio.Protocol):
    """Connects when it is made. No call ever raises: its answer is then the error, Redis' own or ours."""

    def __init__(self, connection: AbstractConnection, timeout_seconds: float) -> None:
        self.usable = True
        """New calls may be sent."""
        self.closed = False
        self.opened = False
        """It was connected, so that calls may have been sent."""
        self.known: set[str] = set()
        """The scripts that were sent in full, by their hash."""
        self._loop = asyncio.get_running_loop()
        self._connection = connection
        self._transport: asyncio.WriteTransport | None = None
        self._reader = Reader(
            protocolError=InvalidResponse, replyError=DefaultParser.parse_error, notEnoughData=_NOTHING
        )
        self._unsent: list[bytes] = []
        self._flushing = False
        self._calls: deque[asyncio.Future[Any]] = deque()
        """Those without an answer, the oldest first. One whose caller has gone keeps its place."""
        self._answered = 0
        self._tick_seconds = timeout_seconds / TICKS
        self._ticks: deque[int] = deque()
        """How many calls there had been at each of the latest ticks."""
        self._timer: asyncio.TimerHandle | None = None
        self._error: Exception | None = None
        self._opening = self._loop.create_task(self._open())
        self._closing: asyncio.Task[None] | None = None

    def ask(self, command: bytes) -> asyncio.Future[Any]:
        """The answer to come. The command is sent whatever becomes of the caller."""
        answer = self._loop.create_future()
        self._calls.append(answer)
        self._unsent.append(command)
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)
        if self._timer is None:
            self._timer = self._loop.call_later(self._tick_seconds, self._tick)
        return answer

    async def connected(self) -> None:
        """Raises what went wrong."""
        await asyncio.wait({self._opening})
        if self._error is not None:
            raise self._error

    def retire(self) -> None:
        """Take no more calls, and close after the last answer."""
        self.usable = False
        if not self._calls:
            self._end(RedisConnectionError("The connection is not used any more."))

    def end(self) -> None:
        """Close now; what has no answer yet is late."""
        self._end(TimeoutError("Redis did not answer in time."))

    async def aclose(self) -> None:
        self.end()
        if self._closing is not None:
            await asyncio.gather(self._opening, self._closing, return_exceptions=True)

    # -- connecting and sending ------------------------------------------------------------------

    async def _open(self) -> None:
        try:
            await self._connection.connect()  # type: ignore[no-untyped-call]
        except Exception as error:  # noqa: BLE001 - each call gets it as its answer
            self._end(error)
            return
        # redis-py reads by a stream, which wakes a task for each piece: several times the cost of a call.
        writer = cast("asyncio.StreamWriter", self._connection._writer)  # noqa: SLF001
        self._transport = writer.transport
        self._transport.set_protocol(self)
        self.opened = True
        self._flush()

    def _flush(self) -> None:
        self._flushing = False
        if self._transport is not None and self._unsent:
            self._transport.write(b"".join(self._unsent))
            self._unsent.clear()

    # -- answers ---------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        calls, read = self._calls, self._reader.gets
        try:
            self._reader.feed(data)
            while (answer := read()) is not _NOTHING:
                call = calls.popleft()
                self._answered += 1
                if not call.done():
                    call.set_result(answer)
        except (InvalidResponse, IndexError):  # an answer that nobody can read, or that nobody asked for
            self._end(RedisConnectionError("The server does not speak Redis' protocol."))
        if not (self.usable or calls):
            self.retire()

    def connection_lost(self, error: Exception | None) -> None:
        self._end(RedisConnectionError("The server closed the connection."))

    def _tick(self) -> None:
        if not self._calls:
            self._timer = None
            self._ticks.clear()
            return
        self._timer = self._loop.call_later(self._tick_seconds, self._tick)
        self._ticks.append(self._answered + len(self._calls))
        if len(self._ticks) > TICKS and (late := self._ticks.popleft() - self._answered) > 0:
            self._give_up(late)

    def _give_up(self, late: int) -> None:
        """The oldest are late. The others keep their time, but new calls go elsewhere: this may be dead."""
        error = TimeoutError("Redis did not answer in time.")
        self.usable = False
        if self._transport is None or late == len(self._calls):
            self._end(error)
            return
        for call in islice(self._calls, late):
            if not call.done():
                call.set_result(error)

    def _end(self, error: Exception) -> None:
        if self.closed:
            return
        self.usable, self.closed, self._error = False, True, error
        if self._timer is not None:
            self._timer.cancel()
        if self._transport is not None:
            self._transport.abort()
        elif not self._opening.done():
            self._opening.cancel()
        for call in self._calls:
            if not call.done():
                call.set_result(error)
        self._calls.clear()
        self._unsent.clear()
        # It would complain of a connection that was never closed.
        self._closing = self._loop.create_task(self._connection.disconnect(nowait=True))


async def patiently(work: Coroutine[Any, Any, _Result], timeout_seconds: float) -> _Result:
    """What `work` returns; TimeoutError if it is not done within so many seconds, counted in ticks."""
    task = asyncio.ensure_future(work)
    try:
        for _ in range(TICKS):
            if (await asyncio.wait({task}, timeout=timeout_seconds / TICKS))[0]:
                return task.result()
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
    raise TimeoutError("It was not done in time.")
