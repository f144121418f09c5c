"""Time limits that cost next to nothing while all goes well.

A timer that is set anew for each chunk of a stream costs more than the chunk. `IdleTimeout` notes
the time instead, and its one timer looks at that note when it fires.
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self

from service.errors import WeirError


class Interrupt:
    """Ends what the current task waits for with an error of ours, as `asyncio.timeout` does with its own.

    `fire` cancels the task; `translate`, called where the waiting block is left, turns that
    cancellation into the error and leaves everybody else's cancellations alone.
    """

    def __init__(self) -> None:
        self._task = asyncio.current_task()
        self._cancelling = self._task.cancelling() if self._task else 0
        self.error: WeirError | None = None

    def fire(self, error: WeirError) -> None:
        if self._task is not None and self.error is None:
            self.error = error
            self._task.cancel()

    def translate(self, kind: type[BaseException] | None) -> None:
        """Raises the error, if it was fired and `kind` is the cancellation that it caused."""
        if self._task is None or self.error is None:
            return
        ours = self._task.uncancel() <= self._cancelling
        if ours and kind is asyncio.CancelledError:
            raise self.error from None


class IdleTimeout:
    """Raises `error` in the task that entered it when one wait lasts longer than `seconds`.

    Only the time between `waiting()` and `arrived()` counts: while a slow reader holds back the
    stream nobody waits for the upstream.
    """

    def __init__(self, seconds: float, error: WeirError) -> None:
        self._seconds = seconds
        self._error = error
        self._since: float | None = None

    def __enter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._interrupt = Interrupt()
        self._timer = self._loop.call_later(self._seconds, self._look)
        return self

    def waiting(self) -> None:
        self._since = self._loop.time()

    def arrived(self) -> None:
        self._since = None

    def __exit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        self._interrupt.translate(kind)

    def _look(self) -> None:
        now = self._loop.time()
        since = self._since if self._since is not None else now
        left = since + self._seconds - now
        if left > 0:
            self._timer = self._loop.call_later(left, self._look)
        else:
            self._interrupt.fire(self._error)
