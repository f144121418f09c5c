"""The response cache as the request path uses it: find, or lead and keep."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

from service.caching.entries import COMPRESS_ABOVE_BYTES, Entry, pack, unpack
from service.caching.flights import Flight, Flights
from service.caching.policy import Lookup, Wish, find_lookup
from service.caching.whole import Assembler, assembler, is_good
from service.domain import Call, Operation, RequestRecord, UsageSource
from service.ports import Cache, Target

IN_A_THREAD_ABOVE_BYTES: Final = 64 * COMPRESS_ABOVE_BYTES
"""Compressing so much takes about a millisecond, in which nobody else would be served."""


class AnswerCache:
    """Good answers, for `ttl_seconds` or as long as their model says; none above `most_answer_bytes`."""

    def __init__(
        self,
        cache: Cache,
        flights: Flights,
        *,
        ttl_seconds: float,
        most_answer_bytes: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.flights = flights
        self._cache = cache
        self._ttl = ttl_seconds
        self._most = most_answer_bytes
        self._clock = clock

    def lookup(self, call: Call, target: Target, wish: Wish) -> Lookup | None:
        """None: this call passes by."""
        return find_lookup(call, target, wish, self._ttl)

    async def find(self, tenant: str, lookup: Lookup) -> Entry | None:
        if not lookup.read:
            return None
        packed = await self._cache.get(tenant, lookup.name)
        if packed is None:
            return None
        large = len(packed) > IN_A_THREAD_ABOVE_BYTES
        entry = await asyncio.to_thread(unpack, packed) if large else unpack(packed)
        most = lookup.max_age_seconds
        if entry is None or (most is not None and entry.age_seconds(self._clock()) > most):
            return None
        return entry

    def flight(self, tenant: str, lookup: Lookup) -> Flight:
        """For a call that found nothing; one that wants to refresh leads none and follows none."""
        return self.flights.of(tenant, lookup.name)

    def assembler(self, operation: Operation) -> Assembler:
        """For the stream of a call whose answer may be kept."""
        return assembler(operation, self._most)

    async def keep(self, lookup: Lookup, record: RequestRecord, body: bytes | None) -> bool:
        """Keep the whole answer of the call that `record` is of, if it may be and is good."""
        if body is None or not lookup.write or len(body) > self._most or not is_good(record.operation, body):
            return False
        usage = record.usage
        entry = Entry(
            body,
            self._clock(),
            record.response_model,
            record.response_id,
            record.finish_reason,
            usage if usage is not None and usage.source is UsageSource.PROVIDER else None,
        )
        large = len(body) > IN_A_THREAD_ABOVE_BYTES
        packed = await asyncio.to_thread(pack, entry) if large else pack(entry)
        await self._cache.put(record.principal.tenant, lookup.name, packed, lookup.ttl_seconds)
        return True
