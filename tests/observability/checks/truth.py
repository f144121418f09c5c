"""What the run's metrics say against what was really asked and answered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from decimal import Decimal

import pytest

from service.domain import Outcome
from service.telemetry import FIRST_TOKEN_BUCKETS
from tests.observability.run import Run
from tests.observability.settings import KEYS, LAB

INPUT = "gen_ai_client_inference_usage_input_tokens_total"
OUTPUT = "gen_ai_client_inference_usage_output_tokens_total"
CACHED = "gen_ai_client_inference_usage_cache_read_input_tokens_total"
WRITTEN = "gen_ai_client_inference_usage_cache_write_input_tokens_total"
REASONING = "gen_ai_client_inference_usage_reasoning_output_tokens_total"
NANO = Decimal("0.000000001")
NOT_VALID = {
    *(Outcome.CLIENT_ERROR, Outcome.RATE_LIMITED),
    *(Outcome.BUDGET_REJECTED, Outcome.CLIENT_DISCONNECTED),
}


def test_the_run_went_as_it_was_written(traffic_run: Run) -> None:
    told = [event for log in traffic_run.lines for event in log.others if event["event"] == "circuit_changed"]
    assert not traffic_run.truth.surprises, "\n".join([*traffic_run.truth.surprises[:20], *map(str, told)])
    assert set(traffic_run.truth.outcomes) == set(Outcome)


def test_the_run_has_two_tenants_and_four_models_with_a_price_and_more(traffic_run: Run) -> None:
    paid = {key for key, usd in traffic_run.truth.dollars().items() if usd}
    assert {tenant for tenant, _ in paid} == {"acme", "globex"}
    assert len({model for _, model in paid}) >= 4
    assert LAB in {ask.model for ask, _ in traffic_run.truth.used()}


def test_requests_by_outcome(traffic_run: Run) -> None:
    seen = {(outcome.value,): float(n) for outcome, n in traffic_run.truth.outcomes.items()}
    assert traffic_run.samples.by("weir_requests_total", "outcome") == seen
    expression = "sum by (outcome) (last_over_time(weir_requests_total[50m]))"
    scraped = traffic_run.prometheus.query(expression, traffic_run.ended)
    assert {(s.labels["outcome"],): s.value for s in scraped} == seen


def test_requests_by_route_and_model(traffic_run: Run) -> None:
    opened = [(a, s) for a, s in traffic_run.truth.asked if not (a.broken_body or a.wrong_key)]
    seen = Counter((a.route, a.model) for a, s in opened if s.outcome is Outcome.SUCCESS)
    found = traffic_run.samples.by("weir_requests_total", "route", "gen_ai_request_model", "outcome")
    assert {k[:2]: v for k, v in found.items() if k[2] == "success"} == seen


def test_requests_by_key(traffic_run: Run) -> None:
    """But for those that were turned away at the door, before anybody knew whose they were."""
    by_key = traffic_run.samples.by("weir_key_requests_total", "tenant", "key")
    wrong_keys = Counter((a.tenant, a.key) for a, _ in traffic_run.truth.asked if a.wrong_key)
    seen = Counter(
        (a.tenant, a.key) for a, s in traffic_run.truth.asked if s.outcome is not Outcome.OVERLOADED
    )
    for (tenant, key), number in by_key.items():
        assert KEYS[key] == tenant
        assert number >= seen[(tenant, key)] - wrong_keys[(tenant, key)]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((INPUT, "input"), (OUTPUT, "output")),
        *((CACHED, "cached"), (WRITTEN, "written"), (REASONING, "reasoning")),
    ],
)
def test_tokens_of_each_kind_and_model(traffic_run: Run, name: str, kind: str) -> None:
    truth = traffic_run.truth.tokens()
    expected = {(model,): float(n) for model, n in truth[kind].items() if n}
    assert expected
    assert traffic_run.samples.by(name, "gen_ai_request_model") == expected
    expression = f"sum by (gen_ai_request_model) (last_over_time({name}[50m]))"
    scraped = traffic_run.prometheus.query(expression, traffic_run.ended)
    assert {(s.labels["gen_ai_request_model"],): s.value for s in scraped if s.value} == expected


@pytest.mark.parametrize(("name", "kind"), [(INPUT, "audio_input"), (OUTPUT, "audio_output")])
def test_audio_tokens_are_a_part_of_all(traffic_run: Run, name: str, kind: str) -> None:
    expected = sum(traffic_run.truth.tokens()[kind].values())
    assert expected > 0
    assert traffic_run.samples.sum(name, gen_ai_token_modality="audio") == expected


def test_dollars_to_the_cent_and_beyond(traffic_run: Run) -> None:
    found = traffic_run.samples.by("weir_cost_usd_total", "tenant", "gen_ai_request_model")
    expected = {key: usd for key, usd in traffic_run.truth.dollars().items() if usd}
    assert found.keys() == expected.keys()
    for key, usd in expected.items():
        assert Decimal(found[key]).quantize(NANO) == usd.quantize(NANO), key
    expression = "sum by (tenant, gen_ai_request_model) (last_over_time(weir_cost_usd_total[50m]))"
    for series in traffic_run.prometheus.query(expression, traffic_run.ended):
        usd = expected.get((series.labels["tenant"], series.labels["gen_ai_request_model"]), Decimal(0))
        assert Decimal(series.value).quantize(NANO) == usd.quantize(NANO), series.labels
    sources = traffic_run.samples.by("weir_cost_usd_total", "cost_source")
    assert set(sources) == {("override",), ("genai-prices",)}


def test_a_model_without_a_price_is_counted(traffic_run: Run) -> None:
    expected = sum(a.model == LAB for a, _ in traffic_run.truth.used())
    found = traffic_run.samples.by("weir_unpriced_requests_total", "gen_ai_request_model")
    assert found == {(LAB,): expected}


def test_answers_from_the_cache(traffic_run: Run) -> None:
    hits = sum(seen.cached for _, seen in traffic_run.truth.asked)
    assert hits > 0
    assert traffic_run.samples.sum("weir_cache_requests_total", result="hit") == hits


def test_attempts_are_what_the_providers_saw(traffic_run: Run) -> None:
    """But that a call which was given up at once may have been too quick for the provider to see it."""
    attempts = traffic_run.samples.by("weir_upstream_attempts_total", "upstream", "outcome")
    for name, calls in traffic_run.provider_calls.items():
        every = sum(number for key, number in attempts.items() if key[0] == name)
        assert every - attempts.get((name, "client_disconnected"), 0) <= calls <= every, name
    kinds = traffic_run.samples.by("weir_upstream_attempts_total", "kind")
    assert set(kinds) == {("first",), ("retry",), ("failover",), ("fallback",), ("hedge",)}


def test_streams_by_how_they_ended(traffic_run: Run) -> None:
    """Those that had begun: whoever got a piece of one."""
    seen = Counter(
        (s.outcome.value,) for a, s in traffic_run.truth.asked if a.stream and s.chunks and not s.cached
    )
    assert traffic_run.samples.by("weir_streams_total", "outcome") == seen


# -- what Prometheus makes of it -----------------------------------------------------------------------


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.95])
def test_quantiles_of_the_first_token(traffic_run: Run, quantile: float) -> None:
    """Between what the provider took and what the caller saw, which Weir's own lies between, one by one.

    Both are put into the buckets, so that what is compared differs in the times alone.
    """
    streams = [(a, s) for a, s in traffic_run.truth.asked if s.first_seconds is not None and not s.cached]
    expression = (
        f"histogram_quantile({quantile}, sum by (le) "
        "(last_over_time(gen_ai_server_time_to_first_token_seconds_bucket[50m])))"
    )
    found = traffic_run.prometheus.value(expression, traffic_run.ended)
    least = in_buckets([a.told.first for a, _ in streams], quantile)
    most = in_buckets([s.first_seconds or 0.0 for _, s in streams], quantile)
    assert least <= found <= most
    count = "sum(last_over_time(gen_ai_server_time_to_first_token_seconds_count[50m]))"
    assert traffic_run.prometheus.value(count, traffic_run.ended) == len(streams)


def test_the_sum_of_the_times_to_first_tokens(traffic_run: Run) -> None:
    """Not to a bucket, but to what the network and the caller's own processor took."""
    streams = [(a, s) for a, s in traffic_run.truth.asked if s.first_seconds is not None and not s.cached]
    found = traffic_run.samples.sum("gen_ai_server_time_to_first_token_seconds_sum")
    assert sum(a.told.first for a, _ in streams) <= found <= sum(s.first_seconds or 0.0 for _, s in streams)


def test_the_share_of_bad_requests(traffic_run: Run) -> None:
    """As the rules record it, against the requests that a rate can see."""
    main = [s.outcome for _, s in traffic_run.truth.rated().asked]
    valid = [outcome for outcome in main if outcome not in NOT_VALID]
    expected = sum(outcome is not Outcome.SUCCESS for outcome in valid) / len(valid)
    for window in ("5m", "30m", "1h"):
        found = traffic_run.prometheus.value(f"weir:availability:error_ratio_rate{window}", traffic_run.ended)
        assert found == pytest.approx(expected, rel=0.08), window


def test_the_share_of_broken_streams(traffic_run: Run) -> None:
    begun = [
        s.outcome
        for a, s in traffic_run.truth.rated().asked
        if a.stream and s.chunks and s.outcome is not Outcome.CLIENT_DISCONNECTED
    ]
    expected = sum(outcome is not Outcome.SUCCESS for outcome in begun) / len(begun)
    for window in ("5m", "30m", "1h"):
        found = traffic_run.prometheus.value(f"weir:streams:error_ratio_rate{window}", traffic_run.ended)
        assert found == pytest.approx(expected, rel=0.08), window


def test_exemplars_lead_to_traces_of_requests(traffic_run: Run) -> None:
    """To those that the collector has: while it took nothing, spans were lost."""
    told = {line.get("trace_id") for pod in traffic_run.lines for line in pod.requests}
    for name in ("gen_ai_server_request_duration_seconds", "gen_ai_server_time_to_first_token_seconds"):
        series = traffic_run.prometheus.exemplars(f"{name}_bucket", traffic_run.began, traffic_run.ended)
        ids = {exemplar["labels"]["trace_id"] for one in series for exemplar in one["exemplars"]}
        assert ids & traffic_run.traces, name
        assert ids <= told, name


def test_all_rules_are_well(traffic_run: Run) -> None:
    rules = traffic_run.prometheus.rules()
    assert rules
    for rule in rules:
        assert rule["health"] == "ok", (rule["name"], rule.get("lastError"))


def test_a_deploy_is_seen(traffic_run: Run) -> None:
    versions = traffic_run.prometheus.query_range(
        "count by (version) (weir_build_info)", traffic_run.began, traffic_run.ended, 1
    )
    points = {s.labels["version"]: [value for _, value in s.points] for s in versions}
    assert points["2.3.0"][0] == 2
    assert points["2.3.0"][-1] == 1
    assert points["2.4.0"][-1] == 1


def in_buckets(values: Sequence[float], quantile: float) -> float:
    """As Prometheus takes it of buckets: by a straight line between the edges."""
    edges = (0.0, *FIRST_TOKEN_BUCKETS)
    counts = [sum(value <= edge for value in values) for edge in edges]
    rank = quantile * len(values)
    place = next(i for i, count in enumerate(counts) if count >= rank)
    share = (rank - counts[place - 1]) / (counts[place] - counts[place - 1])
    return edges[place - 1] + (edges[place] - edges[place - 1]) * share
