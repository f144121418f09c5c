"""A circuit breaker for one model at one upstream: who fails is left alone for a while.

Closed, it counts the ends of calls over a rolling window, and opens when enough of them failed. Open, nobody
is sent there until a pause is over; then one call at a time is let through to see. If that goes well the
breaker closes, else the pause doubles.

Each call has a ticket of the state in which it began. What ends after the state has changed says nothing of
the new one: the late failures of an outage must not open the circuit again, nor may a call that outlived it
take the place of the one that is let through.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from enum import StrEnum
from typing import Final

SLICES: Final = 10
"""Of the window: what is older than it leaves in pieces of a tenth."""
PAUSE_MOST_SECONDS: Final = 60.0


class Circuit(StrEnum):
    """The states of a breaker."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class Cause(StrEnum):
    """Why a breaker is open."""

    FAILURES = "failures"
    """Calls of this process failed."""
    FLEET = "fleet"
    """Those of another process did."""
    ASKED = "asked"
    """The upstream named a time: it is well, and wants no calls before."""


class _Slice:
    __slots__ = ("at", "calls", "failures")

    def __init__(self, at: int) -> None:
        self.at = at
        self.calls = 0
        self.failures = 0


class Breaker:
    """Opens at `failure_ratio` of at least `min_calls` in `window_seconds`."""

    def __init__(
        self,
        *,
        window_seconds: float = 30.0,
        min_calls: int = 5,
        failure_ratio: float = 0.5,
        pause_seconds: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
        on_change: Callable[[Circuit], None] = lambda _: None,
    ) -> None:
        self._slice_seconds = window_seconds / SLICES
        self._min_calls = min_calls
        self._ratio = failure_ratio
        self._first_pause = pause_seconds
        self._clock = clock
        self._on_change = on_change
        self._slices: deque[_Slice] = deque()
        self._pause = pause_seconds
        self._open_until = 0.0
        self._probing = False
        self._ticket = 0
        self.state = Circuit.CLOSED
        self.cause = Cause.FAILURES
        """Of its last opening."""

    @property
    def admits(self) -> bool:
        """Whether a call may be sent now. Nothing is counted by asking."""
        return self.admits_in(0.0)

    def admits_in(self, seconds: float) -> bool:
        """The same in so many seconds, as far as is known now."""
        if self.state is Circuit.CLOSED:
            return True
        return self._clock() + seconds >= self._open_until and not self._probing

    @property
    def shown(self) -> Circuit:
        """The state as people see it: past its pause it waits for a call and turns nobody away."""
        past = self.state is Circuit.OPEN and self._clock() >= self._open_until
        return Circuit.HALF_OPEN if past else self.state

    @property
    def open_seconds(self) -> float:
        """Until the next call may be tried; 0 when one may now."""
        return 0.0 if self.admits else max(self._open_until - self._clock(), 0.0)

    def begin(self) -> int:
        """A call is sent: past the pause of an open breaker it is the one that finds out. Its ticket."""
        if self.state is not Circuit.CLOSED:
            if self.state is Circuit.OPEN and self._clock() >= self._open_until:
                self._change(Circuit.HALF_OPEN)
            if self.state is Circuit.HALF_OPEN:
                self._probing = True
        return self._ticket

    def succeeded(self, ticket: int) -> None:
        if ticket != self._ticket:
            return
        if self.state is Circuit.CLOSED:
            self._count(failed=False)
        elif self.state is Circuit.HALF_OPEN:
            self.close()

    def failed(self, ticket: int) -> None:
        if ticket != self._ticket:
            return
        if self.state is Circuit.HALF_OPEN:
            self._pause = min(self._pause * 2, PAUSE_MOST_SECONDS)
            self.open_for(self._pause)
        elif self.state is Circuit.CLOSED:
            self._count(failed=True)
            self._look()

    def broke(self, ticket: int) -> None:
        """A call that had succeeded failed after all, in the middle of its stream: it is no second call."""
        if ticket == self._ticket and self.state is Circuit.CLOSED:
            self._count(failed=True, calls=0)
            self._look()

    def left(self, ticket: int) -> None:
        """A call ended without telling anything of the upstream: its caller left."""
        if ticket == self._ticket:
            self._probing = False

    def open_for(self, seconds: float, cause: Cause = Cause.FAILURES) -> None:
        """Open now, and no sooner than it would have been: also for who is told so."""
        self._open_until = max(self._open_until, self._clock() + seconds)
        self._probing = False
        if cause is Cause.FAILURES or self.state is not Circuit.OPEN:
            self.cause = cause
        self._slices.clear()
        self._change(Circuit.OPEN)

    def close(self) -> None:
        self._open_until, self._probing, self._pause = 0.0, False, self._first_pause
        self._slices.clear()
        self._change(Circuit.CLOSED)

    def mute(self) -> None:
        """Tell nobody of further changes."""
        self._on_change = lambda _: None

    def _look(self) -> None:
        calls = sum(s.calls for s in self._slices)
        failures = sum(s.failures for s in self._slices)
        if calls >= self._min_calls and failures >= calls * self._ratio:
            self.open_for(self._pause)

    def _count(self, *, failed: bool, calls: int = 1) -> None:
        now = int(self._clock() / self._slice_seconds)
        while self._slices and self._slices[0].at <= now - SLICES:
            self._slices.popleft()
        if not self._slices or self._slices[-1].at != now:
            self._slices.append(_Slice(now))
        latest = self._slices[-1]
        latest.calls += calls
        latest.failures += failed

    def _change(self, state: Circuit) -> None:
        if state is not self.state:
            self.state = state
            self._ticket += 1
            self._on_change(state)
