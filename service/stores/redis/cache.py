"""The cache that all pods share, the process's own in front of it, and the locks of flights."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final
from urllib.parse import quote

from service.caching.flights import LOCK_SECONDS, Ending, Lock
from service.errors import StateUnavailable
from service.ports import Cache
from service.stores.redis.link import Link, Script

MARK_MS: Final = 1000
"""So long other pods can read how a flight ended; they look about every twentieth of this."""
LOCK_MS: Final = round(LOCK_SECONDS * 1000)

_GET: Final = Script(
    "local kept = redis.call('GET', KEYS[1]) "
    "if kept then return {kept, redis.call('PTTL', KEYS[1])} end "
    "return false"
)
_PUT: Final = Script("return redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])")
# What the lock holds is the token of its holder, or how the flight ended. Taking it again with the same
# token is the same as once.
_TAKE: Final = Script(
    "local held = redis.call('GET', KEYS[1]) "
    "if held and held ~= ARGV[1] then return held end "
    "redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2]) "
    "return ARGV[1]"
)
_EXTEND: Final = Script(
    "if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end "
    "return redis.call('PEXPIRE', KEYS[1], ARGV[2])"
)
_END: Final = Script(
    "if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end "
    "if ARGV[2] == '' then return redis.call('DEL', KEYS[1]) end "
    "redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3]) "
    "return 1"
)
_MARKS: Final = {Ending.KEPT: "+", Ending.NOT_KEPT: "-"}
_MARKED: Final = {b"+": Lock.KEPT, b"-": Lock.NOT_KEPT}


class _OnLink:
    """Names below the link's prefix, and None for every answer that Redis did not give."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._of_tenant = lru_cache(maxsize=1_000)(self._tag)

    async def _ask(self, script: Script, key: str, arguments: Sequence[str | bytes | int]) -> Any:
        try:
            return await self._link.run(script, [key], arguments)
        except StateUnavailable:
            return None

    def _tag(self, tenant: str) -> str:
        return f"{self._link.prefix}{{{quote(tenant, safe='')}}}:"


class RedisCache(_OnLink):
    """Values in Redis. While it is away everything is a miss."""

    async def get(self, tenant: str, name: str) -> bytes | None:
        found = await self.find(tenant, name)
        return found[0] if found is not None else None

    async def find(self, tenant: str, name: str) -> tuple[bytes, float] | None:
        """The value, and for how many seconds it will be there, by Redis' clock."""
        found = await self._ask(_GET, self._key(tenant, name), ())
        return (found[0], found[1] / 1000) if found else None

    async def put(self, tenant: str, name: str, value: bytes, ttl_seconds: float) -> None:
        milliseconds = round(ttl_seconds * 1000)
        if milliseconds > 0:
            await self._ask(_PUT, self._key(tenant, name), (value, milliseconds))

    def _key(self, tenant: str, name: str) -> str:
        return f"{self._of_tenant(tenant)}cache:{name}"


class TwoLevelCache:
    """The process's own cache first. What Redis has is kept here, too, for as long as Redis keeps it."""

    def __init__(self, near: Cache, far: RedisCache) -> None:
        self._near = near
        self._far = far

    async def get(self, tenant: str, name: str) -> bytes | None:
        value = await self._near.get(tenant, name)
        if value is not None:
            return value
        found = await self._far.find(tenant, name)
        if found is None:
            return None
        value, seconds = found
        await self._near.put(tenant, name, value, seconds)
        return value

    async def put(self, tenant: str, name: str, value: bytes, ttl_seconds: float) -> None:
        await self._near.put(tenant, name, value, ttl_seconds)
        await self._far.put(tenant, name, value, ttl_seconds)


class RedisLocks(_OnLink):
    """Who leads a flight, for all pods: `caching.flights.Locks`."""

    async def take(self, tenant: str, name: str, token: str) -> Lock:
        held = await self._ask(_TAKE, self._key(tenant, name), (token, LOCK_MS))
        if held is None:
            return Lock.AWAY
        if held == token.encode():
            return Lock.TAKEN
        return _MARKED.get(held, Lock.HELD)

    async def extend(self, tenant: str, name: str, token: str) -> None:
        await self._ask(_EXTEND, self._key(tenant, name), (token, LOCK_MS))

    async def end(self, tenant: str, name: str, token: str, ending: Ending) -> None:
        await self._ask(_END, self._key(tenant, name), (token, _MARKS.get(ending, ""), MARK_MS))

    def _key(self, tenant: str, name: str) -> str:
        return f"{self._of_tenant(tenant)}flight:{name}"
