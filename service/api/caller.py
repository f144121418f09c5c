"""The caller at the other end of the connection: notices when it leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Final, Self

from starlette.types import Receive

from service.deadlines import Interrupt
from service.errors import CallerGone

PATIENCE_SECONDS: Final = 0.05
"""A request that is answered sooner is not watched: a task for each would cost more than it saves."""


class CallerWatch:
    """Raises CallerGone in the task that entered it once the caller has closed the connection.

    The request's body must have been read: from then on `receive` returns only for a disconnect.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._watch: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._interrupt = Interrupt()
        self._timer = self._loop.call_later(PATIENCE_SECONDS, self._begin)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        if self._watch is not None:
            self._watch.cancel()
        self._interrupt.translate(kind)

    @contextmanager
    def of_child(self) -> Iterator[None]:
        """For tasks that the watched task waits for: their cancellation, too, is the caller's leaving."""
        try:
            yield
        except asyncio.CancelledError:
            if self._interrupt.error is not None:
                raise self._interrupt.error from None
            raise

    def _begin(self) -> None:
        self._watch = self._loop.create_task(self._wait())

    async def _wait(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._interrupt.fire(CallerGone("The caller closed the connection."))
