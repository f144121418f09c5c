"""The ports as the application uses them: Redis while it is there, and what was declared while it is away.

| feature | while Redis is away |
|---|---|
| limits, budgets | each pod keeps its share, or everybody gets through, or nobody: LIMITS_WITHOUT_REDIS |
| conversations | a call that names one gets 503; a turn that was answered is kept when Redis is back |
| ledger | records wait in memory, bounded, and are written when Redis is back |
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, Final, Literal

import msgspec

from service.domain import Conversation, Principal, RequestRecord, Turn
from service.errors import BudgetExceeded, RateLimited, StateUnavailable
from service.ports import Demand, Reservation
from service.rules import NANO, Check, Kind, Rulebook
from service.stores.memory_accounts import MemoryAccounts, counts_use
from service.stores.redis.accounts import Plan, RedisAccounts
from service.stores.redis.address import Client
from service.stores.redis.backlog import Backlog, Write
from service.stores.redis.leases import Leases
from service.stores.redis.link import Link
from service.stores.redis.scripts import APPEND, SETTLE
from service.stores.redis.stores import RedisConversations

MOST_KNOWN_BUDGETS: Final = 10_000


class Fleet:
    """The shared state of all pods, joined: a link, a backlog, and the ports on them."""

    def __init__(
        self,
        client: Client,
        *,
        prefix: str,
        timeout_seconds: float,
        max_connections: int,
        backlog_writes: int,
        rules: Rulebook,
        ledger_records: int,
        lease_seconds: float,
    ) -> None:
        self.link = Link(
            client, prefix=prefix, timeout_seconds=timeout_seconds, max_connections=max_connections
        )
        self._listeners: list[Callable[[bool], None]] = []
        self.link.on_change = self._changed
        self.backlog = Backlog(self.link, backlog_writes)
        self.accounts = accounts = RedisAccounts(
            self.link, rules, most=ledger_records, lease_seconds=lease_seconds
        )
        self.leases = Leases(self.link, accounts)
        self._looking: asyncio.Task[None] | None = None

    def watch(self, on_change: Callable[[bool], None], on_drop: Callable[[str], None]) -> None:
        """Tell `on_change` whether Redis is there, and `on_drop` the feature of each write that was lost."""
        self._listeners.append(on_change)
        self.backlog.on_drop = on_drop

    def listen(self, on_change: Callable[[bool], None]) -> None:
        """Tell one more."""
        self._listeners.append(on_change)

    def _changed(self, available: bool) -> None:
        for listener in self._listeners:
            listener(available)

    async def open(self) -> None:
        await self.link.start()
        self.backlog.start()
        self._looking = asyncio.create_task(self.leases.run())

    async def close(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)
        await self.backlog.close()
        await self.link.close()


class FleetConversations:
    """Conversations in Redis; an answered turn is never lost to an outage that ends."""

    def __init__(self, store: RedisConversations, link: Link, backlog: Backlog) -> None:
        self._store = store
        self._link = link
        self._backlog = backlog

    async def load(self, principal: Principal, conversation_id: str) -> Conversation | None:
        self._check_whole(principal, conversation_id)
        found = await self._store.load(principal, conversation_id)
        if found is None and self._link.just_back:
            raise StateUnavailable("The conversation may not be stored yet: the store has just come back.")
        return found

    async def append(
        self,
        principal: Principal,
        conversation_id: str,
        turn: Turn,
        system_prompt: str | None,
        *,
        begin: bool,
    ) -> bool:
        write = self._store.appending(principal, conversation_id, turn, system_prompt, begin=begin)
        lane = self._store.key(principal, conversation_id)
        added = await self._backlog.write(Write("conversations", lane, APPEND, *write))
        return added is None or bool(added)

    async def list(self, principal: Principal, limit: int) -> Sequence[Conversation]:
        return await self._store.list(principal, limit)

    async def delete(self, principal: Principal, conversation_id: str) -> bool:
        self._check_whole(principal, conversation_id)
        return await self._store.delete(principal, conversation_id)

    def of_tenant(self, tenant: str) -> AsyncGenerator[Conversation]:
        return self._store.of_tenant(tenant)

    async def erase(self, tenant: str) -> int:
        return await self._store.erase(tenant)

    def _check_whole(self, principal: Principal, conversation_id: str) -> None:
        """A turn that waits to be written would be missed, and its conversation taken for unknown."""
        if self._backlog.holds(self._store.key(principal, conversation_id)):
            raise StateUnavailable("The conversation's last turn waits to be stored.")


class FleetAccounts:
    """Limits, budgets and the ledger in Redis, and without it what was declared.

    What counts meanwhile is made anew for each outage: it begins with what is known of the budgets.
    """

    def __init__(
        self,
        fleet: Fleet,
        mode: Literal["share", "open", "closed"],
        sharers: int,
    ) -> None:
        self._store = store = fleet.accounts
        self._link = fleet.link
        self._backlog = fleet.backlog
        self._leases = fleet.leases
        self._mode = mode
        self._sharers = sharers
        fleet.listen(self._changed)
        self._rules_here = self._share(store.rules)
        self._meanwhile = _Meanwhile()
        self._left: dict[tuple[str, str], int] = {}
        """Of each budget that was met, by tenant and name: billionths that were left of late."""

    def under(self, rules: Rulebook) -> FleetAccounts:
        """The same state under other rules, during an outage too. Either settles what the other reserved."""
        other = copy.copy(self)
        other._store, other._rules_here = self._store.under(rules), self._share(rules)  # noqa: SLF001
        return other

    @property
    def by_address(self) -> bool:
        return self._store.rules.by_address

    def estimates(self, principal: Principal, model: str) -> bool:
        return counts_use(self._store.rules.checks(principal, model))

    async def reserve(self, record: RequestRecord, demand: Demand) -> Reservation:
        plans = self._store.plans_for(record, demand)
        if self._link.available:
            for plan in plans:  # before: an answer that comes late is of a reservation that is there
                self._leases.begin(plan.tenant, record.id)
            try:
                await self._leases.remember(record.principal.tenant)
                reservation = await self._store.reserve(record, demand, plans)
            except (RateLimited, BudgetExceeded):
                self._leases.end_fleet(record.id)
                raise
            except StateUnavailable:
                pass
            else:
                if reservation.standing.budgets:
                    self._note_budgets(record.principal.tenant, reservation)
                return reservation
        return await self._reserve_here(record, demand, plans)

    async def settle(self, record: RequestRecord, reservation: Reservation | None) -> None:
        held = reservation.held if reservation is not None else None
        if isinstance(held, _HeldHere):
            held.accounts.count(record, held.holds)
            held = held.plans
        tenant = record.principal.tenant
        writes = self._store.settling(record, held)
        if held is None and self._leases.end_fleet(record.id):
            # It was given up on its way: whether Redis has heard of it is not known.
            writes.append(self._store.settling_fleet(record.id))
        self._leases.note(tenant)
        try:
            await self._backlog.write_all(
                [Write("ledger", tenant, SETTLE, keys, arguments) for keys, arguments in writes]
            )
        finally:
            self._leases.end(tenant, record.id)

    def _changed(self, available: bool) -> None:
        """Redis came or went: what was counted here meanwhile was for that time alone."""
        if available:
            self._meanwhile.accounts = None

    async def _reserve_here(
        self, record: RequestRecord, demand: Demand, plans: Sequence[Plan]
    ) -> Reservation:
        if self._mode == "closed" and any(plan.checks for plan in plans):
            raise StateUnavailable(
                "Limits and budgets cannot be counted just now, and without them nobody is let through."
            )
        accounts = self._meanwhile.accounts
        if accounts is None:
            accounts = MemoryAccounts(self._rules_here, spent=self._spent)
        elif accounts.rules is not self._rules_here:
            accounts = accounts.under(self._rules_here)
        self._meanwhile.accounts = accounts
        reservation = await accounts.reserve(record, demand)
        return Reservation(reservation.standing, _HeldHere(accounts, reservation.held or (), plans))

    def _note_budgets(self, tenant: str, reservation: Reservation) -> None:
        budgets = iter(reservation.standing.budgets)
        for plan in reservation.held:
            for check in plan.checks:
                if check.kind is Kind.BUDGET:
                    self._left[(tenant, check.name)] = round(next(budgets).remaining_usd * NANO)
        self._meanwhile.accounts = None  # it began with budgets as they were
        if len(self._left) > MOST_KNOWN_BUDGETS:
            self._left.clear()

    def _share(self, rules: Rulebook) -> Rulebook:
        return rules.share(self._sharers) if self._mode == "share" else Rulebook()

    def _spent(self, tenant: str, check: Check) -> int:
        """So much of this process's share that its share of what was left remains."""
        left = self._left.get((tenant, check.name))
        return 0 if left is None else max(check.limit - left // self._sharers, 0)


class _Meanwhile(msgspec.Struct):
    """What counts while Redis is away; one for all rules, the old ones and the new."""

    accounts: MemoryAccounts | None = None


class _HeldHere(msgspec.Struct, frozen=True):
    """What was set aside in memory, and where it will be counted when Redis is back."""

    accounts: MemoryAccounts
    holds: Any
    plans: Sequence[Plan]
