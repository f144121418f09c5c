"""The cached answers of a tenant, erased. Those in the memory of pods end with their time to live."""

from __future__ import annotations

from typing import Final

from service.stores.redis import scripts
from service.stores.redis.keys import Keys
from service.stores.redis.link import Link

LOOKED_AT: Final = 500
"""Keys in one call: others wait for no more than that."""


class RedisAnswers:
    """All of a tenant's keys are of one slot, so of a cluster's servers only one is asked."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._keys = Keys(link.prefix)

    async def erase(self, tenant: str) -> int:
        """How many there were. Raises StateUnavailable."""
        place, pattern = [self._keys.owners(tenant)], self._keys.cache_pattern(tenant)
        cursor, erased = b"0", 0
        while True:
            gone: int
            cursor, gone = await self._link.run(scripts.ERASE_ANSWERS, place, [cursor, pattern, LOOKED_AT])
            erased += gone
            if cursor == b"0":
                return erased
