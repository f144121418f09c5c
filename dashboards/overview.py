"""Overview: are users fine, what does it cost, which model."""

from __future__ import annotations

from typing import Final

from dashboards import links
from dashboards.board import Board, Section
from dashboards.objectives import BURN, OBJECTIVES, budget_left
from dashboards.panels import (
    NUMBER,
    REQUESTS_PER_SECOND,
    SECONDS,
    SHARE,
    TOKENS_PER_SECOND,
    USD,
    Link,
    Words,
    above,
    bargauge,
    below,
    column,
    log_lines,
    stat,
    table,
    timeseries,
)
from dashboards.queries import (
    BAD,
    GOOD,
    RANGE,
    REQUESTS,
    TTFT,
    USAGE,
    VALID,
    burn,
    elsewhere,
    increase,
    largest,
    line,
    logs,
    quantile,
    rate,
    select,
    share,
    total,
    used_budgets,
    within,
)

FIRING: Final = elsewhere("ALERTS", 'alertname=~"Weir.*"', 'alertstate="firing"')
CALLERS: Final = 'outcome=~"client_error|rate_limited|budget_rejected|client_disconnected"'
OUTCOMES: Final = (
    ("success", "green"),
    ("client_error", "light-blue"),
    ("rate_limited", "yellow"),
    ("budget_rejected", "light-yellow"),
    ("client_disconnected", "blue"),
    ("upstream_error", "red"),
    ("timeout", "orange"),
    ("stream_truncated", "dark-red"),
    ("overloaded", "purple"),
    ("internal_error", "dark-purple"),
)
RUNBOOK: Final = Link("Runbook", "https://github.com/weir-llm/weir/blob/main/docs/runbooks/${__value.raw}.md")

_FIRST = [
    stat(
        "Availability",
        f"1 - {share(increase('weir_requests_total', BAD), increase('weir_requests_total', VALID))}",
        Words(
            "The share of requests that did not fail their user, over the time shown. What callers did "
            "wrong, limits and budgets are left out, and so is who left.",
            "99.9 % and more.",
            "look at Outcomes below for the kind of failure, then at the log lines at the bottom; Upstreams "
            "tells whose failure it is.",
            "No requests to models in this time.",
            "No requests",
        ),
        unit=SHARE,
        thresholds=below(
            0.995, good=0.999, reason="green from 99.9 %, the objective; red where it is missed fivefold."
        ),
        instant=True,
        links=(links.FAILED_TRACES, links.FAILED_LINES),
    ),
    stat(
        "Error budget, 30 d",
        budget_left("availability"),
        Words(
            "What is left of the failures that the availability objective allows in 30 days; of several "
            "installations the one that has least.",
            "more than a quarter.",
            "see which failures spent it (Outcomes, over 30 days), and be careful with risky changes until "
            "it is back.",
            "No recorded rules: metrics.prometheusRule.enabled installs them; they need some minutes of "
            "requests.",
            "No rules, or too new",
        ),
        unit=SHARE,
        thresholds=below(
            0, good=0.25, reason="red: all of it is spent; orange: less than a quarter is left."
        ),
    ),
    stat(
        "TTFT within 2.5 s",
        within(TTFT, "2.5", window=RANGE),
        Words(
            "The share of streams whose first token came within 2.5 s of the request's arrival, over the "
            "time shown.",
            "95 % and more.",
            "Latency has the waterfall: it tells whether the queue, Weir or the upstream takes the time.",
            "No streamed answers in this time.",
            "No streams",
        ),
        unit=SHARE,
        thresholds=below(
            0.9, good=0.95, reason="green from 95 %, the objective; red where twice as many are late."
        ),
        instant=True,
        links=(links.SLOW_TRACES, links.SLOW_LINES),
    ),
    stat(
        "Alerts firing",
        f"count({FIRING}) or 0 * count({select('weir:availability:objective')})",
        Words(
            "Alerts of Weir that fire now, by Prometheus' own account.",
            "0.",
            "the list of alerts below names them, with a runbook for each.",
            "No rules of Weir in this Prometheus: metrics.prometheusRule.enabled installs them.",
            "No rules installed",
        ),
        unit=NUMBER,
        thresholds=above(1, reason="red as soon as one fires."),
        decimals=0,
    ),
    stat(
        "Requests",
        rate("weir_requests_total"),
        Words(
            "Requests to models a second, however they ended.",
            "what is usual at this hour; a sudden fall is as telling as a rise.",
            "a fall without failures: look at what calls Weir, the ingress and the pods.",
            "No pod of Weir is scraped, or none had a request yet.",
            "No requests yet",
        ),
        unit=REQUESTS_PER_SECOND,
    ),
    stat(
        "Dollars per hour",
        f"{rate('weir_cost_usd_total')} * 3600",
        Words(
            "What the calls of now cost, as dollars an hour, by Weir's price table.",
            "what you planned for.",
            "Cost names the model and the tenant.",
            "No call with a known price yet; Cost counts those without.",
            "Nothing priced yet",
        ),
        unit=USD,
    ),
    bargauge(
        "Dearest models, per hour",
        [
            (
                largest(4, f"{rate('weir_cost_usd_total', by=('gen_ai_request_model',))} * 3600"),
                "{{gen_ai_request_model}}",
            )
        ],
        Words(
            "The four models that cost most now.",
            "the models that you meant to be used, in the order that you expect.",
            "Cost shows who uses a model that should not be there.",
            "No call with a known price yet.",
            "Nothing priced yet",
        ),
        unit=USD,
        height=4,
    ),
]

_COURSE = [
    timeseries(
        "Outcomes",
        # The failures at the bottom, where the axis measures them; what went well on top.
        [
            (rate("weir_requests_total", which, by=("outcome",)), "{{outcome}}")
            for which in (BAD, CALLERS, 'outcome="success"')
        ],
        Words(
            "Requests a second by how they truly ended. A stream that broke after its status line is "
            "stream_truncated here, though HTTP calls it a 200.",
            "nearly all success. Blue and yellow are callers' own mistakes and limits.",
            "red, orange: Upstreams; purple: Pods, for want of places or a fault of Weir itself.",
            "No pod of Weir is scraped, or none had a request yet.",
        ),
        unit=REQUESTS_PER_SECOND,
        stacked=True,
        colors=OUTCOMES,
        links=(links.FAILED_TRACES, links.FAILED_LINES),
    ),
    timeseries(
        "Burn rates of the error budgets",
        [(burn(name, window), f"{title}, {window}") for name, title in OBJECTIVES for window in ("1h", "6h")],
        Words(
            "How many times faster than allowed each objective's error budget is spent: at 1 it lasts just "
            "30 days. Of several installations the fastest.",
            "below 1.",
            "above 14.4 over an hour 2 % of the month's budget is gone in it, and somebody is paged; the "
            "runbook of the alert says what to do.",
            "No recorded rules (metrics.prometheusRule.enabled), or no requests in the last hour.",
        ),
        unit=NUMBER,
        thresholds=BURN,
    ),
]

_MONEY = [
    timeseries(
        "Tokens",
        [
            (rate(f"{USAGE}input_tokens_total"), "input"),
            (rate(f"{USAGE}output_tokens_total"), "output"),
        ],
        Words(
            "Tokens a second: of the questions, and of the answers.",
            "the course of the requests; output falls before users complain where an upstream slows down.",
            "Tokens has models, cached tokens and reasoning.",
            "No answer with a count of tokens yet.",
        ),
        unit=TOKENS_PER_SECOND,
        width=8,
    ),
    timeseries(
        "Dollars per hour by model",
        [(f"{rate('weir_cost_usd_total', by=('gen_ai_request_model',))} * 3600", "{{gen_ai_request_model}}")],
        Words(
            "What calls cost, as dollars an hour, by the model that was asked for.",
            "the course of the requests.",
            "a model that grows alone: Cost shows its tenants, Tokens whether its prompts became longer.",
            "No call with a known price yet.",
        ),
        unit=USD,
        width=8,
        stacked=True,
    ),
    timeseries(
        "Time to first token",
        [(quantile(q, TTFT), f"p{q * 100:g}") for q in (0.5, 0.95, 0.99)],
        Words(
            "From a request's arrival to the first piece of its streamed answer. Points are single requests "
            "with a trace: click one.",
            "p95 below 2.5 s.",
            "Latency shows which part of the way takes the time.",
            "No streamed answers yet.",
        ),
        unit=SECONDS,
        width=8,
        exemplars=True,
        thresholds=above(2.5, reason="the line is 2.5 s, within which the objective wants 95 %."),
        links=(links.SLOW_TRACES, links.SLOW_LINES),
    ),
]

_FAILED: Final = above(
    0.005, warn=0.001, reason="orange from 0.1 %, all that the objective allows; red from five times that."
)
_WHO = [
    table(
        "Models",
        [
            column(
                rate("weir_requests_total", by=("gen_ai_request_model",), window=RANGE), "Requests", "reqps"
            ),
            column(
                share(
                    increase("weir_requests_total", BAD, by=("gen_ai_request_model",)),
                    increase("weir_requests_total", VALID, by=("gen_ai_request_model",)),
                ),
                "Failed",
                SHARE,
                _FAILED,
            ),
            column(
                quantile(0.95, TTFT, by=("gen_ai_request_model",), window=RANGE),
                "TTFT p95",
                SECONDS,
                above(5, warn=2.5, reason="orange from 2.5 s, the objective; red from twice that."),
            ),
            column(
                quantile(0.95, REQUESTS, GOOD, by=("gen_ai_request_model",), window=RANGE),
                "Duration p95",
                SECONDS,
            ),
            column(increase("weir_cost_usd_total", by=("gen_ai_request_model",)), "Cost", USD),
        ],
        [("gen_ai_request_model", "Model")],
        Words(
            "Each model that was asked for, over the time shown: requests a second, the share that failed, "
            "times, dollars. A line without a name are requests that were refused before their model was "
            "known.",
            "Failed below 0.1 %, TTFT p95 below 2.5 s.",
            "choose the model in the variable above, and go on to Upstreams or Latency.",
            "No requests to models in this time.",
        ),
        sort="Requests",
    ),
    table(
        "Tenants",
        [
            column(rate("weir_key_requests_total", by=("tenant",), window=RANGE), "Requests", "reqps"),
            column(increase("weir_cost_usd_total", by=("tenant",)), "Cost", USD),
        ],
        [("tenant", "Tenant")],
        Words(
            "Each tenant, over the time shown: requests a second and dollars.",
            "the tenants that you know, as you know them.",
            "a tenant that suddenly leads: weir_key_requests_total has its keys, docs/limits.md its limits.",
            "No requests with a key in this time.",
        ),
        sort="Cost",
        width=5,
    ),
    bargauge(
        "Budgets used",
        [
            (
                largest(8, used_budgets()),
                "{{tenant}} {{key}} {{budget}}",
            )
        ],
        Words(
            "How much of each budget is spent in its day or month, of those that were used within the hour; "
            "the fullest eight.",
            "below 80 %, where most budgets begin to warn.",
            "a hard budget refuses at 100 %: raise it, or tell its owner. Cost has the forecast.",
            "No budgets are configured (docs/limits.md), or none was used within the hour.",
            "No budgets used within the hour",
        ),
        unit=SHARE,
        width=7,
        maximum=1,
        thresholds=above(1, warn=0.8, reason="orange from 80 %, where budgets warn by default; red: spent."),
    ),
]

_TROUBLE = [
    table(
        "Which alerts fire",
        [column(total(FIRING, "alertname", "severity", "namespace", "job"), "", NUMBER)],
        [("alertname", "Alert"), ("severity", "Severity"), ("namespace", "Namespace"), ("job", "Job")],
        Words(
            "Alerts of Weir that fire now. A click on a name opens its runbook.",
            "an empty list.",
            "pages first; each runbook says how to see it, what to do, and how to know that it is over.",
            "No alert fires, or the rules are not installed: the number above tells them apart.",
        ),
        width=8,
        height=7,
        column_links=(("Alert", RUNBOOK),),
    ),
    timeseries(
        "Streams that broke",
        [
            (
                share(
                    rate("weir_streams_total", 'outcome!~"success|client_error|client_disconnected"'),
                    rate("weir_streams_total", 'outcome!="client_disconnected"'),
                ),
                "broken",
            )
        ],
        Words(
            "The share of streams that had begun and did not end well, of those whose reader stayed.",
            "below 0.1 %.",
            "the log lines below name the upstream; a break at a round number of seconds is a proxy's "
            "timeout: docs/ingress.md.",
            "No streamed answers yet.",
        ),
        unit=SHARE,
        width=8,
        height=7,
        thresholds=above(0.001, reason="the line is 0.1 %: the objective is 99.9 %."),
        links=(links.FAILED_TRACES, links.FAILED_LINES),
    ),
    timeseries(
        "Refused by limits and budgets",
        [
            (
                rate("weir_requests_total", 'outcome=~"rate_limited|budget_rejected"', by=("outcome",)),
                "{{outcome}}",
            )
        ],
        Words(
            "Requests a second that were refused because of a limit or a budget. They spend no error budget.",
            "few, and of tenants that you expect.",
            "Tenants above tells who; docs/limits.md how to give more. rate_limited may be the provider's "
            "own limit: Upstreams.",
            "No request was refused by a limit or a budget yet.",
        ),
        unit=REQUESTS_PER_SECOND,
        width=8,
        height=7,
        colors=(("rate_limited", "yellow"), ("budget_rejected", "orange")),
    ),
    log_lines(
        "Failed requests",
        logs(
            'event="request"',
            'outcome!~"success|client_error|rate_limited|budget_rejected|client_disconnected"',
            line(
                *("outcome", "status", "error_code"),
                model="model",
                upstream="upstream",
                tenant="tenant",
                seconds="duration_seconds",
            ),
        ),
        Words(
            "The log line of each request that failed its user, the newest first. trace_id leads to its "
            "trace, request_id is what its caller saw in X-Request-ID.",
            "none.",
            "docs/errors.md explains the codes.",
            "No request failed in this time, or Loki has no logs of Weir: docs/dashboards.md.",
        ),
    ),
]

BOARD: Final = Board(
    uid="weir-overview",
    title="Weir / Overview",
    description="Are users fine, what does it cost, which model.",
    hours=3,
    sections=(
        Section("", [*_FIRST, *_COURSE]),
        Section("Tokens, dollars, time", _MONEY),
        Section("Who and what", _WHO),
        Section("Trouble", _TROUBLE),
    ),
)
