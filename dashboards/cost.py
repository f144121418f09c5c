"""Cost: what calls cost, whose they are, and where it goes."""

from __future__ import annotations

from typing import Final

from dashboards.board import Board, Section
from dashboards.panels import (
    NUMBER,
    PER_SECOND,
    SECONDS,
    SHARE,
    USD,
    Limit,
    Thresholds,
    Words,
    above,
    bargauge,
    column,
    stat,
    table,
    timeseries,
)
from dashboards.queries import (
    GOOD,
    RANGE,
    REQUESTS,
    USAGE,
    every_tenant,
    highest,
    increase,
    largest,
    rate,
    ratio,
    select,
    share,
    used_budgets,
    whole,
)

COST: Final = "weir_cost_usd_total"
WASTED: Final = "weir_wasted_cost_usd_total"
UNPRICED: Final = "weir_unpriced_requests_total"
MODEL: Final = "gen_ai_request_model"
RECORDED: Final = "No recorded rules (metrics.prometheusRule.enabled), or no call with a known price yet."

_NOW: Final = "month(max(timestamp(" + select("weir_build_info") + " @ end())))"
_HOURLY: Final = f"sum({select('weir:cost_usd:rate1h')}) * 3600"
MONTH: Final = f"sum_over_time(({_HOURLY} and on() (month() == {_NOW}))[31d:1h])"
"""Dollars of the calendar month by UTC, hour by hour, from the recorded rate."""
_PACE: Final = f"sum(avg_over_time({select('weir:cost_usd:rate5m')}[1d]))"
_LEFT: Final = "scalar(86400 * (days_in_month() - day_of_month() + 1) - 3600 * hour() - 60 * minute())"
FORECAST: Final = f"({MONTH} or 0 * {_HOURLY}) + {_PACE} * {_LEFT}"
"""What is spent of this month, and the rest of it at the mean pace of the last day."""
WEEK: Final = f"{ratio(increase(COST, window='1d'), increase(COST, window='1d', offset='1w'))} - 1"
WASTED_SHARE: Final = share(
    increase(WASTED),
    f"({whole(increase(COST))} + ({increase(WASTED)} or 0 * {whole(increase(COST))}))",
)


def _good(window: str, *by: str) -> str:
    """Good answers a second."""
    return rate(f"{REQUESTS}_count", GOOD, by=by, window=window)


def _cost(window: str, *by: str) -> str:
    return every_tenant(rate(COST, by=by, window=window))


def _tokens(*by: str) -> str:
    parts = (rate(f"{USAGE}{kind}_tokens_total", by=by) for kind in ("input", "output"))
    return f"({' + '.join(parts)})"


_FIRST = [
    stat(
        "Dollars per hour",
        f"{rate(COST)} * 3600",
        Words(
            "What the calls of now cost, as dollars an hour, by Weir's price table.",
            "what you planned for.",
            "see which model and which tenant grew below.",
            "No call with a known price yet.",
            "Nothing priced yet",
        ),
        unit=USD,
    ),
    stat(
        "Spent in this time",
        increase(COST),
        Words(
            "What all calls in the time shown cost, by Weir's price table.",
            "what you planned for.",
            "see which model and which tenant it is below.",
            "No call with a known price in this time.",
            "Nothing priced",
        ),
        unit=USD,
        instant=True,
    ),
    stat(
        "This month",
        f"{MONTH} or 0 * {_HOURLY}",
        Words(
            "What was spent since the calendar month began (UTC), full hours. All models and tenants: it "
            "comes from a recorded rate. Where Prometheus keeps less than 32 days, the month's first days "
            "are missing.",
            "in proportion to the day of the month.",
            "the forecast beside says where it leads.",
            RECORDED,
            "No rules, or no price",
        ),
        unit=USD,
        instant=True,
    ),
    stat(
        "Forecast, month's end",
        FORECAST,
        Words(
            "What this calendar month (UTC) will have cost at its end: what is spent, and the rest at the "
            "mean pace of the last 24 hours. All models and tenants. Where Prometheus keeps less than 32 "
            "days, the month's first days are missing in it.",
            "within what you planned.",
            "budgets bound it: docs/limits.md. A single day's peak also lifts it: look again tomorrow.",
            RECORDED,
            "No rules, or no price",
        ),
        unit=USD,
        instant=True,
    ),
    stat(
        "Against last week",
        WEEK,
        Words(
            "The last 24 hours against the same 24 hours a week before: 0 % is the same, 100 % twice as "
            "much.",
            "near 0 %, or what you know the reason of.",
            "Dollars per hour, now and a week ago, shows when it began; then models and tenants.",
            "Less than eight days of data, or nothing was spent a week ago.",
            "Needs 8 days of data",
        ),
        unit=SHARE,
        instant=True,
        thresholds=above(
            2, warn=0.5, reason="orange from half more than a week ago; red from three times as much."
        ),
    ),
    stat(
        "$ per 1000 answers",
        f"1000 * {ratio(_cost(RANGE), _good(RANGE))}",
        Words(
            "What a thousand good answers cost, with all that failed calls cost beside them. All tenants.",
            "even: it moves with models, lengths and failures, not with traffic.",
            "a rise: longer prompts (Tokens), a dearer model, or failures that are paid for (Upstreams).",
            "No good answer in this time, or none with a known price.",
            "No priced answers",
        ),
        unit=USD,
        instant=True,
    ),
    stat(
        "Wasted",
        WASTED_SHARE,
        Words(
            "The share of the dollars that went for calls whose answers nobody took: hedges that lost, "
            "calls given up as late. Estimated. All models and tenants.",
            "below 2 %.",
            "Wasted dollars per hour below has the reasons.",
            "No call with a known price in this time.",
            "Nothing priced",
        ),
        unit=SHARE,
        instant=True,
        thresholds=above(
            0.1, warn=0.02, reason="orange from 2 %; red from 10 %: hedging or deadlines cost too much."
        ),
    ),
    stat(
        "Without a price",
        f"{increase(UNPRICED)} or 0 * {every_tenant(increase(COST))}",
        Words(
            "Requests whose tokens nobody knows the price of: they are missing in every sum of dollars here.",
            "0.",
            "give the model a price in the configuration (docs/settings.md): the model is named below.",
            "No call with or without a price in this time.",
            "No calls",
        ),
        unit=NUMBER,
        instant=True,
        thresholds=above(10, warn=1, reason="orange from the first; red from 10, from which an alert fires."),
        decimals=0,
    ),
]

_WHO = [
    timeseries(
        "Dollars per hour by model",
        [(f"{rate(COST, by=(MODEL,))} * 3600", "{{gen_ai_request_model}}")],
        Words(
            "What calls cost, as dollars an hour, by the model that was asked for.",
            "the course of the requests.",
            "a model that grows alone: choose it above, and see its tenants beside.",
            "No call with a known price yet.",
        ),
        unit=USD,
        stacked=True,
    ),
    timeseries(
        "Dollars per hour by tenant",
        [(f"topk(10, {rate(COST, by=('tenant',))} * 3600)", "{{tenant}}")],
        Words(
            "What calls cost, as dollars an hour, of the ten tenants that cost most at each moment.",
            "tenants in the order that you know.",
            "a tenant that grows alone: choose it above, and see its models beside; its budget is below.",
            "No call with a known price yet.",
        ),
        unit=USD,
        stacked=True,
    ),
]

_COURSE = [
    timeseries(
        "Dollars per hour, now and a week ago",
        [
            (f"{rate(COST, window='1h')} * 3600", "now"),
            (f"{rate(COST, window='1h', offset='1w')} * 3600", "a week ago"),
        ],
        Words(
            "What calls cost now, beside the same time a week before, each over the hour before.",
            "two lines near each other.",
            "see where they part: a deploy is marked, so is a changed configuration.",
            "No call with a known price yet; the second line needs a week of data.",
        ),
        unit=USD,
        colors=(("now", "blue"), ("a week ago", "text")),
    ),
    timeseries(
        "Dollars of the last 24 hours",
        [(increase(COST, by=("gen_ai_provider_name",), window="1d"), "{{gen_ai_provider_name}}")],
        Words(
            "What the 24 hours before each moment cost, by provider: a day's bill, without the day's own "
            "waves.",
            "even; compare it with the provider's bill (docs/ledger.md).",
            "a slope that does not end: the forecast above says where it leads.",
            "No call with a known price yet.",
        ),
        unit=USD,
        stacked=True,
    ),
]

_WORTH = [
    timeseries(
        "Dollars per 1000 good answers by model",
        [(f"1000 * {ratio(_cost('1h', MODEL), _good('1h', MODEL))}", "{{gen_ai_request_model}}")],
        Words(
            "What a thousand good answers of each model cost, over the hour before each moment. All tenants.",
            "even.",
            "a rise: longer prompts or answers (Tokens), or failures that are paid for.",
            "No good answer yet, or none with a known price.",
        ),
        unit=USD,
        width=8,
    ),
    timeseries(
        "Dollars per million tokens by model",
        [
            (
                f"1000000 * {ratio(_cost('$__rate_interval', MODEL), _tokens(MODEL))}",
                "{{gen_ai_request_model}}",
            )
        ],
        Words(
            "What a million tokens cost, input and output together. All tenants.",
            "between the model's two prices; lower with more cached tokens.",
            "a step: the price table, the model behind a name, or the provider's cache.",
            "No answer with a known price yet.",
        ),
        unit=USD,
        width=8,
    ),
    timeseries(
        "Dollars per hour by source of the price",
        [(f"{rate(COST, by=('cost_source',))} * 3600", "{{cost_source}}")],
        Words(
            "Where the prices come from: the built-in table, or the configuration.",
            "the configuration for what you have contracts for.",
            "a model that should have your price and has the table's: check its name in the configuration.",
            "No call with a known price yet.",
        ),
        unit=USD,
        width=8,
        stacked=True,
    ),
]

_NOT_WORTH = [
    timeseries(
        "Wasted dollars per hour",
        [(f"{rate(WASTED, by=('reason',))} * 3600", "{{reason}}")],
        Words(
            "What calls cost whose answers nobody took, by the reason, estimated: hedge, a second call was "
            "quicker; timeout, it was given up as late.",
            "small beside Dollars per hour.",
            "hedge: let it wait longer before the second call; timeout: longer deadlines; docs/routing.md.",
            "No call was given up yet.",
        ),
        unit=USD,
        width=8,
        stacked=True,
    ),
    timeseries(
        "Requests without a price",
        [
            (
                rate(UNPRICED, by=(MODEL, "gen_ai_provider_name")),
                "{{gen_ai_provider_name}} {{gen_ai_request_model}}",
            )
        ],
        Words(
            "Requests a second whose tokens nobody knows the price of.",
            "none.",
            "give the model a price in the configuration, or a newer version of Weir has it.",
            "No request without a price yet: good.",
        ),
        unit=PER_SECOND,
        width=8,
    ),
    stat(
        "Age of the price table",
        highest(select("weir_price_table_age_seconds")),
        Words(
            "How long ago the built-in price table was made.",
            "below 90 days.",
            "a newer version of Weir brings a newer table; prices that you set yourself do not age.",
            "No pod of Weir is scraped.",
            "No pod is scraped",
        ),
        unit=SECONDS,
        height=8,
        width=4,
        thresholds=Thresholds(
            "green",
            (Limit(60 * 86400, "orange"), Limit(90 * 86400, "red")),
            "red from 90 days, from which an alert fires; orange a month before.",
        ),
    ),
    stat(
        "Saved by Weir's cache",
        increase("weir_cache_saved_usd_total"),
        Words(
            "What the answers from Weir's cache had cost when they were first given, over the time shown. "
            "All tenants.",
            "more than nothing.",
            "Tokens has the hit ratio; docs/cache.md says what is cached.",
            "No answer from the cache had a price yet.",
            "Nothing saved yet",
        ),
        unit=USD,
        height=8,
        width=4,
        instant=True,
    ),
]

_LEFT_OF: Final = select("weir:budget_remaining_usd:min")
_BUDGETS = [
    table(
        "Tenants and models",
        [
            column(f"topk(50, {increase(COST, by=('tenant', MODEL))})", "Cost", USD),
            column(f"topk(50, {rate(COST, by=('tenant', MODEL), window=RANGE)} * 3600)", "Per hour", USD),
        ],
        [("tenant", "Tenant"), (MODEL, "Model")],
        Words(
            "The fifty dearest pairs of tenant and model, over the time shown.",
            "pairs that you expect, in the order that you expect.",
            "a pair that should not be: the keys of a tenant may be bound to models, docs/limits.md.",
            "No call with a known price in this time.",
        ),
        sort="Cost",
        height=9,
    ),
    table(
        "Budgets",
        [
            column(
                used_budgets(),
                "Used",
                SHARE,
                above(1, warn=0.8, reason="orange from 80 %; red where all of it is spent."),
            ),
            column(f"min by (tenant, key, budget) ({_LEFT_OF})", "Left", USD),
            column(
                f"min by (tenant, key, budget) (predict_linear({_LEFT_OF}[2h], {6 * 3600}))",
                "Left in 6 h",
                USD,
                Thresholds("red", (Limit(0, "green"),), "red below 0: then it is gone within these hours."),
            ),
        ],
        [("tenant", "Tenant"), ("key", "Key"), ("budget", "Budget")],
        Words(
            "Budgets that were used within the hour: the share that is spent of the day or month, the "
            "dollars that are left, and those that will be left in six hours at the pace of the last two.",
            "Left in 6 h above 0.",
            "raise the budget, or tell its owner before a hard one refuses (402): docs/limits.md.",
            "No budgets are configured, none was used within the hour, or the recorded rules are missing.",
        ),
        sort="Used",
        height=9,
    ),
    bargauge(
        "Dearest models",
        [(largest(8, increase(COST, by=(MODEL,))), "{{gen_ai_request_model}}")],
        Words(
            "What each of the eight dearest models cost in the time shown.",
            "the order that you expect.",
            "a dear model where a cheaper one would do: docs/routing.md has aliases.",
            "No call with a known price in this time.",
            "Nothing priced",
        ),
        unit=USD,
        width=12,
    ),
    bargauge(
        "Dearest tenants",
        [(largest(8, increase(COST, by=("tenant",))), "{{tenant}}")],
        Words(
            "What each of the eight dearest tenants cost in the time shown.",
            "the order that you expect.",
            "give the tenant a budget: docs/limits.md.",
            "No call with a known price in this time.",
            "Nothing priced",
        ),
        unit=USD,
        width=12,
    ),
]

BOARD: Final = Board(
    uid="weir-cost",
    title="Weir / Cost",
    description="What calls cost, whose they are, and where it goes.",
    hours=24,
    refresh="5m",
    sections=(
        Section("", [*_FIRST, *_WHO]),
        Section("Against last week", _COURSE),
        Section("What it is worth", _WORTH),
        Section("What it is not", _NOT_WORTH),
        Section("Budgets, tenants, models", _BUDGETS),
    ),
)
