"""Which limits and budgets hold for a request: the rules of the configuration, as counters to check.

Pure: what is counted, and where, is the business of `stores`. A rule that counts apart for keys or
tenants has counters of one tenant; one that does not has counters of the whole fleet.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from fnmatch import fnmatchcase
from functools import lru_cache
from math import ceil
from typing import Final, Literal
from urllib.parse import quote

import msgspec

from service.config import BudgetConfig, LimitConfig
from service.domain import Principal

DEFAULT: Final = "default"
"""The name of the rule that RATE_LIMIT_REQUESTS makes."""
TICKS: Final = 10_000_000
"""A second, as windows are counted: whole numbers that a double holds exactly for 28 years."""
NANO: Final = 1_000_000_000
"""Budgets are counted in billionths of a dollar: whole numbers, so that sums are exact."""
HELD_CHECKS: Final = 10_000


class Kind(StrEnum):
    """What a counter counts."""

    REQUESTS = "requests"
    TOKENS = "tokens"
    CONCURRENT = "concurrent"
    BUDGET = "budget"


class Check(msgspec.Struct, frozen=True):
    """One counter that a request must pass."""

    rule: str
    kind: Kind
    subject: str
    """Whose it is, percent-encoded: the key, model, address; not the tenant, which has its own counters."""
    fleet: bool
    """It is not one tenant's."""
    limit: int
    """Requests, tokens, requests at a time, or billionths of a dollar."""
    window_seconds: float = 0.0
    period: Literal["day", "month", ""] = ""
    warn_at: int = 0
    """Billionths of a dollar from which on a budget warns."""
    hard: bool = True

    def ticks(self, units: int) -> int:
        """How much of the window `units` use up, in tenths of a microsecond; rounded up."""
        return -(-units * round(self.window_seconds * TICKS) // self.limit)

    @property
    def capacity_ticks(self) -> int:
        """What may be used up at once: for requests exactly `limit` times what one uses up."""
        if self.kind is Kind.REQUESTS:
            return self.ticks(1) * self.limit
        return round(self.window_seconds * TICKS)

    @property
    def name(self) -> str:
        """What its counter is called, within its tenant or the fleet. Another window is another counter."""
        window = f"{self.window_seconds:g}" if self.window_seconds else self.period
        return f"{self.kind}:{self.rule}:{window}:{self.subject}"


class Rulebook:
    """The rules, and for each request those that hold for it."""

    def __init__(
        self,
        limits: Sequence[LimitConfig] = (),
        budgets: Sequence[BudgetConfig] = (),
        *,
        requests: int | None = None,
        window_seconds: float = 60.0,
    ) -> None:
        self._limits = tuple(limits)
        self._budgets = tuple(budgets)
        self._requests = requests
        self._window = window_seconds
        self.by_address = any("address" in rule.per for rule in limits)
        """Whether anybody needs to know the client's address."""
        self._held = lru_cache(maxsize=HELD_CHECKS)(self._find)

    def __bool__(self) -> bool:
        return bool(self._limits or self._budgets or self._requests)

    def checks(self, principal: Principal, model: str, address: str = "") -> tuple[Check, ...]:
        """All that hold: the tenant's before the fleet's, limits before budgets. Few are new, so held.

        Some upstreams take a model's name in any case, so to the rules all of them are one.
        """
        return self._held(principal, model.casefold(), address if self.by_address else "")

    def share(self, sharers: int) -> Rulebook:
        """The part that one of `sharers` may use by itself; rounded up, so never nothing."""

        def part(limit: int | None) -> int | None:
            return None if limit is None else ceil(limit / sharers)

        return Rulebook(
            [
                rule.model_copy(
                    update={
                        "requests": part(rule.requests),
                        "tokens": part(rule.tokens),
                        "concurrent": part(rule.concurrent),
                    }
                )
                for rule in self._limits
            ],
            [rule.model_copy(update={"usd": rule.usd / sharers}) for rule in self._budgets],
            requests=part(self._requests),
            window_seconds=self._window,
        )

    def _find(self, principal: Principal, model: str, address: str) -> tuple[Check, ...]:
        limits = [rule for rule in self._limits if _holds(rule, principal, model)]
        found = [check for rule in limits for check in _checks(rule, principal, model, address)]
        own = any(rule.requests is not None and "key" in rule.per for rule in limits)
        if self._requests is not None and not own:
            subject = _subject(("key",), principal, model, address)
            found.insert(
                0,
                Check(DEFAULT, Kind.REQUESTS, subject, fleet=False, limit=self._requests,
                      window_seconds=self._window),
            )  # fmt: skip
        for budget in self._budgets:
            if _holds(budget, principal, model):
                limit = max(round(budget.usd * NANO), 1)
                per = ("key",) if budget.per == "key" else ()
                found.append(
                    Check(
                        budget.name,
                        Kind.BUDGET,
                        _subject(per, principal, model, address),
                        fleet=False,
                        limit=limit,
                        period=budget.period,
                        warn_at=round(limit * budget.warn_at),
                        hard=budget.hard,
                    )
                )
        return tuple(sorted(found, key=_order))


def _order(check: Check) -> bool:
    """The tenant's own first, else as they stand: that is how stores ask them, each tag by itself."""
    return check.fleet


def _holds(rule: LimitConfig | BudgetConfig, principal: Principal, model: str) -> bool:
    return (
        _names(rule.tenants, principal.tenant)
        and _names(rule.keys, principal.name)
        and _names([pattern.casefold() for pattern in rule.models], model)
    )


def _names(patterns: Sequence[str], name: str) -> bool:
    return not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)


def _checks(rule: LimitConfig, principal: Principal, model: str, address: str) -> list[Check]:
    subject = _subject(rule.per, principal, model, address)
    fleet = not {"key", "tenant"} & set(rule.per)

    def check(kind: Kind, limit: int, window_seconds: float) -> Check:
        return Check(rule.name, kind, subject, fleet=fleet, limit=limit, window_seconds=window_seconds)

    found = []
    if rule.requests is not None:
        found.append(check(Kind.REQUESTS, rule.requests, rule.window))
    if rule.tokens is not None:
        found.append(check(Kind.TOKENS, rule.tokens, rule.window))
    if rule.concurrent is not None:
        found.append(check(Kind.CONCURRENT, rule.concurrent, 0.0))
    return found


def _subject(per: Sequence[str], principal: Principal, model: str, address: str) -> str:
    values = {"key": principal.name, "model": model, "address": address}
    return ":".join(quote(values[what], safe="") for what in ("key", "model", "address") if what in per)
