"""Metrics: sums of records, with labels from bounded sets."""

from __future__ import annotations

from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from service.domain import Cost, Operation, Outcome, Principal, RequestRecord, Usage
from service.errors import UpstreamTimeout, UpstreamUnavailable
from service.telemetry import MAX_MODELS, MAX_TENANTS, OTHER, BoundedLabel, Metrics, exposition

GENAI = {
    "gen_ai_operation_name": "chat",
    "gen_ai_provider_name": "openai",
    "gen_ai_request_model": "asked",
    "gen_ai_response_model": "answered",
}


def record(**fields: Any) -> RequestRecord:
    known: dict[str, Any] = {
        "id": "1",
        "request_id": "r",
        "route": "/v1/chat/completions",
        "operation": Operation.CHAT,
        "outcome": Outcome.SUCCESS,
        "request_model": "asked",
        "response_model": "answered",
        "provider": "openai",
        "upstream": "openai",
        "attempts": 1,
    }
    return RequestRecord(**known | fields)


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


def test_a_record_becomes_its_metrics() -> None:
    measured = Measured()
    measured.went(
        usage=Usage(100, 50, cached_input_tokens=30, cache_write_tokens=5, reasoning_tokens=20),
        cost=Cost(0.25, "genai-prices"),
        principal=Principal("key", "team-a"),
        duration_seconds=2.0,
        time_to_first_token_seconds=0.5,
        time_per_output_token_seconds=0.03,
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
        assert measured(f"gen_ai_client_inference_usage_{kind}_total", **GENAI) == count
    assert measured("weir_cost_usd_total", **GENAI, tenant="team-a", cost_source="genai-prices") == 0.25
    assert measured("gen_ai_server_request_duration_seconds_sum", **GENAI, error_type="") == 2.0
    assert measured("gen_ai_server_time_to_first_token_seconds_sum", **GENAI) == 0.5
    assert measured("gen_ai_server_time_per_output_token_seconds_sum", **GENAI) == 0.03
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
@pytest.mark.parametrize("code", ["some_code", None])
def test_each_outcome_is_counted_with_its_error(outcome: Outcome, code: str | None) -> None:
    measured = Measured("asked", "answered")
    measured.went(outcome=outcome, error_code=code)
    labels = {"route": "/v1/chat/completions", "gen_ai_request_model": "asked"}
    assert measured("weir_requests_total", **labels, outcome=outcome.value) == 1
    error = code or outcome.value
    assert measured("gen_ai_server_request_duration_seconds_count", **GENAI, error_type=error) == 1
    assert measured("openai_api_calls_total", model="asked", status="error") == 1


def test_attempts_are_told_apart_from_requests() -> None:
    measured = Measured("asked")
    measured.metrics.attempted(record(attempts=1), UpstreamUnavailable("no"))
    measured.metrics.attempted(record(attempts=2), UpstreamTimeout("late"))
    measured.metrics.attempted(record(attempts=3), None)
    name, known = "weir_upstream_attempts_total", {"upstream": "openai", "gen_ai_request_model": "asked"}
    assert measured(name, **known, kind="first", outcome="upstream_error") == 1
    assert measured(name, **known, kind="retry", outcome="timeout") == 1
    assert measured(name, **known, kind="retry", outcome="success") == 1


def test_a_request_that_never_reached_a_model_is_counted_too() -> None:
    measured = Measured()
    measured.metrics.refused("/v1/chat/completions", Outcome.CLIENT_ERROR)
    labels = {"route": "/v1/chat/completions", "gen_ai_request_model": ""}
    assert measured("weir_requests_total", **labels, outcome="client_error") == 1


# -- bounds --------------------------------------------------------------------------------------


def test_ten_thousand_made_up_models_that_failed_add_no_series() -> None:
    measured = Measured()

    def fail(name: str) -> None:
        failed = record(request_model=name, response_model="", outcome=Outcome.UPSTREAM_ERROR)
        measured.metrics.opened()
        measured.metrics.attempted(failed, UpstreamUnavailable("no"))
        measured.metrics.closed(failed)

    fail("junk")
    before, children = measured.series(), len(measured.metrics._children)
    for number in range(10_000):
        fail(f"junk-{number}")
    assert (measured.series(), len(measured.metrics._children)) == (before, children)
    assert measured("weir_label_overflow_total", label="model") == 2 * 10_001
    labels = {"route": "/v1/chat/completions", "gen_ai_request_model": OTHER}
    assert measured("weir_requests_total", **labels, outcome="upstream_error") == 10_001


def test_models_that_answered_get_labels_up_to_a_bound() -> None:
    measured = Measured()
    for number in range(2 * MAX_MODELS):
        measured.went(request_model=f"m-{number}", response_model=f"m-{number}")
    models = {
        sample.labels["model"]
        for family in measured.registry.collect()
        if family.name == "openai_api_calls"
        for sample in family.samples
    }
    assert len(models) == MAX_MODELS + 1
    assert OTHER in models


def test_configured_models_have_labels_even_if_they_fail() -> None:
    measured = Measured("asked")
    measured.went(outcome=Outcome.TIMEOUT)
    assert measured("openai_api_calls_total", model="asked", status="error") == 1


def test_tenants_have_a_bound() -> None:
    measured = Measured()
    for number in range(MAX_TENANTS + 50):
        tenant = Principal("key", f"tenant-{number}")
        measured.went(principal=tenant, usage=Usage(1, 1), cost=Cost(1.0, "flat"))
    assert measured("weir_cost_usd_total", **GENAI, tenant=OTHER, cost_source="flat") == 50


def test_an_empty_label_stands_for_itself() -> None:
    label = BoundedLabel(1)
    assert label.of("", admit=False) == ""
    assert label.of("a", admit=False) == OTHER
    assert label.of("a", admit=True) == "a"
    assert label.of("a", admit=False) == "a"
    assert label.of("b", admit=True) == OTHER


# -- HTTP and the page ---------------------------------------------------------------------------


def test_http_metrics_have_the_instrumentators_names() -> None:
    measured = Measured()
    measured.metrics.http("POST", "/v1/chat/completions", 200, 0.25)
    measured.metrics.http("POST", "/v1/chat/completions", 429, 0.5)
    labels = {"method": "POST", "handler": "/v1/chat/completions"}
    assert measured("http_requests_total", **labels, status="2xx") == 1
    assert measured("http_requests_total", **labels, status="4xx") == 1
    assert measured("http_request_duration_seconds_sum", **labels) == 0.75


@pytest.mark.parametrize(
    ("accept", "kind", "end"),
    [
        ("application/openmetrics-text; version=1.0.0", "application/openmetrics-text", "# EOF\n"),
        ("text/plain", "text/plain", "\n"),
        ("", "text/plain", "\n"),
        ("*/*", "text/plain", "\n"),
    ],
)
def test_the_page_is_written_as_the_scraper_asks(accept: str, kind: str, end: str) -> None:
    measured = Measured()
    measured.went()
    page, content_type = exposition(measured.registry)(accept)
    assert content_type.startswith(kind)
    assert page.decode().endswith(end)
    assert page.decode().endswith("# EOF\n") is (kind != "text/plain")
    assert b"weir_requests_total{" in page
    assert b"_created" not in page
    if kind == "text/plain":
        names = {family.name for family in text_string_to_metric_families(page.decode())}
        assert {"weir_requests", "weir_build_info", "process_open_fds"} <= names
