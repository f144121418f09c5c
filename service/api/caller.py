"""The caller at the other end of the connection: notices when it leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Final, Self

from starlette.types import Receive

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
        self.gone = False

    @contextmanager
    def of_child(self) -> Iterator[None]:
        """For tasks that the watched task waits for: their cancellation, too, is the caller's leaving."""
        try:
            yield
        except asyncio.CancelledError:
            if self.gone:
                raise _gone() from None
            raise

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._cancelling = self._task.cancelling() if self._task else 0
        self._timer = loop.call_later(PATIENCE_SECONDS, self._begin)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        if self._watch is not None:
            self._watch.cancel()
        if self.gone and self._task is not None and self._task.uncancel() <= self._cancelling:
            if kind is asyncio.CancelledError:
                raise _gone() from None

    def _begin(self) -> None:
        self._watch = asyncio.get_running_loop().create_task(self._wait())

    async def _wait(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        if self._task is not None:
            self.gone = True
            self._task.cancel()


def _gone() -> CallerGone:
    return CallerGone("The caller closed the connection.")
