"""Time limits that cost next to nothing while all goes well.

Setting and cancelling an event loop's timer for each request, or for each chunk of a stream, costs
more than the chunk. Here a limit is an entry in a dictionary, and one timer for all of them looks
forty times a second which are due; it rests while there are none.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from math import inf
from types import TracebackType
from typing import Final, Protocol, Self

from service.errors import WeirError


class Interrupt:
    """Ends what the current task waits for with an error of ours, as `asyncio.timeout` does with its own.

    `fire` cancels the task; `translate`, called where the waiting block is left, turns that
    cancellation into the error and leaves everybody else's cancellations alone.
    """

    __slots__ = ("_cancelling", "_task", "error")

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
        task, error = self._task, self.error
        self._task = self.error = None  # nothing fires any more, and no cycle keeps the request alive
        if task is None or error is None:
            return
        ours = task.uncancel() <= self._cancelling
        try:
            # A generator that is left in the middle of its `yield` sees the cancellation as its own closing.
            if ours and kind in (asyncio.CancelledError, GeneratorExit):
                raise error from None
        finally:
            del error


class Entry(Protocol):
    """What a `Sweep` wakes when it is due."""

    def due(self, now: float) -> float | None:
        """Act if it is time; return when to look again, or None for never."""
        ...


class Sweep:
    """Wakes entries at their time, up to `PERIOD_SECONDS` late. For one event loop; not for threads."""

    PERIOD_SECONDS: Final = 0.025

    def __init__(self) -> None:
        self._entries: dict[Entry, float] = {}
        self._timer: asyncio.TimerHandle | None = None

    def add(self, entry: Entry, at: float) -> None:
        """Wake `entry` at `at`, in the loop's time."""
        self._entries[entry] = at
        if self._timer is None:
            self._arm()

    def discard(self, entry: Entry) -> None:
        self._entries.pop(entry, None)

    def __len__(self) -> int:
        return len(self._entries)

    def _arm(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self.PERIOD_SECONDS, self._look)

    def _look(self) -> None:
        now = asyncio.get_running_loop().time()
        for entry in [entry for entry, at in self._entries.items() if at <= now]:
            again = entry.due(now)
            if again is None:
                self._entries.pop(entry, None)
            elif entry in self._entries:
                self._entries[entry] = again
        if self._entries:
            self._arm()
        else:
            self._timer = None


class Deadline:
    """Raises what `error` makes in the task that entered it, at `at` in the loop's time."""

    __slots__ = ("_at", "_error", "_interrupt", "_sweep")

    def __init__(self, sweep: Sweep, at: float, error: Callable[[], WeirError]) -> None:
        self._sweep = sweep
        self._at = at
        self._error = error

    def __enter__(self) -> Self:
        self._interrupt = Interrupt()
        self._sweep.add(self, self._at)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._sweep.discard(self)
        self._interrupt.translate(kind)

    def due(self, now: float) -> float | None:
        self._interrupt.fire(self._error())
        return None


class IdleTimeout:
    """Raises what `error` makes in the task that entered it when one wait lasts longer than `seconds`.

    Only the time between `waiting()` and `arrived()` counts: while a slow reader holds back the
    stream nobody waits for the upstream. With an `end`, in the loop's time, all is over then, whoever
    is slow, and what `over` makes is raised.
    """

    __slots__ = ("_end", "_error", "_interrupt", "_now", "_over", "_seconds", "_since", "_sweep")

    def __init__(
        self,
        sweep: Sweep,
        seconds: float,
        error: Callable[[], WeirError],
        *,
        end: float | None = None,
        over: Callable[[], WeirError] | None = None,
    ) -> None:
        self._sweep = sweep
        self._seconds = seconds
        self._error = error
        self._end = inf if end is None else end
        self._over = over or error
        self._since: float | None = None

    def __enter__(self) -> Self:
        self._now = asyncio.get_running_loop().time
        self._interrupt = Interrupt()
        self._sweep.add(self, min(self._now() + self._seconds, self._end))
        return self

    def waiting(self) -> None:
        self._since = self._now()

    def arrived(self) -> None:
        self._since = None

    def __exit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._sweep.discard(self)
        self._interrupt.translate(kind)

    def due(self, now: float) -> float | None:
        since = self._since if self._since is not None else now
        if now < self._end and since + self._seconds > now:
            return min(since + self._seconds, self._end)
        self._interrupt.fire(self._over() if now >= self._end else self._error())
        return None
