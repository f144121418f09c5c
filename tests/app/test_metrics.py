"""What a whole Weir measures: each attempt, each stream, each wait; and sums that agree with the ledger."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from service.config import FileConfig
from service.domain import Outcome, RequestRecord
from service.telemetry import exposition
from tests.fakes.upstream import FakeUpstream
from tests.running import RunningWeir, configuration

CLIENT = "gen_ai_client_inference"
ROUTE = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello?"}]


@pytest.fixture
def upstream() -> Iterator[FakeUpstream]:
    with FakeUpstream() as fake:
        yield fake


def weir_with(upstream: FakeUpstream, **settings: Any) -> RunningWeir:
    return RunningWeir(
        configuration(
            openai_base_url=upstream.base_url, cache_ttl=0.0, **{"openai_max_retries": 0} | settings
        )
    )


def ask(
    weir: RunningWeir, model: str = "good", *, stream: bool = False, timeout: float = 20, **more: Any
) -> httpx2.Response:
    body = {"model": model, "messages": HELLO, "stream": stream}
    return httpx2.post(f"{weir.url}{ROUTE}", json=body, timeout=timeout, **more)


def samples(weir: RunningWeir, name: str, *by: str) -> dict[tuple[str, ...], float]:
    """Sums of a sample by the values of these labels."""
    found: defaultdict[tuple[str, ...], float] = defaultdict(float)
    for family in weir.registry.collect():
        for sample in family.samples if name.startswith(family.name) else ():
            if sample.name == name and sample.value:
                found[tuple(sample.labels[label] for label in by)] += sample.value
    return dict(found)


def attempts(weir: RunningWeir) -> dict[tuple[str, ...], float]:
    return samples(weir, "weir_upstream_attempts_total", "kind", "outcome")


def total(weir: RunningWeir, name: str) -> float:
    return samples(weir, name).get((), 0.0)


def until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def waits_of(record: RequestRecord) -> float:
    return record.upstream_seconds + (record.queue_seconds or 0.0) + (record.overhead_seconds or 0.0)


# -- attempts and streams ------------------------------------------------------------------------


def test_a_whole_answer_is_one_attempt_with_its_duration(upstream: FakeUpstream) -> None:
    with weir_with(upstream) as weir:
        ask(weir)
        (record,) = weir.records()
        name = f"{CLIENT}_duration_seconds"
        assert samples(weir, f"{name}_count", "gen_ai_response_model", "error_type") == {("good", ""): 1}
        assert 0 < total(weir, f"{name}_sum") <= record.duration_seconds
        assert total(weir, f"{CLIENT}_time_to_first_chunk_seconds_count") == 0
        assert total(weir, "weir_streams_total") == 0


def test_a_stream_is_measured_to_its_end(upstream: FakeUpstream) -> None:
    with weir_with(upstream) as weir:
        ask(weir, "ticks-5-20", stream=True)
        (record,) = weir.records()
        assert total(weir, f"{CLIENT}_duration_seconds_count") == 1
        first = total(weir, f"{CLIENT}_time_to_first_chunk_seconds_sum")
        whole = total(weir, f"{CLIENT}_duration_seconds_sum")
        chunks = f"{CLIENT}_time_per_output_chunk_seconds"
        assert 0 < first < whole <= record.duration_seconds
        assert total(weir, f"{chunks}_count") >= 5
        assert 0 < total(weir, f"{chunks}_sum") <= whole - first
        names = samples(weir, f"{chunks}_count", "gen_ai_request_model", "gen_ai_response_model")
        assert list(names) == [("ticks-5-20", "ticks-5-20")]
        assert samples(weir, "weir_streams_total", "outcome") == {("success",): 1}
        assert record.overhead_seconds is not None
        assert record.overhead_seconds <= record.duration_seconds - whole + 0.001, "no part of the stream"


@pytest.mark.parametrize(
    ("model", "outcome"),
    [("drop", "stream_truncated"), ("error-event", "upstream_error"), ("stall", "timeout")],
)
def test_a_stream_that_broke_says_how(upstream: FakeUpstream, model: str, outcome: str) -> None:
    with weir_with(upstream, stream_idle_timeout=0.2) as weir:
        ask(weir, model, stream=True)
        (record,) = weir.records()
        assert record.outcome.value == outcome
        assert samples(weir, "weir_streams_total", "outcome") == {(outcome,): 1}
        durations = samples(weir, f"{CLIENT}_duration_seconds_count", "error_type")
        assert durations == {(record.error_code,): 1}
        assert samples(weir, "weir_upstream_attempts_total", "outcome") == {("success",): 1}, "it began well"


def test_a_stream_that_never_began_is_none(upstream: FakeUpstream) -> None:
    with weir_with(upstream) as weir:
        ask(weir, "error-first", stream=True)
        weir.records()
        assert total(weir, "weir_streams_total") == 0
        assert total(weir, f"{CLIENT}_time_to_first_chunk_seconds_count") == 0
        durations = samples(weir, f"{CLIENT}_duration_seconds_count", "error_type")
        assert durations == {("openai_service_error",): 1}


def test_a_408_of_the_upstream_is_a_timeout_in_every_book(upstream: FakeUpstream) -> None:
    with weir_with(upstream) as weir:
        ask(weir, "status-408")
        (record,) = weir.records()
        assert record.outcome is Outcome.TIMEOUT
        assert samples(weir, "weir_upstream_attempts_total", "outcome") == {("timeout",): 1}
        assert samples(weir, "weir_requests_total", "outcome") == {("timeout",): 1}


def test_an_answer_from_the_cache_is_no_attempt_and_no_stream_of_an_upstream(upstream: FakeUpstream) -> None:
    body = {"model": "good", "messages": HELLO, "temperature": 0, "stream": True}
    with RunningWeir(configuration(openai_base_url=upstream.base_url)) as weir:
        for count in (1, 2):
            httpx2.post(f"{weir.url}{ROUTE}", json=body, timeout=20)
            weir.records(count)
        assert samples(weir, "weir_cache_requests_total", "result") == {("miss",): 1, ("hit",): 1}
        assert total(weir, "weir_requests_total") == 2
        assert total(weir, "weir_streams_total") == 1
        assert total(weir, "gen_ai_server_time_to_first_token_seconds_count") == 1
        assert total(weir, f"{CLIENT}_operation_input_tokens_count") == 1
        assert total(weir, f"{CLIENT}_duration_seconds_count") == 1


# -- attempts that nobody waited for -------------------------------------------------------------


def test_an_attempt_that_its_caller_left_is_counted_once(upstream: FakeUpstream) -> None:
    with weir_with(upstream) as weir:
        with pytest.raises(httpx2.TimeoutException):
            httpx2.post(f"{weir.url}{ROUTE}", json={"model": "hang", "messages": HELLO}, timeout=0.3)
        weir.records()
        assert samples(weir, "weir_upstream_attempts_total", "outcome") == {("client_disconnected",): 1}
        durations = samples(weir, f"{CLIENT}_duration_seconds_count", "error_type")
        assert durations == {("client_disconnected",): 1}


def test_a_late_attempt_is_not_counted_again_when_its_caller_leaves(upstream: FakeUpstream) -> None:
    """It was given up as late, and the caller left in the pause before the next one."""
    place = {"name": "fake", "base_url": upstream.base_url, "first_byte_timeout": 0.1}
    file = FileConfig.model_validate({"upstreams": [place]})
    body = {"model": "hang", "messages": HELLO}
    with RunningWeir(configuration(file=file, cache_ttl=0.0, openai_max_retries=2)) as weir:
        with pytest.raises(httpx2.TimeoutException):
            httpx2.post(f"{weir.url}{ROUTE}", json=body, timeout=0.25)
        (record,) = weir.records()
        assert total(weir, "weir_upstream_attempts_total") == record.attempts == len(upstream.calls)


def test_an_attempt_that_the_drain_cut_off_is_counted(upstream: FakeUpstream) -> None:
    with weir_with(upstream, drain_timeout=0.0) as weir, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ask, weir, "hang")
        until(lambda: bool(upstream.calls))
        weir.stop()
        assert waiting.result().status_code == 503
        (record,) = weir.records()
        assert record.error_code == "server_shutting_down"
        assert attempts(weir) == {("first", "internal_error"): 1}
        durations = samples(weir, f"{CLIENT}_duration_seconds_count", "error_type")
        assert durations == {("server_shutting_down",): 1}


@pytest.mark.parametrize("end", ["drain", "caller"])
def test_a_later_attempt_that_was_cut_off_is_counted_as_what_it_was(upstream: FakeUpstream, end: str) -> None:
    """Of a request that failed at one place, and was waiting for another."""
    places = [{"upstream": "one", "model": "status-503"}, {"upstream": "two", "model": "hang"}]
    known = [{"name": name, "base_url": upstream.base_url} for name in ("one", "two")]
    file = FileConfig.model_validate({"upstreams": known, "models": [{"name": "moved", "upstreams": places}]})
    with RunningWeir(configuration(file=file, drain_timeout=0.0)) as weir, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ask, weir, "moved", timeout=20 if end == "drain" else 0.5)
        until(lambda: len(upstream.calls) == 2)
        if end == "drain":
            weir.stop()
            assert waiting.result().status_code == 503
        else:
            assert isinstance(waiting.exception(), httpx2.TimeoutException)
        (record,) = weir.records()
        last = "internal_error" if end == "drain" else "client_disconnected"
        assert attempts(weir) == {("first", "upstream_error"): 1, ("failover", last): 1}
        assert record.attempts == 2


@pytest.mark.parametrize("model", ["hang", "stall-first"])
def test_an_attempt_that_the_callers_own_time_cut_off_is_counted(upstream: FakeUpstream, model: str) -> None:
    with weir_with(upstream) as weir:
        answer = ask(weir, model, stream=True, headers={"X-Request-Timeout": "0.3"})
        assert answer.status_code == 504
        (record,) = weir.records()
        assert record.outcome is Outcome.TIMEOUT
        assert attempts(weir) == {("first", "timeout"): 1}
        durations = samples(weir, f"{CLIENT}_duration_seconds_count", "error_type")
        assert durations == {("request_deadline_exceeded",): 1}


def test_a_stream_that_the_callers_own_time_cut_off_had_begun_well(upstream: FakeUpstream) -> None:
    with weir_with(upstream) as weir:
        ask(weir, "ticks-1000-20", stream=True, headers={"X-Request-Timeout": "0.3"})
        (record,) = weir.records()
        assert record.outcome is Outcome.TIMEOUT
        assert attempts(weir) == {("first", "success"): 1}
        assert samples(weir, "weir_streams_total", "outcome") == {("timeout",): 1}
        durations = samples(weir, f"{CLIENT}_duration_seconds_count", "error_type")
        assert durations == {("request_deadline_exceeded",): 1}


# -- waiting and Weir's own time -----------------------------------------------------------------


def test_the_wait_for_a_place_is_told_and_is_no_overhead(upstream: FakeUpstream) -> None:
    places: dict[str, Any] = {"max_concurrent_requests": 1, "max_queue_seconds": 30.0}
    with weir_with(upstream, **places) as weir, ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask, weir, "gate")
        until(lambda: bool(upstream.calls))
        second = pool.submit(ask, weir)
        until(lambda: weir.parts.gate.waiting == 1)
        upstream.release()
        assert (first.result().status_code, second.result().status_code) == (200, 200)
        records = {record.request_model: record for record in weir.records(2)}
        assert records["gate"].queue_seconds is None
        waited = records["good"].queue_seconds
        assert waited is not None
        assert waited > 0
        assert samples(weir, "weir_queue_wait_seconds_count", "priority") == {("normal",): 2}
        assert total(weir, "weir_queue_wait_seconds_sum") == pytest.approx(waited)
        for record in records.values():
            assert waits_of(record) <= record.duration_seconds + 0.001
        told = samples(weir, "weir_overhead_seconds_sum", "route")[(ROUTE,)]
        assert told == pytest.approx(sum(r.overhead_seconds or 0.0 for r in records.values()))


def test_pauses_between_attempts_are_no_overhead(upstream: FakeUpstream) -> None:
    with weir_with(upstream, openai_max_retries=1) as weir:
        assert ask(weir, "flaky-after-1").status_code == 200
        (record,) = weir.records()
        assert record.duration_seconds - waits_of(record) > 0.9, "the pause is in neither"
        assert record.attempts == 2
        assert record.overhead_seconds is not None


# -- all of HTTP ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "handler", "status"),
    [
        ("GET", "/v1/models", "/v1/models", "2xx"),
        ("GET", "/v1/models/a/b", "/v1/models/{model}", "4xx"),
        ("POST", "/v1/models", "/v1/models", "4xx"),
        ("GET", ROUTE, ROUTE, "4xx"),
        ("GET", "/api/v1/conversations/x", "/api/v1/conversations/{conversation_id}", "4xx"),
        ("GET", "/openapi.json", "/openapi.json", "2xx"),
        ("GET", "/docs-assets/made/up", "/docs-assets", "4xx"),
        ("GET", "/health", "/health", "2xx"),
        ("GET", "/made/up", "none", "4xx"),
    ],
)
def test_each_route_has_its_template_as_its_handler(
    upstream: FakeUpstream, method: str, path: str, handler: str, status: str
) -> None:
    with weir_with(upstream) as weir:
        httpx2.request(method, weir.url + path, timeout=20)
        until(lambda: total(weir, "http_requests_total") > 0)
        counted = samples(weir, "http_requests_total", "method", "handler", "status")
        assert counted == {(method, handler, status): 1}


def test_a_caller_who_left_before_the_answer_is_no_fault_of_the_service(upstream: FakeUpstream) -> None:
    with weir_with(upstream) as weir:
        with pytest.raises(httpx2.TimeoutException):
            httpx2.post(f"{weir.url}{ROUTE}", json={"model": "hang", "messages": HELLO}, timeout=0.3)
        until(lambda: total(weir, "http_requests_total") > 0)
        assert samples(weir, "http_requests_total", "status") == {("4xx",): 1}


# -- sums ----------------------------------------------------------------------------------------


def test_metrics_and_ledger_agree(upstream: FakeUpstream) -> None:
    models = ["good", "status-500", "status-400", "status-429", "html", "drop", "no-usage", "status-408"]
    with weir_with(upstream) as weir:
        for model in models:
            for stream in (False, True):
                ask(weir, model, stream=stream)
        records = weir.records(2 * len(models))
        by_outcome = Counter((record.outcome.value,) for record in records)
        assert samples(weir, "weir_requests_total", "outcome") == by_outcome
        assert total(weir, "weir_upstream_attempts_total") == sum(r.attempts for r in records)
        assert total(weir, f"{CLIENT}_duration_seconds_count") == sum(r.attempts for r in records)
        assert total(weir, "gen_ai_server_request_duration_seconds_count") == len(records)
        for metric, field in (("input", "input_tokens"), ("output", "output_tokens")):
            counted = total(weir, f"{CLIENT}_usage_{metric}_tokens_total")
            assert counted == sum(getattr(r.usage, field) for r in records if r.usage is not None) > 0


def test_the_price_table_has_an_age(upstream: FakeUpstream) -> None:
    with weir_with(upstream) as weir:
        until(lambda: weir.metric("weir_price_table_age_seconds") > 0)


def test_the_page_of_a_weir_that_served_is_read_by_a_scraper(upstream: FakeUpstream) -> None:
    with weir_with(upstream) as weir:
        ask(weir)
        ask(weir, stream=True)
        weir.records(2)
        page, _ = exposition(weir.registry)("application/openmetrics-text")
        families = text_string_to_metric_families(page.decode())  # type: ignore[no-untyped-call]
        names = {family.name for family in families}
        assert {"weir_requests", "weir_overhead_seconds", "weir_queue_wait_seconds", "weir_streams"} <= names
