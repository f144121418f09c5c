"""The sums of the ledger, read from Redis. What writes them is `settle.lua`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final, Literal

from service.ports import UsageRow
from service.stores.redis import scripts
from service.stores.redis.keys import Keys
from service.stores.redis.link import Link
from service.usage import DAY, HOUR, rows_of

MOST_HASHES: Final = 256
"""In one call; most of them are empty where little is asked."""
MOST_FIELDS: Final = 4_000
"""After so many a call reads no further hash: it takes Redis about a millisecond."""


class RedisUsageBook:
    """The sums of all pods by hour and day; a tenant's are of one slot."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._keys = Keys(link.prefix)

    async def tenants(self) -> Sequence[str]:
        names = await self._link.run(scripts.MEMBERS, [self._keys.tenants()], [])
        return sorted(name.decode() for name in names)

    async def rows(
        self, tenant: str, since: int, until: int, unit: Literal["hour", "day"]
    ) -> Sequence[UsageRow]:
        step = HOUR if unit == "hour" else DAY
        wanted = range(-(-since // step) * step, until, step)
        found: list[UsageRow] = []
        while wanted:
            asked = wanted[:MOST_HASHES]
            keys = [self._keys.sums(tenant, at // HOUR)[unit == "day"] for at in asked]
            hashes = await self._link.run(scripts.READ_SUMS, keys, [MOST_FIELDS])
            for at, fields in zip(asked, hashes, strict=False):
                if fields:
                    sums = zip(fields[::2], fields[1::2], strict=True)
                    found += rows_of(tenant, at, ((name.decode(), int(number)) for name, number in sums))
                    await asyncio.sleep(0)  # others have a turn: a hash may take milliseconds
            wanted = wanted[len(hashes) :]
        return found
