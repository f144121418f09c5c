"""Upstreams: which of them answer, and what Weir does where they do not."""

from __future__ import annotations

from typing import Final

from dashboards import links
from dashboards.board import Board, Section
from dashboards.panels import (
    NUMBER,
    REQUESTS_PER_SECOND,
    SECONDS,
    SHARE,
    State,
    Words,
    above,
    bargauge,
    below,
    column,
    heatmap,
    log_lines,
    stat,
    table,
    timeline,
    timeseries,
)
from dashboards.queries import (
    ATTEMPTS,
    GOOD,
    TTFC,
    highest,
    increase,
    line,
    logs,
    quantile,
    rate,
    ratio,
    select,
    share,
)

TRIED: Final = "weir_upstream_attempts_total"
FAILED: Final = 'outcome!~"success|client_error|client_disconnected"'
"""As the alert WeirUpstreamDown has it: a refusal for a limit too is no answer."""
COUNTED: Final = 'outcome!~"client_error|client_disconnected"'
"""What says something of the upstream: neither a wrong question nor a caller who left."""
LIMITED: Final = 'outcome="rate_limited"'
OPEN: Final = highest(select("weir_circuit_state", 'state="open"'), "upstream", "model")
TRYING: Final = highest(select("weir_circuit_state", 'state="half_open"'), "upstream", "model")
LINKS: Final = (links.FAILED_TRACES, links.FAILED_LINES)
NO_ATTEMPT: Final = "No upstream was asked yet."

_FIRST = [
    stat(
        "Attempts",
        rate(TRIED),
        Words(
            "Calls of upstreams a second: first ones, and those that were made because of them.",
            "near the requests that the cache does not answer.",
            "many more than requests: see the retry amplification beside.",
            NO_ATTEMPT,
            "No attempts yet",
        ),
        unit=REQUESTS_PER_SECOND,
    ),
    stat(
        "Good attempts",
        f"1 - {share(increase(TRIED, FAILED), increase(TRIED, COUNTED))}",
        Words(
            "The share of attempts that did not fail at the upstream, over the time shown; a 429 is one "
            "that did. Weir hides many by trying again. The alert WeirUpstreamDown counts alike.",
            "99 % and more.",
            "find the upstream in the table below, and its kind of failure beside it.",
            "No upstream was asked in this time.",
            "No attempts",
        ),
        unit=SHARE,
        thresholds=below(
            0.95, good=0.99, reason="green from 99 %; red below 95 %, where retries begin to show."
        ),
        instant=True,
        links=LINKS,
    ),
    stat(
        "Retry amplification",
        ratio(increase(TRIED), increase(TRIED, 'kind="first"')),
        Words(
            "All attempts for each first one, over the time shown: 1 means that nothing was tried again. "
            "Hedges count too.",
            "below 1.1.",
            "an upstream that fails gets this much more load: its circuit should open. docs/routing.md.",
            "No upstream was asked in this time.",
            "No attempts",
        ),
        unit=NUMBER,
        thresholds=above(1.5, warn=1.1, reason="orange from one in ten tried again; red from one in two."),
        instant=True,
        decimals=2,
    ),
    stat(
        "Fallback ratio",
        share(increase(TRIED, 'kind=~"failover|fallback"'), increase(TRIED, 'kind="first"')),
        Words(
            "The attempts elsewhere (failover: another upstream; fallback: another model) for each first "
            "one, over the time shown.",
            "below 1 %.",
            "callers get answers, perhaps of another model and price: mend the first choice.",
            "No upstream was asked in this time.",
            "No attempts",
        ),
        unit=SHARE,
        thresholds=above(
            0.1, warn=0.01, reason="orange from 1 %; red from 10 %: the first choice is hardly there."
        ),
        instant=True,
    ),
    stat(
        "Open circuits",
        f"count({OPEN} > 0) or 0 * {rate(TRIED)}",
        Words(
            "Pairs of upstream and model that Weir leaves alone now, because their calls failed.",
            "0.",
            "Circuits below names them; they close by themselves when a trial call goes well.",
            NO_ATTEMPT,
            "No attempts yet",
        ),
        unit=NUMBER,
        thresholds=above(1, reason="red as soon as one is open."),
        decimals=0,
    ),
    stat(
        "Refused with 429",
        f"{rate(TRIED, LIMITED)} or 0 * {rate(TRIED)}",
        Words(
            "Attempts a second that upstreams answered with 429: Weir's own quota there is spent.",
            "0.",
            "add keys or upstreams (docs/routing.md, key pools), limit callers (docs/limits.md), or ask the "
            "provider for more.",
            NO_ATTEMPT,
            "No attempts yet",
        ),
        unit=REQUESTS_PER_SECOND,
        thresholds=above(1, warn=0.01, reason="orange as soon as there are some; red from one a second."),
    ),
    stat(
        "Hedges that won",
        ratio(increase("weir_hedges_total", 'result="won"'), increase("weir_hedges_total")),
        Words(
            "The share of second calls, made to be quicker, that were: the others were paid for nothing.",
            "between 20 % and 80 %: below, they start too early; above, too late.",
            "docs/routing.md says how long to wait before a second call; Cost has what lost ones cost.",
            "No second call was made: hedging is off, or was not needed.",
            "No hedges",
        ),
        unit=SHARE,
        instant=True,
    ),
    stat(
        "Attempt p95",
        quantile(0.95, ATTEMPTS, GOOD),
        Words(
            "The duration that 95 % of the good attempts stayed below. Long answers take long.",
            "what is usual for your answers.",
            "compare providers below.",
            "No good attempt yet.",
            "No good attempt yet",
        ),
        unit=SECONDS,
        thresholds=above(
            120, warn=60, reason="orange from 60 s, where many clients give up; red from 120 s."
        ),
        links=LINKS,
    ),
]

_COURSE = [
    timeseries(
        "Failed attempts by upstream",
        [(rate(TRIED, FAILED, by=("upstream", "outcome")), "{{upstream}} {{outcome}}")],
        Words(
            "Attempts a second that failed at the upstream, by upstream and kind.",
            "none.",
            "upstream_error: its status page, and its key; timeout: Latency; rate_limited: more keys. "
            "A stream that breaks after its first event is a good attempt here: Overview counts those.",
            "No attempt failed yet: good.",
        ),
        unit=REQUESTS_PER_SECOND,
        stacked=True,
        links=LINKS,
    ),
    timeline(
        "Circuits",
        [
            (
                f"clamp_max(2 * {OPEN} + {TRYING}, 2)",
                "{{upstream}} {{model}}",
            )
        ],
        Words(
            "Each circuit that was ever open: what the pods that think worst of it think. Open: Weir asks "
            "it nothing. Trying: single calls test it.",
            "all closed.",
            "open for minutes: the upstream is down, or refuses Weir's key. The log line circuit_changed "
            "has the time.",
            "No circuit was ever open: good.",
        ),
        states=(
            (0, State("closed", "green")),
            (1, State("trying", "orange")),
            (2, State("open", "red")),
        ),
    ),
]

_SHARES = [
    timeseries(
        "Attempts by upstream",
        [(rate(TRIED, by=("upstream",)), "{{upstream}}")],
        Words(
            "Calls a second of each upstream.",
            "as your weights and priorities say.",
            "one that gets none: its circuit, or its place in the configuration.",
            NO_ATTEMPT,
        ),
        unit=REQUESTS_PER_SECOND,
        width=8,
        stacked=True,
    ),
    timeseries(
        "Good attempts by upstream",
        [
            (
                f"1 - {share(rate(TRIED, FAILED, by=('upstream',)), rate(TRIED, COUNTED, by=('upstream',)))}",
                "{{upstream}}",
            )
        ],
        Words(
            "The share of attempts at each upstream that did not fail there; a 429 is a failure.",
            "99 % and more.",
            "one alone: its provider. All at once: this cluster's network or name service.",
            NO_ATTEMPT,
        ),
        unit=SHARE,
        width=8,
        minimum=None,
        maximum=1,
        thresholds=below(0.99, reason="the line is 99 %."),
        links=LINKS,
    ),
    timeseries(
        "Attempts by kind",
        [(rate(TRIED, by=("kind",)), "{{kind}}")],
        Words(
            "Why upstreams were asked: first; retry, the same again; failover, another upstream; fallback, "
            "another model; hedge, to be quicker.",
            "nearly all first.",
            "retry and failover grow with failures, fallback when all places of a model fail.",
            NO_ATTEMPT,
        ),
        unit=REQUESTS_PER_SECOND,
        width=8,
        stacked=True,
        colors=(
            ("first", "green"),
            ("retry", "yellow"),
            ("failover", "orange"),
            ("fallback", "red"),
            ("hedge", "blue"),
        ),
    ),
    timeseries(
        "Retry amplification over time",
        [(ratio(rate(TRIED), rate(TRIED, 'kind="first"')), "attempts for each first one")],
        Words(
            "All attempts for each first one: how much load Weir itself adds while an upstream fails.",
            "below 1.1.",
            "above 1.5 for long: fewer retries (OPENAI_MAX_RETRIES), or sooner open circuits; "
            "docs/routing.md.",
            NO_ATTEMPT,
        ),
        unit=NUMBER,
        width=8,
        minimum=1,
        thresholds=above(1.5, warn=1.1, reason="lines at one in ten tried again, and one in two."),
    ),
    timeseries(
        "Fallback ratio by model",
        [
            (
                share(
                    rate(TRIED, 'kind=~"failover|fallback"', by=("gen_ai_request_model",)),
                    rate(TRIED, 'kind="first"', by=("gen_ai_request_model",)),
                ),
                "{{gen_ai_request_model}}",
            )
        ],
        Words(
            "The attempts elsewhere for each first one, by the model that was asked for.",
            "below 1 %.",
            "the model's first upstream is down, or refuses it: its line in the table below.",
            NO_ATTEMPT,
        ),
        unit=SHARE,
        width=8,
        thresholds=above(0.1, warn=0.01, reason="lines at 1 % and 10 %."),
    ),
    timeseries(
        "Refused for their limits (429)",
        [(rate(TRIED, LIMITED, by=("upstream",)), "{{upstream}}")],
        Words(
            "Attempts a second that an upstream answered with 429.",
            "none.",
            "more keys or upstreams, limits for callers, or more quota at the provider.",
            "No upstream refused an attempt for its limit yet: good.",
        ),
        unit=REQUESTS_PER_SECOND,
        width=8,
        links=LINKS,
    ),
]

_TIMES = [
    heatmap(
        "Duration of attempts",
        rate(f"{ATTEMPTS}_bucket", by=("le",)),
        Words(
            "How many attempts a second took which time, failed ones too. Points are single requests with a "
            "trace.",
            "bands where your kinds of request are.",
            "a band at a round number of seconds is a timeout: OPENAI_TIMEOUT, or a proxy's.",
            NO_ATTEMPT,
        ),
        unit=SECONDS,
        width=8,
        links=LINKS,
    ),
    timeseries(
        "Attempts, p95 by provider",
        [(quantile(0.95, ATTEMPTS, GOOD, by=("gen_ai_provider_name",)), "{{gen_ai_provider_name}}")],
        Words(
            "The duration that 95 % of the good attempts at each provider stayed below.",
            "even.",
            "one provider alone: it is loaded, or answers became longer (Tokens).",
            "No good attempt yet.",
        ),
        unit=SECONDS,
        width=8,
        exemplars=True,
        thresholds=above(60, reason="the line is 60 s, where many clients and proxies give up."),
        links=LINKS,
    ),
    timeseries(
        "Failed attempts by error",
        [
            (
                rate(f"{ATTEMPTS}_count", 'error_type!=""', by=("gen_ai_provider_name", "error_type")),
                "{{gen_ai_provider_name}} {{error_type}}",
            )
        ],
        Words(
            "Attempts a second that had no good answer, by provider and code of the error.",
            "none; codes of callers' own mistakes are no fault of the provider.",
            "docs/errors.md explains the codes.",
            "No attempt failed yet: good.",
        ),
        unit=REQUESTS_PER_SECOND,
        width=8,
        links=LINKS,
    ),
]

_UPSTREAM: Final = ("upstream", "gen_ai_request_model")
_NAMES = [
    table(
        "Upstreams and models",
        [
            column(increase(TRIED, by=_UPSTREAM), "Attempts", NUMBER),
            column(
                share(increase(TRIED, FAILED, by=_UPSTREAM), increase(TRIED, COUNTED, by=_UPSTREAM)),
                "Failed",
                SHARE,
                above(0.05, warn=0.01, reason="orange from 1 %; red from 5 %, where retries begin to show."),
            ),
            column(
                share(increase(TRIED, 'outcome="timeout"', by=_UPSTREAM), increase(TRIED, by=_UPSTREAM)),
                "Late",
                SHARE,
            ),
            column(
                share(increase(TRIED, LIMITED, by=_UPSTREAM), increase(TRIED, by=_UPSTREAM)),
                "429",
                SHARE,
            ),
        ],
        [("upstream", "Upstream"), ("gen_ai_request_model", "Model")],
        Words(
            "Each model at each upstream, over the time shown: attempts, and the share that failed there; of "
            "all attempts, those given up as late and those refused for a limit, which are among the failed.",
            "Failed below 1 %.",
            "the line with the highest share names the place; docs/resilience.md has what callers see of "
            "each fault.",
            "No upstream was asked in this time.",
        ),
        sort="Attempts",
    ),
    bargauge(
        "First piece of a stream, p95",
        [(quantile(0.95, TTFC, by=("gen_ai_provider_name",), window="$__range"), "{{gen_ai_provider_name}}")],
        Words(
            "From the beginning of an attempt to the first piece of its stream, by provider, over the time "
            "shown.",
            "below 2.5 s.",
            "the provider is loaded or far away; Latency has its course.",
            "No streamed answers in this time.",
            "No streams",
        ),
        unit=SECONDS,
        thresholds=above(
            5, warn=2.5, reason="orange from 2.5 s, the objective for callers; red from twice that."
        ),
    ),
    timeseries(
        "Hedges",
        [(rate("weir_hedges_total", by=("result",)), "{{result}}")],
        Words(
            "Second calls a second that were made to be quicker, by whether their answer was taken.",
            "few, and many of them won.",
            "many lost ones: wait longer before the second call (docs/routing.md).",
            "No second call was made: hedging is off, or was not needed.",
        ),
        unit=REQUESTS_PER_SECOND,
        width=6,
        colors=(("won", "green"), ("lost", "orange")),
    ),
    log_lines(
        "Requests that upstreams failed, and circuits",
        logs(
            'event=~"request|circuit_changed"',
            'outcome=~"upstream_error|timeout|stream_truncated" or event="circuit_changed"',
            line(
                *("event", "outcome", "error_code", "state"),
                upstream="upstream",
                model="model",
                attempts="attempts",
                seconds="duration_seconds",
            ),
        ),
        Words(
            "The log line of each request that an upstream failed, and each change of a circuit, the newest "
            "first. trace_id leads to the trace with all attempts.",
            "none.",
            "attempts says how often it was tried; docs/errors.md explains the codes.",
            "No request failed by an upstream in this time, or Loki has no logs of Weir: docs/dashboards.md.",
        ),
    ),
]

BOARD: Final = Board(
    uid="weir-upstreams",
    title="Weir / Upstreams",
    description="Which upstreams answer, and what Weir does where they do not.",
    sections=(
        Section("", [*_FIRST, *_COURSE]),
        Section("Attempts", _SHARES),
        Section("Times and errors", _TIMES),
        Section("One by one", _NAMES),
    ),
)
