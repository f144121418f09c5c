"""Open circuits, told from process to process: what one has found failing the others need not find out.

Never in the way of a request: changes are noted, and a task of its own tells them, and asks once a second.
While the store is away each process goes by what it sees itself.

A process that cannot reach an upstream for reasons of its own would take it away from all others, again and
again. So nobody is believed twice: where a circuit was opened because another process said so, and the place
was then found well, only what this process sees itself counts for `DOUBT_SECONDS`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Final

import structlog

from service.errors import StateUnavailable
from service.ports import Circuits, PlaceName
from service.routing.breaker import Breaker, Cause, Circuit
from service.routing.catalogue import Conditions

log = structlog.get_logger("weir")

READ_SECONDS: Final = 1.0
DOUBT_SECONDS: Final = 300.0
SLACK_SECONDS: Final = 0.25
"""An entry may go so long before this process' own time is over: it came by way of the store."""


class CircuitSharing:
    """Tells what the breakers of `conditions` find, and opens those that others have opened."""

    def __init__(
        self, conditions: Conditions, circuits: Circuits, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._conditions = conditions
        self._circuits = circuits
        self._clock = clock
        self._changes: dict[PlaceName, float | None] = {}
        """What was not told yet: until when each is open, None for one that was closed."""
        self._told: set[PlaceName] = set()
        """Open here because others said so."""
        self._doubted: dict[PlaceName, float] = {}
        self._listening = True
        self._wake = asyncio.Event()
        self._and_then = conditions.on_change
        conditions.on_change = self._changed

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(READ_SECONDS):
                    await self._wake.wait()
            self._wake.clear()
            try:
                await self.exchange()
            except Exception:  # a fault of ours, or of what is stored, must not end a process that serves
                log.exception("circuits_not_shared")

    async def exchange(self) -> None:
        """Tell what is to be told and do as others say."""
        if not self._circuits.available:
            return
        now, changes = self._clock(), self._changes
        self._changes = {}
        opened = {name: until - now for name, until in changes.items() if until is not None and until > now}
        closed = [name for name, until in changes.items() if until is None]
        try:
            found = await self._circuits.exchange(opened, closed)
        except StateUnavailable:
            self._changes = changes | self._changes
            return
        # What has changed here meanwhile is newer than what was found.
        self._follow({name: seconds for name, seconds in found.items() if name not in self._changes})

    def _follow(self, found: Mapping[PlaceName, float]) -> None:
        now = self._clock()
        self._doubted = {name: until for name, until in self._doubted.items() if until > now}
        self._listening = False
        try:
            for name in self._told - found.keys():
                breaker = self._breaker(name)
                if breaker is None or breaker.state is Circuit.CLOSED:
                    self._told.discard(name)
                elif _told(breaker) and breaker.open_seconds > SLACK_SECONDS:  # another one has closed it
                    self._told.discard(name)
                    self._doubted[name] = now + DOUBT_SECONDS
                    breaker.close()
            for name, seconds in found.items():
                breaker = self._breaker(name)
                if breaker is None or name in self._doubted:
                    continue
                if breaker.state is Circuit.CLOSED or (_told(breaker) and seconds > breaker.open_seconds):
                    self._told.add(name)
                    breaker.open_for(seconds, Cause.FLEET)
        finally:
            self._listening = True

    def _breaker(self, name: PlaceName) -> Breaker | None:
        condition = self._conditions.find(*name)
        return condition.breaker if condition is not None else None

    def _changed(self, upstream: str, model: str, state: Circuit) -> None:
        self._and_then(upstream, model, state)
        name = (upstream, model)
        breaker = self._breaker(name)
        if not self._listening or breaker is None:
            return
        now = self._clock()
        if state is Circuit.OPEN and breaker.cause is Cause.FAILURES:
            self._told.discard(name)
            self._doubted.pop(name, None)
            self._changes[name] = now + breaker.open_seconds
        elif state is Circuit.CLOSED:
            if name in self._told:
                self._told.discard(name)
                self._doubted[name] = now + DOUBT_SECONDS
            self._changes[name] = None
        else:
            return
        self._wake.set()


def _told(breaker: Breaker) -> bool:
    return breaker.state is Circuit.OPEN and breaker.cause is Cause.FLEET
