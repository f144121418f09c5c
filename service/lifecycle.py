"""Where the process stands: started, alive, ready, draining. Written by the main loop, read by probes.

Liveness is the age of the main loop's heartbeat and nothing else; readiness knows no upstream and no
store, because a slow one must not take every pod out of service.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

BEAT_SECONDS: Final = 0.5


class Lifecycle:
    """One process's state. Single attributes are set and read, so threads need no lock."""

    def __init__(
        self, liveness_timeout_seconds: float = 30.0, on_beat: Callable[[Lifecycle], None] | None = None
    ) -> None:
        self.started = False
        self.draining = False
        self.loop_lag_seconds = 0.0
        self._timeout = liveness_timeout_seconds
        self._beat_at = time.monotonic()
        self._on_beat = on_beat

    @property
    def heartbeat_age_seconds(self) -> float:
        return time.monotonic() - self._beat_at

    @property
    def alive(self) -> bool:
        return self.heartbeat_age_seconds < self._timeout

    @property
    def ready(self) -> bool:
        return self.started and not self.draining and self.alive

    async def beat(self, tell: Callable[[float], None] | None = None) -> None:
        """Beat until cancelled; how late each beat comes is the loop's lag, told to `tell`."""
        while True:
            self._beat_at = time.monotonic()
            if tell is not None:
                tell(self.loop_lag_seconds)
            if self._on_beat is not None:
                self._on_beat(self)
            await asyncio.sleep(BEAT_SECONDS)
            self.loop_lag_seconds = max(time.monotonic() - self._beat_at - BEAT_SECONDS, 0.0)
