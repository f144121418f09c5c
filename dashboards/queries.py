"""Pieces of PromQL and LogQL that the panels are made of.

A selector carries the variables that its metric has labels for, so a dashboard's choice reaches every panel
that can follow it. `.*`, the value of "All", matches a label that is not there too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

RATE: Final = "$__rate_interval"
RANGE: Final = "$__range"

PLACE: Final = ('cluster=~"$cluster"', 'namespace=~"$namespace"')
JOB: Final = (*PLACE, 'job=~"$job"')

_MODEL: Final = 'gen_ai_request_model=~"$model"'
_PROVIDER: Final = 'gen_ai_provider_name=~"$provider"'
_TENANT: Final = 'tenant=~"$tenant"'
_LABELS: Final = {
    "weir_requests_total": (_MODEL,),
    "weir_streams_total": (_MODEL,),
    "weir_upstream_attempts_total": (_MODEL,),
    "weir_circuit_state": ('model=~"$model"',),
    "weir_cost_usd_total": (_PROVIDER, _MODEL, _TENANT),
    "weir_unpriced_requests_total": (_PROVIDER, _MODEL),
    "weir_cache_saved_usd_total": (_MODEL,),
    "weir_key_requests_total": (_TENANT,),
    "weir_budget_used_ratio": (_TENANT,),
    "weir_budget_remaining_usd": (_TENANT,),
    "weir:budget_remaining_usd:min": (_TENANT,),
}
"""Of our own metrics, the labels that a variable chooses from; those of GenAI all have the same two."""

_LATE: Final = (
    (re.compile(r"weir_cost_usd_total|weir:cost_usd:|weir_cache_saved_usd_total"), "dollars"),
    (re.compile(r"usage_\w+_tokens_total"), "tokens"),
    (re.compile(r"weir_unpriced_requests_total|weir_key_requests_total"), "requests"),
    (re.compile(r"weir_upstream_attempts_total"), "attempts"),
)
"""Counters whose series begin with their first value, not at 0: no rate sees it."""
_ZERO: Final = re.compile(r"0 \* sum\((?:rate|increase)\(\w+")
"""What stands there only to be 0."""

BAD: Final = 'outcome=~"upstream_error|timeout|stream_truncated|overloaded|internal_error"'
"""Requests that failed their user: docs/slo.md."""
VALID: Final = 'outcome!~"client_error|rate_limited|budget_rejected|client_disconnected"'
"""Requests that count for the availability: docs/slo.md."""
GOOD: Final = 'error_type=""'
"""Of the durations, those of good answers: a quick failure makes nothing faster."""

# The names of histograms: what callers see (server), and what single attempts at upstreams took (client).
REQUESTS: Final = "gen_ai_server_request_duration_seconds"
TTFT: Final = "gen_ai_server_time_to_first_token_seconds"
TPOT: Final = "gen_ai_server_time_per_output_token_seconds"
USAGE: Final = "gen_ai_client_inference_usage_"
ATTEMPTS: Final = "gen_ai_client_inference_duration_seconds"
TTFC: Final = "gen_ai_client_inference_time_to_first_chunk_seconds"
TPOC: Final = "gen_ai_client_inference_time_per_output_chunk_seconds"


def select(metric: str, *matchers: str) -> str:
    """The series of a metric of Weir, as the dashboard's variables choose them."""
    if metric.startswith("gen_ai_"):
        own: tuple[str, ...] = (_PROVIDER, _MODEL)
    else:
        own = _LABELS.get(metric, ())
    return f"{metric}{{{','.join((*JOB, *own, *matchers))}}}"


def elsewhere(metric: str, *matchers: str) -> str:
    """The series of a metric that others make, about the chosen clusters and namespaces."""
    return f"{metric}{{{','.join((*PLACE, *matchers))}}}"


def per_second(metric: str, *matchers: str, by: tuple[str, ...] = ()) -> str:
    """As `rate`, of a counter that others make."""
    return total(f"rate({elsewhere(metric, *matchers)}[{RATE}])", *by)


def total(inner: str, *by: str) -> str:
    return f"sum by ({', '.join(by)}) ({inner})" if by else f"sum({inner})"


def highest(inner: str, *by: str) -> str:
    return f"max by ({', '.join(by)}) ({inner})" if by else f"max({inner})"


def rate(metric: str, *matchers: str, by: tuple[str, ...] = (), window: str = RATE, offset: str = "") -> str:
    """Per second, summed over pods."""
    return total(f"rate({select(metric, *matchers)}[{window}]{_offset(offset)})", *by)


def increase(
    metric: str, *matchers: str, by: tuple[str, ...] = (), window: str = RANGE, offset: str = ""
) -> str:
    """Over the window, summed over pods."""
    return total(f"increase({select(metric, *matchers)}[{window}]{_offset(offset)})", *by)


def quantile(q: float, metric: str, *matchers: str, by: tuple[str, ...] = (), window: str = RATE) -> str:
    """Of a histogram, over all pods; `metric` is its name without `_bucket`."""
    buckets = rate(f"{metric}_bucket", *matchers, by=("le", *by), window=window)
    return f"histogram_quantile({q:g}, {buckets})"


def largest(number: int, query: str) -> str:
    """The largest series of now, in order."""
    return f"sort_desc(topk({number}, {query}))"


def mean(metric: str, *matchers: str, by: tuple[str, ...] = (), window: str = RATE) -> str:
    return ratio(
        rate(f"{metric}_sum", *matchers, by=by, window=window),
        rate(f"{metric}_count", *matchers, by=by, window=window),
    )


def ratio(part: str, whole: str) -> str:
    """Nothing, and no wrong number, where the whole is 0."""
    return f"{part} / ({whole} > 0)"


def share(part: str, whole: str) -> str:
    """As `ratio`, and 0 where the part was never counted: a counter appears with its first event."""
    return ratio(f"({part} or 0 * {whole})", whole)


def within(metric: str, le: str, *matchers: str, window: str = RATE, by: tuple[str, ...] = ()) -> str:
    """The share of a histogram's events at or below one edge of its buckets."""
    return ratio(
        rate(f"{metric}_bucket", *matchers, f'le="{le}"', window=window, by=by),
        rate(f"{metric}_count", *matchers, window=window, by=by),
    )


def used_budgets() -> str:
    """The used share of budgets, by pods that had a request on them lately: others may tell yesterday's."""
    used = select("weir_budget_used_ratio")
    return highest(f"{used} and changes({used}[1h]) > 0", "tenant", "key", "budget")


def every_tenant(query: str) -> str:
    """For dollars beside what has no tenant as a label: half a ratio must not follow the choice alone."""
    return query.replace(f",{_TENANT}", "")


def whole(query: str) -> str:
    """As `every_tenant`, for all three choices: a ratio's other half knows none of them."""
    for matcher in (_PROVIDER, _MODEL, _TENANT):
        query = query.replace(f",{matcher}", "")
    return query


def burn(objective: str, window: str) -> str:
    """How many times faster than allowed the error budget is spent; of several installations the fastest."""
    bad = select(f"weir:{objective}:error_ratio_rate{window}")
    return f"max({bad} / (1 - {select(f'weir:{objective}:objective')}))"


def unseen(query: str) -> tuple[str, ...]:
    """What of it is not all seen, because its series begin with their first value."""
    counted = _ZERO.sub("", query)
    return tuple(what for pattern, what in _LATE if pattern.search(counted))


def logs(*stages: str) -> str:
    """Log lines of Weir, as the Alloy configurations of deploy/ label them."""
    return " | ".join(('{service_name="weir", namespace=~"$namespace"}', "json", *stages))


def line(*first: str, **named: str) -> str:
    """A stage that makes one readable line of the fields that a log line has; the first one all have.

    request_id and trace_id end it, and become links.
    """
    begin, *others = first
    text = f"{{{{.{begin}}}}}" + "".join(_known(field) for field in others)
    text += "".join(_known(field, f"{name}=") for name, field in named.items())
    text += "".join(_known(name, f"{name}=") for name in ("request_id", "trace_id"))
    return f'line_format "{text}"'


def _known(field: str, name: str = "") -> str:
    return f"{{{{if .{field}}}}} {name}{{{{.{field}}}}}{{{{end}}}}"


_VARIABLE: Final = re.compile(r"\$\{(\w+)(?::\w+)?\}|\$(\w+)")
_USUAL: Final = {"__rate_interval": "1m", "__interval": "15s", "__range": "6h"}


def variables(text: str) -> set[str]:
    """The names of the variables in a query or link."""
    return {braced or plain for braced, plain in _VARIABLE.findall(text)}


def fill(query: str, values: Mapping[str, str] | None = None) -> str:
    """The query with `values` for its variables; "All" for those that are not named."""
    given = {**_USUAL, **(values or {})}
    return _VARIABLE.sub(lambda found: given.get(found[1] or found[2], ".*"), query)


def _offset(offset: str) -> str:
    return f" offset {offset}" if offset else ""
