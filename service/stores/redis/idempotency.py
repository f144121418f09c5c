"""Answers by idempotency key on Redis, and in this process's memory while that is away.

| key after `weir:{tenant}:` | type | what is in it |
|---|---|---|
| `idem:KEY:NAME` | hash | token and fingerprint of a request that runs, or ran; then its answer |
| `idems` | sorted set | the places that have an answer, with its size, by their ends |
| `idembytes` | string | the sum of these sizes |
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import lru_cache
from importlib.resources import files
from typing import Final, TypeVar
from urllib.parse import quote

from service.errors import StateUnavailable
from service.ports import Claim, ClaimState, Place
from service.stores.memory_idempotency import PLACE_BYTES, MemoryReplays
from service.stores.redis.link import LATE_IN_A_ROW, Link, Script

ERASED_TOGETHER: Final = 500
"""Answers that one call erases: others wait for no more than that."""

_Answer = TypeVar("_Answer")


def _read(name: str, *, repeatable: bool = True) -> Script:
    source = files(__package__).joinpath(f"idempotency_{name}.lua").read_text(encoding="utf-8")
    return Script(source, repeatable=repeatable)


_CLAIM: Final = _read("claim")
_KEEP: Final = _read("keep")
_RELEASE: Final = _read("release")
_ERASE: Final = _read("erase", repeatable=False)
_STATES: Final = {1: ClaimState.TAKEN, 2: ClaimState.RUNNING, 3: ClaimState.OTHER}


class RedisReplays:
    """Answers for `ttl_seconds`, at most about `most_bytes` of each tenant. Only Redis' clock counts."""

    def __init__(self, link: Link, *, ttl_seconds: float, lease_seconds: float, most_bytes: int) -> None:
        self.lease_seconds = lease_seconds
        self._link = link
        self._ttl_ms = round(ttl_seconds * 1000)
        self._lease_ms = round(lease_seconds * 1000)
        self._most = most_bytes
        self._of_tenant = lru_cache(maxsize=1_000)(self._tag)

    @property
    def available(self) -> bool:
        return self._link.available

    async def claim(self, place: Place, fingerprint: bytes, token: str) -> Claim:
        found = await self._link.run(_CLAIM, [self._key(place)], [token, fingerprint, self._lease_ms])
        if isinstance(found, bytes):
            return Claim(ClaimState.KEPT, found)
        return Claim(_STATES[found])

    async def keep(self, place: Place, fingerprint: bytes, token: str, answer: bytes) -> bool:
        keys = [self._key(place), self._index(place.tenant), self._sum(place.tenant)]
        size = len(answer) + PLACE_BYTES
        about: list[str | bytes | int | float] = [token, fingerprint, answer, self._ttl_ms]
        return bool(await self._link.run(_KEEP, keys, [*about, _name(place), size, self._most]))

    async def release(self, place: Place, token: str) -> None:
        await self._link.run(_RELEASE, [self._key(place)], [token])

    async def erase(self, tenant: str) -> int:
        keys, erased, left = [self._index(tenant), self._sum(tenant), self._beginning(tenant)], 0, 1
        while left:
            gone, left = await self._link.run(_ERASE, keys, [ERASED_TOGETHER])
            erased += gone
        return erased

    def _key(self, place: Place) -> str:
        return self._beginning(place.tenant) + _name(place)

    def _beginning(self, tenant: str) -> str:
        return f"{self._of_tenant(tenant)}idem:"

    def _index(self, tenant: str) -> str:
        return f"{self._of_tenant(tenant)}idems"

    def _sum(self, tenant: str) -> str:
        return f"{self._of_tenant(tenant)}idembytes"

    def _tag(self, tenant: str) -> str:
        return f"{self._link.prefix}{{{quote(tenant, safe='')}}}:"


class FleetReplays:
    """Redis while it is there. While it is away each process knows its own requests alone.

    What runs in this process is noted here, too: so it is known when Redis goes away meanwhile, and when it
    comes back. What was answered during an outage is replayed by this process from then on.
    """

    def __init__(self, near: MemoryReplays, far: RedisReplays) -> None:
        self._near = near
        self._far = far

    @property
    def lease_seconds(self) -> float:
        return self._far.lease_seconds

    async def claim(self, place: Place, fingerprint: bytes, token: str) -> Claim:
        near = self._near.look(place, fingerprint, token)
        if near is not None:
            return near
        try:
            far = await self._insist(lambda: self._far.claim(place, fingerprint, token))
        except StateUnavailable:
            return await self._near.claim(place, fingerprint, token)
        if far.state is not ClaimState.TAKEN:
            return far
        near = await self._near.claim(place, fingerprint, token)
        if near.state is not ClaimState.TAKEN:  # one that Redis did not answer has begun here meanwhile
            await self._far.release(place, token)
        return near

    async def keep(self, place: Place, fingerprint: bytes, token: str, answer: bytes) -> bool:
        try:
            kept = await self._insist(lambda: self._far.keep(place, fingerprint, token, answer))
        except StateUnavailable:
            return await self._near.keep(place, fingerprint, token, answer)
        await self._near.release(place, token)
        return kept

    async def release(self, place: Place, token: str) -> None:
        await self._near.release(place, token)
        await self._insist(lambda: self._far.release(place, token))

    async def erase(self, tenant: str) -> int:
        return await self._near.erase(tenant) + await self._far.erase(tenant)

    async def _insist(self, ask: Callable[[], Awaitable[_Answer]]) -> _Answer:
        """A Redis that is late is not away yet, and what other pods run is not known without it."""
        for _ in range(LATE_IN_A_ROW - 1):
            try:
                return await ask()
            except StateUnavailable:
                if not self._far.available:
                    raise
        return await ask()


def _name(place: Place) -> str:
    return f"{quote(place.key, safe='')}:{place.name}"
