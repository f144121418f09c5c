"""Writes that wait for Redis in the order in which they came: bounded, and counted above the bound."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any, Final, NamedTuple

import structlog

from service.errors import StateRefused, StateUnavailable
from service.stores.redis.link import Link, Script

CLOSING_SECONDS: Final = 3.0
"""For what still waits when the process ends."""
FAULT_SECONDS: Final = 1.0
MOST_TOGETHER: Final = 100
"""Writes in one round trip: one by one they would not keep up with those that come meanwhile."""

log = structlog.get_logger("weir")


class Write(NamedTuple):
    """A repeatable script, and what to run it with; writes of one lane stay about in their order."""

    feature: str
    lane: str
    script: Script
    keys: Sequence[str]
    arguments: Sequence[Any]


class Backlog:
    """At most `most` writes; what comes above it is dropped and told to `on_drop` by its feature's name."""

    def __init__(self, link: Link, most: int) -> None:
        self._link = link
        self._most = most
        self.on_drop: Callable[[str], None] = lambda _: None
        self._waiting: deque[Write] = deque()
        self._lanes: Counter[str] = Counter()
        """How many wait in each lane; and how many of them are on their way just now."""
        self._sent: Counter[str] = Counter()
        self._together = MOST_TOGETHER
        self._filled = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    def holds(self, lane: str) -> bool:
        """Whether a write of this lane waits or is on its way."""
        return self._lanes[lane] > 0

    def start(self) -> None:
        self._task = asyncio.create_task(self._empty())

    async def close(self) -> None:
        """Write what waits, if Redis takes it in time; what is lost is said."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        try:
            async with asyncio.timeout(CLOSING_SECONDS):
                while self._waiting:
                    await self._link.back.wait()
                    with suppress(StateUnavailable):
                        await self._write_some()
        except TimeoutError:
            log.error("backlog_lost", writes=len(self._waiting))
            for write in self._waiting:
                self.on_drop(write.feature)

    async def write(self, write: Write) -> Any:
        """Now, if Redis takes it, and what its script returns; else later, and None.

        While older writes of its lane wait it waits too, so that they stay in order. Those that are sent
        just now do not count: else the last of them would never have been written while others come.
        """
        if self._lanes[write.lane] <= self._sent[write.lane]:
            try:
                return await self._link.run(write.script, write.keys, write.arguments)
            except StateUnavailable:
                pass
            except asyncio.CancelledError:  # the request's end is no reason to lose what it wrote
                self._keep(write)
                raise
        self._keep(write)
        return None

    async def write_all(self, writes: Sequence[Write]) -> None:
        """In one round trip, unless older writes wait; those that Redis does not take now are kept.

        All are sent before anything is waited for: a caller who is cancelled loses none of them.
        """
        if len(writes) == 1:  # nearly always, and this is the shorter way
            await self.write(writes[0])
            return
        late = list(writes)
        if all(self._lanes[write.lane] <= self._sent[write.lane] for write in writes):
            try:
                answers = await self._link.run_in_order([(w.script, w.keys, w.arguments) for w in writes])
                late = [w for w, a in zip(writes, answers, strict=True) if isinstance(a, StateUnavailable)]
            except StateUnavailable:
                pass
            except asyncio.CancelledError:
                self._keep_all(writes)
                raise
        self._keep_all(late)

    def _keep_all(self, writes: Sequence[Write]) -> None:
        for write in writes:
            self._keep(write)

    def _keep(self, write: Write) -> None:
        if len(self._waiting) >= self._most:
            self.on_drop(write.feature)
            return
        self._waiting.append(write)
        self._lanes[write.lane] += 1
        self._filled.set()

    async def _empty(self) -> None:
        while True:
            await self._filled.wait()
            await self._link.back.wait()
            try:
                await self._write_some()
            except StateUnavailable:
                pass
            except Exception:  # a fault of ours must not keep all later writes from Redis for ever
                log.exception("backlog_fault")
                await asyncio.sleep(FAULT_SECONDS)

    async def _write_some(self) -> None:
        """The oldest. Raises StateUnavailable at the first that has to wait longer."""
        some = list(islice(self._waiting, self._together))
        self._sent = Counter(write.lane for write in some)
        try:
            answers = await self._link.run_in_order([(w.script, w.keys, w.arguments) for w in some])
        except StateUnavailable:
            self._together = max(1, self._together // 2)  # perhaps they are too long for one round trip
            raise
        finally:
            self._sent = Counter()
        self._together = min(MOST_TOGETHER, self._together * 2)
        for write, answer in zip(some, answers, strict=True):
            if isinstance(answer, StateRefused):
                # By a server that is well: it would hold up all others for ever.
                self.on_drop(write.feature)
            elif isinstance(answer, StateUnavailable):
                raise answer
            self._forget_first()
        if not self._waiting:
            self._filled.clear()

    def _forget_first(self) -> None:
        lane = self._waiting.popleft().lane
        self._lanes[lane] -= 1
        if not self._lanes[lane]:
            del self._lanes[lane]
