"""The sums of the ledger in the process's memory: the same as in Redis, of this process alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Literal

from service.domain import RequestRecord
from service.ports import UsageRow
from service.usage import DAY, DAYS_KEPT, HOUR, HOURS_KEPT, OTHER, SUMS_MOST, increments, rows_of


class MemoryUsageBook:
    """Sums by the hour and day in which a request began: 35 days of hours, 400 days."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._hours = _Shelf(HOUR, HOURS_KEPT)
        self._days = _Shelf(DAY, DAYS_KEPT)

    def __len__(self) -> int:
        """Hours and days of all tenants that are held."""
        return len(self._hours.kept) + len(self._days.kept)

    def add(self, record: RequestRecord) -> None:
        """Add the record's numbers; those of a time that is kept no longer count nowhere."""
        now, tenant, numbers = self._clock(), record.principal.tenant, increments(record)
        for shelf in (self._hours, self._days):
            sums = shelf.sums(tenant, record.started_at, now)
            if sums is not None:
                full = len(sums) >= SUMS_MOST
                for name, number in numbers:
                    if full and name not in sums:
                        key, _, what = name.split("|")
                        name = f"{key}|{OTHER}|{what}"
                    sums[name] = sums.get(name, 0) + number

    async def tenants(self) -> Sequence[str]:
        return sorted({tenant for _, tenant in self._days.kept})

    async def rows(
        self, tenant: str, since: int, until: int, unit: Literal["hour", "day"]
    ) -> Sequence[UsageRow]:
        shelf = self._hours if unit == "hour" else self._days
        shelf.forget(self._clock())
        found: list[UsageRow] = []
        for at in range(-(-since // shelf.seconds) * shelf.seconds, until, shelf.seconds):
            found += rows_of(tenant, at, shelf.kept.get((at, tenant), {}).items())
        return found


class _Shelf:
    """Sums by the beginning of their hour or day, and tenant; so many hours or days of them."""

    def __init__(self, seconds: int, most: int) -> None:
        self.seconds = seconds
        self._most = most
        self.kept: dict[tuple[int, str], dict[str, int]] = {}
        self._looked = 0
        """The hour or day at which what is too old was dropped last."""

    def sums(self, tenant: str, at: float, now: float) -> dict[str, int] | None:
        """Those to which a record of time `at` adds; None if it is too old."""
        self.forget(now)
        place = (int(at // self.seconds) * self.seconds, tenant)
        sums = self.kept.get(place)
        if sums is None and place[0] >= self._oldest(now):
            sums = self.kept[place] = {}
        return sums

    def forget(self, now: float) -> None:
        """Drop what is too old; that can be so only once an hour or day."""
        current = int(now // self.seconds)
        if current != self._looked:
            self._looked = current
            oldest = self._oldest(now)
            for place in [place for place in self.kept if place[0] < oldest]:
                del self.kept[place]

    def _oldest(self, now: float) -> int:
        return (int(now // self.seconds) - self._most) * self.seconds
