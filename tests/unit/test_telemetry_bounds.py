"""Bounds of metrics: labels have few values and all series together have room, whatever callers make up."""

from __future__ import annotations

import random
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from service.domain import (
    AttemptKind,
    BudgetState,
    Cost,
    Operation,
    Outcome,
    Principal,
    Standing,
    Usage,
)
from service.errors import UpstreamUnavailable
from service.routing.breaker import Circuit
from service.telemetry import MAX_MODELS, MAX_TENANTS, MOST_SERIES, OTHER, BoundedLabel
from service.telemetry.catalogue import KEY_SERIES
from service.telemetry.instruments import Counter, Gauge
from service.telemetry.labels import MOST_LETTERS, Bounded, Room, is_clean
from tests.crowd import CODES, MODELS, ROUTES, TENANTS, all_of, fill, record
from tests.unit.test_telemetry import GENAI, Measured


def summed(measured: Measured, name: str, **labels: str) -> float:
    return sum(
        sample.value
        for family in measured.registry.collect()
        if name.startswith(family.name)
        for sample in family.samples
        if sample.name == name and all(sample.labels[k] == v for k, v in labels.items())
    )


def values(measured: Measured, label: str) -> set[str]:
    return {
        sample.labels[label]
        for family in measured.registry.collect()
        for sample in family.samples
        if label in sample.labels
    }


# -- values --------------------------------------------------------------------------------------


def test_made_up_models_that_failed_add_no_series() -> None:
    measured = Measured()

    def fail(name: str) -> None:
        failed = record(request_model=name, response_model="", outcome=Outcome.UPSTREAM_ERROR)
        measured.metrics.opened()
        measured.metrics.attempted(failed, UpstreamUnavailable("no"), AttemptKind.FIRST, 0.1)
        measured.metrics.closed(failed)

    fail("junk")
    before = measured.series()
    for number in range(2_000):
        fail(f"junk-{number}")
    assert measured.series() == before
    assert measured("weir_label_overflow_total", label="model") == 2 * 2_001
    labels = {"route": "/v1/chat/completions", "gen_ai_request_model": OTHER}
    assert measured("weir_requests_total", **labels, outcome="upstream_error") == 2_001


def test_models_that_answered_get_labels_up_to_a_bound() -> None:
    measured = Measured()
    for number in range(2 * MAX_MODELS):
        measured.went(request_model=f"m-{number}", response_model=f"m-{number}")
    assert 50 < len(values(measured, "model")) <= MAX_MODELS + 1
    assert OTHER in values(measured, "model")


def test_configured_models_have_labels_even_if_they_fail() -> None:
    measured = Measured("asked")
    measured.went(outcome=Outcome.TIMEOUT)
    assert measured("openai_api_calls_total", model="asked", status="error") == 1


def test_models_that_a_reload_brings_have_labels_at_once() -> None:
    measured = Measured()
    measured.went(outcome=Outcome.TIMEOUT)
    measured.metrics.know(["asked"])
    measured.went(outcome=Outcome.TIMEOUT)
    assert measured("openai_api_calls_total", model=OTHER, status="error") == 1
    assert measured("openai_api_calls_total", model="asked", status="error") == 1


def test_tenants_and_keys_have_a_bound() -> None:
    measured = Measured()
    for number in range(MAX_TENANTS + 50):
        principal = Principal(f"key-{number}", f"tenant-{number}")
        measured.went(principal=principal, usage=Usage(1, 1), cost=Cost(1.0, "flat"))
    assert measured("weir_cost_usd_total", **GENAI, tenant=OTHER, cost_source="flat") == 50
    assert summed(measured, "weir_key_requests_total") == MAX_TENANTS + 50


def test_a_label_stays_within_its_bound() -> None:
    label = BoundedLabel(1)
    assert label.of("", admit=False) == ""
    assert label.of("a", admit=False) == OTHER
    assert label.of("a", admit=True) == "a"
    assert label.of("a", admit=False) == "a"
    assert label.of("b", admit=True) == OTHER


@pytest.mark.parametrize("value", ["a\nb", "a\x00", "x" * (MOST_LETTERS + 1), "a\ud800", "a\u202eb"])
def test_what_nobody_can_read_is_no_value(value: str) -> None:
    label = BoundedLabel(5, [value])
    assert label.of(value, admit=True) == OTHER


@given(st.text(max_size=MOST_LETTERS + 10))
def test_an_admitted_value_is_itself_and_clean(value: str) -> None:
    told = BoundedLabel(5).of(value, admit=True)
    assert told == (value if is_clean(value) else OTHER)


# -- sets of labels ------------------------------------------------------------------------------


def test_labels_become_other_one_after_the_other() -> None:
    metric = Counter("some_total", "Some.", ("model", "tenant"), registry=CollectorRegistry())
    bounded = Bounded(metric, Room(2, folded=1), folds=("tenant", "model"))
    seen = []
    for model, tenant in [("a", "x"), ("a", "y"), ("a", "z"), ("a", "w"), ("b", "x"), ("a", "x")]:
        overflow: set[str] = set()
        bounded.child({"model": model, "tenant": tenant}, overflow).inc()
        seen.append(overflow)
    assert seen == [set(), set(), {"tenant"}, {"tenant"}, {"tenant", "model"}, set()]
    found = {(s.labels["model"], s.labels["tenant"]): s.value for f in metric.collect() for s in f.samples}
    assert found == {("a", "x"): 2, ("a", "y"): 1, ("a", OTHER): 2, (OTHER, OTHER): 1}


def test_a_gauge_without_room_is_left_out() -> None:
    metric = Gauge("some", "Some.", ("tenant",), registry=CollectorRegistry())
    bounded = Bounded(metric, Room(1))
    assert bounded.child({"tenant": "a"}, set()) is not None
    assert bounded.child({"tenant": "b"}, set()) is None
    assert bounded.child({"tenant": "a"}, set()) is not None


@given(
    st.lists(st.tuples(st.sampled_from("abcde"), st.sampled_from("vwxyz"), st.integers(1, 9)), max_size=60),
    st.integers(0, 12),
    st.integers(0, 6),
)
def test_sums_are_kept_whatever_has_room(adds: list[tuple[str, str, int]], most: int, folded: int) -> None:
    metric = Counter("some_total", "Some.", ("model", "tenant"), registry=CollectorRegistry())
    bounded = Bounded(metric, Room(most, folded), folds=("tenant", "model"))
    for model, tenant, number in adds:
        bounded.child({"model": model, "tenant": tenant}, set()).inc(number)
    samples = [s for f in metric.collect() for s in f.samples]
    assert sum(s.value for s in samples) == sum(number for *_, number in adds)
    assert len(samples) <= most + folded + 1


# -- all of it -----------------------------------------------------------------------------------


def test_fifty_models_and_two_hundred_tenants_have_room_together() -> None:
    measured = Measured(*MODELS)
    asked = fill(measured.metrics)
    total = measured.series()
    assert 10_000 < total < MOST_SERIES
    assert summed(measured, "weir_requests_total") == asked
    assert summed(measured, "weir_key_requests_total") == asked
    assert summed(measured, "weir_upstream_attempts_total") == asked
    assert summed(measured, "weir_cost_usd_total") == 10_000
    assert summed(measured, "gen_ai_server_request_duration_seconds_count") == asked
    assert set(MODELS) <= values(measured, "gen_ai_request_model")
    assert set(TENANTS) <= values(measured, "tenant")
    for model in MODELS:
        labels = {"gen_ai_request_model": model}
        assert summed(measured, "weir_cost_usd_total", **labels) == 200, "by model all is told"
        assert summed(measured, "gen_ai_server_time_to_first_token_seconds_count", **labels) == 200
    assert summed(measured, "weir_label_overflow_total") > 0


def test_who_left_is_told_by_model_in_the_worst_hour_too() -> None:
    """WeirCallersLeave asks for it, and is for hours in which much else fails."""
    measured = Measured(*MODELS)
    codes = [code for code in CODES if code != "client_disconnected"]
    for model, code in product(MODELS, codes):
        measured.went(request_model=model, outcome=Outcome.UPSTREAM_ERROR, error_code=code)
    operations = (Operation.RESPONSES, Operation.CHAT)
    for operation, answered, model in product(operations, ("", "answered"), MODELS):
        measured.went(
            operation=operation,
            request_model=model,
            response_model=answered,
            outcome=Outcome.CLIENT_DISCONNECTED,
            error_code="client_disconnected",
        )
    left = {
        sample.labels["gen_ai_request_model"]: sample.value
        for family in measured.registry.collect()
        for sample in family.samples
        if sample.name == "gen_ai_server_request_duration_seconds_count"
        and sample.labels["error_type"] == "client_disconnected"
    }
    assert left == dict.fromkeys(MODELS, 4)


def test_ten_thousand_made_up_names_stay_within_all_bounds() -> None:
    """Callers, upstreams and operators make up whatever a label can be, and every second call goes well."""
    chance = random.Random(7)
    measured = Measured()
    asked = tokens = 0
    dollars = 0.0
    for number in range(10_000):
        good = number % 2 == 0
        made_up = record(
            request_model=f"model-{number}" + ("\n" if number % 7 == 0 else ""),
            response_model=f"answered-{number}",
            provider=f"provider-{number}",
            upstream=f"upstream-{number}",
            operation=chance.choice(list(Operation)),
            outcome=Outcome.SUCCESS if good else chance.choice(list(Outcome)[1:]),
            error_code=None if good else chance.choice((f"code-{number}", *CODES)),
            route=chance.choice(ROUTES),
            stream=chance.random() < 0.5,
            principal=Principal(f"key-{number}", f"tenant-{number}"),
            usage=Usage(10, 5, audio_input_tokens=3),
            cost=Cost(1.0, chance.choice(("genai-prices", "override"))),
            time_to_first_token_seconds=0.5,
            overhead_seconds=0.001,
        )
        all_of(measured.metrics, made_up)
        state = BudgetState(f"budget-{number}", "", used_ratio=0.5, remaining_usd=1.0, warns=False)
        measured.metrics.standing(made_up, Standing(budgets=(state,)))
        if number % 20 == 0:
            measured.metrics.circuit(f"upstream-{number}", f"model-{number}", Circuit.OPEN)
        measured.metrics.http(f"METHOD{number}", "none", 404, 0.1)
        asked, tokens, dollars = asked + 1, tokens + 10, dollars + 1.0
    assert measured.series() < MOST_SERIES
    assert summed(measured, "weir_requests_total") == asked
    assert summed(measured, "openai_api_calls_total") == asked
    assert summed(measured, "weir_upstream_attempts_total") == asked
    assert summed(measured, "gen_ai_server_request_duration_seconds_count") == asked
    assert summed(measured, "gen_ai_client_inference_usage_input_tokens_total") == tokens
    assert summed(measured, "weir_cost_usd_total") == dollars
    assert summed(measured, "http_requests_total") == asked
    assert values(measured, "error_type") <= {"", OTHER, *CODES}
    assert len(values(measured, "tenant")) <= MAX_TENANTS + 1
    assert len(values(measured, "key")) <= KEY_SERIES + 2
    for label in ("gen_ai_request_model", "gen_ai_provider_name", "upstream", "tenant", "key"):
        assert all(map(is_clean, values(measured, label)))
