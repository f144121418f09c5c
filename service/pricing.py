"""What tokens cost: prices from genai-prices, resolved once a model, with overrides from the YAML.

A model's price is looked up once and held for an hour, so that a price which changes at a date does
so here too; after that a request costs a few multiplications. What nobody knows the price of is
`unpriced`: its cost is None, never a silent 0.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from typing import Final

import msgspec
from genai_prices.data_snapshot import get_snapshot
from genai_prices.types import ModelInfo, ModelPrice, TieredPrices

from service.domain import UNPRICED, Cost, Price, Usage
from service.ports import PriceBook, Target

OVERRIDE: Final = "override"
TABLE: Final = "genai-prices"
HOLD_SECONDS: Final = 3600.0
HOLD_MODELS: Final = 2_000
"""Model names come from callers, so what is held of them has a bound."""
_MILLION: Final = 1_000_000
_CHECKED: Final = re.compile(r"(?i)\b(?:checked|verified|as of|last updated)\b\D{0,12}(\d{4}-\d\d-\d\d)")
_TABLE_NAMES: Final = (
    *("input_mtok", "output_mtok", "cache_read_mtok", "cache_write_mtok"),
    *("input_audio_mtok", "output_audio_mtok"),
)
"""What the table calls the fields of a Price, in their order."""


class Tier(msgspec.Struct, frozen=True):
    """The prices that hold for requests with more than `above_tokens` input tokens."""

    above_tokens: int
    price: Price


class ModelFacts(msgspec.Struct, frozen=True):
    """What is known of a model: its tiers, the highest first, and its context in tokens."""

    tiers: tuple[Tier, ...] = ()
    source: str = UNPRICED.source
    context_tokens: int | None = None

    def cost(self, usage: Usage) -> Cost:
        for tier in self.tiers:
            if usage.input_tokens > tier.above_tokens or tier.above_tokens == 0:
                return Cost(usd=cost_usd(tier.price, usage), source=self.source)
        return UNPRICED


class PriceTable:
    """The price book. `overrides` go by the caller's name of a model."""

    def __init__(
        self,
        overrides: Mapping[str, Price] | None = None,
        clock: Callable[[], float] = time.monotonic,
        today: Callable[[], datetime] | None = None,
    ) -> None:
        self._overrides = dict(overrides or {})
        self._clock = clock
        self._today = today or partial(datetime.now, UTC)
        self._held: dict[tuple[str, str], tuple[float, ModelFacts]] = {}

    def cost(self, model: str, provider: str, response_model: str, usage: Usage) -> Cost:
        """By the override of the caller's name; else by the answering model's price, then the asked one's."""
        override = self._overrides.get(model)
        if override is not None:
            return Cost(usd=cost_usd(override, usage), source=OVERRIDE)
        if response_model and response_model != model:
            cost = self._facts(response_model, provider).cost(usage)
            if cost.usd is not None:
                return cost
        return self._facts(model, provider).cost(usage)

    def context_tokens(self, model: str, provider: str) -> int | None:
        return self._facts(model, provider).context_tokens

    def _facts(self, model: str, provider: str) -> ModelFacts:
        now = self._clock()
        held = self._held.get((model, provider))
        if held is not None and now - held[0] < HOLD_SECONDS:
            return held[1]
        if len(self._held) >= HOLD_MODELS:
            self._held.clear()
        facts = look_up(model, provider, self._today())
        self._held[(model, provider)] = (now, facts)
        return facts


def context_of(target: Target, prices: PriceBook) -> int | None:
    """Of the configuration, else of the table: by the model's name at the upstream, or else by ours."""
    if target.context_tokens is not None:
        return target.context_tokens
    provider = target.upstream.provider
    names = dict.fromkeys((target.model, target.name))
    known = (prices.context_tokens(name, provider) for name in names)
    return next((tokens for tokens in known if tokens is not None), None)


def look_up(model: str, provider: str, at: datetime) -> ModelFacts:
    """A model, as of a date, in the table of genai-prices, which lies in that package: nothing is fetched."""
    if not model:
        return ModelFacts()
    if provider == "simulator":
        # Said out loud in `source`: it is no model, and its tokens cost nothing.
        return ModelFacts(tiers=(Tier(0, Price(0.0, 0.0)),), source="simulator", context_tokens=128_000)
    try:
        _, found = get_snapshot().find_provider_model(model, None, provider or None, None)
    except LookupError:
        return ModelFacts()
    return ModelFacts(tiers=_tiers(found, at), source=TABLE, context_tokens=found.context_window)


def checked_at() -> float | None:
    """The latest day on which anything in the table was checked, as its own comments say; seconds since 1970.

    They are all that it has of a date: when a price begins may be told long before. None: they name no day.
    """
    comments = (
        comment
        for provider in get_snapshot().providers
        for comment in (provider.price_comments, *(model.price_comments for model in provider.models))
    )
    days = {day for comment in comments if comment for day in _CHECKED.findall(comment)}
    return max(filter(None, map(_seconds, days)), default=None)


def cost_usd(price: Price, usage: Usage) -> float:
    """All parts lie in the input or the output tokens: each token is paid once.

    Cached tokens are taken to be text as far as there is text, because nobody says which of them were heard.
    """
    cached = usage.cached_input_tokens if price.cached_input is not None else 0
    written = usage.cache_write_tokens if price.cache_write is not None else 0
    plain = max(usage.input_tokens - cached - written, 0)
    total = plain * price.input + usage.output_tokens * price.output
    if cached and price.cached_input is not None:
        total += cached * price.cached_input
    if written and price.cache_write is not None:
        total += written * price.cache_write
    if usage.audio_input_tokens and price.audio_input is not None:
        total += min(usage.audio_input_tokens, plain) * (price.audio_input - price.input)
    if usage.audio_output_tokens and price.audio_output is not None:
        total += min(usage.audio_output_tokens, usage.output_tokens) * (price.audio_output - price.output)
    return total / _MILLION


def _seconds(day: str) -> float | None:
    try:
        return datetime.fromisoformat(day).replace(tzinfo=UTC).timestamp()
    except ValueError:
        return None


def _tiers(model: ModelInfo, at: datetime) -> tuple[Tier, ...]:
    price = model.get_prices(at)
    starts = {0}
    for name in _TABLE_NAMES:
        value = getattr(price, name, None)
        if isinstance(value, TieredPrices):
            starts.update(tier.start for tier in value.tiers)
    tiers = (Tier(start, found) for start in starts if (found := _price_above(price, start)))
    return tuple(sorted(tiers, key=lambda tier: -tier.above_tokens))


def _price_above(price: ModelPrice, start: int) -> Price | None:
    def at(name: str) -> float | None:
        value = getattr(price, name, None)
        if isinstance(value, TieredPrices):
            reached = [tier for tier in value.tiers if tier.start <= start]
            value = max(reached, key=lambda tier: tier.start).price if reached else value.base
        return None if value is None else float(value)

    given, made, *parts = map(at, _TABLE_NAMES)
    if given is None and made is None:
        return None  # priced by the request or the second: not by tokens
    return Price(given or 0.0, made or 0.0, *parts)
