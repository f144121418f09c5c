"""The caller at the other end of the connection: notices when it leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Final, Self

from starlette.types import Receive

from service.deadlines import Interrupt, Sweep
from service.errors import CallerGone

PATIENCE_SECONDS: Final = 0.05
"""A request that is answered sooner is not watched: a task for each would cost more than it saves."""


class CallerWatch:
    """Raises CallerGone in the task that entered it once the caller has closed the connection.

    The request's body must have been read: from then on `receive` returns only for a disconnect.
    """

    __slots__ = ("_interrupt", "_receive", "_sweep", "_watch")

    def __init__(self, receive: Receive, sweep: Sweep) -> None:
        self._receive = receive
        self._sweep = sweep
        self._watch: asyncio.Task[None] | None = None

    def __enter__(self) -> Self:
        self._interrupt = Interrupt()
        self._sweep.add(self, asyncio.get_running_loop().time() + PATIENCE_SECONDS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._sweep.discard(self)
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
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

    def due(self, now: float) -> float | None:
        self._watch = asyncio.get_running_loop().create_task(self._wait())
        return None

    async def _wait(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._interrupt.fire(CallerGone("The caller closed the connection."))
