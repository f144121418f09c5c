"""Leases of requests under way: renewed while their process lives, and settled by another when it does not.

A request that a process has reserved for and not settled, and whose lease has ended, was left behind: its
process was killed. One process at a time looks for such requests and settles them, so that what they held is
free again and each has its record: outcome `internal_error`, code `abandoned`, without usage, which only the
killed process knew.
"""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Final

import msgspec
import structlog

from service.domain import RequestRecord
from service.errors import StateRefused, StateUnavailable
from service.stores.redis import scripts
from service.stores.redis.accounts import RedisAccounts
from service.stores.redis.keys import FLEET
from service.stores.redis.link import Call, Link

ROUNDS: Final = 4
"""In the time of one lease: so often leases are renewed and those of others looked at."""
TOGETHER: Final = 500
ABANDONED: Final = "abandoned"

log = structlog.get_logger("weir")
_decode: Final = msgspec.json.Decoder(RequestRecord).decode


class Leases:
    """The requests that this process has reserved for; `run` looks after them and those of others."""

    def __init__(self, link: Link, store: RedisAccounts) -> None:
        self._link = link
        self._store = store
        self._open: defaultdict[str, dict[str, None]] = defaultdict(dict)
        self._tenants: set[str] = set()
        self._named: set[str] = set()
        """Those of them that Redis knows of."""
        self._steady = 0

    def __len__(self) -> int:
        return sum(map(len, self._open.values()))

    def begin(self, tenant: str, record_id: str) -> None:
        self._open[tenant][record_id] = None

    def end(self, tenant: str, record_id: str) -> None:
        """It is settled, at the fleet's counters too if it was there."""
        self._open[tenant].pop(record_id, None)
        if FLEET in self._open:
            self._open[FLEET].pop(record_id, None)

    def end_fleet(self, record_id: str) -> bool:
        """Nothing is set aside for it at the fleet's counters; whether something may have been."""
        return FLEET in self._open and self._open[FLEET].pop(record_id, self) is None

    async def remember(self, tenant: str) -> None:
        """Name a tenant to those who look for abandoned requests or copy ledgers. Raises StateUnavailable."""
        if tenant not in self._named:
            await self._link.run(scripts.REMEMBER, [self._store.keys.tenants()], [tenant])
            self._named.add(tenant)

    def note(self, tenant: str) -> None:
        """Name it in the next round, and in each."""
        self._tenants.add(tenant)

    async def run(self) -> None:
        """Until cancelled."""
        pause = self._store.lease_ms / 1000 / ROUNDS
        while True:
            await asyncio.sleep(pause * random.uniform(0.75, 1.0))
            try:
                await self.look()
            except StateUnavailable:
                self._steady = 0
            except Exception:  # a fault of ours must not end all leases
                log.exception("leases_fault")

    async def look(self) -> None:
        """One round. Raises StateUnavailable."""
        await self._renew()
        for some in _together(self._tenants):  # time and again: Redis may have lost them
            await self._link.run(scripts.REMEMBER, [self._store.keys.tenants()], some)
            self._named.update(some)
        # After an outage others may not have written yet what they kept meanwhile.
        self._steady += 1
        if self._steady > ROUNDS // 2 and await self._my_turn():
            await self.sweep()

    async def sweep(self) -> int:
        """Settle what others left behind; how many requests that were."""
        tenants = await self._link.run(scripts.MEMBERS, [self._store.keys.tenants()], [])
        count = 0
        for tenant in (FLEET, *(name.decode() for name in tenants)):
            count += await self._sweep(tenant)
        if count:
            log.warning("requests_abandoned", requests=count)
        return count

    async def _renew(self) -> None:
        calls: list[Call] = []
        for tenant, open_ in list(self._open.items()):
            if not open_:
                del self._open[tenant]
                continue
            key = self._store.keys.leases(tenant)
            calls += [(scripts.RENEW, [key], [self._store.lease_ms, *some]) for some in _together(open_)]
        if calls:
            await self._link.run_in_order(calls)

    async def _my_turn(self) -> bool:
        """Whether no other process looks in this round."""
        pause = self._store.lease_ms // ROUNDS
        return bool(await self._link.run(scripts.LOCK, [self._store.keys.sweeper()], ["1", pause]))

    async def _sweep(self, tenant: str) -> int:
        keys, count = self._store.keys, 0
        places = [keys.open(tenant), keys.leases(tenant)]
        while True:
            found = await self._link.run(scripts.EXPIRED, places, [TOGETHER])
            faults = 0
            for name, note in found:
                try:
                    where, arguments = self._settling(name.decode(), note)
                    count += await self._link.run(scripts.SETTLE, where, arguments)
                except (ValueError, StateRefused):
                    # Of a later version, perhaps: it must not keep all others from being settled.
                    faults += 1
                    log.exception("abandoned_fault")
            if len(found) < TOGETHER or faults:
                return count

    def _settling(self, record_id: str, note: bytes) -> tuple[list[str], list[str | bytes | int | float]]:
        if not note:
            return self._store.settling_fleet(record_id)
        record = _decode(note)
        record.error_code = ABANDONED
        return self._store.settling(record, None, abandoned=True)[0]


def _together(names: Iterable[str]) -> Iterator[list[str]]:
    """As many at a time as a script takes."""
    left = iter(list(names))
    while some := list(islice(left, TOGETHER)):
        yield some
