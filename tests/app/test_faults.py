"""Each fault that an upstream can have: what the caller sees, and what the books say of it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest
import structlog

from service.config import FileConfig
from service.domain import Outcome, UsageSource
from tests import faults
from tests.fakes.upstream import COMPLETION_TOKENS, PROMPT_TOKENS, FakeUpstream
from tests.faults import CASES, SECRET, Fault, Seen, Sees, Surroundings, Times, samples
from tests.running import RunningWeir, configuration

TIMES = Times(first_byte=2.0, idle=0.5, answer=6.0, retries=1)
"""A slow machine must answer well within `first_byte`; a Retry-After of 7 must be too long for `answer`."""
IDS = [faults.name_of(fault, stream=stream) for fault, stream in CASES]
INSIDE = re.compile(r"127\.0\.0\.1|localhost|\.invalid|:\d{4,5}|sk-|traceback", re.IGNORECASE)
REQUESTS = 1_100
PRICE = {"input": 1_000.0, "output": 2_000.0}


@pytest.fixture(scope="module")
def surroundings() -> Iterator[Surroundings]:
    with Surroundings() as around:
        yield around
        assert around.fake.errors == []


@pytest.fixture(scope="module")
def all_seen(surroundings: Surroundings) -> dict[str, tuple[Seen, int]]:
    """What was seen of each case, and its log lines. Several at a time: most of it is waiting."""

    def observe(case: tuple[Fault, bool]) -> Seen:
        fault, stream = case
        return faults.observe(surroundings, fault, TIMES, stream=stream)

    with structlog.testing.capture_logs() as lines, ThreadPoolExecutor(6) as pool:
        seen = list(pool.map(observe, CASES))
    told = Counter(line["model"] for line in lines if line["event"] == "request")
    return {name: (each, told[name]) for name, each in zip(IDS, seen, strict=True)}


@pytest.mark.parametrize(("fault", "stream"), CASES, ids=IDS)
def test_each_fault_is_told_to_the_caller_and_to_the_books(
    all_seen: dict[str, tuple[Seen, int]], fault: Fault, stream: bool
) -> None:
    seen, lines = all_seen[faults.name_of(fault, stream=stream)]
    wanted = faults.expected(fault, TIMES, stream=stream)
    assert seen.sees == wanted
    # The caller gets all of an answer, or is told that it did not.
    if wanted.code is None:
        assert faults.is_whole(seen.text, fault)
    else:
        assert seen.message
        assert not INSIDE.search(seen.message), seen.message
        assert SECRET not in seen.message
    # One request, one record, one line, one count; and each attempt is counted once.
    assert (lines, seen.records, seen.requests) == (1, 1, {wanted.outcome.value: 1})
    assert sum(seen.attempts.values()) == seen.record.attempts


@pytest.mark.parametrize(("fault", "stream"), CASES, ids=IDS)
def test_the_providers_own_request_id_is_told_where_it_gave_one(
    all_seen: dict[str, tuple[Seen, int]], fault: Fault, stream: bool
) -> None:
    seen, _ = all_seen[faults.name_of(fault, stream=stream)]
    place = faults.places_of(fault, stream=stream)[-1]
    silent = place.upstream not in ("fake", "slow") or place.model.startswith("flaky-reset")
    # Of a whole answer that was not whole in time nothing is known; a stream has told it with its head.
    late = seen.sees.code == "api_timeout" and seen.sees.status == 504 and place.model != "status-504"
    if silent or (late and (not stream or place.model == "hang")):
        assert seen.upstream_request_id is None
    else:
        assert str(seen.upstream_request_id).startswith("req_fake_")
        assert seen.record.upstream_request_id == seen.upstream_request_id


def test_a_retry_after_that_is_short_is_waited_for(all_seen: dict[str, tuple[Seen, int]]) -> None:
    for name in ("429-once,-Retry-After-1", "429-once,-Retry-After-1,-streamed"):
        assert all_seen[name][0].seconds >= 1.0


def test_usage_that_comes_twice_is_counted_once(all_seen: dict[str, tuple[Seen, int]]) -> None:
    usage = all_seen["duplicated-usage,-streamed"][0].record.usage
    assert usage is not None
    assert (usage.input_tokens, usage.output_tokens) == (PROMPT_TOKENS, COMPLETION_TOKENS)


def test_the_sums_agree_over_all_faults(surroundings: Surroundings) -> None:
    """Requests in the metrics, records of the ledger and log lines; so do attempts, tokens and dollars."""
    models = {name: faults.places_of(f, stream=s) for name, (f, s) in zip(IDS, CASES, strict=True)}
    with structlog.testing.capture_logs() as captured, surroundings.weir(models, TIMES, PRICE) as weir:

        def ask(case: tuple[str, tuple[Fault, bool]]) -> None:
            name, (_, stream) = case
            faults.ask(weir, name, stream=stream)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(ask, zip(IDS, CASES, strict=True)))
        records = weir.records(len(CASES))
        page = httpx2.get(f"{weir.url}/api/v1/usage", params={"group_by": "model"}, timeout=20)
    lines = [line for line in captured if line["event"] == "request" and "model" in line]
    requests = dict(samples(weir, "weir_requests_total", "gen_ai_request_model", "outcome"))
    attempts = sum(dict(samples(weir, "weir_upstream_attempts_total", "kind")).values())
    dollars = dict(samples(weir, "weir_cost_usd_total", "gen_ai_request_model"))
    tokens = {
        of: dict(samples(weir, f"gen_ai_client_inference_usage_{of}_total", "gen_ai_request_model"))
        for of in ("input_tokens", "output_tokens")
    }
    assert len(records) == len(CASES)
    of_records = Counter(f"{record.request_model} {record.outcome.value}" for record in records)
    of_lines = Counter(f"{line['model']} {line['outcome']}" for line in lines)
    assert dict(requests) == dict(of_records) == dict(of_lines)
    assert attempts == sum(r.attempts for r in records) == sum(line["attempts"] for line in lines)
    for of, counted in tokens.items():
        used = {r.request_model: getattr(r.usage, of, 0) for r in records}
        assert counted == {model: number for model, number in used.items() if number}
        assert counted == {line["model"]: line[of] for line in lines if line[of]}
    paid = {r.request_model: r.cost.usd for r in records if r.cost.usd}
    assert dollars == paid == {line["model"]: line["cost_usd"] for line in lines if line.get("cost_usd")}
    assert len(paid) > len(CASES) / 4, "answers that were cut cost something too"
    totals = page.json()["totals"]
    assert totals["requests"] == len(CASES)
    assert totals["cost_usd"] == pytest.approx(sum(paid.values()), abs=1e-9)
    assert totals["input_tokens"] == sum(tokens["input_tokens"].values())
    assert totals["output_tokens"] == sum(tokens["output_tokens"].values())


# -- deadlines -----------------------------------------------------------------------------------

TIMEOUTS_OF_UPSTREAMS = ("connect_timeout", "first_byte_timeout", "idle_timeout")
LATE = Sees(
    504, "api_timeout", "InternalServerError", "true", None, 1, Outcome.TIMEOUT, UsageSource.ESTIMATED
)
OVER = LATE._replace(code="request_deadline_exceeded", again="false")
IN_STREAM = LATE._replace(status=200, raises="APIError", again=None)


@pytest.mark.parametrize(
    ("model", "stream", "deadline", "header", "wanted"),
    [
        ("m", False, {"connect_timeout": 0.3}, None, LATE._replace(usage=None)),
        ("hang", False, {"first_byte_timeout": 0.3}, None, LATE),
        ("hang", True, {"first_byte_timeout": 0.3}, None, LATE),
        ("hang", False, {"openai_timeout": 0.3}, None, LATE),
        ("stall", True, {"idle_timeout": 0.3}, None, IN_STREAM),
        ("stall", True, {"stream_idle_timeout": 0.3}, None, IN_STREAM),
        ("hang", False, {"request_timeout": 0.3}, None, OVER),
        ("hang", False, {}, "0.3", OVER),
        ("ticks-1000-20", True, {"request_timeout": 0.3}, None, IN_STREAM._replace(code=OVER.code)),
        ("ticks-1000-20", True, {}, "0.3", IN_STREAM._replace(code=OVER.code)),
        ("hang", False, {"request_timeout": 30.0}, "0.3", OVER),
        ("hang", False, {"request_timeout": 0.3}, "30", OVER),
    ],
)
def test_each_deadline_ends_what_it_is_for_and_says_so(
    upstream: FakeUpstream,
    model: str,
    stream: bool,
    deadline: dict[str, Any],
    header: str | None,
    wanted: Sees,
) -> None:
    of_upstream = {name: seconds for name, seconds in deadline.items() if name in TIMEOUTS_OF_UPSTREAMS}
    headers = {"X-Request-Timeout": header} if header else {}
    with faults.full_backlog() as nowhere:
        place = {"name": "fake", "base_url": nowhere if "connect_timeout" in deadline else upstream.base_url}
        file = FileConfig.model_validate({"upstreams": [place | of_upstream]})
        settings: dict[str, Any] = {k: v for k, v in deadline.items() if k not in of_upstream}
        with RunningWeir(configuration(file=file, openai_max_retries=0, **settings)) as weir:
            asked = faults.ask(weir, model, stream=stream, extra_headers=headers)
            record = weir.records(1)[0]
    assert (asked.status, asked.code, asked.raises) == (wanted.status, wanted.code, wanted.raises)
    assert asked.headers.get("x-should-retry") == wanted.again
    assert (record.outcome, record.error_code) == (wanted.outcome, wanted.code)
    assert (record.attempts, record.usage and record.usage.source) == (1, wanted.usage)


def test_callers_that_allow_too_little_time_open_no_circuit(upstream: FakeUpstream) -> None:
    with RunningWeir(configuration(openai_base_url=upstream.base_url, openai_max_retries=0)) as weir:
        for stream in (False, True) * 5:
            body = {"model": "ticks-100-20", "messages": faults.HELLO, "stream": stream}
            headers = {"X-Request-Timeout": "0.1"}
            httpx2.post(f"{weir.url}/v1/chat/completions", json=body, headers=headers, timeout=20)
        for _, condition in weir.parts.conditions.items():
            assert condition.breaker.admits


# -- an outage is not amplified ------------------------------------------------------------------


@pytest.mark.parametrize("one_circuit", [True, False], ids=["one-circuit", "no-circuit"])
def test_an_outage_is_not_amplified(upstream: FakeUpstream, one_circuit: bool) -> None:
    out = faults.outage(upstream, REQUESTS, second=False, one_circuit=one_circuit)
    assert out.good == 0
    assert out.failing == len(upstream.calls)
    assert out.failing <= REQUESTS * 1.1
    if one_circuit:
        assert out.failing < REQUESTS * 0.5, "the circuit opened"
    else:
        assert out.failing > REQUESTS, "there were retries"


@pytest.mark.parametrize("one_circuit", [True, False], ids=["one-circuit", "no-circuit"])
def test_what_fails_is_done_elsewhere_and_not_twice_at_one_place(
    upstream: FakeUpstream, one_circuit: bool
) -> None:
    out = faults.outage(upstream, REQUESTS, second=True, one_circuit=one_circuit)
    assert (out.good, out.well) == (REQUESTS, REQUESTS)
    assert out.failing + out.well == len(upstream.calls)
    assert out.failing <= REQUESTS * 1.1
    if one_circuit:
        assert out.failing + out.well <= REQUESTS * 1.1, "the circuit opened"
