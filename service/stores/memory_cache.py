"""What was looked up of late, in the process's memory: bounded by bytes, the longest unused goes first."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final, NamedTuple

PLACE_BYTES: Final = 450
"""What an entry takes up beside its value and the letters of its names."""


class _Kept(NamedTuple):
    value: bytes
    ends_at: float
    size: int


class MemoryCache:
    """At most `most_bytes` of values, names and places; 0 keeps nothing."""

    def __init__(self, most_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = most_bytes
        self._clock = clock
        self._kept: OrderedDict[tuple[str, str], _Kept] = OrderedDict()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    async def get(self, tenant: str, name: str) -> bytes | None:
        place = (tenant, name)
        kept = self._kept.get(place)
        if kept is None:
            return None
        if kept.ends_at <= self._clock():
            self._drop(place)
            return None
        self._kept.move_to_end(place)
        return kept.value

    async def put(self, tenant: str, name: str, value: bytes, ttl_seconds: float) -> None:
        place = (tenant, name)
        self._drop(place)
        size = len(value) + len(tenant) + len(name) + PLACE_BYTES
        if ttl_seconds <= 0 or size > self._most:
            return
        while self.bytes + size > self._most:
            self._drop(next(iter(self._kept)))
        self._kept[place] = _Kept(value, self._clock() + ttl_seconds, size)
        self.bytes += size

    def _drop(self, place: tuple[str, str]) -> None:
        kept = self._kept.pop(place, None)
        if kept is not None:
            self.bytes -= kept.size
