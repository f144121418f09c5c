"""Latency: what callers wait for, and where an average request's time goes."""

from __future__ import annotations

from typing import Final

from dashboards import links
from dashboards.board import Board, Section
from dashboards.panels import (
    SECONDS,
    SHARE,
    TOKENS_PER_SECOND,
    Words,
    above,
    bargauge,
    below,
    column,
    heatmap,
    log_lines,
    stat,
    table,
    timeseries,
)
from dashboards.queries import (
    ATTEMPTS,
    GOOD,
    RANGE,
    RATE,
    REQUESTS,
    TPOC,
    TPOT,
    TTFC,
    TTFT,
    line,
    logs,
    mean,
    quantile,
    rate,
    ratio,
    whole,
    within,
)

LINKS: Final = (links.SLOW_TRACES, links.SLOW_LINES)
OBJECTIVE: Final = above(2.5, reason="the line is 2.5 s, within which the objective wants 95 %.")
LATE: Final = above(5, warn=2.5, reason="orange from 2.5 s, the objective; red from twice that.")
SLOW: Final = above(
    0.2, warn=0.1, reason="orange from 0.1 s a token, about as fast as people read; red: half of it."
)
READING: Final = above(0.1, reason="the line is 0.1 s a token, about as fast as people read.")


def waterfall(window: str) -> list[tuple[str, str]]:
    """The mean seconds of a request in each part of its way, in order; they add up to its duration."""
    requests = whole(rate(f"{REQUESTS}_count", window=window))
    none = f"0 * {requests}"
    queue = f"({rate('weir_queue_wait_seconds_sum', window=window)} or {none})"
    overhead = f"({rate('weir_overhead_seconds_sum', window=window)} or {none})"
    first = f"({whole(rate(f'{TTFC}_sum', window=window))} or {none})"
    duration = whole(rate(f"{REQUESTS}_sum", window=window))
    rest = f"clamp_min({duration} - {queue} - {overhead} - {first}, 0)"
    return [
        (ratio(queue, requests), "1 queue"),
        (ratio(overhead, requests), "2 Weir's overhead"),
        (ratio(first, requests), "3 upstream, to its first piece"),
        (ratio(rest, requests), "4 generation, failed attempts"),
    ]


def _percentiles(metric: str, *matchers: str) -> list[tuple[str, str]]:
    return [(quantile(q, metric, *matchers), f"p{q * 100:g}") for q in (0.5, 0.95, 0.99)]


_FIRST = [
    stat(
        "TTFT within 2.5 s",
        within(TTFT, "2.5", window=RANGE),
        Words(
            "The share of streams whose first token came within 2.5 s, over the time shown.",
            "95 % and more.",
            "look at the waterfall below for the part that grew.",
            "No streamed answers in this time.",
            "No streams",
        ),
        unit=SHARE,
        thresholds=below(
            0.9, good=0.95, reason="green from 95 %, the objective; red where twice as many are late."
        ),
        instant=True,
        width=4,
        links=LINKS,
    ),
    stat(
        "TTFT p50",
        quantile(0.5, TTFT, window=RANGE),
        Words(
            "The time to first token that half of the streams stayed below, over the time shown.",
            "what you know of the model; for most it is below a second.",
            "if p50 rises, all are slower: the upstream, or the queue. If only p95 does, look at long "
            "prompts and retries.",
            "No streamed answers in this time.",
            "No streams",
        ),
        unit=SECONDS,
        instant=True,
        thresholds=above(
            2.5, warn=1, reason="orange from 1 s, red from 2.5 s: then half of the streams miss it."
        ),
        width=4,
        links=LINKS,
    ),
    stat(
        "TTFT p95",
        quantile(0.95, TTFT, window=RANGE),
        Words(
            "The time to first token that 95 % of the streams stayed below, over the time shown. It is read "
            "from buckets, so it is as exact as their edges are near.",
            "below 2.5 s.",
            "look at the waterfall below, then at one of the slow traces.",
            "No streamed answers in this time.",
            "No streams",
        ),
        unit=SECONDS,
        instant=True,
        thresholds=LATE,
        width=4,
        links=LINKS,
    ),
    stat(
        "Time per output token p95",
        quantile(0.95, TPOT, window=RANGE),
        Words(
            "The mean time between the tokens of a stream after its first, which 95 % of the streams stayed "
            "below.",
            "below 0.1 s: people read no faster.",
            "generation is slow at the upstream: compare the models below, and see Upstreams for its limits.",
            "No streamed answers in this time.",
            "No streams",
        ),
        unit=SECONDS,
        instant=True,
        thresholds=SLOW,
        width=4,
        links=LINKS,
    ),
    stat(
        "Duration p95",
        quantile(0.95, REQUESTS, GOOD, window=RANGE),
        Words(
            "The time from arrival to the answer's end that 95 % of the good requests stayed below. Long "
            "answers take long: read it with the tokens in mind.",
            "what is usual for your answers.",
            "if time per token is as ever, answers became longer: Tokens has their lengths.",
            "No good answers in this time.",
            "No good answers",
        ),
        unit=SECONDS,
        instant=True,
        thresholds=above(
            120, warn=60, reason="orange from 60 s, where many clients and proxies give up; red from 120 s."
        ),
        width=4,
        links=LINKS,
    ),
    stat(
        "Weir's overhead p95",
        quantile(0.95, "weir_overhead_seconds", window=RANGE),
        Words(
            "Weir's own time with a request: all but the queue and the upstream.",
            "some milliseconds.",
            "look at the event loop's lag and the processor on Pods; add pods, or processors for them.",
            "No requests in this time.",
            "No requests",
        ),
        unit=SECONDS,
        instant=True,
        thresholds=above(
            0.1, warn=0.025, reason="orange from 25 ms, red from 100 ms: then people could notice."
        ),
        width=4,
        links=LINKS,
    ),
]

_WATERFALL = [
    bargauge(
        "Waterfall of an average request",
        waterfall(RANGE),
        Words(
            "Where the mean request's time went, over the time shown, from top to bottom: waiting for a "
            "place, Weir itself, the upstream until the first piece of a stream, and the rest: generation, "
            "attempts that failed, and pauses before the next one. The parts add up to the mean duration. "
            "Answers that are not streamed are in the last part as a whole. All providers and models: the "
            "queue and Weir itself know none.",
            "generation takes most, then the upstream; queue and overhead are hardly seen.",
            "queue: Pods, places are taken. Overhead: Pods, the loop's lag. First piece: Upstreams, the "
            "provider. The last part: Upstreams first, failed attempts by error, retry amplification; where "
            "nothing fails, it is longer answers, or a slower model.",
            "No requests in this time.",
            "No requests",
        ),
        unit=SECONDS,
        width=9,
    ),
    timeseries(
        "Where the time of a request goes",
        waterfall(RATE),
        Words(
            "The same parts over time, stacked: the upper edge is the mean duration of a request. All "
            "models.",
            "an even upper edge; no part that grows.",
            "the part that grows names the place to look: see the waterfall beside.",
            "No requests in this time.",
        ),
        unit=SECONDS,
        width=15,
        stacked=True,
        colors=(
            ("1 queue", "purple"),
            ("2 Weir's overhead", "red"),
            ("3 upstream, to its first piece", "orange"),
            ("4 generation, failed attempts", "green"),
        ),
    ),
]

_TTFT = [
    heatmap(
        "Time to first token",
        rate(f"{TTFT}_bucket", by=("le",)),
        Words(
            "How many streams a second had their first token in which time. Points are single requests with "
            "a trace: click one for its trace and its log lines.",
            "one dark band below 2.5 s. Two bands are two models, or cached and uncached prompts.",
            "a second band far above: choose models one by one above.",
            "No streamed answers yet. No points: no sampled traces, or Prometheus has no exemplar storage.",
        ),
        unit=SECONDS,
        links=LINKS,
    ),
    timeseries(
        "Time to first token, percentiles",
        _percentiles(TTFT),
        Words(
            "From a request's arrival to the first piece of its streamed answer.",
            "p95 below 2.5 s, and p50 even.",
            "p50 and p95 together: the upstream or the queue. p99 alone: retries, see Upstreams.",
            "No streamed answers yet.",
        ),
        unit=SECONDS,
        exemplars=True,
        thresholds=OBJECTIVE,
        links=LINKS,
    ),
    timeseries(
        "Time to first token p95 by model",
        [(quantile(0.95, TTFT, by=("gen_ai_request_model",)), "{{gen_ai_request_model}}")],
        Words(
            "The same by the model that was asked for.",
            "each below 2.5 s.",
            "one model alone: its provider, or longer prompts to it. All: the queue, or the network.",
            "No streamed answers yet.",
        ),
        unit=SECONDS,
        exemplars=True,
        thresholds=OBJECTIVE,
        links=LINKS,
    ),
    timeseries(
        "First piece from the upstream, p95 by provider",
        [(quantile(0.95, TTFC, by=("gen_ai_provider_name",)), "{{gen_ai_provider_name}}")],
        Words(
            "From the beginning of an attempt at an upstream to the first piece of its stream, without the "
            "queue, Weir and earlier attempts.",
            "near the time to first token that callers see.",
            "if it is well below that, the rest is spent before: queue, retries, or Weir.",
            "No streamed answers yet.",
        ),
        unit=SECONDS,
        exemplars=True,
        thresholds=OBJECTIVE,
        links=LINKS,
    ),
]

_PACE = [
    heatmap(
        "Time per output token",
        rate(f"{TPOT}_bucket", by=("le",)),
        Words(
            "How many streams a second had which mean time between tokens.",
            "a dark band below 0.1 s.",
            "a band that climbs: the provider is loaded, or a slower model stands in: Upstreams, attempts "
            "by kind.",
            "No streamed answers yet.",
        ),
        unit=SECONDS,
        width=8,
        links=LINKS,
    ),
    timeseries(
        "Time per output token, percentiles",
        _percentiles(TPOT),
        Words(
            "The mean time between the tokens of a stream after its first.",
            "p95 below 0.1 s.",
            "compare with the upstream's own time per piece beside: if only this one grows, callers read "
            "slowly.",
            "No streamed answers yet.",
        ),
        unit=SECONDS,
        width=8,
        exemplars=True,
        thresholds=READING,
        links=LINKS,
    ),
    timeseries(
        "Time per piece from the upstream, p95 by provider",
        [(quantile(0.95, TPOC, by=("gen_ai_provider_name",)), "{{gen_ai_provider_name}}")],
        Words(
            "The mean time between the pieces of an upstream's stream. A piece is a token with most "
            "providers, several with some.",
            "even, below 0.1 s.",
            "one provider alone: it is loaded. All: this cluster's network or the pods' processor.",
            "No streamed answers yet.",
        ),
        unit=SECONDS,
        width=8,
        exemplars=True,
        thresholds=READING,
        links=LINKS,
    ),
    timeseries(
        "Pace of the streams",
        [(ratio("1", mean(TPOT, by=("gen_ai_request_model",))), "{{gen_ai_request_model}}")],
        Words(
            "Tokens a second within one stream, by model: one over the mean time per token.",
            "more than 10: people read no faster.",
            "a fall of one model: its provider. Of all: see Pods.",
            "No streamed answers yet.",
        ),
        unit=TOKENS_PER_SECOND,
        thresholds=below(10, reason="the line is 10 tokens a second, about as fast as people read."),
    ),
    timeseries(
        "Duration, percentiles",
        _percentiles(REQUESTS, GOOD),
        Words(
            "From a request's arrival to the end of its answer, of good answers.",
            "even; long answers take long.",
            "compare with the time per token: if that is as ever, answers became longer.",
            "No good answers yet.",
        ),
        unit=SECONDS,
        exemplars=True,
        thresholds=above(60, reason="the line is 60 s, where many clients and proxies give up."),
        links=LINKS,
    ),
]

_WHERE = [
    heatmap(
        "Duration",
        rate(f"{REQUESTS}_bucket", GOOD, by=("le",)),
        Words(
            "How many good answers a second took which time, from arrival to end.",
            "bands where your kinds of request are.",
            "a new band above: click a point for its trace.",
            "No good answers yet.",
        ),
        unit=SECONDS,
        width=8,
        links=LINKS,
    ),
    heatmap(
        "Wait in the queue",
        rate("weir_queue_wait_seconds_bucket", by=("le",)),
        Words(
            "How many requests a second waited how long for a place.",
            "all of it in the lowest row.",
            "places are taken: Pods has them, docs/overload.md what to set; add pods.",
            "No requests yet.",
        ),
        unit=SECONDS,
        width=8,
    ),
    timeseries(
        "Weir's overhead p95 by route",
        [(quantile(0.95, "weir_overhead_seconds", by=("route",)), "{{route}}")],
        Words(
            "Weir's own time with a request, without the queue and the upstream.",
            "some milliseconds; /api routes take more, for they load conversations.",
            "rising with the load: the processor, see Pods. Rising alone: Redis, see Pods, degraded "
            "features.",
            "No requests yet.",
        ),
        unit=SECONDS,
        width=8,
        exemplars=True,
        thresholds=above(0.1, reason="the line is 0.1 s: more could be noticed."),
        links=LINKS,
    ),
    table(
        "Models",
        [
            column(
                quantile(q, metric, *more, by=("gen_ai_request_model",), window=RANGE), name, SECONDS, colours
            )
            for q, metric, more, name, colours in (
                (0.5, TTFT, (), "TTFT p50", None),
                (0.95, TTFT, (), "TTFT p95", LATE),
                (0.99, TTFT, (), "TTFT p99", None),
                (0.95, TPOT, (), "Per token p95", SLOW),
                (0.95, REQUESTS, (GOOD,), "Duration p95", None),
                (0.95, ATTEMPTS, (GOOD,), "Attempt p95", None),
            )
        ],
        [("gen_ai_request_model", "Model")],
        Words(
            "Each model's times, over the time shown. Attempt is one call of an upstream; Duration also has "
            "the queue, Weir, and attempts that failed before.",
            "TTFT p95 below 2.5 s, 0.1 s a token; Duration near Attempt.",
            "Duration well above Attempt: retries or the queue.",
            "No answers in this time.",
        ),
        sort="TTFT p95",
        width=24,
        height=7,
    ),
    log_lines(
        "Slow requests",
        logs(
            'event="request"',
            'slow="true"',
            line(
                "outcome",
                seconds="duration_seconds",
                ttft="time_to_first_token_seconds",
                queue="queue_seconds",
                attempts="attempts",
                output_tokens="output_tokens",
                model="model",
                upstream="upstream",
            ),
        ),
        Words(
            "The log line of each request that took longer than LOG_SLOW_REQUEST_SECONDS, the newest first. "
            "trace_id leads to its trace.",
            "long answers alone: output_tokens tells.",
            "few tokens and much time: attempts says whether it was tried again, queue whether it waited.",
            "No request took that long, or Loki has no logs of Weir: docs/dashboards.md.",
        ),
    ),
]

BOARD: Final = Board(
    uid="weir-latency",
    title="Weir / Latency",
    description="What callers wait for, and where the time goes.",
    sections=(
        Section("", [*_FIRST, *_WATERFALL]),
        Section("Time to first token", _TTFT),
        Section("Pace and duration", _PACE),
        Section("Where", _WHERE),
    ),
)
