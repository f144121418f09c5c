"""What tokens cost: by hand, by the price table's own reckoning, and by overrides."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import genai_prices
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service import pricing
from service.domain import UNPRICED, Price, Usage
from service.ports import Target
from service.pricing import HOLD_MODELS, HOLD_SECONDS, ModelFacts, PriceTable, context_of
from tests.unit.ports import Clock, ScriptedUpstream

MILLION = 1_000_000
SAMPLE = [
    ("gpt-4o-mini", "openai"),
    ("gpt-4o", "openai"),
    ("gpt-4o", "azure"),
    ("o3-mini", "openai"),
    ("text-embedding-3-small", "openai"),
    ("claude-sonnet-4-5", "anthropic"),
    ("gemini-2.5-pro", "google"),
    ("gemini-2.5-flash", "google"),
    ("deepseek-chat", "deepseek"),
    ("mistral-large-latest", "mistral"),
    ("llama-3.3-70b-versatile", "groq"),
]


@st.composite
def usages(draw: st.DrawFn) -> Usage:
    plain, cached, written, made = (draw(st.integers(0, 400_000)) for _ in range(4))
    return Usage(plain + cached + written, made, cached_input_tokens=cached, cache_write_tokens=written)


@pytest.mark.parametrize(
    ("model", "provider", "usage", "usd"),
    [
        # 0.15 in, 0.075 cached, 0.60 out
        ("gpt-4o-mini", "openai", Usage(1_000, 500), (1_000 * 0.15 + 500 * 0.60) / MILLION),
        ("gpt-4o-mini", "openai", Usage(1_000, 500, 400), (600 * 0.15 + 400 * 0.075 + 500 * 0.60) / MILLION),
        # 1.25 in and 10 out; above 200,000 tokens of input 2.50 and 15, for all tokens of the request
        ("gemini-2.5-pro", "google", Usage(200_000, 1_000), (200_000 * 1.25 + 1_000 * 10) / MILLION),
        ("gemini-2.5-pro", "google", Usage(200_001, 1_000), (200_001 * 2.50 + 1_000 * 15) / MILLION),
        # 3 in, 0.30 cached, 3.75 written, 15 out
        (
            "claude-sonnet-4-5",
            "anthropic",
            Usage(10_000, 100, cached_input_tokens=2_000, cache_write_tokens=3_000),
            (5_000 * 3 + 2_000 * 0.30 + 3_000 * 3.75 + 100 * 15) / MILLION,
        ),
        ("gpt-4o-mini", "openai", Usage(), 0.0),
    ],
)
def test_costs_computed_by_hand(model: str, provider: str, usage: Usage, usd: float) -> None:
    cost = PriceTable().cost(model, provider, "", usage)
    assert cost.usd == pytest.approx(usd, rel=1e-12)
    assert cost.source == pricing.TABLE


@pytest.mark.parametrize(("model", "provider"), SAMPLE)
@given(usage=usages())
def test_costs_agree_with_the_price_tables_own_reckoning(model: str, provider: str, usage: Usage) -> None:
    theirs = genai_prices.calc_price(
        genai_prices.Usage(
            input_tokens=usage.input_tokens,
            output_tokens=usage.output_tokens,
            cache_read_tokens=usage.cached_input_tokens,
            cache_write_tokens=usage.cache_write_tokens,
        ),
        model,
        provider_id=provider,
    )
    ours = PriceTable().cost(model, provider, "", usage)
    assert ours.usd == pytest.approx(float(theirs.total_price), rel=1e-9, abs=1e-15)


def test_parts_that_are_more_than_the_whole_never_pay_back() -> None:
    usage = Usage(10, 0, cached_input_tokens=10, cache_write_tokens=10)
    cost = PriceTable().cost("claude-sonnet-4-5", "anthropic", "", usage)
    assert cost.usd is not None
    assert cost.usd > 0


@pytest.mark.parametrize("model", ["my-own-model", "", "\x00", "x" * 10_000])
@pytest.mark.parametrize("provider", ["", "internal.example", "openai"])
def test_a_model_that_nobody_knows_is_unpriced_and_never_free(model: str, provider: str) -> None:
    assert PriceTable().cost(model, provider, "", Usage(1_000, 1_000)) == UNPRICED
    assert UNPRICED.usd is None


def test_an_override_goes_before_the_table() -> None:
    table = PriceTable(overrides={"gpt-4o-mini": Price(1.0, 2.0)})
    cost = table.cost("gpt-4o-mini", "openai", "gpt-4o-mini-2024-07-18", Usage(1_000, 1_000, 500))
    assert cost.usd == pytest.approx(0.003), "without a price of its own, cached costs what input costs"
    assert cost.source == pricing.OVERRIDE


def test_an_override_may_price_the_cache() -> None:
    price = Price(1.0, 2.0, cached_input=0.5, cache_write=4.0)
    cost = PriceTable(overrides={"mine": price}).cost("mine", "", "", Usage(1_000, 0, 400, 100))
    assert cost.usd == pytest.approx((500 * 1.0 + 400 * 0.5 + 100 * 4.0) / MILLION)


def test_an_override_goes_by_the_callers_name_alone() -> None:
    table = PriceTable(overrides={"fast": Price(1.0, 1.0)})
    assert table.cost("other", "nowhere", "fast", Usage(1, 1)) == UNPRICED


def test_the_model_that_answered_is_paid() -> None:
    table, usage = PriceTable(), Usage(1_000, 1_000)
    asked = table.cost("gpt-4o", "openai", "gpt-4o-mini-2024-07-18", usage)
    assert asked == table.cost("gpt-4o-mini", "openai", "", usage)


def test_an_answering_model_that_nobody_knows_falls_back_to_the_asked_one() -> None:
    table, usage = PriceTable(), Usage(1_000, 1_000)
    assert table.cost("gpt-4o", "openai", "something-internal", usage) == table.cost(
        "gpt-4o", "openai", "", usage
    )


def test_the_simulator_costs_nothing_and_says_why() -> None:
    cost = PriceTable().cost("simulator", "simulator", "simulator", Usage(1_000, 1_000))
    assert (cost.usd, cost.source) == (0.0, "simulator")


@pytest.mark.parametrize(
    ("target", "tokens"),
    [
        ({"model": "gpt-4", "context_tokens": 4_096}, 4_096),
        ({"model": "gpt-4", "name": "gpt-4"}, 8_192),
        ({"model": "gpt-4", "name": "fast"}, 8_192),
        ({"model": "gpt-4", "name": "gpt-4o"}, 8_192),  # what it is called here is not what answers
        ({"model": "a-deployment", "name": "gpt-4"}, 8_192),
        ({"model": "a-deployment", "name": "fast"}, None),
    ],
)
def test_the_context_is_the_configured_one_else_the_tables(
    target: dict[str, Any], tokens: int | None
) -> None:
    upstream = ScriptedUpstream()
    upstream.provider = "openai"
    assert context_of(Target(upstream, **target), PriceTable()) == tokens


def test_the_table_knows_contexts() -> None:
    table = PriceTable()
    assert table.context_tokens("gpt-4o-mini", "openai") == 128_000
    assert table.context_tokens("unknown-model", "nowhere") is None


@pytest.fixture
def looked_up(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models that were looked up in the table, in order."""
    seen: list[str] = []
    real = pricing.look_up

    def noting(model: str, provider: str, at: datetime) -> ModelFacts:
        seen.append(model)
        return real(model, provider, at)

    monkeypatch.setattr(pricing, "look_up", noting)
    return seen


def test_a_price_is_held_for_an_hour_and_then_looked_up_again(looked_up: list[str]) -> None:
    clock = Clock()
    table = PriceTable(clock=clock)
    for _ in range(3):
        table.cost("gpt-4o", "openai", "", Usage(1, 1))
    clock.now += HOLD_SECONDS - 0.001
    table.cost("gpt-4o", "openai", "", Usage(1, 1))
    assert looked_up == ["gpt-4o"]
    clock.now += 0.001
    table.cost("gpt-4o", "openai", "", Usage(1, 1))
    assert looked_up == ["gpt-4o"] * 2


def test_what_is_held_has_a_bound_however_many_names_callers_make_up(
    looked_up: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pricing, "HOLD_MODELS", 50)
    table = PriceTable()
    for number in range(500):
        assert table.cost(f"junk-{number}", "nowhere", "", Usage(1, 1)) == UNPRICED
        assert len(table._held) <= 50
    assert len(looked_up) == 500
    assert HOLD_MODELS < 100_000
