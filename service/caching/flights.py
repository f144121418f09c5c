"""Equal calls at the same time: the first asks, the others wait for its answer.

    flight = flights.of(tenant, name)
    async with flight as role:
        if role is Role.LEADS:
            ...  # ask, keep the answer; then
            flight.leave(Ending.KEPT)
        elif role is Role.LOOKS:
            ...  # the answer is in the cache now; should it be missed all the same, ask
        else:
            ...  # ask: there is nothing to wait for

A leader that fails or leaves hands its place on to one of those who wait. A leader whose answer cannot be
kept frees all of them at once, so that nobody queues for what never comes. Over pods a lock in the shared
store does the same; while that is away each pod has a leader of its own.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Coroutine
from enum import Enum, auto
from types import TracebackType
from typing import Any, Final, Protocol
from uuid import uuid4

from service.errors import BudgetExceeded, CallerGone, WeirError

PATIENCE_SECONDS: Final = 30.0
"""So long one call waits for another's answer; then it asks by itself."""
POLL_SECONDS: Final = 0.05
LOCK_SECONDS: Final = 10.0
"""A pod that vanished holds up the others no longer than this."""
HELD_MOST_SECONDS: Final = 600.0
"""A leader that forgot to end holds up other pods no longer than this."""
FAILURES_IN_A_ROW: Final = 3
"""After so many failed leaders all who wait ask by themselves: one after another would take for ever."""


class Role(Enum):
    LEADS = auto()
    LOOKS = auto()
    ALONE = auto()


class Ending(Enum):
    """How a leader's flight ended."""

    KEPT = auto()
    """The answer is in the cache."""
    NOT_KEPT = auto()
    """There was an answer, or a refusal, that cannot be kept; an equal call would have the same."""
    FAILED = auto()
    """Another one may have more luck."""
    LEFT = auto()
    """Its caller did not wait: that says nothing about the upstream."""


class Lock(Enum):
    """What a pod that wants to lead finds."""

    TAKEN = auto()
    """It leads."""
    HELD = auto()
    """Another one leads."""
    KEPT = auto()
    """Another one led a moment ago and its answer is kept."""
    NOT_KEPT = auto()
    AWAY = auto()
    """Nobody knows."""


class Locks(Protocol):
    """Locks that all pods share; each ends by itself after `LOCK_SECONDS`. Never raises."""

    async def take(self, tenant: str, name: str, token: str) -> Lock:
        """Take it; it is taken, too, if it is held with this token already."""
        ...

    async def extend(self, tenant: str, name: str, token: str) -> None:
        """Let it last `LOCK_SECONDS` from now on, if it is still held with this token."""
        ...

    async def end(self, tenant: str, name: str, token: str, ending: Ending) -> None:
        """Give it up. KEPT and NOT_KEPT stay readable for a moment, for pods that wait."""
        ...


class Flights:
    """All flights of a process. `locks` None: it is the only one."""

    def __init__(self, locks: Locks | None = None, *, patience_seconds: float = PATIENCE_SECONDS) -> None:
        self.locks = locks
        self.patience_seconds = patience_seconds
        self._running: dict[tuple[str, str], _Shared] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._running)

    def of(self, tenant: str, name: str) -> Flight:
        return Flight(self, (tenant, name))

    async def settled(self) -> None:
        """Returns when every lock that was given up is free, or its store is away."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def join(self, key: tuple[str, str]) -> tuple[_Shared, bool]:
        """The flight of this key, and whether it is a new one."""
        shared = self._running.get(key)
        if shared is not None:
            return shared, False
        shared = self._running[key] = _Shared(self, key)
        return shared, True

    def forget(self, key: tuple[str, str]) -> None:
        self._running.pop(key, None)

    def later(self, work: Coroutine[Any, Any, None]) -> None:
        """In a task of its own: a leader does not wait until its lock is free."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class Flight:
    """One call's part in a flight; used as `async with`, or by `board` and `leave`."""

    __slots__ = ("_flights", "_key", "_shared", "role")

    def __init__(self, flights: Flights, key: tuple[str, str]) -> None:
        self._flights = flights
        self._key = key
        self._shared: _Shared | None = None
        self.role = Role.ALONE

    async def board(self) -> Role:
        """Returns at once for the first; for the others when there is something for them to do."""
        loop = asyncio.get_running_loop()
        until = loop.time() + self._flights.patience_seconds
        shared, leads = self._flights.join(self._key)
        role = Role.LEADS if leads else await shared.wait(until)
        if role is Role.LEADS and self._flights.locks is not None:
            role = await shared.lead_among_pods(self._flights.locks, until)
        self.role = role
        self._shared = shared if role is Role.LEADS else None
        return role

    def leave(self, ending: Ending) -> None:
        """A leader's end, told at once to all who wait. Nothing happens for others, or the second time."""
        shared, self._shared = self._shared, None
        if shared is not None:
            shared.end(ending)

    async def __aenter__(self) -> Role:
        return await self.board()

    async def __aexit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave(ending_of(raised))


def ending_of(raised: BaseException | None) -> Ending:
    """How a leader's flight ended that kept nothing."""
    if raised is None:
        return Ending.NOT_KEPT
    if isinstance(raised, asyncio.CancelledError | CallerGone):
        return Ending.LEFT
    if isinstance(raised, BudgetExceeded):
        return Ending.LEFT  # its own budget: another key may well have one
    if isinstance(raised, WeirError) and not raised.retry:
        return Ending.NOT_KEPT  # an equal call would be refused like this one
    return Ending.FAILED


class _Shared:
    """What the calls of one flight share: those who wait, in their order, and this pod's lock."""

    def __init__(self, flights: Flights, key: tuple[str, str]) -> None:
        self._flights = flights
        self._key = key
        self._waiting: deque[asyncio.Future[Role]] = deque()
        self._failures = 0
        self._token: str | None = None
        """Of the lock, from the first time on that it may be ours."""
        self._holding: asyncio.Task[None] | None = None

    async def wait(self, until: float) -> Role:
        """Until the leader's end concerns this one, or patience is over."""
        loop = asyncio.get_running_loop()
        place: asyncio.Future[Role] = loop.create_future()
        self._waiting.append(place)
        try:
            async with asyncio.timeout_at(until):
                return await place
        except TimeoutError:
            self._give_back(place)
            return Role.ALONE
        except asyncio.CancelledError:
            self._give_back(place)
            raise

    def _give_back(self, place: asyncio.Future[Role]) -> None:
        """Of one who stops waiting: the lead, should it just have been given to it, goes on to the next."""
        if place.done() and not place.cancelled() and place.result() is Role.LEADS:
            self.end(Ending.LEFT)
        place.cancel()

    async def lead_among_pods(self, locks: Locks, until: float) -> Role:
        """The leader of this pod asks whether another pod leads, and waits for that one if so."""
        tenant, name = self._key
        loop = asyncio.get_running_loop()
        if self._holding is not None:
            return Role.LEADS  # the last leader of this pod held the lock, and it has been kept
        self._token = self._token or uuid4().hex
        try:
            while True:
                lock = await locks.take(tenant, name, self._token)
                if lock is Lock.TAKEN:
                    self._holding = loop.create_task(self._hold(locks, self._token))
                    return Role.LEADS
                if lock is Lock.AWAY:
                    return Role.LEADS
                if lock is not Lock.HELD:
                    self._token = None
                    self.end(Ending.KEPT if lock is Lock.KEPT else Ending.NOT_KEPT)
                    return Role.LOOKS if lock is Lock.KEPT else Role.ALONE
                if loop.time() >= until:
                    self.end(Ending.LEFT)
                    return Role.ALONE
                # Not all pods at once.
                await asyncio.sleep(POLL_SECONDS * random.uniform(0.75, 1.25))
        except BaseException:
            self.end(Ending.LEFT)
            raise

    def end(self, ending: Ending) -> None:
        """The leader has ended: tell the others what to do."""
        if ending is Ending.FAILED:
            self._failures += 1
            if self._failures >= FAILURES_IN_A_ROW:
                ending = Ending.NOT_KEPT
        if ending in (Ending.FAILED, Ending.LEFT) and self._hand_on():
            return
        self._flights.forget(self._key)
        while self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_result(Role.LOOKS if ending is Ending.KEPT else Role.ALONE)
        self._unlock(ending)

    def _hand_on(self) -> bool:
        while self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_result(Role.LEADS)
                return True
        return False

    def _unlock(self, ending: Ending) -> None:
        if self._holding is not None:
            self._holding.cancel()
        if self._flights.locks is not None and self._token is not None:
            self._flights.later(self._flights.locks.end(*self._key, self._token, ending))

    async def _hold(self, locks: Locks, token: str) -> None:
        """Keep the lock for as long as the answer takes."""
        loop = asyncio.get_running_loop()
        until = loop.time() + HELD_MOST_SECONDS
        while loop.time() < until:
            await asyncio.sleep(LOCK_SECONDS / 3)
            await locks.extend(*self._key, token)
