"""Limits, budgets and the ledger on Redis: one script before a call, one after it.

Each reservation has a lease, which the process renews while the request runs. What a process leaves behind
when it is killed is settled by another one once the lease has ended: see `leases.py`. Raises StateUnavailable
when there is no answer; `fleet.py` says what then.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Final, TypeAlias

import msgspec

from service.domain import Principal, RequestRecord
from service.errors import StateUnavailable, WeirError
from service.ports import Demand, Reservation
from service.rules import TICKS, Check, Kind, Rulebook
from service.stores import standing
from service.stores.redis import scripts
from service.stores.redis.keys import FLEET, Keys
from service.stores.redis.link import Link
from service.usage import SUMS_MOST, increments

SAME_RECORD_MS: Final = 15 * 60 * 1000
"""So long after its minute a record that is sent once more is known to be there."""
ABANDONED_RECORD_MS: Final = 24 * 3600 * 1000
"""The same for one that was entered in place of a process that had gone, should it not be gone after all."""
HOUR_MS: Final = 35 * 24 * 3600 * 1000
DAY_MS: Final = 400 * 24 * 3600 * 1000
"""How long the sums of an hour and of a day are kept."""
ID_LETTERS: Final = 20
"""The random end of a record's id; its beginning is the time, and the same for all of a moment."""
HELD_PLANS: Final = 10_000

_encode: Final = msgspec.json.encode

Arguments: TypeAlias = list[str | bytes | int | float]
Write: TypeAlias = tuple[list[str], Arguments]


class Plan(msgspec.Struct, frozen=True):
    """The counters of one tenant, or of the fleet, that a request must pass, and where they are."""

    tenant: str
    checks: tuple[Check, ...]
    keys: tuple[str, ...]
    """Of the requests under way and their leases, then of each counter."""
    settled: tuple[tuple[Check, str], ...]
    """Those on which the real use is counted, with their keys."""


class RedisAccounts:
    """One account for all pods. `most` records stay in each tenant's stream, about."""

    def __init__(
        self, link: Link, rules: Rulebook, *, most: int = 20_000, lease_seconds: float = 60.0
    ) -> None:
        self.rules = rules
        self._link = link
        self.keys = Keys(link.prefix)
        self._most = most
        self._lease_seconds = lease_seconds
        self.lease_ms = round(lease_seconds * 1000)
        self.plans = lru_cache(maxsize=HELD_PLANS)(self._plans)
        self._bare = lru_cache(maxsize=HELD_PLANS)(lambda tenant: self._plan(tenant, ()))

    def under(self, rules: Rulebook) -> RedisAccounts:
        """The same counters under other rules, with plans of its own."""
        return RedisAccounts(self._link, rules, most=self._most, lease_seconds=self._lease_seconds)

    def plans_for(self, record: RequestRecord, demand: Demand) -> tuple[Plan, ...]:
        """The tenant's counters, which may be none, and the fleet's if there are any."""
        return self.plans(record.principal, demand.model, demand.address if self.rules.by_address else "")

    async def reserve(self, record: RequestRecord, demand: Demand, plans: Sequence[Plan]) -> Reservation:
        """Set aside at all counters, or at none. Raises RateLimited, BudgetExceeded, StateUnavailable."""
        begun = _encode(record)
        checks: tuple[Check, ...] = ()
        numbers: list[int] = []
        for place, plan in enumerate(plans):
            note = begun if plan.tenant != FLEET else b""
            try:
                found = await self._reserve(record, plan, demand, note)
            except WeirError:
                await self._release(record.id, plans[:place])
                raise
            checks += plan.checks
            numbers += found
        return Reservation(standing.standing(checks, numbers, record.principal.name), held=plans)

    def settling(
        self, record: RequestRecord, plans: Sequence[Plan] | None, *, abandoned: bool = False
    ) -> list[Write]:
        """Keys and arguments of the script that settles, for each tag, to run now or later."""
        if plans is None:
            plans = (self._bare(record.principal.tenant),)
        return [self._settling(record, plan, abandoned) for plan in plans]

    def settling_fleet(self, record_id: str) -> Write:
        """For a request at the fleet's counters that nobody knows the use of."""
        keys = self.keys
        entered = keys.entered(FLEET, _minute(record_id))
        places = [keys.open(FLEET), keys.leases(FLEET), entered, entered, entered, entered]
        return places, [record_id, record_id[-ID_LETTERS:], "", 0, ABANDONED_RECORD_MS, 0, 0, 1, 0, 0]

    # -- the scripts' words ----------------------------------------------------------------------

    async def _reserve(self, record: RequestRecord, plan: Plan, demand: Demand, note: bytes) -> list[int]:
        arguments: Arguments = [record.id, self.lease_ms, note]
        for check in plan.checks:
            want = standing.wanted(check, demand)
            if check.kind is Kind.BUDGET:
                most = standing.held(check, demand)
                arguments += [check.kind, want, check.limit if check.hard else 0, most, check.period]
            elif check.kind is Kind.CONCURRENT:
                arguments += [check.kind, want, check.limit, 0, ""]
            else:
                arguments += [check.kind, want, check.capacity_ticks, standing.most_ahead(check), ""]
        answer = await self._link.run(scripts.RESERVE, plan.keys, arguments)
        if answer[0]:
            check, wait = plan.checks[answer[0] - 1], answer[1] / TICKS
            if check.kind is not Kind.BUDGET:
                raise standing.refusal(check, wait)
            raise standing.overspent(check, wait, answer[3], record.principal.name, reserved=bool(answer[2]))
        numbers: list[int] = answer[1:]
        return numbers

    async def _release(self, record_id: str, plans: Sequence[Plan]) -> None:
        """Take back what was set aside before another counter refused; else the lease's end does."""
        for plan in plans:
            try:
                await self._link.run(scripts.RELEASE, plan.keys[:2], [record_id])
            except StateUnavailable:
                return

    def _settling(self, record: RequestRecord, plan: Plan, abandoned: bool) -> Write:
        keys, tenant, short = self.keys, plan.tenant, record.id[-ID_LETTERS:]
        hour, day = keys.sums(tenant, int(record.started_at // 3600))
        entered = keys.entered(tenant, _minute(record.id))
        places = [plan.keys[0], plan.keys[1], entered, keys.ledger(tenant), hour, day]
        note = _encode(record) if tenant != FLEET else b""
        sums = increments(record) if note else ()
        again = ABANDONED_RECORD_MS if abandoned else SAME_RECORD_MS
        arguments: Arguments = [record.id, short, note, self._most, again, HOUR_MS, DAY_MS]
        arguments += [int(abandoned), SUMS_MOST, len(sums)]
        for name, number in sums:
            arguments += (name, number)
        for check, key in plan.settled:
            places.append(key)
            arguments += (check.kind, standing.used(check, record), check.period)
        return places, arguments

    def _plans(self, principal: Principal, model: str, address: str) -> tuple[Plan, ...]:
        """The tenant's, which is there for the record too, and the fleet's if it has counters."""
        checks = self.rules.checks(principal, model, address)
        plans = [self._plan(principal.tenant, [c for c in checks if not c.fleet])]
        if fleet := [c for c in checks if c.fleet]:
            plans.append(self._plan(FLEET, fleet))
        return tuple(plans)

    def _plan(self, tenant: str, checks: Sequence[Check]) -> Plan:
        counters = [self.keys.counter(tenant, check.name) for check in checks]
        return Plan(
            tenant,
            tuple(checks),
            (self.keys.open(tenant), self.keys.leases(tenant), *counters),
            tuple(
                (check, key)
                for check, key in zip(checks, counters, strict=True)
                if check.kind in (Kind.TOKENS, Kind.BUDGET)
            ),
        )


def _minute(record_id: str) -> int:
    """The minute since 1970 with which a record's id begins: whoever settles it finds the same."""
    return int(record_id[:12], 16) // 60_000
