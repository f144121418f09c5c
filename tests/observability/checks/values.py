"""What panels show over the whole run, by their own queries, against what was really asked and answered.

A rate does not see what was counted before the first scrape of a pod, and guesses what came between the last
scrape and the end: hence the tolerance, which no wrong unit, label or divisor fits into.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Final

import pytest

from service.domain import Outcome
from tests.observability.asking import Ask, Seen
from tests.observability.checks.truth import in_buckets
from tests.observability.dashboards import dashboards, fill, usual
from tests.observability.run import Run
from tests.observability.settings import GPT, LAB, MINI, REASONER, VLLM

NEAR: Final = 0.08
SHARE_NEAR: Final = 0.03
"""Of a share, of which a single request may be much where a model has few."""
BY_NAME: Final = {query.name: query for dashboard in dashboards() for query in dashboard.queries}
NOT_VALID: Final = {
    *(Outcome.CLIENT_ERROR, Outcome.RATE_LIMITED),
    *(Outcome.BUDGET_REJECTED, Outcome.CLIENT_DISCONNECTED),
}
"""Outcomes that say nothing of the service: docs/slo.md."""


def shown(run: Run, name: str, *labels: str) -> dict[tuple[str, ...], float]:
    """What a panel shows at the end of the run, by some labels; nothing of what is 0."""
    assert BY_NAME[name].instant, "a number, not a course"
    return _asked(run, name, labels)


def added_up(run: Run, name: str, *labels: str) -> dict[tuple[str, ...], float]:
    """Of a course of rates, how many events it shows: as `shown`, in one window of the whole run."""
    assert not BY_NAME[name].instant, "a course, not a number"
    seconds = round(run.ended - run.began)
    return {key: rate * seconds for key, rate in _asked(run, name, labels).items()}


def _asked(run: Run, name: str, labels: tuple[str, ...]) -> dict[tuple[str, ...], float]:
    seconds = round(run.ended - run.began)
    expression = fill(BY_NAME[name].expression, usual(range_seconds=seconds, rate_seconds=seconds))
    found = run.prometheus.query(expression, run.ended)
    return {tuple(s.labels.get(label, "") for label in labels): s.value for s in found if s.value}


def counted(run: Run, name: str, *labels: str) -> Counter[tuple[str, ...]]:
    """What the pods themselves say of the main part: their last numbers, less those that it began with."""
    found = Counter(run.samples.by(name, *labels))
    found.subtract(run.opened.by(name, *labels))
    return found


def near(expected: Mapping[tuple[str, ...], float]) -> object:
    return pytest.approx({key: value for key, value in expected.items() if value}, rel=NEAR)


def dollars(run: Run, *places: int) -> dict[tuple[str, ...], float]:
    """By tenant (0) and model (1)."""
    found: Counter[tuple[str, ...]] = Counter()
    for key, usd in run.truth.rated().dollars().items():
        found[tuple(key[place] for place in places)] += float(usd)  # type: ignore[assignment]
    return dict(found)


def valid(run: Run) -> list[tuple[Ask, Seen]]:
    return [(ask, seen) for ask, seen in run.truth.rated().asked if seen.outcome not in NOT_VALID]


@pytest.mark.parametrize(
    ("panel", "labels", "places"),
    [
        ("cost/Spent in this time (stat)/A", (), ()),
        ("cost/Dearest models (bargauge)/A", ("gen_ai_request_model",), (1,)),
        ("cost/Dearest tenants (bargauge)/A", ("tenant",), (0,)),
        ("cost/Tenants and models (table)/A", ("tenant", "gen_ai_request_model"), (0, 1)),
        ("overview/Models (table)/E", ("gen_ai_request_model",), (1,)),
        ("overview/Tenants (table)/B", ("tenant",), (0,)),
    ],
)
def test_dollars(traffic_run: Run, panel: str, labels: tuple[str, ...], places: tuple[int, ...]) -> None:
    assert shown(traffic_run, panel, *labels) == near(dollars(traffic_run, *places))


def test_dollars_an_hour(traffic_run: Run) -> None:
    hours = (traffic_run.ended - traffic_run.began) / 3600
    found = shown(traffic_run, "cost/Tenants and models (table)/B", "tenant", "gen_ai_request_model")
    assert found == near({key: usd / hours for key, usd in dollars(traffic_run, 0, 1).items()})


def test_dollars_for_a_thousand_answers(traffic_run: Run) -> None:
    good = sum(seen.outcome is Outcome.SUCCESS for _, seen in traffic_run.truth.rated().asked)
    expected = 1_000 * sum(dollars(traffic_run).values()) / good
    assert shown(traffic_run, "cost/$ per 1000 answers (stat)/A") == near({(): expected})


def test_answers_without_a_price(traffic_run: Run) -> None:
    expected = sum(ask.model == LAB for ask, _ in traffic_run.truth.rated().used())
    assert shown(traffic_run, "cost/Without a price (stat)/A") == near({(): expected})


@pytest.mark.parametrize(("panel", "kind"), [("A", "input"), ("C", "output")])
def test_tokens_by_model(traffic_run: Run, panel: str, kind: str) -> None:
    found = shown(traffic_run, f"tokens/Models (table)/{panel}", "gen_ai_request_model")
    assert found == near({(model,): n for model, n in traffic_run.truth.rated().tokens()[kind].items()})


@pytest.mark.parametrize(
    ("panel", "by_model", "part", "whole"),
    [
        ("tokens/Cached of input (stat)/A", "tokens/Models (table)/B", "cached", "input"),
        ("tokens/Reasoning of output (stat)/A", "tokens/Models (table)/D", "reasoning", "output"),
    ],
)
def test_shares_of_tokens(traffic_run: Run, panel: str, by_model: str, part: str, whole: str) -> None:
    tokens = traffic_run.truth.rated().tokens()
    expected = tokens[part].total() / tokens[whole].total()
    assert 0 < expected < 1
    assert shown(traffic_run, panel) == near({(): expected})
    found = shown(traffic_run, by_model, "gen_ai_request_model")
    for model, every in tokens[whole].items():
        share = tokens[part][model] / every if every else 0.0
        assert found.get((model,), 0.0) == pytest.approx(share, abs=SHARE_NEAR), model


def test_the_share_of_answers_from_the_cache(traffic_run: Run) -> None:
    asked = [seen for ask, seen in traffic_run.truth.rated().asked if ask.keep and seen.status == 200]
    expected = sum(seen.cached for seen in asked) / len(asked)
    assert shown(traffic_run, "tokens/Weir's cache hits (stat)/A") == near({(): expected})


def test_the_availability(traffic_run: Run) -> None:
    outcomes = [seen.outcome for _, seen in valid(traffic_run)]
    expected = outcomes.count(Outcome.SUCCESS) / len(outcomes)
    assert expected < 0.95, "enough goes wrong to be seen"
    found = shown(traffic_run, "overview/Availability (stat)/A")
    assert 1 - found[()] == pytest.approx(1 - expected, rel=NEAR)


def test_the_failed_share_of_each_model(traffic_run: Run) -> None:
    """Of those that were turned away at the door nobody knew the model, of those after a wait one did."""
    every, failed, turned_away = Counter[str](), Counter[str](), Counter[str]()
    for ask, seen in valid(traffic_run):
        if seen.outcome is Outcome.OVERLOADED:
            turned_away[ask.model] += 1
        else:
            every[ask.model] += 1
            failed[ask.model] += seen.outcome is not Outcome.SUCCESS
    found = shown(traffic_run, "overview/Models (table)/B", "gen_ai_request_model")
    assert failed[GPT] == 0 < failed[REASONER]
    for model, number in every.items():
        least = failed[model] / number
        most = (failed[model] + turned_away[model]) / (number + turned_away[model])
        share = found.get((model,), 0.0)
        assert least - SHARE_NEAR <= share <= most + SHARE_NEAR, model


def test_requests_a_second_by_tenant(traffic_run: Run) -> None:
    """But for those that were turned away at the door, before anybody knew whose they were."""
    found = shown(traffic_run, "overview/Tenants (table)/A", "tenant")
    asked = traffic_run.truth.rated().asked
    seconds = traffic_run.ended - traffic_run.began
    most = Counter(ask.tenant for ask, _ in asked if not ask.wrong_key)
    least = Counter(
        ask.tenant for ask, seen in asked if not ask.wrong_key and seen.outcome is not Outcome.OVERLOADED
    )
    assert {tenant for (tenant,) in found} == most.keys()
    for (tenant,), rate in found.items():
        assert least[tenant] * (1 - NEAR) <= rate * seconds <= most[tenant] * (1 + NEAR), tenant


# -- times, upstreams and places -----------------------------------------------------------------------


def first_tokens(run: Run, model: str = "") -> list[tuple[float, float]]:
    """Of each stream: when the provider began it, and when the caller saw it. Weir's time lies between."""
    return [
        (ask.told.first, seen.first_seconds)
        for ask, seen in run.truth.rated().asked
        if seen.first_seconds is not None and not seen.cached and model in ("", ask.model)
    ]


@pytest.mark.parametrize(
    ("panel", "by_model", "quantile"),
    [
        ("latency/TTFT p50 (stat)/A", "latency/Models (table)/A", 0.5),
        ("latency/TTFT p95 (stat)/A", "latency/Models (table)/B", 0.95),
    ],
)
def test_quantiles_of_first_tokens(traffic_run: Run, panel: str, by_model: str, quantile: float) -> None:
    found = shown(traffic_run, by_model, "gen_ai_request_model")
    assert {(GPT,), (MINI,), (LAB,)} <= found.keys()
    for (model,), seconds in {**found, ("",): shown(traffic_run, panel)[()]}.items():
        told, seen = zip(*first_tokens(traffic_run, model), strict=True)
        least, most = in_buckets(told, quantile), in_buckets(seen, quantile)
        assert least * (1 - NEAR) <= seconds <= most * (1 + NEAR), model


@pytest.mark.parametrize("board", ["latency", "overview"])
def test_the_share_of_first_tokens_in_time(traffic_run: Run, board: str) -> None:
    streams = first_tokens(traffic_run)
    told, seen = (sum(times[side] > 2.5 for times in streams) for side in (0, 1))
    assert told > 4, "some are late"
    late = (1 - shown(traffic_run, f"{board}/TTFT within 2.5 s (stat)/A")[()]) * len(streams)
    assert told * (1 - NEAR) - 1 <= late <= seen * (1 + NEAR) + 1


def test_retry_amplification(traffic_run: Run) -> None:
    kinds = counted(traffic_run, "weir_upstream_attempts_total", "kind")
    expected = kinds.total() / kinds[("first",)]
    found = shown(traffic_run, "upstreams/Retry amplification (stat)/A")[()]
    assert expected > 1 + SHARE_NEAR
    assert found - 1 == pytest.approx(expected - 1, rel=2 * NEAR)


def test_the_fallback_ratio(traffic_run: Run) -> None:
    kinds = counted(traffic_run, "weir_upstream_attempts_total", "kind")
    expected = (kinds[("failover",)] + kinds[("fallback",)]) / kinds[("first",)]
    found = shown(traffic_run, "upstreams/Fallback ratio (stat)/A")[()]
    assert found == pytest.approx(expected, rel=2 * NEAR)


def test_refusals_of_upstreams(traffic_run: Run) -> None:
    attempts = counted(traffic_run, "weir_upstream_attempts_total", "upstream", "outcome")
    expected = {key[:1]: n for key, n in attempts.items() if key[1] == "rate_limited"}
    assert expected.keys() == {(VLLM,)}
    panel = "upstreams/Refused for their limits (429) (timeseries)/A"
    assert added_up(traffic_run, panel, "upstream") == near(expected)
    assert added_up(traffic_run, "upstreams/Refused with 429 (stat)/A") == near({(): expected[(VLLM,)]})


def test_requests_turned_away(traffic_run: Run) -> None:
    """By the callers' account, and each reason and class by the pods'."""
    told = sum(seen.code == "overloaded" for _, seen in traffic_run.truth.rated().asked)
    sheds = counted(traffic_run, "weir_shed_total", "reason", "priority")
    assert sheds.total() == told > 50
    found = added_up(traffic_run, "pods/Requests turned away (timeseries)/A", "reason", "priority")
    assert found == near(sheds)
