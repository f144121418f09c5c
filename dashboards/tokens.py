"""Tokens and cache: how much is asked and answered, and what need not be paid twice."""

from __future__ import annotations

from typing import Final

from dashboards.board import Board, Section
from dashboards.panels import (
    NUMBER,
    PER_SECOND,
    REQUESTS_PER_SECOND,
    SHARE,
    TOKENS_PER_SECOND,
    USD,
    Words,
    column,
    heatmap,
    stat,
    table,
    timeseries,
)
from dashboards.queries import RANGE, USAGE, increase, quantile, rate, ratio, share

INPUT: Final = f"{USAGE}input_tokens_total"
OUTPUT: Final = f"{USAGE}output_tokens_total"
CACHED: Final = f"{USAGE}cache_read_input_tokens_total"
WRITTEN: Final = f"{USAGE}cache_write_input_tokens_total"
REASONING: Final = f"{USAGE}reasoning_output_tokens_total"
PER_QUESTION: Final = "gen_ai_client_inference_operation_input_tokens"
PER_ANSWER: Final = "gen_ai_client_inference_operation_output_tokens"
CACHE: Final = "weir_cache_requests_total"
ASKED: Final = 'result=~"hit|miss"'
MODEL: Final = "gen_ai_request_model"

_FIRST = [
    stat(
        "Input tokens",
        rate(INPUT),
        Words(
            "Tokens of questions a second, those that the provider had cached among them.",
            "the course of the requests.",
            "if it grows faster than the requests, prompts became longer: see below.",
            "No answer with a count of tokens yet.",
            "No tokens yet",
        ),
        unit=TOKENS_PER_SECOND,
    ),
    stat(
        "Output tokens",
        rate(OUTPUT),
        Words(
            "Tokens of answers a second, reasoning among them.",
            "the course of the requests.",
            "if it falls while requests do not, answers became shorter or slower: Latency.",
            "No answer with a count of tokens yet.",
            "No tokens yet",
        ),
        unit=TOKENS_PER_SECOND,
    ),
    stat(
        "Cached of input",
        share(increase(CACHED), increase(INPUT)),
        Words(
            "The share of input tokens that the providers read from their own caches, at a lower price. "
            "They are part of the input tokens, not beside them.",
            "high where prompts begin alike: a long system prompt, conversations.",
            "put what is always the same at the beginning of prompts; see which model has none below.",
            "No answer with a count of tokens in this time.",
            "No tokens",
        ),
        unit=SHARE,
        instant=True,
    ),
    stat(
        "Reasoning of output",
        share(increase(REASONING), increase(OUTPUT)),
        Words(
            "The share of output tokens that models thought with, which callers pay for and do not see.",
            "what the chosen reasoning effort explains.",
            "ask for less effort where it is not needed: it is paid as output.",
            "No answer with a count of tokens in this time.",
            "No tokens",
        ),
        unit=SHARE,
        instant=True,
    ),
    stat(
        "Weir's cache hits",
        share(increase(CACHE, 'result="hit"'), increase(CACHE, ASKED)),
        Words(
            "The share of requests that Weir answered from its own cache, of those that it looked up there. "
            "What may not be cached at all (bypass) is left out.",
            "what your applications' repetitions allow; a few percent pay already.",
            "docs/cache.md says what is cached: by default temperature 0 only.",
            "No request looked into the cache: CACHE_TTL is 0, or none had temperature 0.",
            "No lookups",
        ),
        unit=SHARE,
        instant=True,
    ),
    stat(
        "Saved by the cache",
        increase("weir_cache_saved_usd_total"),
        Words(
            "What the answers from Weir's cache had cost when they were first given, over the time shown.",
            "more than nothing.",
            "see the hit ratio.",
            "No answer from the cache had a price yet.",
            "Nothing saved yet",
        ),
        unit=USD,
        instant=True,
    ),
    stat(
        "Question size p95",
        quantile(0.95, PER_QUESTION, window=RANGE),
        Words(
            "The input tokens that 95 % of the good requests stayed below. Buckets are four times apart: "
            "read it as a size, not as a number.",
            "what your applications send on purpose.",
            "long conversations or documents grew: docs/limits.md has limits by tokens.",
            "No good answer with a count of tokens in this time.",
            "No tokens",
        ),
        unit=NUMBER,
        instant=True,
    ),
    stat(
        "Answer size p95",
        quantile(0.95, PER_ANSWER, window=RANGE),
        Words(
            "The output tokens that 95 % of the good requests stayed below. Buckets are four times apart.",
            "what your applications ask for.",
            "set max_tokens where answers run on.",
            "No good answer with a count of tokens in this time.",
            "No tokens",
        ),
        unit=NUMBER,
        instant=True,
    ),
]

_FLOW = [
    timeseries(
        "Tokens by kind",
        [
            (rate(INPUT), "input"),
            (rate(CACHED), "of input: read from the provider's cache"),
            (rate(WRITTEN), "of input: written to the provider's cache"),
            (rate(OUTPUT), "output"),
            (rate(REASONING), "of output: reasoning"),
        ],
        Words(
            "Tokens a second. Cached, written and reasoning tokens are parts of the totals, so they are "
            "lines and not a stack: never add them.",
            "cached near input where prompts begin alike; reasoning well below output.",
            "cached that falls to nothing after a deploy: the beginning of a prompt has changed.",
            "No answer with a count of tokens yet.",
        ),
        unit=TOKENS_PER_SECOND,
    ),
    timeseries(
        "Tokens by model",
        [
            (f"{rate(INPUT, by=(MODEL,))} + {rate(OUTPUT, by=(MODEL,))}", "{{gen_ai_request_model}}"),
        ],
        Words(
            "Input and output tokens a second, by the model that was asked for.",
            "the models that you meant to be used.",
            "choose the model above, and look at its cost.",
            "No answer with a count of tokens yet.",
        ),
        unit=TOKENS_PER_SECOND,
        stacked=True,
    ),
]

_PROVIDERS = [
    timeseries(
        "Cached share of input by model",
        [(share(rate(CACHED, by=(MODEL,)), rate(INPUT, by=(MODEL,))), "{{gen_ai_request_model}}")],
        Words(
            "The share of input tokens that the provider read from its own cache.",
            "even and high for models with long common beginnings.",
            "a fall: prompts begin differently, or requests go to another upstream, whose cache is cold.",
            "No answer with a count of tokens yet.",
        ),
        unit=SHARE,
        width=8,
        maximum=1,
    ),
    timeseries(
        "Reasoning share of output by model",
        [(share(rate(REASONING, by=(MODEL,)), rate(OUTPUT, by=(MODEL,))), "{{gen_ai_request_model}}")],
        Words(
            "The share of output tokens that models thought with.",
            "what the chosen effort explains; 0 for models that do not reason.",
            "near 1: answers are cut by max_tokens before they begin.",
            "No answer with a count of tokens yet.",
        ),
        unit=SHARE,
        width=8,
        maximum=1,
    ),
    timeseries(
        "Tokens by modality",
        [
            (
                f"{rate(INPUT, by=('gen_ai_token_modality',))}",
                "input, {{gen_ai_token_modality}}",
            ),
            (
                f"{rate(OUTPUT, by=('gen_ai_token_modality',))}",
                "output, {{gen_ai_token_modality}}",
            ),
        ],
        Words(
            "Tokens a second of text, audio and images, as far as the provider tells them apart.",
            "text, unless you use others.",
            "audio and images cost many times as much: Cost.",
            "No answer with a count of tokens yet.",
        ),
        unit=TOKENS_PER_SECOND,
        width=8,
    ),
    heatmap(
        "Tokens of questions",
        rate(f"{PER_QUESTION}_bucket", by=("le",)),
        Words(
            "How many requests a second had questions of which size. Buckets are four times apart.",
            "bands where your applications' prompts are.",
            "a new band above: somebody sends whole documents or endless conversations.",
            "No good answer with a count of tokens yet.",
        ),
        unit=NUMBER,
        width=8,
    ),
    heatmap(
        "Tokens of answers",
        rate(f"{PER_ANSWER}_bucket", by=("le",)),
        Words(
            "How many requests a second had answers of which size. Buckets are four times apart.",
            "bands where your applications' answers are.",
            "a band at the models' limit: answers run on until they are cut.",
            "No good answer with a count of tokens yet.",
        ),
        unit=NUMBER,
        width=8,
    ),
    timeseries(
        "Tokens per answer by model",
        [
            (quantile(0.5, PER_ANSWER, by=(MODEL,)), "p50 {{gen_ai_request_model}}"),
            (quantile(0.95, PER_ANSWER, by=(MODEL,)), "p95 {{gen_ai_request_model}}"),
        ],
        Words(
            "The output tokens that half, and 95 %, of the good requests stayed below.",
            "even.",
            "longer answers cost more and take longer: the prompt, or the model behind its name, has "
            "changed.",
            "No good answer with a count of tokens yet.",
        ),
        unit=NUMBER,
        width=8,
    ),
]

_CACHE = [
    timeseries(
        "Requests by what the cache was to them",
        [(rate(CACHE, by=("result",)), "{{result}}")],
        Words(
            "Requests a second: answered by Weir's cache (hit), looked up and not found (miss), or not to "
            "be cached (bypass).",
            "hits, where callers repeat themselves.",
            "much bypass: the requests' temperature, or Cache-Control of their callers; docs/cache.md.",
            "The cache is off (CACHE_TTL=0), or there was no request yet.",
        ),
        unit=REQUESTS_PER_SECOND,
        width=8,
        stacked=True,
        colors=(("hit", "green"), ("miss", "orange"), ("bypass", "blue")),
    ),
    timeseries(
        "Hit ratio",
        [(share(rate(CACHE, 'result="hit"'), rate(CACHE, ASKED)), "hits of lookups")],
        Words(
            "The share of lookups that found an answer.",
            "even; lower for a while after CACHE_TTL, or when Redis was away.",
            "a fall to 0: Redis is away (Pods, degraded features), or prompts carry a time or an id.",
            "No request looked into the cache yet.",
        ),
        unit=SHARE,
        width=8,
        maximum=1,
    ),
    timeseries(
        "Saved by the cache, dollars per hour",
        [(f"{rate('weir_cache_saved_usd_total', by=(MODEL,))} * 3600", "{{gen_ai_request_model}}")],
        Words(
            "What the answers from Weir's cache had cost when they were first given, as dollars an hour.",
            "the more the better.",
            "see the hit ratio.",
            "No answer from the cache had a price yet.",
        ),
        unit=USD,
        width=8,
        stacked=True,
    ),
    table(
        "Models",
        [
            column(increase(INPUT, by=(MODEL,)), "Input", NUMBER),
            column(share(increase(CACHED, by=(MODEL,)), increase(INPUT, by=(MODEL,))), "Cached", SHARE),
            column(increase(OUTPUT, by=(MODEL,)), "Output", NUMBER),
            column(
                share(increase(REASONING, by=(MODEL,)), increase(OUTPUT, by=(MODEL,))), "Reasoning", SHARE
            ),
            column(ratio(increase(INPUT, by=(MODEL,)), increase(OUTPUT, by=(MODEL,))), "In per out", NUMBER),
        ],
        [(MODEL, "Model")],
        Words(
            "Each model's tokens over the time shown; Cached is a share of Input, Reasoning one of Output.",
            "models as you expect them.",
            "much Input and little Cached: worth a look at how its prompts begin.",
            "No answer with a count of tokens in this time.",
        ),
        sort="Input",
        width=16,
        height=7,
    ),
    timeseries(
        "Streams and whole answers",
        [
            (rate("weir_streams_total"), "streams begun"),
            (rate("weir_requests_total", 'outcome="success"'), "good answers of all kinds"),
        ],
        Words(
            "Streams that had begun, beside all good answers, a second.",
            "the share of streaming that you expect.",
            "good answers without tokens above: a provider that counts none, then they are estimated.",
            "No answers yet.",
        ),
        unit=PER_SECOND,
        width=8,
        height=7,
    ),
]

BOARD: Final = Board(
    uid="weir-tokens",
    title="Weir / Tokens and cache",
    description="How much is asked and answered, and what need not be paid twice.",
    sections=(
        Section("", [*_FIRST, *_FLOW]),
        Section("Cached, reasoning, sizes", _PROVIDERS),
        Section("Weir's cache", _CACHE),
    ),
)
