"""Overload: how many requests go on at a time, who waits for a place, and who is turned away.

A `Gate` has so many places and, in front of them, a short queue. Who fits into neither is refused at once.
The limit follows the event loop: what overloads a process is its own work, and what shows it is how late
the loop comes to it. How long upstreams take says nothing; docs/decisions/0020-shed-early.md has the reasons.

For one event loop, not for threads.
"""

from __future__ import annotations

import asyncio
import math
import random
import sys
import time
from collections.abc import Callable
from enum import IntEnum, StrEnum
from typing import Final

from service.errors import InvalidRequest, Overloaded

PRIORITY_HEADER: Final = "X-Weir-Priority"
LAG_MOST_SECONDS: Final = 0.01
"""The loop may come so late all the time before the limit falls: a refusal waits as long, too."""
REFUSALS_MOST: Final = 400
"""Where more are refused between two looks, a tenth of the time goes there, and a lower limit adds to it."""
LOOK_SECONDS: Final = 0.02
ADAPT_SECONDS: Final = 0.5
"""The least lag of so long a time counts: a pause of the garbage collector is over sooner."""
FALL: Final = 0.9
LEAST_PART: Final = 8
LEAST_PLACES: Final = 8
"""The limit never falls below an eighth, nor below 8: the loop may be late for other reasons."""
STEPS: Final = 32
"""A limit that has fallen is back after so many good looks at most."""
RETRY_AFTER_SPREAD: Final = 3
"""Who is refused in one moment comes again over so many seconds."""


class Priority(IntEnum):
    """Classes of requests; the lower number goes first."""

    HIGH = 0
    NORMAL = 1
    LOW = 2


class Shed(StrEnum):
    """Why a request was turned away."""

    FULL = "queue_full"
    """At once: there was neither a place nor room to wait."""
    DISPLACED = "displaced"
    """It waited, and somebody came who goes before it."""
    LATE = "queue_timeout"
    """It waited as long as anybody may."""


_BY_NAME: Final = {priority.name.lower(): priority for priority in Priority}
_GRANTED: Final = None


def priority_of(asked: str | None, most: str = "normal") -> Priority:
    """The class of a key, `most`, or the lower one that the header asks for. Raises InvalidRequest."""
    own = _BY_NAME[most]
    if asked is None:
        return own
    wanted = _BY_NAME.get(asked.strip().lower())
    if wanted is None:
        raise InvalidRequest(
            f"The header {PRIORITY_HEADER} must be one of {', '.join(_BY_NAME)}.", param=PRIORITY_HEADER
        )
    return max(own, wanted)


class Place:
    """What a tenant has at the gate. `Gate.enter` gives it, `Gate.leave` takes it back."""

    __slots__ = ("_queues", "lowest", "running", "tenant", "waiting")

    def __init__(self, tenant: str) -> None:
        self.tenant = tenant
        self.running = 0
        self.waiting = 0
        self.lowest = 0
        """The lowest class of those who wait: read for each tenant whenever somebody is refused."""
        self._queues: tuple[dict[_Waiter, None], ...] = ()

    def add(self, waiter: _Waiter) -> None:
        if not self._queues:
            self._queues = tuple({} for _ in Priority)
        self._queues[waiter.priority][waiter] = None
        self.waiting += 1
        self.lowest = max(self.lowest, int(waiter.priority))

    def remove(self, waiter: _Waiter) -> None:
        del self._queues[waiter.priority][waiter]
        self.waiting -= 1
        while self.lowest and not self._queues[self.lowest]:
            self.lowest -= 1

    def first(self) -> _Waiter:
        """Of those who wait the oldest of the highest class."""
        for queue in self._queues:
            if queue:
                return next(iter(queue))
        raise LookupError("nobody waits")

    def last(self) -> _Waiter:
        """Of those who wait the newest of the lowest class."""
        return next(reversed(self._queues[self.lowest]))


class _Waiter:
    """A request in the queue; its future says that it got a place, or why it did not."""

    __slots__ = ("future", "number", "place", "priority", "until")

    def __init__(self, number: int, place: Place, priority: Priority, until: float) -> None:
        self.number = number
        self.place = place
        self.priority = priority
        self.until = until
        self.future: asyncio.Future[Shed | None] = asyncio.get_running_loop().create_future()


class Gate:
    """Places for requests, and a queue in front of them.

    `most` places, 0 for no limit; `most_waiting` requests wait for one, each for `wait_seconds` at the most.
    `on_shed` is told of each request that is turned away.
    """

    def __init__(
        self,
        *,
        most: int,
        most_waiting: int,
        wait_seconds: float,
        on_shed: Callable[[Shed, Priority], None] = lambda _reason, _priority: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.most = most or sys.maxsize
        self.limit = self.most
        """How many may run just now."""
        self.running = 0
        self._least = min(self.most, max(LEAST_PLACES, self.most // LEAST_PART))
        self._most_waiting = most_waiting
        self._wait_seconds = wait_seconds
        self._on_shed = on_shed
        self._clock = clock
        self._places: dict[str, Place] = {}
        """Of the tenants that run or wait."""
        self._waiting: dict[_Waiter, None] = {}
        """All that wait, by their arrival."""
        self._queued: dict[Place, None] = {}
        """Of the tenants that wait."""
        self._timer: asyncio.TimerHandle | None = None
        self._joined = 0
        self._refused = 0
        """At once, since the last look at the loop."""
        self._left = 0
        self._pace = _Pace(wait_seconds)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def check(self, tenant: str, priority: Priority) -> None:
        """Raises Overloaded if `enter` would do so at once; takes nothing. For before the body is read."""
        if self.running < self.limit:
            return
        place = self._places.get(tenant) or Place(tenant)
        room = self._room()
        if len(self._waiting) >= room and self._worst(place, priority, room) is None:
            raise self._refuse(priority)

    async def enter(self, tenant: str, priority: Priority) -> Place:
        """A place, for which the request may wait a moment; give it to `leave`. Raises Overloaded."""
        place = self._places.get(tenant)
        if place is None:
            place = self._places[tenant] = Place(tenant)
        if self.running < self.limit:  # then nobody waits
            self.running += 1
            place.running += 1
            return place
        await self._wait(place, priority)
        return place

    def leave(self, place: Place) -> None:
        """Give back a place, once; whoever is next gets it."""
        self._left += 1
        self.running -= 1
        place.running -= 1
        if not place.running:
            self._forget(place)
        if self._waiting:
            self._admit()

    def adapt(self, lag_seconds: float) -> None:
        """Set the limit by how late the loop has come all the time lately."""
        if self.most == sys.maxsize:
            return
        refused, self._refused = self._refused, 0
        if lag_seconds <= LAG_MOST_SECONDS:
            self.limit = min(self.most, self.limit + max(1, self.most // STEPS))
            self._admit()
        elif (
            refused <= REFUSALS_MOST and self.running <= self.limit
        ):  # else the last fall has not done its work yet
            fallen = int(min(self.limit, self.running) * FALL)
            self.limit = min(self.limit, max(self._least, fallen))

    async def watch(self) -> None:
        """Adapt the limit until cancelled."""
        now = self._clock
        while True:
            until, least = now() + ADAPT_SECONDS, math.inf
            while (began := now()) < until:
                await asyncio.sleep(LOOK_SECONDS)
                least = min(least, now() - began - LOOK_SECONDS)
            self.adapt(least)

    # -- the queue -------------------------------------------------------------------------------

    async def _wait(self, place: Place, priority: Priority) -> None:
        waiter = self._join(place, priority)
        try:
            refused = await waiter.future
        except asyncio.CancelledError:
            if waiter in self._waiting:
                self._remove(waiter)
            elif not waiter.future.cancelled() and waiter.future.result() is _GRANTED:
                self.leave(place)  # it had got a place and never saw it
            raise
        if refused is not None:
            raise _overloaded(refused)

    def _join(self, place: Place, priority: Priority) -> _Waiter:
        """Raises Overloaded if there is no room, and nobody in the queue who goes after this one."""
        room = self._room()
        if len(self._waiting) >= room:
            worst = self._worst(place, priority, room)
            if worst is None:
                self._forget(place)
                raise self._refuse(priority)
            self._turn_away(worst, Shed.DISPLACED)
        if not (place.running or place.waiting):
            self._places[place.tenant] = place  # its last waiter may have gone just now
        self._joined += 1
        waiter = _Waiter(self._joined, place, priority, self._clock() + self._wait_seconds)
        place.add(waiter)
        self._waiting[waiter] = None
        self._queued[place] = None
        if self._timer is None:
            self._arm(self._wait_seconds)
        return waiter

    def _refuse(self, priority: Priority) -> Overloaded:
        self._refused += 1
        self._on_shed(Shed.FULL, priority)
        return _overloaded(Shed.FULL)

    def _remove(self, waiter: _Waiter) -> None:
        place = waiter.place
        place.remove(waiter)
        del self._waiting[waiter]
        if not place.waiting:
            del self._queued[place]
            self._forget(place)

    def _forget(self, place: Place) -> None:
        """A tenant that neither runs nor waits has no part in the shares."""
        if not place.running and not place.waiting:
            self._places.pop(place.tenant, None)

    def _admit(self) -> None:
        while self._waiting and self.running < self.limit:
            waiter = self._next()
            left = waiter.future.done()  # cancelled, and about to find out
            if not left:
                self.running += 1
                waiter.place.running += 1
                waiter.future.set_result(_GRANTED)
            self._remove(waiter)

    def _next(self) -> _Waiter:
        """Who gets the next place: of the tenants below their fair share the highest class, then of the
        tenant with the fewest running, then who came first."""
        share = self.limit / len(self._places)

        def rank(first: _Waiter) -> tuple[bool, int, int, int]:
            running = first.place.running
            return (running >= share, first.priority, running, first.number)

        return min((place.first() for place in self._queued), key=rank)

    def _worst(self, place: Place, priority: Priority, room: int) -> _Waiter | None:
        """Who must go if a request of `priority` joins: of the tenants above their fair share the lowest
        class, then of the tenant that has most, then who came last. None: the request itself."""
        share = (self.limit + room) / (len(self._places) + (place.tenant not in self._places))
        mine = place.running + place.waiting + 1
        worst, highest = None, (mine > share, int(priority), mine)
        for other in self._queued:
            has = mine if other is place else other.running + other.waiting
            rank = (has > share, other.lowest, has)
            if rank > highest:
                worst, highest = other.last(), rank
            elif worst is not None and rank == highest and other.last().number > worst.number:
                worst = other.last()
        return worst

    def _turn_away(self, waiter: _Waiter, reason: Shed) -> None:
        self._remove(waiter)
        if not waiter.future.done():
            self._on_shed(reason, waiter.priority)
            waiter.future.set_result(reason)

    def _arm(self, seconds: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(seconds, self._expire)

    def _expire(self) -> None:
        """All wait equally long at the most, so those who came first are due first."""
        self._timer = None
        now = self._clock()
        while self._waiting:
            oldest = next(iter(self._waiting))
            if oldest.until > now:
                self._arm(oldest.until - now)
                break
            self._turn_away(oldest, Shed.LATE)

    def _room(self) -> int:
        """How many may wait: those who will probably get a place in time."""
        leaving = self._pace.leaving(self._clock(), self._left)
        if leaving is None:
            return self._most_waiting
        return min(self._most_waiting, max(1, int(leaving - 2 * math.sqrt(leaving)) + 1))


class _Pace:
    """How many leave within the time that one may wait, as of the last such time.

    Unknown when a rush begins: then the queue takes what it can. A rush is over when nobody has asked for
    two such times.
    """

    __slots__ = ("_began", "_leaving", "_left", "_seconds")

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._began = -math.inf
        self._left = 0
        self._leaving: float | None = None

    def leaving(self, now: float, left: int) -> float | None:
        """`left`: how many have left since the beginning of all."""
        passed = now - self._began
        if passed >= self._seconds:
            calm = passed >= 2 * self._seconds
            self._leaving = None if calm else (left - self._left) * self._seconds / passed
            self._began, self._left = now, left
        return self._leaving


def _overloaded(reason: Shed) -> Overloaded:
    waited = "" if reason is Shed.FULL else " It waited for a place in vain."
    return Overloaded(
        f"This server has all the requests that it can serve.{waited}",
        retry_after_seconds=1 + random.randrange(RETRY_AFTER_SPREAD),
    )
