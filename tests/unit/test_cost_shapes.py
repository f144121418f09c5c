"""Cost to the billionth of a dollar, for usage as each server writes it, against sums made by hand.

The folder `cost_shapes` has answers as servers send them: `.json` whole, `.sse` streamed. Below stands for
each what it costs, as plain arithmetic in billionths of a dollar: 1 dollar per million tokens is 1,000 of
them a token.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.config import PriceConfig
from service.domain import Cost, Operation, Price, Usage, UsageSource
from service.metering import StreamMeter, estimate_answer, read_answer
from service.pricing import OVERRIDE, TABLE, PriceTable

SHAPES = Path(__file__).parent / "cost_shapes"
NANO = 1_000_000_000
ASKED = 31
"""Tokens of the question, where they are estimated."""

PRICE = PriceConfig(
    input=2.5, output=10, cached_input=1.25, cache_write=3.125, audio_input=40, audio_output=80
)
IN, OUT, CACHED, WRITTEN, HEARD, SPOKEN = 2_500, 10_000, 1_250, 3_125, 40_000, 80_000
"""The same, in billionths of a dollar a token."""

RESPONSES, EMBEDDINGS, TEXT = Operation.RESPONSES, Operation.EMBEDDINGS, Operation.TEXT_COMPLETION
ESTIMATED = UsageSource.ESTIMATED


class Shape(NamedTuple):
    """What the answer in a file costs by PRICE."""

    nano: int
    operation: Operation = Operation.CHAT
    source: UsageSource = UsageSource.PROVIDER


OPENAI = {
    # 1,117 tokens of input, 1,024 of them cached
    "openai-chat.json": Shape(93 * IN + 1_024 * CACHED + 46 * OUT),
    "openai-chat.sse": Shape(93 * IN + 1_024 * CACHED + 46 * OUT),
    # 1,024 of the 1,186 were thought: parts of the output, and no more dear
    "openai-reasoning.json": Shape(75 * IN + 1_186 * OUT),
    # 18 predicted tokens were taken and 10 not: both are among the 39
    "openai-prediction.json": Shape(87 * IN + 39 * OUT),
    # 1,200 of 1,265 were heard, 1,480 of 1,600 spoken
    "openai-audio.json": Shape(65 * IN + 1_200 * HEARD + 120 * OUT + 1_480 * SPOKEN),
    "openai-audio.sse": Shape(65 * IN + 1_200 * HEARD + 120 * OUT + 1_480 * SPOKEN),
    # 1,000: 900 heard and 400 cached, so at least 300 of those that were heard are cached
    "openai-audio-cached.json": Shape(400 * CACHED + 600 * HEARD + 10 * OUT),
    # 1,300: 1,152 cached, 100 written
    "openai-responses.json": Shape(48 * IN + 1_152 * CACHED + 100 * WRITTEN + 352 * OUT, RESPONSES),
    "openai-responses.sse": Shape(48 * IN + 1_152 * CACHED + 100 * WRITTEN + 352 * OUT, RESPONSES),
    "openai-responses-incomplete.sse": Shape(48 * IN + 1_152 * CACHED + 100 * WRITTEN + 352 * OUT, RESPONSES),
    "openai-embeddings.json": Shape(8 * IN, EMBEDDINGS),
    "openai-text.json": Shape(5 * IN + 7 * OUT, TEXT),
    "openai-text.sse": Shape(5 * IN + 7 * OUT, TEXT),
    "azure-chat.json": Shape(176 * IN + 1_024 * CACHED + 64 * OUT),
    "azure-chat.sse": Shape(176 * IN + 1_024 * CACHED + 64 * OUT),
}
OWN_MACHINES = {
    "vllm-chat.json": Shape(19 * IN + 25 * OUT),
    "vllm-cached.json": Shape(23 * IN + 496 * CACHED + 25 * OUT),
    # each chunk has the sum so far, and the last is there twice
    "vllm-continuous.sse": Shape(19 * IN + 5 * OUT),
    # the same while it thinks aloud
    "vllm-thinking.sse": Shape(19 * IN + 9 * OUT),
    "vllm-embeddings.json": Shape(12 * IN, EMBEDDINGS),
    "ollama-chat.json": Shape(26 * IN + 298 * OUT),
    "ollama-chat.sse": Shape(26 * IN + 298 * OUT),
    # 29 letters, four a token
    "ollama-no-usage.sse": Shape(ASKED * IN + 8 * OUT, source=ESTIMATED),
}
OTHERS = {
    "groq-chat.json": Shape(162 * IN + 256 * CACHED + 556 * OUT),
    # in x_groq alone; there and in a chunk of its own
    "groq-beside.sse": Shape(418 * IN + 556 * OUT),
    "groq-both.sse": Shape(418 * IN + 556 * OUT),
    # 2,194: 1,500 cached, 600 written; its own `cost` is not looked at
    "openrouter-chat.json": Shape(94 * IN + 1_500 * CACHED + 600 * WRITTEN + 402 * OUT),
    "openrouter-chat.sse": Shape(94 * IN + 1_500 * CACHED + 600 * WRITTEN + 402 * OUT),
    "deepseek-chat.json": Shape(64 * IN + 1_536 * CACHED + 120 * OUT),
    "deepseek-hits-only.json": Shape(64 * IN + 1_536 * CACHED + 120 * OUT),
    "deepseek-reasoner.sse": Shape(26 * IN + 64 * CACHED + 700 * OUT),
    "mistral-chat.json": Shape(8 * IN + 32 * CACHED + 72 * OUT),
    # in the last chunk of the text
    "mistral-chat.sse": Shape(40 * IN + 72 * OUT),
    "anthropic-chat.json": Shape(24 * IN + 180 * OUT),
    "anthropic-cached.json": Shape(24 * IN + 2_000 * CACHED + 180 * OUT),
    # Anthropic's own API tells what is cached and written beside the 50
    "anthropic-own-names.json": Shape(50 * IN + 2_000 * CACHED + 300 * WRITTEN + 180 * OUT),
    # 20 + 198 are not the 623: the other 405 were thought, and are paid as output
    "gemini-thoughts.json": Shape(20 * IN + (198 + 405) * OUT),
    "gemini-nothing-but-thoughts.json": Shape(21 * IN + 60 * OUT),
    "gemini-every-chunk.sse": Shape(20 * IN + (198 + 405) * OUT),
    # 10,120 + 1,499 + 2,809 = 14,428
    "xai-reasoning.json": Shape(9_992 * IN + 128 * CACHED + (1_499 + 2_809) * OUT),
    "xai-every-chunk.sse": Shape(32 * IN + (9 + 94) * OUT),
    "moonshot-in-choice.sse": Shape(173 * IN + 2_816 * CACHED + 13 * OUT),
}
PROXIES = {
    # 2,056: 1,920 cached, 50 written, both told twice
    "litellm-chat.json": Shape(86 * IN + 1_920 * CACHED + 50 * WRITTEN + 300 * OUT),
    "litellm-twice.sse": Shape(86 * IN + 1_920 * CACHED + 50 * WRITTEN + 300 * OUT),
    # 1,000: 800 cached, 100 written, without details
    "databricks-chat.json": Shape(100 * IN + 800 * CACHED + 100 * WRITTEN + 20 * OUT),
    # 50 + 2,000 + 300 + 180 = 2,530: here they are beside the 50
    "proxy-cache-beside.json": Shape(50 * IN + 2_000 * CACHED + 300 * WRITTEN + 180 * OUT),
    # the input in the first chunk, the output in the last
    "proxy-split.sse": Shape(25 * IN + 15 * OUT),
    "usage-zero-until-the-end.sse": Shape(26 * IN + 6 * OUT),
    "usage-zero-after-the-end.sse": Shape(26 * IN + 6 * OUT),
}
# 21 letters of answer are 6 tokens
BY_ESTIMATE = Shape(ASKED * IN + 6 * OUT, source=ESTIMATED)
NONSENSE = {
    **{
        f"usage-{what}.{form}": BY_ESTIMATE
        for what in (
            "absent",
            "null",
            "zero",
            "negative",
            "half-negative",
            "strings",
            "fractions",
            "text",
            "list",
        )
        for form in ("json", "sse")
    },
    "usage-huge.json": BY_ESTIMATE,
    "usage-huge.sse": BY_ESTIMATE,
    "usage-whole-floats.json": Shape(26 * IN + 6 * OUT),
    # 32 in all, 26 of them input
    "usage-half-told.json": Shape(26 * IN + 6 * OUT),
    # 99 of 26 are cached, written and heard: no token is paid twice, and none is paid back
    "usage-more-parts-than-whole.json": Shape(26 * CACHED + 6 * SPOKEN),
    # a total that is less than its parts
    "usage-small-total.json": Shape(26 * IN + 6 * OUT),
}
ALL = {**OPENAI, **OWN_MACHINES, **OTHERS, **PROXIES, **NONSENSE}
STREAMED = sorted(name for name in ALL if name.endswith(".sse"))
WHOLE = sorted(name for name in ALL if name.endswith(".json"))


def paid(usage: Usage, price: PriceConfig = PRICE) -> Cost:
    """What the service makes of a price in its YAML file."""
    table = PriceTable(overrides={"mine": Price(**price.model_dump())})
    return table.cost("mine", "anywhere", "whatever answered", usage)


def check(cost: Cost, nano: int) -> None:
    assert cost.usd is not None
    assert cost.usd * NANO == pytest.approx(nano, rel=1e-12, abs=1e-6)
    assert round(cost.usd * NANO) == nano


def streamed(operation: Operation, packets: list[bytes], *, hide: bool = False) -> Usage:
    meter = StreamMeter(operation, hide_usage=hide)
    for packet in packets:
        meter.feed(packet)
    meter.check()
    assert meter.done
    return meter.usage_or_estimate(ASKED)


def whole(body: bytes) -> Usage:
    return read_answer(body).usage or Usage(ASKED, estimate_answer(body), source=ESTIMATED)


def test_each_file_has_its_price() -> None:
    assert {path.name for path in SHAPES.iterdir()} == set(ALL)


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_answer_costs_what_was_reckoned_by_hand(name: str) -> None:
    usage = whole((SHAPES / name).read_bytes())
    assert usage.source is ALL[name].source
    cost = paid(usage)
    check(cost, ALL[name].nano)
    assert cost.source == OVERRIDE


@pytest.mark.parametrize("name", STREAMED)
@settings(max_examples=15)
@given(cuts=st.lists(st.integers(0, 6_000), max_size=8), hide=st.booleans())
def test_a_stream_costs_it_too_wherever_it_is_cut(name: str, cuts: list[int], hide: bool) -> None:
    stream = (SHAPES / name).read_bytes()
    places = sorted({min(cut, len(stream)) for cut in cuts})
    packets = [stream[a:b] for a, b in zip([0, *places], [*places, len(stream)], strict=True)]
    usage = streamed(ALL[name].operation, packets, hide=hide)
    assert usage.source is ALL[name].source
    check(paid(usage), ALL[name].nano)


@pytest.mark.parametrize("name", STREAMED)
def test_a_stream_costs_it_too_byte_by_byte_and_with_other_line_ends(name: str) -> None:
    stream = (SHAPES / name).read_bytes()
    for text in (stream, stream.replace(b"\n", b"\r\n"), stream.replace(b"\n", b"\r")):
        usage = streamed(ALL[name].operation, [bytes([byte]) for byte in text])
        check(paid(usage), ALL[name].nano)


@pytest.mark.parametrize("name", STREAMED)
def test_an_event_that_comes_twice_is_not_paid_twice(name: str) -> None:
    shape = ALL[name]
    if shape.source is ESTIMATED:
        return  # then its text is there twice
    events = (SHAPES / name).read_bytes().split(b"\n\n")
    doubled = b"".join((event + b"\n\n") * 2 for event in events if event)
    check(paid(streamed(shape.operation, [doubled])), shape.nano)


def test_azures_chunks_of_filters_hide_neither_model_nor_id() -> None:
    meter = StreamMeter(Operation.CHAT)
    meter.feed((SHAPES / "azure-chat.sse").read_bytes())
    assert (meter.id, meter.model) == ("chatcmpl-1", "gpt-4o-2024-11-20")


def test_what_has_no_price_of_its_own_costs_what_its_total_costs() -> None:
    plain = PriceConfig(input=2.5, output=10)
    for name, nano in {
        "openai-chat.json": 1_117 * IN + 46 * OUT,
        "openai-audio.json": 1_265 * IN + 1_600 * OUT,
        "openrouter-chat.json": 2_194 * IN + 402 * OUT,
        "anthropic-own-names.json": (50 + 2_000 + 300) * IN + 180 * OUT,
    }.items():
        check(paid(whole((SHAPES / name).read_bytes()), plain), nano)


# -- streams that end early ----------------------------------------------------------------------


def left_after(name: str, events: int) -> Usage:
    """What is known when the caller leaves after so many events."""
    stream = b"\n\n".join((SHAPES / name).read_bytes().split(b"\n\n")[:events]) + b"\n\n"
    meter = StreamMeter(ALL[name].operation)
    meter.feed(stream)
    assert not meter.done
    return meter.usage_or_estimate(ASKED)


def test_a_running_total_is_good_when_the_caller_leaves() -> None:
    usage = left_after("vllm-continuous.sse", 4)
    assert usage.source is UsageSource.PROVIDER
    check(paid(usage), 19 * IN + 3 * OUT)


def test_thoughts_are_in_a_running_total_when_the_caller_leaves() -> None:
    check(paid(left_after("vllm-thinking.sse", 3)), 19 * IN + 5 * OUT)


def test_what_was_thought_aloud_is_estimated_where_no_count_came() -> None:
    """Six letters of thought behind OpenRouter's two comments, then six of the answer."""
    for events, tokens in ((3, 2), (4, 3)):
        usage = left_after("openrouter-chat.sse", events)
        assert usage.source is ESTIMATED
        check(paid(usage), ASKED * IN + tokens * OUT)


def test_text_after_the_last_count_is_estimated_and_said_to_be() -> None:
    usage = left_after("proxy-split.sse", 2)
    assert usage.source is ESTIMATED
    check(paid(usage), 25 * IN + (1 + 6) * OUT)


def test_without_any_count_all_is_estimated() -> None:
    usage = left_after("openai-chat.sse", 3)
    assert usage.source is ESTIMATED
    check(paid(usage), ASKED * IN + 4 * OUT)


# -- by the price table --------------------------------------------------------------------------

LAST_YEAR, THIS_YEAR = datetime(2025, 11, 1, tzinfo=UTC), datetime(2026, 11, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("name", "model", "provider", "date", "nano"),
    [
        # 2.50 in, 1.25 cached, 10 out
        ("openai-chat.json", "gpt-4o", "openai", THIS_YEAR, 93 * 2_500 + 1_024 * 1_250 + 46 * 10_000),
        ("azure-chat.sse", "gpt-4o", "azure", THIS_YEAR, 176 * 2_500 + 1_024 * 1_250 + 64 * 10_000),
        # 1.10 in, 4.40 out
        ("openai-reasoning.json", "o3-mini", "openai", THIS_YEAR, 75 * 1_100 + 1_186 * 4_400),
        # 2.50 in, 32 heard, 10 out, 64 spoken
        (
            *("openai-audio.json", "gpt-audio", "openai", THIS_YEAR),
            65 * 2_500 + 1_200 * 32_000 + 120 * 10_000 + 1_480 * 64_000,
        ),
        # 0.25 in, 0.025 cached, 2 out; writing has no price of its own
        (
            *("openai-responses.sse", "gpt-5-mini", "openai", THIS_YEAR),
            (48 + 100) * 250 + 1_152 * 25 + 352 * 2_000,
        ),
        # 0.02 in
        ("openai-embeddings.json", "text-embedding-3-small", "openai", THIS_YEAR, 8 * 20),
        # 0.59 in, 0.79 out
        ("groq-beside.sse", "llama-3.3-70b-versatile", "groq", THIS_YEAR, 418 * 590 + 556 * 790),
        # 0.135 in, 0.035 cached, 0.55 out
        (
            "deepseek-hits-only.json",
            "deepseek-chat",
            "deepseek",
            THIS_YEAR,
            64 * 135 + 1_536 * 35 + 120 * 550,
        ),
        # 0.10 in, 0.30 out; a year later 0.15 in, 0.015 cached, 0.60 out
        ("mistral-chat.json", "mistral-small-latest", "mistral", LAST_YEAR, 40 * 100 + 72 * 300),
        ("mistral-chat.json", "mistral-small-latest", "mistral", THIS_YEAR, 8 * 150 + 32 * 15 + 72 * 600),
        # 3 in, 0.30 cached, 3.75 written, 15 out
        (
            *("anthropic-own-names.json", "claude-sonnet-4-5", "anthropic", THIS_YEAR),
            50 * 3_000 + 2_000 * 300 + 300 * 3_750 + 180 * 15_000,
        ),
        (
            *("openrouter-chat.sse", "anthropic/claude-sonnet-4.5", "openrouter", THIS_YEAR),
            94 * 3_000 + 1_500 * 300 + 600 * 3_750 + 402 * 15_000,
        ),
        # 0.30 in, 2.50 out
        ("gemini-thoughts.json", "gemini-2.5-flash", "google", THIS_YEAR, 20 * 300 + 603 * 2_500),
        # 0.60 in, 0.10 cached, 3 out
        (
            "moonshot-in-choice.sse",
            "kimi-k2.5",
            "moonshotai",
            THIS_YEAR,
            173 * 600 + 2_816 * 100 + 13 * 3_000,
        ),
        # 2 in, 0.20 cached, 6 out; a year later 1.25 in, 2.50 out, and xAI itself billed 0.0232856 dollars
        ("xai-reasoning.json", "grok-4.20", "x-ai", LAST_YEAR, 9_992 * 2_000 + 128 * 200 + 4_308 * 6_000),
        ("xai-reasoning.json", "grok-4.20", "x-ai", THIS_YEAR, 23_285_600),
    ],
)
def test_well_known_models_cost_what_the_table_says_of_a_date(
    name: str, model: str, provider: str, date: datetime, nano: int
) -> None:
    stream = (SHAPES / name).read_bytes()
    usage = streamed(ALL[name].operation, [stream]) if name.endswith(".sse") else whole(stream)
    cost = PriceTable(today=lambda: date).cost(model, provider, "", usage)
    check(cost, nano)
    assert cost.source == TABLE
