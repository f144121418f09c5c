"""What panels show over the whole run, by their own queries, against what was really asked and answered.

A rate does not see what was counted before the first scrape of a pod, and guesses what came between the last
scrape and the end: hence the tolerance, which no wrong unit, label or divisor fits into.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

import pytest

from service.domain import Outcome
from tests.observability.asking import Ask, Seen
from tests.observability.dashboards import Query, dashboards, fill, usual
from tests.observability.run import Run
from tests.observability.settings import GPT, LAB, REASONER

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
    query: Query = BY_NAME[name]
    assert query.instant, "a number, not a course"
    expression = fill(query.expression, usual(range_seconds=run.ended - run.began))
    found = run.prometheus.query(expression, run.ended)
    return {tuple(s.labels.get(label, "") for label in labels): s.value for s in found if s.value}


def near(expected: dict[tuple[str, ...], float]) -> object:
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
