"""Metrics: what each record, attempt and stream adds to them."""

from __future__ import annotations

import time
from math import inf
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from service.domain import (
    AttemptKind,
    BudgetState,
    CacheUse,
    Cost,
    Outcome,
    Principal,
    Standing,
    Usage,
)
from service.errors import UpstreamRejected, UpstreamTimeout, UpstreamUnavailable
from service.overload import Priority, Shed
from service.telemetry import Metrics
from service.telemetry.instruments import Histogram, Instrument
from service.telemetry.recorder import ERROR_TYPES
from tests.crowd import record

GENAI = {
    "gen_ai_operation_name": "chat",
    "gen_ai_provider_name": "openai",
    "gen_ai_request_model": "asked",
    "gen_ai_response_model": "answered",
}
UNANSWERED = GENAI | {"gen_ai_response_model": ""}
DURATION = "gen_ai_client_inference_duration_seconds"


class Measured:
    """Metrics with a registry of their own, and a way to look at them."""

    def __init__(self, *models: str) -> None:
        self.registry = CollectorRegistry()
        self.metrics = Metrics(self.registry, "1.2.3", models)

    def __call__(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, labels)

    def series(self) -> int:
        """All series but those of the process."""
        return sum(
            len(family.samples)
            for family in self.registry.collect()
            if not family.name.startswith("process_")
        )

    def went(self, **fields: Any) -> None:
        """A request from its opening to its end."""
        self.metrics.opened()
        self.metrics.closed(record(**fields))


TOKENS = (*GENAI, "gen_ai_token_modality")
LABELS: dict[str, tuple[str, ...]] = {
    DURATION: (*GENAI, "error_type"),
    "gen_ai_client_inference_time_to_first_chunk_seconds": (*GENAI,),
    "gen_ai_client_inference_time_per_output_chunk_seconds": (*GENAI,),
    "gen_ai_client_inference_usage_input_tokens": TOKENS,
    "gen_ai_client_inference_usage_output_tokens": TOKENS,
    "gen_ai_client_inference_usage_cache_read_input_tokens": TOKENS,
    "gen_ai_client_inference_usage_cache_write_input_tokens": TOKENS,
    "gen_ai_client_inference_usage_reasoning_output_tokens": TOKENS,
    "gen_ai_client_inference_operation_input_tokens": (*GENAI,),
    "gen_ai_client_inference_operation_output_tokens": (*GENAI,),
    "gen_ai_server_request_duration_seconds": (*GENAI, "error_type"),
    "gen_ai_server_time_to_first_token_seconds": (*GENAI,),
    "gen_ai_server_time_per_output_token_seconds": (*GENAI,),
    "weir_requests": ("route", "gen_ai_request_model", "outcome"),
    "weir_upstream_attempts": ("upstream", "gen_ai_request_model", "kind", "outcome"),
    "weir_cost_usd": (*GENAI, "tenant", "cost_source"),
    "weir_wasted_cost_usd": ("reason",),
    "weir_unpriced_requests": (*GENAI,),
    "weir_price_table_age_seconds": (),
    "weir_overhead_seconds": ("route",),
    "weir_inflight_requests": (),
    "weir_queue_wait_seconds": ("priority",),
    "weir_event_loop_lag_seconds": (),
    "weir_circuit_state": ("upstream", "model", "state"),
    "weir_cache_requests": ("result",),
    "weir_cache_saved_usd": ("gen_ai_request_model",),
    "weir_budget_remaining_usd": ("tenant", "key", "budget"),
    "weir_degraded": ("feature",),
    "weir_telemetry_dropped": ("signal",),
    "weir_label_overflow": ("label",),
    "weir_build_info": ("version",),
    "http_requests": ("method", "status", "handler"),
    "http_request_duration_seconds": ("method", "handler"),
    "openai_api_calls": ("model", "status"),
    "openai_tokens_used": ("model",),
}
"""Names that others build on: OpenTelemetry's, those that are known from elsewhere, and Weir's own."""
DURATIONS = (*(0.01 * 2**n for n in range(14)), 163.84, 327.68)
BUCKETS: dict[str, tuple[float, ...]] = {
    DURATION: DURATIONS,
    "gen_ai_client_inference_time_to_first_chunk_seconds": DURATIONS,
    "gen_ai_client_inference_time_per_output_chunk_seconds": DURATIONS,
    "gen_ai_client_inference_operation_input_tokens": tuple(4.0**n for n in range(14)),
    "gen_ai_client_inference_operation_output_tokens": tuple(4.0**n for n in range(14)),
    "gen_ai_server_request_duration_seconds": DURATIONS,
    "gen_ai_server_time_to_first_token_seconds": (
        *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
        *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
    ),
    "gen_ai_server_time_per_output_token_seconds": (
        *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5),
    ),
}
"""Those that OpenTelemetry's conventions advise."""


def defined() -> dict[str, Instrument]:
    """All metrics, by their names without the endings of samples."""
    return {
        metric._name: metric
        for metric in Measured().registry._collector_to_names
        if isinstance(metric, Instrument)
    }


def test_names_and_labels_are_those_that_others_know() -> None:
    found = {name: {*metric.names} for name, metric in defined().items()}
    assert {name: found.get(name) for name in LABELS} == {name: {*labels} for name, labels in LABELS.items()}


def test_buckets_are_those_of_the_conventions() -> None:
    found = defined()
    for name, bounds in BUCKETS.items():
        metric = found[name]
        assert isinstance(metric, Histogram)
        assert metric._upper_bounds == pytest.approx([*bounds, inf]), name


def test_a_record_becomes_its_metrics() -> None:
    measured = Measured()
    measured.went(
        usage=Usage(100, 50, cached_input_tokens=30, cache_write_tokens=5, reasoning_tokens=20),
        cost=Cost(0.25, "genai-prices"),
        principal=Principal("key", "team-a"),
        duration_seconds=2.0,
        time_to_first_token_seconds=0.5,
        time_per_output_token_seconds=0.03,
        overhead_seconds=0.002,
    )
    route, model = "/v1/chat/completions", "asked"
    assert measured("weir_requests_total", route=route, gen_ai_request_model=model, outcome="success") == 1
    for kind, count in [
        ("input_tokens", 100),
        ("output_tokens", 50),
        ("cache_read_input_tokens", 30),
        ("cache_write_input_tokens", 5),
        ("reasoning_output_tokens", 20),
    ]:
        labels = GENAI | {"gen_ai_token_modality": "text"}
        assert measured(f"gen_ai_client_inference_usage_{kind}_total", **labels) == count
    assert measured("gen_ai_client_inference_operation_input_tokens_sum", **GENAI) == 100
    assert measured("gen_ai_client_inference_operation_output_tokens_sum", **GENAI) == 50
    assert measured("weir_cost_usd_total", **GENAI, tenant="team-a", cost_source="genai-prices") == 0.25
    assert measured("gen_ai_server_request_duration_seconds_sum", **GENAI, error_type="") == 2.0
    assert measured("gen_ai_server_time_to_first_token_seconds_sum", **GENAI) == 0.5
    assert measured("gen_ai_server_time_per_output_token_seconds_sum", **GENAI) == 0.03
    assert measured("weir_overhead_seconds_sum", route=route) == 0.002
    assert measured("weir_key_requests_total", tenant="team-a", key="key") == 1
    assert measured("openai_api_calls_total", model=model, status="success") == 1
    assert measured("openai_tokens_used_total", model=model) == 150
    assert measured("weir_build_info", version="1.2.3") == 1
    assert measured("weir_unpriced_requests_total", **GENAI) is None


def test_running_requests_and_the_loops_lag_are_told_at_each_heartbeat() -> None:
    measured = Measured()
    measured.metrics.opened()
    measured.metrics.opened()
    measured.metrics.closed(record())
    measured.metrics.beat(0.25)
    assert measured("weir_inflight_requests") == 1
    assert measured("weir_event_loop_lag_seconds") == 0.25
    measured.metrics.closed(record())
    measured.metrics.beat(0.0)
    assert measured("weir_inflight_requests") == 0
    assert measured("weir_event_loop_lag_seconds") == 0


def test_tokens_without_a_price_are_counted_as_unpriced_and_not_as_free() -> None:
    measured = Measured()
    measured.went(usage=Usage(1, 1))
    assert measured("weir_unpriced_requests_total", **GENAI) == 1
    assert not [f for f in measured.registry.collect() if f.name == "weir_cost_usd" and f.samples]


def test_a_record_without_usage_counts_no_tokens() -> None:
    measured = Measured()
    measured.went()
    assert measured("weir_unpriced_requests_total", **GENAI) is None
    assert measured("openai_tokens_used_total", model="asked") is None


@pytest.mark.parametrize("outcome", [o for o in Outcome if o is not Outcome.SUCCESS])
@pytest.mark.parametrize("code", ["api_timeout", None])
def test_each_outcome_is_counted_with_its_error(outcome: Outcome, code: str | None) -> None:
    measured = Measured("asked", "answered")
    measured.went(outcome=outcome, error_code=code)
    labels = {"route": "/v1/chat/completions", "gen_ai_request_model": "asked"}
    assert measured("weir_requests_total", **labels, outcome=outcome.value) == 1
    duration = {**GENAI, "error_type": code or outcome.value}
    if outcome is Outcome.CLIENT_DISCONNECTED:
        duration |= {"gen_ai_operation_name": "", "gen_ai_response_model": ""}
    assert measured("gen_ai_server_request_duration_seconds_count", **duration) == 1
    assert measured("openai_api_calls_total", model="asked", status="error") == 1


def test_all_outcomes_are_there_before_the_first_failure() -> None:
    """A rate sees no event that comes together with its series."""
    measured = Measured("asked")
    measured.went()
    measured.metrics.expect(["/v1/embeddings"])
    measured.metrics.streamed(record(stream=True), 1.0)
    asked = {"gen_ai_request_model": "asked"}
    for outcome in Outcome:
        first = 1 if outcome is Outcome.SUCCESS else 0
        route = {"route": "/v1/chat/completions", "outcome": outcome}
        assert measured("weir_requests_total", **route, **asked) == first
        assert measured("weir_streams_total", outcome=outcome, **asked) == first
        route["route"] = "/v1/embeddings"
        assert measured("weir_requests_total", **route, gen_ai_request_model="") == 0


def test_an_error_type_that_nobody_knows_becomes_other() -> None:
    measured = Measured("asked", "answered")
    measured.went(outcome=Outcome.UPSTREAM_ERROR, error_code="made-up")
    name = "gen_ai_server_request_duration_seconds_count"
    assert measured(name, **GENAI, error_type="_other") == 1
    assert measured("weir_label_overflow_total", label="error_type") == 1
    assert {"response_failed", "client_disconnected", "internal_error", "timeout"} <= ERROR_TYPES


def test_tokens_of_failed_calls_are_sums_but_no_sizes() -> None:
    measured = Measured("asked", "answered")
    measured.went(outcome=Outcome.STREAM_TRUNCATED, usage=Usage(10, 5))
    labels = GENAI | {"gen_ai_token_modality": "text"}
    assert measured("gen_ai_client_inference_usage_input_tokens_total", **labels) == 10
    assert measured("gen_ai_client_inference_operation_input_tokens_count", **GENAI) is None


def test_audio_is_a_modality_of_its_own() -> None:
    measured = Measured()
    measured.went(usage=Usage(100, 50, audio_input_tokens=30, audio_output_tokens=50))
    for kind, modality, count in [
        ("input_tokens", "text", 70),
        ("input_tokens", "audio", 30),
        ("output_tokens", "text", None),
        ("output_tokens", "audio", 50),
    ]:
        labels = GENAI | {"gen_ai_token_modality": modality}
        assert measured(f"gen_ai_client_inference_usage_{kind}_total", **labels) == count


def test_an_answer_from_the_cache_says_nothing_of_first_tokens() -> None:
    measured = Measured()
    cost = Cost(0.0, "cache")
    measured.went(cache=CacheUse.HIT, saved_usd=0.5, time_to_first_token_seconds=0.001, cost=cost)
    measured.went(cache=CacheUse.MISS, time_to_first_token_seconds=0.5)
    assert measured("weir_cache_requests_total", result="hit") == 1
    assert measured("weir_cache_requests_total", result="miss") == 1
    assert measured("weir_cache_saved_usd_total", gen_ai_request_model="asked") == 0.5
    assert measured("gen_ai_server_time_to_first_token_seconds_count", **GENAI) == 1


# -- attempts ------------------------------------------------------------------------------------


def test_attempts_are_told_apart_from_requests() -> None:
    measured = Measured("asked")
    attempted = measured.metrics.attempted
    attempted(record(attempts=1), UpstreamUnavailable("no"), AttemptKind.FIRST, 0.1)
    attempted(record(attempts=2), UpstreamTimeout("late"), AttemptKind.RETRY, 0.2)
    attempted(record(attempts=3), None, AttemptKind.RETRY, 0.3, "answered")
    name, known = "weir_upstream_attempts_total", {"upstream": "openai", "gen_ai_request_model": "asked"}
    assert measured(name, **known, kind="first", outcome="upstream_error") == 1
    assert measured(name, **known, kind="retry", outcome="timeout") == 1
    assert measured(name, **known, kind="retry", outcome="success") == 1


def test_each_attempt_has_its_duration_with_its_error() -> None:
    measured = Measured("asked")
    attempted = measured.metrics.attempted
    attempted(record(), UpstreamUnavailable("no"), AttemptKind.FIRST, 0.1)
    attempted(record(), None, AttemptKind.RETRY, 0.3, "answered")
    assert measured(f"{DURATION}_sum", **UNANSWERED, error_type="openai_service_error") == 0.1
    assert measured(f"{DURATION}_sum", **GENAI, error_type="") == 0.3


def test_an_upstreams_own_408_is_a_timeout() -> None:
    measured = Measured("asked")
    measured.metrics.attempted(record(), UpstreamRejected(408, {}), AttemptKind.FIRST, 0.1)
    labels = {"upstream": "openai", "gen_ai_request_model": "asked", "kind": "first"}
    assert measured("weir_upstream_attempts_total", **labels, outcome="timeout") == 1


def test_a_stream_has_its_first_chunk_its_pace_and_its_end() -> None:
    measured = Measured()
    streaming = record(stream=True)
    measured.metrics.attempted(streaming, None, AttemptKind.FIRST, 0.25, "answered")
    name = "gen_ai_client_inference_time_to_first_chunk_seconds_sum"
    assert measured(name, **GENAI) == 0.25
    assert measured(f"{DURATION}_count", **GENAI, error_type="") is None, "it has not ended"
    pace = measured.metrics.pace(streaming, "answered")
    pace(0.5, 1)
    pace(0.25, 5)
    name = "gen_ai_client_inference_time_per_output_chunk_seconds"
    assert measured(f"{name}_count", **GENAI) == 6
    assert measured(f"{name}_sum", **GENAI) == 0.75
    assert measured(f"{name}_bucket", **GENAI, le="0.08") == 5
    measured.metrics.streamed(streaming, 2.0)
    assert measured(f"{DURATION}_sum", **GENAI, error_type="") == 2.0
    assert measured("weir_streams_total", gen_ai_request_model="asked", outcome="success") == 1


def test_a_stream_that_broke_is_told_by_its_record() -> None:
    measured = Measured("asked", "answered")
    broken = record(stream=True, outcome=Outcome.STREAM_TRUNCATED, error_code="stream_truncated")
    measured.metrics.streamed(broken, 2.0)
    assert measured(f"{DURATION}_sum", **GENAI, error_type="stream_truncated") == 2.0
    labels = {"gen_ai_request_model": "asked", "outcome": "stream_truncated"}
    assert measured("weir_streams_total", **labels) == 1


def test_a_stream_that_nobody_heard_has_a_duration_and_no_end() -> None:
    measured = Measured("asked")
    measured.metrics.unheard(record(stream=True), AttemptKind.HEDGE, 0.5)
    assert measured(f"{DURATION}_sum", **UNANSWERED, error_type="client_disconnected") == 0.5
    assert not [f for f in measured.registry.collect() if f.name == "weir_streams" and f.samples]


def test_what_was_wasted_is_told_by_its_reason() -> None:
    measured = Measured()
    assert measured("weir_wasted_cost_usd_total", reason="hedge") == 0
    measured.metrics.hedged(won=True, wasted_usd=0.5)
    measured.metrics.hedged(won=False, wasted_usd=0.0)
    measured.metrics.late(0.25)
    assert measured("weir_wasted_cost_usd_total", reason="hedge") == 0.5
    assert measured("weir_wasted_cost_usd_total", reason="timeout") == 0.25
    assert (measured("weir_hedges_total", result="won"), measured("weir_hedges_total", result="lost")) == (
        1,
        1,
    )


# -- waiting, budgets, the process ---------------------------------------------------------------


def test_waits_for_a_place_are_told_by_class() -> None:
    measured = Measured()
    measured.metrics.queued("low", 0.5)
    measured.metrics.queued("high", 0.0)
    assert measured("weir_queue_wait_seconds_sum", priority="low") == 0.5
    assert measured("weir_queue_wait_seconds_bucket", priority="high", le="0.001") == 1
    measured.metrics.shed(Shed.LATE, Priority.LOW)
    assert measured("weir_shed_total", reason="queue_timeout", priority="low") == 1
    # A rush is over between two scrapes: all are there from the start, so that a rate sees the first one.
    assert measured("weir_shed_total", reason="queue_full", priority="high") == 0


def test_budgets_are_told_as_they_stand() -> None:
    measured = Measured()
    state = BudgetState("month", "", used_ratio=0.75, remaining_usd=25.0, warns=False)
    measured.metrics.standing(record(principal=Principal("k", "t")), Standing(budgets=(state,)))
    assert measured("weir_budget_used_ratio", tenant="t", key="", budget="month") == 0.75
    assert measured("weir_budget_remaining_usd", tenant="t", key="", budget="month") == 25.0


def test_the_price_table_grows_old() -> None:
    measured = Measured()
    measured.metrics.prices_known(None)
    measured.metrics.beat(0.0)
    assert measured("weir_price_table_age_seconds") == 0
    measured.metrics.prices_known(time.time() - 3 * 86_400)
    measured.metrics.beat(0.0)
    age = measured("weir_price_table_age_seconds")
    assert age is not None
    assert 3 * 86_400 <= age < 3 * 86_400 + 60


def test_lost_telemetry_is_counted_by_signal_from_nothing_on() -> None:
    measured = Measured()
    assert measured("weir_telemetry_dropped_total", signal="traces") == 0
    measured.metrics.telemetry_dropped("logs", 7)
    assert measured("weir_telemetry_dropped_total", signal="logs") == 7
    measured.metrics.log_line_sampled()
    assert measured("weir_log_lines_sampled_total") == 1


def test_a_request_that_never_reached_a_model_is_counted_too() -> None:
    measured = Measured()
    measured.metrics.refused("/v1/chat/completions", Outcome.CLIENT_ERROR)
    labels = {"route": "/v1/chat/completions", "gen_ai_request_model": ""}
    assert measured("weir_requests_total", **labels, outcome="client_error") == 1


# -- HTTP ---------------------------------------------------------------------------


def test_http_metrics_have_the_instrumentators_names() -> None:
    measured = Measured()
    measured.metrics.http("POST", "/v1/chat/completions", 200, 0.25)
    measured.metrics.http("POST", "/v1/chat/completions", 429, 0.5)
    labels = {"method": "POST", "handler": "/v1/chat/completions"}
    assert measured("http_requests_total", **labels, status="2xx") == 1
    assert measured("http_requests_total", **labels, status="4xx") == 1
    assert measured("http_request_duration_seconds_sum", **labels) == 0.75
    measured.metrics.http("BREW", "none", 404, 0.5)
    assert measured("http_requests_total", method="_other", handler="none", status="4xx") == 1
