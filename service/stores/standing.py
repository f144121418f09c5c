"""What counters say, as what callers are told: where a principal stands, and why it is refused."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Final

from service.domain import BudgetState, RequestRecord, Standing, Window
from service.errors import BudgetExceeded, BudgetReserved, RateLimited, WeirError
from service.ports import Demand
from service.rules import NANO, TICKS, Check, Kind

DEBT_WINDOWS: Final = 10
"""An answer that was longer than its estimate is paid off afterwards, but for no more windows than these."""
MOST_USD: Final = 1_000_000.0
"""What one request is taken to have cost at the most: sums must not overflow, whatever an upstream says."""
BUSY_SECONDS: Final = 1.0
"""When a place among the requests at a time may be free again: nobody knows."""
EXPECTED_AGAIN: Final = "wait and send this one again"


def wanted(check: Check, demand: Demand) -> int:
    """What a request asks of a counter: ticks, a place, or billionths of a dollar."""
    if check.kind is Kind.REQUESTS:
        return check.ticks(1)
    if check.kind is Kind.TOKENS:
        # What is larger than a whole window goes through when nothing else has used it.
        return check.ticks(min(demand.tokens, check.limit))
    return _nano(demand.usd, check) if check.kind is Kind.BUDGET else 1


def held(check: Check, demand: Demand) -> int:
    """What a call keeps others from at a budget while it runs: the most that it may cost."""
    return max(_nano(demand.most_usd, check), _nano(demand.usd, check)) if check.hard else 0


def used(check: Check, record: RequestRecord) -> int:
    """What a request has really used of a counter for tokens or dollars."""
    if check.kind is Kind.TOKENS:
        tokens = record.usage.total_tokens if record.usage is not None else 0
        return check.ticks(min(tokens, check.limit * (DEBT_WINDOWS + 1)))
    return cost_nano(record)


def cost_nano(record: RequestRecord) -> int:
    return round(min(record.cost.usd, MOST_USD) * NANO) if record.cost.usd is not None else 0


def most_ahead(check: Check) -> int:
    """How far in ticks a window may be used up in advance."""
    return check.capacity_ticks * (DEBT_WINDOWS if check.kind is Kind.TOKENS else 1)


def standing(checks: Sequence[Check], numbers: Sequence[int], key: str) -> Standing:
    """From what each counter says after this request: ticks used up, places taken, billionths spent."""
    requests: Window | None = None
    tokens: Window | None = None
    budgets = []
    for check, number in zip(checks, numbers, strict=True):
        if check.kind is Kind.REQUESTS:
            requests = _tighter(requests, _window(check, number))
        elif check.kind is Kind.TOKENS:
            tokens = _tighter(tokens, _window(check, number))
        elif check.kind is Kind.BUDGET:
            budgets.append(_budget(check, number, key))
    return Standing(requests, tokens, tuple(budgets))


def overspent(check: Check, wait: float, spent: int, key: str, *, reserved: bool) -> WeirError:
    """Why a budget refuses a request: `reserved` if it is not spent. In `wait` seconds it begins anew."""
    refused: BudgetReserved | BudgetExceeded
    if reserved:
        refused = BudgetReserved(
            f"The calls that run now may need what is left of the budget `{check.rule}`; {EXPECTED_AGAIN}."
        )
    else:
        anew = datetime.now(tz=UTC) + timedelta(seconds=wait)
        refused = BudgetExceeded(
            f"The budget `{check.rule}` of this {check.period} is spent, or what is left of it is less than "
            f"this call may cost; it begins anew on {anew:%Y-%m-%d} at 00:00 UTC.",
            retry_after_seconds=wait,
        )
    refused.standing = Standing(budgets=(_budget(check, spent, key),))
    return refused


def refusal(check: Check, wait: float) -> WeirError:
    """Why a limit refuses a request; `wait` in seconds."""
    if check.kind is Kind.REQUESTS:
        refused = RateLimited(
            f"You sent too many requests (limit `{check.rule}`); {EXPECTED_AGAIN}.", retry_after_seconds=wait
        )
        refused.standing = Standing(requests=Window(check.limit, 0, wait))
        return refused
    if check.kind is Kind.TOKENS:
        refused = RateLimited(
            f"You asked for too many tokens (limit `{check.rule}`); {EXPECTED_AGAIN}.",
            retry_after_seconds=wait,
        )
        refused.standing = Standing(tokens=Window(check.limit, 0, wait))
        return refused
    return RateLimited(
        f"Too many of your requests run at the same time (limit `{check.rule}`); {EXPECTED_AGAIN}.",
        retry_after_seconds=BUSY_SECONDS,
    )


def _nano(usd: float, check: Check) -> int:
    """Billionths; whatever a caller asks for, no more than just does not fit."""
    return round(min(usd * NANO, check.limit + 1))


def _budget(check: Check, spent: int, key: str) -> BudgetState:
    return BudgetState(
        check.rule,
        key if check.subject else "",
        used_ratio=spent / check.limit,
        remaining_usd=max(check.limit - spent, 0) / NANO,
        warns=spent >= check.warn_at,
    )


def _window(check: Check, ahead: int) -> Window:
    capacity = check.capacity_ticks
    remaining = max(capacity - ahead, 0) * check.limit // capacity
    return Window(check.limit, remaining, ahead / TICKS)


def _tighter(one: Window | None, other: Window) -> Window:
    return other if one is None or other.remaining < one.remaining else one
