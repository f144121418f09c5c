"""Limits and budgets in memory, against models simple enough to be seen to be right."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.config import BudgetConfig, LimitConfig
from service.domain import Cost, Operation, Principal, RequestRecord, Usage
from service.errors import BudgetExceeded, BudgetReserved, RateLimited, WeirError
from service.ports import Demand, Reservation
from service.rules import NANO, Rulebook
from service.stores.memory_accounts import MemoryAccounts
from tests.unit.ports import Clock

ANNA, BERT = Principal("anna", "team"), Principal("bert", "team")
numbers = iter(range(10**9))


def record(who: Principal = ANNA) -> RequestRecord:
    return RequestRecord(f"id-{next(numbers)}", "r", "/v1/x", Operation.CHAT, who)


def limited(clock: Clock, **values: Any) -> MemoryAccounts:
    return MemoryAccounts(Rulebook([LimitConfig(name="a", **values)]), clock=clock)


def now(coroutine: Any) -> Any:
    """What a coroutine returns that never waits: nothing in memory does."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("it waited")


def refused(accounts: MemoryAccounts, who: Principal = ANNA, **asked: Any) -> WeirError | None:
    try:
        now(accounts.reserve(record(who), Demand("m", **asked)))
    except WeirError as error:
        return error
    return None


def wait_for(accounts: MemoryAccounts, **asked: Any) -> float | None:
    """Seconds to wait, or None if the request was admitted."""
    error = refused(accounts, **asked)
    assert error is None or isinstance(error, RateLimited)
    return error.retry_after_seconds if error is not None else None


limits = st.tuples(st.integers(1, 20), st.floats(0.5, 600))
steps = st.lists(st.floats(0, 2), min_size=1, max_size=60)


@given(limits, steps)
def test_no_stretch_of_time_admits_more_than_a_full_share_and_its_refill(
    limit: tuple[int, float], waits: list[float]
) -> None:
    requests, window = limit
    clock = Clock()
    accounts = limited(clock, requests=requests, window=window)
    admitted: list[float] = []
    for wait in waits:
        clock.now += wait * window / requests
        if wait_for(accounts) is None:
            admitted.append(clock.now)
    for first, start in enumerate(admitted):
        for count, end in enumerate(admitted[first:], 1):
            assert count <= requests + math.floor((end - start) * requests / window + 1e-3)


@given(limits, steps)
def test_a_limit_is_a_bucket_that_fills_evenly(limit: tuple[int, float], waits: list[float]) -> None:
    requests, window = limit
    clock = Clock(0.0)
    accounts = limited(clock, requests=requests, window=window)
    bucket = float(requests)
    for wait in waits:
        clock.now += wait * window / requests
        bucket = min(bucket + wait, float(requests))
        waiting = wait_for(accounts)
        if waiting is None:
            assert bucket >= 1 - 1e-3
            bucket -= 1
        else:
            assert bucket < 1 + 1e-3
            assert waiting == pytest.approx((1 - bucket) * window / requests, rel=1e-3, abs=1e-3 * window)


@given(limits)
def test_a_whole_share_may_be_used_at_once_and_comes_back_one_by_one(limit: tuple[int, float]) -> None:
    requests, window = limit
    clock = Clock()
    accounts = limited(clock, requests=requests, window=window)
    assert [wait_for(accounts) for _ in range(requests)] == [None] * requests
    for _ in range(3):
        waiting = wait_for(accounts)
        assert waiting is not None
        assert waiting == pytest.approx(window / requests, rel=1e-3)
        clock.now += waiting + 1e-6
        assert wait_for(accounts) is None, "after exactly the time that it named"
        assert wait_for(accounts) is not None


calls = st.lists(
    st.tuples(
        st.floats(0, 0.5),  # of a window, until it begins
        st.integers(0, 300),  # tokens expected
        st.integers(0, 400),  # tokens used
        st.integers(0, 4),  # how many further calls begin before it ends
    ),
    min_size=1,
    max_size=40,
)


@given(st.integers(100, 1_000), calls)
def test_tokens_used_are_never_more_than_the_window_and_its_refill_and_what_was_unforeseen(
    limit: int, asked: list[tuple[float, int, int, int]]
) -> None:
    """The model is a leaky bucket of what was really used, each call's at its beginning."""
    window, clock = 100.0, Clock(0.0)
    accounts = limited(clock, tokens=limit, window=window)
    running: list[tuple[int, RequestRecord, Reservation, int, int]] = []
    level, level_at, unforeseen = Fraction(0), 0.0, 0
    for number, (pause, expected, used, lasts) in enumerate(asked):
        clock.now += pause * window
        for call in [c for c in running if c[0] <= number]:
            running.remove(call)
            _settle(accounts, call)
        begun = record()
        try:
            reservation = now(accounts.reserve(begun, Demand("m", tokens=expected)))
        except RateLimited:
            continue
        drained = Fraction(clock.now - level_at) * limit / Fraction(window)
        level, level_at = max(level - drained, Fraction(0)) + used, clock.now
        unforeseen += max(used - min(expected, limit), 0)
        running.append((number + 1 + lasts, begun, reservation, expected, used))
        assert level <= limit + unforeseen + Fraction(1, 100)


def _settle(accounts: MemoryAccounts, call: tuple[int, RequestRecord, Reservation, int, int]) -> None:
    _, begun, reservation, _, used = call
    begun.usage = Usage(used, 0)
    now(accounts.settle(begun, reservation))


spending = st.lists(
    st.tuples(
        st.integers(1, 50),  # expected, in cents
        st.floats(1, 3),  # the most, as a multiple of that
        st.floats(0, 1.5),  # what it costs, as a multiple of the most: above 1 the estimate was wrong
        st.integers(0, 5),
    ),
    min_size=1,
    max_size=60,
)


@given(st.integers(1, 300), spending)
def test_a_budget_is_overspent_by_no_more_than_the_errors_of_estimates_and_one_call(
    cents: int, asked: list[tuple[int, float, float, int]]
) -> None:
    clock = Clock(1_790_000_000.0)
    budget = BudgetConfig(name="b", usd=cents / 100, period="day")
    accounts = MemoryAccounts(Rulebook(budgets=[budget]), clock=clock)
    running: list[tuple[int, RequestRecord, Reservation, float]] = []
    spent, wrong, last = 0.0, 0.0, 0.0
    for number, (expected, most, share, lasts) in enumerate(asked):
        for call in [c for c in running if c[0] <= number]:
            running.remove(call)
            _, ended, reservation, cost = call
            ended.cost = Cost(cost, "table")
            now(accounts.settle(ended, reservation))
        begun = record()
        usd, most_usd = expected / 100, expected * most / 100
        before = spent
        try:
            reservation = now(accounts.reserve(begun, Demand("m", usd=usd, most_usd=most_usd)))
        except BudgetExceeded:
            continue
        except BudgetReserved:
            assert running, "nothing runs that could need it"
            continue
        cost = most_usd * share
        spent = before + cost
        wrong += max(cost - most_usd, 0.0)
        last = max(last, cost - usd)
        running.append((number + 1 + lasts, begun, reservation, cost))
    assert spent <= cents / 100 + wrong + max(last, 0.0) + 1e-6


@given(st.lists(st.floats(0, 10, allow_subnormal=False), min_size=1, max_size=30))
def test_what_is_spent_is_the_sum_to_the_billionth(costs: list[float]) -> None:
    budget = BudgetConfig(name="b", usd=1_000_000, hard=False)
    accounts = MemoryAccounts(Rulebook(budgets=[budget]), clock=Clock(1_790_000_000.0))
    for cost in costs:
        begun = record()
        reservation = now(accounts.reserve(begun, Demand("m")))
        begun.cost = Cost(cost, "table")
        now(accounts.settle(begun, reservation))
    state = now(accounts.reserve(record(), Demand("m"))).standing.budgets[0]
    whole = sum(round(cost * NANO) for cost in costs)
    assert state.remaining_usd == pytest.approx((1_000_000 * NANO - whole) / NANO, abs=1e-9)


@pytest.mark.parametrize(
    ("period", "begins", "ends"),
    [
        ("day", 1_793_663_999, 1_793_664_000),  # the last second of 2026-11-02
        ("month", 1_793_491_199, 1_793_491_200),  # of October 2026
        ("month", 1_830_297_599, 1_830_297_600),  # of 2027
        ("month", 1_835_481_599, 1_835_481_600),  # of February 2028, which has 29 days
    ],
)
def test_a_budget_begins_anew_with_its_period(period: Any, begins: int, ends: int) -> None:
    clock = Clock(float(begins))
    budget = BudgetConfig(name="b", usd=1.0, period=period)
    accounts = MemoryAccounts(Rulebook(budgets=[budget]), clock=clock)
    begun = record()
    reservation = now(accounts.reserve(begun, Demand("m", usd=1.0, most_usd=1.0)))
    begun.cost = Cost(1.0, "table")
    now(accounts.settle(begun, reservation))
    refusal = refused(accounts, usd=0.5)
    assert isinstance(refusal, BudgetExceeded)
    assert refusal.retry_after_seconds == 1.0
    clock.now = float(ends)
    assert refused(accounts, usd=0.5) is None


def test_the_latest_records_are_kept() -> None:
    accounts = MemoryAccounts(Rulebook(), most=3)
    made = [record() for _ in range(10)]
    for one in made:
        now(accounts.settle(one, None))
    assert list(accounts.records) == made[-3:]


def test_a_share_is_rounded_up_and_never_nothing() -> None:
    rules = Rulebook([LimitConfig(name="a", requests=2, tokens=100, concurrent=1)], requests=5).share(3)
    checks = {check.kind.value: check.limit for check in rules.checks(ANNA, "m")}
    assert checks == {"requests": 1, "tokens": 34, "concurrent": 1}


def test_what_costs_nothing_goes_through_a_spent_budget() -> None:
    accounts = MemoryAccounts(
        Rulebook(budgets=[BudgetConfig(name="b", usd=1.0)]), clock=Clock(1_790_000_000.0)
    )
    begun = record()
    reservation = now(accounts.reserve(begun, Demand("m", usd=1.0, most_usd=1.0)))
    begun.cost = Cost(1.0, "table")
    now(accounts.settle(begun, reservation))
    assert isinstance(refused(accounts, usd=0.1, most_usd=0.1), BudgetExceeded)
    assert refused(accounts) is None


def test_a_model_is_the_same_in_any_case_of_letters() -> None:
    accounts = limited(Clock(), models=("GPT-*",), per=("model",), requests=1)
    assert now(accounts.reserve(record(), Demand("gpt-5"))).standing.requests is not None
    with pytest.raises(RateLimited):
        now(accounts.reserve(record(), Demand("GPT-5")))
