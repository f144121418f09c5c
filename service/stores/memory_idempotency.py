"""Answers by idempotency key in the process's memory: for one process, and while Redis is away."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final, NamedTuple

from service.ports import Claim, ClaimState, Place

PLACE_BYTES: Final = 600
"""What a kept answer takes up beside its own bytes, here and on Redis, about."""


class _Running(NamedTuple):
    fingerprint: bytes
    token: str
    ends_at: float


class _Kept(NamedTuple):
    fingerprint: bytes
    token: str
    answer: bytes
    ends_at: float


class MemoryReplays:
    """Answers for `ttl_seconds`, at most `most_bytes` of them all, but at least the latest one."""

    def __init__(
        self,
        *,
        ttl_seconds: float,
        lease_seconds: float,
        most_bytes: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.lease_seconds = lease_seconds
        self._ttl = ttl_seconds
        self._most = most_bytes
        self._clock = clock
        self._running: dict[Place, _Running] = {}
        self._kept: OrderedDict[Place, _Kept] = OrderedDict()
        """In the order of their ends, because all live equally long."""
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._running) + len(self._kept)

    def look(self, place: Place, fingerprint: bytes, token: str) -> Claim | None:
        """What a claim would find; None if it would take the place."""
        now = self._clock()
        self._forget_ended(now)
        held = self._kept.get(place) or self._running_at(place, now)
        if held is None:
            return None
        if held.fingerprint != fingerprint:
            return Claim(ClaimState.OTHER)
        if isinstance(held, _Kept):
            return Claim(ClaimState.KEPT, held.answer)
        return None if held.token == token else Claim(ClaimState.RUNNING)

    async def claim(self, place: Place, fingerprint: bytes, token: str) -> Claim:
        found = self.look(place, fingerprint, token)
        if found is None:
            self._running[place] = _Running(fingerprint, token, self._clock() + self.lease_seconds)
            return Claim(ClaimState.TAKEN)
        return found

    async def keep(self, place: Place, fingerprint: bytes, token: str, answer: bytes) -> bool:
        now = self._clock()
        self._forget_ended(now)
        kept = self._kept.get(place)
        if kept is not None:
            return kept.token == token
        running = self._running_at(place, now)
        if running is not None and running.token != token:
            return False
        self._running.pop(place, None)
        self._kept[place] = _Kept(fingerprint, token, answer, now + self._ttl)
        self.bytes += len(answer) + PLACE_BYTES
        while self.bytes > self._most and len(self._kept) > 1:
            self._drop_first()
        return True

    async def release(self, place: Place, token: str) -> None:
        running = self._running.get(place)
        if running is not None and running.token == token:
            del self._running[place]

    async def erase(self, tenant: str) -> int:
        self._forget_ended(self._clock())
        places = [place for place in self._kept if place.tenant == tenant]
        for place in places:
            self.bytes -= len(self._kept.pop(place).answer) + PLACE_BYTES
        return len(places)

    def _running_at(self, place: Place, now: float) -> _Running | None:
        running = self._running.get(place)
        if running is not None and running.ends_at <= now:
            del self._running[place]
            return None
        return running

    def _forget_ended(self, now: float) -> None:
        while self._kept and next(iter(self._kept.values())).ends_at <= now:
            self._drop_first()

    def _drop_first(self) -> None:
        _, kept = self._kept.popitem(last=False)
        self.bytes -= len(kept.answer) + PLACE_BYTES
