"""What a request adds to the sums, and how sums are added up."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.domain import UNPRICED, CacheUse, Cost, Operation, Outcome, Principal, RequestRecord, Usage
from service.ports import UsageRow
from service.usage import DAY, HOUR, SUMS, Table, dollars, increments, rows_of


def record(**fields: Any) -> RequestRecord:
    usual: dict[str, Any] = {
        "id": "id",
        "request_id": "request",
        "route": "/v1/chat/completions",
        "operation": Operation.CHAT,
        "principal": Principal("anna", "team"),
        "request_model": "gpt-4o",
        "outcome": Outcome.SUCCESS,
    }
    return RequestRecord(**usual | fields)


def test_a_request_adds_all_that_it_used() -> None:
    usage = Usage(100, 50, cached_input_tokens=30, cache_write_tokens=5, reasoning_tokens=20)
    made = increments(record(usage=usage, cost=Cost(0.000123456789, "test"), cache=CacheUse.MISS))
    assert dict(made) == {
        "anna|gpt-4o|requests": 1,
        "anna|gpt-4o|input_tokens": 100,
        "anna|gpt-4o|output_tokens": 50,
        "anna|gpt-4o|cached_input_tokens": 30,
        "anna|gpt-4o|reasoning_tokens": 20,
        "anna|gpt-4o|cost_nano_usd": 123_457,
    }


def test_what_is_nothing_is_left_out() -> None:
    assert increments(record()) == (("anna|gpt-4o|requests", 1),)
    assert increments(record(usage=Usage(3, 0), cost=Cost(0.0, "free"))) == (
        ("anna|gpt-4o|requests", 1),
        ("anna|gpt-4o|input_tokens", 3),
    )


def test_a_hit_of_the_cache_is_counted() -> None:
    assert dict(increments(record(cache=CacheUse.HIT)))["anna|gpt-4o|cache_hits"] == 1


def test_tokens_without_a_price_are_counted_as_unpriced() -> None:
    assert dict(increments(record(usage=Usage(3, 4), cost=UNPRICED)))["anna|gpt-4o|unpriced"] == 1
    for free in (None, Usage(0, 0)):
        assert "anna|gpt-4o|unpriced" not in dict(increments(record(usage=free, cost=UNPRICED)))


@pytest.mark.parametrize("outcome", list(Outcome))
def test_each_outcome_is_an_error_or_is_none(outcome: Outcome) -> None:
    made = dict(increments(record(outcome=outcome, usage=Usage(1, 1))))
    wrong = outcome not in (Outcome.SUCCESS, Outcome.CLIENT_DISCONNECTED)
    assert made.get("anna|gpt-4o|errors", 0) == wrong


def test_names_that_callers_make_up_fill_no_hash() -> None:
    for outcome in Outcome:
        if outcome is not Outcome.SUCCESS:
            names = {name for name, _ in increments(record(outcome=outcome, request_model="made up"))}
            assert names <= {"anna||requests", "anna||errors"}
    assert increments(record(outcome=Outcome.STREAM_TRUNCATED, usage=Usage(1, 1)))[0][0] == (
        "anna|gpt-4o|requests"
    )


@given(key=st.text(max_size=20), model=st.text(max_size=20), tokens=st.integers(1, 2**60))
def test_any_name_comes_back_as_it_was(key: str, model: str, tokens: int) -> None:
    one = record(principal=Principal(key, "team"), request_model=model, usage=Usage(tokens))
    (row,) = rows_of("team", 7, increments(one))
    assert row == UsageRow(7, "team", key, model, requests=1, input_tokens=tokens, unpriced=1)


# -- adding up -----------------------------------------------------------------------------------

rows = st.lists(
    st.builds(
        UsageRow,
        at=st.integers(0, 200).map(lambda hours: hours * HOUR),
        tenant=st.sampled_from(["t1", "t2"]),
        key=st.sampled_from(["a", "b", ""]),
        model=st.sampled_from(["m", "n"]),
        **{what: st.integers(0, 2**70) for what in SUMS},
    ),
    max_size=30,
)


@given(made=rows, by=st.lists(st.sampled_from(["tenant", "key", "model", "day", "hour"]), unique=True))
def test_groups_hold_all_of_the_rows_once_and_exactly(made: list[UsageRow], by: list[str]) -> None:
    table = Table(by)
    for row in made:
        table.add(row)
    groups = table.groups()
    assert len(groups) == len(table) == len({names for names, _ in groups})
    assert [names for names, _ in groups] == sorted(names for names, _ in groups)
    for place, what in enumerate(SUMS):
        expected = sum(getattr(row, what) for row in made)
        assert table.total[place] == sum(total[place] for _, total in groups) == expected


def test_groups_are_named_in_the_order_that_was_asked_for() -> None:
    table = Table(("model", "day", "hour"))
    table.add(UsageRow(20_000 * DAY + 5 * HOUR, "t", "k", "m", requests=1))
    assert [names for names, _ in table.groups()] == [("m", "2024-10-04", "2024-10-04T05:00:00Z")]


@given(st.integers(-(10**25), 10**25))
def test_dollars_are_exact_and_plain(nano: int) -> None:
    text = dollars(nano)
    assert Decimal(text) * 10**9 == nano
    assert "E" not in text.upper()


def test_dollars_as_they_are_read() -> None:
    assert [dollars(n) for n in (0, 1, 10, 1_500_000_000, -2, 3_000_000_000)] == (
        ["0", "0.000000001", "0.00000001", "1.5", "-0.000000002", "3"]
    )
