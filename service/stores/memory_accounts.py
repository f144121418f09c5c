"""Limits, budgets and the ledger in this process's memory: for one process, and while Redis is away."""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Final, Protocol

import msgspec

from service.domain import Principal, RequestRecord
from service.ports import Demand, Reservation
from service.rules import TICKS, Check, Kind, Rulebook
from service.stores import standing

MOST_COUNTERS: Final = 20_000
MOST_IDS: Final = 10_000
"""Requests that are known to be in the book, should one be settled again."""


class Summing(Protocol):
    """What adds the records up."""

    def add(self, record: RequestRecord) -> None: ...


class _Budget(msgspec.Struct):
    period: tuple[int, int]
    spent: int = 0
    held: int = 0


class _Hold(msgspec.Struct, frozen=True):
    check: Check
    place: str
    amount: int
    due: int = 0


class MemoryAccounts:
    """The latest `most` records, and all counters.

    A window may be used up at once, and comes back evenly (GCRA): what is kept of it is one number, the
    time at which it would be whole again. All numbers are whole, so nothing is admitted beyond a limit by
    rounding. `spent` says what of a budget is spent before it is counted here.
    """

    def __init__(
        self,
        rules: Rulebook,
        *,
        most: int = 2_000,
        book: Summing | None = None,
        spent: Callable[[str, Check], int] = lambda _tenant, _check: 0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.rules = rules
        self.records: deque[RequestRecord] = deque(maxlen=most)
        self._book = book
        self._spent_before = spent
        self._clock = clock
        self._due: dict[str, int] = {}
        self._most_due = MOST_COUNTERS
        self._running: dict[str, int] = {}
        self._budgets: dict[str, _Budget] = {}
        self._entered: dict[str, None] = {}

    def under(self, rules: Rulebook) -> MemoryAccounts:
        """The same counters and the same book under other rules. Either settles what the other reserved."""
        other = copy.copy(self)
        other.rules = rules
        return other

    @property
    def by_address(self) -> bool:
        return self.rules.by_address

    def estimates(self, principal: Principal, model: str) -> bool:
        return counts_use(self.rules.checks(principal, model))

    async def reserve(self, record: RequestRecord, demand: Demand) -> Reservation:
        principal = record.principal
        checks = self.rules.checks(principal, demand.model, demand.address)
        if not checks:
            return Reservation()
        now = int(self._clock() * TICKS)
        numbers, holds = [], []
        for check in checks:
            place = f"{'' if check.fleet else principal.tenant}\n{check.name}"
            number, hold = self._try(check, place, demand, principal, now)
            numbers.append(number)
            holds.append(hold)
        for hold in holds:
            self._take(hold)
        return Reservation(standing.standing(checks, numbers, principal.name), held=tuple(holds))

    async def settle(self, record: RequestRecord, reservation: Reservation | None) -> None:
        if record.id in self._entered:
            return
        self._entered[record.id] = None
        if len(self._entered) > MOST_IDS:
            del self._entered[next(iter(self._entered))]
        self.records.append(record)
        if self._book is not None:
            self._book.add(record)
        if reservation is not None:
            self.count(record, reservation.held or ())

    def count(self, record: RequestRecord, holds: Sequence[_Hold]) -> None:
        """Count what was really used, give back the rest."""
        now = int(self._clock() * TICKS)
        for hold in holds:
            kind = hold.check.kind
            if kind is Kind.CONCURRENT:
                left = self._running[hold.place] - 1
                if left:
                    self._running[hold.place] = left
                else:
                    del self._running[hold.place]
            elif kind is Kind.TOKENS:
                self._refund(hold, standing.used(hold.check, record), now)
            elif kind is Kind.BUDGET:
                budget = self._budget(hold.place, hold.check, record.principal.tenant)
                budget.held -= hold.amount
                budget.spent += standing.used(hold.check, record)

    def _try(
        self, check: Check, place: str, demand: Demand, principal: Principal, now: int
    ) -> tuple[int, _Hold]:
        """The counter's number after this request, and what to take. Raises what refuses it."""
        want = standing.wanted(check, demand)
        if check.kind is Kind.CONCURRENT:
            running = self._running.get(place, 0)
            if running >= check.limit:
                raise standing.refusal(check, 0.0)
            return running + 1, _Hold(check, place, want)
        if check.kind is Kind.BUDGET:
            budget = self._budget(place, check, principal.tenant)
            held = standing.held(check, demand)
            # What costs nothing goes through a spent budget, too.
            if (check.hard and want + held > 0) and (
                budget.spent >= check.limit or budget.spent + budget.held + want > check.limit
            ):
                fits = budget.spent < check.limit and budget.spent + want <= check.limit
                left = budget.period[1] - self._clock()
                raise standing.overspent(check, left, budget.spent, principal.name, reserved=fits)
            return budget.spent, _Hold(check, place, held)
        due = min(max(self._due.get(place, now), now), now + standing.most_ahead(check)) + want
        wait = due - now - check.capacity_ticks
        if wait > 0:
            raise standing.refusal(check, wait / TICKS)
        return due - now, _Hold(check, place, want, due)

    def _take(self, hold: _Hold) -> None:
        kind = hold.check.kind
        if kind is Kind.CONCURRENT:
            self._running[hold.place] = self._running.get(hold.place, 0) + 1
        elif kind is Kind.BUDGET:
            self._budgets[hold.place].held += hold.amount
        else:
            self._due[hold.place] = hold.due
            if len(self._due) > self._most_due:
                now = int(self._clock() * TICKS)
                for place in [place for place, due in self._due.items() if due <= now]:
                    del self._due[place]  # not a new dict: those under other rules have the same
                self._most_due = max(MOST_COUNTERS, 2 * len(self._due))  # so as not to look each time

    def _refund(self, hold: _Hold, used: int, now: int) -> None:
        """Only what time has not given back yet, so that nobody gets it twice."""
        due = self._due.get(hold.place, now)
        if used > hold.amount:
            self._due[hold.place] = max(due, now) + used - hold.amount
        else:
            self._due[hold.place] = due - min(hold.amount - used, max(hold.due - now, 0))

    def _budget(self, place: str, check: Check, tenant: str) -> _Budget:
        """The budget in the current period; what runs over its end is counted in the next."""
        period = _period(self._clock(), check.period)
        budget = self._budgets.get(place)
        if budget is None:
            budget = self._budgets[place] = _Budget(period, self._spent_before(tenant, check))
        elif budget.period != period:
            budget.period, budget.spent = period, 0
        return budget


def counts_use(checks: Sequence[Check]) -> bool:
    """Whether any of them counts tokens or dollars."""
    return any(check.kind in (Kind.TOKENS, Kind.BUDGET) for check in checks)


def _period(now: float, period: str) -> tuple[int, int]:
    """Beginning and end of the day or month, UTC, in seconds since 1970."""
    day = datetime.fromtimestamp(now, tz=UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    if period == "day":
        return round(day.timestamp()), round((day + timedelta(days=1)).timestamp())
    first = day.replace(day=1)
    following = (first + timedelta(days=32)).replace(day=1)
    return round(first.timestamp()), round(following.timestamp())
